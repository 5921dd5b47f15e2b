//! The device itself: a receive and a transmit queue.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::{Bytes, GuestAddressSpace};
use vmm_config::MacAddr;

use super::filter::Filter;
use super::stream::{PREFIX, Stream};
use super::tap::Tap;
use super::{KIND, MAX_FRAME, MIN_FRAME, STATE_VERSION, State};
use crate::device::{Active, Broken, Chain, ConfigSpace, Device, Memory, SavedState, Traits, VirtQueue};
use crate::worker::{EventSet, Interest};

const QUEUE_SIZE: u16 = 256;
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;

/// Bytes of `struct virtio_net_hdr` (virtio 1.3 section 5.1.6), in which `num_buffers` comes last.
const HEADER: usize = 12;
const NUM_BUFFERS: usize = 10;
/// Where the status is in the configuration space (virtio 1.3 section 5.1.4).
const STATUS: usize = 6;

/// The other side is asked for more so often in one call; what it has got to say is heard before.
const READS: usize = 16;

/// Tokens of the sources.
const READABLE: usize = 0;
const WRITABLE: usize = 1;

/// What became of waiting for a frame.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Received {
    /// It is here in the buffer.
    Frame(Range<usize>),
    /// There is none now.
    Nothing,
    /// The other side is.
    Gone,
}

/// What became of a frame of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sent {
    /// It is on its way, or lost.
    Done,
    /// It is on its way in part, and [`Peer::flush`] sends the rest. There is no room for another.
    InPart,
    /// There is no room.
    Later,
    /// The other side is not there any more.
    Gone,
}

/// What the interface is connected to.
pub(super) enum Peer {
    Stream(Stream),
    Tap(Tap),
}

impl Peer {
    fn fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Stream(stream) => stream.fd(),
            Self::Tap(tap) => tap.fd(),
        }
    }

    fn next(&mut self, may_read: bool) -> Received {
        match self {
            Self::Stream(stream) => stream.next(may_read),
            Self::Tap(tap) => tap.next(may_read),
        }
    }

    fn bytes(&self, frame: Range<usize>) -> &[u8] {
        match self {
            Self::Stream(stream) => stream.bytes(frame),
            Self::Tap(tap) => tap.bytes(frame),
        }
    }

    fn consume(&mut self, frame: &Range<usize>) {
        match self {
            Self::Stream(stream) => stream.consume(frame),
            Self::Tap(tap) => tap.consume(),
        }
    }

    /// `frame` has room for a length in front.
    fn send(&mut self, frame: &mut [u8]) -> Sent {
        match self {
            Self::Stream(stream) => stream.send(frame),
            Self::Tap(tap) => tap.send(frame.get(PREFIX..).unwrap_or_default()),
        }
    }

    fn flush(&mut self) -> Sent {
        match self {
            Self::Stream(stream) => stream.flush(),
            Self::Tap(_) => Sent::Done,
        }
    }

    fn end(&mut self) {
        if let Self::Stream(stream) = self {
            stream.end();
        }
    }
}

/// The interface.
pub struct Net {
    mac: MacAddr,
    config: Arc<ConfigSpace>,
    has_mtu: bool,
    peer: Option<Peer>,
    /// Becomes readable when the peer takes more.
    writable: EventSet,
    up: bool,
    /// The guest was told something else about the link.
    tell: bool,
    /// The peer takes nothing now.
    full: bool,
    filter: Filter,
    room: Room,
    /// A frame of the guest, behind room for its length.
    frame: Box<[u8]>,
}

/// Buffers of the guest's that frames are put into. They are held until there is a frame, and given back when the device stops:
/// a ring that was looked at in vain is the only one whose driver says when there are more.
#[derive(Default)]
struct Room {
    chains: VecDeque<(Chain, usize)>,
    /// Bytes of all of them.
    bytes: usize,
}

/// What became of a frame for the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Delivered {
    Done,
    /// The guest has no room for it now.
    Later,
}

impl Net {
    /// An interface; `told` is what a restored guest believes of its link.
    pub(super) fn new(
        mac: MacAddr,
        mtu: Option<u16>,
        peer: Option<Peer>,
        filter: Filter,
        told: Option<bool>,
    ) -> io::Result<Self> {
        let up = peer.is_some();
        let writable = EventSet::new()?;
        if let Some(peer) = &peer {
            writable.add(peer.fd(), Interest { read: false, write: true }, 0)?;
        }
        // mac, status, max_virtqueue_pairs, mtu.
        let mut config = mac.0.to_vec();
        config.extend(status(up));
        config.extend(1u16.to_le_bytes());
        config.extend(mtu.unwrap_or(0).to_le_bytes());
        Ok(Self {
            mac,
            config: ConfigSpace::read_only(config),
            has_mtu: mtu.is_some(),
            peer,
            writable,
            up,
            tell: told.is_some_and(|told| told != up),
            full: false,
            filter,
            room: Room::default(),
            frame: vec![0; PREFIX + MAX_FRAME].into(),
        })
    }

