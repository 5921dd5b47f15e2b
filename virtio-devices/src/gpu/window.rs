//! The shared memory region in which the guest sees host blobs: one reserved range of addresses, one memory slot, and
//! files mapped into parts of it.
//!
//! The VMM itself never touches the region. What a vCPU finds there that is not backed makes `KVM_RUN` fail with
//! EFAULT, so a file must be at least as long as the part it is mapped at, and must stay so. The length is checked
//! before mapping. For staying so, see [`Backing`].

use std::collections::{BTreeMap, HashMap};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{FileType, MemfdFlags, OFlags, SealFlags, SeekFrom};
use rustix::io::Errno;

use crate::mapping::{self, Access, Mapping, PAGE_SIZE};

/// A file that is copied because it could shrink may have this many bytes: keymaps and format tables are far smaller.
const MAX_COPY: u64 = 16 << 20;

/// The most blobs shown at a time; each may split the range of addresses in two more, of 65530 in a process.
const MAX_PLACED: usize = 16384;

/// Why a blob cannot be shown.
#[derive(Debug, thiserror::Error)]
pub enum WindowError {
    /// It would lie outside, or not on pages.
    #[error(transparent)]
    Mapping(#[from] mapping::Error),
    /// It is shown already, or others are where it should go, or there are too many.
    #[error("blob {resource} cannot be shown at {offset:#x}: in use")]
    InUse {
        /// The resource.
        resource: u32,
        /// Where.
        offset: u64,
    },
    /// It is not shown.
    #[error("blob {0} is not in the window")]
    NotShown(u32),
    /// The file is shorter than the resource.
    #[error("the file behind the blob has {actual} bytes, not {wanted}")]
    TooShort {
        /// Bytes of the file.
        actual: u64,
        /// Bytes of the resource.
        wanted: u64,
    },
    /// The file is no memory, or could shrink and is too large to copy.
    #[error("the file behind the blob cannot be mapped safely")]
    Kind,
    /// The kernel refused.
    #[error("cannot look into the file behind a blob: {0}")]
    File(#[from] Errno),
}

/// A file that is safe to show to the guest.
///
/// * What the guest may not write (opened read-only, or sealed against writing) is mapped copy-on-write: the memory
///   slot is writable as a whole, and the guest's writes stay its own.
/// * A file that cannot shrink (F_SEAL_SHRINK), which includes all image memory the engine allocates, is mapped as it is.
/// * A read-only file that could shrink (wlroots' keymaps are such) is copied into a sealed one. Nothing is lost: its
///   owner does not change such a file once it has sent it.
/// * A writable file that could shrink comes from the compositor only, and must be shared to be of use. Its owner can
///   make a vCPU fail with EFAULT by truncating it, as it could end every window of the VM anyway.
#[derive(Debug)]
pub struct Backing {
    file: OwnedFd,
    access: Access,
}

impl Backing {
    /// Checks that `file` has `size` bytes, up to the end of a page, and is safe to map.
    ///
    /// # Errors
    /// If it is too short, no memory, or cannot be made safe.
    pub fn of(file: OwnedFd, size: u64) -> Result<Self, WindowError> {
        let actual = file_size(file.as_fd())?;
        if actual.checked_next_multiple_of(PAGE_SIZE).is_none_or(|whole| whole < size) {
            return Err(WindowError::TooShort { actual, wanted: size });
        }
        let mode = rustix::fs::fcntl_getfl(&file)? & OFlags::ACCMODE;
        let seals = match rustix::fs::fcntl_get_seals(&file) {
            Ok(seals) => seals,
            Err(Errno::INVAL) => SealFlags::empty(),
            Err(e) => return Err(e.into()),
        };
        if mode == OFlags::WRONLY {
            return Err(WindowError::Kind);
        }
        let writable = mode == OFlags::RDWR && !seals.intersects(SealFlags::WRITE | SealFlags::FUTURE_WRITE);
        if writable {
            return Ok(Self { file, access: Access::Shared });
        }
        let file = if seals.contains(SealFlags::SHRINK) { file } else { copy(file.as_fd(), actual)? };
        Ok(Self { file, access: Access::Private })
    }
}

fn file_size(file: BorrowedFd<'_>) -> Result<u64, WindowError> {
    let stat = rustix::fs::fstat(file)?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => u64::try_from(stat.st_size).map_err(|_| WindowError::Kind),
        // dma-buf: an anonymous inode that can tell its size.
        FileType::Unknown => Ok(rustix::fs::seek(file, SeekFrom::End(0))?),
        _ => Err(WindowError::Kind),
    }
}

fn copy(from: BorrowedFd<'_>, size: u64) -> Result<OwnedFd, WindowError> {
    if size > MAX_COPY {
        return Err(WindowError::Kind);
    }
    let to = rustix::fs::memfd_create("gpu-blob", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    let mut buffer = vec![0; 64 << 10];
    let mut at = 0;
    while at < size {
        let n = rustix::io::pread(from, &mut buffer, at)?;
        let Some(part) = buffer.get(..n).filter(|part| !part.is_empty()) else { break };
        let mut written = 0;
        while let Some(rest) = part.get(written..).filter(|rest| !rest.is_empty()) {
            written = written.saturating_add(rustix::io::pwrite(&to, rest, at.saturating_add(written as u64))?);
        }
        at = at.saturating_add(n as u64);
    }
    // What it shrank to meanwhile reads as zero.
    rustix::fs::ftruncate(&to, size)?;
    rustix::fs::fcntl_add_seals(&to, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(to)
}

/// The region.
pub struct Window {
    mapping: Arc<Mutex<Mapping>>,
    len: u64,
    /// By offset: length and resource.
    placed: BTreeMap<u64, (u64, u32)>,
    offsets: HashMap<u32, u64>,
    /// Parts that held blobs when a snapshot was taken, now zeros.
    ghosts: Vec<(u64, u64)>,
}

impl Window {
    /// An empty region: the `len` bytes of `mapping`, in which nothing is mapped.
    #[must_use]
    pub fn new(mapping: Arc<Mutex<Mapping>>, len: u64) -> Self {
        Self { mapping, len, placed: BTreeMap::new(), offsets: HashMap::new(), ghosts: Vec::new() }
    }

    /// Its length in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.len
    }

    /// The addresses behind it, for the memory slot.
    #[must_use]
    pub fn mapping(&self) -> Arc<Mutex<Mapping>> {
        self.mapping.clone()
    }

    fn lock(&self) -> MutexGuard<'_, Mapping> {
        self.mapping.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Shows `size` bytes (rounded up to pages) of a file at `offset`.
    ///
    /// # Errors
    /// If the part leaves the region, is not page aligned, or anything is shown there already.
    pub fn place(&mut self, resource: u32, offset: u64, size: u64, backing: &Backing) -> Result<(), WindowError> {
        let outside = mapping::Error::Range { offset, len: size, size: self.len };
        let len = size.checked_next_multiple_of(PAGE_SIZE).ok_or(outside)?;
        let end = offset.saturating_add(len);
        let before = self.placed.range(..end).next_back();
        let overlaps = before.is_some_and(|(start, (len, _))| start.saturating_add(*len) > offset);
        if overlaps || self.offsets.contains_key(&resource) || self.placed.len() >= MAX_PLACED {
            return Err(WindowError::InUse { resource, offset });
        }
        self.lock().map_file(offset, len, backing.file.as_fd(), 0, backing.access)?;
        self.placed.insert(offset, (len, resource));
        self.offsets.insert(resource, offset);
        Ok(())
    }

    /// Shows a blob no longer.
    ///
    /// # Errors
    /// If it is not shown, or the kernel refuses (it is shown still).
    pub fn remove(&mut self, resource: u32) -> Result<(), WindowError> {
        let offset = *self.offsets.get(&resource).ok_or(WindowError::NotShown(resource))?;
        if let Some((len, _)) = self.placed.get(&offset) {
            self.lock().unmap(offset, *len)?;
        }
        self.placed.remove(&offset);
        self.offsets.remove(&resource);
        Ok(())
    }

    /// Whether a blob is shown.
    #[must_use]
    pub fn shows(&self, resource: u32) -> bool {
        self.offsets.contains_key(&resource)
    }

    /// Shows nothing any more.
    pub fn clear(&mut self) {
        let parts: Vec<(u64, u64)> = self.ranges();
        for (offset, len) in parts {
            if let Err(e) = self.lock().unmap(offset, len) {
                log::error!("virtio-gpu: cannot take a blob out of the window: {e}");
            }
        }
        self.placed.clear();
        self.offsets.clear();
        self.ghosts.clear();
    }

    /// The parts that show something: offset and length.
    #[must_use]
    pub fn ranges(&self) -> Vec<(u64, u64)> {
        self.ghosts.iter().copied().chain(self.placed.iter().map(|(offset, (len, _))| (*offset, *len))).collect()
    }

    /// Makes parts that showed blobs before a restore readable and writable zeros: programs of the guest have them
    /// mapped, and must not be able to stop the machine by touching them. The next blob there takes their place.
    ///
    /// # Errors
    /// If a part leaves the region or there are more than could have been.
    pub fn haunt(&mut self, parts: &[(u64, u64)]) -> Result<(), WindowError> {
        for &(offset, len) in parts.iter().take(MAX_PLACED) {
            self.lock().map_zero(offset, len, true)?;
            self.ghosts.push((offset, len));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memfd(size: u64, seals: SealFlags) -> OwnedFd {
        let fd = rustix::fs::memfd_create("t", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        rustix::fs::ftruncate(&fd, size).unwrap();
        rustix::fs::fcntl_add_seals(&fd, seals).unwrap();
        fd
    }

    fn read_only(fd: &OwnedFd) -> OwnedFd {
        use std::os::fd::AsRawFd;
        std::fs::File::open(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap().into()
    }

    #[test]
    fn a_short_file_is_refused_and_a_partial_page_counts_as_whole() {
        let short = Backing::of(memfd(4096, SealFlags::empty()), 1 << 20);
        assert!(matches!(short, Err(WindowError::TooShort { actual: 4096, wanted: 0x10_0000 })));
        assert!(Backing::of(memfd(5000, SealFlags::empty()), 8192).is_ok());
        assert!(Backing::of(memfd(5000, SealFlags::empty()), 8193).is_err());
        assert!(Backing::of(memfd(0, SealFlags::empty()), 1).is_err());
    }

    #[test]
    fn only_writable_files_are_shared_and_shrinkable_ones_are_copied() {
        use std::os::fd::AsRawFd;
        let access = |fd| Backing::of(fd, 4096).unwrap().access;
        assert_eq!(access(memfd(4096, SealFlags::empty())), Access::Shared);
        assert_eq!(access(memfd(4096, SealFlags::SHRINK)), Access::Shared);
        assert_eq!(access(memfd(4096, SealFlags::WRITE | SealFlags::SHRINK)), Access::Private);
        assert_eq!(access(memfd(4096, SealFlags::FUTURE_WRITE | SealFlags::SHRINK)), Access::Private);
        let original = memfd(4096, SealFlags::empty());
        rustix::io::pwrite(&original, b"keymap", 0).unwrap();
        let backing = Backing::of(read_only(&original), 4096).unwrap();
        assert_eq!(backing.access, Access::Private);
        rustix::fs::ftruncate(&original, 0).unwrap();
        let mut copy = [0; 6];
        rustix::io::pread(&backing.file, &mut copy, 0).unwrap();
        assert_eq!(&copy, b"keymap", "the copy does not shrink with the original");
        let sealed = memfd(4096, SealFlags::WRITE | SealFlags::SHRINK);
        let number = sealed.as_raw_fd();
        assert_eq!(Backing::of(sealed, 4096).unwrap().file.as_raw_fd(), number, "no copy where none is needed");
    }

    #[test]
    fn pipes_sockets_and_write_only_files_are_no_memory() {
        let (pipe, _) = rustix::pipe::pipe().unwrap();
        assert!(matches!(Backing::of(pipe, 1), Err(WindowError::Kind)));
        let (socket, _) = std::os::unix::net::UnixStream::pair().unwrap();
        assert!(Backing::of(socket.into(), 1).is_err());
        let dir = tempfile::tempdir().unwrap();
        let file = std::fs::File::create(dir.path().join("f")).unwrap();
        file.set_len(4096).unwrap();
        assert!(matches!(Backing::of(file.into(), 4096), Err(WindowError::Kind)));
        assert!(Backing::of(std::fs::File::open(dir.path()).unwrap().into(), 1).is_err());
    }

    #[test]
    fn blobs_do_not_overlap_leave_the_window_or_sit_between_pages() {
        let mut w = Window::new(Arc::new(Mutex::new(Mapping::reserve(16 * PAGE_SIZE).unwrap())), 16 * PAGE_SIZE);
        let b = Backing::of(memfd(4 * PAGE_SIZE, SealFlags::empty()), 4 * PAGE_SIZE).unwrap();
        w.place(1, 4 * PAGE_SIZE, 4 * PAGE_SIZE, &b).unwrap();
        for offset in [PAGE_SIZE, 4 * PAGE_SIZE, 5 * PAGE_SIZE, 7 * PAGE_SIZE] {
            let result = w.place(2, offset, 4 * PAGE_SIZE, &b);
            assert!(matches!(result, Err(WindowError::InUse { .. })), "{offset:#x}");
        }
        for offset in [13 * PAGE_SIZE, 16 * PAGE_SIZE, 1 << 40, u64::MAX - 4095, u64::MAX, 8 * PAGE_SIZE + 1] {
            assert!(w.place(2, offset, 4 * PAGE_SIZE, &b).is_err(), "{offset:#x}");
        }
        assert!(w.place(2, 0, u64::MAX, &b).is_err());
        assert!(w.place(1, 8 * PAGE_SIZE, PAGE_SIZE, &b).is_err(), "shown already");
        w.place(2, 0, 4 * PAGE_SIZE, &b).unwrap();
        w.place(3, 8 * PAGE_SIZE, 4 * PAGE_SIZE, &b).unwrap();
        w.remove(1).unwrap();
        assert!(matches!(w.remove(1), Err(WindowError::NotShown(1))));
        w.place(4, 4 * PAGE_SIZE, 4 * PAGE_SIZE, &b).unwrap();
        w.clear();
        assert!(w.ranges().is_empty());
        w.place(1, 0, 4 * PAGE_SIZE, &b).unwrap();
    }

    #[test]
    fn after_a_restore_old_blobs_are_zeros() {
        let mut w = Window::new(Arc::new(Mutex::new(Mapping::reserve(16 * PAGE_SIZE).unwrap())), 16 * PAGE_SIZE);
        w.haunt(&[(PAGE_SIZE, 2 * PAGE_SIZE)]).unwrap();
        assert_eq!(w.ranges(), [(PAGE_SIZE, 2 * PAGE_SIZE)]);
        assert!(w.haunt(&[(15 * PAGE_SIZE, 2 * PAGE_SIZE)]).is_err());
        let b = Backing::of(memfd(PAGE_SIZE, SealFlags::empty()), PAGE_SIZE).unwrap();
        w.place(1, PAGE_SIZE, PAGE_SIZE, &b).unwrap();
    }
}
