//! The PCI function of a virtio device.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use devices::bus::BusDevice;
use devices::irq::MsiSink;
use devices::pci::{Bar, Capability, ConfigSpace as PciConfig, Identity, Msix, PciDevice};
use virtio_queue::QueueT;
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::common::{Asked, CommonConfig, QueueSetup};
use super::interrupt::{InterruptState, PciInterrupt};
use crate::device::{Active, Device, Interrupt, Memory, SavedState, Traits, VirtQueue, WindowAddress};
use crate::worker::Worker;

/// Bytes of BAR 0, which holds all structures.
pub const BAR0_SIZE: u64 = 0x8000;
/// The BAR of the shared memory region.
pub const SHARED_MEMORY_BAR: u8 = 2;

const COMMON: u64 = 0x0000;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const MSIX_TABLE: u64 = 0x6000;
const MSIX_PBA: u64 = 0x7000;
/// Each queue has its own doorbell address, so that each can be an ioeventfd.
const NOTIFY_MULTIPLIER: u64 = 4;

/// Structure types (virtio 1.3 section 4.1.4).
const CFG_COMMON: u8 = 1;
const CFG_NOTIFY: u8 = 2;
const CFG_ISR: u8 = 3;
const CFG_DEVICE: u8 = 4;
const CFG_PCI: u8 = 5;
const CFG_SHARED_MEMORY: u8 = 8;
const VENDOR_CAPABILITY: u8 = 0x09;

const VENDOR_REDHAT: u16 = 0x1af4;
const DEVICE_BASE: u16 = 0x1040;

/// Turns writes to doorbell addresses into signals without an exit: ioeventfd.
pub trait Doorbells: Send + Sync {
    /// A guest write to MMIO `address` signals `event`.
    ///
    /// # Errors
    /// If the hypervisor refuses; the transport then handles the exits.
    fn add(&self, address: u64, event: &EventFd) -> io::Result<()>;
    /// Ends that.
    fn remove(&self, address: u64, event: &EventFd);
}

/// What runs first on a device's thread.
type ThreadSetup = Arc<dyn Fn() -> io::Result<()> + Send + Sync>;

/// Asks the transport's owner for [`PciTransport::resume`].
type Wanting = Arc<dyn Fn() + Send + Sync>;

/// What a transport is made of.
pub struct Setup<'a> {
    /// The device's identifier, for messages and the thread's name.
    pub id: String,
    /// The device.
    pub device: Box<dyn Device>,
    /// Where BAR 0 is.
    pub bar0: u64,
    /// Where the shared memory region is, if the device has one.
    pub shared_memory: Option<WindowAddress>,
    /// Guest RAM.
    pub mem: GuestMemoryAtomic<Memory>,
    /// Where messages go.
    pub msi: Arc<dyn MsiSink>,
    /// Where doorbells are registered.
    pub doorbells: Arc<dyn Doorbells>,
    /// Runs first on the device's thread.
    pub thread_setup: ThreadSetup,
    /// Called on a vCPU's thread when the driver has started the device and it has no thread yet.
    pub wanting: Wanting,
    /// The transport's state in a snapshot, if this is a restore: the device is paused then, if it was running.
    pub saved: Option<&'a TransportState>,
}

enum Running {
    /// The driver has not set DRIVER_OK, or has reset the device.
    Idle(Box<dyn Device>),
    /// On its thread.
    OnThread,
    /// Paused by the VMM, or waiting for its thread.
    Paused(Box<dyn Device>, Active),
    /// The thread panicked, or the device was shut down; only a new machine helps.
    Gone,
}

struct Inner {
    config: PciConfig,
    common: CommonConfig,
    running: Running,
    /// Made when there is first something to run, by the transport's owner: a vCPU has no right to make threads.
    worker: Option<Worker>,
    /// The machine, or its devices, are paused: what the driver starts waits.
    held: bool,
    /// Queues whose doorbell is registered.
    doorbells: Vec<usize>,
}

/// A virtio device as a PCI function.
pub struct PciTransport {
    id: String,
    traits: Traits,
    bar0: u64,
    mem: GuestMemoryAtomic<Memory>,
    doorbells: Arc<dyn Doorbells>,
    interrupt: Arc<PciInterrupt>,
    kicks: Vec<Arc<EventFd>>,
    msix_control: u8,
    pci_cfg: u8,
    thread_setup: ThreadSetup,
    wanting: Wanting,
    inner: Mutex<Inner>,
}

