//! What the fuzz targets share: a machine with one device of every kind, on files in memory.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::OnceLock;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use virtio_devices::gpu::NoRenderer;
use virtio_devices::registry::{ConsoleEnds, Kind};
use virtio_devices::testkit;
use vmm_config::{DiskConfig, PmemConfig, VmConfig, VsockConfig};

// The targets' macro needs it, and they need not name it.
pub use libfuzzer_sys;

/// A target that lets a hostile driver talk to a device: the name of its module.
#[macro_export]
macro_rules! device_target {
    ($module:ident) => {
        $crate::libfuzzer_sys::fuzz_target!(|data: &[u8]| $crate::device(&::virtio_devices::$module::KIND, data));
    };
}

/// A file of `len` bytes in memory, and a path to it. It is there as long as the process.
fn file(len: u64) -> (OwnedFd, PathBuf) {
    let fd = memfd_create("fuzz", MemfdFlags::CLOEXEC).expect("a file in memory");
    ftruncate(&fd, len).expect("room for it");
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd()).into();
    (fd, path)
}

struct Machine {
    config: VmConfig,
    output: OwnedFd,
    input: OwnedFd,
    _files: [OwnedFd; 2],
}

fn machine() -> &'static Machine {
    static MACHINE: OnceLock<Machine> = OnceLock::new();
    MACHINE.get_or_init(|| {
        let ((disk, disk_path), (pmem, pmem_path)) = (file(1 << 20), file((1 << 20) + 100));
        let (output, _) = file(0);
        let (input, _) = file(1 << 16);
        let socket = std::env::temp_dir().join(format!("spectrum-fuzz-{}", std::process::id()));
        let config = VmConfig {
            disks: vec![DiskConfig { path: disk_path, num_queues: 2, ..DiskConfig::default() }],
            pmem: vec![PmemConfig { file: pmem_path, ..PmemConfig::default() }],
            vsock: Some(VsockConfig { cid: 3, socket, ..VsockConfig::default() }),
            ..VmConfig::default()
        };
        Machine { config, output, input, _files: [disk, pmem] }
    })
}

/// Builds a device of `kind` and lets a driver made of `data` talk to it.
pub fn device(kind: &Kind, data: &[u8]) {
    let machine = machine();
    // What the guest wrote to the console before does not matter and should not fill the memory.
    let _ = ftruncate(&machine.output, 0);
    let copy = |fd: &OwnedFd| fd.try_clone().ok();
    let ends = ConsoleEnds { output: copy(&machine.output), input: copy(&machine.input), terminal: false };
    let device = testkit::build(kind, &machine.config, Some(ends), &NoRenderer).expect("the device");
    testkit::hostile(device, data);
}
