//! The socket device itself: packets from and to the guest, events of the host's sockets.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::io::Errno;
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::Writer;
use vm_memory::{Bytes, GuestAddressSpace};
use zerocopy::byteorder::little_endian::{U32, U64};

use super::connection::{Connection, Handshake, Input, Key, State};
use super::packet::{self, HEADER_LEN, HOST_CID, Header, MAX_DATA, Op, Received, SHUTDOWN_BOTH, TYPE_STREAM};
use super::socket::{Listener, SocketError};
use super::table::{MAX_CONNECTIONS, Table};
use crate::device::{Active, Broken, ConfigSpace, Device, Memory, SavedState, Traits, VirtQueue};
use crate::worker::Ready;

const RX: u16 = 0;
const TX: u16 = 1;
const EVENT: u16 = 2;
const QUEUE_SIZES: [u16; 3] = [256, 256, 64];
/// VIRTIO_VSOCK_F_STREAM (virtio 1.3 section 5.10.3).
const F_STREAM: u32 = 0;
/// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET (section 5.10.6.7).
const EVENT_TRANSPORT_RESET: u32 = 0;

/// Tokens of [`Device::sources`].
const READERS: usize = 0;
const WRITERS: usize = 1;
const LISTENER: usize = 2;

/// RSTs for the guest that may wait for receive buffers. Beyond that its packets are left in the ring, which section
/// 5.10.6.1 asks for: a driver that neglects its receive queue gets no further. Linux keeps fewer replies itself.
const MAX_RESETS: usize = MAX_CONNECTIONS + 1;
/// Packets one connection gets in a row before the next has its turn.
const BURST: usize = 16;
/// Programs accepted at one time.
const ACCEPT_BURST: usize = 16;

/// Socket device.
pub struct Vsock {
    guest_cid: u64,
    listener: Listener,
    table: Table,
    /// The guest must be told that its connections are gone: it was restored from a snapshot.
    transport_reset: bool,
    /// The receive queue had no chain when one was needed.
    starved: bool,
    /// Packets were left in the transmit queue because too many RSTs wait.
    tx_stalled: bool,
    scratch: Vec<u8>,
    ready: Vec<Ready>,
}

/// Why a socket device could not be made.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// The listening socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// A set of file descriptors to wait for.
    #[error("cannot wait for connections: {0}")]
    Events(std::io::Error),
}

impl Vsock {
    /// A device for the guest `guest_cid` that listens for the host's programs at `socket`. `restored`: the guest comes
    /// from a snapshot and may believe in connections that do not exist.
    ///
    /// # Errors
    /// If it cannot listen there.
    pub fn new(guest_cid: u32, socket: &Path, listener: Option<OwnedFd>, restored: bool) -> Result<Self, VsockError> {
        let listener = match listener {
            Some(listener) => Listener::inherited(listener, socket)?,
            None => Listener::bind(socket)?,
        };
        let guest_cid = u64::from(guest_cid);
        Ok(Self {
            guest_cid,
            listener,
            table: Table::new(guest_cid).map_err(VsockError::Events)?,
            transport_reset: restored,
            starved: false,
            tx_stalled: false,
            scratch: vec![0; MAX_DATA],
            ready: Vec::new(),
        })
    }

    /// Packets from the guest.
    fn transmit(&mut self, active: &mut Active) -> Result<(), Broken> {
        let mem = active.mem.memory();
        let queue = active.queue(TX)?;
        let mut scratch = std::mem::take(&mut self.scratch);
        let result = self.transmit_all(queue, &mem, &mut scratch);
        self.scratch = scratch;
        result?;
        queue.notify()
    }

    fn transmit_all(&mut self, queue: &mut VirtQueue, mem: &Memory, scratch: &mut [u8]) -> Result<(), Broken> {
        loop {
            self.tx_stalled = self.table.resets() >= MAX_RESETS;
            if self.tx_stalled {
                return Ok(());
            }
            let Some(chain) = queue.pop()? else { return Ok(()) };
            let head = chain.head_index();
            match packet::read(chain, mem, scratch) {
                Received::Packet(header, data) => self.packet(&header, data),
                Received::BadLength(header) => self.refuse(&header),
                Received::Garbage => log::debug!("vsock: the guest sent something without a header"),
            }
            queue.push(head, 0)?;
        }
    }

