//! Guest RAM that is read from a snapshot when somebody touches it.
//!
//! ```text
//!   guest, device, kernel ──touches a missing page, waits──▶ thread "ondemand": reads the chunk, verifies it, places it
//! ```
//! What is damaged ends the machine. Until its vCPUs have been called out, whoever touched it waits; then it gets zeroes,
//! which no guest sees, so that its thread can end.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::{Builder, JoinHandle};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use virtio_devices::device::Memory;
use vm_memory::GuestAddress;

use super::memory::{CHUNK, MemoryFile};
use super::uffd::{Missing, Uffd};
use super::{Snapshot, SnapshotError, file_error};
use crate::machine::MachineEvent;
use crate::vcpu::{Report, ThreadSetup};

/// What is filled when a page is wanted that is no chunk's, or was given back.
const PAGE: u64 = 4096;

/// A snapshot's memory and the right to serve page faults from it; for one machine.
pub struct Source {
    file: Arc<MemoryFile>,
    uffd: Mutex<Option<Uffd>>,
    prefault: bool,
}

impl Source {
    /// To be made before the process is confined. `prefault` reads everything while the guest runs already.
    ///
    /// # Errors
    /// If the snapshot's memory cannot be restored this way, or the host does not let us.
    pub fn new(snapshot: &Snapshot, prefault: bool) -> Result<Self, SnapshotError> {
        let memory = &snapshot.config.memory;
        match () {
            () if memory.shared => {
                Err(SnapshotError::NotOnDemand("memory.shared=on makes all of it visible to other processes"))
            }
            () if memory.hugepages => Err(SnapshotError::NotOnDemand("memory.hugepages=on needs it in larger parts")),
            () => Ok(Self { file: snapshot.memory.clone(), uffd: Mutex::new(Some(Uffd::open()?)), prefault }),
        }
    }
}

/// What the machine is in the middle of, which says what becomes of somebody who touches damaged memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Phase {
    /// Whoever builds it asks afterwards whether something was damaged.
    Building,
    /// A guest could see what it touches.
    Running,
    /// No vCPU goes on in the guest.
    Resting,
    /// The thread is to end.
    Ended,
}

/// What the thread and the machine share.
struct Shared {
    phase: AtomicU8,
    /// Why the machine cannot go on.
    lost: OnceLock<String>,
    /// Readable when the thread is to look at the phase, or has an order.
    wake: OwnedFd,
}

impl Shared {
    fn enter(&self, phase: Phase) {
        self.phase.store(phase as u8, Ordering::SeqCst);
        self.wake();
    }

    fn is(&self, phase: Phase) -> bool {
        self.phase.load(Ordering::SeqCst) == phase as u8
    }

    fn wake(&self) {
        // It fails only if it is readable already, many times over.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }
}

/// Whom to tell when all memory is there.
type Order = SyncSender<Result<(), String>>;

/// The thread that serves a machine's memory. To be dropped when nothing touches that any more.
pub struct OnDemand {
    shared: Arc<Shared>,
    orders: Sender<Order>,
    thread: Option<JoinHandle<()>>,
}

impl OnDemand {
    /// Serves `memory`, which nobody has touched, from `source`.
    ///
    /// # Errors
    /// If the host refuses, or `source` was used before.
    pub fn start(source: &Source, memory: &Memory, setup: ThreadSetup, report: Report) -> Result<Self, SnapshotError> {
        let fail = file_error("serve memory from", source.file.path());
        let uffd = source.uffd.lock().unwrap_or_else(PoisonError::into_inner).take();
        let uffd = uffd.ok_or_else(|| fail(io::ErrorKind::NotFound.into()))?;
        let missing = Missing::new(uffd, memory.clone())?;
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(|e| fail(e.into()))?;
        let phase = AtomicU8::new(Phase::Building as u8);
        let shared = Arc::new(Shared { phase, lost: OnceLock::new(), wake });
        let (orders, receiver) = channel();
        let server = Server {
            missing,
            filled: vec![false; source.file.chunks()],
            file: source.file.clone(),
            shared: shared.clone(),
            report,
            buffer: vec![0; usize::try_from(CHUNK).unwrap_or(0)],
            held: Vec::new(),
            orders: receiver,
            loading: source.prefault.then(Loading::default),
        };
        let (started, start) = sync_channel(1);
        let thread = Builder::new().name("ondemand".into()).spawn(move || {
            let ready = setup();
            let go_on = ready.is_ok();
            // Who made the thread waits for this.
            let _ = started.send(ready);
            if go_on {
                server.run();
            }
        });
        let this = Self { shared, orders, thread: Some(thread.map_err(&fail)?) };
        start.recv().unwrap_or_else(|e| Err(io::Error::other(e))).map_err(&fail)?;
        Ok(this)
    }

    /// From now on a guest may run.
    ///
    /// # Errors
    /// If it would miss some of its memory.
    pub fn run(&self) -> Result<(), SnapshotError> {
        self.check()?;
        self.shared.enter(Phase::Running);
        Ok(())
    }

    /// No vCPU goes on in the guest from now on: who waits for what is damaged need not any more.
    pub fn rest(&self) {
        self.shared.enter(Phase::Resting);
    }

