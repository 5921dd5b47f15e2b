//! Copies of the pages in which a machine's memory differs from the template's, made for a live snapshot.
//!
//! They are made while the machine runs, with KVM logging what its vCPUs write, and once more, of the pages in the log, when
//! it stands still. With the template they are its memory as it was then.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use hypervisor::Vm;
use virtio_devices::device::Memory;
use virtio_devices::mapping::{PAGE, PAGE_SIZE};
use vm_memory::{Bytes, GuestAddress};

use super::{SnapshotError, WorkingSet};
use crate::memory::{self, MemoryError};
use crate::plan::PlannedRam;

/// The most pages that are copied; of more, a fork keeps them for less.
const MAX_PAGES: usize = 8192;

/// A log of what vCPUs write, kept until this is dropped.
pub struct Log<'a> {
    vm: &'a dyn Vm,
    ram: &'a [PlannedRam],
    memory: &'a Memory,
}

impl<'a> Log<'a> {
    /// Begins.
    ///
    /// # Errors
    /// If KVM refuses.
    pub fn begin(vm: &'a dyn Vm, ram: &'a [PlannedRam], memory: &'a Memory) -> Result<Self, MemoryError> {
        let this = Self { vm, ram, memory };
        memory::set_ram(vm, ram, memory, true)?;
        Ok(this)
    }

    /// Calls `each` with the guest address of every page that was written since the last time.
    fn take(&self, mut each: impl FnMut(u64) -> io::Result<()>) -> Result<(), SnapshotError> {
        let unsaved = |e: &dyn std::error::Error| SnapshotError::Unsaved(e.to_string());
        for range in self.ram {
            let words = self.vm.dirty_log(range.slot, range.len).map_err(|e| unsaved(&e))?;
            for (number, word) in (0u64..).zip(words) {
                for bit in (0..64).filter(|bit| word >> bit & 1 == 1) {
                    let offset = number.saturating_mul(64).saturating_add(bit).saturating_mul(PAGE_SIZE);
                    if offset < range.len {
                        each(range.start.saturating_add(offset)).map_err(|e| unsaved(&e))?;
                    }
                }
            }
        }
        Ok(())
    }
}

impl Drop for Log<'_> {
    fn drop(&mut self) {
        if let Err(e) = memory::set_ram(self.vm, self.ram, self.memory, false) {
            log::warn!("what the guest writes is logged on: {e}");
        }
    }
}

/// Pages, by guest address.
pub struct Copies {
    template: Arc<File>,
    places: HashMap<u64, usize>,
    bytes: Vec<u8>,
}

impl Copies {
    /// Copies the pages of `memory`, a private mapping, that are not the template's any more. Nothing if it is no such
    /// mapping, or has so many that copying them is the dearer way. Devices rest; the vCPUs' writes are being logged.
    ///
    /// # Errors
    /// If the kernel does not tell which they are.
    pub fn of(memory: &Memory, ram: &[PlannedRam]) -> io::Result<Option<Self>> {
        let Some(template) = memory::template(memory) else { return Ok(None) };
        let set = WorkingSet::record(memory, std::iter::empty())?;
        let mut places = HashMap::new();
        for offset in set.written_pages() {
            let Some(address) = memory::guest_address(ram, offset).filter(|_| places.len() < MAX_PAGES) else {
                return Ok(None);
            };
            let place = places.len();
            places.insert(address, place);
        }
        // Also room for pages that are written only now.
        let bytes = vec![1; places.len().saturating_mul(2).saturating_mul(PAGE)];
        let mut this = Self { template, places, bytes };
        let pages: Vec<u64> = this.places.keys().copied().collect();
        pages.into_iter().try_for_each(|address| this.copy(memory, address))?;
        Ok(Some(this))
    }

    /// Copies again what has been written since, while vCPUs rest.
    ///
    /// # Errors
    /// If KVM does not tell what that is.
    pub fn complete(&mut self, memory: &Memory, log: &Log<'_>) -> Result<(), SnapshotError> {
        log.take(|address| self.copy(memory, address))
    }

    fn copy(&mut self, memory: &Memory, address: u64) -> io::Result<()> {
        let next = self.places.len();
        let start = self.places.entry(address).or_insert(next).saturating_mul(PAGE);
        let end = start.saturating_add(PAGE);
        if self.bytes.len() < end {
            self.bytes.resize(end, 0);
        }
        let page = self.bytes.get_mut(start..end).unwrap_or_default();
        memory.read_slice(page, GuestAddress(address)).map_err(io::Error::other)
    }

