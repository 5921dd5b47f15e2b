//! The tree that one guest sees: names, and what they lead to.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, RenameFlags, StatVfs, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, chmodat,
    fstatvfs, linkat, mkdirat, mknodat, readlinkat, renameat_with, symlinkat, syncfs, unlinkat, utimensat,
};
use rustix::io::Errno;
use rustix::process::{Resource, geteuid, getrlimit};

use crate::attributes::{Attributes, Change, Kind, PERMISSIONS, SET_ID, SPECIAL, Time};
use crate::files::Handles;
use crate::grants::{Grant, Grants};
use crate::host::{self, Name, Proc};
use crate::nodes::{Node, Nodes};

/// The number of the root.
pub const ROOT: u64 = 1;

/// Nodes at a time, each with a descriptor.
pub const MAX_NODES: usize = 65_536;
/// Open files at a time.
pub const MAX_FILES: usize = 8192;
/// Open directories at a time.
pub const MAX_DIRECTORIES: usize = 1024;
/// Bytes of a symbolic link's target (PATH_MAX without its zero byte).
const MAX_TARGET: usize = 4095;

/// Why there is no tree.
#[derive(Debug, thiserror::Error)]
pub enum TreeError {
    /// There is no /proc, or the kernel is too old.
    #[error("cannot open /proc/self/fd: {0}; it needs a mounted /proc and Linux 5.6")]
    Proc(Errno),
}

/// How many descriptors a guest may have the process hold.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    pub nodes: usize,
    pub files: usize,
    pub directories: usize,
}

impl Limits {
    /// At most an eighth of the process' descriptors: of several such devices all together leave some to the others.
    fn of_process() -> Self {
        let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        let share = |parts: u64, max: usize| usize::try_from(limit / 64 * parts).unwrap_or(max).min(max);
        Self { nodes: share(5, MAX_NODES), files: share(2, MAX_FILES), directories: share(1, MAX_DIRECTORIES) }
    }
}

/// What one guest sees. Every method but [`Tree::forget_revoked`] and [`Tree::clear`] carries out a guest's request, and
/// answers with the error number that the guest is to get. `ESTALE`: there is no such node any more.
#[derive(Debug)]
pub struct Tree {
    grants: Grants,
    pub(crate) nodes: Nodes,
    pub(crate) handles: Handles,
    pub(crate) proc: Proc,
    pub(crate) limits: Limits,
    /// Who serves the guest.
    user: u32,
    /// The next number of a node or handle. None is used twice, also not after a restore: a guest may know old ones.
    next: u64,
}

/// A file a guest was told of, for it to forget later.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Found {
    /// Its node.
    pub node: u64,
    /// What it is.
    pub attributes: Attributes,
}

impl Tree {
    /// A tree with the grants of `grants`. Nodes and handles have numbers from `first` on.
    ///
    /// # Errors
    /// See [`TreeError`].
    pub fn new(grants: Grants, first: u64) -> Result<Self, TreeError> {
        Ok(Self {
            grants,
            nodes: Nodes::default(),
            handles: Handles::default(),
            proc: Proc::new().map_err(TreeError::Proc)?,
            limits: Limits::of_process(),
            user: geteuid().as_raw(),
            next: first.max(ROOT + 1),
        })
    }

    /// The lowest number that no node or handle ever had.
    #[must_use]
    pub fn next_number(&self) -> u64 {
        self.next
    }