    /// Whether all that was touched could be had.
    ///
    /// # Errors
    /// What could not.
    pub fn check(&self) -> Result<(), SnapshotError> {
        self.shared.lost.get().map_or(Ok(()), |why| Err(SnapshotError::Lost(why.clone())))
    }

    /// Waits until all memory is there.
    ///
    /// # Errors
    /// If some of it is damaged; nobody has seen that part, and the machine may go on.
    pub fn load(&self) -> Result<(), SnapshotError> {
        self.check()?;
        let ended = |_| SnapshotError::Lost("the thread that restores memory has ended".into());
        let (order, answer) = sync_channel(1);
        self.orders.send(order).map_err(|_| ended(()))?;
        self.shared.wake();
        answer.recv().map_err(|_| ended(()))?.map_err(SnapshotError::Lost)
    }
}

impl Drop for OnDemand {
    fn drop(&mut self) {
        self.shared.enter(Phase::Ended);
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            log::error!("the thread that restores memory panicked");
        }
    }
}

/// Everything is being read.
#[derive(Default)]
struct Loading {
    /// The next chunk's number.
    next: usize,
    /// Nobody if it is done for later.
    order: Option<Order>,
}

/// The thread.
struct Server {
    missing: Missing,
    file: Arc<MemoryFile>,
    shared: Arc<Shared>,
    report: Report,
    buffer: Vec<u8>,
    /// The chunks that are there, by number.
    filled: Vec<bool>,
    /// Pages that are damaged and waited for.
    held: Vec<GuestAddress>,
    orders: Receiver<Order>,
    loading: Option<Loading>,
}

impl Server {
    fn run(mut self) {
        while !self.shared.is(Phase::Ended) {
            if let Err(e) = self.turn() {
                // What is still missing is zeroes when this returns.
                let why = format!("cannot serve memory from {}: {e}", self.file.path().display());
                let _ = self.shared.lost.set(why.clone());
                (self.report)(MachineEvent::Fault(why));
                return;
            }
        }
    }

    /// Waits for something to do, and does it.
    fn turn(&mut self) -> io::Result<()> {
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        let mut ready = [PollFd::new(&self.missing, PollFlags::IN), PollFd::new(&self.shared.wake, PollFlags::IN)];
        match poll(&mut ready, self.loading.is_some().then_some(&at_once)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
        // Before the phase is looked at: what changes it afterwards makes it readable again.
        let _ = rustix::io::read(&self.shared.wake, &mut [0; 8]);
        if !self.shared.is(Phase::Running) {
            for page in std::mem::take(&mut self.held) {
                self.missing.fill_zeroes(page, PAGE)?;
            }
        }
        if let Ok(order) = self.orders.try_recv() {
            self.loading = Some(Loading { next: 0, order: Some(order) });
        }
        while let Some(page) = self.missing.fault()? {
            self.serve(page)?;
        }
        self.load_next();
        Ok(())
    }

    fn serve(&mut self, page: GuestAddress) -> io::Result<()> {
        match self.file.chunk_at(page.0) {
            Some(number) if !self.is_filled(number) => match self.fill(number) {
                Ok(()) => Ok(()),
                Err(e) => self.lose(page, e.to_string()),
            },
            // Two waited for one chunk, or the page was given back to the host.
            _ => self.missing.fill_zeroes(page, PAGE),
        }
    }

    fn is_filled(&self, number: usize) -> bool {
        self.filled.get(number).copied().unwrap_or(true)
    }

    fn fill(&mut self, number: usize) -> Result<(), SnapshotError> {
        let (chunk, bytes) = self.file.load(number, &mut self.buffer)?;
        let guest = GuestAddress(chunk.guest);
        let filled = match bytes {
            Some(bytes) => self.missing.fill(guest, bytes),
            None => self.missing.fill_zeroes(guest, chunk.len as u64),
        };
        filled.map_err(file_error("restore memory from", self.file.path()))?;
        if let Some(filled) = self.filled.get_mut(number) {
            *filled = true;
        }
        Ok(())
    }

    /// The memory that somebody waits for cannot be had.
    fn lose(&mut self, page: GuestAddress, why: String) -> io::Result<()> {
        let first = self.shared.lost.set(why.clone()).is_ok();
        if self.shared.is(Phase::Building) {
            return self.missing.fill_zeroes(page, PAGE);
        }
        if first {
            (self.report)(MachineEvent::Fault(why));
        }
        // Released when the phase changes; if it has, the eventfd is readable.
        self.held.push(page);
        self.shared.wake();
        Ok(())
    }

    fn load_next(&mut self) {
        let Some(mut loading) = self.loading.take() else { return };
        let result = match loading.next {
            number if number >= self.filled.len() => Ok(false),
            number if self.is_filled(number) => Ok(true),
            number => self.fill(number).map(|()| true),
        };
        loading.next += 1;
        // It is of no interest that somebody does not wait any more.
        let answer = |result| loading.order.as_ref().map(|order| order.send(result));
        match result {
            Ok(true) => self.loading = Some(loading),
            Ok(false) => drop(answer(Ok(()))),
            Err(e) if loading.order.is_some() => drop(answer(Err(e.to_string()))),
            Err(e) => {
                // The guest may never want it.
                log::warn!("{e}");
                self.loading = Some(loading);
            }
        }
    }
}

#[cfg(test)]
mod tests;
