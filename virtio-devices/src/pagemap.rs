//! What is behind the pages of this process (Linux, Documentation/admin-guide/mm/pagemap.rst).

use std::fs::File;
use std::io;
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;

use crate::mapping::PAGE_SIZE;

/// What is behind a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Page {
    /// Nothing yet.
    Missing,
    /// A page of the file that is mapped.
    File,
    /// Memory of this process alone, or the page of zeroes that all have.
    Own,
}

/// Bytes of an entry.
const ENTRY: u64 = 8;
const PRESENT_OR_SWAPPED: u64 = 3 << 62;
const FILE_PAGE: u64 = 1 << 61;

/// Calls `each` with the offset of every page of the `len` bytes at `address`, both multiples of the page size, until it
/// has seen enough.
///
/// # Errors
/// If it cannot be found out, and what `each` answers.
pub fn pages(address: u64, len: u64, mut each: impl FnMut(u64, Page) -> io::Result<ControlFlow<()>>) -> io::Result<()> {
    let pagemap = File::open("/proc/self/pagemap")?;
    let mut entries = vec![0; 64 << 10];
    let mut at = 0;
    while at < len {
        let wanted = usize::try_from((len - at) / PAGE_SIZE * ENTRY).unwrap_or(usize::MAX);
        let part = entries.len().min(wanted);
        let part = entries.get_mut(..part).filter(|part| !part.is_empty()).ok_or(io::ErrorKind::InvalidInput)?;
        pagemap.read_exact_at(part, address.saturating_add(at) / PAGE_SIZE * ENTRY)?;
        for entry in part.as_chunks().0 {
            let page = match u64::from_ne_bytes(*entry) {
                entry if entry & PRESENT_OR_SWAPPED == 0 => Page::Missing,
                entry if entry & FILE_PAGE != 0 => Page::File,
                _ => Page::Own,
            };
            if each(at, page)?.is_break() {
                return Ok(());
            }
            at = at.saturating_add(PAGE_SIZE);
        }
    }
    Ok(())
}
