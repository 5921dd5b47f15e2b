//! From a descriptor chain to a request: pure, and the part a hostile driver talks to.
//!
//! The driver may cut a chain as it likes (virtio 1.3 section 2.7.4): the readable bytes are a header and the data, the
//! writable bytes the data and one byte of status.

use vm_memory::GuestAddress;

/// Bytes in a sector, whatever the image's block size.
pub const SECTOR: u64 = 512;

/// The most bytes one request moves. A Linux driver stays below 2 MiB unless told otherwise.
pub const MAX_DATA: u64 = 32 << 20;
/// The most ranges one discard or write-zeroes request has.
pub const MAX_RANGES: u32 = 32;
/// The most sectors of one such range.
pub const MAX_RANGE_SECTORS: u32 = 1 << 21;

/// Status: done.
pub const OK: u8 = 0;
/// Status: the request is wrong, or the host cannot do it.
pub const IOERR: u8 = 1;
/// Status: no such request.
pub const UNSUPP: u8 = 2;

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

const HEADER: usize = 16;
/// Bytes of one range of a discard or write-zeroes request.
const RANGE: u64 = 16;

/// A buffer of a chain, or a part of one. Whether there is guest memory at it is not known yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// First address.
    pub addr: GuestAddress,
    /// Length in bytes.
    pub len: u32,
}

/// The buffers of a chain.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Parts {
    /// Those the device reads.
    pub readable: Vec<Part>,
    /// Those it writes.
    pub writable: Vec<Part>,
}

/// What requests are measured against.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Disk {
    /// Size in sectors.
    pub sectors: u64,
    /// The driver must not write.
    pub read_only: bool,
    /// Discards were negotiated.
    pub discard: bool,
    /// Writing zeroes was negotiated.
    pub write_zeroes: bool,
}

/// A range of the image, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// First byte.
    pub offset: u64,
    /// Length.
    pub len: u64,
    /// Its blocks may be given back.
    pub unmap: bool,
}

/// What the driver wants; every offset and length lies inside the disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Fill the buffers from byte `offset` on.
    Read {
        /// First byte of the image.
        offset: u64,
        /// Where to.
        into: Vec<Part>,
    },
    /// Write the buffers at byte `offset`.
    Write {
        /// First byte of the image.
        offset: u64,
        /// Where from.
        from: Vec<Part>,
    },
    /// Bring what was written to disk.
    Flush,
    /// Tell the serial number.
    GetId {
        /// Where to.
        into: Vec<Part>,
    },
    /// Forget ranges.
    Discard(Vec<Range>),
    /// Make ranges zero.
    WriteZeroes(Vec<Range>),
}

/// A chain, understood.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// Where the status goes; nothing: the driver left no room and gets no answer.
    pub status: Option<GuestAddress>,
    /// What to do, or the status that refuses it.
    pub action: Result<Action, u8>,
}

/// Understands a chain. `read` copies guest memory and says whether there is any at that address.
pub fn parse(mut parts: Parts, disk: &Disk, mut read: impl FnMut(GuestAddress, &mut [u8]) -> bool) -> Request {
    let status = take_status(&mut parts.writable);
    let action = action(parts, disk, &mut read);
    Request { status, action }
}

/// Cuts the last writable byte off.
fn take_status(writable: &mut Vec<Part>) -> Option<GuestAddress> {
    while writable.pop_if(|part| part.len == 0).is_some() {}
    let last = writable.last_mut()?;
    last.len = last.len.checked_sub(1)?;
    last.addr.0.checked_add(u64::from(last.len)).map(GuestAddress)
}

