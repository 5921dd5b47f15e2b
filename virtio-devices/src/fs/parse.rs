//! Requests, from bytes to checked values. Pure: it looks at no state and does nothing.

use passthrough::{Change, Errno, ExtendedName, FallocateFlags, MAX_EXTENDED, Name, OpenFlags, Time};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use super::protocol::{
    BatchForgetIn, CopyFileRangeIn, CreateIn, FSYNC_DATA, FallocateIn, ForgetIn, ForgetOne, FsyncIn, GetxattrIn,
    InitIn, LinkIn, LseekIn, MkdirIn, MknodIn, OpenIn, ReadIn, ReleaseIn, Rename2In, RenameIn, SEEK_DATA, SEEK_HOLE,
    SetattrIn, SetxattrIn, WRITE_CACHE, WriteIn, op, open, valid,
};

/// Bytes of a request that are looked at, apart from the data of WRITE: the header, the longest target of a symbolic
/// link and a name would fit twice. A BATCH_FORGET has 1020 nodes at most.
pub const MAX_REQUEST: usize = 16 << 10;
/// The same of a SETXATTR, which has a value of at most [`MAX_EXTENDED`] bytes with it.
pub const MAX_SET_EXTENDED: usize = MAX_EXTENDED + 1024;

/// Whom a change of owner would make the owner: user and group, where given.
pub type Owner = (Option<u32>, Option<u32>);

/// What a driver asks for. The node it asks about is in the header.
#[derive(Debug, Clone, PartialEq)]
#[expect(missing_docs, reason = "the fields are those of the protocol's structures")]
pub enum Request<'a> {
    /// Begin a session.
    Init {
        major: u32,
        minor: u32,
        max_readahead: u32,
        flags: u32,
    },
    /// End it.
    Destroy,
    /// Forget nodes, as often as it says. There is no answer.
    Forget(Vec<(u64, u64)>),
    /// Give up another request. Each is done when this one comes; there is no answer.
    Interrupt,
    Lookup(Name),
    GetAttributes,
    SetAttributes {
        handle: Option<u64>,
        change: Change,
        owner: Owner,
    },
    ReadLink,
    Symlink {
        name: Name,
        target: &'a [u8],
    },
    MakeFile {
        name: Name,
        mode: u32,
    },
    MakeDirectory {
        name: Name,
        mode: u32,
    },
    Unlink(Name),
    RemoveDirectory(Name),
    Rename {
        name: Name,
        to: u64,
        new: Name,
        flags: u32,
    },
    Link {
        node: u64,
        name: Name,
    },
    Open(OpenFlags),
    Create {
        name: Name,
        mode: u32,
        flags: OpenFlags,
    },
    Read {
        handle: u64,
        offset: u64,
        size: u32,
    },
    /// The data is behind what was parsed.
    Write {
        handle: u64,
        offset: u64,
        size: u32,
        append: bool,
    },
    FileSystem,
    SyncFileSystem,
    /// As `Create`, without a name.
    CreateUnnamed {
        mode: u32,
        flags: OpenFlags,
    },
    /// `size`: room for the answer, which is only the room it needs if there is none.
    GetExtended {
        name: ExtendedName,
        size: u32,
    },
    SetExtended {
        name: ExtendedName,
        value: &'a [u8],
        flags: u32,
    },
    ListExtended {
        size: u32,
    },
    RemoveExtended(ExtendedName),
    Release {
        handle: u64,
    },
    Sync {
        handle: u64,
        data: bool,
    },
    OpenDirectory,
    ReadDirectory {
        handle: u64,
        offset: u64,
        size: u32,
        plus: bool,
    },
    ReleaseDirectory {
        handle: u64,
    },
    SyncDirectory {
        handle: u64,
    },
    Allocate {
        handle: u64,
        offset: u64,
        len: u64,
        mode: FallocateFlags,
    },
    Seek {
        handle: u64,
        offset: u64,
        hole: bool,
    },
    Copy {
        handle: u64,
        offset: u64,
        to: (u64, u64, u64),
        len: u64,
    },
}

