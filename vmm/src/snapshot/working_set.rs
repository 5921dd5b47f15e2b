//! The pages of a snapshot's memory that a machine needs first, so that others can have them before they run.
//!
//! A machine that was restored or cloned is asked for what it has touched (`vm.working-set`); the answer is kept beside the
//! snapshot, where it is a hint and nothing else: `prefault=on` lets machines that share the memory have those pages from
//! the beginning, the ones that were written as copies of their own.
#![expect(unsafe_code, reason = "madvise")]

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::ops::ControlFlow;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::mm::{Advice, madvise};
use serde::{Deserialize, Serialize};
use virtio_devices::device::Memory;
use virtio_devices::mapping::{PAGE, PAGE_SIZE};
use virtio_devices::pagemap::{Page, pages};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::plan::Plan;

use super::{SnapshotError, WORKING_SET, damaged, file_error, read_file};

/// Bytes that a machine which is told what it needs has beforehand: as copies of its own, and in common with others.
const MOST_COPIES: u64 = 64 << 20;
const MOST_PAGES: u64 = 512 << 20;

/// The longest list that is read, in bytes.
const MAX_LIST: u64 = 16 << 20;

/// Parts of a snapshot's memory: offset and length in bytes, whole pages, in the order of the memory file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WorkingSet {
    /// What was looked at.
    read: Vec<(u64, u64)>,
    /// What was written.
    written: Vec<(u64, u64)>,
    /// What was looked at of images that the guest sees as memory, by the identifier of the device: offsets in the image.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    images: BTreeMap<String, Vec<(u64, u64)>>,
}

impl WorkingSet {
    /// All of a memory of `len` bytes, for machines of which nothing is known.
    #[must_use]
    pub fn whole(len: u64) -> Self {
        Self { read: vec![(0, len)], ..Self::default() }
    }

    /// What a machine whose memory is a private mapping of the snapshot's has touched of that, and of its images: their identifiers,
    /// addresses in this process and lengths.
    ///
    /// # Errors
    /// If the kernel does not tell.
    pub fn record(memory: &Memory, shown: impl Iterator<Item = (String, u64, u64)>) -> io::Result<Self> {
        let (mut read, mut written) = (Vec::new(), Vec::new());
        let mut before = 0;
        for region in memory.iter() {
            pages(region.as_ptr() as u64, region.len(), |offset, page| {
                match page {
                    Page::Missing => {}
                    Page::File => add(&mut read, before + offset),
                    Page::Own => add(&mut written, before + offset),
                }
                Ok(ControlFlow::Continue(()))
            })?;
            before += region.len();
        }
        let mut images = BTreeMap::new();
        for (id, address, len) in shown {
            let list: &mut Vec<_> = images.entry(id).or_default();
            pages(address, len, |offset, page| {
                if page == Page::File {
                    add(list, offset);
                }
                Ok(ControlFlow::Continue(()))
            })?;
        }
        Ok(Self { read, written, images })
    }

    /// The offsets of the pages that were written.
    pub(super) fn written_pages(&self) -> impl Iterator<Item = u64> {
        let pages = |(start, len): &(u64, u64)| (*start..start.saturating_add(*len)).step_by(PAGE);
        self.written.iter().flat_map(pages)
    }

