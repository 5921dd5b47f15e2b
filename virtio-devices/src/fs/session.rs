//! A FUSE session: carries out what [`super::parse`] understood, on the tree of grants.

use passthrough::tree::Found;
use passthrough::{Attributes, Entry, Errno, Name, Time, Tree};
use zerocopy::IntoBytes;

use super::parse::{Owner, Request};
use super::protocol::{
    Attr, AttrOut, Dirent, EntryOut, GetxattrOut, InitOut, LseekOut, MAJOR, MINOR, OLDEST_MINOR, OpenOut, StatfsOut,
    WriteOut, init,
};

/// Bytes of one READ or WRITE.
pub const MAX_TRANSFER: u32 = 1 << 20;
/// Bytes of one answer with entries of a directory.
const MAX_LIST: usize = 64 << 10;
/// Bytes of a page, the unit of the driver's requests.
const PAGE: u32 = 4096;
/// Requests the driver has under way in the background (read-ahead).
const MAX_BACKGROUND: u16 = 64;
/// Seconds for which the driver may rely on names and attributes; what the host changes is seen after that. A grant that was taken back
/// is no longer served in any case: who opens it by a name that was known is told ESTALE, and Linux looks the name up again.
const VALID: u64 = 1;
/// Bytes of the longest name (NAME_MAX).
const NAME_MAX: u32 = 255;

/// What of a driver's offer is accepted. No WRITEBACK_CACHE: what is written is the host's at once. No locks: they stay
/// the guest's own. HANDLE_KILLPRIV_V2: there is nothing to take away from a file that is written, since one with the rights of
/// its owner is not opened for that; without it the driver asks for capabilities before each write.
const ACCEPTED: u32 = init::ASYNC_READ
    | init::ATOMIC_O_TRUNC
    | init::BIG_WRITES
    | init::AUTO_INVAL_DATA
    | init::DO_READDIRPLUS
    | init::READDIRPLUS_AUTO
    | init::ASYNC_DIO
    | init::PARALLEL_DIROPS
    | init::MAX_PAGES
    | init::HANDLE_KILLPRIV_V2;

/// An answer, apart from its header.
#[derive(Debug)]
pub enum Reply {
    /// These bytes.
    Bytes(Vec<u8>),
    /// None at all.
    Silence,
}

impl Reply {
    fn of(value: &(impl IntoBytes + zerocopy::Immutable)) -> Self {
        Self::Bytes(value.as_bytes().to_vec())
    }

    const EMPTY: Self = Self::Bytes(Vec::new());
}

/// One guest's session.
#[derive(Debug)]
pub struct Session {
    /// The grants, and what the guest knows of them.
    pub tree: Tree,
    /// The driver has sent INIT, and no DESTROY since.
    pub begun: bool,
    /// User and group to whom everything belongs, in the guest's numbers.
    owner: (u32, u32),
}

impl Session {
    /// A session of which the driver has heard if it has `begun`, in a snapshot.
    pub fn new(tree: Tree, begun: bool, owner: (u32, u32)) -> Self {
        Self { tree, begun, owner }
    }

    /// Ends the session.
    pub fn end(&mut self) {
        self.tree.clear();
        self.begun = false;
    }

    /// Refuses everything before INIT.
    ///
    /// # Errors
    /// `EIO`.
    pub fn check_begun(&self) -> Result<(), Errno> {
        if self.begun { Ok(()) } else { Err(Errno::IO) }
    }

    /// Carries out a request about `node`. READ and WRITE are the device's, which has the data.
    ///
    /// # Errors
    /// What the driver gets as an answer.
    pub fn handle(&mut self, node: u64, request: Request<'_>) -> Result<Reply, Errno> {
        match request {
            Request::Init { major, minor, max_readahead, flags } => self.init(major, minor, max_readahead, flags),
            Request::Destroy => {
                self.end();
                Ok(Reply::EMPTY)
            }
            Request::Forget(all) => {
                all.into_iter().for_each(|(node, count)| self.tree.forget(node, count));
                Ok(Reply::Silence)
            }
            Request::Interrupt => Ok(Reply::Silence),
            request => {
                self.check_begun()?;
                self.named(node, request)
            }
        }
    }

    fn init(&mut self, major: u32, minor: u32, max_readahead: u32, flags: u32) -> Result<Reply, Errno> {
        let mut out = InitOut { major: MAJOR.into(), minor: MINOR.into(), ..InitOut::default() };
        if major > MAJOR {
            // The driver is to try again with this version.
            return Ok(Reply::of(&out));
        }
        if major < MAJOR || minor < OLDEST_MINOR {
            return Err(Errno::PROTO);
        }
        self.tree.clear();
        self.begun = true;
        out.max_readahead = max_readahead.min(MAX_TRANSFER).into();
        out.flags = (flags & ACCEPTED).into();
        out.max_background = MAX_BACKGROUND.into();
        out.congestion_threshold = (MAX_BACKGROUND / 4 * 3).into();
        out.max_write = MAX_TRANSFER.into();
        out.time_gran = 1.into();
        out.max_pages = u16::try_from(MAX_TRANSFER / PAGE).unwrap_or(u16::MAX).into();
        Ok(Reply::of(&out))
    }