    /// The template's memory, which [`Copies::memory`] maps.
    #[must_use]
    pub fn template(&self) -> BorrowedFd<'_> {
        self.template.as_fd()
    }

    /// The memory as it was.
    ///
    /// # Errors
    /// If the host has no addresses left.
    pub fn memory(&self, ram: &[PlannedRam]) -> Result<Memory, SnapshotError> {
        let unsaved = |e: &dyn std::error::Error| SnapshotError::Unsaved(e.to_string());
        let memory = memory::map_private(ram, &self.template).map_err(|e| unsaved(&e))?;
        for (address, place) in &self.places {
            let page = self.bytes.get(place.saturating_mul(PAGE)..).and_then(|rest| rest.get(..PAGE));
            memory.write_slice(page.unwrap_or_default(), GuestAddress(*address)).map_err(|e| unsaved(&e))?;
        }
        Ok(memory)
    }
}

#[cfg(test)]
mod tests {
    use hypervisor::Hypervisor;
    use hypervisor::fake::FakeHypervisor;

    use super::*;

    fn ram() -> Vec<PlannedRam> {
        [(0, 1 << 20, 0), (1 << 32, 1 << 20, 1)].map(|(start, len, slot)| PlannedRam { start, len, slot }).into()
    }

    fn mapped(bytes: u8) -> Memory {
        let file = tempfile::tempfile().unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &vec![bytes; 2 << 20], 0).unwrap();
        memory::map_private(&ram(), &Arc::new(file)).unwrap()
    }

    #[test]
    fn template_and_copies_are_the_memory_as_it_was() {
        let memory = mapped(7);
        memory.write_obj(1u8, GuestAddress(0x3001)).unwrap();
        memory.write_obj(2u8, GuestAddress((1 << 32) + 0x5000)).unwrap();
        let mut copies = Copies::of(&memory, &ram()).unwrap().unwrap();
        assert_eq!(copies.places.len(), 2);
        // Written while it went on: one page again, one for the first time, and more than there is room for.
        memory.write_obj(3u8, GuestAddress(0x3002)).unwrap();
        for page in 0..20u8 {
            memory.write_obj(page, GuestAddress(0x10000 + u64::from(page) * PAGE_SIZE)).unwrap();
            copies.copy(&memory, 0x10000 + u64::from(page) * PAGE_SIZE).unwrap();
        }
        copies.copy(&memory, 0x3000).unwrap();
        let then = copies.memory(&ram()).unwrap();
        // What comes after is not in it.
        memory.write_obj(9u8, GuestAddress(0x3001)).unwrap();
        let byte = |memory: &Memory, at: u64| memory.read_obj::<u8>(GuestAddress(at)).unwrap();
        let seen = [0x3000, 0x3001, 0x3002, (1 << 32) + 0x5000, 0x13000, (1 << 32) + 0x6000].map(|at| byte(&then, at));
        assert_eq!(seen, [7, 1, 3, 2, 3, 7]);
    }

    #[test]
    fn what_was_written_meanwhile_is_copied_again() {
        let fake = FakeHypervisor::new(Vec::new());
        let vm = fake.create_vm().unwrap();
        let (memory, ram) = (mapped(7), ram());
        memory.write_obj(1u8, GuestAddress(0x3000)).unwrap();
        let log = Log::begin(vm.as_ref(), &ram, &memory).unwrap();
        let mut copies = Copies::of(&memory, &ram).unwrap().unwrap();
        for page in [3, 4, 70] {
            memory.write_obj(2u8, GuestAddress(page * PAGE_SIZE)).unwrap();
        }
        // KVM saw two of the three; and a page behind the end of the slot is none.
        fake.log.lock().unwrap().dirty = vec![1 << 3, 1 << 6, 0, 0, 1];
        copies.complete(&memory, &log).unwrap();
        drop(log);
        let logged: Vec<bool> = fake.log.lock().unwrap().slots.iter().map(|slot| slot.log_dirty).collect();
        assert_eq!(logged, [true, true, false, false], "of both slots, and no more");
        let then = copies.memory(&ram).unwrap();
        let seen = [3, 4, 70].map(|page| then.read_obj::<u8>(GuestAddress(page * PAGE_SIZE)).unwrap());
        assert_eq!(seen, [2, 7, 2]);
    }

    #[test]
    fn what_is_no_mapping_or_has_changed_too_much_is_not_copied() {
        let own = memory::allocate(&ram(), false).unwrap();
        assert!(Copies::of(&own, &ram()).unwrap().is_none());
        let ram = vec![PlannedRam { start: 0, len: 64 << 20, slot: 0 }];
        let file = tempfile::tempfile().unwrap();
        file.set_len(64 << 20).unwrap();
        let memory = memory::map_private(&ram, &Arc::new(file)).unwrap();
        (0..=MAX_PAGES as u64).for_each(|page| memory.write_obj(1u8, GuestAddress(page * PAGE_SIZE)).unwrap());
        assert!(Copies::of(&memory, &ram).unwrap().is_none());
    }
}
