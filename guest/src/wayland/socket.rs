//! The application's end: its socket, with descriptors in and out, never blocking.

use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};

/// Descriptors in one packet, as many as libwayland takes.
const MAX_FDS: usize = 28;
/// Descriptors received and not yet claimed by a message.
const MAX_PENDING_FDS: usize = 64;
/// Bytes read at a time.
const READ_SIZE: usize = 16 << 10;
/// Bytes waiting for the application before the host is asked for no more.
const HIGH_WATER: usize = 256 << 10;

/// What a read brought.
#[derive(Debug, PartialEq, Eq)]
pub enum Read {
    /// Something, or nothing yet.
    Some,
    /// The application closed its end.
    End,
}

/// A connected application.
#[derive(Debug)]
pub struct AppSocket {
    stream: UnixStream,
    /// Bytes received; complete messages are taken from the front.
    pub input: Vec<u8>,
    /// Descriptors received, in order.
    pub fds: VecDeque<OwnedFd>,
    output: Vec<u8>,
    out_fds: VecDeque<OwnedFd>,
}

impl AppSocket {
    /// Takes over a connected stream.
    ///
    /// # Errors
    ///
    /// It cannot be made non-blocking.
    pub fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        let [input, output] = [Vec::new(), Vec::new()];
        Ok(Self { stream, input, fds: VecDeque::new(), output, out_fds: VecDeque::new() })
    }

    /// For polling.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    /// Receives what is there, up to a bound.
    ///
    /// # Errors
    ///
    /// The socket failed; `InvalidData` if descriptors were lost or too many are pending.
    pub fn receive(&mut self) -> io::Result<Read> {
        let mut bytes = [0; READ_SIZE];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        let message = match rustix::net::recvmsg(&self.stream, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags)
        {
            Ok(message) => message,
            Err(Errno::AGAIN | Errno::INTR) => return Ok(Read::Some),
            Err(Errno::CONNRESET) => return Ok(Read::End),
            Err(error) => return Err(error.into()),
        };
        for part in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = part {
                self.fds.extend(fds);
            }
        }
        if message.flags.contains(ReturnFlags::CTRUNC) || self.fds.len() > MAX_PENDING_FDS {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "too many descriptors at once"));
        }
        self.input.extend_from_slice(bytes.get(..message.bytes).unwrap_or_default());
        Ok(if message.bytes == 0 { Read::End } else { Read::Some })
    }

    /// Queues a message for the application.
    pub fn queue(&mut self, message: &[u8], fds: impl IntoIterator<Item = OwnedFd>) {
        self.output.extend_from_slice(message);
        self.out_fds.extend(fds);
    }

    /// Whether bytes wait to be sent.
    pub fn pending(&self) -> bool {
        !self.output.is_empty()
    }

    /// Whether the host must wait for a slow application.
    pub fn congested(&self) -> bool {
        self.output.len() > HIGH_WATER || self.out_fds.len() > MAX_PENDING_FDS
    }

    /// Sends as much of the queue as the socket takes.
    ///
    /// # Errors
    ///
    /// The socket failed (`BrokenPipe`: the application has gone).
    pub fn flush(&mut self) -> io::Result<()> {
        let mut sent = 0;
        while sent < self.output.len() {
            let rest = self.output.get(sent..).unwrap_or_default();
            let count = self.out_fds.len().min(MAX_FDS);
            // A descriptor must not arrive later than its message. If they do not all fit, the first packet carries a
            // single byte.
            let part = if self.out_fds.len() > count { rest.get(..1).unwrap_or(rest) } else { rest };
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            let fds: Vec<_> = self.out_fds.iter().take(count).map(AsFd::as_fd).collect();
            if !fds.is_empty() {
                control.push(SendAncillaryMessage::ScmRights(&fds));
            }
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            match rustix::net::sendmsg(&self.stream, &[IoSlice::new(part)], &mut control, flags) {
                Ok(done) => {
                    sent += done;
                    self.out_fds.drain(..count);
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(error) => {
                    self.output.drain(..sent);
                    return Err(error.into());
                }
            }
        }
        self.output.drain(..sent);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (AppSocket, AppSocket) {
        let (left, right) = UnixStream::pair().unwrap();
        (AppSocket::new(left).unwrap(), AppSocket::new(right).unwrap())
    }

    #[test]
    fn descriptors_never_arrive_after_their_bytes() {
        let (mut left, mut right) = pair();
        for at in 0..50u32 {
            let file = tempfile::tempfile().unwrap();
            left.queue(&at.to_ne_bytes(), [OwnedFd::from(file)]);
        }
        left.flush().unwrap();
        while right.input.len() < 200 {
            assert_eq!(right.receive().unwrap(), Read::Some);
            assert!(right.fds.len() >= right.input.len() / 4, "{} bytes, {} fds", right.input.len(), right.fds.len());
        }
        assert_eq!(right.fds.len(), 50);
    }

    #[test]
    fn a_full_socket_keeps_the_rest_for_later() {
        let (mut left, mut right) = pair();
        let data: Vec<u8> = (0..1_000_000u32).map(|at| at.to_le_bytes()[1]).collect();
        left.queue(&data, []);
        left.flush().unwrap();
        assert!(left.pending() && left.congested());
        while right.input.len() < data.len() {
            right.receive().unwrap();
            left.flush().unwrap();
        }
        assert!(right.input == data && !left.pending());
        drop(left);
        assert_eq!(right.receive().unwrap(), Read::End);
    }

    #[test]
    fn hoarded_descriptors_are_an_error() {
        let (mut left, mut right) = pair();
        for _ in 0..MAX_PENDING_FDS + 1 {
            left.queue(&[0], [OwnedFd::from(tempfile::tempfile().unwrap())]);
        }
        left.flush().unwrap();
        let error = (0..200).find_map(|_| right.receive().err()).unwrap();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }
}
