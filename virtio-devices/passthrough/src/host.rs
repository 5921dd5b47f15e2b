//! System calls that name files: always one name in a directory that is open, and never through a symbolic link.

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags, Statx, StatxFlags, openat2, statx};
use rustix::io::Errno;

use crate::attributes::Kind;

/// Bytes of a name.
const NAME_MAX: usize = 255;

/// One component of a path: what a directory can have as an entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Name(CString);

impl Name {
    /// Checks `bytes`.
    ///
    /// # Errors
    /// `EINVAL` for what is empty, `.` or `..`, or contains `/` or a zero byte; `ENAMETOOLONG` beyond 255 bytes.
    pub fn new(bytes: &[u8]) -> Result<Self, Errno> {
        if bytes.len() > NAME_MAX {
            return Err(Errno::NAMETOOLONG);
        }
        if matches!(bytes, b"" | b"." | b"..") || bytes.contains(&b'/') {
            return Err(Errno::INVAL);
        }
        CString::new(bytes).map(Self).map_err(|_| Errno::INVAL)
    }

    /// Its bytes, without a zero byte behind them.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        self.0.to_bytes()
    }

    pub(crate) fn as_c_str(&self) -> &CStr {
        &self.0
    }
}

/// How names are looked up. A grant ends where another file system is mounted: what is there was not granted, and may be
/// one that never answers.
const BENEATH: ResolveFlags = ResolveFlags::BENEATH
    .union(ResolveFlags::NO_MAGICLINKS)
    .union(ResolveFlags::NO_SYMLINKS)
    .union(ResolveFlags::NO_XDEV);

/// A descriptor that nothing waits for, and no program inherits.
const PLAIN: OFlags = OFlags::CLOEXEC.union(OFlags::NONBLOCK).union(OFlags::NOCTTY);

fn beneath(dir: BorrowedFd<'_>, name: &CStr, flags: OFlags, mode: Mode) -> Result<OwnedFd, Errno> {
    openat2(dir, name, flags, mode, BENEATH).map_err(|e| if e == Errno::XDEV { Errno::ACCESS } else { e })
}

/// A reference (O_PATH) to the entry `name` of `dir`; to a symbolic link itself, if it is one.
pub(crate) fn child(dir: BorrowedFd<'_>, name: &Name) -> Result<OwnedFd, Errno> {
    beneath(dir, name.as_c_str(), OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
}

/// Makes the regular file `name` in `dir`, which must not exist, and opens it.
pub(crate) fn create(dir: BorrowedFd<'_>, name: &Name, flags: OFlags, mode: Mode) -> Result<OwnedFd, Errno> {
    beneath(dir, name.as_c_str(), flags | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | PLAIN, mode)
}

/// Makes a regular file without a name that can be given one, where `dir` is, and opens it. `flags` have to say that it is
/// written.
pub(crate) fn temporary(dir: BorrowedFd<'_>, flags: OFlags, mode: Mode) -> Result<OwnedFd, Errno> {
    beneath(dir, c".", flags | OFlags::TMPFILE | PLAIN, mode)
}

/// Opens the directory that `dir` refers to, for its entries.
pub(crate) fn open_directory(dir: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    beneath(dir, c".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
}

/// What a descriptor refers to.
pub(crate) fn examine(fd: BorrowedFd<'_>) -> Result<(Statx, Kind), Errno> {
    let stat = statx(fd, c"", AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW, StatxFlags::BASIC_STATS)?;
    let kind = Kind::of(u32::from(stat.stx_mode));
    Ok((stat, kind))
}

/// The descriptors of this process as files: the only way from a reference to an open file.
#[derive(Debug)]
pub(crate) struct Proc(OwnedFd);

impl Proc {
    pub fn new() -> Result<Self, Errno> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        openat2(CWD, c"/proc/self/fd", flags, Mode::empty(), ResolveFlags::empty()).map(Self)
    }

    /// A directory and the name in it under which `fd` can be reached, whatever it refers to. The name is a symbolic link
    /// of a kind that leads to the file itself and not to a path.
    pub fn path(&self, fd: BorrowedFd<'_>) -> (BorrowedFd<'_>, CString) {
        // The decimal form of a number has no zero byte.
        (self.0.as_fd(), CString::new(fd.as_raw_fd().to_string()).unwrap_or_default())
    }

    /// Opens what `fd` refers to, which the caller knows to be a regular file: opening another kind can have effects or
    /// wait for ever.
    pub fn open(&self, fd: BorrowedFd<'_>, flags: OFlags) -> Result<OwnedFd, Errno> {
        let (dir, name) = self.path(fd);
        openat2(dir, name.as_c_str(), flags | PLAIN, Mode::empty(), ResolveFlags::empty())
    }

    /// Another reference to what `fd` refers to.
    pub fn reference(&self, fd: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
        let (dir, name) = self.path(fd);
        openat2(dir, name.as_c_str(), OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), ResolveFlags::empty())
    }
}