    /// Keeps it beside the snapshot in `directory`, instead of another one.
    ///
    /// # Errors
    /// If it cannot be written; what was there before is there then.
    pub fn write(&self, directory: &Path) -> Result<(), SnapshotError> {
        let path = directory.join(WORKING_SET);
        // Several machines may write one at once.
        let partial = directory.join(format!("{WORKING_SET}.{}.partial", std::process::id()));
        let write = || -> io::Result<()> {
            let text = serde_json::to_vec(self)?;
            if text.len() as u64 > MAX_LIST {
                return Err(io::ErrorKind::FileTooLarge.into());
            }
            let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&partial)?;
            file.write_all(&text)?;
            file.sync_all()?;
            fs::rename(&partial, &path)?;
            File::open(directory)?.sync_all()
        };
        write().map_err(file_error("write", &path))
    }

    /// Reads what is kept beside a snapshot whose memory has `len` bytes; nothing if nothing is.
    ///
    /// # Errors
    /// If it cannot be read, or is about another memory.
    pub fn read(directory: &Path, len: u64) -> Result<Option<Self>, SnapshotError> {
        let path = directory.join(WORKING_SET);
        if !fs::exists(&path).map_err(file_error("look for", &path))? {
            return Ok(None);
        }
        Self::parse(&read_file(&path, MAX_LIST)?, len).map(Some).map_err(|why| damaged(&path, why))
    }

    /// Reads what is in `file`, for a machine whose memory has `len` bytes. Whoever ran before does not decide alone what that machine has:
    /// of each kind there is no more than [`MOST_COPIES`] and [`MOST_PAGES`].
    ///
    /// # Errors
    /// As [`WorkingSet::read`], and if it is no regular file.
    pub fn read_from(file: File, len: u64) -> io::Result<Self> {
        let data = file.metadata()?;
        if !data.is_file() || data.len() > MAX_LIST {
            return Err(io::Error::other("it is no file, or one that is too large"));
        }
        let mut text = Vec::new();
        file.take(MAX_LIST).read_to_end(&mut text)?;
        let mut this = Self::parse(&text, len).map_err(io::Error::other)?;
        let mut left = MOST_COPIES;
        keep(&mut this.written, &mut left);
        left = MOST_PAGES;
        for list in std::iter::once(&mut this.read).chain(this.images.values_mut()) {
            keep(list, &mut left);
        }
        Ok(this)
    }

    fn parse(text: &[u8], len: u64) -> Result<Self, String> {
        let this: Self = serde_json::from_slice(text).map_err(|e| format!("it is no list of pages: {e}"))?;
        // In order and without overlap, so that populating it takes no longer than the memory is large.
        let fits = |list: &[(u64, u64)], len: u64| {
            let mut before = 0;
            list.iter().all(|(start, size)| {
                let whole = start % PAGE_SIZE == 0 && size % PAGE_SIZE == 0 && *size > 0;
                let end = start.checked_add(*size).filter(|end| whole && *start >= before && *end <= len);
                before = end.unwrap_or(before);
                end.is_some()
            })
        };
        // How long an image is is not known here.
        let images = this.images.values().all(|list| fits(list, u64::MAX));
        if fits(&this.read, len) && fits(&this.written, len) && images {
            Ok(this)
        } else {
            Err("it is about a memory of another size; record it again".into())
        }
    }

    /// The parts of it that a machine like `plan` has, as guest addresses and lengths, whole pages: first what was written.
    #[must_use]
    pub fn in_guest(&self, plan: &Plan) -> Vec<(u64, u64)> {
        let mut parts = Vec::new();
        for list in [&self.written, &self.read] {
            let mut before = 0_u64;
            for range in &plan.ram {
                parts.extend(list.iter().filter_map(|part| within(*part, before, range.len, range.start)));
                before = before.saturating_add(range.len);
            }
        }
        for (device, window) in plan.devices.iter().filter_map(|device| Some((device, device.window?))) {
            let list = self.images.get(&device.id).map(Vec::as_slice).unwrap_or_default();
            parts.extend(list.iter().filter_map(|part| within(*part, 0, window.len, window.start)));
        }
        parts
    }

    /// Lets `memory` have these pages. What the host refuses is left for the guest to touch.
    pub fn populate(&self, memory: &Memory) {
        let mut before = 0;
        for region in memory.iter() {
            let end = before + region.len();
            let parts = |list: &[(u64, u64)], advice| {
                for (start, size) in list {
                    let (first, last) = ((*start).max(before), start.saturating_add(*size).min(end));
                    let (Ok(at), Ok(len)) =
                        (usize::try_from(first - before), usize::try_from(last.saturating_sub(first)))
                    else {
                        continue;
                    };
                    if first >= last {
                        continue;
                    }
                    // SAFETY: the part lies in the region, which `memory` owns; populating changes no byte of it.
                    if let Err(e) = unsafe { madvise(region.as_ptr().wrapping_add(at).cast(), len, advice) } {
                        log::warn!("cannot have the working set beforehand: {e}");
                        return;
                    }
                }
            };
            parts(&self.written, Advice::LinuxPopulateWrite);
            parts(&self.read, Advice::LinuxPopulateRead);
            before = end;
        }
    }
}

