//! Open files and directories.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{
    FallocateFlags, Mode, OFlags, SeekFrom, copy_file_range, fallocate, fdatasync, fstat, fsync, ftruncate, seek,
};
use rustix::io::Errno;
use vm_memory::VolatileSlice;

use crate::attributes::{Kind, PERMISSIONS};
use crate::grants::Grant;
use crate::host::{self, Name};
use crate::transfer::transfer;
use crate::tree::{Found, ROOT, Tree};

/// Bytes that one [`Tree::copy`] copies, so that it ends soon.
const MAX_COPY: usize = 1 << 20;
/// Bytes that one [`Tree::allocate`] reserves or zeroes: on some file systems each page of them costs time.
const MAX_ALLOCATE: u64 = 64 << 30;

/// How a guest opens a file.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct OpenFlags {
    /// For reading.
    pub read: bool,
    /// For writing.
    pub write: bool,
    /// Its content goes.
    pub truncate: bool,
    /// It must not exist; for [`Tree::create`].
    pub exclusive: bool,
    /// Each write returns when the data is on the disk.
    pub data_sync: bool,
    /// Each write returns when data and attributes are on the disk.
    pub sync: bool,
}

impl OpenFlags {
    fn host(self) -> OFlags {
        let mut flags = match (self.read, self.write) {
            (true, true) => OFlags::RDWR,
            (false, true) => OFlags::WRONLY,
            _ => OFlags::RDONLY,
        };
        flags.set(OFlags::TRUNC, self.truncate);
        flags.set(OFlags::DSYNC, self.data_sync);
        if self.sync {
            flags |= OFlags::SYNC;
        }
        flags
    }
}

#[derive(Debug)]
pub(crate) struct File {
    grant: Arc<Grant>,
    fd: Arc<OwnedFd>,
    read: bool,
    write: bool,
    /// What is written is on the disk before the answer; only where `fd` does not see to it.
    sync: bool,
}

#[derive(Debug)]
pub(crate) enum Directory {
    /// The root, whose entries are the grants.
    Root,
    /// One beneath a grant.
    Host { grant: Arc<Grant>, fd: OwnedFd },
}

/// What a guest has open.
#[derive(Debug, Default)]
pub(crate) struct Handles {
    files: BTreeMap<u64, File>,
    directories: BTreeMap<u64, Directory>,
}

impl Handles {
    pub fn len(&self) -> usize {
        self.files.len() + self.directories.len()
    }

    pub fn clear(&mut self) {
        self.files.clear();
        self.directories.clear();
    }

    pub fn forget_revoked(&mut self) {
        self.files.retain(|_, file| !file.grant.is_revoked());
        self.directories.retain(|_, directory| match directory {
            Directory::Root => true,
            Directory::Host { grant, .. } => !grant.is_revoked(),
        });
    }

    fn file(&self, handle: u64) -> Result<&File, Errno> {
        let file = self.files.get(&handle).ok_or(Errno::BADF)?;
        file.grant.check()?;
        Ok(file)
    }

    pub fn directory(&self, handle: u64) -> Result<&Directory, Errno> {
        let directory = self.directories.get(&handle).ok_or(Errno::BADF)?;
        if let Directory::Host { grant, .. } = directory {
            grant.check()?;
        }
        Ok(directory)
    }
}

impl Tree {
    fn keep(&mut self, file: File) -> Result<u64, Errno> {
        if self.handles.files.len() >= self.limits.files {
            return Err(Errno::MFILE);
        }
        let handle = self.number()?;
        self.handles.files.insert(handle, file);
        Ok(handle)
    }

    /// An open file of this node, which must not be revoked.
    fn opened(&self, node: u64, handle: u64) -> Result<&File, Errno> {
        self.node(node)?;
        self.handles.file(handle)
    }

    fn readable(&self, node: u64, handle: u64) -> Result<&File, Errno> {
        let file = self.opened(node, handle)?;
        if file.read { Ok(file) } else { Err(Errno::BADF) }
    }

    fn writable(&self, node: u64, handle: u64) -> Result<&File, Errno> {
        let file = self.opened(node, handle)?;
        file.grant.check_writable()?;
        if file.write { Ok(file) } else { Err(Errno::BADF) }
    }

