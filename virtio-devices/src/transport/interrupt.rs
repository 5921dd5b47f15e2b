//! From a device to the driver: which MSI-X vector stands for what, the ISR byte, DEVICE_NEEDS_RESET.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering};

use devices::pci::{Msix, MsixState};
use serde::{Deserialize, Serialize};

use crate::device::Interrupt;

/// VIRTIO_MSI_NO_VECTOR.
pub(super) const NO_VECTOR: u16 = 0xffff;

const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// The state in a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InterruptState {
    config_vector: u16,
    queue_vectors: Vec<u16>,
    isr: u8,
    needs_reset: bool,
    msix: MsixState,
}

/// The transport's implementation of [`Interrupt`]: no locks but MSI-X's own, since workers call it.
pub(super) struct PciInterrupt {
    pub(super) msix: Arc<Msix>,
    config_vector: AtomicU16,
    queue_vectors: Vec<AtomicU16>,
    isr: AtomicU8,
    needs_reset: AtomicBool,
}

impl PciInterrupt {
    pub(super) fn new(msix: Arc<Msix>, queues: usize) -> Self {
        Self {
            msix,
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            isr: AtomicU8::new(0),
            needs_reset: AtomicBool::new(false),
        }
    }

    fn valid(&self, vector: u16) -> u16 {
        if vector < self.msix.vectors() { vector } else { NO_VECTOR }
    }

    pub(super) fn config_vector(&self) -> u16 {
        self.config_vector.load(Ordering::Acquire)
    }

    pub(super) fn set_config_vector(&self, vector: u16) {
        self.config_vector.store(self.valid(vector), Ordering::Release);
    }

    pub(super) fn queue_vector(&self, queue: u16) -> u16 {
        self.queue_vectors.get(usize::from(queue)).map_or(NO_VECTOR, |v| v.load(Ordering::Acquire))
    }

    pub(super) fn set_queue_vector(&self, queue: u16, vector: u16) {
        if let Some(v) = self.queue_vectors.get(usize::from(queue)) {
            v.store(self.valid(vector), Ordering::Release);
        }
    }

    /// Reading the ISR byte clears it (virtio 1.3 section 4.1.4.5).
    pub(super) fn take_isr(&self) -> u8 {
        self.isr.swap(0, Ordering::AcqRel)
    }

    pub(super) fn device_needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::Acquire)
    }

    pub(super) fn save(&self) -> InterruptState {
        InterruptState {
            config_vector: self.config_vector(),
            queue_vectors: self.queue_vectors.iter().map(|v| v.load(Ordering::Acquire)).collect(),
            isr: self.isr.load(Ordering::Acquire),
            needs_reset: self.device_needs_reset(),
            msix: self.msix.save(),
        }
    }

    /// Takes over a snapshot's state; says whether it is that of a function like this one.
    #[must_use]
    pub(super) fn restore(&self, saved: &InterruptState) -> bool {
        if saved.queue_vectors.len() != self.queue_vectors.len() || !self.msix.restore(&saved.msix) {
            return false;
        }
        self.set_config_vector(saved.config_vector);
        for (vector, value) in self.queue_vectors.iter().zip(&saved.queue_vectors) {
            vector.store(self.valid(*value), Ordering::Release);
        }
        self.isr.store(saved.isr, Ordering::Release);
        self.needs_reset.store(saved.needs_reset, Ordering::Release);
        true
    }

    pub(super) fn reset(&self) {
        self.config_vector.store(NO_VECTOR, Ordering::Release);
        for vector in &self.queue_vectors {
            vector.store(NO_VECTOR, Ordering::Release);
        }
        self.isr.store(0, Ordering::Release);
        self.needs_reset.store(false, Ordering::Release);
    }
}

impl Interrupt for PciInterrupt {
    fn queue(&self, index: u16) {
        self.isr.fetch_or(ISR_QUEUE, Ordering::AcqRel);
        self.msix.signal(self.queue_vector(index));
    }

    fn config_changed(&self) {
        self.isr.fetch_or(ISR_CONFIG, Ordering::AcqRel);
        self.msix.signal(self.config_vector());
    }

    fn needs_reset(&self) {
        self.needs_reset.store(true, Ordering::Release);
        self.config_changed();
    }

    fn is_broken(&self) -> bool {
        self.device_needs_reset()
    }
}
