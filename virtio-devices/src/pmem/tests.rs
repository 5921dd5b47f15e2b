//! The persistent memory device: its mapping, its flush queue, and what it refuses.
#![expect(unsafe_code, reason = "the tests play the guest and touch the mapping")]

use std::fs;
use std::io::Write;
use std::path::Path;

use vm_memory::GuestAddress;

use super::*;
use crate::device::Device;
use crate::testkit::{Buffer, Driver};

const GUEST: GuestAddress = GuestAddress(4 << 30);

fn image(bytes: usize) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&vec![7; bytes]).unwrap();
    file
}

fn config(path: &Path, discard_writes: bool) -> VmConfig {
    let pmem = PmemConfig { file: path.into(), discard_writes, ..PmemConfig::default() };
    VmConfig { pmem: vec![pmem], ..VmConfig::default() }
}

fn facts(path: &Path) -> HostFacts {
    let mut facts = HostFacts::default();
    if let Ok(metadata) = fs::metadata(path) {
        facts.file_sizes.insert(path.into(), metadata.len());
    }
    facts
}

/// A device and the memory of its window.
struct Made {
    device: Box<dyn Device>,
    mapping: Arc<Mutex<Mapping>>,
}

fn try_make(config: &VmConfig, facts: &HostFacts, saved: Option<&SavedState>) -> Result<Made, BuildError> {
    let request = requests(config, facts).remove(0);
    let Some(WindowRequest::Range { len }) = request.window else { panic!("{request:?}") };
    let pmem = config.pmem.get(request.index);
    let memory = show(&request.id, pmem, len)?;
    let mapping = memory.mapping.clone();
    let device = create(&request.id, pmem, Some((WindowAddress { guest: GUEST, len }, memory)), saved)?.device;
    Ok(Made { device, mapping })
}

fn make(path: &Path, discard_writes: bool) -> Made {
    try_make(&config(path, discard_writes), &facts(path), None).unwrap()
}

fn refusal(path: &Path, discard_writes: bool) -> String {
    let refused = try_make(&config(path, discard_writes), &facts(path), None);
    refused.err().expect("the image should be refused").to_string()
}

/// The guest's access to byte `at` of the window.
fn byte(built: &Made, at: u64) -> *mut u8 {
    let mapping = built.mapping.lock().unwrap();
    assert!(at < mapping.len());
    (mapping.host_address() + at) as *mut u8
}

fn read(built: &Made, at: u64) -> u8 {
    // SAFETY: `byte` checked that it lies in the mapping, all of which is readable.
    unsafe { byte(built, at).read_volatile() }
}

fn write(built: &Made, at: u64, value: u8) {
    // SAFETY: as in `read`; the whole mapping is writable.
    unsafe { byte(built, at).write_volatile(value) }
}

fn pmem() -> Box<dyn Device> {
    make(image(10_000).path(), false).device
}

#[test]
fn an_odd_sized_file_is_padded_with_zeroes() {
    let file = image((2 << 20) + 5000);
    for discard in [true, false] {
        let built = make(file.path(), discard);
        assert_eq!(built.mapping.lock().unwrap().len(), 4 << 20);
        let space = built.device.traits().config.bytes();
        assert_eq!(space, [(4u64 << 30).to_le_bytes(), (4u64 << 20).to_le_bytes()].concat());
        let end = (2 << 20) + 5000;
        assert_eq!([end - 1, end, end + 4096, (4 << 20) - 1].map(|at| read(&built, at)), [7, 0, 0, 0]);
        write(&built, (4 << 20) - 1, 1);
    }
}

#[test]
fn discarded_writes_do_not_reach_the_file() {
    let file = image(4096);
    let (one, two) = (make(file.path(), true), make(file.path(), true));
    write(&one, 0, 9);
    assert_eq!((read(&one, 0), read(&two, 0)), (9, 7));
    assert_eq!(fs::read(file.path()).unwrap(), [7; 4096]);
}