fn action(mut parts: Parts, disk: &Disk, read: &mut impl FnMut(GuestAddress, &mut [u8]) -> bool) -> Result<Action, u8> {
    let mut header = [0; HEADER];
    take_bytes(&mut parts.readable, &mut header, read)?;
    let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
    let sector = u64::from_le_bytes(sector);
    match u32::from_le_bytes([t0, t1, t2, t3]) {
        T_IN => {
            let offset = place(disk, sector, total(&parts.writable)?)?;
            Ok(Action::Read { offset, into: parts.writable })
        }
        T_OUT if disk.read_only => Err(IOERR),
        T_OUT => {
            let offset = place(disk, sector, total(&parts.readable)?)?;
            Ok(Action::Write { offset, from: parts.readable })
        }
        T_FLUSH => Ok(Action::Flush),
        T_GET_ID => Ok(Action::GetId { into: parts.writable }),
        T_DISCARD if disk.discard => ranges(parts.readable, disk, false, read).map(Action::Discard),
        T_WRITE_ZEROES if disk.write_zeroes => ranges(parts.readable, disk, true, read).map(Action::WriteZeroes),
        _ => Err(UNSUPP),
    }
}

/// Length of the data.
fn total(parts: &[Part]) -> Result<u64, u8> {
    let sum = parts.iter().try_fold(0u64, |sum, part| sum.checked_add(u64::from(part.len)));
    sum.filter(|sum| *sum <= MAX_DATA).ok_or(IOERR)
}

/// The byte at which `len` bytes from `sector` on begin, if they are whole sectors of the disk.
fn place(disk: &Disk, sector: u64, len: u64) -> Result<u64, u8> {
    if !len.is_multiple_of(SECTOR) {
        return Err(IOERR);
    }
    let end = sector.checked_add(len / SECTOR).filter(|end| *end <= disk.sectors);
    end.and_then(|_| sector.checked_mul(SECTOR)).ok_or(IOERR)
}

/// Reads a discard's or write-zeroes' ranges (virtio 1.3 section 5.2.6).
fn ranges(
    mut parts: Vec<Part>,
    disk: &Disk,
    zeroes: bool,
    read: &mut impl FnMut(GuestAddress, &mut [u8]) -> bool,
) -> Result<Vec<Range>, u8> {
    if disk.read_only {
        return Err(IOERR);
    }
    let len = total(&parts)?;
    let count = len / RANGE;
    if !len.is_multiple_of(RANGE) || count == 0 || count > u64::from(MAX_RANGES) {
        return Err(IOERR);
    }
    let mut ranges = Vec::new();
    for _ in 0..count {
        let mut bytes = [0; HEADER];
        take_bytes(&mut parts, &mut bytes, read)?;
        let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] = bytes;
        let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
        let flags = u32::from_le_bytes(flags);
        // The one flag is `unmap`, of write-zeroes.
        if flags > u32::from(zeroes) {
            return Err(UNSUPP);
        }
        if sectors == 0 || sectors > MAX_RANGE_SECTORS {
            return Err(IOERR);
        }
        let len = u64::from(sectors) * SECTOR;
        let offset = place(disk, u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]), len)?;
        ranges.push(Range { offset, len, unmap: flags == 1 });
    }
    Ok(ranges)
}

/// Reads the first bytes of `parts` and cuts them off.
fn take_bytes(
    parts: &mut Vec<Part>,
    mut bytes: &mut [u8],
    read: &mut impl FnMut(GuestAddress, &mut [u8]) -> bool,
) -> Result<(), u8> {
    let mut whole = 0;
    for part in parts.iter_mut() {
        let len = usize::try_from(part.len).unwrap_or(usize::MAX).min(bytes.len());
        let (now, rest) = bytes.split_at_mut_checked(len).ok_or(IOERR)?;
        if !now.is_empty() && !read(part.addr, now) {
            return Err(IOERR);
        }
        let len = u32::try_from(len).map_err(|_| IOERR)?;
        part.len = part.len.checked_sub(len).ok_or(IOERR)?;
        part.addr = GuestAddress(part.addr.0.checked_add(u64::from(len)).ok_or(IOERR)?);
        whole += usize::from(part.len == 0);
        bytes = rest;
        if bytes.is_empty() {
            break;
        }
    }
    parts.drain(..whole);
    if bytes.is_empty() { Ok(()) } else { Err(IOERR) }
}
