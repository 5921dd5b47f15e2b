//! What the fuzz targets share: a machine with one device of every kind, on files in memory.

mod engine;

use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use devices::irq::{Msi, MsiSink};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use virtio_devices::device::{Memory, SavedState};
use virtio_devices::registry::{ConsoleEnds, Kind};
use virtio_devices::rng::Rng;
use virtio_devices::testkit;
use virtio_devices::transport::{Doorbells, PciTransport, Setup, TransportState};
use vm_memory::GuestMemoryAtomic;
use vmm_config::{DiskConfig, FsConfig, GpuConfig, NetConfig, PmemConfig, VmConfig, VsockConfig};
use vmm_sys_util::eventfd::EventFd;

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
            gpu: vec![GpuConfig { wayland: Some("/nowhere".into()), window: 1 << 20, ..GpuConfig::default() }],
            fs: vec![FsConfig { tag: "host".into(), ..FsConfig::default() }],
            net: vec![NetConfig::default()],
            ..VmConfig::default()
        };
        Machine { config, output, input, _files: [disk, pmem] }
    })
}

/// Builds a device of `kind` and lets a driver made of `data` talk to it.
pub fn device(kind: &Kind, data: &[u8]) {
    let device = testkit::build(kind, &machine().config, Some(ends()), &engine::Nothing).expect("the device");
    testkit::hostile(device, data);
}

/// The other side of a network interface says `said` and goes away while a driver made of `data` talks to the interface.
pub fn net(said: &[u8], data: &[u8]) {
    let (ours, mut theirs) = UnixStream::pair().expect("a pair of sockets");
    let _ = theirs.set_nonblocking(true);
    let _ = theirs.write(said);
    let device = testkit::connected(&virtio_devices::net::KIND, &machine().config, Some(ours.into()), None);
    drop(theirs);
    testkit::hostile(device.expect("the device"), data);
}

/// As [`device`], if one of `kind` can be made of what a snapshot says of it.
pub fn restored(kind: &Kind, saved: &SavedState, data: &[u8]) {
    let device = testkit::restore(kind, &machine().config, Some(ends()), &engine::Nothing, Some(saved));
    if let Ok(device) = device {
        let _ = device.save();
        testkit::hostile(device, data);
    }
}

fn ends() -> ConsoleEnds {
    let machine = machine();
    // What the guest wrote to the console before does not matter and should not fill the memory.
    let _ = ftruncate(&machine.output, 0);
    let copy = |fd: &OwnedFd| fd.try_clone().ok();
    ConsoleEnds { output: copy(&machine.output), input: copy(&machine.input), terminal: false }
}

/// Where messages and doorbells of a function go that nobody has.
pub struct Nobody;

impl MsiSink for Nobody {
    fn signal(&self, _: Msi) {}
}

impl Doorbells for Nobody {
    fn add(&self, _: u64, _: &EventFd) -> io::Result<()> {
        Ok(())
    }
    fn remove(&self, _: u64, _: &EventFd) {}
}

/// The PCI function of an entropy device, new or with the state of a snapshot; it sets `wanting` when it wants to be resumed.
///
/// # Errors
/// If the state is not one of such a function.
pub fn transport(
    mem: Memory,
    saved: Option<&TransportState>,
    wanting: &Arc<AtomicBool>,
) -> io::Result<Arc<PciTransport>> {
    let wanting = wanting.clone();
    PciTransport::new(Setup {
        id: "_rng".into(),
        device: Box::new(Rng::new(std::fs::File::open("/dev/urandom").expect("entropy"))),
        bar0: 0xc000_0000,
        shared_memory: None,
        mem: GuestMemoryAtomic::new(mem),
        msi: Arc::new(Nobody),
        doorbells: Arc::new(Nobody),
        thread_setup: Arc::new(|| Ok(())),
        wanting: Arc::new(move || wanting.store(true, Ordering::Relaxed)),
        saved,
    })
}
