//! What the proxy needs from a virtio-gpu: a context, two rings, blobs. [`super::virtgpu`] is the kernel's; the tests
//! bring one that calls the host's renderer directly.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;

/// Bytes of each of the two pages the host writes answers and events into.
pub const RING_SIZE: usize = 4096;

/// Which page the host answers into (numbers are the cross-domain protocol's ring indices).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ring {
    /// Answers to queries, complete when [`Gpu::query`] returns.
    Query = 0,
    /// Events from the host, announced by [`Gpu::event_fd`].
    Channel = 1,
}

/// Host memory that is mapped here, as a resource the host can be told about.
#[derive(Debug)]
pub struct HostBlob {
    /// The device's handle, for [`Gpu::destroy_blob`].
    pub handle: u32,
    /// The resource id by which the host knows it.
    pub resource: u32,
    /// The memory itself.
    pub memory: Mapping,
}

/// One cross-domain context on a virtio-gpu device.
pub trait Gpu {
    /// Resource id of a ring's page.
    fn ring_id(&self, ring: Ring) -> u32;

    /// A ring's page.
    fn ring(&mut self, ring: Ring) -> &mut Mapping;

    /// Queues a command.
    ///
    /// # Errors
    ///
    /// The device refused it. What the host thinks of it is not known.
    fn submit(&mut self, command: &[u8]) -> io::Result<()>;

    /// Queues a command whose completion is announced by [`Gpu::event_fd`].
    ///
    /// # Errors
    ///
    /// As [`Gpu::submit`].
    fn submit_poll(&mut self, command: &[u8]) -> io::Result<()>;

    /// Queues a command and waits, for a bounded time, until the host has processed it.
    ///
    /// # Errors
    ///
    /// As [`Gpu::submit`], and `TimedOut`.
    fn query(&mut self, command: &[u8]) -> io::Result<()>;

    /// Readable when a [`Gpu::submit_poll`] has completed.
    fn event_fd(&self) -> BorrowedFd<'_>;

    /// Consumes one completion, if there is one.
    ///
    /// # Errors
    ///
    /// The device is gone.
    fn take_event(&mut self) -> io::Result<bool>;

    /// Makes the host's object `blob_id` a resource of `size` bytes (whole pages) and maps it.
    ///
    /// # Errors
    ///
    /// No such object, or no room in the window of host memory.
    fn create_blob(&mut self, blob_id: u32, size: usize, writable: bool) -> io::Result<HostBlob>;

    /// Unmaps and frees a blob.
    fn destroy_blob(&mut self, blob: HostBlob);
}

/// A shared mapping of device or file memory, unmapped on drop.
///
/// The other side may change it at any time, so no Rust reference into it is ever made: bytes are copied in and out.
#[derive(Debug)]
pub struct Mapping {
    base: NonNull<u8>,
    len: usize,
}

impl Mapping {
    /// Maps `len` bytes of `fd` from `offset`.
    ///
    /// # Errors
    ///
    /// Whatever `mmap` says.
    pub fn new(fd: BorrowedFd<'_>, offset: u64, len: usize, writable: bool) -> io::Result<Self> {
        let offset = libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        let protection = libc::PROT_READ | if writable { libc::PROT_WRITE } else { 0 };
        let base = mapping::map(fd, offset, len, protection)?;
        Ok(Self { base, len })
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is nothing to read.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Checks that `len` bytes at `at` lie inside, and returns where they start.
    fn span(&self, at: usize, len: usize) -> io::Result<NonNull<u8>> {
        if at.checked_add(len).is_none_or(|end| end > self.len) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "outside the mapping"));
        }
        Ok(mapping::offset(self.base, at))
    }

    /// Copies bytes out.
    ///
    /// # Errors
    ///
    /// `InvalidInput` if the range is not inside.
    pub fn read(&self, at: usize, out: &mut [u8]) -> io::Result<()> {
        mapping::copy_out(self.span(at, out.len())?, out);
        Ok(())
    }

    /// Copies bytes in.
    ///
    /// # Errors
    ///
    /// `InvalidInput` if the range is not inside.
    pub fn write(&mut self, at: usize, bytes: &[u8]) -> io::Result<()> {
        mapping::copy_in(self.span(at, bytes.len())?, bytes);
        Ok(())
    }

    /// Copies `len` bytes from `file` at `offset` to `at`, without mapping the file: a file that shrinks meanwhile is
    /// an error here, where a mapping of it would be a SIGBUS.
    ///
    /// # Errors
    ///
    /// What `pread` says; `UnexpectedEof` if the file is too short; `InvalidInput` if the range is not inside.
    pub fn read_file(&mut self, at: usize, file: BorrowedFd<'_>, offset: u64, len: usize) -> io::Result<()> {
        let mut done = 0;
        while done < len {
            let target = self.span(at + done, len - done)?;
            let from = u64::try_from(done).ok().and_then(|done| offset.checked_add(done));
            let from = from.and_then(|from| libc::off_t::try_from(from).ok()).ok_or(io::ErrorKind::InvalidInput)?;
            match mapping::pread(file.as_raw_fd(), target, len - done, from) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => done += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        mapping::unmap(self.base, self.len);
    }
}

