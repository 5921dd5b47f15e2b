//! Host memory that is shown to the guest as a memory slot of its own: pmem images and shared memory windows.
//!
//! [`Mapping`] owns a range of the process's address space. It is never dereferenced by the VMM; it exists so that
//! KVM can point a memory slot at it, and so that parts of it can be replaced by file mappings.
#![expect(unsafe_code, reason = "mmap and munmap of address ranges this type owns")]

use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::ops::ControlFlow;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::FileExt;
use std::ptr;

use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

use crate::pagemap::{Page, pages};

/// Page size of all supported hosts' base pages, in bytes.
pub const PAGE_SIZE: u64 = PAGE as u64;
/// The same, for lengths of slices.
pub const PAGE: usize = 4096;

/// How a file is mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// The guest reads and writes the file's pages.
    Shared,
    /// The guest reads the file's pages; writes fault (they become MMIO exits).
    SharedReadOnly,
    /// The guest reads the file's pages and gets private copies of those it writes: nothing reaches the file.
    Private,
}

/// Why a mapping failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Offset or length is not a multiple of the page size, is zero, or leaves the range.
    #[error("{offset:#x}+{len:#x} is not a page-aligned part of a {size:#x} byte range")]
    Range {
        /// Offset into the range, in bytes.
        offset: u64,
        /// Length in bytes.
        len: u64,
        /// Length of the range in bytes.
        size: u64,
    },
    /// The kernel refused.
    #[error("cannot map {len:#x} bytes: {source}")]
    Map {
        /// Length in bytes.
        len: u64,
        /// The error of mmap(2).
        source: Errno,
    },
}

/// An owned range of host addresses.
#[derive(Debug)]
pub struct Mapping {
    addr: *mut c_void,
    len: usize,
}

