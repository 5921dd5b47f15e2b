//! The device itself: requests out of the queues, answers into them, and data between files and guest memory.

use std::os::fd::BorrowedFd;

use passthrough::Errno;
use virtio_bindings::virtio_ids::VIRTIO_ID_FS;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryBackend, VolatileSlice};
use zerocopy::{FromBytes, IntoBytes};

use super::parse::{MAX_REQUEST, MAX_SET_EXTENDED, Request, parse};
use super::protocol::{InHeader, OutHeader, WriteIn, op};
use super::session::{MAX_TRANSFER, Reply, Session, written};
use super::{KIND, STATE_VERSION, State};
use crate::device::{Active, Broken, Chain, ConfigSpace, Device, Memory, SavedState, Traits};

/// Bytes of the file system's name (virtio 1.3 section 5.11.4).
pub(super) const TAG_BYTES: usize = 36;
/// Queue 0, for FORGET, and one for requests: a second one would be served by the same thread.
const REQUEST_QUEUES: u32 = 1;
/// A request of 256 pages takes as many descriptors and a few for its headers.
const QUEUE_SIZE: u16 = 1024;

/// Requests that are served in one turn.
const TURN: usize = 16;

const IN_HEADER: usize = size_of::<InHeader>();
const OUT_HEADER: usize = size_of::<OutHeader>();
const WRITE_HEADERS: usize = IN_HEADER + size_of::<WriteIn>();

/// File system device.
pub struct Fs {
    session: Session,
    tag: [u8; TAG_BYTES],
}

impl Fs {
    pub(super) fn new(session: Session, tag: [u8; TAG_BYTES]) -> Self {
        Self { session, tag }
    }

    /// Carries out the request in `buffers`. Returns how many bytes were written.
    fn serve(&mut self, mem: &Memory, buffers: &Buffers) -> u32 {
        let mut header = [0; IN_HEADER];
        let Some(header) =
            buffers.readable.read(mem, 0, &mut header).and_then(|_| InHeader::read_from_bytes(&header).ok())
        else {
            return 0;
        };
        let result = self.dispatch(mem, buffers, &header);
        let silent = matches!(header.opcode.get(), op::FORGET | op::BATCH_FORGET | op::INTERRUPT);
        let (error, payload) = match result {
            _ if silent => return 0,
            Ok(Answer::Reply(Reply::Silence)) => return 0,
            Ok(Answer::Reply(Reply::Bytes(bytes))) => (0, Payload::Bytes(bytes)),
            Ok(Answer::Written(len)) => (0, Payload::Written(len)),
            Err(e) => (-e.raw_os_error(), Payload::Bytes(Vec::new())),
        };
        reply(mem, &buffers.writable, header.unique.get(), error, &payload)
    }

    fn dispatch(&mut self, mem: &Memory, buffers: &Buffers, header: &InHeader) -> Result<Answer, Errno> {
        let (opcode, node) = (header.opcode.get(), header.nodeid.get());
        let whole = usize::try_from(header.len.get()).unwrap_or(usize::MAX);
        if whole < IN_HEADER || whole > buffers.readable.len {
            return Err(Errno::INVAL);
        }
        // What follows a WRITE's headers stays where it is.
        let parsed = whole.min(match opcode {
            op::WRITE => WRITE_HEADERS,
            op::SETXATTR => MAX_SET_EXTENDED,
            _ => MAX_REQUEST,
        });
        let mut body = vec![0; parsed.saturating_sub(IN_HEADER)];
        buffers.readable.read(mem, IN_HEADER, &mut body).ok_or(Errno::FAULT)?;
        match parse(opcode, node, &body)? {
            Request::Read { handle, offset, size } => {
                self.session.check_begun()?;
                let size = usize::try_from(size.min(MAX_TRANSFER)).unwrap_or(0);
                let into = buffers.writable.slices(mem, OUT_HEADER, size).ok_or(Errno::FAULT)?;
                self.session.tree.read(node, handle, offset, &into).map(Answer::Written)
            }
            Request::Write { handle, offset, size, append } => {
                self.session.check_begun()?;
                let size = usize::try_from(size).unwrap_or(usize::MAX);
                if size > whole.saturating_sub(WRITE_HEADERS) || size > usize::try_from(MAX_TRANSFER).unwrap_or(0) {
                    return Err(Errno::INVAL);
                }
                let from = buffers.readable.slices(mem, WRITE_HEADERS, size).ok_or(Errno::FAULT)?;
                let done = self.session.tree.write(node, handle, offset, append, &from)?;
                Ok(Answer::Reply(written(done)))
            }
            request => self.session.handle(node, request).map(Answer::Reply),
        }
    }
}

/// What a request came to.
enum Answer {
    Reply(Reply),
    /// So many bytes are behind the header's place already.
    Written(usize),
}

