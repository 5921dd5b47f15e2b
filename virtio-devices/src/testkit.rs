//! A driver for tests and fuzzers: it lays out real rings in real guest memory and calls the device directly.
//!
//! [`Driver`] plays the guest. [`Driver::offer`] makes a chain available, [`Driver::run`] is the kick,
//! [`Driver::used`] is what came back. `conformance_tests!` gives a device the tests every device must pass.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test that cannot be set up is to fail, and says so by panicking"
)]

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex};

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use vmm_config::{HostFacts, VmConfig};

use crate::device::{Active, Broken, Device, Interrupt, Memory, SavedState, VirtQueue, WindowAddress};
use crate::gpu::{NoRenderer, RendererFactory};
use crate::registry::{BuildContext, BuildError, ConsoleEnds, Kind, WindowContext, WindowRequest};
use crate::worker::Worker;

/// Guest RAM of the mock: 64 MiB at 0.
pub const RAM: u64 = 64 << 20;
/// Each queue's rings are in a 1 MiB area of their own from here.
const RINGS: u64 = 1 << 20;
const RING_AREA: u64 = 1 << 20;
/// Buffers are handed out from here on.
const BUFFERS: u64 = 16 << 20;

const DESC_F_NEXT: u16 = 1;
const DESC_F_WRITE: u16 = 2;

/// One buffer of a chain.
#[derive(Debug, Clone)]
pub enum Buffer {
    /// The device reads these bytes.
    Readable(Vec<u8>),
    /// The device may write this many bytes.
    Writable(u32),
}

impl Buffer {
    /// A buffer the device reads.
    #[must_use]
    pub fn readable(bytes: &[u8]) -> Self {
        Self::Readable(bytes.to_vec())
    }

    /// A buffer the device writes.
    #[must_use]
    pub fn writable(len: u32) -> Self {
        Self::Writable(len)
    }
}

/// Counts what the device told the driver.
#[derive(Debug, Default)]
pub struct Interrupts {
    queues: Mutex<Vec<u32>>,
    changed: Condvar,
    config: AtomicU32,
    reset: AtomicBool,
}

impl Interrupt for Interrupts {
    fn queue(&self, index: u16) {
        let mut queues = self.queues.lock().unwrap();
        let index = usize::from(index);
        if queues.len() <= index {
            queues.resize(index + 1, 0);
        }
        queues[index] += 1;
        self.changed.notify_all();
    }

    fn config_changed(&self) {
        self.config.fetch_add(1, Ordering::SeqCst);
    }

    fn needs_reset(&self) {
        self.reset.store(true, Ordering::SeqCst);
        let _guard = self.queues.lock().unwrap();
        self.changed.notify_all();
    }

    fn is_broken(&self) -> bool {
        self.reset.load(Ordering::SeqCst)
    }
}

struct Ring {
    size: u16,
    next_desc: u16,
    avail_idx: u16,
    /// Per head: the chain's buffers (address, length).
    chains: Vec<Vec<(u64, u32)>>,
}

/// The guest's side of one device.
pub struct Driver {
    device: Option<Box<dyn Device>>,
    active: Option<Active>,
    mem: GuestMemoryAtomic<Memory>,
    rings: Vec<Ring>,
    interrupts: Arc<Interrupts>,
    kicks: Vec<Arc<EventFd>>,
    next_buffer: u64,
}

fn area(queue: usize) -> (u64, u64, u64) {
    let base = RINGS + RING_AREA * queue as u64;
    (base, base + (600 << 10), base + (700 << 10))
}

impl Driver {
    /// Sets up every queue at its largest size and starts the device, all features accepted.
    ///
    /// # Panics
    /// If the device's traits make no sense.
    #[must_use]
    pub fn new(device: Box<dyn Device>) -> Self {
        let features = device.traits().features;
        Self::with_features(device, features)
    }