// SAFETY: the pointer is only ever handed to mmap/munmap/KVM, never dereferenced, and the range is owned by this value.
unsafe impl Send for Mapping {}
// SAFETY: as above; the methods that change the mapping take `&mut self`.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Reserves `len` bytes of address space that cannot be accessed and costs no memory.
    ///
    /// # Errors
    /// If `len` is not a positive multiple of the page size or the kernel refuses.
    pub fn reserve(len: u64) -> Result<Self, Error> {
        let (_, size) = checked(0, len, len)?;
        // SAFETY: a fresh anonymous mapping at an address of the kernel's choice touches no existing memory.
        let addr = unsafe {
            mmap_anonymous(ptr::null_mut(), size, ProtFlags::empty(), MapFlags::PRIVATE | MapFlags::NORESERVE)
        }
        .map_err(|source| Error::Map { len, source })?;
        Ok(Self { addr, len: size })
    }

    /// Replaces `len` bytes at `offset` by a mapping of `fd` from `fd_offset`. The caller has checked that the file is
    /// large enough: pages beyond its end raise SIGBUS in whoever touches them.
    ///
    /// # Errors
    /// If the part leaves the range or is not page aligned, or the kernel refuses.
    pub fn map_file(
        &mut self,
        offset: u64,
        len: u64,
        fd: BorrowedFd<'_>,
        fd_offset: u64,
        access: Access,
    ) -> Result<(), Error> {
        let (start, size) = checked(offset, len, self.len as u64)?;
        let (prot, flags) = match access {
            Access::Shared => (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED),
            Access::SharedReadOnly => (ProtFlags::READ, MapFlags::SHARED),
            Access::Private => (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE | MapFlags::NORESERVE),
        };
        // SAFETY: `checked` proved start+size lies in the range this value owns; nothing in this process holds a
        // reference into it, so replacing its pages invalidates nothing.
        unsafe { mmap(self.addr.wrapping_byte_add(start), size, prot, flags | MapFlags::FIXED, fd, fd_offset) }
            .map(drop)
            .map_err(|source| Error::Map { len, source })
    }

    /// Replaces `len` bytes at `offset` by zero pages: read-write private memory, or read-only.
    ///
    /// # Errors
    /// If the part leaves the range or is not page aligned, or the kernel refuses.
    pub fn map_zero(&mut self, offset: u64, len: u64, writable: bool) -> Result<(), Error> {
        let prot = if writable { ProtFlags::READ | ProtFlags::WRITE } else { ProtFlags::READ };
        self.anonymous(offset, len, prot)
    }

    /// Makes `len` bytes at `offset` inaccessible again and drops what was mapped there.
    ///
    /// # Errors
    /// If the part leaves the range or is not page aligned, or the kernel refuses.
    pub fn unmap(&mut self, offset: u64, len: u64) -> Result<(), Error> {
        self.anonymous(offset, len, ProtFlags::empty())
    }

    fn anonymous(&mut self, offset: u64, len: u64, prot: ProtFlags) -> Result<(), Error> {
        let (start, size) = checked(offset, len, self.len as u64)?;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED;
        // SAFETY: as in `map_file`: the part lies in the range this value owns and nothing refers into it.
        unsafe { mmap_anonymous(self.addr.wrapping_byte_add(start), size, prot, flags) }
            .map(drop)
            .map_err(|source| Error::Map { len, source })
    }

    /// The offset of the first page of `len` bytes at `offset` that is a private copy and other than what `original` says of
    /// it: the page of a private mapping that was written. `original` fills a page with what is mapped at an offset.
    ///
    /// Pages that are this process' own include those that only were about to be written, and the zero page, so the bytes
    /// decide.
    ///
    /// # Errors
    /// If that cannot be found out.
    pub fn first_changed_page(
        &self,
        offset: u64,
        len: u64,
        original: impl Fn(u64, &mut [u8]) -> io::Result<()>,
    ) -> io::Result<Option<u64>> {
        let (start, size) = checked(offset, len, self.len as u64).map_err(io::Error::other)?;
        let first = self.host_address() + start as u64;
        let memory = File::open("/proc/self/mem")?;
        let (mut now, mut then) = ([0; PAGE], [0; PAGE]);
        let mut found = None;
        pages(first, size as u64, |at, page| {
            if page == Page::Own {
                memory.read_exact_at(&mut now, first + at)?;
                original(offset + at, &mut then)?;
                if now != then {
                    found = Some(offset + at);
                    return Ok(ControlFlow::Break(()));
                }
            }
            Ok(ControlFlow::Continue(()))
        })?;
        Ok(found)
    }

    /// First host address, for a KVM memory slot.
    #[must_use]
    pub fn host_address(&self) -> u64 {
        self.addr as u64
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len as u64
    }

    /// Never: a mapping has at least one page.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is owned by this value and goes with it; memory slots pointing at it are removed first by
        // whoever made them (the VM is closed before its mappings).
        if let Err(e) = unsafe { munmap(self.addr, self.len) } {
            log::error!("cannot unmap {:#x} bytes: {e}", self.len);
        }
    }
}

