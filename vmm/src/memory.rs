//! Guest RAM: private anonymous memory, a memfd that other processes may map, or a private mapping of a snapshot.
#![expect(unsafe_code, reason = "memory slots are promised to KVM; madvise")]

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use hypervisor::{MemorySlot, Vm};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{Advice, madvise};
use virtio_devices::device::Memory;
use virtio_devices::mapping::Mapping;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap, MmapRegion};

use crate::plan::{PlannedRam, PlannedWindow};

/// Bytes of memory that are copied, or left out because they are zero, at once.
const COPIED_AT_ONCE: usize = 64 << 10;

/// Why there is no guest memory.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The host has not that much.
    #[error("cannot get {bytes} bytes of guest memory: {source}")]
    Allocate {
        /// Bytes asked for.
        bytes: u64,
        /// The cause.
        source: io::Error,
    },
    /// It cannot be copied.
    #[error("cannot copy the template's memory: {0}")]
    Copy(io::Error),
    /// KVM refused.
    #[error(transparent)]
    Hypervisor(#[from] hypervisor::Error),
}

/// RAM as planned that shows a snapshot's memory, which is `file`; what the guest writes stays its own.
///
/// # Errors
/// If the host refuses.
pub fn map_private(ram: &[PlannedRam], file: &Arc<File>) -> Result<Memory, MemoryError> {
    let bytes: u64 = ram.iter().map(|r| r.len).sum();
    let fail = |source| MemoryError::Allocate { bytes, source };
    let mut offset = 0;
    let mut regions = Vec::new();
    for range in ram {
        let len = usize::try_from(range.len).map_err(|e| fail(io::Error::other(e)))?;
        let region = MmapRegion::build(
            Some(FileOffset::from_arc(file.clone(), offset)),
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_NORESERVE,
        );
        let region = region.map_err(|e| fail(io::Error::other(e)))?;
        let region = GuestRegionMmap::new(region, GuestAddress(range.start));
        regions.push(region.ok_or_else(|| fail(io::ErrorKind::InvalidInput.into()))?);
        offset = offset.saturating_add(range.len);
    }
    Memory::from_regions(regions).map_err(|e| fail(io::Error::other(e)))
}

/// RAM as planned with what is in `file`, a copy of its own.
///
/// # Errors
/// If the host has not that much, or the file cannot be read.
pub fn copy_of(ram: &[PlannedRam], file: &File, shared: bool) -> Result<Memory, MemoryError> {
    let memory = allocate(ram, shared)?;
    let mut part = vec![0; COPIED_AT_ONCE];
    let mut offset = 0;
    for range in ram {
        let mut done = 0;
        while done < range.len {
            let n = usize::try_from(range.len - done).unwrap_or(usize::MAX).min(COPIED_AT_ONCE);
            let part = part.get_mut(..n).unwrap_or_default();
            file.read_exact_at(part, offset).map_err(MemoryError::Copy)?;
            // Pages of zeroes are there already, and need not take room.
            if part.iter().any(|byte| *byte != 0) {
                let address = GuestAddress(range.start.saturating_add(done));
                memory.write_slice(part, address).map_err(|e| MemoryError::Copy(io::Error::other(e)))?;
            }
            done = done.saturating_add(n as u64);
            offset = offset.saturating_add(n as u64);
        }
    }
    Ok(memory)
}

/// Allocates RAM as planned; `shared` makes it a memfd.
///
/// # Errors
/// If the host refuses.
pub fn allocate(ram: &[PlannedRam], shared: bool) -> Result<Memory, MemoryError> {
    let bytes: u64 = ram.iter().map(|r| r.len).sum();
    let fail = |source| MemoryError::Allocate { bytes, source };
    let memfd = shared.then(|| memfd(bytes)).transpose().map_err(fail)?;
    let mut offset = 0;
    let mut ranges = Vec::new();
    for range in ram {
        let len = usize::try_from(range.len).map_err(|e| fail(io::Error::other(e)))?;
        let file = memfd.as_ref().map(|f| f.try_clone().map(|f| FileOffset::new(f, offset))).transpose();
        ranges.push((GuestAddress(range.start), len, file.map_err(fail)?));
        offset = offset.saturating_add(range.len);
    }
    Memory::from_ranges_with_files(ranges).map_err(|e| fail(io::Error::other(e)))
}

