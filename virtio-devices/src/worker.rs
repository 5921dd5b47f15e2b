//! The thread a running device lives on: the only file that knows epoll and threads.
//!
//! [`Worker::start`] takes a device and its queues, [`Worker::stop`] gives both back. That is the whole of pause, reset
//! and snapshot: a device that is not running is a plain value again.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use epoll::{ControlOptions, Event, Events};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::device::{Active, Broken, Device, MAX_SOURCES};

/// What runs first on a new worker thread: installs the seccomp filter of the device's kind.
pub type ThreadSetup = Box<dyn FnOnce() -> io::Result<()> + Send>;

/// A set of file descriptors that is itself one file descriptor: what a device with many connections returns from
/// [`Device::sources`].
#[derive(Debug)]
pub struct EventSet {
    epoll: OwnedFd,
}

/// What an [`EventSet`] is to wait for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Interest {
    /// Wait until reading will not block.
    pub read: bool,
    /// Wait until writing will not block.
    pub write: bool,
}

/// Something happened to a member of an [`EventSet`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ready {
    /// The token the member was added with.
    pub token: u64,
    /// Reading will not block (there is data, or the end of it).
    pub read: bool,
    /// Writing will not block.
    pub write: bool,
    /// The peer is gone or the descriptor is in error.
    pub hangup: bool,
}

impl Interest {
    fn events(self) -> Events {
        let mut events = Events::empty();
        events.set(Events::EPOLLIN | Events::EPOLLRDHUP, self.read);
        events.set(Events::EPOLLOUT, self.write);
        events
    }
}

impl EventSet {
    /// An empty set.
    ///
    /// # Errors
    /// If the process has no file descriptor left.
    #[expect(unsafe_code, reason = "the epoll crate returns a raw descriptor")]
    pub fn new() -> io::Result<Self> {
        let fd = epoll::create(true)?;
        // SAFETY: `epoll::create` just opened this descriptor and nobody else knows it.
        Ok(Self { epoll: unsafe { OwnedFd::from_raw_fd(fd) } })
    }

    fn control(&self, op: ControlOptions, fd: BorrowedFd<'_>, interest: Interest, token: u64) -> io::Result<()> {
        epoll::ctl(self.epoll.as_raw_fd(), op, fd.as_raw_fd(), Event::new(interest.events(), token))
    }

    /// Adds `fd`; its events carry `token`.
    ///
    /// # Errors
    /// If it is a member already, or cannot be waited for (a regular file: EPERM).
    pub fn add(&self, fd: BorrowedFd<'_>, interest: Interest, token: u64) -> io::Result<()> {
        self.control(ControlOptions::EPOLL_CTL_ADD, fd, interest, token)
    }

    /// Changes what a member waits for.
    ///
    /// # Errors
    /// If it is no member.
    pub fn modify(&self, fd: BorrowedFd<'_>, interest: Interest, token: u64) -> io::Result<()> {
        self.control(ControlOptions::EPOLL_CTL_MOD, fd, interest, token)
    }

    /// Removes a member. Do it before closing the descriptor.
    ///
    /// # Errors
    /// If it is no member.
    pub fn remove(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.control(ControlOptions::EPOLL_CTL_DEL, fd, Interest::default(), 0)
    }

    /// What is ready now, at most `ready.len()`; waits up to `timeout_ms` (0: not at all, -1: for ever).
    ///
    /// # Errors
    /// Only if the set itself is broken; an interrupting signal is "nothing ready".
    pub fn wait(&self, timeout_ms: i32, ready: &mut Vec<Ready>) -> io::Result<()> {
        ready.clear();
        let mut events = [Event::new(Events::empty(), 0); 32];
        let n = match epoll::wait(self.epoll.as_raw_fd(), timeout_ms, &mut events) {
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => 0,
            Err(e) => return Err(e),
        };
        ready.extend(events.iter().take(n).map(|event| {
            // Copied out first: the kernel's structure is packed.
            let (bits, token) = (event.events, event.data);
            let events = Events::from_bits_truncate(bits);
            Ready {
                token,
                read: events.intersects(Events::EPOLLIN | Events::EPOLLRDHUP | Events::EPOLLHUP),
                write: events.contains(Events::EPOLLOUT),
                hangup: events.intersects(Events::EPOLLHUP | Events::EPOLLERR),
            }
        }));
        Ok(())
    }
}

