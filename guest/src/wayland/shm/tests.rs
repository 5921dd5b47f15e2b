//! Pools, buffers and what is copied of them.

use super::*;
use crate::wayland::gpu::Mapping;
use std::io::Write;

fn pool(bytes: &[u8]) -> Rc<Pool> {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    Pool::new(file.into(), u32::try_from(bytes.len()).unwrap(), 0, &mut Vec::new()).unwrap()
}

fn blob(size: usize) -> Blob {
    let file = tempfile::tempfile().unwrap();
    file.set_len(u64::try_from(size).unwrap()).unwrap();
    let memory = Mapping::new(file.as_fd(), 0, size, true).unwrap();
    Blob { host: HostBlob { handle: 0, resource: 0, memory }, pool: 0 }
}

fn contents(buffer: &Buffer) -> Vec<u8> {
    let mut bytes = vec![0; buffer.layout.bytes()];
    buffer.blob.host.memory.read(0, &mut bytes).unwrap();
    bytes
}

#[test]
fn buffers_must_lie_inside_their_pool() {
    let pool = pool(&[0; 4096]);
    let ok = |args| Layout::new(&pool, 1, args).is_ok();
    assert!(ok([0, 32, 32, 128, 0]));
    assert!(!ok([4, 32, 32, 128, 0]), "one pixel past the end");
    assert!(!ok([0, 33, 31, 128, 0]), "row wider than the stride");
    assert!(!ok([0, 0, 32, 128, 0]));
    assert!(!ok([0, 32, 0, 128, 0]));
    assert!(!ok([0, 32, 32, 0, 0]));
    assert!(!ok([0, 1, 0x7fff_ffff, 0x7fff_ffff, 0]), "stride * height overflows 32 bits");
    assert!(!ok([0xffff_fff0, 1, 1, 4, 0]), "negative offset");
    assert!(!ok([0, 1, 1, 0x8000_0000, 0]), "negative stride");
}

#[test]
fn a_pool_grows_and_never_shrinks() {
    let pool = pool(&[0; 4096]);
    assert!(Layout::new(&pool, 1, [4096, 1, 1, 4, 0]).is_err());
    pool.resize(1, 8192).unwrap();
    Layout::new(&pool, 1, [4096, 1, 1, 4, 0]).unwrap();
    assert!(pool.resize(1, 4096).is_err());
    assert!(pool.resize(1, 0x8000_0000).is_err());
    assert!(pool.resize(1, 0).is_err());
    Layout::new(&pool, 1, [4096, 1, 1, 4, 0]).unwrap();
}

#[test]
fn pools_are_bounded_and_must_have_a_size() {
    let file = || OwnedFd::from(tempfile::tempfile().unwrap());
    let mut alive = Vec::new();
    assert!(Pool::new(file(), 0, 0, &mut alive).is_err());
    assert!(Pool::new(file(), u32::MAX, 0, &mut alive).is_err());
    let held: Vec<_> = (0..MAX_POOLS).map(|_| Pool::new(file(), 1, 0, &mut alive).unwrap()).collect();
    assert!(Pool::new(file(), 1, 0, &mut alive).is_err());
    drop(held);
    Pool::new(file(), 1, 0, &mut alive).unwrap();
}

#[test]
fn only_what_is_stale_is_copied() {
    let pool = pool(&[7; 64 * 64 * 4]);
    let layout = Layout::new(&pool, 1, [0, 64, 64, 256, 0]).unwrap();
    let mut buffer = Buffer::new(pool, layout, blob(64 * 64 * 4), 0);
    buffer.stale = Region::default();
    buffer.stale.add(Rect::new([3, 5, 10, 2], 1).unwrap());
    buffer.copy(1).unwrap();
    let copied = contents(&buffer);
    for y in 0..64 {
        for x in 0..64 {
            let expected = if (3..13).contains(&x) && (5..7).contains(&y) { 7 } else { 0 };
            assert_eq!(copied[y * 256 + x * 4], expected, "pixel {x},{y}");
        }
    }
    assert!(buffer.stale.is_empty());
    buffer.stale = Region::everything();
    buffer.copy(1).unwrap();
    assert!(contents(&buffer).iter().all(|byte| *byte == 7));
}

#[test]
fn wide_damage_is_one_run_and_narrow_damage_one_per_row() {
    let pool = pool(&[0; 64 * 64 * 4]);
    let layout = Layout::new(&pool, 1, [0, 64, 64, 256, 0]).unwrap();
    let runs = |rect| layout.runs(Rect::new(rect, 1).unwrap()).collect::<Vec<_>>();
    assert_eq!(runs([0, 2, 64, 10]), [(512, 2560)]);
    assert_eq!(runs([1, 2, 60, 10]), [(512, 2560)]);
    assert_eq!(runs([1, 2, 2, 2]), [(516, 8), (772, 8)]);
    let unknown = Layout::new(&pool, 1, [0, 64, 64, 256, u32::from_le_bytes(*b"NV12")]).unwrap();
    assert_eq!(unknown.runs(Rect::new([1, 2, 2, 2], 1).unwrap()).collect::<Vec<_>>(), [(512, 512)]);
}

#[test]
fn a_file_shorter_than_its_pool_is_the_applications_fault() {
    let pool = pool(&[1; 4096]);
    let layout = Layout::new(&pool, 1, [0, 32, 32, 128, 0]).unwrap();
    let mut buffer = Buffer::new(Rc::clone(&pool), layout, blob(4096), 0);
    rustix::fs::ftruncate(&pool.file, 100).unwrap();
    assert!(matches!(buffer.copy(9), Err(SessionError::Application { object: 9, code: code::SHM_INVALID_FD, .. })));
}

#[test]
fn size_classes_are_few_and_waste_little() {
    let mut classes = std::collections::BTreeSet::new();
    for bytes in (1..40_000_000).step_by(4099) {
        let class = size_class(bytes).unwrap();
        assert!(class >= bytes && class.is_multiple_of(4096));
        assert!(class <= bytes + (bytes / 8).max(4096), "{bytes} became {class}");
        classes.insert(class);
    }
    assert!(classes.len() < 150, "{}", classes.len());
    assert_eq!(size_class(MAX_IMAGE + 1), None);
}

#[test]
fn spares_are_bounded_and_counted() {
    let mut store = Store::default();
    store.reserve(MAX_BYTES).unwrap();
    assert!(store.reserve(1).is_err());
    assert_eq!(store.give_back(blob(4096), false).len(), 1, "the host may still read it");
    assert!(store.take(4096).is_none());
    for _ in 0..MAX_SPARES {
        assert!(store.give_back(blob(4096), true).is_empty());
    }
    assert_eq!(store.give_back(blob(8192), true).len(), 1);
    assert!(store.take(8192).is_some());
    assert!(store.take(12288).is_none());
    assert_eq!(store.drain().len(), MAX_SPARES - 1);
}
