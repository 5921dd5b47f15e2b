//! Makes the VM another one than its twins: random numbers, clock, machine-id, boot_id and host name.
//!
//! Everything here can be done again, because a VM that was restored can be saved and restored once more. Nothing here draws a
//! random number: a clone's would be its twin's.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, symlink},
    path::{Path, PathBuf},
};

use guest_proto::{BootId, Identity, MachineId};
use rustix::{
    mount::{MountFlags, mount_bind, mount_remount},
    time::{ClockId, Timespec, clock_settime},
};

use crate::sys;

/// Where the kernel tells its boot_id: random(4). It has no way to change it, so a file is mounted over it.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// The file that is mounted there.
const BOOT_ID_FILE: &str = "/run/boot_id";

const NANOSECONDS: u64 = 1_000_000_000;

/// What of the identity could not be taken on. One sentence for the user of the launcher.
#[derive(Debug, thiserror::Error)]
pub enum WakeError {
    /// Without it the VM would use its twin's random numbers.
    #[error("cannot seed the VM's random numbers: {0}")]
    Seed(#[source] io::Error),
    /// The time is out of the kernel's range.
    #[error("cannot set the VM's clock to {nanoseconds} ns since 1970: {source}")]
    Clock {
        /// What it was to be.
        nanoseconds: u64,
        /// The system's reason.
        source: io::Error,
    },
    /// A file could not be written.
    #[error("cannot write {path} in the VM: {source}")]
    File {
        /// The path.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The boot_id stays the kernel's.
    #[error("cannot mount the VM's boot_id: {0}")]
    Mount(#[source] io::Error),
    /// The name stays as it was.
    #[error("cannot set the VM's host name to {name}: {source}")]
    Hostname {
        /// What it was to be.
        name: String,
        /// The system's reason.
        source: io::Error,
    },
}

/// Takes the identity on. When this fails the VM is half of it and must not be used.
pub fn wake(identity: &Identity) -> Result<(), WakeError> {
    // First of all: whatever draws random numbers from here on draws its own.
    sys::seed_random(identity.seed.as_bytes()).map_err(WakeError::Seed)?;
    let nanoseconds = identity.realtime;
    clock_settime(ClockId::Realtime, timespec(nanoseconds))
        .map_err(|errno| WakeError::Clock { nanoseconds, source: errno.into() })?;
    let root = Path::new("/");
    write_machine_id(root, identity.machine_id)?;
    link_dbus_machine_id(root)?;
    write_boot_id(Path::new(BOOT_ID_FILE), identity.boot_id)?;
    mount_boot_id().map_err(WakeError::Mount)?;
    if let Some(hostname) = &identity.hostname {
        rustix::system::sethostname(hostname.as_str().as_bytes())
            .map_err(|errno| WakeError::Hostname { name: hostname.to_string(), source: errno.into() })?;
    }
    Ok(())
}

fn timespec(nanoseconds: u64) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(nanoseconds / NANOSECONDS).unwrap_or(i64::MAX),
        tv_nsec: i64::try_from(nanoseconds % NANOSECONDS).unwrap_or_default(),
    }
}

fn file_error(path: &Path) -> impl Fn(io::Error) -> WakeError + '_ {
    move |source| WakeError::File { path: path.to_owned(), source }
}

/// machine-id(5). A reader sees the old or the new one, never a part.
fn write_machine_id(root: &Path, id: MachineId) -> Result<(), WakeError> {
    let path = root.join("etc/machine-id");
    let new = root.join("etc/.machine-id.new");
    replace(&new, &path, |new| {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o444).open(new)?;
        file.write_all(format!("{id}\n").as_bytes())
    })
    .map_err(file_error(&path))
}

/// D-Bus looks for an ID of its own first. Where it has a folder for one, it is a link, as Debian's package makes it.
fn link_dbus_machine_id(root: &Path) -> Result<(), WakeError> {
    let folder = root.join("var/lib/dbus");
    let (path, new, target) = (folder.join("machine-id"), folder.join(".machine-id.new"), Path::new("/etc/machine-id"));
    if !folder.is_dir() || fs::read_link(&path).is_ok_and(|link| link == target) {
        return Ok(());
    }
    replace(&new, &path, |new| symlink(target, new)).map_err(file_error(&path))
}