impl AsFd for EventSet {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}

const STOP: u64 = u64::MAX;
const FIRST_SOURCE: u64 = 1 << 16;

/// What goes to a worker's thread, and comes back from it.
type Load = (Box<dyn Device>, Active);

/// A thread for one device. It stays, so that a device that is reset and started again costs no other.
pub struct Worker {
    jobs: Sender<(Load, Vec<Arc<EventFd>>)>,
    results: Receiver<Load>,
    stop: EventFd,
    _thread: JoinHandle<()>,
}

impl Worker {
    /// Makes a thread called `name`, which runs `setup` and waits for its device.
    ///
    /// # Errors
    /// If the eventfd or the thread cannot be made.
    pub fn spawn(name: &str, setup: ThreadSetup) -> io::Result<Self> {
        let stop = EventFd::new(EFD_NONBLOCK)?;
        let stopped = stop.try_clone()?;
        let (jobs, incoming) = channel::<(Load, Vec<Arc<EventFd>>)>();
        let (outgoing, results) = channel();
        // Linux cuts thread names at 15 bytes; a longer one would be an error.
        let name: String = name.chars().take(15).collect();
        let run = move || {
            let confined = setup();
            for ((device, active), kicks) in incoming {
                let load = match &confined {
                    Ok(()) => Running::new(device, active, kicks).run(&stopped),
                    Err(e) => {
                        log::error!("cannot confine a device's thread, the device stays off: {e}");
                        active.interrupt.needs_reset();
                        (device, active)
                    }
                };
                if outgoing.send(load).is_err() {
                    break;
                }
            }
        };
        let thread = std::thread::Builder::new().name(name).spawn(run)?;
        Ok(Self { jobs, results, stop, _thread: thread })
    }

    /// Runs `device` until [`Worker::stop`]. `kicks` are the queues' notification eventfds, in order. Says whether the
    /// thread is there to do it.
    #[must_use]
    pub fn start(&self, device: Box<dyn Device>, active: Active, kicks: Vec<Arc<EventFd>>) -> bool {
        self.jobs.send(((device, active), kicks)).is_ok()
    }

    /// Stops the device that was started and gives it and its queues back; nothing if it panicked.
    #[must_use]
    pub fn stop(&self) -> Option<(Box<dyn Device>, Active)> {
        if let Err(e) = self.stop.write(1) {
            log::error!("cannot signal a device's thread: {e}");
        }
        let load = self.results.recv().ok();
        // One who failed to start did not hear of it.
        let _ = self.stop.read();
        load
    }
}

/// A device while it runs.
struct Running {
    device: Box<dyn Device>,
    active: Active,
    kicks: Vec<Arc<EventFd>>,
    /// The device's sources: descriptor, and whether it is in the set now.
    watched: Vec<(RawFd, bool)>,
    broken: bool,
}

impl Running {
    fn new(device: Box<dyn Device>, active: Active, kicks: Vec<Arc<EventFd>>) -> Self {
        // It may have been broken when it was paused.
        let broken = active.interrupt.is_broken();
        Self { device, active, kicks, watched: Vec::new(), broken }
    }

    fn run(mut self, stop: &EventFd) -> Load {
        if let Err(e) = EventSet::new().and_then(|set| self.serve(&set, stop)) {
            log::error!("a device's thread cannot wait for events: {e}");
            self.active.interrupt.needs_reset();
        }
        self.device.stop(&mut self.active);
        (self.device, self.active)
    }

    fn serve(&mut self, set: &EventSet, stop: &EventFd) -> io::Result<()> {
        let read = Interest { read: true, write: false };
        set.add(borrow(stop), read, STOP)?;
        for (index, kick) in (0u64..).zip(&self.kicks) {
            set.add(borrow(kick), read, index)?;
        }
        let result = self.begin();
        self.check(set, result);
        self.reconcile(set);
        let mut ready = Vec::new();
        loop {
            set.wait(-1, &mut ready)?;
            for event in &ready {
                if event.token == STOP {
                    return Ok(());
                }
                let result = self.dispatch(event.token);
                self.check(set, result);
                self.reconcile(set);
            }
        }
    }