    /// Opens a regular file and returns a handle.
    ///
    /// # Errors
    /// As open(2); `EROFS` for writing in a read-only grant.
    pub fn open(&mut self, id: u64, flags: OpenFlags) -> Result<u64, Errno> {
        if id == ROOT {
            return Err(Errno::ISDIR);
        }
        let node = self.node(id)?;
        let fd = self.open_node(node, flags.host())?;
        let sync = Arc::ptr_eq(&fd, &node.fd) && (flags.sync || flags.data_sync);
        let file = File { grant: node.grant.clone(), fd, read: flags.read, write: flags.write, sync };
        self.keep(file)
    }

    /// Makes a regular file, or opens the one that is there, and returns it with a handle.
    ///
    /// # Errors
    /// As open(2).
    pub fn create(&mut self, parent: u64, name: &Name, mode: u32, flags: OpenFlags) -> Result<(Found, u64), Errno> {
        if parent == ROOT {
            return Err(Errno::ROFS);
        }
        let node = self.node(parent)?;
        node.grant.check_writable()?;
        let (grant, dir) = (node.grant.clone(), node.directory()?);
        match host::create(dir, name, flags.host(), Mode::from_raw_mode(mode & PERMISSIONS)) {
            Ok(fd) => self.keep_created(grant, fd, flags),
            // Opened as any file that exists: not before it is known what it is.
            Err(Errno::EXIST) if !flags.exclusive => {
                let found = self.lookup(parent, name)?;
                self.open(found.node, flags).map(|handle| (found, handle)).inspect_err(|_| self.forget(found.node, 1))
            }
            Err(e) => Err(e),
        }
    }

    /// Makes a regular file that has no name yet, and returns it with a handle.
    ///
    /// # Errors
    /// As open(2) with O_TMPFILE.
    pub fn create_unnamed(&mut self, parent: u64, mode: u32, flags: OpenFlags) -> Result<(Found, u64), Errno> {
        if parent == ROOT {
            return Err(Errno::ROFS);
        }
        let node = self.node(parent)?;
        node.grant.check_writable()?;
        let (grant, dir) = (node.grant.clone(), node.directory()?);
        let flags = OpenFlags { truncate: false, ..flags };
        let fd = host::temporary(dir, flags.host(), Mode::from_raw_mode(mode & PERMISSIONS))?;
        self.keep_created(grant, fd, flags)
    }

    fn keep_created(&mut self, grant: Arc<Grant>, fd: OwnedFd, flags: OpenFlags) -> Result<(Found, u64), Errno> {
        let found = self.tell_opened(&grant, &fd)?;
        let file = File { grant, fd: Arc::new(fd), read: flags.read, write: flags.write, sync: false };
        self.keep(file).map(|handle| (found, handle)).inspect_err(|_| self.forget(found.node, 1))
    }

