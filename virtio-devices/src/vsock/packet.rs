//! The packet format (virtio 1.3 section 5.10.6): a header of 44 bytes, and data after it.
//!
//! The driver may spread a packet over any number of buffers (Linux does since 6.7), which the packet type of the
//! `virtio-vsock` crate does not allow; hence a header of our own over the chain's reader and writer.

use std::io::{Read, Write};

use virtio_queue::{Reader, Writer};
use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::device::{Chain, Memory};

/// Length of a header in bytes.
pub(super) const HEADER_LEN: usize = size_of::<Header>();
/// The most data one packet carries, in bytes; Linux sends no more either.
pub(super) const MAX_DATA: usize = 64 << 10;
/// The host's context identifier (section 5.10.4).
pub(super) const HOST_CID: u64 = 2;
/// `type`: a stream socket.
pub(super) const TYPE_STREAM: u16 = 1;
/// Flag of SHUTDOWN: the sender will receive no more.
pub(super) const SHUTDOWN_RECEIVE: u32 = 1;
/// Flag of SHUTDOWN: the sender will send no more.
pub(super) const SHUTDOWN_SEND: u32 = 2;
/// Both flags: the sender is finished.
pub(super) const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// `struct virtio_vsock_hdr`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct Header {
    pub src_cid: U64,
    pub dst_cid: U64,
    pub src_port: U32,
    pub dst_port: U32,
    /// Bytes of data after the header.
    pub len: U32,
    /// Socket type.
    pub kind: U16,
    pub op: U16,
    pub flags: U32,
    /// Size of the sender's receive buffer.
    pub buf_alloc: U32,
    /// Bytes of it that were taken so far, modulo 2^32.
    pub fwd_cnt: U32,
}

/// What a packet is for (section 5.10.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Op {
    Request,
    Response,
    Rst,
    Shutdown,
    Rw,
    CreditUpdate,
    CreditRequest,
}

impl Op {
    /// The operation with this number.
    pub(super) fn parse(raw: u16) -> Option<Self> {
        Some(match raw {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Rst,
            4 => Self::Shutdown,
            5 => Self::Rw,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            _ => return None,
        })
    }

    /// Its number.
    pub(super) fn raw(self) -> u16 {
        match self {
            Self::Request => 1,
            Self::Response => 2,
            Self::Rst => 3,
            Self::Shutdown => 4,
            Self::Rw => 5,
            Self::CreditUpdate => 6,
            Self::CreditRequest => 7,
        }
    }
}

impl Header {
    /// The RST that answers this packet.
    pub(super) fn reset_reply(&self) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            // Of the type it answers (section 5.10.6.2), so that the driver finds the socket.
            kind: self.kind,
            op: U16::new(Op::Rst.raw()),
            ..Self::default()
        }
    }
}

/// What the driver put into a transmit chain.
#[derive(Debug)]
pub(super) enum Received<'a> {
    /// A header and as much data as it says.
    Packet(Header, &'a [u8]),
    /// A header that promises more data than there is, or than is allowed.
    BadLength(Header),
    /// Not even a header.
    Garbage,
}

/// Reads a packet from a transmit chain, its data into `scratch`.
pub(super) fn read<'a>(chain: Chain, mem: &Memory, scratch: &'a mut [u8]) -> Received<'a> {
    let Ok(mut reader): Result<Reader<'_>, _> = chain.reader(mem) else { return Received::Garbage };
    let mut header = Header::default();
    if reader.read_exact(header.as_mut_bytes()).is_err() {
        return Received::Garbage;
    }
    // Only data packets carry data; what others bring along has no meaning.
    let len = if header.op.get() == Op::Rw.raw() { usize::try_from(header.len.get()).ok() } else { Some(0) };
    let Some(data) = len.and_then(|len| scratch.get_mut(..len)) else { return Received::BadLength(header) };
    if reader.read_exact(data).is_err() {
        return Received::BadLength(header);
    }
    Received::Packet(header, data)
}

/// The way into a receive chain; nothing if not even a header fits or it is not in guest memory.
pub(super) fn writer(chain: Chain, mem: &Memory) -> Option<Writer<'_>> {
    let writer: Writer<'_> = chain.writer(mem).ok()?;
    (writer.available_bytes() >= HEADER_LEN).then_some(writer)
}

/// Writes a packet into a receive chain and says how many bytes that made.
pub(super) fn write(mut writer: Writer<'_>, header: &Header, data: &[u8]) -> u32 {
    let written = writer.write_all(header.as_bytes()).and_then(|()| writer.write_all(data));
    if written.is_err() {
        return 0;
    }
    u32::try_from(writer.bytes_written()).unwrap_or(0)
}
