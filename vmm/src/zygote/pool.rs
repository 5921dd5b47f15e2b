//! Clones that wait, just before their first instruction, for somebody to want one.
//!
//! ```text
//!   Pool ──▶ Waiting ═══ a socket pair ═══ Seat, in the clone
//! ```
//! A clone is told once what it is to be: it leaves the pool before it is told, and its seat is gone when it has heard.
//! When the zygote ends, so does the socket, and with it the clone.

use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use vmm_api::MAX_FDS;
use vmm_config::CloneConfig;

/// The longest description of a clone, in bytes, that is handed on; one that is longer gets a clone of its own making.
const MAX_MESSAGE: usize = 64 << 10;

/// The clones that wait.
#[derive(Default)]
pub struct Pool {
    waiting: VecDeque<Waiting>,
}

/// A clone that waits, seen from the zygote.
struct Waiting {
    pid: u32,
    socket: OwnedFd,
}

impl Pool {
    /// How many wait, as far as the zygote knows.
    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    /// One more waits at the other end of `socket`.
    pub fn add(&mut self, pid: u32, socket: OwnedFd) {
        self.waiting.push_back(Waiting { pid, socket });
    }

    /// Makes the clone that has waited longest what `config` says; its process. Nothing if none can be told.
    pub fn serve(&mut self, config: &CloneConfig, fds: &[OwnedFd]) -> Option<u32> {
        let message = serde_json::to_vec(config).ok().filter(|message| message.len() <= MAX_MESSAGE)?;
        while let Some(clone) = self.waiting.pop_front() {
            match clone.tell(&message, fds) {
                Ok(()) => return Some(clone.pid),
                Err(e) => log::warn!("the clone {} that waited cannot be used: {e}", clone.pid),
            }
        }
        None
    }
}

impl Waiting {
    fn tell(&self, message: &[u8], fds: &[OwnedFd]) -> io::Result<()> {
        let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&fds)) {
            return Err(io::Error::other("too many descriptors"));
        }
        // A packet goes whole or not at all, and nothing else was ever sent: there is room.
        sendmsg(&self.socket, &[IoSlice::new(message)], &mut control, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)?;
        Ok(())
    }
}

/// Where a clone waits.
pub struct Seat(OwnedFd);

impl Seat {
    /// A new one, and the zygote's end of it.
    ///
    /// # Errors
    /// If the process has no descriptor left.
    pub fn new() -> io::Result<(Self, OwnedFd)> {
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        Ok((Self(theirs), ours))
    }

    /// What the clone is to be, once there is something to read; nothing if the zygote is gone.
    ///
    /// # Errors
    /// If the system refuses, or what came is not what a zygote sends.
    pub fn hear(self) -> io::Result<Option<(CloneConfig, Vec<OwnedFd>)>> {
        let mut message = vec![0; MAX_MESSAGE];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = recvmsg(&self.0, &mut [IoSliceMut::new(&mut message)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
        let fds = control.drain().filter_map(|part| match part {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        });
        let fds = fds.flatten().collect();
        if received.bytes == 0 {
            return Ok(None);
        }
        if received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
            return Err(io::Error::other("what the clone is to be did not arrive whole"));
        }
        message.truncate(received.bytes);
        Ok(Some((serde_json::from_slice(&message)?, fds)))
    }
}

impl AsFd for Seat {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    fn named(name: &str) -> CloneConfig {
        CloneConfig { fds: vec![name.into()], ..CloneConfig::default() }
    }

    fn null() -> Vec<OwnedFd> {
        vec![File::open("/dev/null").unwrap().into()]
    }

    #[test]
    fn each_clone_is_told_once_and_in_the_order_of_their_coming() {
        let mut pool = Pool::default();
        let seats: Vec<_> = (1..=2)
            .map(|pid| {
                let (seat, socket) = Seat::new().unwrap();
                pool.add(pid, socket);
                seat
            })
            .collect();
        assert_eq!(pool.serve(&named("a"), &null()), Some(1));
        assert_eq!(pool.serve(&named("b"), &null()), Some(2));
        assert_eq!((pool.serve(&named("c"), &null()), pool.len()), (None, 0));
        let heard = seats.into_iter().map(|seat| seat.hear().unwrap().unwrap());
        let heard: Vec<_> = heard.map(|(config, fds)| (config.fds[0].clone(), fds.len())).collect();
        assert_eq!(heard, [("a".into(), 1), ("b".into(), 1)]);
    }

    #[test]
    fn who_died_while_waiting_is_passed_over() {
        let mut pool = Pool::default();
        let (gone, socket) = Seat::new().unwrap();
        pool.add(1, socket);
        let (seat, socket) = Seat::new().unwrap();
        pool.add(2, socket);
        drop(gone);
        assert_eq!(pool.serve(&named("a"), &null()), Some(2));
        assert!(seat.hear().unwrap().is_some());
    }

    #[test]
    fn without_a_zygote_there_is_nothing_to_wait_for() {
        let (seat, socket) = Seat::new().unwrap();
        drop(socket);
        assert!(seat.hear().unwrap().is_none());
    }

    #[test]
    fn a_description_that_is_too_long_costs_no_clone() {
        let mut pool = Pool::default();
        let (_seat, socket) = Seat::new().unwrap();
        pool.add(1, socket);
        assert_eq!(pool.serve(&named(&"x".repeat(MAX_MESSAGE)), &null()), None);
        assert_eq!(pool.len(), 1);
    }
}