    /// Who a packet is from and for, and whether it makes sense.
    fn packet(&mut self, header: &Header, data: &[u8]) {
        if header.src_cid.get() != self.guest_cid {
            log::debug!("vsock: the guest sent a packet as {}", header.src_cid);
            return;
        }
        let (op, stream) = (Op::parse(header.op.get()), header.kind.get() == TYPE_STREAM);
        let (Some(op), true, HOST_CID) = (op, stream, header.dst_cid.get()) else {
            self.refuse(header);
            return;
        };
        let key = Key { host_port: header.dst_port.get(), guest_port: header.src_port.get() };
        match (self.table.find(key), op) {
            (Some(id), _) => self.known(id, header, op, data),
            (None, Op::Request) => self.connect(key, header),
            (None, _) => self.refuse(header),
        }
    }

    /// Answers with RST, and drops the connection if there is one.
    fn refuse(&mut self, header: &Header) {
        let ours = header.src_cid.get() == self.guest_cid;
        let stream = header.dst_cid.get() == HOST_CID && header.kind.get() == TYPE_STREAM;
        let key = Key { host_port: header.dst_port.get(), guest_port: header.src_port.get() };
        if ours
            && stream
            && let Some(id) = self.table.find(key)
        {
            self.table.reset(id);
        } else if ours && header.op.get() != Op::Rst.raw() {
            self.table.reply_reset(header.reset_reply());
        }
    }

    fn connect(&mut self, key: Key, header: &Header) {
        if self.table.is_full() {
            log::warn!("vsock: {MAX_CONNECTIONS} connections are open, one more is refused");
            self.refuse(header);
            return;
        }
        match self.listener.connect(key.host_port) {
            Ok(socket) => self.table.add(Connection::from_guest(socket, key, header)),
            Err(e) => {
                log::debug!("vsock: nobody accepts the guest's connection to port {}: {e}", key.host_port);
                self.refuse(header);
            }
        }
    }

    /// A packet of a connection.
    fn known(&mut self, id: u64, header: &Header, op: Op, data: &[u8]) {
        let Some(connection) = self.table.get_mut(id) else { return };
        connection.learn(header);
        let good = match op {
            Op::Request => false,
            Op::Response => connection.state == State::Requested && connection.accepted(),
            Op::Rst => {
                self.table.detach(id);
                return;
            }
            Op::Shutdown if connection.state == State::Open => {
                if connection.guest_shut_down(header.flags.get() & SHUTDOWN_BOTH) {
                    // The end of it as the guest sees it; the host program may still have to read.
                    self.table.detach(id);
                    self.table.reply_reset(header.reset_reply());
                    return;
                }
                true
            }
            Op::Shutdown => false,
            Op::Rw => connection.data_from_guest(data),
            Op::CreditUpdate => true,
            Op::CreditRequest => {
                connection.credit_requested();
                true
            }
        };
        if good {
            self.table.settle(id);
        } else {
            log::debug!("vsock: connection to port {} ends: {op:?} out of place", header.dst_port);
            self.table.reset(id);
        }
    }

    /// Sends the control packets that wait, as far as there are receive chains.
    fn pump(&mut self, active: &mut Active) -> Result<(), Broken> {
        let mem = active.mem.memory();
        let queue = active.queue(RX)?;
        let mut used = false;
        while self.table.has_packet() {
            let Some((head, writer)) = receive_chain(queue, &mem)? else {
                self.starved = true;
                break;
            };
            // Nothing after all (the connection went meanwhile): an empty chain is harmless, and rare.
            let len = self.table.next_packet().map_or(0, |header| packet::write(writer, &header, &[]));
            queue.push(head, len)?;
            used = true;
        }
        if used { queue.notify() } else { Ok(()) }
    }