    /// Reads from `offset` into guest memory; fewer bytes than there is room for at the end of the file only.
    ///
    /// # Errors
    /// As preadv(2).
    pub fn read(&self, node: u64, handle: u64, offset: u64, into: &[VolatileSlice<'_>]) -> Result<usize, Errno> {
        transfer(self.readable(node, handle)?.fd.as_fd(), offset, into, 0, libc::preadv2)
    }

    /// Writes guest memory at `offset`, or at the end of the file if `append`.
    ///
    /// # Errors
    /// As pwritev2(2).
    pub fn write(
        &self,
        node: u64,
        handle: u64,
        offset: u64,
        append: bool,
        from: &[VolatileSlice<'_>],
    ) -> Result<usize, Errno> {
        let file = self.writable(node, handle)?;
        let mut flags = if append { libc::RWF_APPEND } else { 0 };
        if file.sync {
            flags |= libc::RWF_SYNC;
        }
        transfer(file.fd.as_fd(), offset, from, flags, libc::pwritev2)
    }

    /// Returns when what was written is on the disk; `data`: attributes need not be.
    ///
    /// # Errors
    /// As fsync(2).
    pub fn sync(&self, node: u64, handle: u64, data: bool) -> Result<(), Errno> {
        let file = self.opened(node, handle)?;
        if data { fdatasync(&*file.fd) } else { fsync(&*file.fd) }
    }

    /// Sets the length of a file.
    pub(crate) fn truncate(&self, id: u64, handle: Option<u64>, size: u64) -> Result<(), Errno> {
        if i64::try_from(size).is_err() {
            return Err(Errno::FBIG);
        }
        match handle {
            Some(handle) => ftruncate(&*self.writable(id, handle)?.fd, size),
            None => ftruncate(&*self.open_node(self.node(id)?, OFlags::WRONLY)?, size),
        }
    }

    /// Closes a file. A handle that is not there any more is no error.
    pub fn release(&mut self, handle: u64) {
        self.handles.files.remove(&handle);
    }

    /// Reserves or zeroes a range.
    ///
    /// # Errors
    /// As fallocate(2); `EOPNOTSUPP` for modes that move what is behind the range, `EFBIG` for more than 64 GiB at once.
    pub fn allocate(&self, node: u64, handle: u64, offset: u64, len: u64, mode: FallocateFlags) -> Result<(), Errno> {
        let allowed = FallocateFlags::KEEP_SIZE | FallocateFlags::PUNCH_HOLE | FallocateFlags::ZERO_RANGE;
        let file = self.writable(node, handle)?;
        if !allowed.contains(mode) {
            return Err(Errno::OPNOTSUPP);
        }
        if len > MAX_ALLOCATE && !mode.contains(FallocateFlags::PUNCH_HOLE) {
            return Err(Errno::FBIG);
        }
        fallocate(&*file.fd, mode, offset, len)
    }

    /// The next data (or hole) of a file from `offset` on.
    ///
    /// # Errors
    /// As lseek(2) with SEEK_DATA and SEEK_HOLE.
    pub fn seek(&self, node: u64, handle: u64, offset: u64, hole: bool) -> Result<u64, Errno> {
        let file = self.opened(node, handle)?;
        if i64::try_from(offset).is_err() {
            return Err(Errno::NXIO);
        }
        // An open file that was handed in has its offset in common with whoever granted it: it stays where it is.
        if Arc::ptr_eq(&file.fd, &file.grant.root) {
            let size = u64::try_from(fstat(&*file.fd)?.st_size).unwrap_or(0);
            return match offset < size {
                true => Ok(if hole { size } else { offset }),
                false => Err(Errno::NXIO),
            };
        }
        seek(&*file.fd, if hole { SeekFrom::Hole(offset) } else { SeekFrom::Data(offset) })
    }

    /// Copies `len` bytes or fewer from one file (node, handle, offset) to another; returns how many.
    ///
    /// # Errors
    /// As copy_file_range(2).
    pub fn copy(&self, from: (u64, u64, u64), to: (u64, u64, u64), len: u64) -> Result<usize, Errno> {
        let (source, target) = (self.readable(from.0, from.1)?, self.writable(to.0, to.1)?);
        let len = usize::try_from(len).unwrap_or(MAX_COPY).min(MAX_COPY);
        let (mut read, mut written) = (from.2, to.2);
        copy_file_range(&*source.fd, Some(&mut read), &*target.fd, Some(&mut written), len)
    }

    /// Opens a directory and returns a handle.
    ///
    /// # Errors
    /// As open(2).
    pub fn open_directory(&mut self, id: u64) -> Result<u64, Errno> {
        if self.handles.directories.len() >= self.limits.directories {
            return Err(Errno::MFILE);
        }
        let directory = if id == ROOT {
            Directory::Root
        } else {
            let node = self.node(id)?;
            if node.kind != Kind::Directory {
                return Err(Errno::NOTDIR);
            }
            Directory::Host { grant: node.grant.clone(), fd: host::open_directory(node.fd.as_fd())? }
        };
        let handle = self.number()?;
        self.handles.directories.insert(handle, directory);
        Ok(handle)
    }

    /// Returns when a directory's entries are on the disk.
    ///
    /// # Errors
    /// As fsync(2).
    pub fn sync_directory(&self, handle: u64) -> Result<(), Errno> {
        match self.handles.directory(handle)? {
            Directory::Root => Ok(()),
            Directory::Host { fd, .. } => fsync(fd),
        }
    }

    /// Closes a directory. A handle that is not there any more is no error.
    pub fn release_directory(&mut self, handle: u64) {
        self.handles.directories.remove(&handle);
    }
}