/// Reads the request `opcode`, whose bytes behind the header are `body`; about the node `node`.
///
/// # Errors
/// `ENOSYS` for an operation that there is not, `EINVAL` for one that is too short, or `EOPNOTSUPP` for a flag.
pub fn parse(opcode: u32, node: u64, body: &[u8]) -> Result<Request<'_>, Errno> {
    Ok(match opcode {
        op::INIT => {
            let (init, _) = take::<InitIn>(body)?;
            let (major, minor) = (init.major.get(), init.minor.get());
            Request::Init { major, minor, max_readahead: init.max_readahead.get(), flags: init.flags.get() }
        }
        op::DESTROY => Request::Destroy,
        op::FORGET => Request::Forget(vec![(node, take::<ForgetIn>(body)?.0.nlookup.get())]),
        op::BATCH_FORGET => batch_forget(body)?,
        op::INTERRUPT => Request::Interrupt,
        op::GETATTR => Request::GetAttributes,
        op::SETATTR => set_attributes(take(body)?.0),
        op::STATFS => Request::FileSystem,
        op::LOOKUP..=op::LINK | op::RENAME2 => return parse_named(opcode, body),
        op::CREATE => {
            let (create, rest) = take::<CreateIn>(body)?;
            let flags = open_flags(create.flags.get())?;
            Request::Create { name: name(rest)?.0, mode: create.mode.get(), flags }
        }
        op::TMPFILE => {
            let (create, _) = take::<CreateIn>(body)?;
            Request::CreateUnnamed { mode: create.mode.get(), flags: open_flags(create.flags.get())? }
        }
        op::OPENDIR => Request::OpenDirectory,
        op::SYNCFS => Request::SyncFileSystem,
        op::SETXATTR..=op::REMOVEXATTR => return parse_extended(opcode, body),
        _ => return parse_opened(opcode, body),
    })
}

/// Requests with names.
fn parse_named(opcode: u32, body: &[u8]) -> Result<Request<'_>, Errno> {
    Ok(match opcode {
        op::LOOKUP => Request::Lookup(name(body)?.0),
        op::READLINK => Request::ReadLink,
        op::SYMLINK => {
            let (name, rest) = name(body)?;
            Request::Symlink { name, target: text(rest)?.0 }
        }
        op::MKNOD => {
            let (make, rest) = take::<MknodIn>(body)?;
            Request::MakeFile { name: name(rest)?.0, mode: make.mode.get() }
        }
        op::MKDIR => {
            let (make, rest) = take::<MkdirIn>(body)?;
            Request::MakeDirectory { name: name(rest)?.0, mode: make.mode.get() }
        }
        op::UNLINK => Request::Unlink(name(body)?.0),
        op::RMDIR => Request::RemoveDirectory(name(body)?.0),
        op::RENAME | op::RENAME2 => {
            let (to, flags, rest) = if opcode == op::RENAME {
                let (rename, rest) = take::<RenameIn>(body)?;
                (rename.newdir.get(), 0, rest)
            } else {
                let (rename, rest) = take::<Rename2In>(body)?;
                (rename.newdir.get(), rename.flags.get(), rest)
            };
            let (old, rest) = name(rest)?;
            Request::Rename { name: old, to, new: name(rest)?.0, flags }
        }
        op::LINK => {
            let (link, rest) = take::<LinkIn>(body)?;
            Request::Link { node: link.oldnodeid.get(), name: name(rest)?.0 }
        }
        _ => return Err(Errno::NOSYS),
    })
}

/// Requests about extended attributes.
fn parse_extended(opcode: u32, body: &[u8]) -> Result<Request<'_>, Errno> {
    Ok(match opcode {
        op::SETXATTR => {
            let (set, rest) = take::<SetxattrIn>(body)?;
            let (name, rest) = text(rest)?;
            let size = usize::try_from(set.size.get()).map_err(|_| Errno::TOOBIG)?;
            if size > MAX_EXTENDED {
                return Err(Errno::TOOBIG);
            }
            let value = rest.get(..size).ok_or(Errno::INVAL)?;
            Request::SetExtended { name: ExtendedName::new(name)?, value, flags: set.flags.get() }
        }
        op::GETXATTR => {
            let (get, rest) = take::<GetxattrIn>(body)?;
            Request::GetExtended { name: ExtendedName::new(text(rest)?.0)?, size: get.size.get() }
        }
        op::LISTXATTR => Request::ListExtended { size: take::<GetxattrIn>(body)?.0.size.get() },
        op::REMOVEXATTR => Request::RemoveExtended(ExtendedName::new(text(body)?.0)?),
        _ => return Err(Errno::NOSYS),
    })
}

