//! One end of a connection, for a poll loop: never blocks, never holds more than a few frames.

use std::{
    io,
    marker::PhantomData,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::{Errno, ioctl_fionbio},
    net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown},
};
use zeroize::Zeroize;

use crate::frame::{Decoder, Message, ProtoError};

/// What can go wrong on a connection.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The socket failed.
    #[error("the connection failed: {0}")]
    Io(#[from] io::Error),
    /// The peer broke the protocol.
    #[error("the other side broke the protocol: {0}")]
    Protocol(#[from] ProtoError),
    /// The peer closed the connection in the middle of an exchange.
    #[error("the other side closed the connection")]
    Closed,
    /// The peer did not answer in time.
    #[error("the other side did not answer in {0} s")]
    TimedOut(u32),
}

impl From<Errno> for LinkError {
    fn from(errno: Errno) -> Self {
        Self::Io(errno.into())
    }
}

/// A stream socket of any family that receives `Rx` and sends `Tx`.
#[derive(Debug)]
pub struct Link<Rx, Tx> {
    fd: OwnedFd,
    decoder: Decoder,
    out: Vec<u8>,
    sent: usize,
    messages: PhantomData<(Rx, Tx)>,
}

impl<Rx: Message, Tx: Message> Link<Rx, Tx> {
    /// Takes a connected stream socket and makes it non-blocking.
    ///
    /// # Errors
    /// The descriptor does not take part in non-blocking operation.
    pub fn new(fd: OwnedFd) -> Result<Self, LinkError> {
        ioctl_fionbio(&fd, true)?;
        Ok(Self { fd, decoder: Decoder::default(), out: Vec::new(), sent: 0, messages: PhantomData })
    }

    /// Queues a message; [`Link::flush`] sends it. The caller keeps the queue short by asking [`Link::is_idle`] first
    /// wherever the peer decides how much there is to send.
    ///
    /// # Errors
    /// The message is larger than a frame.
    pub fn queue(&mut self, message: &Tx) -> Result<(), LinkError> {
        if self.sent == self.out.len() {
            self.out.clear();
            self.sent = 0;
        }
        Ok(message.encode(&mut self.out)?)
    }

    /// True when everything queued has been handed to the kernel.
    pub fn is_idle(&self) -> bool {
        self.sent >= self.out.len()
    }

    /// Sends as much of what is queued as the socket takes.
    ///
    /// # Errors
    /// The socket failed.
    pub fn flush(&mut self) -> Result<(), LinkError> {
        while let Some(rest) = self.out.get(self.sent..).filter(|rest| !rest.is_empty()) {
            match send(&self.fd, rest, SendFlags::NOSIGNAL) {
                Ok(count) => self.sent = self.sent.saturating_add(count),
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    /// Reads once from the socket. False at the end of the stream. Call [`Link::received`] until it has no more before
    /// calling this again.
    ///
    /// # Errors
    /// The socket failed.
    pub fn fill(&mut self) -> Result<bool, LinkError> {
        let mut buffer = [0; 16 * 1024];
        let space = self.decoder.space().min(buffer.len());
        let Some(buffer) = buffer.get_mut(..space).filter(|buffer| !buffer.is_empty()) else { return Ok(true) };
        match recv(&self.fd, &mut *buffer, RecvFlags::empty()) {
            Ok((0, _)) => Ok(false),
            Ok((count, _)) => {
                let received = buffer.get_mut(..count).unwrap_or_default();
                let pushed = self.decoder.push(received);
                // It may have been a seed.
                received.zeroize();
                pushed.map(|()| true).map_err(LinkError::from)
            }
            Err(Errno::AGAIN | Errno::INTR) => Ok(true),
            Err(errno) => Err(errno.into()),
        }
    }

    /// The next complete message received.
    ///
    /// # Errors
    /// The peer broke the protocol; the connection is of no further use.
    pub fn received(&mut self) -> Result<Option<Rx>, LinkError> {
        Ok(self.decoder.take()?)
    }

    /// What to wait for: always input, and output while something is queued.
    pub fn interest(&self) -> PollFlags {
        if self.is_idle() { PollFlags::IN } else { PollFlags::IN | PollFlags::OUT }
    }

    /// Says that nothing more will be sent.
    ///
    /// # Errors
    /// The socket failed.
    pub fn shutdown(&self) -> Result<(), LinkError> {
        Ok(shutdown(&self.fd, Shutdown::Write)?)
    }

    /// Sends everything queued, then waits for one message. For the short exchanges around the streams.
    ///
    /// # Errors
    /// The socket failed, the peer closed it, broke the protocol or did not answer within `seconds`.
    pub fn exchange(&mut self, seconds: u32) -> Result<Rx, LinkError> {
        let end = std::time::Instant::now() + std::time::Duration::from_secs(seconds.into());
        loop {
            self.flush()?;
            if let Some(message) = self.received()? {
                return Ok(message);
            }
            if !wait(&self.fd, self.interest(), end)? {
                return Err(LinkError::TimedOut(seconds));
            }
            if !self.fill()? {
                return Err(LinkError::Closed);
            }
        }
    }

    /// Sends everything queued, then waits until the peer has closed its side, so that it has seen all.
    ///
    /// # Errors
    /// The socket failed or the peer did not close it within `seconds`.
    pub fn finish(&mut self, seconds: u32) -> Result<(), LinkError> {
        let end = std::time::Instant::now() + std::time::Duration::from_secs(seconds.into());
        let mut closing = false;
        loop {
            self.flush()?;
            if self.is_idle() && !closing {
                self.shutdown()?;
                closing = true;
            }
            if !wait(&self.fd, self.interest(), end)? {
                return Err(LinkError::TimedOut(seconds));
            }
            if !self.fill()? {
                return Ok(());
            }
            // Whatever still arrives is not wanted any more.
            self.decoder = Decoder::default();
        }
    }
}

/// Waits until the descriptor is ready. False when `end` passed first.
fn wait(fd: &OwnedFd, flags: PollFlags, end: std::time::Instant) -> Result<bool, LinkError> {
    loop {
        let left = end.saturating_duration_since(std::time::Instant::now());
        let timeout = Timespec::try_from(left).map_err(|_| Errno::INVAL)?;
        match poll(&mut [PollFd::new(fd, flags)], Some(&timeout)) {
            Ok(count) => return Ok(count > 0),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

impl<Rx, Tx> AsFd for Link<Rx, Tx> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Write, os::unix::net::UnixStream};

    use super::*;
    use crate::{FromAgent, Reply, Request, ToAgent};

    type Launcher = Link<FromAgent, ToAgent>;
    type Agent = Link<ToAgent, FromAgent>;

    #[test]
    fn request_and_reply() {
        let (a, b) = UnixStream::pair().unwrap();
        let mut launcher = Launcher::new(a.into()).unwrap();
        let mut agent = Agent::new(b.into()).unwrap();
        launcher.queue(&ToAgent::Request(Request::Ping)).unwrap();
        launcher.flush().unwrap();
        assert_eq!(agent.exchange(5).unwrap(), ToAgent::Request(Request::Ping));
        agent.queue(&FromAgent::Reply(Reply::Done)).unwrap();
        let seen = std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                let message = launcher.exchange(5);
                drop(launcher);
                message
            });
            agent.finish(5).unwrap();
            reader.join().unwrap()
        });
        assert_eq!(seen.unwrap(), FromAgent::Reply(Reply::Done));
    }

    #[test]
    fn a_full_socket_keeps_the_rest_queued() {
        let (a, b) = UnixStream::pair().unwrap();
        let mut sender = Launcher::new(a.into()).unwrap();
        let mut count = 0;
        while sender.is_idle() {
            sender.queue(&ToAgent::Stdin(vec![1; 60_000])).unwrap();
            sender.flush().unwrap();
            count += 1;
        }
        let mut receiver = Agent::new(b.into()).unwrap();
        let mut seen = 0;
        while seen < count {
            sender.flush().unwrap();
            assert!(receiver.fill().unwrap());
            while let Some(message) = receiver.received().unwrap() {
                assert_eq!(message, ToAgent::Stdin(vec![1; 60_000]));
                seen += 1;
            }
        }
        assert!(sender.is_idle());
    }

    #[test]
    fn silence_and_closing_are_told_apart() {
        let (a, b) = UnixStream::pair().unwrap();
        let mut link = Launcher::new(a.into()).unwrap();
        assert!(matches!(link.exchange(0), Err(LinkError::TimedOut(0))));
        (&b).write_all(&[9, 9]).unwrap();
        drop(b);
        assert!(matches!(link.exchange(5), Err(LinkError::Closed)));
    }
}
