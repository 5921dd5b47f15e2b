//! The device contract: what a virtio device is, without threads, without epoll, without PCI.
//!
//! A device is a synchronous state machine. It says what it is ([`Device::traits`]), and it answers two kinds of
//! call: "the driver put buffers into queue N" ([`Device::queue`]) and "one of the file descriptors you asked to
//! watch is readable" ([`Device::source`]). Both get the running queues in an [`Active`].
//!
//! ```text
//!            traits()                        queue(i) / source(t), any number of times
//!   new ───────────────▶ idle ── start() ──▶ running ──┐
//!                          ▲                   │  ▲────┘
//!                          └───── stop() ──────┘            stop() = pause = snapshot = first half of reset
//!                          └── reset() ◀── idle             reset() = the driver wrote 0 to device_status
//! ```
//!
//! * The **transport** (`transport/`) owns features, status and queue addresses. It builds the [`Active`] when the
//!   driver sets DRIVER_OK and takes the queues back when the device stops.
//! * The **worker** (`worker.rs`) owns the thread and the epoll instance, and calls the device. Nobody else does
//!   while it runs, so a device needs no locks of its own.
//! * A test or a fuzzer calls the device directly (`testkit.rs`).
//!
//! Everything in guest memory is hostile. A buffer the device does not understand is answered with the device's own
//! error status, or returned with length 0. A ring that cannot be trusted any more is [`Broken`]: the transport sets
//! DEVICE_NEEDS_RESET (virtio 1.3 section 2.1.2) and the worker stops calling the device. A device never panics,
//! never blocks for long and never allocates what a guest's number says without a bound.

use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use vm_memory::{GuestAddress, GuestMemoryAtomic, GuestMemoryMmap};

pub use crate::virtqueue::{Chain, VirtQueue};

/// Guest RAM as devices see it. Shared memory windows and pmem images are not part of it: descriptors that point
/// there are invalid addresses.
pub type Memory = GuestMemoryMmap<()>;

/// A virtqueue (or the device behind it) that cannot go on until the driver resets the device.
#[derive(Debug, thiserror::Error)]
pub enum Broken {
    /// The ring or a descriptor chain in it contradicts virtio 1.3 section 2.7.
    #[error("virtqueue {index}: {source}")]
    Ring {
        /// Which virtqueue.
        index: u16,
        /// What was wrong with it.
        source: virtio_queue::Error,
    },
    /// The driver made a chain available whose head is still in use by the device.
    #[error("virtqueue {index}: descriptor {head} was made available twice")]
    DuplicateHead {
        /// Which virtqueue.
        index: u16,
        /// The head descriptor's index.
        head: u16,
    },
    /// The device returned a chain it does not hold; a defect of the device, kept from reaching the guest's ring.
    #[error("virtqueue {index}: descriptor {head} is not in use by the device")]
    UnknownHead {
        /// Which virtqueue.
        index: u16,
        /// The head descriptor's index.
        head: u16,
    },
    /// The device cannot work any more for a reason of its own.
    #[error("{0}")]
    Device(String),
}

/// A region of host memory the guest reaches through a shared memory capability (virtio 1.3 section 2.10).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SharedMemory {
    /// The `shmid` of the region.
    pub id: u8,
    /// Length in bytes, a multiple of the page size.
    pub len: u64,
}

/// What a device is. All the transport needs in order to negotiate; the answer never changes for one device value.
#[derive(Debug, Clone)]
pub struct Traits {
    /// Virtio device ID (virtio 1.3 section 5).
    pub device_type: u32,
    /// Device-specific feature bits offered, and VIRTIO_F_RING_* as wanted. The transport adds VIRTIO_F_VERSION_1.
    pub features: u64,
    /// Maximum size of each virtqueue; a power of two, at most 32768.
    pub queue_sizes: Vec<u16>,
    /// Device-specific configuration space.
    pub config: Arc<ConfigSpace>,
    /// Shared memory region, if the device has one.
    pub shared_memory: Option<SharedMemory>,
}

/// Device-specific configuration space (virtio 1.3 section 2.5), shared by the transport, which serves the driver's
/// accesses on a vCPU thread, and the device, which may change it while it runs.
#[derive(Debug, Default)]
pub struct ConfigSpace {
    inner: Mutex<ConfigBytes>,
}

#[derive(Debug, Default)]
struct ConfigBytes {
    bytes: Vec<u8>,
    writable: Vec<u8>,
    generation: u8,
}