enum Payload {
    Bytes(Vec<u8>),
    Written(usize),
}

/// Writes an answer, or nothing if it has no room.
fn reply(mem: &Memory, to: &Parts, unique: u64, error: i32, payload: &Payload) -> u32 {
    let (bytes, behind) = match payload {
        Payload::Bytes(bytes) => (bytes.as_slice(), 0),
        Payload::Written(len) => (&[] as &[u8], *len),
    };
    let Ok(len) = u32::try_from(OUT_HEADER.saturating_add(bytes.len()).saturating_add(behind)) else { return 0 };
    let header = OutHeader { len: len.into(), error: error.into(), unique: unique.into() };
    let done = to.write(mem, 0, header.as_bytes()).and_then(|()| to.write(mem, OUT_HEADER, bytes));
    if done.is_some() { len } else { 0 }
}

/// The buffers of a chain, those the device reads before those it writes (virtio 1.3 section 2.7.4.2).
#[derive(Default)]
struct Buffers {
    readable: Parts,
    writable: Parts,
}

impl Buffers {
    fn of(chain: Chain) -> Self {
        let mut buffers = Self::default();
        for descriptor in chain {
            let parts = if descriptor.is_write_only() { &mut buffers.writable } else { &mut buffers.readable };
            let Ok(len) = usize::try_from(descriptor.len()) else { continue };
            parts.list.push((descriptor.addr(), len));
            parts.len = parts.len.saturating_add(len);
        }
        buffers
    }
}

/// Pieces of guest memory that are one stretch of bytes.
#[derive(Default)]
struct Parts {
    list: Vec<(GuestAddress, usize)>,
    len: usize,
}

impl Parts {
    /// At most `len` bytes from `skip` on; nothing if some of them are not in guest memory.
    fn slices<'a>(&self, mem: &'a Memory, mut skip: usize, mut len: usize) -> Option<Vec<VolatileSlice<'a>>> {
        let mut slices = Vec::new();
        for &(start, size) in &self.list {
            let before = skip.min(size);
            skip -= before;
            let size = (size - before).min(len);
            len -= size;
            if size == 0 {
                continue;
            }
            let start = GuestAddress(start.0.checked_add(before as u64)?);
            for slice in mem.get_slices(start, size) {
                slices.push(slice.ok()?);
            }
        }
        Some(slices)
    }

    /// Fills all of `into` from `skip` on.
    fn read(&self, mem: &Memory, skip: usize, into: &mut [u8]) -> Option<()> {
        let mut at = 0usize;
        for slice in self.slices(mem, skip, into.len())? {
            let end = at.checked_add(slice.len())?;
            slice.read_slice(into.get_mut(at..end)?, 0).ok()?;
            at = end;
        }
        (at == into.len()).then_some(())
    }

    /// Writes all of `bytes` from `skip` on.
    fn write(&self, mem: &Memory, skip: usize, bytes: &[u8]) -> Option<()> {
        let mut at = 0usize;
        for slice in self.slices(mem, skip, bytes.len())? {
            let end = at.checked_add(slice.len())?;
            slice.write_slice(bytes.get(at..end)?, 0).ok()?;
            at = end;
        }
        (at == bytes.len()).then_some(())
    }
}

impl Device for Fs {
    fn traits(&self) -> Traits {
        let config = [self.tag.as_slice(), &REQUEST_QUEUES.to_le_bytes()].concat();
        Traits {
            device_type: VIRTIO_ID_FS,
            features: 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX,
            queue_sizes: vec![QUEUE_SIZE; 2],
            config: ConfigSpace::read_only(config),
            shared_memory: None,
        }
    }

    fn start(&mut self, _active: &mut Active) -> Result<(), Broken> {
        self.session.tree.forget_revoked();
        Ok(())
    }

    fn queue(&mut self, active: &mut Active, index: u16) -> Result<(), Broken> {
        let mem = active.mem.memory();
        let queue = active.queue(index)?;
        // Few at a time: a request may take long on the host, and between turns the thread hears that it is to stop.
        let mut served = 0;
        while let Some(chain) = queue.pop()? {
            let head = chain.head_index();
            let written = self.serve(&mem, &Buffers::of(chain));
            queue.push(head, written)?;
            served += 1;
            if served == TURN {
                queue.end_turn();
            }
        }
        queue.notify()
    }

    fn sources(&self) -> Vec<BorrowedFd<'_>> {
        vec![self.session.tree.revocations()]
    }

    fn source(&mut self, _active: &mut Active, _token: usize) -> Result<(), Broken> {
        self.session.tree.forget_revoked();
        Ok(())
    }

    fn reset(&mut self) {
        self.session.end();
    }

    fn save(&self) -> SavedState {
        let state = State { begun: self.session.begun, next: self.session.tree.next_number() };
        SavedState::new(KIND.name, STATE_VERSION, &state)
    }
}
