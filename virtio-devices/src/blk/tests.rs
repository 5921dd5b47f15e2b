//! The disk, on real files, with drivers that behave and drivers that do not.

use std::fs;
use std::io::Write;
use std::path::Path;

use vm_memory::GuestAddress;

use super::*;
use crate::device::Device;
use crate::testkit::{Buffer, Driver};

const FLUSH: u64 = 1 << 9;
const DISCARD: u64 = 1 << 13;
const WRITE_ZEROES: u64 = 1 << 14;

const IN: u32 = 0;
const OUT: u32 = 1;

fn image(sectors: usize) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    let bytes: Vec<u8> = (0..sectors * 512).map(|i| u8::try_from(i / 512 % 256).unwrap()).collect();
    file.write_all(&bytes).unwrap();
    file
}

fn disk(path: &Path, change: impl FnOnce(&mut DiskConfig)) -> DiskConfig {
    let mut config = DiskConfig { path: path.into(), ..DiskConfig::default() };
    change(&mut config);
    config
}

fn make(path: &Path, change: impl FnOnce(&mut DiskConfig)) -> Box<dyn Device> {
    create("_disk0", Some(&disk(path, change)), None).unwrap().device
}

fn refusal(path: &Path, change: impl FnOnce(&mut DiskConfig)) -> String {
    create("_disk0", Some(&disk(path, change)), None).err().expect("should be refused").to_string()
}

