//! One client's connection on the server's side: bytes and descriptors in, requests out; responses in, bytes out.
//!
//! Nothing here blocks, and what a client can make us hold is bounded: one request, the responses it has not read up to
//! a limit, a few descriptors. A client that goes beyond is answered with the reason and hung up on.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendFlags, recvmsg, send};

use crate::http::{self, CONTINUE, Fault, Found, HttpRequest, MAX_FDS, Parser};
use crate::response::{Encoded, encode_fault};

/// Bytes read at once.
const CHUNK: usize = 16 << 10;
/// Reads in a turn, so that a busy client does not keep the others waiting.
const READS: usize = 4;
/// With this many bytes of answers unread, no further request of the client is looked at.
const MAX_BACKLOG: usize = 64 << 10;

/// One connection.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    parser: Parser,
    out: Vec<u8>,
    /// How much of `out` has been sent.
    sent: usize,
    /// The client sends no more; what it sent before is still answered.
    at_end: bool,
    /// No more requests are taken; the connection is over once the answers are sent.
    closing: bool,
    /// The connection is no longer of use.
    broken: bool,
    /// The parser may hold a request that was not looked at because of the backlog.
    stalled: bool,
}

impl Connection {
    /// Takes over a connected stream.
    ///
    /// # Errors
    /// The stream cannot be made non-blocking.
    pub fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self {
            stream,
            parser: Parser::default(),
            out: Vec::new(),
            sent: 0,
            at_end: false,
            closing: false,
            broken: false,
            stalled: false,
        })
    }

    /// Reads what there is, up to a limit. Then [`Connection::next_request`] is to be called until it has no more.
    pub fn readable(&mut self) {
        for _ in 0..READS {
            if !self.wants_read() || !self.receive() {
                break;
            }
        }
    }

    /// The next whole request, if there is one. It must be answered with [`Connection::respond`] before the next is
    /// asked for.
    pub fn next_request(&mut self) -> Option<HttpRequest> {
        while !self.closing && !self.broken {
            self.stalled = self.backlog() > MAX_BACKLOG && self.parser.len() > 0;
            if self.stalled {
                return None;
            }
            match self.parser.next() {
                Ok(Found::Request(request)) => {
                    self.closing = request.close;
                    return Some(request);
                }
                Ok(Found::WantsContinue) => self.out.extend_from_slice(CONTINUE),
                Ok(Found::Nothing) => return None,
                Err(fault) => self.fail(fault),
            }
        }
        None
    }

    /// Queues the answer to the request that was taken last.
    pub fn respond(&mut self, answer: &Encoded) {
        http::write_response(&mut self.out, answer, self.closing);
    }

    /// Sends what can be sent.
    pub fn writable(&mut self) {
        while let Some(rest) = self.out.get(self.sent..).filter(|rest| !rest.is_empty()) {
            match send(&self.stream, rest, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(count) => self.sent = self.sent.saturating_add(count),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                Err(_) => {
                    self.broken = true;
                    break;
                }
            }
        }
        // A large answer is not kept around by an idle connection.
        self.out = Vec::new();
        self.sent = 0;
    }

    /// Whether to wait for more from the client.
    pub fn wants_read(&self) -> bool {
        !self.at_end && !self.closing && !self.broken && !self.stalled
    }

    /// Whether to wait until the client takes more. Then [`Connection::writable`] is to be called, and after it
    /// [`Connection::next_request`].
    pub fn wants_write(&self) -> bool {
        !self.broken && (self.backlog() > 0 || self.stalled)
    }

    /// Whether the connection has ended and is to be dropped.
    pub fn is_over(&self) -> bool {
        self.broken || ((self.closing || self.at_end) && !self.wants_write())
    }

    fn backlog(&self) -> usize {
        self.out.len().saturating_sub(self.sent)
    }

    /// One read. False if there was nothing to read.
    fn receive(&mut self) -> bool {
        let mut bytes = [0; CHUNK];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let received = match recvmsg(&self.stream, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags) {
            Ok(received) => received,
            Err(Errno::INTR) => return true,
            Err(Errno::AGAIN) => return false,
            Err(_) => {
                self.broken = true;
                return false;
            }
        };
        let fds: Vec<OwnedFd> = control
            .drain()
            .filter_map(|message| match message {
                RecvAncillaryMessage::ScmRights(fds) => Some(fds),
                _ => None,
            })
            .flatten()
            .collect();
        if received.flags.contains(ReturnFlags::CTRUNC) {
            self.fail(Fault::TooManyFds);
            return false;
        }
        match bytes.get(..received.bytes).filter(|bytes| !bytes.is_empty()) {
            // The client sends no more, but may be waiting for answers.
            None => {
                self.at_end = true;
                false
            }
            Some(bytes) => match self.parser.push(bytes, fds) {
                Ok(()) => true,
                Err(fault) => {
                    self.fail(fault);
                    false
                }
            },
        }
    }

    /// Answers with the reason, and takes nothing more.
    fn fail(&mut self, fault: Fault) {
        self.parser = Parser::default();
        self.stalled = false;
        self.closing = true;
        self.respond(&encode_fault(&fault));
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}