#[test]
fn written_pages_reach_the_file_and_its_size_stays() {
    let file = image(5000);
    let built = make(file.path(), false);
    write(&built, 4999, 9);
    write(&built, 5000, 1);
    let mut driver = Driver::new(built.device);
    let head = driver.offer(0, &[Buffer::readable(&[0; 4]), Buffer::writable(4)]);
    driver.run(0).unwrap();
    assert_eq!(driver.used(0), [(head, 4)]);
    assert_eq!(driver.read(0, head, 1), [0; 4]);
    let bytes = fs::read(file.path()).unwrap();
    assert_eq!((bytes.len(), bytes[4998], bytes[4999]), (5000, 7, 9));
}

/// The fields of /proc/self/smaps, in KiB, of the mapping at the window's start.
fn smaps(built: &Made) -> std::collections::BTreeMap<String, u64> {
    let start = format!("{:x}-", byte(built, 0) as u64);
    let text = fs::read_to_string("/proc/self/smaps").unwrap();
    let lines = text.lines().skip_while(|line| !line.starts_with(&start)).skip(1);
    lines
        .map_while(|line| line.split_once(':'))
        .take_while(|(name, _)| *name != "VmFlags")
        .filter_map(|(name, rest)| Some((name.into(), rest.trim().strip_suffix(" kB")?.parse().ok()?)))
        .collect()
}

#[test]
fn pages_that_are_only_read_exist_once_for_all_machines() {
    let file = image(1 << 20);
    let machines = [make(file.path(), true), make(file.path(), true)];
    for machine in &machines {
        for page in 0..256 {
            assert_eq!(read(machine, page * 4096), 7);
        }
    }
    for machine in &machines {
        let sizes = smaps(machine);
        assert_eq!(sizes["Rss"], 1024);
        assert_eq!(sizes["Anonymous"], 0, "no copies");
        // The file was just written, so the shared pages may still be dirty in the page cache.
        assert_eq!(sizes["Shared_Clean"] + sizes["Shared_Dirty"], 1024);
    }
    write(&machines[0], 0, 1);
    assert_eq!(smaps(&machines[0])["Anonymous"], 4);
    assert_eq!(smaps(&machines[1])["Anonymous"], 0);
}

#[test]
fn an_image_that_cannot_be_used_is_refused_with_a_reason() {
    let file = image(4096);
    let writer = make(file.path(), false);
    assert!(refusal(file.path(), true).contains("in use"));
    assert!(refusal(file.path(), false).contains("in use"));
    drop(writer);
    assert!(refusal(image(0).path(), true).contains("is empty"));
    assert!(refusal(Path::new("/no/image"), true).contains("_pmem0: cannot open /no/image"));
    assert!(refusal(Path::new("/dev/null"), true).contains("neither a regular file"));
}

#[test]
fn an_image_that_grew_after_the_plan_is_refused() {
    let mut file = image(2 << 20);
    let facts = facts(file.path());
    file.write_all(&[1]).unwrap();
    let refused = try_make(&config(file.path(), true), &facts, None).err().unwrap().to_string();
    assert!(refused.contains("has grown"), "{refused}");
}

#[test]
fn a_given_size_decides_the_window() {
    let file = image(3 << 20);
    for (size, len) in [(1 << 20, 2 << 20), (9 << 20, 10 << 20), (u64::MAX, u64::MAX - (2 << 20) + 1)] {
        let mut config = config(file.path(), true);
        config.pmem[0].size = Some(size);
        assert_eq!(requests(&config, &facts(file.path()))[0].window, Some(WindowRequest::Range { len }));
        let built = try_make(&config, &facts(file.path()), None);
        assert_eq!(built.is_ok(), size != u64::MAX);
    }
}

