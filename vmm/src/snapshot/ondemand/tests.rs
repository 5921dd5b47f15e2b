//! Memory that is touched, damaged and given up.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryRegion};

use super::*;
use crate::memory as ram;
use crate::plan::PlannedRam;
use crate::snapshot::memory;

/// After this long somebody waits for ever.
const HANG: Duration = Duration::from_secs(60);
const HIGH: u64 = 1 << 32;
/// Two chunks and a page; the second chunk is zeroes.
const LOW_LEN: u64 = 2 * CHUNK + PAGE;
const RAM: [PlannedRam; 2] =
    [PlannedRam { start: 0, len: LOW_LEN, slot: 0 }, PlannedRam { start: HIGH, len: 4 * CHUNK, slot: 1 }];
const PAGES: u64 = (LOW_LEN + 4 * CHUNK) / PAGE;
/// Where the file has the second range's second chunk.
const SECOND_HIGH: u64 = LOW_LEN + CHUNK;

/// Memory in a file, what it was, and memory that comes from it.
struct Restored {
    directory: TempDir,
    before: Memory,
    now: Memory,
    ondemand: OnDemand,
    told: Receiver<MachineEvent>,
}

impl Restored {
    fn new(prefault: bool) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("memory");
        let before = ram::allocate(&RAM, false).unwrap();
        for at in (0..CHUNK).chain(2 * CHUNK..LOW_LEN).chain(HIGH..HIGH + 4 * CHUNK).step_by(8) {
            before.write_obj(at + 1, GuestAddress(at)).unwrap();
        }
        let file = File::create(&path).unwrap();
        let sums = memory::write(&before, &RAM, &file).unwrap();
        let file = Arc::new(MemoryFile::open(path, sums.as_slice(), &RAM).unwrap());
        let source = Source { file, uffd: Mutex::new(Some(Uffd::open().unwrap())), prefault };
        let now = ram::allocate(&RAM, false).unwrap();
        let (sender, told) = channel();
        let report = Arc::new(move |event| sender.send(event).unwrap());
        let ondemand = OnDemand::start(&source, &now, Arc::new(|| Ok(())), report).unwrap();
        Self { directory, before, now, ondemand, told }
    }

    /// Adds one to the byte of the file at `offset`.
    fn change(&self, offset: u64) {
        let file = File::options().read(true).write(true).open(self.directory.path().join("memory")).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, offset).unwrap();
        file.write_all_at(&[byte[0].wrapping_add(1)], offset).unwrap();
    }

    fn sentence(&self) -> String {
        let path = self.directory.path().join("memory");
        format!("{} is damaged: the bytes at {SECOND_HIGH:#x} are not what was written", path.display())
    }

    /// How many pages have been placed (`/proc/PID/pagemap`).
    fn present(&self) -> u64 {
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        let present = |address: u64| {
            let mut entry = [0; 8];
            pagemap.read_exact_at(&mut entry, address / PAGE * 8).unwrap();
            entry[7] & 0x80 != 0
        };
        let pages =
            |start: u64, len: u64| (start..start + len).step_by(4096).map(|page| u64::from(present(page))).sum::<u64>();
        self.now.iter().map(|region| pages(region.as_ptr() as u64, region.len())).sum()
    }

    fn assert_same(&self) {
        for range in RAM {
            let read = |memory: &Memory| {
                let mut bytes = vec![0; usize::try_from(range.len).unwrap()];
                memory.read_slice(&mut bytes, GuestAddress(range.start)).unwrap();
                bytes
            };
            assert!(read(&self.now) == read(&self.before), "the range at {:#x}", range.start);
        }
    }

    /// A thread that reads a word; what it finds.
    fn read_aside(&self, at: u64) -> Receiver<u64> {
        let (sender, receiver) = channel();
        let memory = self.now.clone();
        thread::spawn(move || sender.send(memory.read_obj(GuestAddress(at)).unwrap()).unwrap());
        receiver
    }
}

#[test]
fn only_what_is_touched_is_read() {
    let restored = Restored::new(false);
    restored.ondemand.run().unwrap();
    // Nobody wants it.
    restored.change(SECOND_HIGH);
    assert_eq!(restored.present(), 0);
    assert_eq!(restored.now.read_obj::<u64>(GuestAddress(0x1230)).unwrap(), 0x1231);
    assert_eq!(restored.present(), 16);
    assert_eq!(restored.now.read_obj::<u64>(GuestAddress(2 * CHUNK + 8)).unwrap(), 2 * CHUNK + 9);
    assert_eq!(restored.present(), 17);
    restored.now.write_obj(5u64, GuestAddress(HIGH + 3 * CHUNK)).unwrap();
    assert_eq!(restored.present(), 33);
    assert_eq!(restored.now.read_obj::<u64>(GuestAddress(HIGH + 3 * CHUNK)).unwrap(), 5);
    assert_eq!(restored.now.read_obj::<u64>(GuestAddress(CHUNK)).unwrap(), 0);
    restored.ondemand.check().unwrap();
    drop(restored.ondemand);
    assert!(restored.told.try_recv().is_err());
}