    /// As [`Driver::new`] with the features the driver accepts.
    ///
    /// # Panics
    /// If the device's traits make no sense or it refuses to start.
    #[must_use]
    pub fn with_features(mut device: Box<dyn Device>, features: u64) -> Self {
        let mem: Memory = Memory::from_ranges(&[(GuestAddress(0), usize::try_from(RAM).unwrap())]).unwrap();
        let mem = GuestMemoryAtomic::new(mem);
        let interrupts = Arc::new(Interrupts::default());
        let traits = device.traits();
        let mut queues = Vec::new();
        let mut rings = Vec::new();
        for (i, &size) in traits.queue_sizes.iter().enumerate() {
            let (desc, avail, used) = area(i);
            let mut queue = Queue::new(size).unwrap();
            queue.set_size(size);
            queue.try_set_desc_table_address(GuestAddress(desc)).unwrap();
            queue.try_set_avail_ring_address(GuestAddress(avail)).unwrap();
            queue.try_set_used_ring_address(GuestAddress(used)).unwrap();
            queue.set_ready(true);
            queues.push(VirtQueue::new(u16::try_from(i).unwrap(), queue, mem.clone(), interrupts.clone()));
            rings.push(Ring { size, next_desc: 0, avail_idx: 0, chains: vec![Vec::new(); usize::from(size)] });
        }
        let kicks = rings.iter().map(|_| Arc::new(EventFd::new(EFD_NONBLOCK).unwrap())).collect();
        let mut active = Active::new(queues, mem.clone(), interrupts.clone(), features);
        device.start(&mut active).unwrap();
        Self { device: Some(device), active: Some(active), mem, rings, interrupts, kicks, next_buffer: BUFFERS }
    }

    /// Guest memory, for tests that go below chains.
    #[must_use]
    pub fn memory(&self) -> Arc<Memory> {
        Arc::new((*self.mem.memory()).clone())
    }

    /// The device, for tests of its own methods.
    ///
    /// # Panics
    /// While it runs on a worker.
    pub fn device(&mut self) -> &mut dyn Device {
        self.device.as_mut().unwrap().as_mut()
    }

    /// Reserves `len` bytes of guest memory, page aligned.
    pub fn alloc(&mut self, len: u64) -> u64 {
        let addr = self.next_buffer;
        self.next_buffer = (addr + len).next_multiple_of(4096);
        assert!(self.next_buffer <= RAM, "the mock guest is out of memory");
        addr
    }

    /// Puts bytes into guest memory.
    ///
    /// # Panics
    /// If they do not fit there.
    pub fn write(&self, addr: u64, bytes: &[u8]) {
        self.mem.memory().write_slice(bytes, GuestAddress(addr)).unwrap();
    }

    /// Makes a chain available and returns its head.
    pub fn offer(&mut self, queue: u16, buffers: &[Buffer]) -> u16 {
        let parts: Vec<(u64, u32, bool)> = buffers
            .iter()
            .map(|b| match b {
                Buffer::Readable(bytes) => {
                    let addr = self.alloc(bytes.len() as u64);
                    self.mem.memory().write_slice(bytes, GuestAddress(addr)).unwrap();
                    (addr, u32::try_from(bytes.len()).unwrap(), false)
                }
                Buffer::Writable(len) => (self.alloc(u64::from(*len)), *len, true),
            })
            .collect();
        self.offer_parts(queue, &parts)
    }

    /// Makes one buffer at any address available, however wrong.
    pub fn offer_raw(&mut self, queue: u16, addr: u64, len: u32, writable: bool) -> u16 {
        self.offer_parts(queue, &[(addr, len, writable)])
    }

    /// Makes a chain of (address, length, device-writable) available.
    pub fn offer_parts(&mut self, queue: u16, parts: &[(u64, u32, bool)]) -> u16 {
        let q = usize::from(queue);
        let size = self.rings[q].size;
        let head = self.rings[q].next_desc % size;
        let (desc, _, _) = area(q);
        for (i, &(addr, len, writable)) in (0u16..).zip(parts) {
            let at = (head + i) % size;
            let last = usize::from(i) + 1 == parts.len();
            let mut flags = if writable { DESC_F_WRITE } else { 0 };
            flags |= if last { 0 } else { DESC_F_NEXT };
            let mut raw = [0; 16];
            raw[..8].copy_from_slice(&addr.to_le_bytes());
            raw[8..12].copy_from_slice(&len.to_le_bytes());
            raw[12..14].copy_from_slice(&flags.to_le_bytes());
            raw[14..].copy_from_slice(&((at + 1) % size).to_le_bytes());
            self.mem.memory().write_slice(&raw, GuestAddress(desc + 16 * u64::from(at))).unwrap();
        }
        self.rings[q].next_desc = (head + u16::try_from(parts.len()).unwrap()) % size;
        self.rings[q].chains[usize::from(head)] = parts.iter().map(|&(a, l, _)| (a, l)).collect();
        self.make_available(queue, head);
        head
    }

