//! The common configuration structure (virtio 1.3 section 4.1.4.3): feature negotiation, device status, queue set-up.

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueState, QueueT};
use vm_memory::GuestAddress;

use super::interrupt::PciInterrupt;

/// Status bits (virtio 1.3 section 2.1).
pub(super) mod status {
    pub const DRIVER_OK: u8 = 4;
    pub const FEATURES_OK: u8 = 8;
    pub const NEEDS_RESET: u8 = 64;
}

/// VIRTIO_F_VERSION_1.
pub(super) const VERSION_1: u64 = 1 << 32;
/// VIRTIO_F_RING_EVENT_IDX.
const RING_EVENT_IDX: u64 = 1 << 29;

const DEVICE_FEATURE_SELECT: u64 = 0x00;
const DEVICE_FEATURE: u64 = 0x04;
const DRIVER_FEATURE_SELECT: u64 = 0x08;
const DRIVER_FEATURE: u64 = 0x0c;
const CONFIG_MSIX_VECTOR: u64 = 0x10;
const NUM_QUEUES: u64 = 0x12;
const DEVICE_STATUS: u64 = 0x14;
const CONFIG_GENERATION: u64 = 0x15;
const QUEUE_SELECT: u64 = 0x16;
const QUEUE_SIZE: u64 = 0x18;
const QUEUE_MSIX_VECTOR: u64 = 0x1a;
const QUEUE_ENABLE: u64 = 0x1c;
const QUEUE_NOTIFY_OFF: u64 = 0x1e;
const QUEUE_DESC: u64 = 0x20;
const QUEUE_DRIVER: u64 = 0x28;
const QUEUE_DEVICE: u64 = 0x30;
/// End of the last field that is implemented.
const END: u64 = 0x38;

/// A queue as the driver sets it up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueSetup {
    /// The most descriptors it may have.
    pub max_size: u16,
    /// Descriptors the driver chose.
    pub size: u16,
    /// Whether the driver enabled it.
    pub enabled: bool,
    /// Guest address of the descriptor table.
    pub desc: u64,
    /// Guest address of the available ring.
    pub driver: u64,
    /// Guest address of the used ring.
    pub device: u64,
    /// Next entry of the available ring to take, while the device is stopped.
    pub next_avail: u16,
    /// Next entry of the used ring to fill, while the device is stopped.
    pub next_used: u16,
}

impl QueueSetup {
    fn new(max_size: u16) -> Self {
        Self { max_size, size: max_size, enabled: false, desc: 0, driver: 0, device: 0, next_avail: 0, next_used: 0 }
    }

    /// The queue as a device uses it; nothing if the driver set up what cannot be.
    pub(super) fn queue(&self, features: u64) -> Option<Queue> {
        let mut queue = Queue::new(self.max_size).ok()?;
        queue.try_set_size(self.size).ok()?;
        queue.try_set_desc_table_address(GuestAddress(self.desc)).ok()?;
        queue.try_set_avail_ring_address(GuestAddress(self.driver)).ok()?;
        queue.try_set_used_ring_address(GuestAddress(self.device)).ok()?;
        queue.set_event_idx(features & RING_EVENT_IDX != 0);
        queue.set_next_avail(self.next_avail);
        queue.set_next_used(self.next_used);
        queue.set_ready(self.enabled);
        Some(queue)
    }

    pub(super) fn take_over(&mut self, state: &QueueState) {
        self.next_avail = state.next_avail;
        self.next_used = state.next_used;
    }
}

/// The registers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommonConfig {
    device_feature_select: u32,
    driver_feature_select: u32,
    /// Offered features, VERSION_1 included.
    offered: u64,
    /// Features the driver accepted so far.
    pub(super) accepted: u64,
    /// Device status without NEEDS_RESET, which the device adds.
    pub(super) status: u8,
    queue_select: u16,
    /// The queues.
    pub(super) queues: Vec<QueueSetup>,
}

/// What a write to the structure asks of the transport.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Asked {
    Nothing,
    /// The driver wrote 0 to the status.
    Reset,
    /// The driver set DRIVER_OK.
    Start,
}