/// The unsafe half of [`Mapping`]; every range handed in has been checked by [`Mapping::span`].
#[expect(unsafe_code, reason = "memory shared with another domain can only be reached through raw pointers")]
mod mapping {
    use std::io;
    use std::os::fd::{AsRawFd, BorrowedFd};
    use std::ptr::NonNull;

    pub fn map(fd: BorrowedFd<'_>, offset: libc::off_t, len: usize, protection: i32) -> io::Result<NonNull<u8>> {
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no existing memory.
        let base =
            unsafe { libc::mmap(std::ptr::null_mut(), len, protection, libc::MAP_SHARED, fd.as_raw_fd(), offset) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        NonNull::new(base.cast()).ok_or_else(|| io::ErrorKind::AddrNotAvailable.into())
    }

    pub fn unmap(base: NonNull<u8>, len: usize) {
        // SAFETY: called once, from the owner's drop; `base` and `len` are what `mmap` returned, and no reference into
        // the mapping exists.
        unsafe { libc::munmap(base.as_ptr().cast(), len) };
    }

    pub fn offset(base: NonNull<u8>, at: usize) -> NonNull<u8> {
        // SAFETY: the caller checked that `at` does not exceed the mapping's length.
        unsafe { base.add(at) }
    }

    pub fn copy_out(from: NonNull<u8>, out: &mut [u8]) {
        // SAFETY: `out.len()` bytes from `from` are mapped and readable; `out` is ours, so they do not overlap. The other
        // domain may write meanwhile: any bytes are acceptable, they are validated after the copy.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), out.as_mut_ptr(), out.len()) };
    }

    pub fn copy_in(to: NonNull<u8>, bytes: &[u8]) {
        // SAFETY: `bytes.len()` bytes from `to` are mapped; `bytes` is ours, so they do not overlap.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to.as_ptr(), bytes.len()) };
    }

    pub fn pread(fd: i32, to: NonNull<u8>, len: usize, from: libc::off_t) -> io::Result<usize> {
        // SAFETY: the kernel writes at most `len` bytes to `to`, which the caller checked are mapped.
        let count = unsafe { libc::pread(fd, to.as_ptr().cast(), len, from) };
        usize::try_from(count).map_err(|_| io::Error::last_os_error())
    }
}

// SAFETY: the mapping is plain memory with no tie to the thread that made it, and it is used through `&mut` or copied out.
#[expect(unsafe_code, reason = "a raw pointer field hides that the mapping may move between threads")]
unsafe impl Send for Mapping {}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::fd::AsFd;

    fn file(bytes: &[u8]) -> std::fs::File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    #[test]
    fn ranges_outside_are_refused() {
        let mut map = Mapping::new(file(&[7; 4096]).as_fd(), 0, 4096, true).unwrap();
        let mut four = [0; 4];
        map.read(4092, &mut four).unwrap();
        assert_eq!(four, [7; 4]);
        assert!(map.read(4093, &mut four).is_err());
        assert!(map.read(usize::MAX, &mut four).is_err());
        assert!(map.write(4093, &four).is_err());
        let source = file(&[1; 64]);
        assert!(map.read_file(4090, source.as_fd(), 0, 7).is_err());
    }

    #[test]
    fn a_file_that_is_too_short_is_an_error_and_not_a_signal() {
        let mut map = Mapping::new(file(&[0; 8192]).as_fd(), 0, 8192, true).unwrap();
        let source = file(&[9; 100]);
        map.read_file(8, source.as_fd(), 50, 50).unwrap();
        let error = map.read_file(0, source.as_fd(), 0, 8192).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        source.set_len(0).unwrap();
        assert!(map.read_file(0, source.as_fd(), 0, 1).is_err());
    }
}