    /// Puts a head into the available ring, whatever it is.
    pub fn make_available(&mut self, queue: u16, head: u16) {
        let q = usize::from(queue);
        let (_, avail, _) = area(q);
        let slot = u64::from(self.rings[q].avail_idx % self.rings[q].size);
        let mem = self.mem.memory();
        mem.write_slice(&head.to_le_bytes(), GuestAddress(avail + 4 + 2 * slot)).unwrap();
        self.rings[q].avail_idx = self.rings[q].avail_idx.wrapping_add(1);
        self.set_avail_idx(queue, self.rings[q].avail_idx);
    }

    /// Sets the available ring's index, whatever it is.
    pub fn set_avail_idx(&mut self, queue: u16, idx: u16) {
        let (_, avail, _) = area(usize::from(queue));
        self.mem.memory().write_slice(&idx.to_le_bytes(), GuestAddress(avail + 2)).unwrap();
    }

    /// Kicks a queue: the device handles what is available, now, on this thread.
    ///
    /// # Errors
    /// What the device answers.
    ///
    /// # Panics
    /// While it runs on a worker.
    pub fn run(&mut self, queue: u16) -> Result<(), Broken> {
        let (device, active) = (self.device.as_mut().unwrap(), self.active.as_mut().unwrap());
        loop {
            device.queue(active, queue)?;
            if !active.queue(queue)?.rearm()? {
                return Ok(());
            }
        }
    }

    /// Tells the device that source `token` is readable.
    ///
    /// # Errors
    /// What the device answers.
    pub fn source(&mut self, token: usize) -> Result<(), Broken> {
        let (device, active) = (self.device.as_mut().unwrap(), self.active.as_mut().unwrap());
        device.source(active, token)?;
        for queue in &mut active.queues {
            queue.rearm()?;
        }
        Ok(())
    }

    /// Whether the device wants to hear of source `token`.
    #[must_use]
    pub fn listens(&self, token: usize) -> bool {
        self.active.as_ref().unwrap().listens(token)
    }

    /// Every entry of the used ring so far: (head, bytes written).
    #[must_use]
    pub fn used(&self, queue: u16) -> Vec<(u16, u32)> {
        let q = usize::from(queue);
        let (_, _, used) = area(q);
        let mem = self.mem.memory();
        let idx: u16 = mem.read_obj(GuestAddress(used + 2)).unwrap();
        let first = idx.saturating_sub(self.rings[q].size);
        (first..idx)
            .map(|i| {
                let at = used + 4 + 8 * u64::from(i % self.rings[q].size);
                let id: u32 = mem.read_obj(GuestAddress(at)).unwrap();
                let len: u32 = mem.read_obj(GuestAddress(at + 4)).unwrap();
                (u16::try_from(id).unwrap(), len)
            })
            .collect()
    }

    /// The used ring's index: how many chains ever came back, modulo 2^16.
    #[must_use]
    pub fn used_idx(&self, queue: u16) -> u16 {
        let (_, _, used) = area(usize::from(queue));
        self.mem.memory().read_obj(GuestAddress(used + 2)).unwrap()
    }

    /// The bytes now in buffer number `part` of the chain at `head`.
    #[must_use]
    pub fn read(&self, queue: u16, head: u16, part: usize) -> Vec<u8> {
        let (addr, len) = self.rings[usize::from(queue)].chains[usize::from(head)][part];
        let mut bytes = vec![0; usize::try_from(len).unwrap()];
        self.mem.memory().read_slice(&mut bytes, GuestAddress(addr)).unwrap();
        bytes
    }

    /// How often the device interrupted for this queue.
    #[must_use]
    pub fn interrupts(&self, queue: u16) -> u32 {
        self.interrupts.queues.lock().unwrap().get(usize::from(queue)).copied().unwrap_or(0)
    }

    /// How often the device said that its configuration changed.
    #[must_use]
    pub fn config_interrupts(&self) -> u32 {
        self.interrupts.config.load(Ordering::SeqCst)
    }

    /// Pauses the device and lets it go on with the same queues.
    ///
    /// # Panics
    /// If it does not go on.
    pub fn pause_and_resume(&mut self) {
        let (device, active) = (self.device.as_mut().unwrap(), self.active.as_mut().unwrap());
        device.stop(active);
        device.start(active).unwrap();
    }

    /// Moves the device onto a worker thread.
    ///
    /// # Panics
    /// If the thread cannot start.
    #[must_use]
    pub fn start_worker(mut self) -> RunningDriver {
        let device = self.device.take().unwrap();
        let active = self.active.take().unwrap();
        let worker = Worker::spawn("test", Box::new(|| Ok(()))).unwrap();
        assert!(worker.start(device, active, self.kicks.clone()));
        RunningDriver { driver: self, worker }
    }
}

