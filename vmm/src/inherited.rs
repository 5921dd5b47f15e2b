//! File descriptors handed down by the parent process, named by number on the command line.

use std::collections::BTreeSet;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::{Mutex, PoisonError};

use rustix::io::{FdFlags, fcntl_getfd, fcntl_setfd};
use thiserror::Error;

/// Why a descriptor cannot be taken over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum InheritedError {
    /// There is none of that number.
    #[error("fd={0} is not open; the process that starts the VMM must hand it down")]
    NotOpen(RawFd),
    /// 0, 1 and 2 belong to the standard streams.
    #[error("fd={0} cannot be used; 3 is the first that can")]
    Standard(RawFd),
    /// One descriptor for two purposes.
    #[error("fd={0} is given twice; hand down a descriptor for each use")]
    Taken(RawFd),
}

/// The numbers that have an owner already.
static TAKEN: Mutex<BTreeSet<RawFd>> = Mutex::new(BTreeSet::new());

/// Takes over the descriptor `fd`, which the parent process opened. Children do not inherit it further.
///
/// To be called while the process starts, before it opens files of its own: their numbers are not told apart.
///
/// # Errors
/// It is not open, is a standard stream, or has been taken already.
pub fn take(fd: RawFd) -> Result<OwnedFd, InheritedError> {
    if fd <= 2 {
        return Err(InheritedError::Standard(fd));
    }
    let mut taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
    if taken.contains(&fd) {
        return Err(InheritedError::Taken(fd));
    }
    let owned = adopt(fd).ok_or(InheritedError::NotOpen(fd))?;
    taken.insert(fd);
    Ok(owned)
}

#[expect(unsafe_code, reason = "a number from the command line becomes an owned descriptor")]
fn adopt(fd: RawFd) -> Option<OwnedFd> {
    // SAFETY: the number is not negative, and the borrow ends with this call; if nothing is open there, the system
    // says so.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    let flags = fcntl_getfd(borrowed).ok()?;
    fcntl_setfd(borrowed, flags | FdFlags::CLOEXEC).ok()?;
    // SAFETY: the descriptor is open, as the calls above succeeded. The parent handed it to this process and `take`
    // gives each number away once, so nobody else in this process owns it.
    Some(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use std::os::fd::IntoRawFd;

    use super::*;

    #[test]
    fn each_open_descriptor_can_be_taken_once() {
        let fd = std::fs::File::open("/dev/null").unwrap().into_raw_fd();
        let owned = take(fd).unwrap();
        assert!(fcntl_getfd(&owned).unwrap().contains(FdFlags::CLOEXEC));
        assert_eq!(take(fd).unwrap_err(), InheritedError::Taken(fd));
        assert_eq!(take(1).unwrap_err(), InheritedError::Standard(1));
        assert_eq!(take(-1).unwrap_err(), InheritedError::Standard(-1));
        assert_eq!(take(1_000_000).unwrap_err(), InheritedError::NotOpen(1_000_000));
    }
}