/// A transport's state while its device is paused, for snapshots.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct TransportState {
    /// Feature negotiation, status and queues.
    common: CommonConfig,
    /// PCI configuration space.
    config: Vec<u8>,
    /// Device-specific configuration space and its generation.
    device_config: (Vec<u8>, u8),
    interrupt: InterruptState,
    /// The driver has started the device.
    running: bool,
}

fn class_of(device_type: u32) -> [u8; 3] {
    match device_type {
        // Mass storage, other.
        2 => [0x01, 0x80, 0],
        // Display, other.
        16 => [0x03, 0x80, 0],
        // Simple communication, other.
        3 => [0x07, 0x80, 0],
        _ => [0xff, 0, 0],
    }
}

/// The body of a virtio structure capability after its ID and next pointer.
fn structure(kind: u8, bar: u8, id: u8, offset: u64, len: u64, extra: &[u32]) -> Vec<u8> {
    // Length of the whole capability: 16 bytes and what follows; both far below 256.
    let cap_len = u8::try_from(16 + 4 * extra.len()).unwrap_or(16);
    let mut body = vec![cap_len, kind, bar, id, 0, 0];
    body.extend(low(offset).to_le_bytes());
    body.extend(low(len).to_le_bytes());
    extra.iter().for_each(|word| body.extend(word.to_le_bytes()));
    body
}

fn low(value: u64) -> u32 {
    let [a, b, c, d, ..] = value.to_le_bytes();
    u32::from_le_bytes([a, b, c, d])
}

impl PciTransport {
    /// Puts the function together.
    ///
    /// # Errors
    /// If no eventfd can be made, or the device's traits do not fit into a PCI function.
    pub fn new(setup: Setup<'_>) -> io::Result<Arc<Self>> {
        let traits = setup.device.traits();
        let queues = traits.queue_sizes.len();
        let vectors = u16::try_from(queues).unwrap_or(u16::MAX).saturating_add(1);
        let msix = Arc::new(Msix::new(vectors, setup.msi));
        let bad = |what: &str| io::Error::new(io::ErrorKind::InvalidInput, format!("{}: {what}", setup.id));
        let device_type = u16::try_from(traits.device_type).map_err(|_| bad("the device type is too large"))?;
        let mut config = PciConfig::new(Identity {
            vendor: VENDOR_REDHAT,
            device: DEVICE_BASE.saturating_add(device_type),
            subsystem_vendor: VENDOR_REDHAT,
            subsystem: 0x40,
            revision: 1,
            class: class_of(traits.device_type),
        });
        config.add_bar(Bar { index: 0, address: setup.bar0, size: BAR0_SIZE, prefetchable: false });
        let (msix_control, pci_cfg) = add_capabilities(&mut config, &traits, &msix, setup.shared_memory)
            .ok_or_else(|| bad("too many capabilities"))?;
        let kicks = (0..queues).map(|_| EventFd::new(EFD_NONBLOCK).map(Arc::new)).collect::<Result<_, _>>()?;
        let common = CommonConfig::new(traits.features, &traits.queue_sizes);
        let this = Self {
            id: setup.id,
            interrupt: Arc::new(PciInterrupt::new(msix, queues)),
            traits,
            bar0: setup.bar0,
            mem: setup.mem,
            doorbells: setup.doorbells,
            kicks,
            msix_control,
            pci_cfg,
            thread_setup: setup.thread_setup,
            wanting: setup.wanting,
            inner: Mutex::new(Inner {
                config,
                common,
                running: Running::Idle(setup.device),
                worker: None,
                held: true,
                doorbells: Vec::new(),
            }),
        };
        if let Some(saved) = setup.saved {
            this.restore(saved)?;
        }
        Ok(Arc::new(this))
    }

