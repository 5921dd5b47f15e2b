//! Bytes between a file and guest memory, in place.

use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::io::Errno;
use vm_memory::VolatileSlice;

/// Vectors of one system call (the kernel's UIO_MAXIOV).
const MAX_VECTORS: usize = 1024;

/// preadv2(2) and pwritev2(2) have the same form.
pub(crate) type Vectored =
    unsafe extern "C" fn(libc::c_int, *const libc::iovec, libc::c_int, libc::off_t, libc::c_int) -> libc::ssize_t;

/// Calls `vectored` until `slices` are done, or it does nothing, which is the end of a file. Returns how many bytes were
/// moved; an error counts only if nothing was.
pub(crate) fn transfer(
    file: BorrowedFd<'_>,
    offset: u64,
    slices: &[VolatileSlice<'_>],
    flags: i32,
    vectored: Vectored,
) -> Result<usize, Errno> {
    let mut rest: Vec<VolatileSlice<'_>> = slices.iter().filter(|slice| !slice.is_empty()).copied().collect();
    let mut total = 0usize;
    while !rest.is_empty() {
        let at = offset.checked_add(total as u64).ok_or(Errno::INVAL)?;
        let done = match once(file, at, &rest, flags, vectored) {
            Err(Errno::INTR) => continue,
            Err(_) if total > 0 => break,
            result => result?,
        };
        if done == 0 {
            break;
        }
        total = total.saturating_add(done);
        advance(&mut rest, done)?;
    }
    Ok(total)
}

/// Drops the first `done` bytes.
fn advance(slices: &mut Vec<VolatileSlice<'_>>, mut done: usize) -> Result<(), Errno> {
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
        *first = first.offset(done).map_err(|_| Errno::INVAL)?;
    }
    Ok(())
}

#[expect(unsafe_code, reason = "vectored system calls on guest memory, which is never borrowed as Rust slices")]
fn once(
    file: BorrowedFd<'_>,
    offset: u64,
    slices: &[VolatileSlice<'_>],
    flags: i32,
    vectored: Vectored,
) -> Result<usize, Errno> {
    let guards: Vec<_> = slices.iter().take(MAX_VECTORS).map(VolatileSlice::ptr_guard_mut).collect();
    let vectors: Vec<libc::iovec> =
        guards.iter().map(|guard| libc::iovec { iov_base: guard.as_ptr().cast(), iov_len: guard.len() }).collect();
    let count = libc::c_int::try_from(vectors.len()).map_err(|_| Errno::INVAL)?;
    let offset = libc::off_t::try_from(offset).map_err(|_| Errno::INVAL)?;
    // SAFETY: each vector is a volatile slice, valid for reads and writes of its length as long as its guard lives,
    // which is until the end of this function; `count` is their number. The guest may change the bytes meanwhile,
    // which the kernel is prepared for.
    let done = unsafe { vectored(file.as_raw_fd(), vectors.as_ptr(), count, offset, flags) };
    usize::try_from(done).map_err(|_| Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO))
}