#[test]
fn hostile_requests_are_answered_with_failure_or_nothing() {
    let mut driver = Driver::new(pmem());
    let unknown = driver.offer(0, &[Buffer::readable(&[1, 0, 0, 0]), Buffer::writable(4)]);
    let short = driver.offer(0, &[Buffer::readable(&[0; 3]), Buffer::writable(4)]);
    let no_answer = driver.offer(0, &[Buffer::readable(&[0; 4])]);
    let small_answer = driver.offer(0, &[Buffer::readable(&[0; 4]), Buffer::writable(3)]);
    let wild = driver.offer_parts(0, &[(u64::MAX - 3, 4, false), (u64::MAX - 3, 4, true)]);
    let good = driver.offer(0, &[Buffer::readable(&[0; 4]), Buffer::writable(4)]);
    driver.run(0).unwrap();
    let expected = [(unknown, 4), (short, 4), (no_answer, 0), (small_answer, 0), (wild, 0), (good, 4)];
    assert_eq!(driver.used(0), expected);
    assert_eq!(driver.read(0, unknown, 1), [0xff; 4]);
    assert_eq!(driver.read(0, short, 1), [0xff; 4]);
    assert_eq!(driver.read(0, good, 1), [0; 4]);
}

#[test]
fn a_snapshot_goes_with_its_image_only() {
    let file = image(4096);
    let saved = make(file.path(), true).device.save();
    let restore = |path: &Path, discard, saved: &SavedState| {
        try_make(&config(path, discard), &facts(path), Some(saved)).map(drop).map_err(|e| e.to_string())
    };
    restore(file.path(), true, &saved).unwrap();
    assert!(restore(image(4097).path(), true, &saved).unwrap_err().contains("use the same image"));
    assert!(restore(file.path(), false, &saved).unwrap_err().contains("discard_writes"));
    let newer = SavedState { version: 2, ..saved.clone() };
    assert!(restore(file.path(), true, &newer).unwrap_err().contains("version 2"));
    let other = SavedState { kind: "rng".into(), ..saved.clone() };
    assert!(restore(file.path(), true, &other).unwrap_err().contains("saved state is rng"));
    let damaged = SavedState { body: vec![0xff; 11], ..saved };
    assert!(restore(file.path(), true, &damaged).unwrap_err().contains("damaged"));
}

#[test]
fn a_guest_that_wrote_what_would_be_lost_is_not_saved() {
    let file = image((2 << 20) + 5000);
    let end = (2 << 20) + 5000;
    let padding = (2 << 20) + 8192;
    let lost = |built: &Made| built.device.can_save().err();
    for discard in [true, false] {
        // Reading is no harm, be it the image or the zeroes behind it.
        let built = make(file.path(), discard);
        assert_eq!(lost(&built), None);
        [0, 4096, end - 1, end, padding, (4 << 20) - 1].iter().for_each(|at| assert!(read(&built, *at) < 8));
        assert_eq!(lost(&built), None);
        write(&built, (4 << 20) - 1, 0);
        assert_eq!(lost(&built), None, "the same as before");
        write(&built, padding, 1);
        let said = lost(&built).unwrap();
        let path = file.path().display().to_string();
        assert!(said.contains(&path) && said.contains("would be lost") && said.contains("0x202000"), "{said}");
    }
    // In the image, in its last page and behind it in the same page: copies with discard_writes, otherwise the file's.
    for at in [0, end - 1, end] {
        let built = make(file.path(), true);
        write(&built, at, 9);
        assert!(lost(&built).is_some_and(|said| said.contains("discard_writes=on")), "{at:#x}");
        write(&built, at, if at == end { 0 } else { 7 });
        assert_eq!(lost(&built), None, "{at:#x} is as it was");
    }
    let shared = make(file.path(), false);
    write(&shared, 0, 9);
    assert_eq!(lost(&shared), None);
    drop(shared);
    // Two machines: what one has written is not the other's loss. The whole of an image that was written is found, too.
    let file = image(2 << 20);
    let (one, two) = (make(file.path(), true), make(file.path(), true));
    (0..2 << 20).step_by(4096).for_each(|at| write(&one, at, 9));
    assert!(lost(&one).is_some());
    assert_eq!(lost(&two), None);
}

/// Rather no snapshot than one that lacks something.
#[test]
fn an_image_that_became_shorter_is_no_base_for_a_snapshot() {
    let file = image(8192);
    let built = make(file.path(), true);
    write(&built, 4096, 7);
    assert_eq!(built.device.can_save(), Ok(()));
    file.as_file().set_len(8191).unwrap();
    let said = built.device.can_save().unwrap_err();
    assert!(said.contains("has become shorter"), "{said}");
}

crate::conformance_tests!(super::pmem);
