//! The disk's request parser: whatever it accepts lies inside the disk.
#![no_main]

use libfuzzer_sys::fuzz_target;
use virtio_devices::blk::parse::{Action, Disk, MAX_DATA, Part, Parts, SECTOR, parse};
use vm_memory::GuestAddress;

const DISK: Disk = Disk { sectors: 1000, read_only: false, discard: true, write_zeroes: true };

fuzz_target!(|data: &[u8]| {
    let (shape, memory) = data.split_at(data.len().min(24));
    let mut parts = Parts::default();
    for cut in shape.chunks_exact(4) {
        let part = Part { addr: GuestAddress(u64::from(cut[0])), len: u32::from(cut[1]) << (cut[2] % 25) };
        if cut[3] & 1 == 0 { parts.readable.push(part) } else { parts.writable.push(part) }
    }
    let room: u64 = parts.writable.iter().map(|part| u64::from(part.len)).sum();
    let request = parse(parts, &DISK, |at, bytes| {
        let Ok(at) = usize::try_from(at.0) else { return false };
        let Some(from) = at.checked_add(bytes.len()).and_then(|end| memory.get(at..end)) else { return false };
        bytes.copy_from_slice(from);
        true
    });
    assert_eq!(request.status.is_some(), room > 0);
    let end = DISK.sectors * SECTOR;
    let len = |parts: &[Part]| parts.iter().map(|part| u64::from(part.len)).sum::<u64>();
    match request.action {
        Ok(Action::Read { offset, into: parts } | Action::Write { offset, from: parts }) => {
            assert!(offset + len(&parts) <= end && len(&parts) <= MAX_DATA && len(&parts) % SECTOR == 0);
        }
        Ok(Action::Discard(ranges) | Action::WriteZeroes(ranges)) => {
            assert!(ranges.iter().all(|range| range.offset + range.len <= end && range.len > 0));
        }
        Ok(Action::Flush | Action::GetId { .. }) | Err(1 | 2) => {}
        Err(status) => panic!("no such status: {status}"),
    }
});
