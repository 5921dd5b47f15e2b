//! The way from the initramfs to the template's root: a read-only image under a tmpfs that takes what is written.

use std::{
    ffi::CString,
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::inotify,
    io::Errno,
    mount::{MountFlags, mount, mount_bind, mount_move},
};

use super::cmdline::Parameters;
use crate::console::say;

/// How long a device named on the command line may take to appear.
const DEVICE_TIMEOUT: Duration = Duration::from_secs(30);

/// Where the read-only root can be seen in the running system.
const READ_ONLY: &str = "run/spectrum/ro";

/// Why there is no root.
#[derive(Debug, thiserror::Error)]
pub enum RootError {
    /// A mount failed.
    #[error("cannot mount {what}: {source}")]
    Mount {
        /// The mount point or device.
        what: String,
        /// The system's reason.
        source: io::Error,
    },
    /// The command line names no root.
    #[error("the kernel command line has no spectrum.root=DEVICE")]
    NoRoot,
    /// The device did not appear.
    #[error("{0} did not appear in {secs} s: is the disk or pmem device there and its driver loaded?", secs = DEVICE_TIMEOUT.as_secs())]
    NoDevice(String),
    /// A file operation failed.
    #[error("cannot prepare {path}: {source}")]
    File {
        /// The path.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
}

fn mount_error(what: &str) -> impl Fn(Errno) -> RootError + '_ {
    move |errno| RootError::Mount { what: what.to_owned(), source: errno.into() }
}

fn folder(path: &str) -> Result<(), RootError> {
    fs::create_dir_all(path).map_err(|source| RootError::File { path: path.into(), source })
}

/// Mounts the file systems that live in memory, where the initramfs has none of them.
pub fn early_mounts() -> Result<(), RootError> {
    let safe = MountFlags::NOSUID | MountFlags::NODEV;
    let mounts = [
        ("proc", "/proc", safe | MountFlags::NOEXEC, None),
        ("sysfs", "/sys", safe | MountFlags::NOEXEC, None),
        ("devtmpfs", "/dev", MountFlags::NOSUID, Some(c"mode=0755")),
        ("devpts", "/dev/pts", MountFlags::NOSUID | MountFlags::NOEXEC, Some(c"gid=5,mode=0620,ptmxmode=0666")),
        ("tmpfs", "/dev/shm", safe, Some(c"mode=1777")),
        ("tmpfs", "/run", safe, Some(c"mode=0755")),
    ];
    for (kind, target, flags, options) in mounts {
        folder(target)?;
        match mount(kind, target, kind, flags, options) {
            // The kernel may have mounted /dev itself.
            Ok(()) | Err(Errno::BUSY) => {}
            Err(errno) => return Err(mount_error(target)(errno)),
        }
    }
    Ok(())
}

/// Mounts the root the command line names, makes it `/` and forgets the initramfs.
pub fn enter(parameters: &Parameters) -> Result<(), RootError> {
    let device = parameters.root.as_deref().ok_or(RootError::NoRoot)?;
    wait_for(Path::new(device))?;
    folder("/spectrum/ro")?;
    folder("/spectrum/rw")?;
    folder("/spectrum/root")?;
    mount_image(device, parameters.root_type.as_deref().unwrap_or("erofs"))?;
    mount("tmpfs", "/spectrum/rw", "tmpfs", MountFlags::NODEV, Some(c"mode=0755"))
        .map_err(mount_error("the tmpfs for changes"))?;
    folder("/spectrum/rw/upper")?;
    folder("/spectrum/rw/work")?;
    let layers = c"lowerdir=/spectrum/ro,upperdir=/spectrum/rw/upper,workdir=/spectrum/rw/work";
    mount("overlay", "/spectrum/root", "overlay", MountFlags::NODEV, Some(layers))
        .map_err(mount_error("the overlay of the root"))?;
    for name in ["proc", "sys", "dev", "run"] {
        let target = format!("/spectrum/root/{name}");
        folder(&target)?;
        mount_move(format!("/{name}"), &target).map_err(mount_error(&target))?;
    }
    let target = format!("/spectrum/root/{READ_ONLY}");
    folder(&target)?;
    mount_move("/spectrum/ro", &target).map_err(mount_error(&target))?;
    offer_program("/spectrum/root");
    switch("/spectrum/root")?;
    folder("/tmp")?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV;
    mount("tmpfs", "/tmp", "tmpfs", flags, Some(c"mode=1777")).map_err(mount_error("/tmp"))
}