fn memfd(bytes: u64) -> io::Result<File> {
    let fd = memfd_create("guest-ram", MemfdFlags::CLOEXEC)?;
    ftruncate(&fd, bytes)?;
    Ok(fd.into())
}

/// Shows RAM to the guest, or lets it be logged from now on, or no more, what vCPUs write to it. The caller keeps `mem` until
/// `vm` is gone.
///
/// # Errors
/// If KVM refuses.
pub fn set_ram(vm: &dyn Vm, ram: &[PlannedRam], mem: &Memory, log_dirty: bool) -> Result<(), MemoryError> {
    for (planned, region) in ram.iter().zip(mem.iter()) {
        let slot = MemorySlot {
            slot: planned.slot,
            guest: region.start_addr().0,
            len: region.len(),
            host: region.as_ptr() as u64,
            log_dirty,
        };
        // SAFETY: the region is a mapping owned by `mem`, which the machine drops after the VM; all accesses to guest
        // memory in this process go through vm-memory's volatile accessors.
        unsafe { vm.add_memory_slot(&slot) }?;
    }
    Ok(())
}

/// The file of which memory is a private mapping, if it is one.
#[must_use]
pub fn template(mem: &Memory) -> Option<Arc<File>> {
    let mut files = mem.iter().map(|region| {
        let private = region.flags() & libc::MAP_PRIVATE != 0;
        region.file_offset().filter(|_| private).map(|offset| offset.arc().clone())
    });
    files.next().flatten()
}

/// Where byte `offset` of RAM, its ranges one after the other, is in the guest's physical memory.
#[must_use]
pub fn guest_address(ram: &[PlannedRam], mut offset: u64) -> Option<u64> {
    for range in ram {
        match offset.checked_sub(range.len) {
            None => return range.start.checked_add(offset),
            Some(rest) => offset = rest,
        }
    }
    None
}

/// Leaves memory out of processes that are forked from this one, or not any more.
///
/// # Errors
/// If the host refuses.
pub fn keep_from_forks(mem: &Memory, keep: bool) -> io::Result<()> {
    let advice = if keep { Advice::LinuxDontFork } else { Advice::LinuxDoFork };
    for region in mem.iter() {
        let len = usize::try_from(region.len()).map_err(io::Error::other)?;
        // SAFETY: the range is `mem`'s, and no byte of it is changed. A child that has it not is one that does not use it.
        unsafe { madvise(region.as_ptr().cast(), len, advice) }?;
    }
    Ok(())
}

/// Shows a device's window to the guest. The caller keeps `mapping` until `vm` is gone.
///
/// # Errors
/// If KVM refuses.
pub fn add_window(vm: &dyn Vm, window: PlannedWindow, mapping: &Mapping) -> Result<(), MemoryError> {
    let slot = MemorySlot {
        slot: window.slot,
        guest: window.start,
        len: window.len.min(mapping.len()),
        host: mapping.host_address(),
        log_dirty: false,
    };
    // SAFETY: the range is owned by `mapping`, which the machine drops after the VM, and nobody in this process reads
    // or writes it.
    unsafe { vm.add_memory_slot(&slot) }?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use virtio_devices::registry::KINDS;

    use super::*;

    /// Why nothing may discard pages of guest RAM: a clone's would show the template's bytes again, not zeroes, so what a
    /// guest believes to be erased would be back. No kind of device takes pages back, and who adds one finds this.
    #[test]
    fn a_discarded_page_would_show_the_template_again() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[7; 8192], 0).unwrap();
        let memory = map_private(&[PlannedRam { start: 0, len: 8192, slot: 0 }], &Arc::new(file)).unwrap();
        memory.write_slice(&[0; 8192], GuestAddress(0)).unwrap();
        let region = memory.iter().next().unwrap();
        // SAFETY: the page is the test's own, and nothing refers to what is in it.
        unsafe { madvise(region.as_ptr().cast(), 4096, Advice::LinuxDontNeed) }.unwrap();
        let bytes = [0, 4096].map(|at| memory.read_obj::<u8>(GuestAddress(at)).unwrap());
        assert_eq!(bytes, [7, 0]);
        let names: Vec<_> = KINDS.iter().map(|kind| kind.name).collect();
        assert!(!names.contains(&"balloon") && !names.contains(&"mem"), "{names:?}");
    }
}