    /// Gives the guest frames as long as there are any, and room.
    fn receive(&mut self, active: &mut Active) -> Result<(), Broken> {
        let Some(peer) = self.peer.as_mut().filter(|_| self.up) else { return Ok(()) };
        let mem = active.mem.memory();
        let merge = active.features & (1 << VIRTIO_NET_F_MRG_RXBUF) != 0;
        let queue = active.queue(RECEIVE)?;
        let (mut reads, mut room, mut gone) = (0, true, false);
        loop {
            // What is in the buffer already makes no noise at the socket.
            match peer.next(reads < READS) {
                Received::Frame(frame) => {
                    let delivered = self.room.deliver(queue, &mem, peer.bytes(frame.clone()), merge)?;
                    if delivered == Delivered::Later {
                        room = false;
                        break;
                    }
                    peer.consume(&frame);
                }
                Received::Nothing => break,
                Received::Gone => {
                    gone = true;
                    break;
                }
            }
            reads += 1;
        }
        queue.notify()?;
        if gone {
            self.lose(active);
        } else {
            // Without room frames wait where they are; the driver's next kick comes back here.
            active.listen(READABLE, room);
        }
        Ok(())
    }

    /// Sends the guest's frames until the queue is empty or the other side takes no more.
    fn transmit(&mut self, active: &mut Active) -> Result<(), Broken> {
        if self.full {
            return Ok(());
        }
        let mem = active.mem.memory();
        let queue = active.queue(TRANSMIT)?;
        let mut gone = false;
        while let Some(chain) = queue.pop()? {
            match self.send(&chain, &mem) {
                Sent::Done => {}
                Sent::InPart => self.full = true,
                Sent::Later => {
                    // It stays the next of the queue, so that a pause finds nothing in flight.
                    queue.undo_pop(&chain);
                    self.full = true;
                    break;
                }
                Sent::Gone => gone = true,
            }
            queue.push(chain.head_index(), 0)?;
            if self.full || gone {
                break;
            }
        }
        queue.notify()?;
        if gone {
            self.lose(active);
            // The rest of what the guest sent is lost at once.
            return self.transmit(active);
        }
        active.listen(WRITABLE, self.full);
        Ok(())
    }

    fn send(&mut self, chain: &Chain, mem: &Memory) -> Sent {
        let Some(peer) = self.peer.as_mut().filter(|_| self.up) else { return Sent::Done };
        let len = self.frame.get_mut(PREFIX..).and_then(|room| gather(chain, mem, room));
        let end = PREFIX.saturating_add(len.unwrap_or(0));
        match self.frame.get_mut(..end) {
            Some(frame) if end >= PREFIX + MIN_FRAME && self.filter.allows(frame.get(PREFIX..).unwrap_or_default()) => {
                peer.send(frame)
            }
            _ => Sent::Done,
        }
    }

    /// The other side is gone: so is the link. Its descriptor stays, since the worker knows it by its number.
    fn lose(&mut self, active: &mut Active) {
        log::info!("net: the other side is gone, the link is down");
        if let Some(peer) = &mut self.peer {
            peer.end();
        }
        (self.up, self.full) = (false, false);
        active.listen(READABLE, false);
        active.listen(WRITABLE, false);
        self.config.update(STATUS, &status(false));
        active.interrupt.config_changed();
    }
}

fn status(up: bool) -> [u8; 2] {
    let bits = if up { u16::try_from(VIRTIO_NET_S_LINK_UP).unwrap_or(1) } else { 0 };
    bits.to_le_bytes()
}

/// Copies the frame behind the header of a chain; nothing if it is not there or too long.
fn gather(chain: &Chain, mem: &Memory, room: &mut [u8]) -> Option<usize> {
    let (mut skip, mut filled) = (HEADER, 0usize);
    for descriptor in chain.clone().readable() {
        let len = usize::try_from(descriptor.len()).ok()?;
        let skipped = skip.min(len);
        skip -= skipped;
        let part = room.get_mut(filled..filled.checked_add(len - skipped)?)?;
        let from = descriptor.addr().0.checked_add(u64::try_from(skipped).ok()?)?;
        if !part.is_empty() {
            mem.read_slice(part, vm_memory::GuestAddress(from)).ok()?;
        }
        filled = filled.checked_add(part.len())?;
    }
    Some(filled)
}

/// Bytes a chain has room for.
fn room_of(chain: &Chain) -> usize {
    let lens = chain.clone().writable().map(|d| usize::try_from(d.len()).unwrap_or(usize::MAX));
    lens.fold(0, usize::saturating_add)
}