/// Lets applications start this program by its name: the file itself, which would otherwise have none when the initramfs is
/// deleted, takes no more memory. Without it nothing but calls of other apps is missing.
fn offer_program(root: &str) {
    let offered = || -> io::Result<()> {
        let (file, name) = (format!("{root}/run/spectrum/guest"), format!("{root}/usr/local/bin/spectrum-guest"));
        fs::write(&file, "")?;
        mount_bind("/init", &file)?;
        std::os::unix::fs::symlink("/run/spectrum/guest", name)
    };
    if let Err(error) = offered() {
        say!("init: applications cannot call others: {error}");
    }
}

/// Mounts the image, with direct access to host memory where the device has it.
fn mount_image(device: &str, kind: &str) -> Result<(), RootError> {
    let direct = kind == "erofs" && device.starts_with("/dev/pmem");
    let options: Option<CString> = direct.then(|| c"dax=always".to_owned());
    match mount(device, "/spectrum/ro", kind, MountFlags::RDONLY, options.as_deref()) {
        Err(errno) if direct => {
            // Works, but then every VM has its own copy of the pages in its page cache.
            say!("init: {device} cannot be mounted with dax=always ({}), so its pages are not shared", errno);
            mount(device, "/spectrum/ro", kind, MountFlags::RDONLY, None).map_err(mount_error(device))
        }
        result => result.map_err(mount_error(device)),
    }
}

/// Waits until the device file is there: devtmpfs makes it when the driver is done, which may be after module loading.
fn wait_for(device: &Path) -> Result<(), RootError> {
    let fail = |source: io::Error| RootError::File { path: device.into(), source };
    let watch = inotify::init(inotify::CreateFlags::CLOEXEC).map_err(|errno| fail(errno.into()))?;
    inotify::add_watch(&watch, "/dev", inotify::WatchFlags::CREATE).map_err(|errno| fail(errno.into()))?;
    let end = Instant::now() + DEVICE_TIMEOUT;
    let mut buffer = [0; 4096];
    loop {
        if device.exists() {
            return Ok(());
        }
        let left = Timespec::try_from(end.saturating_duration_since(Instant::now())).unwrap_or_default();
        match poll(&mut [PollFd::new(&watch, PollFlags::IN)], Some(&left)) {
            Ok(0) => return Err(RootError::NoDevice(device.display().to_string())),
            Ok(_) => {
                rustix::io::read(&watch, &mut buffer).map_err(|errno| fail(errno.into()))?;
            }
            Err(Errno::INTR) => {}
            Err(errno) => return Err(fail(errno.into())),
        }
    }
}

/// Makes `root` the root of every path, as switch_root(8) does.
fn switch(root: &str) -> Result<(), RootError> {
    let fail = |errno: Errno| RootError::File { path: root.into(), source: errno.into() };
    rustix::process::chdir(root).map_err(fail)?;
    if let Ok(old) = fs::metadata("/") {
        // Memory of the unpacked initramfs. PID 1 runs on from its own, now nameless, file.
        delete_below(Path::new("/"), old.dev());
    }
    mount_move(".", "/").map_err(fail)?;
    rustix::process::chroot(".").map_err(fail)?;
    rustix::process::chdir("/").map_err(fail)
}

/// Deletes everything below `folder` that is on the file system `device`. What cannot be deleted only costs memory.
fn delete_below(folder: &Path, device: u64) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        let path = entry.path();
        match fs::symlink_metadata(&path) {
            Ok(data) if data.dev() == device && data.is_dir() => {
                delete_below(&path, device);
                let _ = fs::remove_dir(&path);
            }
            Ok(data) if data.dev() == device => {
                let _ = fs::remove_file(&path);
            }
            _ => {}
        }
    }
}
