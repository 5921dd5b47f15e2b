//! The guest's side for tests: packets over a mock driver, and sockets that keep to the rules.

use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vm_memory::{Bytes, GuestAddress};
use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, IntoBytes};

use super::Vsock;
use super::packet::{HEADER_LEN, Header, Op, TYPE_STREAM};
use crate::testkit::Driver;

pub(super) const CID: u32 = 42;
/// Receive buffers the guest offers, and their size: Linux's.
const RX_BUFFERS: u16 = 64;
const RX_LEN: u32 = 4096;
const TX_SLOTS: u64 = 64;
const SLOT: u64 = 128 << 10;

pub(super) struct Guest {
    pub driver: Driver,
    pub socket: PathBuf,
    /// Offers receive buffers again as they come back.
    pub refill: bool,
    rx_base: u64,
    tx_base: u64,
    tx_next: u64,
    rx_seen: u16,
    pub inbox: VecDeque<(Header, Vec<u8>)>,
    pub _dir: tempfile::TempDir,
}

/// A socket of the guest's.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sock {
    pub host_port: u32,
    pub guest_port: u32,
    pub buf_alloc: u32,
    pub fwd_cnt: u32,
    pub sent: u32,
    pub peer_alloc: u32,
    pub peer_fwd: u32,
}

impl Sock {
    pub(super) fn new(host_port: u32, guest_port: u32, buf_alloc: u32) -> Self {
        Self { host_port, guest_port, buf_alloc, fwd_cnt: 0, sent: 0, peer_alloc: 0, peer_fwd: 0 }
    }

    pub(super) fn header(&self, op: Op) -> Header {
        Header {
            src_cid: U64::new(u64::from(CID)),
            dst_cid: U64::new(2),
            src_port: U32::new(self.guest_port),
            dst_port: U32::new(self.host_port),
            kind: U16::new(TYPE_STREAM),
            op: U16::new(op.raw()),
            buf_alloc: U32::new(self.buf_alloc),
            fwd_cnt: U32::new(self.fwd_cnt),
            ..Header::default()
        }
    }

    pub(super) fn learn(&mut self, header: &Header) {
        (self.peer_alloc, self.peer_fwd) = (header.buf_alloc.get(), header.fwd_cnt.get());
    }

    pub(super) fn credit(&self) -> usize {
        (self.peer_alloc - self.sent.wrapping_sub(self.peer_fwd)) as usize
    }
}

impl Guest {
    pub(super) fn new() -> Self {
        Self::with_state(false)
    }

    pub(super) fn with_state(restored: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("vsock");
        let device = Vsock::new(CID, &socket, None, restored).unwrap();
        let mut driver = Driver::new(Box::new(device));
        let rx_base = driver.alloc(256 * u64::from(RX_LEN));
        let tx_base = driver.alloc(TX_SLOTS * SLOT);
        Self {
            driver,
            socket,
            refill: false,
            rx_base,
            tx_base,
            tx_next: 0,
            rx_seen: 0,
            inbox: VecDeque::new(),
            _dir: dir,
        }
    }

    /// With receive buffers.
    pub(super) fn ready() -> Self {
        let mut guest = Self::new();
        guest.start_receiving();
        guest
    }

    pub(super) fn start_receiving(&mut self) {
        self.refill = true;
        for i in 0..RX_BUFFERS {
            self.offer_rx(self.rx_seen.wrapping_add(i));
        }
        self.driver.run(0).unwrap();
    }

    fn offer_rx(&mut self, slot: u16) {
        let addr = self.rx_base + u64::from(slot % 256) * u64::from(RX_LEN);
        self.driver.offer_parts(0, &[(addr, RX_LEN, true)]);
    }

    /// Path of the socket a program listens on for the guest.
    pub(super) fn service(&self, port: u32) -> PathBuf {
        let mut name = self.socket.clone().into_os_string();
        name.push(format!("_{port}"));
        Path::new(&name).to_owned()
    }