    /// Input of host programs.
    fn read_hosts(&mut self, active: &mut Active) -> Result<(), Broken> {
        let mut ready = std::mem::take(&mut self.ready);
        let mut scratch = std::mem::take(&mut self.scratch);
        let result = self.read_ready(active, &mut ready, &mut scratch);
        self.ready = ready;
        self.scratch = scratch;
        result
    }

    fn read_ready(&mut self, active: &mut Active, ready: &mut Vec<Ready>, scratch: &mut [u8]) -> Result<(), Broken> {
        wait(&self.table.readers, ready)?;
        let mem = active.mem.memory();
        let queue = active.queue(RX)?;
        for event in ready {
            if self.starved {
                break;
            }
            let Some(connection) = self.table.get_mut(event.token) else { continue };
            if matches!(connection.state, State::Handshake(_)) {
                self.handshake(event.token);
            } else {
                self.read_host(queue, &mem, *event, scratch)?;
            }
            self.table.settle(event.token);
        }
        queue.notify()
    }

    fn handshake(&mut self, id: u64) {
        let Some(connection) = self.table.get_mut(id) else { return };
        match connection.handshake() {
            Handshake::Incomplete => {}
            Handshake::Port(port) => self.table.request(id, port),
            Handshake::Refused => {
                log::debug!("vsock: a program connected and did not say CONNECT and a port");
                self.table.remove(id);
            }
        }
    }