impl ConfigSpace {
    /// A configuration space the driver can only read.
    #[must_use]
    pub fn read_only(bytes: Vec<u8>) -> Arc<Self> {
        let writable = vec![0; bytes.len()];
        Arc::new(Self { inner: Mutex::new(ConfigBytes { bytes, writable, generation: 0 }) })
    }

    /// A configuration space in which the driver may change the bits set in `writable` (as long as `bytes`).
    #[must_use]
    pub fn with_writable(bytes: Vec<u8>, mut writable: Vec<u8>) -> Arc<Self> {
        writable.resize(bytes.len(), 0);
        Arc::new(Self { inner: Mutex::new(ConfigBytes { bytes, writable, generation: 0 }) })
    }

    fn lock(&self) -> MutexGuard<'_, ConfigBytes> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The driver reads at `offset`; what lies beyond the end reads as zero.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let inner = self.lock();
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = start.checked_add(i).and_then(|at| inner.bytes.get(at)).copied().unwrap_or(0);
        }
    }

    /// The driver writes at `offset`: only writable bits change, anything else is ignored.
    pub fn write(&self, offset: u64, data: &[u8]) {
        let mut inner = self.lock();
        let ConfigBytes { bytes, writable, .. } = &mut *inner;
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        for (i, new) in data.iter().enumerate() {
            let Some(at) = start.checked_add(i) else { break };
            if let (Some(byte), Some(mask)) = (bytes.get_mut(at), writable.get(at)) {
                *byte = (*byte & !mask) | (new & mask);
            }
        }
    }

    /// The device changes its own configuration; the generation (virtio 1.3 section 2.5.1) advances. Follow it with
    /// [`Interrupt::config_changed`].
    pub fn update(&self, offset: usize, data: &[u8]) {
        let mut inner = self.lock();
        if let Some(target) = offset.checked_add(data.len()).and_then(|end| inner.bytes.get_mut(offset..end)) {
            target.copy_from_slice(data);
            inner.generation = inner.generation.wrapping_add(1);
        }
    }

    /// The generation counter, which changes whenever the device changed something.
    #[must_use]
    pub fn generation(&self) -> u8 {
        self.lock().generation
    }

    /// The whole space as it is now, for saving.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        self.lock().bytes.clone()
    }

    /// Takes over what the driver of a snapshot wrote, and its generation; what only the device writes stays.
    pub fn restore(&self, saved: &[u8], generation: u8) {
        self.write(0, saved);
        self.lock().generation = generation;
    }
}

/// How a device reaches the driver: implemented by the transport (MSI-X) and by the test kit (counters).
pub trait Interrupt: Send + Sync {
    /// Used buffers were added to queue `index`.
    fn queue(&self, index: u16);
    /// The device changed its configuration space.
    fn config_changed(&self);
    /// Set DEVICE_NEEDS_RESET and tell the driver (virtio 1.3 section 2.1.2).
    fn needs_reset(&self);
    /// Whether DEVICE_NEEDS_RESET is set: the device is not to be called until the driver has reset it.
    fn is_broken(&self) -> bool;
}

/// What a running device works with.
pub struct Active {
    /// The virtqueues, in the order of [`Traits::queue_sizes`]. A queue the driver did not enable is there and empty.
    pub queues: Vec<VirtQueue>,
    /// Guest RAM.
    pub mem: GuestMemoryAtomic<Memory>,
    /// The way to the driver.
    pub interrupt: Arc<dyn Interrupt>,
    /// The negotiated feature bits.
    pub features: u64,
    /// Whether each file descriptor of [`Device::sources`] is watched now; all are at start.
    listening: Vec<bool>,
}

impl Active {
    /// Puts a running device's surroundings together. `queues` are numbered in order.
    #[must_use]
    pub fn new(
        queues: Vec<VirtQueue>,
        mem: GuestMemoryAtomic<Memory>,
        interrupt: Arc<dyn Interrupt>,
        features: u64,
    ) -> Self {
        Self { queues, mem, interrupt, features, listening: Vec::new() }
    }

    /// The queue with this index.
    ///
    /// # Errors
    /// If the device has no such queue.
    pub fn queue(&mut self, index: u16) -> Result<&mut VirtQueue, Broken> {
        self.queues
            .get_mut(usize::from(index))
            .ok_or_else(|| Broken::Device(format!("no virtqueue with index {index}")))
    }