/// Keeps of `list` what `left` bytes allow, and takes that from them.
fn keep(list: &mut Vec<(u64, u64)>, left: &mut u64) {
    list.retain(|(_, size)| match left.checked_sub(*size) {
        Some(less) => {
            *left = less;
            true
        }
        None => false,
    });
}

/// The part of a list's entry that lies in `len` bytes from `before` on, where these are at `start`.
fn within((from, size): (u64, u64), before: u64, len: u64, start: u64) -> Option<(u64, u64)> {
    let (first, last) = (from.max(before), from.saturating_add(size).min(before.saturating_add(len)));
    let size = last.checked_sub(first).filter(|size| *size > 0)?;
    Some((start.checked_add(first - before)?, size))
}

/// Adds a page that comes after those in `list`.
fn add(list: &mut Vec<(u64, u64)>, at: u64) {
    match list.last_mut() {
        Some((start, size)) if *start + *size == at => *size += PAGE_SIZE,
        _ => list.push((at, PAGE_SIZE)),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::memory::map_private;
    use crate::plan::PlannedRam;

    const LEN: u64 = 4 << 20;

    /// Memory in two ranges that is a private mapping of a file.
    fn memory() -> Memory {
        let file = tempfile::tempfile().unwrap();
        file.set_len(LEN).unwrap();
        let ram = [(0, 1 << 20, 0), (1 << 32, 3 << 20, 1)].map(|(start, len, slot)| PlannedRam { start, len, slot });
        map_private(&ram, &Arc::new(file)).unwrap()
    }

    fn is_in(list: &[(u64, u64)], at: u64) -> bool {
        list.iter().any(|(start, size)| (*start..start + size).contains(&at))
    }

    #[test]
    fn what_one_machine_touched_another_has_beforehand() {
        let first = memory();
        first.write_obj(1u8, GuestAddress(0x3000)).unwrap();
        first.write_obj(1u8, GuestAddress((1 << 32) + 0x5000)).unwrap();
        let _: u8 = first.read_obj(GuestAddress((1 << 32) + 0x10_0000)).unwrap();
        let set = WorkingSet::record(&first, std::iter::empty()).unwrap();
        assert_eq!(set.written, [(0x3000, PAGE_SIZE), ((1 << 20) + 0x5000, PAGE_SIZE)]);
        assert!(is_in(&set.read, 0x20_0000), "{set:?}");
        let second = memory();
        let none = WorkingSet::record(&second, std::iter::empty()).unwrap();
        assert_eq!((none.written.len(), none.read.len()), (0, 0));
        set.populate(&second);
        let after = WorkingSet::record(&second, std::iter::empty()).unwrap();
        assert_eq!(after.written, set.written);
        assert!(is_in(&after.read, 0x20_0000), "{after:?}");
        let byte: u8 = second.read_obj(GuestAddress(0x3000)).unwrap();
        assert_eq!(byte, 0, "the other's write is the other's");
    }

    #[test]
    fn parts_are_where_the_guest_has_them() {
        let page = PAGE_SIZE;
        // Two ranges of memory, one page and many, and a list's entry that lies in both.
        let both = (0, 3 * page);
        assert_eq!(within(both, 0, page, 0), Some((0, page)));
        assert_eq!(within(both, page, 100 * page, 1 << 32), Some((1 << 32, 2 * page)));
        assert_eq!(within((2 * page, page), page, 100 * page, 1 << 32), Some(((1 << 32) + page, page)));
        for outside in [(page, page), (u64::MAX - page, page), (u64::MAX - 1, u64::MAX)] {
            assert_eq!(within(outside, 0, page, 0), None);
        }
        assert_eq!(within((page, page), 0, 2 * page, u64::MAX), None);
    }

    #[test]
    fn what_was_looked_at_of_an_image_is_known_too() {
        let image = memory();
        let _: u8 = image.read_obj(GuestAddress((1 << 32) + 0x10_0000)).unwrap();
        let shown = image.iter().nth(1).map(|region| ("_pmem0".to_owned(), region.as_ptr() as u64, region.len()));
        let set = WorkingSet::record(&memory(), shown.into_iter()).unwrap();
        assert_eq!((set.read.len(), set.written.len()), (0, 0));
        assert!(is_in(&set.images["_pmem0"], 0x10_0000), "{set:?}");
        let text = serde_json::to_vec(&set).unwrap();
        assert_eq!(WorkingSet::parse(&text, LEN).unwrap(), set);
        let damaged = r#"{"read":[],"written":[],"images":{"_pmem0":[[4096,8192],[4096,4096]]}}"#;
        assert!(WorkingSet::parse(damaged.as_bytes(), LEN).is_err());
    }

    #[test]
    fn one_who_is_told_has_no_more_than_is_good() {
        let file = tempfile::tempfile().unwrap();
        let many = WorkingSet { written: vec![(0, PAGE_SIZE), (PAGE_SIZE, MOST_COPIES)], ..WorkingSet::default() };
        serde_json::to_writer(&file, &many).unwrap();
        std::io::Seek::rewind(&mut &file).unwrap();
        assert_eq!(WorkingSet::read_from(file, 1 << 40).unwrap().written, [(0, PAGE_SIZE)]);
        let (pipe, _writer) = rustix::pipe::pipe().unwrap();
        assert!(WorkingSet::read_from(pipe.into(), LEN).is_err(), "it would be waited for");
    }

    #[test]
    fn it_is_kept_beside_the_snapshot() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(WorkingSet::read(directory.path(), LEN).unwrap(), None);
        let set = WorkingSet { read: vec![(0, 4096)], written: vec![(LEN - 4096, 4096)], ..WorkingSet::default() };
        set.write(directory.path()).unwrap();
        assert_eq!(WorkingSet::read(directory.path(), LEN).unwrap(), Some(set));
        let refusal = |len| WorkingSet::read(directory.path(), len).unwrap_err().to_string();
        assert!(refusal(LEN - 4096).contains("another size"));
        for text in [
            r#"{"read":[[0,1]],"written":[]}"#,
            r#"{"read":[[18446744073709547520,8192]],"written":[]}"#,
            r#"{"read":[[4096,4096],[0,8192]],"written":[]}"#,
        ] {
            fs::write(directory.path().join(WORKING_SET), text).unwrap();
            assert!(refusal(LEN).contains("another size"), "{text}");
        }
        fs::write(directory.path().join(WORKING_SET), "[").unwrap();
        assert!(refusal(LEN).contains("no list of pages"));
    }

    #[test]
    fn a_host_that_refuses_is_no_harm() {
        let memory = memory();
        // Not a part of this memory: left out.
        let outside = vec![(LEN, 4096), (u64::MAX - 4095, 4096)];
        WorkingSet { read: outside, ..WorkingSet::default() }.populate(&memory);
        WorkingSet::whole(LEN).populate(&memory);
        assert_eq!(WorkingSet::record(&memory, std::iter::empty()).unwrap(), WorkingSet::whole(LEN));
    }
}
