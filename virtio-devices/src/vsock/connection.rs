//! One connection: a non-blocking Unix socket on the host's side, flow control on the guest's (virtio 1.3 section
//! 5.10.6.3).
//!
//! A connection knows nothing of queues or of other connections. It answers what it waits for ([`Connection::watch`],
//! [`Connection::wants_input`]) and which control packet it has for the guest ([`Connection::next_packet`]).

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown};

use super::packet::{Header, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use crate::worker::Interest;

/// Bytes a connection holds for a host program that does not read: what the guest is told it may send ahead.
pub(super) const BUF_ALLOC: u32 = 128 << 10;
/// After so many bytes taken by the host program the guest is told at the latest.
const UPDATE_AFTER: u32 = BUF_ALLOC / 4;
/// The longest line a host program may open with (`CONNECT 4294967295\n` is 19 bytes).
const MAX_LINE: usize = 32;

/// Which connection, as both sides number it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Key {
    pub host_port: u32,
    pub guest_port: u32,
}

/// How far a connection is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum State {
    /// A host program connected and has not said to which port; the line so far.
    Handshake(Vec<u8>),
    /// The guest was asked.
    Requested,
    /// Both sides agreed.
    Open,
    /// The guest is finished with it; the host program has yet to take the last bytes.
    Draining,
}

/// What reading a handshake line came to.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Handshake {
    /// The line is not complete.
    Incomplete,
    /// `CONNECT` to this port of the guest.
    Port(u32),
    /// The program is gone or speaks something else.
    Refused,
}

/// What reading from the host program came to.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Input {
    /// So many bytes.
    Data(usize),
    /// Nothing now.
    Nothing,
    /// No more, ever.
    End {
        /// The program is gone; it did not merely stop sending.
        gone: bool,
    },
}

/// Control packets the guest has yet to be sent, at most one of each.
#[derive(Debug, Default)]
#[expect(clippy::struct_excessive_bools, reason = "one flag for each packet that may be due")]
struct Due {
    request: bool,
    response: bool,
    credit_update: bool,
    credit_request: bool,
    shutdown: bool,
}

/// A connection.
#[derive(Debug)]
pub(super) struct Connection {
    socket: OwnedFd,
    pub key: Key,
    pub state: State,
    /// In the set of sockets that are watched for input.
    pub reading: bool,
    /// How it is in the set of sockets that are watched for room and hang-up.
    pub watched: Option<Interest>,
    /// In the list of connections with a packet for the guest.
    pub queued: bool,
    due: Due,
    /// From the guest, for the host program.
    to_host: VecDeque<u8>,
    /// Bytes the host program took or never will; and what of it the guest was told.
    fwd_cnt: u32,
    told: u32,
    /// Bytes sent to the guest, and its latest word on its buffer.
    sent: u32,
    peer_buf_alloc: u32,
    peer_fwd_cnt: u32,
    credit_asked: bool,
    /// SHUTDOWN flags of the guest's.
    guest_ended: u32,
    /// SHUTDOWN flags on the host program's behalf.
    host_ended: u32,
}

impl Connection {
    fn new(socket: OwnedFd, key: Key, state: State) -> Self {
        Self {
            socket,
            key,
            state,
            reading: false,
            watched: None,
            queued: false,
            due: Due::default(),
            to_host: VecDeque::new(),
            fwd_cnt: 0,
            told: 0,
            sent: 0,
            peer_buf_alloc: 0,
            peer_fwd_cnt: 0,
            credit_asked: false,
            guest_ended: 0,
            host_ended: 0,
        }
    }

    /// A host program that connected to the listening socket.
    pub(super) fn from_host(socket: OwnedFd) -> Self {
        Self::new(socket, Key { host_port: 0, guest_port: 0 }, State::Handshake(Vec::new()))
    }

    /// A connection the guest asked for, accepted by the program at the other end of `socket`.
    pub(super) fn from_guest(socket: OwnedFd, key: Key, request: &Header) -> Self {
        let mut new = Self::new(socket, key, State::Open);
        new.due.response = true;
        new.learn(request);
        new
    }

