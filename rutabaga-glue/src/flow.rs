//! Bytes and files on a Unix socket that does not block.

use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};

use crate::validate::MAX_IDENTIFIERS;

/// The most file descriptors Linux puts into one message (SCM_MAX_FD).
const MAX_FDS: usize = 253;

/// Bytes and files on their way.
#[derive(Default)]
pub struct Flow {
    chunks: VecDeque<Chunk>,
    /// Bytes that wait.
    pub bytes: usize,
}

struct Chunk {
    data: Vec<u8>,
    start: usize,
    fds: VecDeque<OwnedFd>,
}

/// What a read brought.
pub enum Received {
    /// Something.
    Data,
    /// Nothing yet.
    Nothing,
    /// The peer is gone.
    End,
}

impl Flow {
    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    /// Drops what waits.
    pub fn clear(&mut self) {
        self.chunks.clear();
        self.bytes = 0;
    }

    /// Adds bytes, and the files that go with the first of them.
    pub fn push(&mut self, data: Vec<u8>, fds: VecDeque<OwnedFd>) {
        self.bytes = self.bytes.saturating_add(data.len());
        self.chunks.push_back(Chunk { data, start: 0, fds });
    }

    /// Sends what the socket takes.
    pub fn send(&mut self, socket: BorrowedFd<'_>) -> io::Result<()> {
        while let Some(chunk) = self.chunks.front_mut() {
            let rest = chunk.data.get(chunk.start..).unwrap_or_default();
            // More files than go at once: one byte carries the first of them.
            let part = if chunk.fds.len() > MAX_IDENTIFIERS { rest.get(..1).unwrap_or_default() } else { rest };
            let sent = match send(socket, part, &chunk.fds) {
                Ok(sent) => sent,
                Err(Errno::AGAIN) => return Ok(()),
                Err(e) => return Err(e.into()),
            };
            chunk.start = chunk.start.saturating_add(sent);
            self.bytes = self.bytes.saturating_sub(sent);
            chunk.fds.drain(..chunk.fds.len().min(MAX_IDENTIFIERS));
            if chunk.start < chunk.data.len() {
                continue;
            }
            let left = self.chunks.pop_front().map(|chunk| chunk.fds).unwrap_or_default();
            if !left.is_empty() {
                // Fewer bytes than it takes: the rest goes with what comes next.
                let Some(next) = self.chunks.front_mut() else {
                    return Err(io::Error::other("more files than bytes"));
                };
                let later = std::mem::replace(&mut next.fds, left);
                next.fds.extend(later);
            }
        }
        Ok(())
    }
}

fn send(socket: BorrowedFd<'_>, data: &[u8], fds: &VecDeque<OwnedFd>) -> Result<usize, Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_IDENTIFIERS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds: Vec<BorrowedFd<'_>> = fds.iter().take(MAX_IDENTIFIERS).map(AsFd::as_fd).collect();
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(Errno::NOBUFS);
    }
    rustix::net::sendmsg(socket, &[IoSlice::new(data)], &mut control, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)
}

/// Reads once into `buffer`; `take` gets what came.
pub fn receive(
    socket: BorrowedFd<'_>,
    buffer: &mut [u8],
    take: impl FnOnce(Vec<u8>, VecDeque<OwnedFd>) -> io::Result<()>,
) -> io::Result<Received> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let message = match rustix::net::recvmsg(socket, &mut [IoSliceMut::new(buffer)], &mut control, flags) {
        Ok(message) => message,
        Err(Errno::AGAIN | Errno::INTR) => return Ok(Received::Nothing),
        Err(Errno::CONNRESET) => return Ok(Received::End),
        Err(e) => return Err(e.into()),
    };
    let fds: VecDeque<OwnedFd> = control
        .drain()
        .filter_map(|m| if let RecvAncillaryMessage::ScmRights(fds) = m { Some(fds) } else { None })
        .flatten()
        .collect();
    if message.flags.contains(ReturnFlags::CTRUNC) {
        return Err(io::Error::other("files were lost: this process has too many open"));
    }
    if message.bytes == 0 {
        return Ok(Received::End);
    }
    take(buffer.get(..message.bytes).unwrap_or_default().to_vec(), fds)?;
    Ok(Received::Data)
}
