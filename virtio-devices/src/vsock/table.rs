//! The connections: found by number (events) or by port pair (packets), each in the right set of watched sockets.
//!
//! [`Table::settle`] is called after anything happened to a connection and makes the table agree with it. There are two
//! sets of sockets because they stop at different times: nothing is read while the guest offers no receive buffers, and
//! what the guest sent is written all the same.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use zerocopy::byteorder::little_endian::{U16, U32, U64};

use super::connection::{BUF_ALLOC, Connection, Key, State};
use super::packet::{HOST_CID, Header, Op, TYPE_STREAM};
use crate::worker::{EventSet, Interest};

/// The most connections at one time, those included that are not agreed yet.
pub(super) const MAX_CONNECTIONS: usize = 1023;
/// The most host programs that connected and have not said to which port; the oldest goes when there are more.
pub(super) const MAX_HANDSHAKES: usize = 64;
/// Host ports of connections that host programs open begin here, out of the way of service ports.
const FIRST_PORT: u32 = 1 << 30;
const LAST_PORT: u32 = (1 << 31) - 1;

/// All connections of one device.
#[derive(Debug)]
pub(super) struct Table {
    guest_cid: u64,
    by_id: BTreeMap<u64, Connection>,
    by_key: BTreeMap<Key, u64>,
    handshakes: BTreeSet<u64>,
    /// Connections with a control packet for the guest, first come first served.
    pending: VecDeque<u64>,
    /// RSTs of what is no connection any more, or never was.
    resets: VecDeque<Header>,
    next_id: u64,
    next_port: u32,
    /// Sockets whose input is of use.
    pub readers: EventSet,
    /// Sockets that were full, and those whose end would not be noticed otherwise.
    pub writers: EventSet,
}

impl Table {
    /// An empty table for the guest with this context identifier.
    pub(super) fn new(guest_cid: u64) -> io::Result<Self> {
        Ok(Self {
            guest_cid,
            by_id: BTreeMap::new(),
            by_key: BTreeMap::new(),
            handshakes: BTreeSet::new(),
            pending: VecDeque::new(),
            resets: VecDeque::new(),
            next_id: 0,
            next_port: FIRST_PORT,
            readers: EventSet::new()?,
            writers: EventSet::new()?,
        })
    }

    /// Forgets everything.
    pub(super) fn clear(&mut self) {
        let ids: Vec<u64> = self.by_id.keys().copied().collect();
        for id in ids {
            self.remove(id);
        }
        self.pending.clear();
        self.resets.clear();
    }

    /// Whether there is no room for another connection.
    pub(super) fn is_full(&self) -> bool {
        self.by_id.len() >= MAX_CONNECTIONS
    }

    /// How many RSTs wait for the guest.
    pub(super) fn resets(&self) -> usize {
        self.resets.len()
    }

    pub(super) fn get_mut(&mut self, id: u64) -> Option<&mut Connection> {
        self.by_id.get_mut(&id)
    }

    pub(super) fn find(&self, key: Key) -> Option<u64> {
        self.by_key.get(&key).copied()
    }

    /// Adds a connection the guest asked for.
    pub(super) fn add(&mut self, connection: Connection) {
        self.by_key.insert(connection.key, self.next_id);
        self.insert(connection);
    }

    /// Adds a host program that has yet to say what it wants.
    pub(super) fn add_handshake(&mut self, socket: OwnedFd) {
        if self.handshakes.len() >= MAX_HANDSHAKES
            && let Some(oldest) = self.handshakes.first().copied()
        {
            self.remove(oldest);
        }
        self.handshakes.insert(self.next_id);
        self.insert(Connection::from_host(socket));
    }

    fn insert(&mut self, connection: Connection) {
        let id = self.next_id;
        self.next_id = self.next_id.wrapping_add(1);
        self.by_id.insert(id, connection);
        self.settle(id);
    }

    /// A host program asked for a port of the guest's.
    pub(super) fn request(&mut self, id: u64, guest_port: u32) {
        self.handshakes.remove(&id);
        // There are far more ports than connections.
        let key = loop {
            let key = Key { host_port: self.next_port, guest_port };
            self.next_port = if self.next_port >= LAST_PORT { FIRST_PORT } else { self.next_port.saturating_add(1) };
            if !self.by_key.contains_key(&key) {
                break key;
            }
        };
        if let Some(connection) = self.by_id.get_mut(&id) {
            connection.request(key);
            self.by_key.insert(key, id);
        }
    }

