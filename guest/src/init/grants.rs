//! The file system in which the VM sees what it was granted of the host.

use std::fs;
use std::path::Path;

use rustix::mount::{MountFlags, mount};

use crate::console::say;

/// Name of the file system, and where it is mounted.
const TAG: &str = "host";
pub const MOUNT_POINT: &str = "/host";

/// Where the kernel's driver lists its devices.
const DRIVER: &str = "/sys/bus/virtio/drivers/virtiofs";

/// Mounts it, if the VM has one. A VM without grants is none that fails. Neither devices nor other users' rights come out
/// of it.
pub fn mount_host() {
    if !has_device() {
        return;
    }
    let mounted = fs::create_dir_all(MOUNT_POINT)
        .and_then(|()| Ok(mount(TAG, MOUNT_POINT, "virtiofs", MountFlags::NOSUID | MountFlags::NODEV, None)?));
    if let Err(error) = mounted {
        say!("init: cannot mount the file system {TAG} at {MOUNT_POINT}: {error}");
    }
}

/// Whether the driver has a device: an entry such as `virtio3`, beside the driver's own files.
fn has_device() -> bool {
    let entries = Path::new(DRIVER).read_dir().into_iter().flatten().flatten();
    entries.into_iter().any(|entry| entry.file_name().to_string_lossy().starts_with("virtio"))
}