impl CommonConfig {
    pub(super) fn new(features: u64, queue_sizes: &[u16]) -> Self {
        Self {
            device_feature_select: 0,
            driver_feature_select: 0,
            offered: features | VERSION_1,
            accepted: 0,
            status: 0,
            queue_select: 0,
            queues: queue_sizes.iter().map(|s| QueueSetup::new(*s)).collect(),
        }
    }

    /// Whether these registers, from a snapshot, can be those of a device that offers what `now` does, and whose driver has
    /// started it or not.
    pub(super) fn fits(&self, now: &Self, running: bool) -> bool {
        let possible = |(then, now): (&QueueSetup, &QueueSetup)| {
            then.max_size == now.max_size && then.size.is_power_of_two() && then.size <= now.max_size
        };
        let agreed = self.accepted & !self.offered == 0 && self.accepted & VERSION_1 != 0;
        let started = self.status & status::DRIVER_OK != 0 && self.status & status::FEATURES_OK != 0 && agreed;
        self.offered == now.offered
            && (started || !running)
            && self.queues.len() == now.queues.len()
            && self.queues.iter().zip(&now.queues).all(possible)
    }

    /// As after a reset.
    pub(super) fn reset(&mut self) {
        let sizes: Vec<u16> = self.queues.iter().map(|q| q.max_size).collect();
        *self = Self::new(self.offered, &sizes);
    }

    fn selected(&self) -> Option<&QueueSetup> {
        self.queues.get(usize::from(self.queue_select))
    }

    pub(super) fn read(&self, offset: u64, interrupt: &PciInterrupt, generation: u8, data: &mut [u8]) {
        data.fill(0);
        let queue = self.selected();
        let field = |f: fn(&QueueSetup) -> u64| queue.map_or(0, f);
        let (start, width, value) = match offset {
            DEVICE_FEATURE_SELECT => (offset, 4, u64::from(self.device_feature_select)),
            DEVICE_FEATURE => (offset, 4, half(self.offered, self.device_feature_select)),
            DRIVER_FEATURE_SELECT => (offset, 4, u64::from(self.driver_feature_select)),
            DRIVER_FEATURE => (offset, 4, half(self.accepted, self.driver_feature_select)),
            CONFIG_MSIX_VECTOR => (offset, 2, u64::from(interrupt.config_vector())),
            NUM_QUEUES => (offset, 2, self.queues.len() as u64),
            DEVICE_STATUS => (offset, 1, u64::from(self.full_status(interrupt))),
            CONFIG_GENERATION => (offset, 1, u64::from(generation)),
            QUEUE_SELECT => (offset, 2, u64::from(self.queue_select)),
            QUEUE_SIZE => (offset, 2, field(|q| u64::from(q.size))),
            QUEUE_MSIX_VECTOR => (offset, 2, u64::from(interrupt.queue_vector(self.queue_select))),
            QUEUE_ENABLE => (offset, 2, field(|q| u64::from(q.enabled))),
            QUEUE_NOTIFY_OFF => (offset, 2, u64::from(self.queue_select)),
            QUEUE_DESC..QUEUE_DRIVER => (QUEUE_DESC, 8, field(|q| q.desc)),
            QUEUE_DRIVER..QUEUE_DEVICE => (QUEUE_DRIVER, 8, field(|q| q.driver)),
            QUEUE_DEVICE..END => (QUEUE_DEVICE, 8, field(|q| q.device)),
            _ => return,
        };
        let skip = usize::try_from(offset - start).unwrap_or(0);
        for (to, from) in data.iter_mut().zip(value.to_le_bytes().into_iter().take(width).skip(skip)) {
            *to = from;
        }
    }

    pub(super) fn full_status(&self, interrupt: &PciInterrupt) -> u8 {
        self.status | if interrupt.device_needs_reset() { status::NEEDS_RESET } else { 0 }
    }