fn checked(offset: u64, len: u64, size: u64) -> Result<(usize, usize), Error> {
    let bad = Error::Range { offset, len, size };
    let fits = offset.checked_add(len).is_some_and(|end| end <= size);
    if !fits || len == 0 || !offset.is_multiple_of(PAGE_SIZE) || !len.is_multiple_of(PAGE_SIZE) {
        return Err(bad);
    }
    match (usize::try_from(offset), usize::try_from(len)) {
        (Ok(o), Ok(l)) => Ok((o, l)),
        _ => Err(bad),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn parts_outside_the_range_are_refused() {
        let mut m = Mapping::reserve(4 * PAGE_SIZE).unwrap();
        for (offset, len) in [
            (0, 5 * PAGE_SIZE),
            (4 * PAGE_SIZE, PAGE_SIZE),
            (u64::MAX - 4095, PAGE_SIZE),
            (1, PAGE_SIZE),
            (0, 0),
            (0, 1),
        ] {
            assert!(matches!(m.map_zero(offset, len, true), Err(Error::Range { .. })), "{offset:#x}+{len:#x}");
        }
        assert!(Mapping::reserve(0).is_err());
        assert!(Mapping::reserve(u64::MAX - 4095).is_err());
    }

    /// A range whose second page is the private mapping of a file of sevens, the third one of zeroes.
    fn private() -> (Mapping, std::fs::File) {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 4096]).unwrap();
        let mut m = Mapping::reserve(4 * PAGE_SIZE).unwrap();
        m.map_file(PAGE_SIZE, PAGE_SIZE, file.as_fd(), 0, Access::Private).unwrap();
        m.map_zero(2 * PAGE_SIZE, PAGE_SIZE, true).unwrap();
        (m, file)
    }

    /// Where the second and the third page of such a range differ from what is mapped there.
    fn changed(m: &Mapping) -> Option<u64> {
        let original = |at, page: &mut [u8]| {
            page.fill(if at == PAGE_SIZE { 7 } else { 0 });
            Ok(())
        };
        m.first_changed_page(PAGE_SIZE, 2 * PAGE_SIZE, original).unwrap()
    }

    /// Reads the byte at `at` of the range and writes `value` there, if there is one.
    fn touch(m: &Mapping, at: usize, value: Option<u8>) {
        let byte = m.addr.wrapping_byte_add(at).cast::<u8>();
        // SAFETY: the callers name bytes of the second and third page, which are readable and writable.
        unsafe {
            byte.read_volatile();
            value.into_iter().for_each(|value| byte.write_volatile(value));
        }
    }

    #[test]
    fn only_pages_that_were_changed_count_as_changed() {
        let (m, _file) = private();
        assert_eq!(changed(&m), None, "nothing was touched");
        touch(&m, 4096, None);
        touch(&m, 8192, None);
        assert_eq!(changed(&m), None, "both were read");
        touch(&m, 4096, Some(7));
        touch(&m, 8192, Some(0));
        assert_eq!(changed(&m), None, "what was there was written again");
        touch(&m, 8192 + 4095, Some(1));
        assert_eq!(changed(&m), Some(2 * PAGE_SIZE));
        touch(&m, 4096, Some(8));
        assert_eq!(changed(&m), Some(PAGE_SIZE));
        touch(&m, 4096, Some(7));
        touch(&m, 8192 + 4095, Some(0));
        assert_eq!(changed(&m), None, "all is as it was");
    }

    #[test]
    fn what_cannot_be_compared_is_an_error() {
        let (m, file) = private();
        let never = |_, _: &mut [u8]| -> io::Result<()> { Err(io::ErrorKind::NotFound.into()) };
        assert!(m.first_changed_page(PAGE_SIZE, 4 * PAGE_SIZE, never).is_err(), "beyond its end");
        assert!(m.first_changed_page(1, PAGE_SIZE, never).is_err(), "no page");
        assert_eq!(m.first_changed_page(0, PAGE_SIZE, never).unwrap(), None, "nothing can be written there");
        touch(&m, 4096, Some(9));
        assert_eq!(m.first_changed_page(PAGE_SIZE, PAGE_SIZE, never).unwrap_err().kind(), io::ErrorKind::NotFound);
        // A file that became shorter: the copy stays, and can be compared.
        file.set_len(0).unwrap();
        assert!(m.first_changed_page(PAGE_SIZE, PAGE_SIZE, |_, _| Ok(())).is_ok());
    }

    /// More pages than fit into one answer of the kernel's.
    #[test]
    fn the_last_of_many_pages_is_found() {
        let pages = 10_000;
        let mut m = Mapping::reserve(pages * PAGE_SIZE).unwrap();
        m.map_zero(0, pages * PAGE_SIZE, true).unwrap();
        let zeroes = |_, page: &mut [u8]| {
            page.fill(0);
            Ok(())
        };
        let last = (pages - 1) * PAGE_SIZE;
        touch(&m, usize::try_from(last).unwrap(), Some(1));
        assert_eq!(m.first_changed_page(0, pages * PAGE_SIZE, zeroes).unwrap(), Some(last));
        assert_eq!(m.first_changed_page(0, last, zeroes).unwrap(), None);
    }

    #[test]
    fn a_private_mapping_never_reaches_the_file() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 4096]).unwrap();
        let mut m = Mapping::reserve(2 * PAGE_SIZE).unwrap();
        m.map_file(PAGE_SIZE, PAGE_SIZE, file.as_fd(), 0, Access::Private).unwrap();
        let page = m.addr.wrapping_byte_add(4096).cast::<u8>();
        // SAFETY: the second page of the mapping was just made readable and writable.
        unsafe {
            assert_eq!(page.read_volatile(), 7);
            page.write_volatile(9);
        }
        let mut back = [0; 1];
        std::os::unix::fs::FileExt::read_at(&file, &mut back, 0).unwrap();
        assert_eq!(back, [7]);
        m.unmap(PAGE_SIZE, PAGE_SIZE).unwrap();
    }
}