    /// Requests about names and attributes.
    fn named(&mut self, node: u64, request: Request<'_>) -> Result<Reply, Errno> {
        let tree = &mut self.tree;
        let found = match request {
            Request::Lookup(name) => tree.lookup(node, &name)?,
            Request::Symlink { name, target } => tree.make_link(node, &name, target)?,
            Request::MakeFile { name, mode } => tree.make_file(node, &name, mode)?,
            Request::MakeDirectory { name, mode } => tree.make_directory(node, &name, mode)?,
            Request::Link { node: from, name } => tree.link(from, node, &name)?,
            Request::GetAttributes => {
                let attributes = tree.attributes(node)?;
                return Ok(attributes_out(self.owner, &attributes));
            }
            Request::SetAttributes { handle, change, owner } => {
                self.check_owner(owner)?;
                let attributes = self.tree.change(node, handle, &change)?;
                return Ok(attributes_out(self.owner, &attributes));
            }
            Request::ReadLink => return tree.target(node).map(Reply::Bytes),
            Request::Unlink(name) => return tree.remove(node, &name, false).map(|()| Reply::EMPTY),
            Request::RemoveDirectory(name) => return tree.remove(node, &name, true).map(|()| Reply::EMPTY),
            Request::Rename { name, to, new, flags } => {
                return tree.rename((node, &name), (to, &new), flags).map(|()| Reply::EMPTY);
            }
            Request::FileSystem => return self.file_system(node),
            Request::SyncFileSystem => return tree.sync_file_systems().map(|()| Reply::EMPTY),
            request => return self.opened(node, request),
        };
        Ok(Reply::of(&entry_out(self.owner, &found)))
    }

    /// Requests about what is open.
    fn opened(&mut self, node: u64, request: Request<'_>) -> Result<Reply, Errno> {
        let tree = &mut self.tree;
        match request {
            Request::Open(flags) => Ok(handle(tree.open(node, flags)?)),
            Request::Create { name, mode, flags } => {
                let created = tree.create(node, &name, mode, flags)?;
                Ok(self.created(created))
            }
            Request::CreateUnnamed { mode, flags } => {
                let created = tree.create_unnamed(node, mode, flags)?;
                Ok(self.created(created))
            }
            Request::OpenDirectory => Ok(handle(tree.open_directory(node)?)),
            Request::ReadDirectory { handle, offset, size, plus } => {
                self.list(node, handle, offset, size, plus).map(Reply::Bytes)
            }
            Request::Release { handle } => {
                tree.release(handle);
                Ok(Reply::EMPTY)
            }
            Request::ReleaseDirectory { handle } => {
                tree.release_directory(handle);
                Ok(Reply::EMPTY)
            }
            Request::Sync { handle, data } => tree.sync(node, handle, data).map(|()| Reply::EMPTY),
            Request::SyncDirectory { handle } => tree.sync_directory(handle).map(|()| Reply::EMPTY),
            Request::Allocate { handle, offset, len, mode } => {
                tree.allocate(node, handle, offset, len, mode).map(|()| Reply::EMPTY)
            }
            Request::Seek { handle, offset, hole } => {
                let offset = tree.seek(node, handle, offset, hole)?;
                Ok(Reply::of(&LseekOut { offset: offset.into() }))
            }
            Request::Copy { handle, offset, to, len } => tree.copy((node, handle, offset), to, len).map(written),
            request => self.extended(node, request),
        }
    }

    /// Requests about extended attributes.
    fn extended(&mut self, node: u64, request: Request<'_>) -> Result<Reply, Errno> {
        let tree = &self.tree;
        match request {
            Request::GetExtended { name, size } => fitting(tree.extended(node, &name)?, size),
            Request::ListExtended { size } => fitting(tree.list_extended(node)?, size),
            Request::SetExtended { name, value, flags } => {
                tree.set_extended(node, &name, value, flags).map(|()| Reply::EMPTY)
            }
            Request::RemoveExtended(name) => tree.remove_extended(node, &name).map(|()| Reply::EMPTY),
            _ => Err(Errno::NOSYS),
        }
    }

    fn created(&self, (found, handle): (Found, u64)) -> Reply {
        let mut bytes = entry_out(self.owner, &found).as_bytes().to_vec();
        bytes.extend_from_slice(open_out(handle).as_bytes());
        Reply::Bytes(bytes)
    }

    /// Everything belongs to one user, and nobody can give it to another.
    fn check_owner(&self, owner: Owner) -> Result<(), Errno> {
        let (uid, gid) = owner;
        let same = uid.is_none_or(|uid| uid == self.owner.0) && gid.is_none_or(|gid| gid == self.owner.1);
        if same { Ok(()) } else { Err(Errno::PERM) }
    }

