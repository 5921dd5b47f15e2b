//! Structures and numbers of the FUSE protocol, version 7.38, as `linux/fuse.h` has them. Virtio 1.3 section 5.11.6 puts
//! them into virtqueues; both sides are little-endian.

use zerocopy::little_endian::{I32, U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The protocol's major version.
pub const MAJOR: u32 = 7;
/// The minor version this device speaks.
pub const MINOR: u32 = 38;
/// The oldest minor version it understands: the one virtio-fs came with.
pub const OLDEST_MINOR: u32 = 31;

/// Operations.
pub mod op {
    #![allow(missing_docs)]
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const READLINK: u32 = 5;
    pub const SYMLINK: u32 = 6;
    pub const MKNOD: u32 = 8;
    pub const MKDIR: u32 = 9;
    pub const UNLINK: u32 = 10;
    pub const RMDIR: u32 = 11;
    pub const RENAME: u32 = 12;
    pub const LINK: u32 = 13;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const SETXATTR: u32 = 21;
    pub const GETXATTR: u32 = 22;
    pub const LISTXATTR: u32 = 23;
    pub const REMOVEXATTR: u32 = 24;
    pub const INIT: u32 = 26;
    pub const OPENDIR: u32 = 27;
    pub const READDIR: u32 = 28;
    pub const RELEASEDIR: u32 = 29;
    pub const FSYNCDIR: u32 = 30;
    pub const CREATE: u32 = 35;
    pub const INTERRUPT: u32 = 36;
    pub const DESTROY: u32 = 38;
    pub const BATCH_FORGET: u32 = 42;
    pub const FALLOCATE: u32 = 43;
    pub const READDIRPLUS: u32 = 44;
    pub const RENAME2: u32 = 45;
    pub const LSEEK: u32 = 46;
    pub const COPY_FILE_RANGE: u32 = 47;
    pub const SYNCFS: u32 = 50;
    pub const TMPFILE: u32 = 51;
}

/// Flags of INIT that are accepted when a driver offers them.
pub mod init {
    #![allow(missing_docs)]
    pub const ASYNC_READ: u32 = 1 << 0;
    pub const ATOMIC_O_TRUNC: u32 = 1 << 3;
    pub const BIG_WRITES: u32 = 1 << 5;
    pub const AUTO_INVAL_DATA: u32 = 1 << 12;
    pub const DO_READDIRPLUS: u32 = 1 << 13;
    pub const READDIRPLUS_AUTO: u32 = 1 << 14;
    pub const ASYNC_DIO: u32 = 1 << 15;
    pub const PARALLEL_DIROPS: u32 = 1 << 18;
    pub const MAX_PAGES: u32 = 1 << 22;
    pub const HANDLE_KILLPRIV_V2: u32 = 1 << 28;
}

/// Bits of `SetattrIn::valid`.
pub mod valid {
    #![allow(missing_docs)]
    pub const MODE: u32 = 1 << 0;
    pub const UID: u32 = 1 << 1;
    pub const GID: u32 = 1 << 2;
    pub const SIZE: u32 = 1 << 3;
    pub const ATIME: u32 = 1 << 4;
    pub const MTIME: u32 = 1 << 5;
    pub const FH: u32 = 1 << 6;
    pub const ATIME_NOW: u32 = 1 << 7;
    pub const MTIME_NOW: u32 = 1 << 8;
}

/// Flags of open(2), the same on x86_64 and aarch64.
pub mod open {
    #![allow(missing_docs)]
    pub const ACCESS: u32 = 0o3;
    pub const WRITE: u32 = 0o1;
    pub const READ_WRITE: u32 = 0o2;
    pub const EXCLUSIVE: u32 = 0o200;
    pub const TRUNCATE: u32 = 0o1000;
    pub const APPEND: u32 = 0o2000;
    pub const DATA_SYNC: u32 = 0o10_000;
    pub const SYNC: u32 = 0o4_010_000;
}

/// FUSE_WRITE_CACHE: a page of the driver's cache is written, at its own place whatever the file was opened for.
pub const WRITE_CACHE: u32 = 1;
/// FUSE_FSYNC_FDATASYNC.
pub const FSYNC_DATA: u32 = 1;
/// SEEK_DATA of lseek(2).
pub const SEEK_DATA: u32 = 3;
/// SEEK_HOLE of lseek(2).
pub const SEEK_HOLE: u32 = 4;

macro_rules! structures {
    ($($(#[$doc:meta])* $name:ident { $($field:ident: $kind:ty),* $(,)? })*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
        #[repr(C)]
        #[allow(missing_docs)]
        pub struct $name { $(pub $field: $kind),* }
    )*};
}

structures! {
    /// `fuse_in_header`: before each request.
    InHeader {
        len: U32, opcode: U32, unique: U64, nodeid: U64, uid: U32, gid: U32, pid: U32, total_extlen: U16, padding: U16,
    }
    /// `fuse_out_header`: before each answer.
    OutHeader { len: U32, error: I32, unique: U64 }
    /// `fuse_init_in`, as far as it is needed.
    InitIn { major: U32, minor: U32, max_readahead: U32, flags: U32 }
    /// `fuse_init_out`.
    InitOut {
        major: U32, minor: U32, max_readahead: U32, flags: U32, max_background: U16, congestion_threshold: U16,
        max_write: U32, time_gran: U32, max_pages: U16, map_alignment: U16, flags2: U32, unused: [U32; 7],
    }
    /// `fuse_attr`.
    Attr {
        ino: U64, size: U64, blocks: U64, atime: U64, mtime: U64, ctime: U64, atimensec: U32, mtimensec: U32,
        ctimensec: U32, mode: U32, nlink: U32, uid: U32, gid: U32, rdev: U32, blksize: U32, flags: U32,
    }
    /// `fuse_entry_out`.
    EntryOut {
        nodeid: U64, generation: U64, entry_valid: U64, attr_valid: U64, entry_valid_nsec: U32, attr_valid_nsec: U32,
        attr: Attr,
    }
    /// `fuse_attr_out`.
    AttrOut { attr_valid: U64, attr_valid_nsec: U32, dummy: U32, attr: Attr }
    /// `fuse_setattr_in`.
    SetattrIn {
        valid: U32, padding: U32, fh: U64, size: U64, lock_owner: U64, atime: U64, mtime: U64, ctime: U64,
        atimensec: U32, mtimensec: U32, ctimensec: U32, mode: U32, unused4: U32, uid: U32, gid: U32, unused5: U32,
    }
    /// `fuse_mknod_in`.
    MknodIn { mode: U32, rdev: U32, umask: U32, padding: U32 }
    /// `fuse_mkdir_in`.
    MkdirIn { mode: U32, umask: U32 }
    /// `fuse_rename_in`.
    RenameIn { newdir: U64 }
    /// `fuse_rename2_in`.
    Rename2In { newdir: U64, flags: U32, padding: U32 }
    /// `fuse_link_in`.
    LinkIn { oldnodeid: U64 }
    /// `fuse_open_in`.
    OpenIn { flags: U32, open_flags: U32 }
    /// `fuse_open_out`.
    OpenOut { fh: U64, open_flags: U32, padding: U32 }
    /// `fuse_create_in`.
    CreateIn { flags: U32, mode: U32, umask: U32, open_flags: U32 }
    /// `fuse_read_in`, also of directories.
    ReadIn { fh: U64, offset: U64, size: U32, read_flags: U32, lock_owner: U64, flags: U32, padding: U32 }
    /// `fuse_write_in`.
    WriteIn { fh: U64, offset: U64, size: U32, write_flags: U32, lock_owner: U64, flags: U32, padding: U32 }
    /// `fuse_write_out`.
    WriteOut { size: U32, padding: U32 }
    /// `fuse_release_in`, as far as it is needed.
    ReleaseIn { fh: U64 }
    /// `fuse_fsync_in`.
    FsyncIn { fh: U64, fsync_flags: U32, padding: U32 }
    /// `fuse_setxattr_in`, without FUSE_SETXATTR_EXT.
    SetxattrIn { size: U32, flags: U32 }
    /// `fuse_getxattr_in`, also to list names.
    GetxattrIn { size: U32, padding: U32 }
    /// `fuse_getxattr_out`: how much room the answer needs.
    GetxattrOut { size: U32, padding: U32 }
    /// `fuse_forget_in`.
    ForgetIn { nlookup: U64 }
    /// `fuse_batch_forget_in`.
    BatchForgetIn { count: U32, dummy: U32 }
    /// `fuse_forget_one`.
    ForgetOne { nodeid: U64, nlookup: U64 }
    /// `fuse_fallocate_in`.
    FallocateIn { fh: U64, offset: U64, length: U64, mode: U32, padding: U32 }
    /// `fuse_lseek_in`.
    LseekIn { fh: U64, offset: U64, whence: U32, padding: U32 }
    /// `fuse_lseek_out`.
    LseekOut { offset: U64 }
    /// `fuse_copy_file_range_in`.
    CopyFileRangeIn {
        fh_in: U64, off_in: U64, nodeid_out: U64, fh_out: U64, off_out: U64, len: U64, flags: U64,
    }
    /// `fuse_statfs_out`.
    StatfsOut {
        blocks: U64, bfree: U64, bavail: U64, files: U64, ffree: U64, bsize: U32, namelen: U32, frsize: U32,
        padding: U32, spare: [U32; 6],
    }
    /// `fuse_dirent`; the name follows, then zeroes up to a multiple of 8 bytes.
    Dirent { ino: U64, off: U64, namelen: U32, kind: U32 }
}
