//! What is in a directory.

use std::mem::MaybeUninit;
use std::os::fd::AsFd;

use rustix::fs::{FileType, RawDir, SeekFrom, seek};
use rustix::io::Errno;

use crate::attributes::{Attributes, Kind, ino};
use crate::files::Directory;
use crate::host;
use crate::tree::Tree;

/// Bytes asked of the host at a time: at most these, and at least what the longest name takes.
const BUFFER: std::ops::RangeInclusive<usize> = 512..=16 << 10;

/// An entry of a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its name. Not necessarily one that [`crate::Name`] takes: `.` and `..` are among them.
    pub name: Vec<u8>,
    /// Where the next one is: an offset for [`Tree::entries`].
    pub next: u64,
    /// Inode number.
    pub ino: u64,
    /// Kind, as in `d_type` of readdir(3); 0 is unknown.
    pub kind: u32,
}

const DT_DIR: u32 = 4;
const DT_REG: u32 = 8;
const DT_LNK: u32 = 10;

impl Entry {
    /// Whether it is the directory itself or its parent.
    #[must_use]
    pub fn is_dot(&self) -> bool {
        matches!(self.name.as_slice(), b"." | b"..")
    }
}

impl Tree {
    /// Calls `take` with one entry after another, from `offset` on (0, or an entry's `next`), until it says that it has
    /// enough. Devices, pipes and sockets are among them, though a guest cannot look them up. No more are read of the host than
    /// fit into about `room` bytes.
    ///
    /// # Errors
    /// As getdents(2).
    pub fn entries(
        &mut self,
        handle: u64,
        offset: u64,
        room: usize,
        mut take: impl FnMut(&mut Self, Entry) -> bool,
    ) -> Result<(), Errno> {
        let (grant, fd) = match self.handles.directory(handle)? {
            Directory::Root => {
                self.grants_from(offset, take);
                return Ok(());
            }
            Directory::Host { grant, fd } => (grant.number, fd),
        };
        if i64::try_from(offset).is_err() {
            return Err(Errno::INVAL);
        }
        seek(fd, SeekFrom::Start(offset))?;
        // A duplicate of the descriptor would cost as much as this collection, which is bounded by the buffer.
        let mut batch: Vec<Entry> = Vec::new();
        let mut buffer = vec![MaybeUninit::uninit(); room.clamp(*BUFFER.start(), *BUFFER.end())];
        let mut dir = RawDir::new(fd, &mut buffer);
        while let Some(entry) = dir.next() {
            let entry = entry?;
            let kind = match entry.file_type() {
                FileType::RegularFile => DT_REG,
                FileType::Directory => DT_DIR,
                FileType::Symlink => DT_LNK,
                _ => 0,
            };
            batch.push(Entry {
                name: entry.file_name().to_bytes().to_vec(),
                next: entry.next_entry_cookie(),
                ino: ino(entry.ino(), grant),
                kind,
            });
            if dir.is_buffer_empty() {
                break;
            }
        }
        for entry in batch {
            if !take(self, entry) {
                return Ok(());
            }
        }
        Ok(())
    }

    fn grants_from(&mut self, offset: u64, mut take: impl FnMut(&mut Self, Entry) -> bool) {
        // Offsets 1 and 2 are behind the dots; a grant's is its number and 2.
        for (name, at) in [(b".".as_slice(), 1), (b"..", 2)] {
            let entry = Entry { name: name.to_vec(), next: at, ino: Attributes::ROOT.ino, kind: DT_DIR };
            if offset < at && !take(self, entry) {
                return;
            }
        }
        let mut number = offset.saturating_sub(2);
        while let Some(grant) = self.grant_after(number) {
            number = grant.number;
            let stat = host::examine(grant.root.as_fd());
            let Ok((stat, _)) = stat else { continue };
            let entry = Entry {
                name: grant.name.as_bytes().to_vec(),
                next: number.saturating_add(2),
                ino: ino(stat.stx_ino, number),
                kind: if grant.kind == Kind::Directory { DT_DIR } else { DT_REG },
            };
            if !take(self, entry) {
                return;
            }
        }
    }
}