    /// Reads the line a host program opens with, and nothing beyond it.
    pub(super) fn handshake(&mut self) -> Handshake {
        let State::Handshake(line) = &mut self.state else { return Handshake::Refused };
        let mut peeked = [0; MAX_LINE];
        let room = MAX_LINE.saturating_sub(line.len());
        let Some(part) = peeked.get_mut(..room) else { return Handshake::Refused };
        let seen = match recv(&self.socket, part, RecvFlags::PEEK | RecvFlags::DONTWAIT) {
            Ok((n, _)) if n > 0 => n,
            Err(Errno::AGAIN | Errno::INTR) => return Handshake::Incomplete,
            _ => return Handshake::Refused,
        };
        let seen = peeked.get(..seen).unwrap_or_default();
        let end = seen.iter().position(|b| *b == b'\n');
        let take = end.map_or(seen.len(), |at| at.saturating_add(1));
        line.extend_from_slice(seen.get(..take).unwrap_or_default());
        let Some(part) = peeked.get_mut(..take) else { return Handshake::Refused };
        if recv(&self.socket, part, RecvFlags::DONTWAIT).is_err() {
            return Handshake::Refused;
        }
        if end.is_none() {
            return if line.len() < MAX_LINE { Handshake::Incomplete } else { Handshake::Refused };
        }
        parse_line(line).map_or(Handshake::Refused, Handshake::Port)
    }

    /// The line was understood: ask the guest.
    pub(super) fn request(&mut self, key: Key) {
        self.key = key;
        self.state = State::Requested;
        self.due.request = true;
    }

    /// The guest accepted; tells the host program. `false` if that is gone.
    pub(super) fn accepted(&mut self) -> bool {
        let line = format!("OK {}\n", self.key.host_port);
        self.state = State::Open;
        // Nothing was sent on this socket before, so the line fits into its buffer.
        matches!(self.send(line.as_bytes()), Ok(n) if n == line.len())
    }

    fn send(&self, data: &[u8]) -> Result<usize, Errno> {
        match send(&self.socket, data, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Err(Errno::AGAIN | Errno::INTR) => Ok(0),
            other => other,
        }
    }

    /// Takes the guest's word on its buffer, which every packet carries.
    pub(super) fn learn(&mut self, header: &Header) {
        self.peer_buf_alloc = header.buf_alloc.get();
        self.peer_fwd_cnt = header.fwd_cnt.get();
        if self.credit() > 0 {
            self.credit_asked = false;
        }
    }

    /// Bytes the guest has room for.
    pub(super) fn credit(&self) -> u32 {
        self.peer_buf_alloc.saturating_sub(self.sent.wrapping_sub(self.peer_fwd_cnt))
    }

    /// The guest wants to know its credit.
    pub(super) fn credit_requested(&mut self) {
        self.due.credit_update = true;
    }

    /// Data from the guest. `false` if it may not send any, or not as much.
    pub(super) fn data_from_guest(&mut self, data: &[u8]) -> bool {
        let room = usize::try_from(BUF_ALLOC).unwrap_or(0).saturating_sub(self.to_host.len());
        if self.state != State::Open || self.guest_ended & SHUTDOWN_SEND != 0 || data.len() > room {
            return false;
        }
        let mut sent = 0;
        if self.host_ended & SHUTDOWN_RECEIVE != 0 {
            // Still on its way when the guest was told that nobody reads any more.
            sent = data.len();
        } else if self.to_host.is_empty() {
            match self.send(data) {
                Ok(n) => sent = n,
                Err(_) => {
                    self.host_stopped_reading();
                    sent = data.len();
                }
            }
        }
        self.forwarded(sent);
        self.to_host.extend(data.get(sent..).unwrap_or_default());
        true
    }

    fn forwarded(&mut self, n: usize) {
        self.fwd_cnt = self.fwd_cnt.wrapping_add(u32::try_from(n).unwrap_or(0));
        if self.fwd_cnt.wrapping_sub(self.told) >= UPDATE_AFTER {
            self.due.credit_update = true;
        }
    }

    /// Gives the host program what it has room for.
    pub(super) fn flush(&mut self) {
        while !self.to_host.is_empty() {
            let (first, _) = self.to_host.as_slices();
            let (len, result) = (first.len(), self.send(first));
            let Ok(n) = result else {
                self.host_stopped_reading();
                return;
            };
            self.to_host.drain(..n);
            self.forwarded(n);
            if n < len {
                return;
            }
        }
        self.to_host = VecDeque::new();
        if self.guest_ended & SHUTDOWN_SEND != 0 && self.host_ended & SHUTDOWN_RECEIVE == 0 {
            let _ = shutdown(&self.socket, Shutdown::Write);
        }
    }

    /// The host program takes no more: what it did not take is lost, and the guest is told.
    pub(super) fn host_stopped_reading(&mut self) {
        let lost = self.to_host.len();
        self.to_host = VecDeque::new();
        self.forwarded(lost);
        self.host_ends(SHUTDOWN_RECEIVE);
    }

    fn host_ends(&mut self, flags: u32) {
        if self.host_ended | flags != self.host_ended {
            self.host_ended |= flags;
            self.due.shutdown = true;
        }
    }