/// A [`Driver`] whose device runs on a worker.
pub struct RunningDriver {
    driver: Driver,
    worker: Worker,
}

impl RunningDriver {
    /// Makes a chain available and kicks.
    ///
    /// # Panics
    /// If the mock guest is out of memory.
    pub fn offer(&mut self, queue: u16, buffers: &[Buffer]) -> u16 {
        let head = self.driver.offer(queue, buffers);
        self.driver.kicks[usize::from(queue)].write(1).unwrap();
        head
    }

    /// Makes a chain of (address, length, device-writable) available and kicks.
    ///
    /// # Panics
    /// If the kick fails.
    pub fn offer_parts(&mut self, queue: u16, parts: &[(u64, u32, bool)]) -> u16 {
        let head = self.driver.offer_parts(queue, parts);
        self.driver.kicks[usize::from(queue)].write(1).unwrap();
        head
    }

    /// The driver, for looking at rings and memory.
    pub fn driver(&mut self) -> &mut Driver {
        &mut self.driver
    }

    /// Waits until the device interrupted at least once for `queue`, or needs a reset.
    ///
    /// # Panics
    /// If nothing happens for a minute.
    pub fn wait_for_interrupt(&self, queue: u16) {
        self.wait_for_interrupts(queue, 1);
    }

    /// Waits until the device interrupted at least `count` times for `queue`, or needs a reset.
    ///
    /// # Panics
    /// If that does not happen within a minute.
    pub fn wait_for_interrupts(&self, queue: u16, count: u32) {
        let i = &self.driver.interrupts;
        let done =
            |q: &Vec<u32>| q.get(usize::from(queue)).copied().unwrap_or(0) >= count || i.reset.load(Ordering::SeqCst);
        let guard = i.queues.lock().unwrap();
        let minute = std::time::Duration::from_secs(60);
        let (_guard, timeout) = i.changed.wait_timeout_while(guard, minute, |q| !done(q)).unwrap();
        assert!(!timeout.timed_out(), "no interrupt from queue {queue} within a minute");
    }

    /// Whether the device said that it needs a reset.
    #[must_use]
    pub fn needs_reset(&self) -> bool {
        self.driver.interrupts.reset.load(Ordering::SeqCst)
    }

    /// Stops the worker and takes the device back.
    ///
    /// # Panics
    /// If the device panicked.
    #[must_use]
    pub fn stop(self) -> Driver {
        let Self { mut driver, worker } = self;
        let (device, active) = worker.stop().expect("the device panicked");
        driver.device = Some(device);
        driver.active = Some(active);
        driver
    }
}

/// Builds the first device of `kind` that `config` asks for, as the VMM would; its window is at 1 TiB.
///
/// # Errors
/// What the kind says.
///
/// # Panics
/// If the configuration has no device of this kind.
pub fn build(
    kind: &Kind,
    config: &VmConfig,
    console: Option<ConsoleEnds>,
    renderer: &dyn RendererFactory,
) -> Result<Box<dyn Device>, BuildError> {
    restore(kind, config, console, renderer, None)
}

/// As [`build`], with the device's state in a snapshot.
///
/// # Errors
/// As the kind.
///
/// # Panics
/// As [`build`].
pub fn restore(
    kind: &Kind,
    config: &VmConfig,
    console: Option<ConsoleEnds>,
    renderer: &dyn RendererFactory,
    saved: Option<&SavedState>,
) -> Result<Box<dyn Device>, BuildError> {
    build_with(kind, config, console, None, renderer, saved)
}

/// As [`restore`], for a kind that needs no renderer, with a descriptor that was handed down for the device.
///
/// # Errors
/// As the kind.
pub fn connected(
    kind: &Kind,
    config: &VmConfig,
    handed: Option<OwnedFd>,
    saved: Option<&SavedState>,
) -> Result<Box<dyn Device>, BuildError> {
    build_with(kind, config, None, handed, &NoRenderer, saved)
}

