//! The private folder of a running VM: its sockets and nothing else.

use std::{
    env,
    fs::{self, File},
    io,
    os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
};

use rustix::fs::{FlockOperation, flock};

/// The file that is locked as long as a folder is in use.
pub const LOCK: &str = "lock";

/// Longest name a socket in the folder has.
const LONGEST_NAME: usize = "vsock.sock_4294967295".len();

/// Longest path of a Unix socket, without the final zero: see unix(7).
const LONGEST_SOCKET: usize = 107;

/// The folder. It goes away with this value; while it is there it is locked, so that one left by a launcher that was
/// killed can be told apart and removed by the next.
#[derive(Debug)]
pub struct RunFolder {
    folder: tempfile::TempDir,
    _lock: File,
}

impl RunFolder {
    /// Makes a new one below [`base`].
    pub fn create() -> io::Result<Self> {
        Self::create_in(&base())
    }

    fn create_in(base: &Path) -> io::Result<Self> {
        make_base(base)?;
        remove_stale(base);
        let private = fs::Permissions::from_mode(0o700);
        let folder = tempfile::Builder::new().prefix("vm-").permissions(private).tempdir_in(base)?;
        let lock = lock(folder.path())?;
        let longest = folder.path().as_os_str().len() + 1 + LONGEST_NAME;
        if longest > LONGEST_SOCKET {
            let text =
                format!("{} is too long for the path of a socket: set a shorter XDG_RUNTIME_DIR", base.display());
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        Ok(Self { folder, _lock: lock })
    }

    /// Path of a file in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

/// The folder of all running VMs, below `$XDG_RUNTIME_DIR`, or below the temporary folder.
pub fn base() -> PathBuf {
    match env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|path| path.is_absolute()) {
        Some(base) => base.join("spectrum"),
        None => env::temp_dir().join(format!("spectrum-{}", rustix::process::geteuid().as_raw())),
    }
}

/// Makes it, if it is not there. Nobody else can look into it.
pub fn make_base(base: &Path) -> io::Result<()> {
    match fs::DirBuilder::new().mode(0o700).create(base) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => check_owner(base),
    }
}

/// Makes the file that says that `folder` is in use, for as long as it, or what it became in another process, is open. It is
/// locked before it has its name: nobody can take the folder for one that was left.
pub fn lock(folder: &Path) -> io::Result<File> {
    let new = folder.join("lock.new");
    let file = File::create(&new)?;
    flock(&file, FlockOperation::NonBlockingLockExclusive)?;
    fs::rename(new, folder.join(LOCK))?;
    Ok(file)
}

/// Others must not be able to put sockets of their own where the VMM's are expected.
fn check_owner(base: &Path) -> io::Result<()> {
    let data = fs::symlink_metadata(base)?;
    if data.is_dir() && data.uid() == rustix::process::geteuid().as_raw() && data.permissions().mode() & 0o077 == 0 {
        return Ok(());
    }
    let text = format!("{} is not a private folder of this user: remove it", base.display());
    Err(io::Error::new(io::ErrorKind::PermissionDenied, text))
}

/// Removes folders whose launcher is gone.
fn remove_stale(base: &Path) {
    let Ok(entries) = fs::read_dir(base) else { return };
    for entry in entries.flatten() {
        // A folder without a lock file is just being made.
        let Ok(lock) = File::open(entry.path().join(LOCK)) else { continue };
        if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok() {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn private_gone_afterwards_and_leftovers_removed() {
        let place = tempfile::tempdir().unwrap();
        let base = place.path().join("spectrum");
        let first = RunFolder::create_in(&base).unwrap();
        let mode = fs::metadata(first.folder.path()).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
        let stale = base.join("vm-killed");
        fs::create_dir(&stale).unwrap();
        fs::write(stale.join("lock"), "").unwrap();
        let second = RunFolder::create_in(&base).unwrap();
        assert!(!stale.exists());
        assert!(first.path("lock").exists(), "a folder in use stays");
        drop((first, second));
        assert_eq!(fs::read_dir(&base).unwrap().count(), 0);
    }

    #[test]
    fn an_open_or_too_deep_place_is_refused() {
        let place = tempfile::tempdir().unwrap();
        let base = place.path().join("open");
        fs::create_dir(&base).unwrap();
        fs::set_permissions(&base, PermissionsExt::from_mode(0o755)).unwrap();
        assert!(RunFolder::create_in(&base).unwrap_err().to_string().contains("not a private folder"));
        let deep = place.path().join("d".repeat(90));
        assert!(RunFolder::create_in(&deep).unwrap_err().to_string().contains("too long"));
        assert_eq!(fs::read_dir(&deep).unwrap().count(), 0);
    }
}
