//! I/O engines: how bytes move between an image and guest memory.
//!
//! A device talks to an [`Engine`]. [`SyncFile`] does each request with one system call on the calling thread; one that
//! queues requests (io_uring) can take its place without the device changing its parser or its answers.
//!
//! Guest memory is passed as volatile slices and used in place: the kernel copies, this process does not look.

use std::io;
use std::os::fd::AsRawFd;

use rustix::fs::{FallocateFlags, fallocate};
use vm_memory::VolatileSlice;

use crate::image::Image;

/// Vectors of one system call (the kernel's UIO_MAXIOV).
const MAX_VECTORS: usize = 1024;

/// What an engine can do beside reading, writing and flushing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Abilities {
    /// [`Engine::discard`] works: blocks can be given back to the host.
    pub discard: bool,
    /// [`Engine::write_zeroes`] works, whether or not blocks may be given back.
    pub write_zeroes: bool,
}

/// An open image that moves bytes. Offsets and lengths are bytes; the caller keeps them inside the image.
pub trait Engine: Send {
    /// Fills all of `into` from `offset` on.
    ///
    /// # Errors
    /// If the host cannot read, or the image has become shorter.
    fn read(&self, offset: u64, into: &[VolatileSlice<'_>]) -> io::Result<()>;

    /// Writes all of `from` at `offset`. It is on disk after [`Engine::flush`].
    ///
    /// # Errors
    /// If the host cannot write.
    fn write(&self, offset: u64, from: &[VolatileSlice<'_>]) -> io::Result<()>;

    /// Returns when everything written is on disk.
    ///
    /// # Errors
    /// If the host could not write something; it may be lost.
    fn flush(&self) -> io::Result<()>;

    /// Gives the blocks of a range back to the host. They read as zero.
    ///
    /// # Errors
    /// If the host cannot.
    fn discard(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Makes a range read as zero; `unmap`: its blocks may be given back to the host.
    ///
    /// # Errors
    /// If the host cannot.
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()>;

    /// What else it can do.
    fn abilities(&self) -> Abilities;
}

/// Synchronous I/O on a raw image.
#[derive(Debug)]
pub struct SyncFile {
    image: Image,
    abilities: Abilities,
}

impl SyncFile {
    /// An engine for a raw image. `sparse`: blocks the guest discards may become holes. A read-only image has no
    /// abilities.
    #[must_use]
    pub fn new(image: Image, sparse: bool, writable: bool) -> Self {
        let mut abilities = Abilities::default();
        if sparse && writable && !image.is_block_device() {
            abilities.discard = can(&image, PUNCH);
            abilities.write_zeroes = abilities.discard && can(&image, ZERO);
        }
        Self { image, abilities }
    }
}

const PUNCH: FallocateFlags = FallocateFlags::PUNCH_HOLE.union(FallocateFlags::KEEP_SIZE);
const ZERO: FallocateFlags = FallocateFlags::ZERO_RANGE.union(FallocateFlags::KEEP_SIZE);

/// Whether the file system can do it: tried beyond the end of the file, and what it may have allocated there released.
fn can(image: &Image, flags: FallocateFlags) -> bool {
    let Some(beyond) = image.size().checked_next_multiple_of(4096) else { return false };
    let done = fallocate(image.file(), flags, beyond, 4096).is_ok();
    if done && flags != PUNCH {
        let _ = fallocate(image.file(), PUNCH, beyond, 4096);
    }
    done
}

impl Engine for SyncFile {
    fn read(&self, offset: u64, into: &[VolatileSlice<'_>]) -> io::Result<()> {
        transfer(&self.image, offset, into, libc::preadv, io::ErrorKind::UnexpectedEof)
    }

    fn write(&self, offset: u64, from: &[VolatileSlice<'_>]) -> io::Result<()> {
        transfer(&self.image, offset, from, libc::pwritev, io::ErrorKind::WriteZero)
    }

    fn flush(&self) -> io::Result<()> {
        self.image.file().sync_data()
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        Ok(fallocate(self.image.file(), PUNCH, offset, len)?)
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        Ok(fallocate(self.image.file(), if unmap { PUNCH } else { ZERO }, offset, len)?)
    }

    fn abilities(&self) -> Abilities {
        self.abilities
    }
}

/// preadv(2) and pwritev(2) have the same form.
type Vectored = unsafe extern "C" fn(libc::c_int, *const libc::iovec, libc::c_int, libc::off_t) -> libc::ssize_t;

/// Calls `vectored` until all of `slices` is done; `empty` is the error if a call does nothing.
fn transfer(
    image: &Image,
    mut offset: u64,
    slices: &[VolatileSlice<'_>],
    vectored: Vectored,
    empty: io::ErrorKind,
) -> io::Result<()> {
    let mut rest: Vec<VolatileSlice<'_>> = slices.iter().filter(|slice| !slice.is_empty()).copied().collect();
    while !rest.is_empty() {
        let done = match once(image, offset, &rest, vectored) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            result => result?,
        };
        if done == 0 {
            return Err(empty.into());
        }
        offset = offset.checked_add(done as u64).ok_or(io::ErrorKind::InvalidInput)?;
        advance(&mut rest, done)?;
    }
    Ok(())
}

/// Drops the first `done` bytes.
fn advance(slices: &mut Vec<VolatileSlice<'_>>, mut done: usize) -> io::Result<()> {
    let whole = slices
        .iter()
        .take_while(|slice| {
            let fits = slice.len() <= done;
            done -= if fits { slice.len() } else { 0 };
            fits
        })
        .count();
    slices.drain(..whole);
    if let Some(first) = slices.first_mut() {
        *first = first.offset(done).map_err(io::Error::other)?;
    }
    Ok(())
}

#[expect(unsafe_code, reason = "vectored system calls on guest memory, which is never borrowed as Rust slices")]
fn once(image: &Image, offset: u64, slices: &[VolatileSlice<'_>], vectored: Vectored) -> io::Result<usize> {
    let guards: Vec<_> = slices.iter().take(MAX_VECTORS).map(VolatileSlice::ptr_guard_mut).collect();
    let vectors: Vec<libc::iovec> =
        guards.iter().map(|guard| libc::iovec { iov_base: guard.as_ptr().cast(), iov_len: guard.len() }).collect();
    let count = libc::c_int::try_from(vectors.len()).map_err(io::Error::other)?;
    let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
    // SAFETY: each vector is a volatile slice, valid for reads and writes of its length as long as its guard lives,
    // which is until the end of this function; `count` is their number. The guest may change the bytes meanwhile,
    // which the kernel is prepared for.
    let done = unsafe { vectored(image.file().as_raw_fd(), vectors.as_ptr(), count, offset) };
    usize::try_from(done).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::image::Access;

    fn engine(bytes: &[u8]) -> (tempfile::NamedTempFile, SyncFile) {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        let image = Image::open(file.path(), Access::ReadWrite, false).unwrap();
        (file, SyncFile::new(image, true, true))
    }

    fn slices(buffer: &mut [u8], sizes: impl Iterator<Item = usize>) -> Vec<VolatileSlice<'_>> {
        let all = VolatileSlice::from(buffer);
        let mut at = 0;
        sizes
            .map(|size| {
                let slice = all.subslice(at, size).unwrap();
                at += size;
                slice
            })
            .collect()
    }

    #[test]
    fn more_vectors_than_one_call_takes() {
        let bytes: Vec<u8> = (0..6000u32).map(|i| u8::try_from(i % 251).unwrap()).collect();
        let (file, engine) = engine(&bytes);
        let mut buffer = vec![0; 5900];
        engine.read(100, &slices(&mut buffer, (0..2950).map(|i| if i % 5 == 4 { 6 } else { 1 }))).unwrap();
        assert_eq!(buffer, bytes[100..]);
        buffer.reverse();
        engine.write(50, &slices(&mut buffer, [0, 5000, 0, 900].into_iter())).unwrap();
        assert_eq!(std::fs::read(file.path()).unwrap()[50..5950], buffer);
    }

    #[test]
    fn a_file_that_became_shorter_is_an_error() {
        let (file, engine) = engine(&[1; 1000]);
        file.as_file().set_len(700).unwrap();
        let mut buffer = vec![0; 500];
        let read = engine.read(500, &slices(&mut buffer, [500].into_iter()));
        assert_eq!(read.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        assert!(engine.read(u64::MAX, &slices(&mut buffer, [500].into_iter())).is_err());
    }

    #[test]
    fn holes_and_zeroes() {
        let (file, engine) = engine(&[1; 3 * 65536]);
        if !engine.abilities().write_zeroes {
            return; // The file system of the temporary folder cannot.
        }
        engine.discard(0, 65536).unwrap();
        engine.write_zeroes(65536, 4096, false).unwrap();
        engine.write_zeroes(2 * 65536, 100, true).unwrap();
        engine.flush().unwrap();
        let bytes = std::fs::read(file.path()).unwrap();
        assert_eq!(bytes.len(), 3 * 65536);
        let zeroes = bytes.iter().filter(|b| **b == 0).count();
        assert_eq!(zeroes, 65536 + 4096 + 100);
    }
}