    /// Stops or resumes watching source `token`: a device that has no room for input does not want to hear of it.
    pub fn listen(&mut self, token: usize, on: bool) {
        if self.listening.len() <= token {
            self.listening.resize(token.saturating_add(1).min(MAX_SOURCES), true);
        }
        if let Some(flag) = self.listening.get_mut(token) {
            *flag = on;
        }
    }

    /// Whether source `token` is to be watched.
    #[must_use]
    pub fn listens(&self, token: usize) -> bool {
        self.listening.get(token).copied().unwrap_or(true)
    }
}

/// The most file descriptors one device may ask to watch. A device with many connections watches one
/// [`crate::worker::EventSet`] that holds them.
pub const MAX_SOURCES: usize = 8;

/// A device's own state in a snapshot, apart from its queues and configuration space, which the transport saves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedState {
    /// The [`crate::registry::Kind`] that wrote it.
    pub kind: String,
    /// Version of `body`; a kind refuses what it does not know.
    pub version: u32,
    /// The kind's own serde state, in postcard's wire format.
    pub body: Vec<u8>,
}

/// Why a device cannot take over a [`SavedState`].
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// It is another kind's, or of a version that this program does not know.
    #[error("the saved state is {kind} version {version}, not {wanted}")]
    Unknown {
        /// The kind that wrote it.
        kind: String,
        /// The version it wrote.
        version: u32,
        /// What is understood.
        wanted: String,
    },
    /// It is not what the kind writes.
    #[error("the saved state is damaged")]
    Damaged,
}

impl SavedState {
    /// The state of a device of the kind `kind`.
    #[must_use]
    pub fn new<T: Serialize>(kind: &str, version: u32, state: &T) -> Self {
        // Plain structs always have a form; what had none would be refused as damaged when it is read.
        Self { kind: kind.to_owned(), version, body: postcard::to_allocvec(state).unwrap_or_default() }
    }

    /// Reads it as what the kind `kind` writes.
    ///
    /// # Errors
    /// If it is something else.
    pub fn read<T: DeserializeOwned>(&self, kind: &str, version: u32) -> Result<T, StateError> {
        if self.kind != kind || self.version != version {
            let wanted = format!("{kind} {version}");
            return Err(StateError::Unknown { kind: self.kind.clone(), version: self.version, wanted });
        }
        match postcard::take_from_bytes(&self.body) {
            Ok((state, [])) => Ok(state),
            _ => Err(StateError::Damaged),
        }
    }
}

/// A virtio device. See the module for who calls what when.
pub trait Device: Send {
    /// What the device is.
    fn traits(&self) -> Traits;

    /// The driver set DRIVER_OK, or a paused device goes on. Called once before any `queue` or `source`.
    ///
    /// # Errors
    /// If the device cannot work with these queues or features.
    fn start(&mut self, active: &mut Active) -> Result<(), Broken> {
        let _ = active;
        Ok(())
    }

    /// The driver made buffers available in queue `index`. May be called when there are none.
    ///
    /// # Errors
    /// If the device must be reset.
    fn queue(&mut self, active: &mut Active, index: u16) -> Result<(), Broken>;

    /// File descriptors to watch for input while the device runs, at most [`MAX_SOURCES`]; the position is the token.
    fn sources(&self) -> Vec<BorrowedFd<'_>> {
        Vec::new()
    }

    /// Source `token` is readable (level-triggered).
    ///
    /// # Errors
    /// If the device must be reset.
    fn source(&mut self, active: &mut Active, token: usize) -> Result<(), Broken> {
        let _ = (active, token);
        Ok(())
    }

    /// The device is about to be paused: finish or give back what is in flight, so that queue state and
    /// [`Device::save`] say everything.
    fn stop(&mut self, active: &mut Active) {
        let _ = active;
    }

    /// The driver reset the device: forget everything the driver caused.
    fn reset(&mut self) {}

    /// Whether [`Device::save`] says all that the guest relies on. Called on the control thread, while the device is stopped.
    ///
    /// # Errors
    /// What would be lost, in a sentence.
    fn can_save(&self) -> Result<(), String> {
        Ok(())
    }

    /// The state of a stopped device.
    fn save(&self) -> SavedState;
}

/// Where the transport put the memory a device asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WindowAddress {
    /// First guest physical address.
    pub guest: GuestAddress,
    /// Length in bytes.
    pub len: u64,
}