/// Puts what `make` makes at `new` in the place of `path`, at once.
fn replace(new: &Path, path: &Path, make: impl Fn(&Path) -> io::Result<()>) -> io::Result<()> {
    match fs::remove_file(new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        // Left over from an attempt that was cut short, or not there.
        _ => {}
    }
    make(new)?;
    fs::rename(new, path)
}

/// The file for the boot_id. A later one is written into the same file in one piece: then it is seen wherever the file is
/// mounted, also in mount namespaces that applications have made for themselves.
fn write_boot_id(path: &Path, id: BootId) -> Result<(), WakeError> {
    let write = || {
        let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o444).open(path)?;
        let text = format!("{id}\n");
        file.write_all_at(text.as_bytes(), 0)?;
        file.set_len(u64::try_from(text.len()).map_err(io::Error::other)?)
    };
    write().map_err(file_error(path))
}

/// Mounts the file over the kernel's, unless it is there already.
fn mount_boot_id() -> io::Result<()> {
    let identity = |path: &str| File::open(path)?.metadata().map(|data| (data.dev(), data.ino()));
    if identity(BOOT_ID)? == identity(BOOT_ID_FILE)? {
        return Ok(());
    }
    mount_bind(BOOT_ID_FILE, BOOT_ID)?;
    let flags = MountFlags::BIND | MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    Ok(mount_remount(BOOT_ID, flags, c"")?)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn read(path: impl AsRef<Path>) -> String {
        fs::read_to_string(path).unwrap()
    }

    #[test]
    fn machine_ids_replace_each_other() {
        let place = tempfile::tempdir().unwrap();
        let root = place.path();
        let [etc, dbus] = ["etc", "var/lib/dbus"].map(|folder| root.join(folder));
        fs::create_dir(&etc).unwrap();
        fs::write(etc.join("machine-id"), "").unwrap();
        fs::write(etc.join(".machine-id.new"), "cut sho").unwrap();
        for byte in [1, 2] {
            let id = MachineId::from_random([byte; 16]);
            let (open, old) = (File::open(etc.join("machine-id")).unwrap(), read(etc.join("machine-id")));
            write_machine_id(root, id).unwrap();
            assert_eq!(read(etc.join("machine-id")), format!("{id}\n"));
            assert_eq!(io::read_to_string(open).unwrap(), old, "whoever has the old file open reads the old ID");
        }
        assert_eq!(fs::metadata(etc.join("machine-id")).unwrap().permissions().mode() & 0o777, 0o444);
        assert_eq!(fs::read_dir(&etc).unwrap().count(), 1, "nothing is left");

        link_dbus_machine_id(root).unwrap();
        assert!(!root.join("var").exists(), "no D-Bus, no ID for it");
        fs::create_dir_all(&dbus).unwrap();
        fs::write(dbus.join("machine-id"), "00000000000000000000000000000001\n").unwrap();
        for _ in 0..2 {
            link_dbus_machine_id(root).unwrap();
            assert_eq!(fs::read_link(dbus.join("machine-id")).unwrap(), Path::new("/etc/machine-id"));
        }
        assert_eq!(fs::read_dir(&dbus).unwrap().count(), 1);
        fs::remove_dir_all(&etc).unwrap();
        let error = write_machine_id(root, MachineId::from_random([3; 16])).unwrap_err().to_string();
        assert!(error.contains("etc/machine-id"), "{error}");
    }

    #[test]
    fn boot_ids_share_one_file() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("boot_id");
        fs::write(&path, "x".repeat(100)).unwrap();
        let file = File::open(&path).unwrap();
        for byte in [1, 2] {
            let id = BootId::from_random([byte; 16]);
            write_boot_id(&path, id).unwrap();
            assert_eq!(read(&path), format!("{id}\n"));
            assert_eq!(file.metadata().unwrap().ino(), fs::metadata(&path).unwrap().ino());
        }
    }

    #[test]
    fn times() {
        let parts = |nanoseconds| (timespec(nanoseconds).tv_sec, timespec(nanoseconds).tv_nsec);
        assert_eq!(parts(0), (0, 0));
        assert_eq!(parts(NANOSECONDS - 1), (0, 999_999_999));
        assert_eq!(parts(u64::MAX), (18_446_744_073, 709_551_615));
    }
}