/// Requests about files and directories that are open, or are to be.
fn parse_opened(opcode: u32, body: &[u8]) -> Result<Request<'_>, Errno> {
    Ok(match opcode {
        op::OPEN => Request::Open(open_flags(take::<OpenIn>(body)?.0.flags.get())?),
        op::READ => {
            let (read, _) = take::<ReadIn>(body)?;
            Request::Read { handle: read.fh.get(), offset: read.offset.get(), size: read.size.get() }
        }
        op::WRITE => {
            let (write, _) = take::<WriteIn>(body)?;
            let append = write.flags.get() & open::APPEND != 0 && write.write_flags.get() & WRITE_CACHE == 0;
            Request::Write { handle: write.fh.get(), offset: write.offset.get(), size: write.size.get(), append }
        }
        op::READDIR | op::READDIRPLUS => {
            let (read, _) = take::<ReadIn>(body)?;
            let (handle, offset, size) = (read.fh.get(), read.offset.get(), read.size.get());
            Request::ReadDirectory { handle, offset, size, plus: opcode == op::READDIRPLUS }
        }
        op::RELEASE => Request::Release { handle: take::<ReleaseIn>(body)?.0.fh.get() },
        op::RELEASEDIR => Request::ReleaseDirectory { handle: take::<ReleaseIn>(body)?.0.fh.get() },
        op::FSYNC => {
            let (sync, _) = take::<FsyncIn>(body)?;
            Request::Sync { handle: sync.fh.get(), data: sync.fsync_flags.get() & FSYNC_DATA != 0 }
        }
        op::FSYNCDIR => Request::SyncDirectory { handle: take::<FsyncIn>(body)?.0.fh.get() },
        op::FALLOCATE => {
            let (range, _) = take::<FallocateIn>(body)?;
            let mode = FallocateFlags::from_bits(range.mode.get()).ok_or(Errno::OPNOTSUPP)?;
            let (handle, offset, len) = (range.fh.get(), range.offset.get(), range.length.get());
            Request::Allocate { handle, offset, len, mode }
        }
        op::LSEEK => {
            let (seek, _) = take::<LseekIn>(body)?;
            let hole = match seek.whence.get() {
                SEEK_DATA => false,
                SEEK_HOLE => true,
                _ => return Err(Errno::INVAL),
            };
            Request::Seek { handle: seek.fh.get(), offset: seek.offset.get(), hole }
        }
        op::COPY_FILE_RANGE => {
            let (copy, _) = take::<CopyFileRangeIn>(body)?;
            let to = (copy.nodeid_out.get(), copy.fh_out.get(), copy.off_out.get());
            Request::Copy { handle: copy.fh_in.get(), offset: copy.off_in.get(), to, len: copy.len.get() }
        }
        _ => return Err(Errno::NOSYS),
    })
}

fn take<T: FromBytes + Immutable + KnownLayout + Unaligned>(bytes: &[u8]) -> Result<(&T, &[u8]), Errno> {
    T::ref_from_prefix(bytes).map_err(|_| Errno::INVAL)
}

/// Bytes up to a zero byte, and what is behind it.
fn text(bytes: &[u8]) -> Result<(&[u8], &[u8]), Errno> {
    let end = bytes.iter().position(|byte| *byte == 0).ok_or(Errno::INVAL)?;
    let (text, rest) = bytes.split_at_checked(end).ok_or(Errno::INVAL)?;
    Ok((text, rest.get(1..).unwrap_or_default()))
}

fn name(bytes: &[u8]) -> Result<(Name, &[u8]), Errno> {
    let (text, rest) = text(bytes)?;
    Ok((Name::new(text)?, rest))
}

fn batch_forget(body: &[u8]) -> Result<Request<'_>, Errno> {
    let (batch, rest) = take::<BatchForgetIn>(body)?;
    let count = usize::try_from(batch.count.get()).map_err(|_| Errno::INVAL)?;
    let forgets = rest.chunks_exact(size_of::<ForgetOne>()).take(count).map(|one| {
        let (one, _) = take::<ForgetOne>(one)?;
        Ok((one.nodeid.get(), one.nlookup.get()))
    });
    Ok(Request::Forget(forgets.collect::<Result<_, Errno>>()?))
}

fn set_attributes(set: &SetattrIn) -> Request<'static> {
    let given = |bit: u32| set.valid.get() & bit != 0;
    let time = |bit, now, seconds: u64, nanoseconds| {
        let time = Time { seconds: seconds.cast_signed(), nanoseconds };
        given(bit).then(|| (!given(now)).then_some(time))
    };
    let change = Change {
        mode: given(valid::MODE).then(|| set.mode.get()),
        size: given(valid::SIZE).then(|| set.size.get()),
        accessed: time(valid::ATIME, valid::ATIME_NOW, set.atime.get(), set.atimensec.get()),
        modified: time(valid::MTIME, valid::MTIME_NOW, set.mtime.get(), set.mtimensec.get()),
    };
    let owner = (given(valid::UID).then(|| set.uid.get()), given(valid::GID).then(|| set.gid.get()));
    Request::SetAttributes { handle: given(valid::FH).then(|| set.fh.get()), change, owner }
}

fn open_flags(flags: u32) -> Result<OpenFlags, Errno> {
    let (read, write) = match flags & open::ACCESS {
        0 => (true, false),
        open::WRITE => (false, true),
        open::READ_WRITE => (true, true),
        _ => return Err(Errno::INVAL),
    };
    Ok(OpenFlags {
        read,
        write,
        truncate: flags & open::TRUNCATE != 0,
        exclusive: flags & open::EXCLUSIVE != 0,
        data_sync: flags & open::DATA_SYNC != 0,
        sync: flags & open::SYNC == open::SYNC,
    })
}