#[test]
fn all_of_it_is_what_it_was_whoever_reads_it() {
    let restored = Restored::new(false);
    restored.ondemand.run().unwrap();
    let threads: Vec<_> = (0..4)
        .map(|n| {
            let (memory, before) = (restored.now.clone(), restored.before.clone());
            thread::spawn(move || {
                for page in (0..PAGES).map(|page| (page * 7 + n) % PAGES * PAGE) {
                    let at = GuestAddress(if page < LOW_LEN { page } else { HIGH + page - LOW_LEN } + 8 * n);
                    assert_eq!(memory.read_obj::<u64>(at).unwrap(), before.read_obj::<u64>(at).unwrap(), "{at:?}");
                }
            })
        })
        .collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    restored.assert_same();
}

#[test]
fn who_touches_damaged_memory_waits_until_no_guest_runs() {
    let restored = Restored::new(false);
    restored.change(SECOND_HIGH);
    restored.ondemand.run().unwrap();
    let found = restored.read_aside(HIGH + CHUNK + 8);
    assert_eq!(restored.told.recv_timeout(HANG).unwrap(), MachineEvent::Fault(restored.sentence()));
    // The rest is served as ever, and nothing is said twice.
    let too = restored.read_aside(HIGH + CHUNK + PAGE);
    assert_eq!(restored.now.read_obj::<u64>(GuestAddress(HIGH)).unwrap(), HIGH + 1);
    assert!(found.try_recv().is_err() && too.try_recv().is_err());
    restored.ondemand.rest();
    assert_eq!((found.recv_timeout(HANG).unwrap(), too.recv_timeout(HANG).unwrap()), (0, 0));
    // Also who comes later; no guest runs with that.
    assert_eq!(restored.now.read_obj::<u64>(GuestAddress(HIGH + CHUNK + 2 * PAGE)).unwrap(), 0);
    for refused in [restored.ondemand.run(), restored.ondemand.check(), restored.ondemand.load()] {
        assert_eq!(refused.unwrap_err().to_string(), restored.sentence());
    }
    drop(restored.ondemand);
    assert!(restored.told.try_recv().is_err());
}

#[test]
fn a_builder_asks_whether_something_is_damaged() {
    let restored = Restored::new(false);
    restored.change(SECOND_HIGH);
    assert_eq!(restored.now.read_obj::<u64>(GuestAddress(HIGH + CHUNK)).unwrap(), 0);
    assert_eq!(restored.ondemand.check().unwrap_err().to_string(), restored.sentence());
    drop(restored.ondemand);
    assert!(restored.told.try_recv().is_err());
}

#[test]
fn memory_that_cannot_be_read_is_named() {
    let restored = Restored::new(false);
    File::create(restored.directory.path().join("memory")).unwrap();
    restored.ondemand.run().unwrap();
    let found = restored.read_aside(0);
    let MachineEvent::Fault(why) = restored.told.recv_timeout(HANG).unwrap() else { panic!("no fault") };
    assert!(why.contains("cannot read") && why.contains("/memory: "), "{why}");
    // The machine is dropped; there was no pause before.
    drop(restored.ondemand);
    assert_eq!(found.recv_timeout(HANG).unwrap(), 0);
}

#[test]
fn all_of_it_can_be_loaded() {
    let restored = Restored::new(false);
    restored.change(SECOND_HIGH);
    // What is damaged has not been seen by anybody.
    assert_eq!(restored.ondemand.load().unwrap_err().to_string(), restored.sentence());
    restored.ondemand.check().unwrap();
    (0..255).for_each(|_| restored.change(SECOND_HIGH));
    restored.now.write_obj(9u64, GuestAddress(8)).unwrap();
    restored.ondemand.load().unwrap();
    assert_eq!(restored.present(), PAGES);
    assert_eq!(restored.now.read_obj::<u64>(GuestAddress(8)).unwrap(), 9);
    restored.now.write_obj(9u64, GuestAddress(8)).unwrap();
    restored.before.write_obj(9u64, GuestAddress(8)).unwrap();
    restored.assert_same();
    restored.ondemand.load().unwrap();
}

#[test]
fn all_of_it_comes_in_the_background() {
    let restored = Restored::new(true);
    let deadline = Instant::now() + HANG;
    // There is no event for it.
    while restored.present() < PAGES {
        assert!(Instant::now() < deadline, "{} pages", restored.present());
        thread::yield_now();
    }
    restored.assert_same();
}

#[test]
fn a_thread_that_cannot_be_confined_serves_nothing() {
    let restored = Restored::new(false);
    let source =
        Source { file: restored_file(&restored), uffd: Mutex::new(Some(Uffd::open().unwrap())), prefault: false };
    let memory = ram::allocate(&RAM, false).unwrap();
    let setup: ThreadSetup = Arc::new(|| Err(io::Error::other("no filter")));
    let error = OnDemand::start(&source, &memory, setup.clone(), Arc::new(|_| {})).err().unwrap().to_string();
    assert!(error.starts_with("cannot serve memory from") && error.ends_with("no filter"), "{error}");
    assert!(OnDemand::start(&source, &memory, setup, Arc::new(|_| {})).is_err(), "it was used before");
}

fn restored_file(restored: &Restored) -> Arc<MemoryFile> {
    let sums = vec![0; 32 * 7];
    Arc::new(MemoryFile::open(restored.directory.path().join("memory"), &sums, &RAM).unwrap())
}
