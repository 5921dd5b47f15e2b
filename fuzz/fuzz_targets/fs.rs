//! FUSE requests to a file system with two grants: this folder, which nobody can write to, and a file in memory that
//! cannot grow.
#![no_main]

use std::os::fd::{AsRawFd, OwnedFd};

use libfuzzer_sys::fuzz_target;
use passthrough::Grants;
use rustix::fs::{CWD, MemfdFlags, Mode, OFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create, openat};
use virtio_devices::fs;
use virtio_devices::testkit::{Buffer, Driver};
use vmm_config::FsConfig;

fn grants() -> Grants {
    let grants = Grants::new().expect("a table");
    let folder = openat(CWD, env!("CARGO_MANIFEST_DIR"), OFlags::PATH, Mode::empty()).expect("this folder");
    grants.add("folder", folder, false).expect("a grant");
    let memory = memfd_create("fuzz", MemfdFlags::ALLOW_SEALING | MemfdFlags::CLOEXEC).expect("a file in memory");
    ftruncate(&memory, 1 << 16).expect("room");
    fcntl_add_seals(&memory, SealFlags::GROW | SealFlags::SHRINK).expect("a file that stays as long as it is");
    // One that is opened anew each time, and one that is used as it is.
    let path = format!("/proc/self/fd/{}", memory.as_raw_fd());
    let reference = openat(CWD, path, OFlags::PATH, Mode::empty()).expect("a reference");
    grants.add("file", reference, true).expect("a grant");
    grants.add("open", OwnedFd::from(memory), true).expect("a grant");
    grants
}

/// A chain with a request: 40 bytes of header, and what follows.
fn request(opcode: u32, node: u64, body: &[u8]) -> Vec<u8> {
    let len = u32::try_from(40 + body.len()).unwrap_or(0);
    [&len.to_le_bytes()[..], &opcode.to_le_bytes(), &[7; 8], &node.to_le_bytes(), &[0; 16], body].concat()
}

fuzz_target!(|data: &[u8]| {
    let grants = grants();
    let config = FsConfig { tag: "host".into(), ..FsConfig::default() };
    let mut driver = Driver::new(Box::new(fs::create(&config, grants.clone(), None).expect("a device")));
    // INIT, and a look at each grant: nodes 2, 3 and 4.
    let init = [7u32, 38, 0, u32::MAX].map(u32::to_le_bytes).concat();
    driver.offer(1, &[Buffer::readable(&request(26, 0, &init)), Buffer::writable(256)]);
    for name in [&b"folder\0"[..], b"file\0", b"open\0"] {
        driver.offer(1, &[Buffer::readable(&request(1, 1, name)), Buffer::writable(256)]);
    }
    driver.run(1).expect("a ring that makes sense");
    let mut rest = data;
    while let [opcode, node, len, room, more @ ..] = rest {
        let (body, more) = more.split_at(more.len().min(usize::from(*len)));
        rest = more;
        if *opcode == u8::MAX {
            let _ = grants.remove(["folder", "file", "open"][usize::from(node % 3)]);
            let _ = driver.source(0);
            continue;
        }
        let bytes = request(u32::from(*opcode), u64::from(*node), body);
        let cut = bytes.len().min(usize::from(*room));
        let parts = [Buffer::readable(&bytes[..cut]), Buffer::readable(&bytes[cut..])];
        let room = [Buffer::writable(u32::from(*room) % 24), Buffer::writable(u32::from(*room) << 4)];
        driver.offer(1, &[parts, room].concat());
        driver.run(1).expect("a ring that makes sense");
        if driver.alloc(0) > 60 << 20 {
            return;
        }
    }
});