    /// Reads from the host program; `hangup` as the event said.
    pub(super) fn receive(&mut self, buffer: &mut [u8], hangup: bool) -> Input {
        match recv(&self.socket, buffer, RecvFlags::DONTWAIT) {
            Ok((n, _)) if n > 0 => Input::Data(n),
            Err(Errno::AGAIN | Errno::INTR) => Input::Nothing,
            Ok(_) => Input::End { gone: hangup },
            Err(_) => Input::End { gone: true },
        }
    }

    /// The host program sends no more.
    pub(super) fn host_stopped_sending(&mut self, gone: bool) {
        self.host_ends(SHUTDOWN_SEND);
        if gone {
            self.host_stopped_reading();
        }
    }

    /// So many bytes went to the guest.
    pub(super) fn sent(&mut self, n: usize) {
        self.sent = self.sent.wrapping_add(u32::try_from(n).unwrap_or(0));
        if self.credit() == 0 && !self.credit_asked {
            self.credit_asked = true;
            self.due.credit_request = true;
        }
    }

    /// The guest's SHUTDOWN. Says whether it is finished both ways.
    pub(super) fn guest_shut_down(&mut self, flags: u32) -> bool {
        let new = flags & SHUTDOWN_BOTH & !self.guest_ended;
        self.guest_ended |= new;
        if self.guest_ended == SHUTDOWN_BOTH {
            return true;
        }
        if new & SHUTDOWN_RECEIVE != 0 {
            let _ = shutdown(&self.socket, Shutdown::Read);
        }
        if new & SHUTDOWN_SEND != 0 {
            self.flush();
        }
        false
    }

    /// The guest is finished: whether something is left for the host program.
    pub(super) fn drain(&mut self) -> bool {
        self.state = State::Draining;
        self.guest_ended = SHUTDOWN_BOTH;
        self.due = Due::default();
        self.flush();
        !self.to_host.is_empty()
    }

    /// Nothing is left to do.
    pub(super) fn finished(&self) -> bool {
        self.state == State::Draining && self.to_host.is_empty()
    }

    /// Whether input of the host program is of use now.
    pub(super) fn wants_input(&self) -> bool {
        match self.state {
            State::Handshake(_) => true,
            State::Requested | State::Draining => false,
            State::Open => {
                self.host_ended & SHUTDOWN_SEND == 0 && self.guest_ended & SHUTDOWN_RECEIVE == 0 && self.credit() > 0
            }
        }
    }

    /// Whether to watch for room in the socket, or (no interest, which leaves hang-ups) for the end of the program.
    pub(super) fn watch(&self) -> Option<Interest> {
        if self.host_ended & SHUTDOWN_RECEIVE != 0 || matches!(self.state, State::Handshake(_)) {
            return None;
        }
        let write = !self.to_host.is_empty();
        (write || !self.wants_input()).then_some(Interest { read: false, write })
    }

    /// Whether the guest has yet to be told something.
    pub(super) fn has_packet(&self) -> bool {
        let Due { request, response, credit_update, credit_request, shutdown } = self.due;
        request || response || credit_update || credit_request || shutdown
    }

    /// The next control packet for the guest, with its flags.
    pub(super) fn next_packet(&mut self) -> Option<(Op, u32)> {
        let due = &mut self.due;
        let take = std::mem::take::<bool>;
        if take(&mut due.request) {
            Some((Op::Request, 0))
        } else if take(&mut due.response) {
            Some((Op::Response, 0))
        } else if take(&mut due.credit_update) {
            Some((Op::CreditUpdate, 0))
        } else if take(&mut due.credit_request) {
            Some((Op::CreditRequest, 0))
        } else if take(&mut due.shutdown) {
            Some((Op::Shutdown, self.host_ended))
        } else {
            None
        }
    }

    /// The count of bytes taken, for a packet that goes out now; the guest knows then.
    pub(super) fn tell_forwarded(&mut self) -> u32 {
        self.due.credit_update = false;
        self.told = self.fwd_cnt;
        self.fwd_cnt
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// The port of `CONNECT <port>\n`.
pub(super) fn parse_line(line: &[u8]) -> Option<u32> {
    let line = std::str::from_utf8(line).ok()?.strip_suffix('\n')?;
    let mut words = line.split_ascii_whitespace();
    let (word, port) = (words.next()?, words.next()?);
    let port = (words.next().is_none() && word.eq_ignore_ascii_case("CONNECT")).then_some(port)?;
    // `u32::from_str` allows a plus sign.
    port.bytes().all(|b| b.is_ascii_digit()).then(|| port.parse().ok())?
}
