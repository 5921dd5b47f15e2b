//! The device itself: a receive and a transmit queue.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use super::ends::{Input, Outcome, Output};
use super::{KIND, STATE_VERSION, Size, State};
use crate::device::{Active, Broken, Chain, ConfigSpace, Device, Memory, SavedState, Traits};

const QUEUE_SIZE: u16 = 64;
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;

/// Feature bit: the configuration space has the terminal's size.
const VIRTIO_CONSOLE_F_SIZE: u32 = 0;

/// How long a full pseudo-terminal may keep the guest waiting.
pub(super) const PATIENCE: Duration = Duration::from_millis(100);
/// How often a pseudo-terminal that was closed is looked at.
const REOPEN: Duration = Duration::from_millis(500);

/// Bytes moved at once.
const PIECE: usize = 4096;
/// The most bytes of one chain that are written; the rest of a longer one is dropped. Linux sends up to 32 KiB.
const MAX_CHAIN: usize = 1 << 20;

/// Console device.
pub struct Console {
    output: Option<Output>,
    input: Option<Input>,
    timer: OwnedFd,
    size: Size,
    state: State,
    /// The output took nothing; the guest waits.
    waiting: bool,
    /// Nobody reads the output; it is dropped.
    dropping: bool,
    /// The pseudo-terminal behind the input was closed; the timer looks whether it is open again.
    closed: bool,
    /// The input has ended.
    ended: bool,
}

/// What [`Device::sources`] returns, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    Timer,
    Output,
    Input,
}

impl Console {
    pub(super) fn new(output: Option<Output>, input: Option<Input>, size: Size, state: State) -> io::Result<Self> {
        let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)?;
        Ok(Self { output, input, timer, size, state, waiting: false, dropping: false, closed: false, ended: false })
    }

    fn input(&self) -> Option<&Input> {
        self.input.as_ref().filter(|input| input.pollable)
    }

    fn tokens(&self) -> impl Iterator<Item = (usize, Source)> + use<> {
        let output = self.output.is_some().then_some(Source::Output);
        let input = self.input().map(|_| Source::Input);
        [Some(Source::Timer), output, input].into_iter().flatten().enumerate()
    }

    fn listen(&self, active: &mut Active, source: Source, on: bool) {
        if let Some((token, _)) = self.tokens().find(|(_, s)| *s == source) {
            active.listen(token, on);
        }
    }

    fn arm(&self, after: Duration) {
        let it_value = Timespec::try_from(after).unwrap_or(Timespec { tv_sec: 1, tv_nsec: 0 });
        let once = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value };
        if let Err(e) = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once) {
            log::error!("console: cannot set a timer: {e}");
        }
    }

    /// Fills the guest's buffers with input as long as there are both.
    fn receive(&mut self, active: &mut Active) -> Result<(), Broken> {
        let Some(input) = self.input.as_ref().filter(|_| !self.ended && !self.closed) else { return Ok(()) };
        let mem = active.mem.memory();
        let queue = active.queue(RECEIVE)?;
        let mut outcome = Outcome::Wait;
        let (mut buffers, mut used) = (true, false);
        loop {
            let Some(chain) = queue.pop()? else {
                buffers = false;
                break;
            };
            let mut bytes = [0; PIECE];
            let room = writable_room(&chain);
            let Some(piece) = bytes.get_mut(..room).filter(|piece| !piece.is_empty()) else {
                queue.push(chain.head_index(), 0)?;
                used = true;
                continue;
            };
            outcome = input.read(piece);
            let Outcome::Bytes(n) = outcome else {
                queue.undo_pop(&chain);
                break;
            };
            let head = chain.head_index();
            let written = scatter(chain, &mem, bytes.get(..n).unwrap_or_default());
            queue.push(head, written)?;
            used = true;
        }
        if used {
            queue.notify()?;
        }
        if outcome == Outcome::Gone {
            if input.pseudo_terminal {
                self.closed = true;
                self.arm(REOPEN);
            } else {
                self.ended = true;
            }
        }
        // Without buffers the input waits in its descriptor; the driver's next kick comes back here.
        self.listen(active, Source::Input, buffers && !self.closed && !self.ended);
        Ok(())
    }

    /// Writes the guest's output until the queue is empty or the output takes no more.
    fn transmit(&mut self, active: &mut Active) -> Result<(), Broken> {
        if self.waiting {
            return Ok(());
        }
        let mem = active.mem.memory();
        let queue = active.queue(TRANSMIT)?;
        let mut used = false;
        while let Some(chain) = queue.pop()? {
            if !self.send(&chain, &mem) {
                // It stays the next of the queue, so that a pause finds nothing in flight.
                queue.undo_pop(&chain);
                self.waiting = true;
                break;
            }
            self.state.sent = 0;
            queue.push(chain.head_index(), 0)?;
            used = true;
        }
        if used {
            queue.notify()?;
        }
        if self.waiting {
            self.listen(active, Source::Output, true);
            if self.output.as_ref().is_some_and(|output| output.pseudo_terminal) {
                self.arm(PATIENCE);
            }
        }
        Ok(())
    }

    /// Writes what is left of a chain; false: the output takes no more now.
    fn send(&mut self, chain: &Chain, mem: &Memory) -> bool {
        let Some(output) = self.output.as_ref().filter(|_| !self.dropping) else { return true };
        let mut bytes = [0; PIECE];
        while self.state.sent < MAX_CHAIN {
            let n = gather(chain, mem, self.state.sent, &mut bytes);
            let Some(piece) = bytes.get(..n).filter(|piece| !piece.is_empty()) else { return true };
            match output.write(piece) {
                Outcome::Bytes(n) => self.state.sent = self.state.sent.saturating_add(n),
                Outcome::Wait => return false,
                Outcome::Gone => return true,
            }
        }
        true
    }

    fn tick(&mut self, active: &mut Active) -> Result<(), Broken> {
        let mut expirations = [0; 8];
        if rustix::io::read(&self.timer, &mut expirations).is_err() {
            // It was set anew since it became readable.
            return Ok(());
        }
        if self.waiting && self.output.as_ref().is_some_and(|output| output.pseudo_terminal) {
            // The output stays watched: whoever reads again gets what comes then.
            self.waiting = false;
            self.dropping = true;
            self.transmit(active)?;
        }
        if self.closed {
            if self.input.as_ref().is_some_and(is_hung_up) {
                self.arm(REOPEN);
            } else {
                self.closed = false;
                self.receive(active)?;
            }
        }
        Ok(())
    }
}