    fn read_host(
        &mut self,
        queue: &mut VirtQueue,
        mem: &Memory,
        event: Ready,
        scratch: &mut [u8],
    ) -> Result<(), Broken> {
        for _ in 0..BURST {
            let Some(connection) = self.table.get_mut(event.token).filter(|c| c.wants_input()) else { return Ok(()) };
            let Some(chain) = queue.pop()? else {
                self.starved = true;
                return Ok(());
            };
            let head = chain.head_index();
            let credit = usize::try_from(connection.credit()).unwrap_or(usize::MAX);
            let room = packet::writer(chain.clone(), mem)
                .map(|writer| (writer.available_bytes().saturating_sub(HEADER_LEN).min(credit), writer));
            let Some((room, writer)) = room.filter(|(room, _)| *room > 0) else {
                // No room for data: the driver gets it back unused.
                queue.push(head, 0)?;
                continue;
            };
            let room = room.min(scratch.len());
            let Some(buffer) = scratch.get_mut(..room) else { return Ok(()) };
            let n = match connection.receive(buffer, event.hangup) {
                Input::Data(n) => n,
                Input::Nothing => {
                    queue.undo_pop(&chain);
                    return Ok(());
                }
                Input::End { gone } => {
                    queue.undo_pop(&chain);
                    connection.host_stopped_sending(gone);
                    return Ok(());
                }
            };
            let header = self.table.data_header(event.token, n).unwrap_or_default();
            queue.push(head, packet::write(writer, &header, buffer.get(..n).unwrap_or_default()))?;
            if n < room {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Host programs that have room again, or are gone.
    fn write_hosts(&mut self) -> Result<(), Broken> {
        let mut ready = std::mem::take(&mut self.ready);
        let result = wait(&self.table.writers, &mut ready);
        for event in &ready {
            let Some(connection) = self.table.get_mut(event.token) else { continue };
            if connection.state == State::Requested {
                // Gone before the guest answered.
                self.table.reset(event.token);
                continue;
            }
            connection.flush();
            if event.hangup {
                connection.host_stopped_reading();
            }
            self.table.settle(event.token);
        }
        self.ready = ready;
        result
    }

    /// Programs that connect. Says whether to go on listening now.
    fn accept(&mut self) -> bool {
        for _ in 0..ACCEPT_BURST {
            match self.listener.accept() {
                Ok(socket) if self.table.is_full() => {
                    log::warn!("vsock: {MAX_CONNECTIONS} connections are open, one more is refused");
                    drop(socket);
                }
                Ok(socket) => self.table.add_handshake(socket),
                Err(Errno::AGAIN) => return true,
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(e) => {
                    log::warn!("vsock: cannot accept a connection: {e}");
                    return false;
                }
            }
        }
        true
    }

    /// Tells a restored guest that its connections are gone.
    fn send_event(&mut self, active: &mut Active) -> Result<(), Broken> {
        if !self.transport_reset {
            return Ok(());
        }
        let mem = active.mem.memory();
        let queue = active.queue(EVENT)?;
        while let Some(chain) = queue.pop()? {
            let head = chain.head_index();
            let event = U32::new(EVENT_TRANSPORT_RESET).to_bytes();
            let buffer = chain.writable().next().filter(|d| d.len() >= 4);
            let sent = buffer.is_some_and(|d| mem.write_slice(&event, d.addr()).is_ok());
            queue.push(head, if sent { 4 } else { 0 })?;
            if sent {
                self.transport_reset = false;
                break;
            }
        }
        queue.notify()
    }

    /// After every call: packets out, packets in that had to wait, and what is watched.
    fn finish(&mut self, active: &mut Active) -> Result<(), Broken> {
        if !self.starved {
            self.pump(active)?;
        }
        if self.tx_stalled && self.table.resets() < MAX_RESETS / 2 {
            self.transmit(active)?;
            self.pump(active)?;
        }
        active.listen(READERS, !self.starved);
        Ok(())
    }
}

impl Device for Vsock {
    fn traits(&self) -> Traits {
        Traits {
            device_type: VIRTIO_ID_VSOCK,
            features: (1 << F_STREAM) | (1 << VIRTIO_RING_F_EVENT_IDX),
            queue_sizes: QUEUE_SIZES.to_vec(),
            config: ConfigSpace::read_only(U64::new(self.guest_cid).to_bytes().to_vec()),
            shared_memory: None,
        }
    }

    fn start(&mut self, active: &mut Active) -> Result<(), Broken> {
        self.starved = false;
        for token in [READERS, WRITERS, LISTENER] {
            active.listen(token, true);
        }
        Ok(())
    }

    fn queue(&mut self, active: &mut Active, index: u16) -> Result<(), Broken> {
        match index {
            RX => self.starved = false,
            TX => self.transmit(active)?,
            EVENT => self.send_event(active)?,
            _ => {}
        }
        // A program that could not be accepted (no descriptor left) is tried again now and then.
        active.listen(LISTENER, true);
        self.finish(active)
    }

    fn sources(&self) -> Vec<BorrowedFd<'_>> {
        vec![self.table.readers.as_fd(), self.table.writers.as_fd(), self.listener.as_fd()]
    }

    fn source(&mut self, active: &mut Active, token: usize) -> Result<(), Broken> {
        match token {
            READERS if !self.starved => self.read_hosts(active)?,
            WRITERS => self.write_hosts()?,
            LISTENER => {
                let go_on = self.accept();
                active.listen(LISTENER, go_on);
            }
            _ => {}
        }
        self.finish(active)
    }

    fn reset(&mut self) {
        self.table.clear();
        self.starved = false;
        self.tx_stalled = false;
        self.transport_reset = false;
    }

    fn save(&self) -> SavedState {
        // Connections end with the process; a restored guest is told so.
        SavedState::new(super::KIND.name, super::STATE_VERSION, &())
    }
}

/// The next receive chain that has room for a header.
fn receive_chain<'m>(queue: &mut VirtQueue, mem: &'m Memory) -> Result<Option<(u16, Writer<'m>)>, Broken> {
    while let Some(chain) = queue.pop()? {
        let head = chain.head_index();
        if let Some(writer) = packet::writer(chain, mem) {
            return Ok(Some((head, writer)));
        }
        queue.push(head, 0)?;
    }
    Ok(None)
}

fn wait(set: &crate::worker::EventSet, ready: &mut Vec<Ready>) -> Result<(), Broken> {
    set.wait(0, ready).map_err(|e| Broken::Device(format!("cannot wait for connections: {e}")))
}