    /// Makes the sets and the list agree with the connection; drops it if it is finished.
    pub(super) fn settle(&mut self, id: u64) {
        let Some(connection) = self.by_id.get_mut(&id) else { return };
        if connection.finished() {
            self.remove(id);
            return;
        }
        if connection.has_packet() && !connection.queued {
            connection.queued = true;
            self.pending.push_back(id);
        }
        if let Err(e) = watch(&self.readers, &self.writers, connection, id) {
            log::warn!("a vsock connection cannot be watched and is closed: {e}");
            self.reset(id);
        }
    }

    /// Drops a connection; the host program sees its end.
    pub(super) fn remove(&mut self, id: u64) {
        self.handshakes.remove(&id);
        let Some(connection) = self.by_id.remove(&id) else { return };
        if connection.reading {
            let _ = self.readers.remove(connection.as_fd());
        }
        if connection.watched.is_some() {
            let _ = self.writers.remove(connection.as_fd());
        }
        self.forget_key(connection.key, id);
    }

    fn forget_key(&mut self, key: Key, id: u64) {
        if self.by_key.get(&key) == Some(&id) {
            self.by_key.remove(&key);
        }
    }

    /// Drops a connection and tells the guest.
    pub(super) fn reset(&mut self, id: u64) {
        if let Some(connection) = self.by_id.get(&id)
            && matches!(connection.state, State::Requested | State::Open)
        {
            let header = header(self.guest_cid, connection.key, Op::Rst);
            self.resets.push_back(header);
        }
        self.remove(id);
    }

    /// Sends an RST that concerns no connection.
    pub(super) fn reply_reset(&mut self, header: Header) {
        self.resets.push_back(header);
    }

    /// The guest is finished with a connection: the host program still gets what was sent to it.
    pub(super) fn detach(&mut self, id: u64) {
        let Some(connection) = self.by_id.get_mut(&id) else { return };
        let key = connection.key;
        connection.drain();
        self.forget_key(key, id);
        self.settle(id);
    }

    /// The next control packet for the guest.
    pub(super) fn next_packet(&mut self) -> Option<Header> {
        if let Some(reset) = self.resets.pop_front() {
            return Some(reset);
        }
        while let Some(id) = self.pending.pop_front() {
            let Some(connection) = self.by_id.get_mut(&id) else { continue };
            connection.queued = false;
            let Some((op, flags)) = connection.next_packet() else { continue };
            let mut header = header(self.guest_cid, connection.key, op);
            header.flags = U32::new(flags);
            header.fwd_cnt = U32::new(connection.tell_forwarded());
            self.settle(id);
            return Some(header);
        }
        None
    }

    /// Whether [`Table::next_packet`] may have one.
    pub(super) fn has_packet(&self) -> bool {
        !self.resets.is_empty() || !self.pending.is_empty()
    }

    /// The header of a data packet.
    pub(super) fn data_header(&mut self, id: u64, len: usize) -> Option<Header> {
        let cid = self.guest_cid;
        let connection = self.by_id.get_mut(&id)?;
        let mut header = header(cid, connection.key, Op::Rw);
        header.len = U32::new(u32::try_from(len).ok()?);
        header.fwd_cnt = U32::new(connection.tell_forwarded());
        connection.sent(len);
        Some(header)
    }
}

fn header(guest_cid: u64, key: Key, op: Op) -> Header {
    Header {
        src_cid: U64::new(HOST_CID),
        dst_cid: U64::new(guest_cid),
        src_port: U32::new(key.host_port),
        dst_port: U32::new(key.guest_port),
        kind: U16::new(TYPE_STREAM),
        op: U16::new(op.raw()),
        buf_alloc: U32::new(BUF_ALLOC),
        ..Header::default()
    }
}

fn watch(readers: &EventSet, writers: &EventSet, connection: &mut Connection, id: u64) -> io::Result<()> {
    let reading = connection.wants_input();
    if reading != connection.reading {
        if reading {
            readers.add(connection.as_fd(), Interest { read: true, write: false }, id)?;
        } else {
            readers.remove(connection.as_fd())?;
        }
        connection.reading = reading;
    }
    let watched = connection.watch();
    if watched != connection.watched {
        match (connection.watched, watched) {
            (None, Some(interest)) => writers.add(connection.as_fd(), interest, id)?,
            (Some(_), Some(interest)) => writers.modify(connection.as_fd(), interest, id)?,
            (_, None) => writers.remove(connection.as_fd())?,
        }
        connection.watched = watched;
    }
    Ok(())
}