impl Room {
    /// Puts a frame into as many chains as it takes, or, unless it may be spread, into one.
    fn deliver(
        &mut self,
        queue: &mut VirtQueue,
        mem: &Memory,
        frame: &[u8],
        spread: bool,
    ) -> Result<Delivered, Broken> {
        if frame.len() < MIN_FRAME {
            return Ok(Delivered::Done);
        }
        let whole = HEADER.saturating_add(frame.len());
        while self.chains.is_empty() || spread && self.bytes < whole {
            match queue.pop()? {
                Some(chain) => {
                    let room = room_of(&chain);
                    self.bytes = self.bytes.saturating_add(room);
                    self.chains.push_back((chain, room));
                }
                // Whoever offers a whole ring of buffers that one frame does not fit into loses the frame.
                None if self.chains.len() >= usize::from(queue.size()) => return Ok(Delivered::Done),
                None => return Ok(Delivered::Later),
            }
        }
        let (mut count, mut room) = (0u16, 0usize);
        for (_, more) in self.chains.iter().take(if spread { usize::MAX } else { 1 }) {
            room = room.saturating_add(*more);
            count = count.saturating_add(1);
            if room >= whole {
                break;
            }
        }
        if room < whole {
            return Ok(Delivered::Done);
        }
        let mut header = [0; HEADER];
        if let Some(field) = header.get_mut(NUM_BUFFERS..) {
            field.copy_from_slice(&count.to_le_bytes());
        }
        let mut rest = [&header, frame];
        for (chain, room) in self.chains.drain(..usize::from(count)) {
            self.bytes = self.bytes.saturating_sub(room);
            let head = chain.head_index();
            let written = scatter(chain, mem, &mut rest);
            queue.push(head, written)?;
        }
        Ok(Delivered::Done)
    }

    /// Puts everything back into the ring.
    fn give_back(&mut self, queue: &mut VirtQueue) {
        self.chains.drain(..).rev().for_each(|(chain, _)| queue.undo_pop(&chain));
        self.bytes = 0;
    }
}

/// Fills the chain's writable buffers with what is left of two pieces, and says with how much. What has no place in guest memory
/// is lost.
fn scatter(chain: Chain, mem: &Memory, rest: &mut [&[u8]; 2]) -> u32 {
    let mut written = 0u32;
    for descriptor in chain.writable() {
        let (mut at, mut room) = (descriptor.addr(), usize::try_from(descriptor.len()).unwrap_or(usize::MAX));
        for piece in rest.iter_mut() {
            let (part, behind) = piece.split_at_checked(room).unwrap_or((piece, &[]));
            *piece = behind;
            if part.is_empty() {
                continue;
            }
            if mem.write_slice(part, at).is_err() {
                return written;
            }
            room -= part.len();
            written = written.saturating_add(u32::try_from(part.len()).unwrap_or(0));
            let Some(next) = at.0.checked_add(part.len() as u64) else { return written };
            at = vm_memory::GuestAddress(next);
        }
    }
    written
}

impl Device for Net {
    fn traits(&self) -> Traits {
        let mtu = u64::from(self.has_mtu) << VIRTIO_NET_F_MTU;
        Traits {
            device_type: VIRTIO_ID_NET,
            features: mtu
                | (1 << VIRTIO_NET_F_MAC)
                | (1 << VIRTIO_NET_F_MRG_RXBUF)
                | (1 << VIRTIO_NET_F_STATUS)
                | (1 << VIRTIO_RING_F_EVENT_IDX),
            queue_sizes: vec![QUEUE_SIZE; 2],
            config: self.config.clone(),
            shared_memory: None,
        }
    }

    fn start(&mut self, active: &mut Active) -> Result<(), Broken> {
        // The kicks that follow find out what there is to wait for.
        active.listen(READABLE, false);
        active.listen(WRITABLE, self.full);
        if std::mem::take(&mut self.tell) {
            active.interrupt.config_changed();
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
        self.peer.iter().flat_map(|peer| [peer.fd(), self.writable.as_fd()]).collect()
    }

    fn source(&mut self, active: &mut Active, token: usize) -> Result<(), Broken> {
        if token == READABLE {
            return self.receive(active);
        }
        match self.peer.as_mut().map_or(Sent::Done, Peer::flush) {
            Sent::InPart | Sent::Later => return Ok(()),
            Sent::Gone => self.lose(active),
            Sent::Done => self.full = false,
        }
        self.transmit(active)
    }

    fn stop(&mut self, active: &mut Active) {
        match active.queue(RECEIVE) {
            Ok(queue) => self.room.give_back(queue),
            Err(_) => self.room = Room::default(),
        }
    }

    fn save(&self) -> SavedState {
        SavedState::new(KIND.name, STATE_VERSION, &State { mac: self.mac.0, up: self.up })
    }
}
