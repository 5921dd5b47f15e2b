//! What a guest is told of a file, and what it may change.

use rustix::fs::Statx;

/// Kinds of files a guest gets to see. Devices, pipes and sockets are not among them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link. The host never follows one; the guest does, in its own tree.
    Link,
    /// Something else.
    Other,
}

/// Bits of `st_mode` that say what a file is: inode(7).
const S_IFMT: u32 = 0o170_000;
const S_IFDIR: u32 = 0o040_000;
const S_IFREG: u32 = 0o100_000;
const S_IFLNK: u32 = 0o120_000;

/// Permission bits a guest sees and can set. Set-user-ID, set-group-ID and sticky are not among them.
pub(crate) const PERMISSIONS: u32 = 0o777;
/// Set-user-ID and set-group-ID.
pub(crate) const SET_ID: u32 = 0o6000;
/// These, and that only owners may remove entries: no guest sees them or changes them.
pub(crate) const SPECIAL: u32 = 0o7000;

impl Kind {
    /// By the mode of inode(7).
    pub(crate) fn of(mode: u32) -> Self {
        match mode & S_IFMT {
            S_IFREG => Self::File,
            S_IFDIR => Self::Directory,
            S_IFLNK => Self::Link,
            _ => Self::Other,
        }
    }
}

/// A point in time, as seconds and nanoseconds since 1970 began.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Time {
    /// Seconds.
    pub seconds: i64,
    /// Nanoseconds, below 10^9.
    pub nanoseconds: u32,
}

/// What a guest is told of a file. Whom it belongs to is not part of it: see [`Attributes::seen_by`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attributes {
    /// Inode number, different for each file in the tree.
    pub ino: u64,
    /// Bytes.
    pub size: u64,
    /// Allocated units of 512 bytes.
    pub blocks: u64,
    /// Kind and permissions, as in inode(7).
    pub mode: u32,
    /// Number of hard links.
    pub links: u32,
    /// Bytes of an efficient transfer.
    pub block_size: u32,
    /// Last read.
    pub accessed: Time,
    /// Last written.
    pub modified: Time,
    /// Last changed in any way.
    pub changed: Time,
}

impl Attributes {
    /// The root's.
    pub(crate) const ROOT: Self = Self {
        ino: 1,
        size: 0,
        blocks: 0,
        mode: S_IFDIR | 0o555,
        links: 2,
        block_size: 4096,
        accessed: Time { seconds: 0, nanoseconds: 0 },
        modified: Time { seconds: 0, nanoseconds: 0 },
        changed: Time { seconds: 0, nanoseconds: 0 },
    };

    /// What the user `user` of the host, who serves the guest, may do to a file becomes what its owner may do: to the
    /// guest everything belongs to one user. What the host really allows shows when something is tried.
    pub(crate) fn seen_by(stat: &Statx, user: u32, grant: u64) -> Self {
        let mode = u32::from(stat.stx_mode);
        let mut permissions = mode & PERMISSIONS;
        if stat.stx_uid != user && user != 0 {
            let others = (permissions >> 3 | permissions) & 7;
            permissions = permissions & 0o077 | others << 6;
        }
        let time = |t: &rustix::fs::StatxTimestamp| Time { seconds: t.tv_sec, nanoseconds: t.tv_nsec };
        Self {
            ino: ino(stat.stx_ino, grant),
            size: stat.stx_size,
            blocks: stat.stx_blocks,
            mode: mode & S_IFMT | permissions,
            links: stat.stx_nlink,
            block_size: stat.stx_blksize,
            accessed: time(&stat.stx_atime),
            modified: time(&stat.stx_mtime),
            changed: time(&stat.stx_ctime),
        }
    }
}

/// Grants may be on different file systems of the host, whose inode numbers overlap.
pub(crate) fn ino(host: u64, grant: u64) -> u64 {
    host ^ (grant << 48)
}

/// A change of attributes; what is nothing stays.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Change {
    /// Permissions.
    pub mode: Option<u32>,
    /// Bytes.
    pub size: Option<u64>,
    /// Last read; `Some(None)` is now.
    pub accessed: Option<Option<Time>>,
    /// Last written; `Some(None)` is now.
    pub modified: Option<Option<Time>>,
}
