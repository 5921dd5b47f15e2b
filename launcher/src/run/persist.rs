//! Home directories that outlive their VMs: one folder each, which one VM at a time has.
//!
//! The lock is the launcher's. When that was killed its VM may run on until somebody looks, so whoever has the lock next first
//! waits until the folder of the VM that had it is gone.

use std::{
    fs::{DirBuilder, File, OpenOptions},
    io::{self, Read, Seek, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use guest_proto::Request;
use rustix::{
    fs::{FlockOperation, flock},
    io::Errno,
};
use serde::{Deserialize, Serialize};

use super::{
    RunError,
    folder::{self, BaseLock, lock_base},
    grants::{Grant, HOME_GRANT, place_of},
    relay,
    vm::AgentLink,
};
use crate::home::{Home, HomeError};

/// What is in the folder of a home directory: the lock, and the files.
const LOCK: &str = "lock";
const FILES: &str = "files";

/// Why a home directory is not to be had.
#[derive(Debug, thiserror::Error)]
pub enum PersistError {
    /// It has no place.
    #[error(transparent)]
    Place(#[from] HomeError),
    /// There is none of this name.
    #[error("there is no home directory called {0:?}: see `spectrum home list`")]
    Unknown(String),
    /// Another VM has it.
    #[error("the home directory {name:?} is in use by {by}: end it, or run this in it with --vm")]
    InUse {
        /// The home directory.
        name: String,
        /// The VM.
        by: String,
    },
    /// A killed launcher's VM, which still has the files.
    #[error("the home directory {0:?} is in use by the VM {1}, whose launcher was killed and whose VMM does not end")]
    Orphan(String, String),
    /// Files.
    #[error("cannot use the home directory {path}: {source}")]
    File {
        /// Where.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
}

/// Who has it, as its lock says.
#[derive(Debug, Serialize, Deserialize)]
struct Holder {
    /// The VM's name.
    vm: String,
    /// Its folder.
    folder: PathBuf,
}

/// A home directory, locked for as long as this value lives.
#[derive(Debug)]
pub struct Kept {
    folder: PathBuf,
    lock: File,
}

impl Kept {
    /// Takes the one called `name`, which is made if it is not there.
    pub fn take(home: &Home, name: &str) -> Result<Self, PersistError> {
        let folder = home.kept(name)?;
        make_private(&home.all_kept())?;
        let all = lock_all(home)?;
        make_private(&folder.join(FILES))?;
        Self::take_folder(folder, name, all)
    }

    /// Takes the one called `name`, which must be there.
    pub fn take_existing(home: &Home, name: &str) -> Result<Self, PersistError> {
        let folder = home.kept(name)?;
        let exists = || if folder.is_dir() { Ok(()) } else { Err(PersistError::Unknown(name.into())) };
        exists()?;
        let all = lock_all(home)?;
        exists()?;
        Self::take_folder(folder, name, all)
    }

    /// Takes it while it cannot be removed. That it is locked suffices from then on.
    fn take_folder(folder: PathBuf, name: &str, all: BaseLock) -> Result<Self, PersistError> {
        let path = folder.join(LOCK);
        let open = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(&path);
        let mut lock = open.map_err(fail(&path))?;
        let locked = flock(&lock, FlockOperation::NonBlockingLockExclusive);
        drop(all);
        let holder = holder(&mut lock).map_err(fail(&path))?;
        match (locked, holder) {
            (Ok(()), None) => {}
            (Ok(()), Some(holder)) => wait_for_orphan(name, holder)?,
            (Err(Errno::WOULDBLOCK), holder) => {
                let by = holder
                    .map_or_else(|| "a VM that is being started".into(), |holder| format!("the VM {}", holder.vm));
                return Err(PersistError::InUse { name: name.into(), by });
            }
            (Err(errno), _) => return Err(fail(&path)(errno.into())),
        }
        let mut kept = Self { folder, lock };
        kept.write(b"").map_err(fail(&path))?;
        Ok(kept)
    }

    /// Writes down which VM has it. Before that, none may be given the files.
    pub fn used_by(&mut self, vm: &str, folder: &Path) -> Result<(), PersistError> {
        let holder = Holder { vm: vm.into(), folder: folder.into() };
        let text = serde_json::to_vec(&holder).unwrap_or_default();
        self.write(&text).map_err(fail(&self.folder))
    }

    fn write(&mut self, text: &[u8]) -> io::Result<()> {
        self.lock.set_len(0)?;
        self.lock.rewind()?;
        self.lock.write_all(text)
    }

    /// Where it is, with what is kept beside its files.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// What the VM is granted.
    pub fn grant(&self) -> Grant {
        Grant { path: self.folder.join(FILES), writable: true, called: Some(HOME_GRANT.into()) }
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        // The VM has ended.
        let _ = self.write(b"");
    }
}

/// No home directory is taken, made, or removed while this is held, and nothing that is remembered changes.
pub fn lock_all(home: &Home) -> Result<BaseLock, PersistError> {
    let all = home.all_kept();
    lock_base(&all).map_err(fail(&all))
}

/// Whether somebody has the home directory in `folder`, and the VM, once it runs. Without the lock of all, whoever takes it meanwhile
/// would find it taken.
pub fn user_of(folder: &Path, _all: &BaseLock) -> (bool, Option<String>) {
    let Ok(mut lock) = File::open(folder.join(LOCK)) else { return (false, None) };
    if flock(&lock, FlockOperation::NonBlockingLockShared).is_ok() {
        return (false, None);
    }
    (true, holder(&mut lock).ok().flatten().map(|holder| holder.vm))
}

fn make_private(folder: &Path) -> Result<(), PersistError> {
    DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(fail(folder))
}

/// What is told about a failed system call.
fn fail(path: &Path) -> impl FnOnce(io::Error) -> PersistError + use<> {
    let path = path.to_owned();
    move |source| PersistError::File { path, source }
}

/// What the lock says, if it says something that was written whole.
fn holder(lock: &mut File) -> io::Result<Option<Holder>> {
    let mut text = String::new();
    lock.rewind()?;
    lock.take(64 * 1024).read_to_string(&mut text)?;
    Ok(serde_json::from_str(&text).ok())
}

/// Waits until what a killed launcher left of its VM was removed.
fn wait_for_orphan(name: &str, holder: Holder) -> Result<(), PersistError> {
    let fail = |source| PersistError::File { path: holder.folder.clone(), source };
    if let Ok(lock) = File::open(holder.folder.join(folder::LOCK)) {
        // The kernel gives up a process's locks one after the other.
        flock(&lock, FlockOperation::LockShared).map_err(|errno| fail(errno.into()))?;
    }
    folder::running().map_err(fail)?;
    if holder.folder.exists() { Err(PersistError::Orphan(name.into(), holder.vm)) } else { Ok(()) }
}

/// Lets the agent put the home directory, which was granted, in the place of the account's.
pub fn mount(link: AgentLink, user: &str) -> Result<(), RunError> {
    relay::carry_out(link, Request::Home { user: user.into(), source: place_of(HOME_GRANT) })
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt};

    use super::*;

    #[test]
    fn one_vm_at_a_time_and_files_stay() {
        let place = tempfile::tempdir().unwrap();
        let home = Home::at(place.path());
        let take = || Kept::take(&home, "web");
        let mut first = take().unwrap();
        let starting = take().unwrap_err().to_string();
        assert!(starting.contains("in use by a VM that is being started"), "{starting}");
        first.used_by("web-1", &place.path().join("vm-1")).unwrap();
        let running = take().unwrap_err().to_string();
        assert!(running.contains("\"web\" is in use by the VM web-1: end it"), "{running}");
        assert!(Kept::take(&home, "mail").is_ok(), "another is not concerned");
        let files = first.grant().path;
        assert_eq!(fs::metadata(&files).unwrap().permissions().mode() & 0o777, 0o700);
        fs::write(files.join("letter"), "kept").unwrap();
        drop(first);
        let again = take().unwrap();
        assert_eq!(fs::read_to_string(again.grant().path.join("letter")).unwrap(), "kept");
        assert!(matches!(Kept::take(&home, "../web"), Err(PersistError::Place(_))));
    }

    #[test]
    fn the_vm_of_a_killed_launcher_is_waited_for() {
        let place = tempfile::tempdir().unwrap();
        let home = Home::at(place.path());
        let left = place.path().join("vm-left");
        fs::create_dir(&left).unwrap();
        let mut killed = Kept::take(&home, "web").unwrap();
        killed.used_by("web-1", &left).unwrap();
        // As SIGKILL leaves it: the lock is free, its text is there.
        let copy = fs::read(home.kept("web").unwrap().join(LOCK)).unwrap();
        drop(killed);
        fs::write(home.kept("web").unwrap().join(LOCK), copy).unwrap();
        assert!(matches!(Kept::take(&home, "web"), Err(PersistError::Orphan(_, vm)) if vm == "web-1"));
        fs::remove_dir(&left).unwrap();
        Kept::take(&home, "web").unwrap();
    }
}
