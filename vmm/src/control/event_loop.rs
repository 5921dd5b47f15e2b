//! The event loop: what the control thread waits for, and whom it then calls.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use vmm_api::Request;

use super::{Outcome, Vmm, VmmError};
use crate::machine::{InputState, Machine};
use crate::stream::Stream;

const SERVER: u32 = 1;
const SIGNAL: u32 = 2;
const MACHINE: u32 = 3;
const INPUT: u32 = 4;
const DRAINED: u32 = 5;
const WRITER: u32 = 6;
const OWNER: u32 = 7;

impl Vmm {
    /// Runs until the guest powers off, a signal arrives or the API says so.
    ///
    /// # Errors
    /// If events cannot be waited for.
    pub fn run(self) -> Result<Outcome, VmmError> {
        let fail = |e: event_manager::Error| VmmError::Events(format!("{e:?}"));
        let mut manager = EventManager::<Control>::new().map_err(fail)?;
        let id = manager.add_subscriber(Control {
            vmm: self,
            watched: BTreeMap::new(),
            generation: 0,
            input_full: false,
            input_ended: false,
        });
        loop {
            match manager.run() {
                Ok(_) | Err(event_manager::Error::Epoll(_)) => {}
                Err(e) => return Err(fail(e)),
            }
            let vmm = &mut manager.subscriber_mut(id).map_err(fail)?.vmm;
            if let Some(outcome) = vmm.outcome.take() {
                vmm.event("vmm", "shutdown");
                return Ok(outcome);
            }
        }
    }
}

/// The VMM as the event loop's one subscriber.
struct Control {
    vmm: Vmm,
    /// What is in the epoll set now, by token.
    watched: BTreeMap<u32, Watched>,
    /// The machine that the input was for.
    generation: u64,
    input_full: bool,
    input_ended: bool,
}

/// A descriptor in the epoll set.
struct Watched {
    /// Its number.
    number: RawFd,
    /// Of the machine, which it may belong to.
    generation: u64,
    /// A duplicate, which is what is watched: it can be taken out of the set whatever became of the other.
    fd: OwnedFd,
}

#[expect(unsafe_code, reason = "event descriptors are known by number only")]
fn duplicate(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: the borrow ends with this call; if nothing is open there, the system says so.
    Ok(rustix::io::fcntl_dupfd_cloexec(unsafe { BorrowedFd::borrow_raw(fd) }, 3)?)
}

impl Control {
    /// What should be watched now.
    fn wanted(&self) -> BTreeMap<u32, RawFd> {
        let vmm = &self.vmm;
        let mut wanted = BTreeMap::from([(MACHINE, vmm.events.2.as_raw_fd())]);
        if let Some(server) = &vmm.server {
            wanted.insert(SERVER, server.as_fd().as_raw_fd());
        }
        if let Some(writer) = &vmm.writer {
            wanted.insert(WRITER, writer.as_fd().as_raw_fd());
        }
        if let Some(signals) = &vmm.signals {
            wanted.insert(SIGNAL, signals.as_raw_fd());
        }
        if let Some(owner) = &vmm.owner {
            wanted.insert(OWNER, owner.as_raw_fd());
        }
        if let Some(created) = &vmm.created
            && let Some(serial) = created.machine.as_ref().and_then(Machine::serial)
            && let Some(input) = created.serial.as_ref().and_then(Stream::input)
        {
            wanted.insert(DRAINED, serial.drained.as_raw_fd());
            if !self.input_full && !self.input_ended {
                wanted.insert(INPUT, input.as_raw_fd());
            }
        }
        wanted
    }

    /// Makes the epoll set what it should be.
    fn reconcile(&mut self, ops: &mut EventOps) {
        // A number may be another descriptor's by now, if it was a machine's that is gone.
        let generation = self.vmm.generation;
        if self.generation != generation {
            // Another serial port, and perhaps another stream.
            (self.generation, self.input_full, self.input_ended) = (generation, false, false);
        }
        let wanted = self.wanted();
        let stays = |token: &u32, w: &mut Watched| w.generation == generation && wanted.get(token) == Some(&w.number);
        for (token, gone) in self.watched.extract_if(.., |token, w| !stays(token, w)) {
            if let Err(e) = ops.remove(Events::with_data(&gone.fd, token, EventSet::IN)) {
                log::error!("cannot stop watching a descriptor: {e:?}");
            }
        }
        for (token, number) in wanted {
            if self.watched.contains_key(&token) {
                continue;
            }
            let added = duplicate(number).map_err(|e| e.to_string()).and_then(|fd| {
                ops.add(Events::with_data(&fd, token, EventSet::IN)).map_err(|e| format!("{e:?}"))?;
                Ok(Watched { number, generation, fd })
            });
            match added {
                Ok(watched) => drop(self.watched.insert(token, watched)),
                // A regular file as input cannot be waited for: it has no more to say than nothing.
                Err(e) if token == INPUT => {
                    log::info!("standard input cannot be waited for: {e}");
                    self.input_ended = true;
                }
                Err(e) => log::error!("cannot watch a descriptor: {e}"),
            }
        }
    }

    fn serial_input(&mut self) {
        let Some(created) = &self.vmm.created else { return };
        let (Some(machine), Some(input)) = (&created.machine, created.serial.as_ref().and_then(Stream::input)) else {
            return;
        };
        match machine.serial_input(|buffer| rustix::io::read(input, buffer).map_err(io::Error::from)) {
            Ok(state) => {
                self.input_full = state == InputState::Full;
                self.input_ended = state == InputState::Ended;
            }
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(e) => {
                log::warn!("no more input for the serial port: {e}");
                self.input_ended = true;
            }
        }
    }

    fn drained(&mut self) {
        if let Some(serial) = self.vmm.created.as_ref().and_then(|c| c.machine.as_ref()).and_then(Machine::serial) {
            let _ = serial.drained.read();
        }
        self.input_full = false;
    }

    fn requests(&mut self) {
        let Some(mut server) = self.vmm.server.take() else { return };
        let result = server.dispatch(&mut |request: Request, fds: Vec<OwnedFd>| self.vmm.handle(request, fds));
        self.vmm.server = Some(server);
        if let Err(e) = result {
            log::error!("the API's socket failed: {e}");
            self.vmm.server = None;
        }
    }
}

impl MutEventSubscriber for Control {
    fn init(&mut self, ops: &mut EventOps) {
        self.reconcile(ops);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        match events.data() {
            SERVER => self.requests(),
            token @ (SIGNAL | OWNER) => {
                let why = if token == SIGNAL { "asked to end by a signal" } else { "its owner is gone: ending" };
                log::info!("{why}");
                self.vmm.shut_down();
                self.vmm.outcome = Some(Outcome::Ended);
            }
            MACHINE => self.vmm.machine_events(),
            INPUT => self.serial_input(),
            DRAINED => self.drained(),
            WRITER => self.vmm.hear_writer(),
            other => log::error!("event {other} is of no kind"),
        }
        self.reconcile(ops);
    }
}
