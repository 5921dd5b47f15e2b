//! The device itself: carries out what [`super::parse`] understood.

use std::io;

use block::engine::Engine;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryBackend, VolatileSlice};

use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::parse::{
    Action, Disk, IOERR, MAX_RANGE_SECTORS, MAX_RANGES, OK, Part, Parts, Range, Request, SECTOR, UNSUPP, parse,
};
use super::{KIND, STATE_VERSION, State};
use crate::device::{Active, Broken, Chain, ConfigSpace, Device, Memory, SavedState, Traits};

// Feature bits (virtio 1.3 section 5.2.3).
const F_SEG_MAX: u32 = 2;
const F_RO: u32 = 5;
const F_BLK_SIZE: u32 = 6;
const F_FLUSH: u32 = 9;
const F_MQ: u32 = 12;
const F_DISCARD: u32 = 13;
const F_WRITE_ZEROES: u32 = 14;

/// Bytes of the configuration space, up to and with `write_zeroes_may_unmap` and its padding.
const CONFIG_BYTES: usize = 60;

/// Bytes of the answer to a question for the serial number.
pub(super) const ID_BYTES: usize = 20;

/// The form of a disk, beside its content.
#[derive(Debug, Clone)]
pub(super) struct Form {
    /// Serial number, padded with zeroes.
    pub(super) serial: [u8; ID_BYTES],
    /// Bytes of a block: what the driver should read and write at least.
    pub(super) block_size: u32,
    /// Entries of each queue.
    pub(super) queue_size: u16,
    /// Number of queues.
    pub(super) queues: u16,
}

/// Block device.
pub struct Blk {
    engine: Box<dyn Engine>,
    form: Form,
    state: State,
    /// The driver knows that writes need a flush; otherwise each is flushed at once.
    write_back: bool,
    disk: Disk,
}

impl Blk {
    pub(super) fn new(engine: Box<dyn Engine>, form: Form, state: State) -> Self {
        let disk = Disk { sectors: state.sectors, read_only: state.read_only, discard: false, write_zeroes: false };
        Self { engine, form, state, write_back: false, disk }
    }

    fn execute(&self, action: &Action, mem: &Memory) -> Result<u32, u8> {
        match action {
            Action::Read { offset, into } => {
                let (slices, len) = slices(mem, into)?;
                report("read", self.engine.read(*offset, &slices))?;
                Ok(len)
            }
            Action::Write { offset, from } => {
                let (slices, _) = slices(mem, from)?;
                report("write", self.engine.write(*offset, &slices))?;
                self.settle()
            }
            Action::Flush => report("flush", self.engine.flush()).map(|()| 0),
            Action::GetId { into } => Ok(scatter(mem, into, &self.form.serial)),
            Action::Discard(ranges) => {
                each(ranges, |range| report("discard in", self.engine.discard(range.offset, range.len)))?;
                self.settle()
            }
            Action::WriteZeroes(ranges) => {
                each(ranges, |range| report("zero", self.engine.write_zeroes(range.offset, range.len, range.unmap)))?;
                self.settle()
            }
        }
    }

    /// Something was changed: on disk now, if the driver will not ask for it (virtio 1.3 section 5.2.6.2).
    fn settle(&self) -> Result<u32, u8> {
        if self.write_back { Ok(0) } else { report("flush", self.engine.flush()).map(|()| 0) }
    }

    fn config(&self) -> Vec<u8> {
        let mut config = vec![0; CONFIG_BYTES];
        let mut put = |offset: usize, bytes: &[u8]| {
            if let Some(target) = config.get_mut(offset..offset.saturating_add(bytes.len())) {
                target.copy_from_slice(bytes);
            }
        };
        put(0, &self.state.sectors.to_le_bytes());
        // A chain also has a header and a status.
        put(12, &u32::from(self.form.queue_size.saturating_sub(2).max(1)).to_le_bytes());
        put(20, &self.form.block_size.to_le_bytes());
        put(34, &self.form.queues.to_le_bytes());
        let alignment = u64::from(self.form.block_size) / SECTOR;
        if self.state.discard {
            put(36, &MAX_RANGE_SECTORS.to_le_bytes());
            put(40, &MAX_RANGES.to_le_bytes());
            put(44, &u32::try_from(alignment).unwrap_or(1).to_le_bytes());
        }
        if self.state.write_zeroes {
            put(48, &MAX_RANGE_SECTORS.to_le_bytes());
            put(52, &MAX_RANGES.to_le_bytes());
            put(56, &[1]);
        }
        config
    }
}

