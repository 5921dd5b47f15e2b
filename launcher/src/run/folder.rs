//! The private folders of running VMs: sockets, messages, and what is written down about each.
//!
//! A folder is locked as long as its launcher lives. One whose lock is free is a dead VM's: whoever comes next ends what is left
//! of it and removes it. For that, and to make a folder with a name that no other has, the folder of all is locked.

use std::{
    env,
    fs::{self, File},
    io,
    os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::{
    fs::{FlockOperation, flock},
    process::Signal,
};
use vmm_api::{Client, Request};

use super::{
    cgroup,
    state::{self, About, Origin, State},
};

/// The file that is locked as long as a folder is in use.
pub const LOCK: &str = "lock";

/// The VMM's socket for its API.
pub const API: &str = "api.sock";
/// The VMM's socket for connections into the VM.
pub const VSOCK: &str = "vsock.sock";
/// What the VMM said, if it is no clone.
pub const MESSAGES: &str = "vmm.log";
/// What the VM's console said.
pub const CONSOLE: &str = "console.log";

/// What the folders of VMs begin with.
const PREFIX: &str = "vm-";

/// Longest name a socket in the folder has.
const LONGEST_NAME: usize = "vsock.sock_4294967295".len();

/// Longest path of a Unix socket, without the final zero: see unix(7).
const LONGEST_SOCKET: usize = 107;

/// How long the VMM of a dead VM may take to end.
const PATIENCE: Duration = Duration::from_secs(5);

/// Why a VM has no folder.
#[derive(Debug, thiserror::Error)]
pub enum FolderError {
    #[error("there is a VM called {0} already: see `spectrum ps`")]
    Taken(String),
    #[error("{0:?} cannot be a VM's name: use letters, digits, '-', '_' and '.', at most 64, not '-' or '.' first")]
    Name(String),
    #[error("cannot make a private folder for the VM: {0}")]
    Io(#[from] io::Error),
}

/// The folder. It goes away with this value.
#[derive(Debug)]
pub struct RunFolder {
    folder: tempfile::TempDir,
    state: State,
    _lock: File,
}

impl RunFolder {
    /// Makes a new one below [`base`], and gives the VM its name.
    pub fn create(about: &About, origin: Origin) -> Result<Self, FolderError> {
        Self::create_in(&base(), about, origin)
    }

    fn create_in(base: &Path, about: &About, origin: Origin) -> Result<Self, FolderError> {
        if let Some(name) = about.name.as_ref().filter(|name| !state::is_name(name)) {
            return Err(FolderError::Name(name.clone()));
        }
        make_base(base)?;
        let all = lock_base(base)?;
        sweep(base, &all)?;
        let living = living(base);
        let is_taken = |name: &str| living.iter().any(|(_, state)| state.name == name);
        let name = match &about.name {
            Some(name) if is_taken(name) => return Err(FolderError::Taken(name.clone())),
            Some(name) => name.clone(),
            None => state::free_name(&about.program, is_taken),
        };
        let private = fs::Permissions::from_mode(0o700);
        let folder = tempfile::Builder::new().prefix(PREFIX).permissions(private).tempdir_in(base)?;
        let lock = lock(folder.path())?;
        let longest = folder.path().as_os_str().len() + 1 + LONGEST_NAME;
        if longest > LONGEST_SOCKET {
            let text =
                format!("{} is too long for the path of a socket: set a shorter XDG_RUNTIME_DIR", base.display());
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text).into());
        }
        let state = State::new(name, about, origin)?;
        state.write(folder.path())?;
        Ok(Self { folder, state, _lock: lock })
    }

    /// Path of a file in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The folder itself.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// What the VM is called.
    pub fn name(&self) -> &str {
        &self.state.name
    }

    /// Changes what is written down about the VM.
    pub fn update(&mut self, change: impl FnOnce(&mut State)) -> Result<(), FolderError> {
        change(&mut self.state);
        Ok(self.state.write(self.folder.path())?)
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

/// No folder in it is made or removed by another while this is held.
#[derive(Debug)]
pub struct BaseLock {
    _folder: File,
}

/// Waits for its turn.
pub fn lock_base(base: &Path) -> io::Result<BaseLock> {
    let folder = File::open(base)?;
    flock(&folder, FlockOperation::LockExclusive)?;
    Ok(BaseLock { _folder: folder })
}

/// The VMs that run, by name, after what is left of others was removed.
pub fn running() -> io::Result<Vec<(PathBuf, State)>> {
    let base = base();
    match fs::symlink_metadata(&base) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        _ => check_owner(&base)?,
    }
    let all = lock_base(&base)?;
    sweep(&base, &all)?;
    Ok(living(&base))
}

/// The VMs whose folders are locked and whose processes live, by name.
fn living(base: &Path) -> Vec<(PathBuf, State)> {
    let entries = fs::read_dir(base).into_iter().flatten().flatten();
    let folders = entries.filter(|entry| is_of_vm(&entry.path())).map(|entry| entry.path());
    let mut all: Vec<_> = folders.filter_map(|folder| Some((State::read(&folder).ok()?, folder))).collect();
    all.retain(|(state, folder)| is_in_use(folder) && state.is_alive());
    all.sort_by(|(one, _), (other, _)| one.name.cmp(&other.name));
    all.into_iter().map(|(state, folder)| (folder, state)).collect()
}

fn is_of_vm(folder: &Path) -> bool {
    folder.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(PREFIX.as_bytes()))
}

fn is_in_use(folder: &Path) -> bool {
    let lock = File::open(folder.join(LOCK));
    // What cannot be asked about is rather left alone. The lock is free again at once: it goes with the descriptor.
    lock.map_or_else(
        |error| error.kind() != io::ErrorKind::NotFound,
        |lock| flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err(),
    )
}