    /// Takes over the state of a snapshot. Doorbells are registered when the device goes on.
    fn restore(&self, saved: &TransportState) -> io::Result<()> {
        let other = |what| io::Error::new(io::ErrorKind::InvalidData, format!("{}: the saved {what}", self.id));
        let mut inner = self.lock();
        if !saved.common.fits(&inner.common, saved.running) {
            return Err(other("queues or features are not those of this device"));
        }
        if !inner.config.restore(&saved.config) {
            return Err(other("configuration space is not that of this device"));
        }
        if !self.interrupt.restore(&saved.interrupt) {
            return Err(other("interrupt state is not that of this device"));
        }
        inner.common = saved.common.clone();
        let (bytes, generation) = &saved.device_config;
        self.traits.config.restore(bytes, *generation);
        if saved.running {
            let queues = self.queues(&inner.common).map_err(|_| other("virtqueues are damaged"))?;
            if let Running::Idle(device) = std::mem::replace(&mut inner.running, Running::Gone) {
                inner.running = Running::Paused(device, self.active(queues, &inner.common));
            }
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Stops the device's thread, as before a snapshot; nothing if it does not run. The driver notices nothing.
    pub fn pause(&self) {
        let mut inner = self.lock();
        inner.held = true;
        inner.running = match std::mem::replace(&mut inner.running, Running::Gone) {
            Running::OnThread => match inner.worker.as_ref().and_then(Worker::stop) {
                Some((device, active)) => Running::Paused(device, active),
                None => self.lost(),
            },
            other => other,
        };
    }

    /// Lets a device go on that was paused or has waited for its thread, which is made here; no device that the driver has
    /// not started costs a thread.
    ///
    /// # Errors
    /// If there is no thread to be had.
    pub fn resume(&self) -> io::Result<()> {
        let mut inner = self.lock();
        inner.held = false;
        if !matches!(inner.running, Running::Paused(..)) {
            return Ok(());
        }
        if inner.worker.is_none() {
            let setup = self.thread_setup.clone();
            inner.worker = Some(Worker::spawn(&self.id, Box::new(move || setup()))?);
        }
        if inner.doorbells.is_empty() {
            self.add_doorbells(&mut inner);
        }
        self.run(&mut inner);
        Ok(())
    }

    /// Stops the device for good and drops it, so that its sockets and files are free when this returns.
    pub fn shut_down(&self) {
        let mut inner = self.lock();
        self.remove_doorbells(&mut inner);
        if let Running::OnThread = std::mem::replace(&mut inner.running, Running::Gone) {
            drop(inner.worker.as_ref().and_then(Worker::stop));
        }
    }

    fn lost(&self) -> Running {
        log::error!("{}: the device's thread panicked; the device is off", self.id);
        self.interrupt.needs_reset();
        Running::Gone
    }

    /// Puts a device that waits onto its thread, if it has one and nothing is to wait.
    fn run(&self, inner: &mut Inner) {
        let Some(worker) = inner.worker.as_ref().filter(|_| !inner.held) else { return };
        inner.running = match std::mem::replace(&mut inner.running, Running::Gone) {
            Running::Paused(device, active) => {
                if worker.start(device, active, self.kicks.clone()) {
                    Running::OnThread
                } else {
                    self.lost()
                }
            }
            other => other,
        };
    }

    fn doorbell(&self, queue: usize) -> u64 {
        self.bar0 + NOTIFY + NOTIFY_MULTIPLIER * queue as u64
    }

    fn add_doorbells(&self, inner: &mut Inner) {
        for (i, (kick, queue)) in self.kicks.iter().zip(&inner.common.queues).enumerate() {
            if !queue.enabled {
                continue;
            }
            match self.doorbells.add(self.doorbell(i), kick) {
                Ok(()) => inner.doorbells.push(i),
                Err(e) => log::warn!("{}: doorbell {i} stays an exit: {e}", self.id),
            }
        }
    }

    fn remove_doorbells(&self, inner: &mut Inner) {
        for i in inner.doorbells.drain(..) {
            if let Some(kick) = self.kicks.get(i) {
                self.doorbells.remove(self.doorbell(i), kick);
            }
        }
    }

    /// The driver set DRIVER_OK. Says whether the device waits for a thread.
    fn start(&self, inner: &mut Inner) -> bool {
        let Running::Idle(_) = inner.running else { return false };
        let queues = match self.queues(&inner.common) {
            Ok(queues) => queues,
            Err(index) => {
                log::warn!("{}: virtqueue {index} is not set up properly", self.id);
                self.interrupt.needs_reset();
                return false;
            }
        };
        self.add_doorbells(inner);
        if let Running::Idle(device) = std::mem::replace(&mut inner.running, Running::Gone) {
            inner.running = Running::Paused(device, self.active(queues, &inner.common));
        }
        self.run(inner);
        inner.worker.is_none() && !inner.held
    }

    /// The queues as the driver set them up, or the number of the first that cannot be.
    fn queues(&self, common: &CommonConfig) -> Result<Vec<VirtQueue>, u16> {
        let mem = self.mem.memory();
        let queue = |(index, setup): (u16, &QueueSetup)| {
            let queue = setup.queue(common.accepted).filter(|q| !setup.enabled || q.is_valid(&*mem));
            let queue = queue.ok_or(index)?;
            Ok(VirtQueue::new(index, queue, self.mem.clone(), self.interrupt.clone()))
        };
        (0u16..).zip(&common.queues).map(queue).collect()
    }

    fn active(&self, queues: Vec<VirtQueue>, common: &CommonConfig) -> Active {
        Active::new(queues, self.mem.clone(), self.interrupt.clone(), common.accepted)
    }

    /// The driver wrote 0 to the status: everything it caused is undone before the write completes.
    fn reset(&self, inner: &mut Inner) {
        self.remove_doorbells(inner);
        inner.running = match std::mem::replace(&mut inner.running, Running::Gone) {
            Running::OnThread => match inner.worker.as_ref().and_then(Worker::stop) {
                Some((device, _)) => Running::Idle(device),
                None => self.lost(),
            },
            Running::Paused(device, _) => Running::Idle(device),
            other => other,
        };
        if let Running::Idle(device) = &mut inner.running {
            device.reset();
        }
        inner.common.reset();
        if !matches!(inner.running, Running::Gone) {
            self.interrupt.reset();
        }
    }

    /// The device's identifier.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The state of a paused device and its transport, whose queues are where the device left them.
    ///
    /// # Errors
    /// If the device is running or gone, or would lose something: a sentence.
    pub fn save(&self) -> Result<(TransportState, SavedState), String> {
        let inner = self.lock();
        let mut common = inner.common.clone();
        let (running, device) = match &inner.running {
            Running::Idle(device) => (false, device),
            Running::Paused(device, active) => {
                for (setup, queue) in common.queues.iter_mut().zip(&active.queues) {
                    setup.take_over(&queue.state());
                }
                (true, device)
            }
            Running::OnThread | Running::Gone => {
                return Err(format!("the device {} has failed and cannot be saved", self.id));
            }
        };
        device.can_save().map_err(|why| format!("the device {} cannot be saved: {why}", self.id))?;
        let state = TransportState {
            common,
            config: inner.config.save(),
            device_config: (self.traits.config.bytes(), self.traits.config.generation()),
            interrupt: self.interrupt.save(),
            running,
        };
        Ok((state, device.save()))
    }

    fn bar_read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match offset {
            COMMON..ISR => {
                let generation = self.traits.config.generation();
                self.lock().common.read(offset - COMMON, &self.interrupt, generation, data);
            }
            ISR..DEVICE => {
                if let (ISR, Some(first)) = (offset, data.first_mut()) {
                    *first = self.interrupt.take_isr();
                }
            }
            DEVICE..NOTIFY => self.traits.config.read(offset - DEVICE, data),
            MSIX_TABLE..MSIX_PBA => self.interrupt.msix.read_table(offset - MSIX_TABLE, data),
            MSIX_PBA..BAR0_SIZE => self.interrupt.msix.read_pba(offset - MSIX_PBA, data),
            _ => {}
        }
    }

    fn bar_write(&self, offset: u64, data: &[u8]) {
        match offset {
            COMMON..ISR => {
                let mut inner = self.lock();
                match inner.common.write(offset - COMMON, data, &self.interrupt) {
                    Asked::Nothing => {}
                    Asked::Reset => self.reset(&mut inner),
                    Asked::Start => {
                        if self.start(&mut inner) {
                            drop(inner);
                            (self.wanting)();
                        }
                    }
                }
            }
            DEVICE..NOTIFY => self.traits.config.write(offset - DEVICE, data),
            NOTIFY..MSIX_TABLE => {
                let queue = usize::try_from((offset - NOTIFY) / NOTIFY_MULTIPLIER).unwrap_or(usize::MAX);
                // A kick nobody reads yet is seen when the device starts.
                if let Some(kick) = self.kicks.get(queue) {
                    let _ = kick.write(1);
                }
            }
            MSIX_TABLE..MSIX_PBA => self.interrupt.msix.write_table(offset - MSIX_TABLE, data),
            _ => {}
        }
    }

    /// The access that the driver set up in the PCI configuration access capability (virtio 1.3 section 4.1.4.9),
    /// if it is one to BAR 0 of 1, 2 or 4 bytes.
    fn pci_cfg_access(&self) -> Option<(u64, usize)> {
        let [_, _, _, _, bar, _, _, _, o0, o1, o2, o3, l0, l1, l2, l3] = self.lock().config.get::<16>(self.pci_cfg);
        let offset = u64::from(u32::from_le_bytes([o0, o1, o2, o3]));
        let len = usize::try_from(u32::from_le_bytes([l0, l1, l2, l3])).ok()?;
        let end = offset.checked_add(len as u64)?;
        (bar == 0 && matches!(len, 1 | 2 | 4) && offset.is_multiple_of(len as u64) && end <= BAR0_SIZE)
            .then_some((offset, len))
    }

    fn is_pci_cfg_data(&self, offset: u16) -> bool {
        offset == u16::from(self.pci_cfg) + 16
    }
}

/// Adds MSI-X and the virtio structures; returns the offsets of MSI-X message control and of the PCI configuration
/// access capability.
fn add_capabilities(
    config: &mut PciConfig,
    traits: &Traits,
    msix: &Msix,
    shared_memory: Option<WindowAddress>,
) -> Option<(u8, u8)> {
    let msix_cap = config.add_capability(&msix.capability(0, low(MSIX_TABLE), low(MSIX_PBA)))?;
    let notify_len = NOTIFY_MULTIPLIER * traits.queue_sizes.len() as u64;
    let config_len = (traits.config.bytes().len() as u64).max(4);
    let structures = [
        structure(CFG_COMMON, 0, 0, COMMON, 0x38, &[]),
        structure(CFG_ISR, 0, 0, ISR, 1, &[]),
        structure(CFG_DEVICE, 0, 0, DEVICE, config_len, &[]),
        structure(CFG_NOTIFY, 0, 0, NOTIFY, notify_len, &[low(NOTIFY_MULTIPLIER)]),
    ];
    for body in structures {
        config.add_capability(&Capability { id: VENDOR_CAPABILITY, body, writable: Vec::new() })?;
    }
    if let (Some(region), Some(window)) = (traits.shared_memory, shared_memory) {
        config.add_bar(Bar { index: SHARED_MEMORY_BAR, address: window.guest.0, size: window.len, prefetchable: true });
        let high = [0, low(window.len >> 32)];
        let body = structure(CFG_SHARED_MEMORY, SHARED_MEMORY_BAR, region.id, 0, window.len, &high);
        config.add_capability(&Capability { id: VENDOR_CAPABILITY, body, writable: Vec::new() })?;
    }
    let body = structure(CFG_PCI, 0, 0, 0, 0, &[0]);
    // BAR, offset and length are the driver's to write.
    let mut writable = vec![0, 0, 0xff, 0, 0, 0];
    writable.resize(14, 0xff);
    let pci_cfg = config.add_capability(&Capability { id: VENDOR_CAPABILITY, body, writable })?;
    Some((msix_cap.checked_add(2)?, pci_cfg))
}

impl PciDevice for PciTransport {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.lock().config.read(offset, data);
        if self.is_pci_cfg_data(offset)
            && let Some((at, len)) = self.pci_cfg_access()
            && let Some(part) = data.get_mut(..len)
        {
            self.bar_read(at, part);
        }
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        if self.is_pci_cfg_data(offset) {
            if let Some((at, len)) = self.pci_cfg_access()
                && let Some(part) = data.get(..len)
            {
                self.bar_write(at, part);
            }
            return;
        }
        let control = {
            let mut inner = self.lock();
            inner.config.write(offset, data);
            u16::from_le_bytes(inner.config.get(self.msix_control))
        };
        let end = usize::from(offset) + data.len();
        if usize::from(offset) < usize::from(self.msix_control) + 2 && end > usize::from(self.msix_control) {
            self.interrupt.msix.set_control(control);
        }
    }
}

/// BAR 0.
impl BusDevice for PciTransport {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.bar_read(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.bar_write(offset, data);
    }
}

impl Drop for PciTransport {
    fn drop(&mut self) {
        self.shut_down();
    }
}

#[cfg(test)]
impl PciTransport {
    pub(super) fn failed(&self) -> bool {
        self.lock().common.full_status(&self.interrupt) & super::common::status::NEEDS_RESET != 0
    }
}