    /// Becomes readable when [`Tree::forget_revoked`] has something to do.
    #[must_use]
    pub fn revocations(&self) -> BorrowedFd<'_> {
        self.grants.as_fd()
    }

    /// Closes what belongs to grants that were taken back.
    pub fn forget_revoked(&mut self) {
        self.grants.hear_revocations();
        self.nodes.forget_revoked();
        self.handles.forget_revoked();
    }

    /// Closes everything: the guest's session ended.
    pub fn clear(&mut self) {
        self.nodes.clear();
        self.handles.clear();
    }

    /// Number of nodes and of handles the guest has.
    #[must_use]
    pub fn in_use(&self) -> (usize, usize) {
        (self.nodes.len(), self.handles.len())
    }

    pub(crate) fn number(&mut self) -> Result<u64, Errno> {
        let number = self.next;
        self.next = number.checked_add(1).ok_or(Errno::NFILE)?;
        Ok(number)
    }

    /// A node, whose grant is not revoked. The root is none.
    pub(crate) fn node(&self, id: u64) -> Result<&Node, Errno> {
        self.nodes.get(id)
    }

    /// A directory in which entries are to change.
    fn writable_directory(&self, id: u64) -> Result<(BorrowedFd<'_>, &Arc<Grant>), Errno> {
        if id == ROOT {
            return Err(Errno::ROFS);
        }
        let node = self.node(id)?;
        node.grant.check_writable()?;
        Ok((node.directory()?, &node.grant))
    }

    /// Tells the guest of `fd`.
    pub(crate) fn tell(&mut self, grant: &Arc<Grant>, fd: Arc<OwnedFd>) -> Result<Found, Errno> {
        let (stat, kind) = host::examine(fd.as_fd())?;
        if kind == Kind::Other {
            return Err(Errno::ACCESS);
        }
        let attributes = Attributes::seen_by(&stat, self.user, grant.number);
        let id = self.number()?;
        let node = self.nodes.tell(grant, fd, &stat, kind, id);
        if self.nodes.len() > self.limits.nodes {
            self.nodes.forget(node, 1);
            return Err(Errno::NFILE);
        }
        Ok(Found { node, attributes })
    }

    /// The entry `name` of a directory.
    ///
    /// # Errors
    /// As openat2(2); `EACCES` for a device, pipe or socket, and for what another file system is mounted on.
    pub fn lookup(&mut self, parent: u64, name: &Name) -> Result<Found, Errno> {
        if parent == ROOT {
            let grant = self.grants.find(name).ok_or(Errno::NOENT)?;
            return self.tell(&grant, grant.root.clone());
        }
        let node = self.node(parent)?;
        let (grant, fd) = (node.grant.clone(), host::child(node.directory()?, name)?);
        self.tell(&grant, Arc::new(fd))
    }

    /// The guest forgets `count` of the times it was told of a node.
    pub fn forget(&mut self, node: u64, count: u64) {
        self.nodes.forget(node, count);
    }

    /// What a node is.
    ///
    /// # Errors
    /// `ESTALE`, or as statx(2).
    pub fn attributes(&self, id: u64) -> Result<Attributes, Errno> {
        if id == ROOT {
            return Ok(Attributes::ROOT);
        }
        let node = self.node(id)?;
        let (stat, _) = host::examine(node.fd.as_fd())?;
        Ok(Attributes::seen_by(&stat, self.user, node.grant.number))
    }

    /// Changes attributes; `handle` is an open file of the node, if the guest names one.
    ///
    /// # Errors
    /// As chmod(2), ftruncate(2) and utimensat(2).
    pub fn change(&mut self, id: u64, handle: Option<u64>, change: &Change) -> Result<Attributes, Errno> {
        if id == ROOT {
            return Err(Errno::ROFS);
        }
        let node = self.node(id)?;
        node.grant.check_writable()?;
        let fd = node.fd.clone();
        if let Some(mode) = change.mode {
            if node.kind == Kind::Link {
                return Err(Errno::OPNOTSUPP);
            }
            let (stat, _) = host::examine(fd.as_fd())?;
            let now = u32::from(stat.stx_mode);
            if node.kind == Kind::File && now & SET_ID != 0 {
                return Err(Errno::PERM);
            }
            // What the guest does not see stays.
            let mode = Mode::from_raw_mode(mode & PERMISSIONS | now & SPECIAL);
            let (dir, name) = self.proc.path(fd.as_fd());
            chmodat(dir, name.as_c_str(), mode, AtFlags::empty())?;
        }
        if let Some(size) = change.size {
            self.truncate(id, handle, size)?;
        }
        if change.accessed.is_some() || change.modified.is_some() {
            let times =
                Timestamps { last_access: timespec(change.accessed), last_modification: timespec(change.modified) };
            utimensat(fd.as_fd(), c"", &times, AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW)?;
        }
        self.attributes(id)
    }

    /// The target of a symbolic link, for the guest to follow in its own tree.
    ///
    /// # Errors
    /// `EINVAL` if it is none.
    pub fn target(&self, id: u64) -> Result<Vec<u8>, Errno> {
        let node = if id == ROOT { return Err(Errno::INVAL) } else { self.node(id)? };
        if node.kind != Kind::Link {
            return Err(Errno::INVAL);
        }
        Ok(readlinkat(node.fd.as_fd(), c"", Vec::new())?.into_bytes())
    }

    /// Makes a symbolic link with any target.
    ///
    /// # Errors
    /// As symlinkat(2).
    pub fn make_link(&mut self, parent: u64, name: &Name, target: &[u8]) -> Result<Found, Errno> {
        let (dir, _) = self.writable_directory(parent)?;
        if target.len() > MAX_TARGET {
            return Err(Errno::NAMETOOLONG);
        }
        symlinkat(target, dir, name.as_c_str())?;
        self.lookup(parent, name)
    }

    /// Makes a directory.
    ///
    /// # Errors
    /// As mkdirat(2).
    pub fn make_directory(&mut self, parent: u64, name: &Name, mode: u32) -> Result<Found, Errno> {
        let (dir, _) = self.writable_directory(parent)?;
        mkdirat(dir, name.as_c_str(), Mode::from_raw_mode(mode & PERMISSIONS))?;
        self.lookup(parent, name)
    }

    /// Makes a regular file, as mknod(2).
    ///
    /// # Errors
    /// As mknodat(2); `EPERM` if `mode` asks for a device, pipe or socket.
    pub fn make_file(&mut self, parent: u64, name: &Name, mode: u32) -> Result<Found, Errno> {
        let (dir, _) = self.writable_directory(parent)?;
        if Kind::of(mode) != Kind::File {
            return Err(Errno::PERM);
        }
        mknodat(dir, name.as_c_str(), FileType::RegularFile, Mode::from_raw_mode(mode & PERMISSIONS), 0)?;
        self.lookup(parent, name)
    }

    /// Removes an entry: a directory, or anything else.
    ///
    /// # Errors
    /// As unlinkat(2); `EROFS` for a grant.
    pub fn remove(&mut self, parent: u64, name: &Name, directory: bool) -> Result<(), Errno> {
        let (dir, _) = self.writable_directory(parent)?;
        unlinkat(dir, name.as_c_str(), if directory { AtFlags::REMOVEDIR } else { AtFlags::empty() })
    }

    /// Renames an entry, within one grant.
    ///
    /// # Errors
    /// As renameat2(2); `EXDEV` between grants, `EINVAL` for flags other than NOREPLACE and EXCHANGE.
    pub fn rename(&mut self, from: (u64, &Name), to: (u64, &Name), flags: u32) -> Result<(), Errno> {
        let flags = RenameFlags::from_bits(flags).filter(|f| !f.contains(RenameFlags::WHITEOUT));
        let flags = flags.filter(|f| (RenameFlags::NOREPLACE | RenameFlags::EXCHANGE).contains(*f));
        let flags = flags.ok_or(Errno::INVAL)?;
        let (old, grant) = self.writable_directory(from.0)?;
        let (new, other) = self.writable_directory(to.0)?;
        if grant.number != other.number {
            return Err(Errno::XDEV);
        }
        renameat_with(old, from.1.as_c_str(), new, to.1.as_c_str(), flags)
    }

    /// Gives a file another name in the same grant.
    ///
    /// # Errors
    /// As linkat(2); `EXDEV` between grants, `EPERM` for a directory.
    pub fn link(&mut self, id: u64, parent: u64, name: &Name) -> Result<Found, Errno> {
        let (dir, grant) = self.writable_directory(parent)?;
        let node = if id == ROOT { return Err(Errno::PERM) } else { self.node(id)? };
        if node.grant.number != grant.number {
            return Err(Errno::XDEV);
        }
        if node.kind == Kind::Directory {
            return Err(Errno::PERM);
        }
        let (source, number) = self.proc.path(node.fd.as_fd());
        linkat(source, number.as_c_str(), dir, name.as_c_str(), AtFlags::SYMLINK_FOLLOW)?;
        self.lookup(parent, name)
    }

    /// The file system a node is on; nothing for the root, which is on none.
    ///
    /// # Errors
    /// As fstatvfs(3).
    pub fn file_system(&self, id: u64) -> Result<Option<StatVfs>, Errno> {
        if id == ROOT {
            return Ok(None);
        }
        fstatvfs(&*self.node(id)?.fd).map(Some)
    }

    /// Has the host write to its disks what is in the file systems that a guest may write to, other people's data included.
    ///
    /// # Errors
    /// As syncfs(2).
    pub fn sync_file_systems(&self) -> Result<(), Errno> {
        let (mut number, mut done) = (0, BTreeSet::new());
        while let Some(grant) = self.grants.after(number) {
            number = grant.number;
            let (stat, kind) = host::examine(grant.root.as_fd())?;
            if !grant.writable || !done.insert((stat.stx_dev_major, stat.stx_dev_minor)) {
                continue;
            }
            match kind {
                Kind::Directory => syncfs(host::open_directory(grant.root.as_fd())?)?,
                _ if grant.opened != (false, false) => syncfs(&*grant.root)?,
                _ => syncfs(self.proc.open(grant.root.as_fd(), OFlags::WRONLY)?)?,
            }
        }
        Ok(())
    }

    /// The first grant behind number `after`.
    pub(crate) fn grant_after(&self, after: u64) -> Option<Arc<Grant>> {
        self.grants.after(after)
    }

    /// Opens a regular file as `flags` say. A file that runs with its owner's rights is not opened for writing.
    pub(crate) fn open_node(&self, node: &Node, flags: OFlags) -> Result<Arc<OwnedFd>, Errno> {
        match node.kind {
            Kind::File => {}
            Kind::Directory => return Err(Errno::ISDIR),
            _ => return Err(Errno::LOOP),
        }
        let access = flags & OFlags::RWMODE;
        let (reads, writes) = (access != OFlags::WRONLY, access != OFlags::RDONLY);
        if writes || flags.contains(OFlags::TRUNC) {
            node.grant.check_writable()?;
            let (stat, _) = host::examine(node.fd.as_fd())?;
            if u32::from(stat.stx_mode) & SET_ID != 0 {
                return Err(Errno::PERM);
            }
        }
        let opened = node.grant.opened;
        if node.is_grant() && (opened.0 || !reads) && (opened.1 || !writes) && (reads || writes) {
            if flags.contains(OFlags::TRUNC) {
                rustix::fs::ftruncate(&*node.fd, 0)?;
            }
            return Ok(node.fd.clone());
        }
        self.proc.open(node.fd.as_fd(), flags).map(Arc::new)
    }

    /// Tells the guest of a file that was just made and is open.
    pub(crate) fn tell_opened(&mut self, grant: &Arc<Grant>, file: &OwnedFd) -> Result<Found, Errno> {
        let reference = self.proc.reference(file.as_fd())?;
        self.tell(grant, Arc::new(reference))
    }
}

fn timespec(change: Option<Option<Time>>) -> Timespec {
    match change {
        None => Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        Some(None) => Timespec { tv_sec: 0, tv_nsec: UTIME_NOW },
        // A guest must not say one of the two special values.
        Some(Some(time)) => Timespec { tv_sec: time.seconds, tv_nsec: time.nanoseconds.min(999_999_999).into() },
    }
}