fn blk() -> Box<dyn Device> {
    make(image(64).path(), |_| {})
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    [kind.to_le_bytes().as_slice(), &[0; 4], &sector.to_le_bytes()].concat()
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [sector.to_le_bytes().as_slice(), &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
}

/// Runs one request and gives its status and the length in the used ring.
fn run(driver: &mut Driver, buffers: &[Buffer]) -> (u8, u32) {
    let head = driver.offer(0, buffers);
    driver.run(0).unwrap();
    let status = *driver.read(0, head, buffers.len() - 1).last().unwrap();
    let (used, len) = *driver.used(0).last().unwrap();
    assert_eq!(used, head);
    (status, len)
}

fn request(driver: &mut Driver, kind: u32, sector: u64, data: &[u8]) -> u8 {
    run(driver, &[Buffer::readable(&header(kind, sector)), Buffer::readable(data), Buffer::writable(1)]).0
}

#[test]
fn what_is_written_is_read_and_is_in_the_file() {
    let file = image(64);
    let mut driver = Driver::new(make(file.path(), |_| {}));
    assert_eq!(request(&mut driver, OUT, 3, &[0xaa; 1024]), parse::OK);
    assert_eq!(request(&mut driver, 4, 0, &[]), parse::OK, "flush");
    let bytes = fs::read(file.path()).unwrap();
    assert_eq!((bytes[2 * 512], bytes[3 * 512], bytes[4 * 512], bytes[5 * 512]), (2, 0xaa, 0xaa, 5));
    let buffers =
        [Buffer::readable(&header(IN, 2)), Buffer::writable(512), Buffer::writable(1024), Buffer::writable(1)];
    let head = driver.offer(0, &buffers);
    driver.run(0).unwrap();
    assert_eq!(driver.used(0).last(), Some(&(head, 1537)));
    assert_eq!((driver.read(0, head, 1), driver.read(0, head, 2)), (vec![2; 512], vec![0xaa; 1024]));
    assert_eq!(driver.read(0, head, 3), [parse::OK]);
}

#[test]
fn a_chain_may_be_cut_anywhere() {
    let file = image(8);
    let mut driver = Driver::new(make(file.path(), |_| {}));
    let head = header(OUT, 1);
    let data = [&head[7..], &[9; 500]].concat();
    let buffers =
        [Buffer::readable(&head[..7]), Buffer::readable(&data), Buffer::readable(&[9; 12]), Buffer::writable(1)];
    assert_eq!(run(&mut driver, &buffers), (parse::OK, 1));
    assert_eq!(fs::read(file.path()).unwrap()[512..1024], [9; 512]);
    // Data and status in one buffer.
    let (status, len) = run(&mut driver, &[Buffer::readable(&header(IN, 1)), Buffer::writable(513)]);
    assert_eq!((status, len), (parse::OK, 513));
}

#[test]
fn nothing_outside_the_disk_is_reached() {
    let file = image(64);
    let mut driver = Driver::new(make(file.path(), |_| {}));
    for (sector, len, good) in [
        (63, 512, true),
        (64, 0, true),
        (63, 1024, false),
        (64, 512, false),
        (65, 0, false),
        (u64::MAX, 512, false),
        (u64::MAX / 512, 512, false),
        (1 << 55, 512, false),
        (0, 511, false),
        (0, 513, false),
    ] {
        let expected = if good { parse::OK } else { parse::IOERR };
        assert_eq!(request(&mut driver, OUT, sector, &vec![1; len]), expected, "write {sector} {len}");
        let len = u32::try_from(len).unwrap();
        let (status, _) =
            run(&mut driver, &[Buffer::readable(&header(IN, sector)), Buffer::writable(len), Buffer::writable(1)]);
        assert_eq!(status, expected, "read {sector} {len}");
    }
    assert_eq!(fs::metadata(file.path()).unwrap().len(), 64 * 512);
}

#[test]
fn hostile_chains_are_answered_and_change_nothing() {
    let file = image(64);
    let before = fs::read(file.path()).unwrap();
    let mut driver = Driver::new(make(file.path(), |_| {}));
    let mut lens = Vec::new();
    let mut offer = |driver: &mut Driver, parts: &[(u64, u32, bool)]| {
        let _ = driver.offer_parts(0, parts);
        driver.run(0).unwrap();
        lens.push(driver.used(0).last().unwrap().1);
    };
    let at = driver.alloc(4096);
    vm_memory::Bytes::write_slice(&*driver.memory(), &header(OUT, 0), GuestAddress(at)).unwrap();
    let status = driver.alloc(1);
    offer(&mut driver, &[(at, 16, false), (at + 512, 512, false)]); // no status
    offer(&mut driver, &[(at, 16, false), (at + 512, 512, false), (status, 0, true)]); // no room for it
    offer(&mut driver, &[(at, 15, false), (status, 1, true)]); // half a header
    offer(&mut driver, &[(status, 1, true)]); // no header
    offer(&mut driver, &[(at, 16, true), (at + 512, 512, true), (status, 1, true)]); // writable header
    offer(&mut driver, &[(at, 16, false), (u64::MAX - 511, 512, false), (status, 1, true)]);
    offer(&mut driver, &[(at, 16, false), (1 << 40, 512, false), (status, 1, true)]);
    offer(&mut driver, &[(at, 16, false), (at, u32::MAX, false), (status, 1, true)]);
    let huge = (at, u32::MAX - 511, false);
    offer(&mut driver, &[(at, 16, false), huge, huge, huge, (status, 1, true)]);
    offer(&mut driver, &[(1 << 40, 16, false), (at, 512, false), (status, 1, true)]);
    offer(&mut driver, &[(at, 16, false), (at, 512, false), (1 << 40, 1, true)]); // status nowhere
    offer(&mut driver, &[(at, 16, false), (at, 512, false), (u64::MAX, u32::MAX, true)]);
    offer(&mut driver, &[(at, 16, false), (at, 48 << 20, false), (status, 1, true)]);
    // A chain of 4 GiB or more ends before its status. The chain whose status is nowhere is carried out: only there
    // can it be seen. It wrote its own header.
    assert_eq!(lens, [0, 0, 1, 1, 1, 1, 1, 0, 0, 1, 0, 0, 1]);
    let after = fs::read(file.path()).unwrap();
    assert_eq!(after[512..], before[512..]);
    let head = driver.offer(0, &[Buffer::readable(&header(IN, 1)), Buffer::writable(512), Buffer::writable(1)]);
    driver.run(0).unwrap();
    driver.make_available(0, head);
    driver.run(0).unwrap();
    assert_eq!(driver.used(0).len(), 15, "a head may come again once it was returned");
}

#[test]
fn unknown_requests_are_unsupported() {
    let mut driver = Driver::new(blk());
    for kind in [2, 3, 5, 10, 14, 15, 16, u32::MAX] {
        assert_eq!(request(&mut driver, kind, 0, &[0; 16]), parse::UNSUPP, "{kind}");
    }
}

#[test]
fn a_read_only_disk_cannot_be_changed() {
    let file = image(64);
    let before = fs::read(file.path()).unwrap();
    let device = make(file.path(), |disk| disk.readonly = true);
    assert_eq!(device.traits().features & (1 << 5), 1 << 5);
    assert_eq!(device.traits().features & (FLUSH | DISCARD | WRITE_ZEROES), 0);
    let mut driver = Driver::with_features(device, u64::MAX);
    assert_eq!(request(&mut driver, OUT, 0, &[1; 512]), parse::IOERR);
    assert_eq!(request(&mut driver, 11, 0, &range(0, 8, 0)), parse::UNSUPP);
    assert_eq!(request(&mut driver, 4, 0, &[]), parse::OK);
    assert_eq!(fs::read(file.path()).unwrap(), before);
}

#[test]
fn the_driver_learns_the_disk() {
    let file = image(100);
    let device = make(file.path(), |disk| {
        disk.queue_size = 256;
        disk.num_queues = 3;
        disk.serial = Some("S3R1AL".into());
    });
    let traits = device.traits();
    assert_eq!(traits.queue_sizes, [256; 3]);
    let mut config = vec![0; 60];
    traits.config.read(0, &mut config);
    assert_eq!(config[..8], 100u64.to_le_bytes());
    assert_eq!(config[12..16], 254u32.to_le_bytes());
    assert_eq!(config[20..24], 512u32.to_le_bytes());
    assert_eq!(config[34..36], 3u16.to_le_bytes());
    let mut driver = Driver::new(device);
    let head = driver.offer(2, &[Buffer::readable(&header(8, 0)), Buffer::writable(20), Buffer::writable(1)]);
    driver.run(2).unwrap();
    assert_eq!(driver.used(2), [(head, 21)]);
    assert_eq!(driver.read(2, head, 1), b"S3R1AL\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
}

#[test]
fn discarded_and_zeroed_blocks_read_as_zero() {
    let file = image(64);
    let device = make(file.path(), |_| {});
    if device.traits().features & WRITE_ZEROES == 0 {
        return; // The file system of the temporary folder cannot.
    }
    let mut driver = Driver::new(device);
    assert_eq!(request(&mut driver, 11, 0, &[range(8, 8, 0), range(24, 8, 0)].concat()), parse::OK);
    assert_eq!(request(&mut driver, 13, 0, &range(40, 1, 1)), parse::OK);
    assert_eq!(request(&mut driver, 13, 0, &range(42, 1, 0)), parse::OK);
    let bytes = fs::read(file.path()).unwrap();
    for (sector, chunk) in bytes.chunks(512).enumerate() {
        let zero = matches!(sector, 0 | 8..16 | 24..32 | 40 | 42);
        assert!(chunk.iter().all(|b| usize::from(*b) == if zero { 0 } else { sector }), "{sector}");
    }
    assert_eq!(bytes.len(), 64 * 512);
    for (kind, bytes, status) in [
        (11, range(0, 8, 1), parse::UNSUPP),
        (13, range(0, 8, 2), parse::UNSUPP),
        (11, range(0, 0, 0), parse::IOERR),
        (11, range(60, 5, 0), parse::IOERR),
        (11, range(u64::MAX, 1, 0), parse::IOERR),
        (11, range(0, u32::MAX, 0), parse::IOERR),
        (11, vec![], parse::IOERR),
        (11, vec![0; 15], parse::IOERR),
        (13, range(0, 8, 0).repeat(33), parse::IOERR),
        (11, [range(48, 8, 0), range(63, 2, 0)].concat(), parse::IOERR),
    ] {
        assert_eq!(request(&mut driver, kind, 0, &bytes), status, "{kind} {bytes:?}");
    }
    let now = fs::read(file.path()).unwrap();
    assert_eq!(now[48 * 512], 48, "a request with one wrong range does nothing");
    // What was not negotiated is not there.
    let device = make(image(64).path(), |_| {});
    let mut driver = Driver::with_features(device, 0);
    assert_eq!(request(&mut driver, 11, 0, &range(8, 8, 0)), parse::UNSUPP);
    assert_eq!(request(&mut driver, OUT, 0, &[1; 512]), parse::OK);
}

#[test]
fn an_image_without_holes_offers_no_discard() {
    let device = make(image(64).path(), |disk| disk.sparse = false);
    assert_eq!(device.traits().features & (DISCARD | WRITE_ZEROES), 0);
}

#[test]
fn a_writer_has_the_image_alone() {
    let file = image(8);
    let writer = make(file.path(), |_| {});
    assert!(refusal(file.path(), |_| {}).contains("in use"));
    assert!(refusal(file.path(), |disk| disk.readonly = true).contains("in use"));
    drop(writer);
    let _one = make(file.path(), |disk| disk.readonly = true);
    let _two = make(file.path(), |disk| disk.readonly = true);
}

#[test]
fn only_raw_images_are_used() {
    let mut file = image(8);
    std::io::Seek::rewind(&mut file).unwrap();
    file.write_all(b"QFI\xfb").unwrap();
    assert!(refusal(file.path(), |_| {}).contains("looks like a qcow2 image"));
    assert!(refusal(file.path(), |disk| disk.image_type = Some(ImageType::Unknown)).contains("image_type=raw"));
    assert!(refusal(file.path(), |disk| disk.image_type = Some(ImageType::Qcow2)).contains("Qcow2"));
    let device = make(file.path(), |disk| disk.image_type = Some(ImageType::Raw));
    assert_eq!(device.traits().config.bytes()[..8], 8u64.to_le_bytes());
}

#[test]
fn odd_sizes_are_rounded_down() {
    let mut file = image(8);
    file.write_all(&[1; 100]).unwrap();
    assert_eq!(make(file.path(), |_| {}).traits().config.bytes()[..8], 8u64.to_le_bytes());
    let mut small = tempfile::NamedTempFile::new().unwrap();
    small.write_all(&[0; 511]).unwrap();
    assert!(refusal(small.path(), |_| {}).contains("less than the 512 bytes"));
    assert!(refusal(Path::new("/no/disk"), |_| {}).contains("cannot open /no/disk"));
}

#[test]
fn a_snapshot_goes_with_its_image_only() {
    let file = image(8);
    let saved = make(file.path(), |disk| disk.readonly = true).save();
    let restore = |path: &Path, readonly, saved: &SavedState| {
        let config = disk(path, |disk| disk.readonly = readonly);
        create("_disk0", Some(&config), Some(saved)).map(drop).map_err(|e| e.to_string())
    };
    restore(file.path(), true, &saved).unwrap();
    assert!(restore(image(9).path(), true, &saved).unwrap_err().contains("use the same image"));
    assert!(restore(file.path(), false, &saved).unwrap_err().contains("readonly"));
    assert!(restore(file.path(), true, &SavedState { version: 7, ..saved.clone() }).unwrap_err().contains("version 7"));
    assert!(restore(file.path(), true, &SavedState { kind: "rng".into(), ..saved.clone() }).is_err());
    assert!(restore(file.path(), true, &SavedState { body: vec![0xff; 11], ..saved }).unwrap_err().contains("damaged"));
}

#[test]
fn a_worker_serves_more_than_one_ring_of_requests() {
    let file = image(64);
    let mut driver = Driver::new(make(file.path(), |disk| disk.queue_size = 8));
    for _ in 0..2 {
        driver.offer(0, &[Buffer::readable(&header(IN, 5)), Buffer::writable(512), Buffer::writable(1)]);
    }
    let mut running = driver.start_worker();
    running.wait_for_interrupt(0);
    for _ in 0..20 {
        let before = running.driver().interrupts(0);
        running.offer(0, &[Buffer::readable(&header(IN, 6)), Buffer::writable(512), Buffer::writable(1)]);
        running.wait_for_interrupts(0, before + 1);
    }
    let driver = running.stop();
    let (head, len) = *driver.used(0).last().unwrap();
    assert_eq!((driver.read(0, head, 1), len), (vec![6; 512], 513));
}

#[test]
fn the_parser_takes_any_cut_of_the_same_bytes() {
    let disk = parse::Disk { sectors: 64, read_only: false, discard: true, write_zeroes: true };
    let bytes = [header(13, 0), range(1, 2, 1), range(3, 4, 0)].concat();
    let read = |at: GuestAddress, to: &mut [u8]| {
        let at = usize::try_from(at.0).unwrap();
        to.copy_from_slice(&bytes[at..at + to.len()]);
        true
    };
    let expected = parse::Action::WriteZeroes(vec![
        parse::Range { offset: 512, len: 1024, unmap: true },
        parse::Range { offset: 1536, len: 2048, unmap: false },
    ]);
    for cut in 0..=48u32 {
        for second in cut..=48 {
            let part = |from: u32, to: u32| parse::Part { addr: GuestAddress(from.into()), len: to - from };
            let readable = vec![part(0, cut), part(cut, second), part(second, 48)];
            let writable =
                vec![parse::Part { addr: GuestAddress(100), len: 1 }, parse::Part { addr: GuestAddress(7), len: 0 }];
            let request = parse::parse(parse::Parts { readable, writable }, &disk, read);
            assert_eq!(request.status, Some(GuestAddress(100)));
            assert_eq!(request.action.as_ref(), Ok(&expected), "cut at {cut} and {second}");
        }
    }
}

crate::conformance_tests!(super::blk);