/// Ends the VMMs whose launchers are gone, and removes their folders, and those of zygotes that have ended.
fn sweep(base: &Path, _all: &BaseLock) -> io::Result<()> {
    for entry in fs::read_dir(base)?.flatten() {
        let folder = entry.path();
        // A launcher that was killed can leave a socket where it was asked to make a folder: only folders are its own.
        if !folder.is_dir() || is_in_use(&folder) {
            continue;
        }
        // A folder that cannot be removed must not keep others from being used; the next who comes tries again.
        if !is_of_vm(&folder) || end_vmm(&folder) {
            if let Some(group) = State::read(&folder).ok().and_then(|state| state.cgroup) {
                let _ = cgroup::remove(&group);
            }
            let _ = fs::remove_dir_all(&folder);
        }
    }
    Ok(())
}

/// Ends the VMM of a VM whose launcher is gone. False if it lives on.
fn end_vmm(folder: &Path) -> bool {
    match State::read(folder).ok().and_then(|state| state.vmm) {
        Some(vmm) => vmm.open().is_none_or(|running| {
            running.signal(Signal::KILL);
            running.wait(PATIENCE)
        }),
        // Its launcher had no time to write down which process it is. One that does not listen yet finds its folder gone.
        None => {
            if let Ok(mut vmm) = Client::connect(&folder.join(API)) {
                let answer = vmm.set_timeout(Some(PATIENCE)).and_then(|()| vmm.send(&Request::VmmShutdown));
                return answer.is_ok();
            }
            true
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::{super::process::ProcessId, *};

    fn about(name: Option<&str>) -> About {
        let name = name.map(str::to_owned);
        let (app, services) = ("foot".into(), [].into());
        let command = vec!["foot".into()];
        About { name, app, services, program: "foot".into(), template: "default".into(), command, persist: None }
    }

    fn create(base: &Path, name: Option<&str>) -> Result<RunFolder, FolderError> {
        RunFolder::create_in(base, &about(name), Origin::Boot)
    }

    fn names(base: &Path) -> Vec<String> {
        living(base).into_iter().map(|(_, state)| state.name).collect()
    }

    #[test]
    fn private_gone_afterwards_and_leftovers_removed() {
        let place = tempfile::tempdir().unwrap();
        let base = place.path().join("spectrum");
        let first = create(&base, None).unwrap();
        let mode = fs::metadata(first.folder.path()).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
        for stale in ["vm-killed", "vm-unlocked", "zygote-x"] {
            fs::create_dir(base.join(stale)).unwrap();
        }
        fs::write(base.join("vm-killed/lock"), "").unwrap();
        let second = create(&base, None).unwrap();
        assert!(first.path("lock").exists(), "a folder in use stays");
        assert_eq!(fs::read_dir(&base).unwrap().count(), 2);
        drop((first, second));
        assert_eq!(fs::read_dir(&base).unwrap().count(), 0);
    }

    #[test]
    fn each_has_a_name_of_its_own() {
        let place = tempfile::tempdir().unwrap();
        let base = place.path().join("spectrum");
        let first = create(&base, None).unwrap();
        let _named = create(&base, Some("web")).unwrap();
        let _second = create(&base, None).unwrap();
        assert_eq!(names(&base), ["foot-1", "foot-2", "web"]);
        assert!(matches!(create(&base, Some("web")), Err(FolderError::Taken(_))));
        assert!(matches!(create(&base, Some("../web")), Err(FolderError::Name(_))));
        drop(first);
        let _again = create(&base, None).unwrap();
        assert_eq!(names(&base), ["foot-1", "foot-2", "web"]);
    }

    #[test]
    fn what_a_killed_launcher_left_is_ended_and_nobody_else() {
        let place = tempfile::tempdir().unwrap();
        let base = place.path().join("spectrum");
        let mut sleepers = [(); 2].map(|()| Command::new("sleep").arg("1000").spawn().unwrap());
        let [orphan, stranger] = sleepers.each_ref().map(|child| ProcessId::of(child.id()).unwrap());
        // Its number was used again: another start.
        let text = serde_json::to_string(&stranger).unwrap();
        let former: ProcessId = serde_json::from_str(&text.replacen("\"start\":", "\"start\":1", 1)).unwrap();
        for vmm in [orphan, former] {
            let mut folder = create(&base, None).unwrap();
            folder.update(|state| state.vmm = Some(vmm)).unwrap();
            // As SIGKILL leaves it.
            let RunFolder { folder, _lock, .. } = folder;
            let _ = folder.keep();
        }
        let all = lock_base(&base).unwrap();
        sweep(&base, &all).unwrap();
        let alive = [orphan, stranger].map(ProcessId::is_alive);
        sleepers.iter_mut().for_each(|child| child.kill().and_then(|()| child.wait().map(drop)).unwrap());
        assert_eq!(alive, [false, true]);
        assert_eq!(fs::read_dir(&base).unwrap().count(), 0);
    }

    #[test]
    fn an_open_or_too_deep_place_is_refused() {
        let place = tempfile::tempdir().unwrap();
        let base = place.path().join("open");
        fs::create_dir(&base).unwrap();
        fs::set_permissions(&base, PermissionsExt::from_mode(0o755)).unwrap();
        assert!(create(&base, None).unwrap_err().to_string().contains("not a private folder"));
        let deep = place.path().join("d".repeat(90));
        assert!(create(&deep, None).unwrap_err().to_string().contains("too long"));
        assert_eq!(fs::read_dir(&deep).unwrap().count(), 0);
    }
}