fn is_hung_up(input: &Input) -> bool {
    let mut fds = [PollFd::new(input, PollFlags::IN)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    let _ = poll(&mut fds, Some(&now));
    fds.iter().any(|fd| fd.revents().contains(PollFlags::HUP))
}

/// Bytes the chain has room for, at most one piece.
fn writable_room(chain: &Chain) -> usize {
    let lens = chain.clone().writable().map(|d| usize::try_from(d.len()).unwrap_or(PIECE));
    lens.fold(0, |sum: usize, len| sum.saturating_add(len).min(PIECE))
}

/// Spreads `bytes` over the chain's writable buffers and says how many found a place.
fn scatter(chain: Chain, mem: &Memory, mut bytes: &[u8]) -> u32 {
    let mut written = 0;
    for descriptor in chain.writable() {
        let len = usize::try_from(descriptor.len()).unwrap_or(bytes.len()).min(bytes.len());
        let (part, rest) = bytes.split_at_checked(len).unwrap_or((bytes, &[]));
        if mem.write_slice(part, descriptor.addr()).is_err() {
            break;
        }
        written += u32::try_from(part.len()).unwrap_or(0);
        bytes = rest;
    }
    written
}

/// Copies what follows the first `skip` bytes of the chain's readable buffers, and says how much that is; less than
/// `bytes` holds only at the chain's end or at an address that is not there.
fn gather(chain: &Chain, mem: &Memory, mut skip: usize, bytes: &mut [u8]) -> usize {
    let mut filled = 0;
    for descriptor in chain.clone().readable() {
        let len = usize::try_from(descriptor.len()).unwrap_or(0);
        if skip >= len {
            skip -= len;
            continue;
        }
        let Some(room) = bytes.get_mut(filled..) else { break };
        let n = (len - skip).min(room.len());
        let (Some(part), Some(at)) = (room.get_mut(..n), descriptor.addr().0.checked_add(skip as u64)) else { break };
        if n == 0 || mem.read_slice(part, GuestAddress(at)).is_err() {
            break;
        }
        filled += n;
        skip = 0;
    }
    filled
}

impl Device for Console {
    fn traits(&self) -> Traits {
        // cols, rows, max_nr_ports and emerg_wr (virtio 1.3 section 5.3.4).
        let mut config = [self.size.columns.to_le_bytes(), self.size.rows.to_le_bytes()].concat();
        config.resize(12, 0);
        Traits {
            device_type: VIRTIO_ID_CONSOLE,
            // The size is offered even if unknown: a snapshot may go on with another kind of console.
            features: (1 << VIRTIO_CONSOLE_F_SIZE) | (1 << VIRTIO_RING_F_EVENT_IDX),
            queue_sizes: vec![QUEUE_SIZE; 2],
            config: ConfigSpace::read_only(config),
            shared_memory: None,
        }
    }

    fn start(&mut self, active: &mut Active) -> Result<(), Broken> {
        // Output is watched when it is full, input when there are buffers for it: the kicks that follow find out.
        self.listen(active, Source::Output, self.dropping);
        self.listen(active, Source::Input, false);
        if self.closed {
            self.arm(REOPEN);
        }
        Ok(())
    }

    fn queue(&mut self, active: &mut Active, index: u16) -> Result<(), Broken> {
        match index {
            RECEIVE => self.receive(active),
            _ => self.transmit(active),
        }
    }

    fn sources(&self) -> Vec<BorrowedFd<'_>> {
        let output = self.output.as_ref().map(Output::ready);
        let input = self.input().map(AsFd::as_fd);
        [Some(self.timer.as_fd()), output, input].into_iter().flatten().collect()
    }

    fn source(&mut self, active: &mut Active, token: usize) -> Result<(), Broken> {
        match self.tokens().nth(token).map(|(_, source)| source) {
            Some(Source::Timer) => self.tick(active),
            Some(Source::Output) => {
                self.waiting = false;
                self.dropping = false;
                self.listen(active, Source::Output, false);
                self.transmit(active)
            }
            Some(Source::Input) => self.receive(active),
            None => Ok(()),
        }
    }

    fn stop(&mut self, _active: &mut Active) {
        self.waiting = false;
    }

    fn reset(&mut self) {
        self.state = State::default();
    }

    fn save(&self) -> SavedState {
        SavedState::new(KIND.name, STATE_VERSION, &self.state)
    }
}
