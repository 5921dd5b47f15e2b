//! Ethernet frames on a Unix stream socket, each behind its length in 4 bytes, big-endian: what passt (`--socket`, `--fd`) and
//! QEMU's `-netdev stream` speak.
//!
//! The other side is not trusted to keep up or to make sense. A length that cannot be ends the connection, since nothing behind it
//! could be told apart.

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, Shutdown, SocketType, recv, send, shutdown, sockopt};

use super::MAX_FRAME;
use super::device::{Received, Sent};

/// Bytes of a length.
pub(super) const PREFIX: usize = 4;
/// What is read at once: the longest frame fits, and many short ones.
const BUFFER: usize = 2 * (PREFIX + MAX_FRAME);
/// How long the other side may take to finish a frame when the device ends.
const PATIENCE: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

/// A connection.
pub(super) struct Stream {
    fd: OwnedFd,
    /// Others may use the connection when this value is gone: it must not end within a frame.
    shared: bool,
    buffer: Box<[u8]>,
    /// What of the buffer was received and not consumed.
    filled: Range<usize>,
    /// The end of a frame that was sent in part.
    rest: Vec<u8>,
}

impl Stream {
    pub(super) fn connect(path: &Path) -> io::Result<Self> {
        Ok(Self::new(UnixStream::connect(path)?.into(), false))
    }

    /// Takes over a duplicate of a connection.
    pub(super) fn shared(fd: OwnedFd) -> io::Result<Self> {
        let wrong = || io::Error::other("it is no connected Unix stream socket");
        let is_stream = sockopt::socket_type(&fd)? == SocketType::STREAM;
        if !is_stream || sockopt::socket_domain(&fd)? != AddressFamily::UNIX || sockopt::socket_acceptconn(&fd)? {
            return Err(wrong());
        }
        Ok(Self::new(fd, true))
    }

    fn new(fd: OwnedFd, shared: bool) -> Self {
        Self { fd, shared, buffer: vec![0; BUFFER].into(), filled: 0..0, rest: Vec::new() }
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Where the next frame is that was received whole, or how long it is to be. Nothing if it makes no sense.
    fn first(&self) -> Option<Result<Range<usize>, usize>> {
        let Some(prefix) = self.buffer.get(self.filled.clone()).and_then(|bytes| bytes.first_chunk::<PREFIX>()) else {
            return Some(Err(PREFIX));
        };
        let len = usize::try_from(u32::from_be_bytes(*prefix)).ok().filter(|len| *len <= MAX_FRAME)?;
        let start = self.filled.start.saturating_add(PREFIX);
        let end = start.saturating_add(len);
        Some(if end <= self.filled.end { Ok(start..end) } else { Err(PREFIX.saturating_add(len)) })
    }

    /// The next frame. `may_read`: it may be looked for in the socket.
    pub(super) fn next(&mut self, may_read: bool) -> Received {
        loop {
            match self.first() {
                Some(Ok(frame)) => return Received::Frame(frame),
                Some(Err(_)) if !may_read => return Received::Nothing,
                Some(Err(_)) => {}
                None => {
                    log::warn!("net: the other side sent a frame of an impossible length");
                    return Received::Gone;
                }
            }
            match self.fill(BUFFER) {
                Ok(0) => return Received::Gone,
                Ok(_) => {}
                Err(Errno::AGAIN | Errno::INTR) => return Received::Nothing,
                Err(_) => return Received::Gone,
            }
        }
    }

    /// Reads at most `limit` bytes behind what is there.
    fn fill(&mut self, limit: usize) -> rustix::io::Result<usize> {
        let kept = self.filled.len();
        self.buffer.copy_within(self.filled.clone(), 0);
        self.filled = 0..kept;
        let room = self.buffer.get_mut(kept..).unwrap_or_default();
        let len = room.len().min(limit);
        // It is blocking or not as whoever made it wants it.
        let (n, _) = recv(&self.fd, room.get_mut(..len).unwrap_or_default(), RecvFlags::DONTWAIT)?;
        self.filled.end = kept.saturating_add(n).min(BUFFER);
        Ok(n)
    }

    pub(super) fn bytes(&self, frame: Range<usize>) -> &[u8] {
        self.buffer.get(frame).unwrap_or_default()
    }

    /// Goes on to what follows a frame of [`Stream::next`].
    pub(super) fn consume(&mut self, frame: &Range<usize>) {
        self.filled.start = frame.end.min(self.filled.end);
    }

    /// Sends a frame that has room for its length in front.
    pub(super) fn send(&mut self, frame: &mut [u8]) -> Sent {
        if !self.rest.is_empty() {
            return Sent::Later;
        }
        let len = u32::try_from(frame.len().saturating_sub(PREFIX)).unwrap_or(0);
        let Some(prefix) = frame.first_chunk_mut::<PREFIX>() else { return Sent::Done };
        *prefix = len.to_be_bytes();
        match send(&self.fd, frame, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(n) => {
                self.rest.extend_from_slice(frame.get(n..).unwrap_or_default());
                if self.rest.is_empty() { Sent::Done } else { Sent::InPart }
            }
            Err(Errno::AGAIN | Errno::INTR) => Sent::Later,
            Err(_) => Sent::Gone,
        }
    }

    /// Sends what is left of a frame.
    pub(super) fn flush(&mut self) -> Sent {
        if self.rest.is_empty() {
            return Sent::Done;
        }
        match send(&self.fd, &self.rest, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(n) => {
                self.rest.drain(..n.min(self.rest.len()));
                if self.rest.is_empty() { Sent::Done } else { Sent::InPart }
            }
            Err(Errno::AGAIN | Errno::INTR) => Sent::InPart,
            Err(_) => Sent::Gone,
        }
    }

    /// Ends the connection; the descriptor stays, since it is watched.
    pub(super) fn end(&mut self) {
        let _ = shutdown(&self.fd, Shutdown::Both);
        self.rest.clear();
        self.filled = 0..0;
    }

    /// Brings frames that are under way in both directions to their end. What was received and not consumed is lost.
    fn finish(&mut self) -> bool {
        loop {
            let wanted = match self.first() {
                Some(Ok(frame)) => {
                    self.consume(&frame);
                    continue;
                }
                Some(Err(_)) if self.filled.is_empty() => 0,
                Some(Err(whole)) => whole.saturating_sub(self.filled.len()),
                None => return false,
            };
            if wanted == 0 && self.rest.is_empty() {
                return true;
            }
            let direction = if wanted > 0 { PollFlags::IN } else { PollFlags::OUT };
            if !matches!(poll(&mut [PollFd::new(&self.fd, direction)], Some(&PATIENCE)), Ok(1)) {
                return false;
            }
            let ended = if wanted > 0 { !matches!(self.fill(wanted), Ok(1..)) } else { self.flush() == Sent::Gone };
            if ended {
                return false;
            }
        }
    }
}

impl Drop for Stream {
    /// The machine may boot again, with the same connection.
    fn drop(&mut self) {
        if self.shared && !self.finish() {
            self.end();
        }
    }
}