    fn begin(&mut self) -> Result<(), Broken> {
        if self.broken {
            return Ok(());
        }
        self.watched =
            self.device.sources().iter().take(MAX_SOURCES).map(|source| (source.as_raw_fd(), false)).collect();
        self.device.start(&mut self.active)?;
        // Buffers may have been there before the thread was (boot), or kicks may have been lost (restore).
        for kick in &self.kicks {
            let _ = kick.write(1);
        }
        Ok(())
    }

    fn check(&mut self, set: &EventSet, result: Result<(), Broken>) {
        if let Err(broken) = result {
            log::warn!("device needs a reset: {broken}");
            self.broken = true;
            self.active.interrupt.needs_reset();
            for (fd, watched) in std::mem::take(&mut self.watched) {
                if watched {
                    let _ = unwatch(set, fd);
                }
            }
        }
    }

    fn dispatch(&mut self, token: u64) -> Result<(), Broken> {
        if let Ok(index) = u16::try_from(token) {
            if let Some(kick) = self.kicks.get(usize::from(index)) {
                let _ = kick.read();
            }
            if self.broken {
                return Ok(());
            }
            run_queue(self.device.as_mut(), &mut self.active, index)?;
            let again = self.active.queue(index)?.rearm()?;
            if again && let Some(kick) = self.kicks.get(usize::from(index)) {
                // More arrived meanwhile, or the queue had its share: come back after the other events.
                let _ = kick.write(1);
            }
            self.refill()?;
        } else if !self.broken
            && let Ok(source) = usize::try_from(token - FIRST_SOURCE)
            && self.active.listens(source)
        {
            self.device.source(&mut self.active, source)?;
            self.refill()?;
        }
        Ok(())
    }

    /// A call may have popped from any queue: give each its next share, and ask the driver for kicks where it
    /// found the ring empty (with event indices the driver would stay silent otherwise).
    fn refill(&mut self) -> Result<(), Broken> {
        for (index, kick) in self.kicks.iter().enumerate() {
            let Some(queue) = self.active.queues.get_mut(index) else { continue };
            if queue.wants_rearm() && queue.rearm()? {
                let _ = kick.write(1);
            }
        }
        Ok(())
    }

    /// Makes the epoll set say what the device wants to hear of.
    fn reconcile(&mut self, set: &EventSet) {
        for index in 0..self.watched.len() {
            let wanted = self.active.listens(index);
            let Some(&mut (fd, ref mut watched)) = self.watched.get_mut(index) else { continue };
            if wanted == *watched {
                continue;
            }
            let token = FIRST_SOURCE.saturating_add(index as u64);
            let done = if wanted { watch(set, fd, token) } else { unwatch(set, fd) };
            match done {
                Ok(()) => *watched = wanted,
                Err(e) => {
                    log::warn!("cannot {} a device's source: {e}", if wanted { "watch" } else { "leave" });
                    *watched = wanted;
                }
            }
        }
    }
}

/// One dispatch of a queue; what the driver offers during it beyond the queue's size waits for the next.
fn run_queue(device: &mut dyn Device, active: &mut Active, index: u16) -> Result<(), Broken> {
    if !active.queue(index)?.ready() {
        return Ok(());
    }
    device.queue(active, index)
}

fn watch(set: &EventSet, fd: RawFd, token: u64) -> io::Result<()> {
    epoll::ctl(set.epoll.as_raw_fd(), ControlOptions::EPOLL_CTL_ADD, fd, Event::new(Events::EPOLLIN, token))
}

fn unwatch(set: &EventSet, fd: RawFd) -> io::Result<()> {
    epoll::ctl(set.epoll.as_raw_fd(), ControlOptions::EPOLL_CTL_DEL, fd, Event::new(Events::empty(), 0))
}

#[expect(unsafe_code, reason = "EventFd does not implement AsFd")]
fn borrow(fd: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open for as long as the EventFd, whose borrow the result carries.
    unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) }
}