    fn file_system(&self, node: u64) -> Result<Reply, Errno> {
        let mut out =
            StatfsOut { bsize: PAGE.into(), frsize: PAGE.into(), namelen: NAME_MAX.into(), ..StatfsOut::default() };
        if let Some(stat) = self.tree.file_system(node)? {
            out.blocks = stat.f_blocks.into();
            out.bfree = stat.f_bfree.into();
            out.bavail = stat.f_bavail.into();
            out.files = stat.f_files.into();
            out.ffree = stat.f_ffree.into();
            out.bsize = u32::try_from(stat.f_bsize).unwrap_or(PAGE).into();
            out.frsize = u32::try_from(stat.f_frsize).unwrap_or(PAGE).into();
        }
        Ok(Reply::of(&out))
    }

    fn list(&mut self, node: u64, handle: u64, offset: u64, size: u32, plus: bool) -> Result<Vec<u8>, Errno> {
        let room = usize::try_from(size).unwrap_or(MAX_LIST).min(MAX_LIST);
        let (mut bytes, mut full) = (Vec::new(), false);
        let owner = self.owner;
        let fixed = size_of::<Dirent>() + if plus { size_of::<EntryOut>() } else { 0 };
        // About as many as fit: an entry of the host's takes as much as ours without attributes.
        let batch = room / if plus { fixed / size_of::<Dirent>() } else { 1 };
        self.tree.entries(handle, offset, batch, |tree, entry| {
            let len = (fixed + entry.name.len()).next_multiple_of(8);
            full = bytes.len() + len > room;
            if full {
                return false;
            }
            if plus {
                bytes.extend_from_slice(look(tree, owner, node, &entry).as_bytes());
            }
            let dirent = Dirent {
                ino: entry.ino.into(),
                off: entry.next.into(),
                namelen: u32::try_from(entry.name.len()).unwrap_or(NAME_MAX).into(),
                kind: entry.kind.into(),
            };
            bytes.extend_from_slice(dirent.as_bytes());
            bytes.extend_from_slice(&entry.name);
            bytes.resize(bytes.len().next_multiple_of(8), 0);
            true
        })?;
        // Nothing at all would be the end of the directory.
        if full && bytes.is_empty() { Err(Errno::INVAL) } else { Ok(bytes) }
    }
}

fn attr(owner: (u32, u32), a: &Attributes) -> Attr {
    let seconds = |time: Time| time.seconds.cast_unsigned().into();
    Attr {
        ino: a.ino.into(),
        size: a.size.into(),
        blocks: a.blocks.into(),
        atime: seconds(a.accessed),
        mtime: seconds(a.modified),
        ctime: seconds(a.changed),
        atimensec: a.accessed.nanoseconds.into(),
        mtimensec: a.modified.nanoseconds.into(),
        ctimensec: a.changed.nanoseconds.into(),
        mode: a.mode.into(),
        nlink: a.links.into(),
        uid: owner.0.into(),
        gid: owner.1.into(),
        blksize: a.block_size.into(),
        ..Attr::default()
    }
}

fn attributes_out(owner: (u32, u32), attributes: &Attributes) -> Reply {
    Reply::of(&AttrOut { attr_valid: VALID.into(), attr: attr(owner, attributes), ..AttrOut::default() })
}

fn entry_out(owner: (u32, u32), found: &Found) -> EntryOut {
    EntryOut {
        nodeid: found.node.into(),
        entry_valid: VALID.into(),
        attr_valid: VALID.into(),
        attr: attr(owner, &found.attributes),
        ..EntryOut::default()
    }
}

/// What READDIRPLUS says of an entry; no node if it cannot be looked up, or need not be.
fn look(tree: &mut Tree, owner: (u32, u32), parent: u64, entry: &Entry) -> EntryOut {
    let name = if entry.is_dot() { Err(Errno::INVAL) } else { Name::new(&entry.name) };
    let found = name.and_then(|name| tree.lookup(parent, &name));
    found.map_or_else(|_| EntryOut::default(), |found| entry_out(owner, &found))
}

/// Extended attributes, if there is room for them; or the room that they need, if there is none at all.
fn fitting(bytes: Vec<u8>, room: u32) -> Result<Reply, Errno> {
    let size = u32::try_from(bytes.len()).map_err(|_| Errno::TOOBIG)?;
    match room {
        0 => Ok(Reply::of(&GetxattrOut { size: size.into(), ..GetxattrOut::default() })),
        room if room < size => Err(Errno::RANGE),
        _ => Ok(Reply::Bytes(bytes)),
    }
}

fn handle(handle: u64) -> Reply {
    Reply::of(&open_out(handle))
}

fn open_out(handle: u64) -> OpenOut {
    OpenOut { fh: handle.into(), ..OpenOut::default() }
}

/// The answer to a WRITE or COPY_FILE_RANGE of `bytes`, which are at most [`MAX_TRANSFER`] or a bounded copy.
pub fn written(bytes: usize) -> Reply {
    Reply::of(&WriteOut { size: u32::try_from(bytes).unwrap_or(u32::MAX).into(), ..WriteOut::default() })
}