fn build_with(
    kind: &Kind,
    config: &VmConfig,
    console: Option<ConsoleEnds>,
    handed: Option<OwnedFd>,
    renderer: &dyn RendererFactory,
    saved: Option<&SavedState>,
) -> Result<Box<dyn Device>, BuildError> {
    let files = config.pmem.iter().filter_map(|pmem| Some((pmem.file.clone(), pmem.file.metadata().ok()?.len())));
    let facts = HostFacts { file_sizes: files.collect(), ..HostFacts::default() };
    let requests = (kind.requests)(config, &facts);
    let request = requests.first().expect("the configuration has such a device");
    let window = match request.window {
        Some(WindowRequest::SharedMemory { len } | WindowRequest::Range { len }) => {
            let memory = (kind.map)(WindowContext { config, request, len })?;
            Some((WindowAddress { guest: GuestAddress(1 << 40), len }, memory))
        }
        None => None,
    };
    (kind.build)(BuildContext { config, request, window, console, handed, renderer, grants: None, saved })
        .map(|built| built.device)
}

/// Offers chains made from `bytes` to every queue of the device: garbage lengths, addresses, flags and indices. For
/// hostile-driver tests and fuzz targets; the only wrong outcome is a panic or a hang.
pub fn hostile(device: Box<dyn Device>, bytes: &[u8]) {
    let mut driver = Driver::new(device);
    let queues = u16::try_from(driver.rings.len()).unwrap();
    if queues == 0 {
        return;
    }
    for chunk in bytes.chunks(24) {
        let mut raw = [0u8; 24];
        raw[..chunk.len()].copy_from_slice(chunk);
        let queue = u16::from(raw[0]) % queues;
        let word = |at: usize| u32::from_le_bytes([raw[at], raw[at + 1], raw[at + 2], raw[at + 3]]);
        let (addr, len) = (u64::from(word(4)) | (u64::from(raw[1] & 1) << 40), word(8));
        match raw[2] % 8 {
            0 => driver.set_avail_idx(queue, u16::from_le_bytes([raw[12], raw[13]])),
            1 => driver.make_available(queue, u16::from_le_bytes([raw[12], raw[13]])),
            2 => {
                let _ = driver.offer_raw(queue, addr, len, raw[3] & 1 == 1);
            }
            3 => {
                let _ = driver.offer_parts(queue, &[(addr, len, false), (u64::from(word(12)), word(16), true)]);
            }
            4 => {
                let _ = driver.offer(queue, &[Buffer::readable(&raw[4..]), Buffer::writable(word(8) % 65536)]);
            }
            5 => {
                let _ =
                    driver.offer(queue, &[Buffer::readable(&raw[4..20]), Buffer::readable(&raw), Buffer::writable(1)]);
            }
            6 => driver.pause_and_resume(),
            _ => {
                let sources = driver.device().sources().len();
                if sources > 0 && driver.source(usize::from(raw[3]) % sources).is_err() {
                    return;
                }
            }
        }
        if driver.next_buffer > RAM - (1 << 20) {
            driver.next_buffer = BUFFERS;
        }
        if driver.run(queue).is_err() {
            return;
        }
    }
}

/// The tests every device must pass; `$make` returns a fresh `Box` of it.
#[macro_export]
macro_rules! conformance_tests {
    ($make:path) => {
        mod conformance {
            #[test]
            fn traits_make_sense() {
                let traits = $make().traits();
                assert!(!traits.queue_sizes.is_empty());
                assert!(traits.queue_sizes.iter().all(|s| s.is_power_of_two() && *s <= 1024));
                assert_eq!(traits.features & (1 << 32), 0, "VIRTIO_F_VERSION_1 is the transport's");
                assert!(traits.shared_memory.is_none_or(|s| s.len.is_power_of_two()));
            }

            #[test]
            fn survives_a_hostile_driver() {
                // A small xorshift generator: the same bytes every time.
                let mut x = 0x2545_f491_4f6c_dd1d_u64;
                for _round in 0..40 {
                    let bytes: Vec<u8> = (0..24 * 64)
                        .map(|_| {
                            x ^= x << 13;
                            x ^= x >> 7;
                            x ^= x << 17;
                            x.to_le_bytes()[3]
                        })
                        .collect();
                    $crate::testkit::hostile($make(), &bytes);
                }
            }

            #[test]
            fn empty_kicks_pause_and_reset_are_harmless() {
                let mut driver = $crate::testkit::Driver::new($make());
                let queues = driver.device().traits().queue_sizes.len();
                for queue in 0..queues {
                    driver.run(u16::try_from(queue).unwrap()).unwrap();
                }
                driver.pause_and_resume();
                driver.device().reset();
                let state = driver.device().save();
                assert!(state.version > 0);
            }

            #[allow(unused_imports)]
            use super::*;
            #[allow(unused_imports)]
            use $crate::device::Device as _;
        }
    };
}