fn each(ranges: &[Range], run: impl Fn(&Range) -> Result<(), u8>) -> Result<(), u8> {
    ranges.iter().try_for_each(run)
}

/// The status of an operation, the reason of a failure going to the log.
fn report(what: &str, result: io::Result<()>) -> Result<(), u8> {
    result.map_err(|e| {
        log::warn!("disk: cannot {what} the image: {e}");
        if e.raw_os_error() == Some(libc::EOPNOTSUPP) { UNSUPP } else { IOERR }
    })
}

/// Guest memory behind `parts`, and its length.
fn slices<'a>(mem: &'a Memory, parts: &[Part]) -> Result<(Vec<VolatileSlice<'a>>, u32), u8> {
    let mut slices = Vec::with_capacity(parts.len());
    let mut total = 0u32;
    for part in parts {
        let len = usize::try_from(part.len).map_err(|_| IOERR)?;
        for slice in mem.get_slices(part.addr, len) {
            slices.push(slice.map_err(|_| IOERR)?);
        }
        total = total.checked_add(part.len).ok_or(IOERR)?;
    }
    Ok((slices, total))
}

fn scatter(mem: &Memory, parts: &[Part], mut bytes: &[u8]) -> u32 {
    let mut written = 0u32;
    for part in parts {
        let len = usize::try_from(part.len).unwrap_or(usize::MAX).min(bytes.len());
        let (now, rest) = bytes.split_at_checked(len).unwrap_or((bytes, &[]));
        if mem.write_slice(now, part.addr).is_err() {
            break;
        }
        written = written.saturating_add(u32::try_from(now.len()).unwrap_or(0));
        bytes = rest;
    }
    written
}

fn parts(chain: Chain) -> Parts {
    let mut parts = Parts::default();
    for descriptor in chain {
        let part = Part { addr: descriptor.addr(), len: descriptor.len() };
        if descriptor.is_write_only() { parts.writable.push(part) } else { parts.readable.push(part) }
    }
    parts
}

fn answer(mem: &Memory, status: Option<GuestAddress>, result: Result<u32, u8>) -> u32 {
    let (byte, data) = match result {
        Ok(data) => (OK, data),
        Err(status) => (status, 0),
    };
    match status {
        Some(at) if mem.write_slice(&[byte], at).is_ok() => data.saturating_add(1),
        _ => 0,
    }
}

impl Device for Blk {
    fn traits(&self) -> Traits {
        let mut features = 0;
        let mut offer = |bit: u32, on: bool| features |= u64::from(on) << bit;
        offer(F_SEG_MAX, true);
        offer(F_BLK_SIZE, true);
        offer(F_RO, self.state.read_only);
        offer(F_FLUSH, !self.state.read_only);
        offer(F_MQ, self.form.queues > 1);
        offer(F_DISCARD, self.state.discard);
        offer(F_WRITE_ZEROES, self.state.write_zeroes);
        offer(VIRTIO_RING_F_INDIRECT_DESC, true);
        offer(VIRTIO_RING_F_EVENT_IDX, true);
        Traits {
            device_type: VIRTIO_ID_BLOCK,
            features,
            queue_sizes: vec![self.form.queue_size; usize::from(self.form.queues)],
            config: ConfigSpace::read_only(self.config()),
            shared_memory: None,
        }
    }

    fn start(&mut self, active: &mut Active) -> Result<(), Broken> {
        let negotiated = |bit: u32| active.features & (1 << bit) != 0;
        self.write_back = negotiated(F_FLUSH);
        self.disk.discard = negotiated(F_DISCARD) && self.state.discard;
        self.disk.write_zeroes = negotiated(F_WRITE_ZEROES) && self.state.write_zeroes;
        Ok(())
    }

    fn queue(&mut self, active: &mut Active, index: u16) -> Result<(), Broken> {
        let mem = active.mem.memory();
        let queue = active.queue(index)?;
        while let Some(chain) = queue.pop()? {
            let head = chain.head_index();
            let read = |at, bytes: &mut [u8]| mem.read_slice(bytes, at).is_ok();
            let Request { status, action } = parse(parts(chain), &self.disk, read);
            // Without room for the status nothing is done: the driver could not know.
            let result = match action {
                Ok(action) if status.is_some() => self.execute(&action, &mem),
                Ok(_) => Err(IOERR),
                Err(status) => Err(status),
            };
            queue.push(head, answer(&mem, status, result))?;
        }
        queue.notify()
    }

    fn save(&self) -> SavedState {
        SavedState::new(KIND.name, STATE_VERSION, &self.state)
    }
}