    /// Puts a packet into the transmit queue as `parts` buffers without a kick.
    pub(super) fn put(&mut self, header: &Header, data: &[u8]) {
        let at = self.tx_base + (self.tx_next % TX_SLOTS) * SLOT;
        self.tx_next += 1;
        let mem = self.driver.memory();
        mem.write_slice(header.as_bytes(), GuestAddress(at)).unwrap();
        mem.write_slice(data, GuestAddress(at + 64)).unwrap();
        let len = u32::try_from(data.len()).unwrap();
        let header_len = u32::try_from(HEADER_LEN).unwrap();
        if data.is_empty() {
            self.driver.offer_parts(1, &[(at, header_len, false)]);
        } else {
            // In two parts, as Linux does since 6.7.
            let first = len / 2;
            self.driver.offer_parts(
                1,
                &[(at, header_len, false), (at + 64, first, false), (at + 64 + u64::from(first), len - first, false)],
            );
        }
    }

    pub(super) fn send_raw(&mut self, header: &Header, data: &[u8]) {
        self.put(header, data);
        self.driver.run(1).unwrap();
    }

    pub(super) fn send(&mut self, sock: &mut Sock, op: Op, data: &[u8]) {
        let mut header = sock.header(op);
        let len = u32::try_from(data.len()).unwrap();
        header.len = U32::new(len);
        sock.sent = sock.sent.wrapping_add(len);
        self.send_raw(&header, data);
    }

    pub(super) fn shut_down(&mut self, sock: &Sock, flags: u32) {
        let mut header = sock.header(Op::Shutdown);
        header.flags = U32::new(flags);
        self.send_raw(&header, &[]);
    }

    /// Takes what came back from the receive queue; says whether anything did.
    fn collect(&mut self) -> bool {
        let new = self.driver.used_idx(0).wrapping_sub(self.rx_seen);
        let used = self.driver.used(0);
        for &(head, len) in &used[used.len() - usize::from(new)..] {
            let bytes = self.driver.read(0, head, 0);
            let (header, data) = Header::read_from_prefix(&bytes[..len as usize]).unwrap();
            assert_eq!(header.len.get() as usize, data.len());
            assert_eq!((header.src_cid.get(), header.dst_cid.get()), (2, u64::from(CID)));
            self.inbox.push_back((header, data.to_vec()));
            self.rx_seen = self.rx_seen.wrapping_add(1);
            if self.refill {
                self.offer_rx(self.rx_seen.wrapping_add(RX_BUFFERS - 1));
            }
        }
        if new > 0 && self.refill {
            self.driver.run(0).unwrap();
        }
        new > 0
    }

    /// Lets the device handle all that is ready.
    pub(super) fn pump(&mut self) {
        let mut idle = 0;
        while idle < 3 {
            for token in 0..3 {
                if self.driver.listens(token) {
                    self.driver.source(token).unwrap();
                }
            }
            idle = if self.collect() { 0 } else { idle + 1 };
        }
    }

    /// Waits until the device has something to do, and lets it.
    pub(super) fn wait(&mut self) {
        {
            let listens: Vec<bool> = (0..3).map(|t| self.driver.listens(t)).collect();
            let sources = self.driver.device().sources();
            let mut fds: Vec<PollFd<'_>> = sources
                .iter()
                .zip(listens)
                .filter(|(_, on)| *on)
                .map(|(fd, _)| PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN))
                .collect();
            let minute = Timespec { tv_sec: 60, tv_nsec: 0 };
            assert!(poll(&mut fds, Some(&minute)).unwrap() > 0, "nothing happened for a minute");
        }
        self.pump();
    }

    /// The next packet for the guest.
    pub(super) fn next(&mut self) -> (Op, Header, Vec<u8>) {
        if self.inbox.is_empty() {
            self.pump();
        }
        let (header, data) = self.inbox.pop_front().expect("no packet from the device");
        (Op::parse(header.op.get()).unwrap(), header, data)
    }

    /// Asserts that the device says nothing.
    pub(super) fn silence(&mut self) {
        self.pump();
        assert!(self.inbox.is_empty(), "{:?}", self.inbox);
    }

    /// Connects to a service of the host's.
    pub(super) fn connect(&mut self, host_port: u32, guest_port: u32) -> Sock {
        let mut sock = Sock::new(host_port, guest_port, 64 << 10);
        self.send(&mut sock, Op::Request, &[]);
        let (op, header, _) = self.next();
        assert_eq!((op, header.src_port.get(), header.dst_port.get()), (Op::Response, host_port, guest_port));
        sock.learn(&header);
        sock
    }
}
