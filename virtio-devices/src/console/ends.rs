//! The console's file descriptors, made so that neither reading nor writing them blocks.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{FileType, Mode, OFlags, fcntl_getfl, fcntl_setfl, fstat, open};
use rustix::io::Errno;

use crate::worker::{EventSet, Interest};

/// What became of reading or writing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    /// So many bytes; at least one.
    Bytes(usize),
    /// Nothing now; the descriptor will become ready.
    Wait,
    /// The other side is not there: end of input, or nobody takes output.
    Gone,
}

/// Where the guest's output goes.
#[derive(Debug)]
pub(super) struct Output {
    fd: OwnedFd,
    /// Becomes readable when `fd` becomes writable.
    writable: EventSet,
    /// A pseudo-terminal's other side may have no reader for good; a pipe's or terminal's reader will come back.
    pub(super) pseudo_terminal: bool,
}

impl Output {
    pub(super) fn new(fd: OwnedFd) -> io::Result<Self> {
        let pseudo_terminal = is_master(fd.as_fd());
        let fd = nonblocking(fd, OFlags::WRONLY)?;
        let writable = EventSet::new()?;
        match writable.add(fd.as_fd(), Interest { read: false, write: true }, 0) {
            // A regular file cannot be waited for and need not be.
            Err(e) if e.raw_os_error() == Some(libc::EPERM) => {}
            result => result?,
        }
        Ok(Self { fd, writable, pseudo_terminal })
    }

    /// Readable when [`Output::write`] is worth another try.
    pub(super) fn ready(&self) -> BorrowedFd<'_> {
        self.writable.as_fd()
    }

    pub(super) fn write(&self, bytes: &[u8]) -> Outcome {
        outcome(rustix::io::write(&self.fd, bytes))
    }
}

/// Where the guest's input comes from.
#[derive(Debug)]
pub(super) struct Input {
    fd: OwnedFd,
    /// Whether it can be waited for; a regular file cannot, it is read when the guest wants input.
    pub(super) pollable: bool,
    /// A pseudo-terminal's other side may be opened again.
    pub(super) pseudo_terminal: bool,
}

impl Input {
    pub(super) fn new(fd: OwnedFd) -> io::Result<Self> {
        let pseudo_terminal = is_master(fd.as_fd());
        let fd = nonblocking(fd, OFlags::RDONLY)?;
        let pollable = match EventSet::new()?.add(fd.as_fd(), Interest { read: true, write: false }, 0) {
            Ok(()) => true,
            Err(e) if e.raw_os_error() == Some(libc::EPERM) => false,
            Err(e) => return Err(e),
        };
        Ok(Self { fd, pollable, pseudo_terminal })
    }

    pub(super) fn read(&self, bytes: &mut [u8]) -> Outcome {
        outcome(rustix::io::read(&self.fd, bytes))
    }
}

impl AsFd for Input {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn outcome(result: rustix::io::Result<usize>) -> Outcome {
    match result {
        Ok(0) => Outcome::Gone,
        Ok(n) => Outcome::Bytes(n),
        Err(Errno::AGAIN | Errno::INTR) => Outcome::Wait,
        // EIO is a pseudo-terminal nobody has open, EPIPE a pipe without reader, ENOSPC a full disk: the guest goes
        // on without its console.
        Err(_) => Outcome::Gone,
    }
}

fn is_master(fd: BorrowedFd<'_>) -> bool {
    rustix::pty::ptsname(fd, Vec::new()).is_ok()
}

/// The same file, not blocking. The open file of a terminal or pipe is usually shared with the shell that started the
/// VMM, which would not expect it to stop blocking: those get an open file of their own.
fn nonblocking(fd: OwnedFd, access: OFlags) -> io::Result<OwnedFd> {
    let flags = fcntl_getfl(&fd)?;
    let kind = FileType::from_raw_mode(fstat(&fd)?.st_mode);
    if flags.contains(OFlags::NONBLOCK) || kind.is_file() {
        return Ok(fd);
    }
    let shared = kind == FileType::Fifo || (kind == FileType::CharacterDevice && !is_master(fd.as_fd()));
    if shared {
        let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
        match open(path, access | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty()) {
            Ok(own) => return Ok(own),
            Err(e) => log::debug!("console: no open file of its own ({e}), the shared one stops blocking"),
        }
    }
    fcntl_setfl(&fd, flags | OFlags::NONBLOCK)?;
    Ok(fd)
}