    pub(super) fn write(&mut self, offset: u64, data: &[u8], interrupt: &PciInterrupt) -> Asked {
        let mut bytes = [0; 8];
        for (to, from) in bytes.iter_mut().zip(data) {
            *to = *from;
        }
        let value = u64::from_le_bytes(bytes);
        // Truncation to the field's width is what a narrow register does.
        let [b0, b1, b2, b3, ..] = bytes;
        let (byte, word, dword) = (b0, u16::from_le_bytes([b0, b1]), u32::from_le_bytes([b0, b1, b2, b3]));
        match (offset, data.len()) {
            (DEVICE_FEATURE_SELECT, 4) => self.device_feature_select = dword,
            (DRIVER_FEATURE_SELECT, 4) => self.driver_feature_select = dword,
            (DRIVER_FEATURE, 4) => self.accept(dword),
            (CONFIG_MSIX_VECTOR, 2) => interrupt.set_config_vector(word),
            (DEVICE_STATUS, 1) => return self.set_status(byte),
            (QUEUE_SELECT, 2) => self.queue_select = word,
            (QUEUE_MSIX_VECTOR, 2) => interrupt.set_queue_vector(self.queue_select, word),
            (QUEUE_SIZE..END, 2 | 4 | 8) => self.set_up_queue(offset, data.len(), value),
            _ => {}
        }
        Asked::Nothing
    }

    fn accept(&mut self, features: u32) {
        if self.status & status::FEATURES_OK != 0 {
            return;
        }
        match self.driver_feature_select {
            0 => self.accepted = self.accepted & !0xffff_ffff | u64::from(features),
            1 => self.accepted = self.accepted & 0xffff_ffff | u64::from(features) << 32,
            _ => {}
        }
    }

    fn set_status(&mut self, new: u8) -> Asked {
        if new == 0 {
            return Asked::Reset;
        }
        let mut new = new & !status::NEEDS_RESET | self.status;
        let rising = new & !self.status;
        let agreed = self.accepted & !self.offered == 0 && self.accepted & VERSION_1 != 0;
        if rising & status::FEATURES_OK != 0 && !agreed {
            log::debug!("the driver wants features {:#x} of {:#x}", self.accepted, self.offered);
            new &= !status::FEATURES_OK;
        }
        let start = rising & status::DRIVER_OK != 0 && new & status::FEATURES_OK != 0;
        self.status = new;
        if start { Asked::Start } else { Asked::Nothing }
    }

    /// Queue fields may be written until the device runs (virtio 1.3 section 4.1.4.3.2); afterwards they are ignored,
    /// and so is a size that is none.
    fn set_up_queue(&mut self, offset: u64, len: usize, value: u64) {
        let frozen = self.status & status::DRIVER_OK != 0;
        let Some(queue) = self.queues.get_mut(usize::from(self.queue_select)) else { return };
        if frozen || queue.enabled {
            return;
        }
        let address = match offset {
            QUEUE_SIZE => {
                if let Ok(size) = u16::try_from(value)
                    && size.is_power_of_two()
                    && size <= queue.max_size
                {
                    queue.size = size;
                }
                return;
            }
            QUEUE_ENABLE => {
                queue.enabled = value == 1;
                return;
            }
            QUEUE_DESC..QUEUE_DRIVER => (&mut queue.desc, offset - QUEUE_DESC),
            QUEUE_DRIVER..QUEUE_DEVICE => (&mut queue.driver, offset - QUEUE_DRIVER),
            QUEUE_DEVICE..END => (&mut queue.device, offset - QUEUE_DEVICE),
            _ => return,
        };
        match (address, len) {
            ((field, 0), 8) => *field = value,
            ((field, 0), 4) => *field = *field & !0xffff_ffff | value,
            ((field, 4), 4) => *field = *field & 0xffff_ffff | value << 32,
            _ => {}
        }
    }
}

/// The half of 64 feature bits that the select register names.
fn half(features: u64, select: u32) -> u64 {
    match select {
        0 => features & 0xffff_ffff,
        1 => features >> 32,
        _ => 0,
    }
}
