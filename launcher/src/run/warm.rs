//! Warm templates: a VM of a template that has booted once, saved, and a zygote that makes clones of it.
//!
//! ```text
//!   home/warm/NAME@WHAT-HOW/                 the snapshot; WHAT: template and VMM, HOW: the shape of the VM
//!   runtime folder/zygote-HASHES/            the zygote's socket and log
//! ```
//! The zygote outlives the launcher that started it, so that the next finds it. It ends with the template, by
//! `spectrum template gc`, or by a signal. Nothing of an application is in it: it is saved when the agent has announced
//! itself, before it does anything.

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io,
    os::unix::{fs::OpenOptionsExt, process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{FlockOperation, flock, inotify},
    io::Errno,
    process::{Pid, PidfdFlags, pidfd_open},
};
use sha2::{Digest, Sha256};
use vmm_api::{Client, ClientError, Request};
use vmm_config::SnapshotConfig;

use super::{
    RunError, folder, io_error, network::UNCONNECTED, options::Settings, signals::Signals, vm::Vm,
    working_set::WorkingSet,
};
use crate::{
    apps::Network,
    home::{Home, HomeError},
    progress::Bar,
    template::{self, Template},
};

/// The zygote's socket in its folder.
const SOCKET: &str = "zygote.sock";
/// What is there when a snapshot is whole.
const SNAPSHOT: &str = "snapshot.json";
/// How long a VM may take to be saved.
const SAVED_WITHIN: Duration = Duration::from_secs(300);
/// How long a zygote may take until it listens.
const PATIENCE: Duration = Duration::from_secs(60);

/// Why there is no warm template.
#[derive(Debug, thiserror::Error)]
pub enum WarmError {
    #[error(transparent)]
    Home(#[from] HomeError),
    #[error("cannot save the warm VM: {0}")]
    Save(ClientError),
    #[error("the zygote does not listen after {} s: see {}", PATIENCE.as_secs(), .0.display())]
    Silent(PathBuf),
    #[error("the zygote of the warm template ended: {0}")]
    Ended(String),
}

/// A warm template: where it is, or is to be.
#[derive(Debug)]
pub struct Warm {
    name: String,
    snapshot: PathBuf,
    folder: PathBuf,
}

impl Warm {
    /// The one that fits to `settings`.
    pub fn of(home: &Home, settings: &Settings) -> Result<Self, RunError> {
        let what = fingerprint(&settings.template, &settings.vmm)?;
        // What is in every VM is part of it too, or a launcher of another version would find what it cannot use.
        let interface = settings.network == Network::Internet;
        let shape = format!("fs {} {} {} {interface}", settings.memory, settings.cpus, settings.wayland.is_some());
        let name = format!("{what}-{}", short_hash(shape.as_bytes()));
        let place = zygote_folder(home, &name);
        let base = folder::base();
        folder::make_base(&base).map_err(io_error("make the folder of running VMs"))?;
        Ok(Self { snapshot: home.warm().join(&name), folder: base.join(place), name })
    }

    /// A connection to its zygote, if there is one.
    pub fn connect(&self) -> Option<Client> {
        let mut client = Client::connect(&self.folder.join(SOCKET)).ok()?;
        client.set_timeout(Some(PATIENCE)).ok()?;
        Some(client)
    }

    /// The zygote's messages.
    pub fn log(&self) -> PathBuf {
        self.folder.join(folder::LOCK)
    }

    /// What the VMs of an app touch while it starts.
    pub fn working_set(&self, app: &str) -> WorkingSet {
        WorkingSet::of(&self.snapshot, &short_hash(app.as_bytes()))
    }

    /// A connection to its zygote, which is started before, and the template warmed, if need be. Says so with `tell`.
    pub fn ready(&self, settings: &Settings, signals: &Signals, tell: impl Fn(&str)) -> Result<Client, RunError> {
        if let Some(client) = self.connect() {
            return Ok(client);
        }
        let lock = self.lock(signals)?;
        // Whoever had the lock may have done it.
        if let Some(client) = self.connect() {
            return Ok(client);
        }
        if !self.snapshot.join(SNAPSHOT).exists() {
            tell("this template is not warm yet: booting and saving it, once");
            let bar = Bar::new();
            bar.begin("booting and saving it, once");
            self.save(settings, signals)?;
        }
        let started = self.start(&settings.vmm);
        if matches!(&started, Err(RunError::Warm(WarmError::Ended(_)))) {
            // Perhaps of another CPU, or damaged: the next makes it anew.
            let _ = fs::remove_dir_all(&self.snapshot);
        }
        drop(lock);
        started
    }

    fn lock(&self, signals: &Signals) -> Result<File, RunError> {
        let fail = io_error("make a folder for warm templates");
        let parent = self.snapshot.parent().unwrap_or(Path::new("/"));
        fs::create_dir_all(parent).map_err(fail)?;
        let path = parent.join(format!("{}.lock", self.name));
        let file = OpenOptions::new().create(true).append(true).mode(0o600).open(path);
        let file = file.map_err(io_error("lock the warm template"))?;
        loop {
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(file),
                Err(Errno::WOULDBLOCK) => {}
                Err(errno) => return Err(io_error("lock the warm template")(errno)),
            }
            // Somebody else is warming it. Nothing tells of the end of that but the lock, and signals are heard here.
            let mut wanted: Vec<_> = signals.fds().map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)).collect();
            let soon = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
            match poll(&mut wanted, Some(&soon)) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(io_error("wait for the warm template")(errno)),
            }
            if let Some(signal) = signals.received() {
                return Err(RunError::Interrupted(signal));
            }
        }
    }

    /// Boots a VM until its agent has announced itself, and saves it.
    fn save(&self, settings: &Settings, signals: &Signals) -> Result<(), RunError> {
        // It is everybody's: nothing of the application that happens to be the first.
        let mut settings = Settings { hostname: "template".into(), environment: BTreeMap::new(), ..settings.clone() };
        if std::mem::replace(&mut settings.network, Network::None) == Network::Internet {
            // Its link is down; each clone's is connected.
            settings.vmm_arguments.extend(["--net", UNCONNECTED].map(Into::into));
        }
        let settings = &settings;
        let mut vm = Vm::boot(settings)?;
        vm.wait_for_agent(signals)?;
        let mut api = vm.api().map_err(WarmError::Save)?;
        api.set_timeout(Some(SAVED_WITHIN)).map_err(WarmError::Save)?;
        api.send(&Request::VmPause).map_err(WarmError::Save)?;
        let to = SnapshotConfig { destination_url: format!("file://{}", self.snapshot.display()) };
        api.send(&Request::VmSnapshot(to)).map_err(WarmError::Save)?;
        Ok(())
    }

    fn start(&self, vmm: &Path) -> Result<Client, RunError> {
        let fail = |source| RunError::Io { what: "start the zygote", source };
        // Until the folder's lock is taken it looks like a leftover.
        let all = folder::lock_base(&folder::base()).map_err(fail)?;
        let _ = fs::remove_dir_all(&self.folder);
        fs::create_dir(&self.folder).map_err(fail)?;
        let created = inotify::init(inotify::CreateFlags::CLOEXEC).map_err(io_error("watch the zygote"))?;
        inotify::add_watch(&created, &self.folder, inotify::WatchFlags::CREATE)
            .map_err(io_error("watch the zygote"))?;
        // Locked for as long as the zygote or a clone has it: that keeps the folder.
        let log = folder::lock(&self.folder).map_err(fail)?;
        drop(all);
        let mut flag = std::ffi::OsString::from("source_url=file://");
        flag.push(&self.snapshot);
        flag.push(",socket=");
        flag.push(self.folder.join(SOCKET));
        flag.push(",pool=1");
        let mut command = Command::new(vmm);
        command.arg("--zygote").arg(flag).current_dir("/").process_group(0);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let child = command.spawn().map_err(fail)?;
        self.wait_until_it_listens(child, &created)
    }

    fn wait_until_it_listens(&self, mut child: Child, created: impl std::os::fd::AsFd) -> Result<Client, RunError> {
        let fail = io_error("watch the zygote");
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).ok_or(Errno::SRCH);
        let pidfd = pid.and_then(|pid| pidfd_open(pid, PidfdFlags::empty())).map_err(io_error("watch the zygote"))?;
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some(client) = self.connect() {
                return Ok(client);
            }
            if child.try_wait().map_err(&fail)?.is_some() {
                let text = fs::read_to_string(self.log()).unwrap_or_default();
                let last = text.lines().last().unwrap_or("it said nothing");
                return Err(WarmError::Ended(last.trim_start_matches("spectrum-vmm: ").to_owned()).into());
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let _ = child.kill();
                let _ = child.wait();
                return Err(WarmError::Silent(self.log()).into());
            }
            // A socket is there a moment before it listens: then look again soon.
            let left = Timespec::try_from(left.min(Duration::from_millis(20))).unwrap_or_default();
            let mut wanted = [PollFd::new(&created, PollFlags::IN), PollFd::new(&pidfd, PollFlags::IN)];
            match poll(&mut wanted, Some(&left)) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(io_error("watch the zygote")(errno)),
            }
        }
    }
}

/// The template as it is, and the VMM that runs it: whatever is saved belongs to both.
fn fingerprint(template: &Template, vmm: &Path) -> Result<String, RunError> {
    let name = template.folder.file_name().unwrap_or_default().to_string_lossy();
    let data = fs::metadata(vmm).map_err(io_error("look at the VMM"))?;
    let modified = data.modified().ok().and_then(|time| time.duration_since(std::time::UNIX_EPOCH).ok());
    let files = serde_json::to_string(&template.manifest.files).unwrap_or_default();
    let place = template.folder.display();
    let all = format!("{place} {} {} {modified:?} {files}", vmm.display(), data.len());
    Ok(format!("{name}@{}", short_hash(all.as_bytes())))
}

/// The folder of a zygote among those of running VMs, which all homes have in common. Short, whatever the template is called:
/// the path of a socket may have about a hundred bytes.
fn zygote_folder(home: &Home, name: &str) -> String {
    let home = short_hash(home.warm().as_os_str().as_encoded_bytes());
    format!("zygote-{}-{}", home, short_hash(name.as_bytes()))
}

fn short_hash(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

/// Ends the zygotes of, and removes, what was warmed: all for which `is_kept` does not hold. Its argument is the name of the
/// template and the fingerprint. The names of those that are gone.
pub fn sweep(home: &Home, is_kept: impl Fn(&str) -> bool) -> io::Result<Vec<String>> {
    let base = folder::base();
    let mut gone = Vec::new();
    let entries = |path: &Path| -> io::Result<Vec<String>> {
        match fs::read_dir(path) {
            Ok(entries) => Ok(entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    };
    let unwanted = |name: &str| name.rsplit_once('-').is_some_and(|(what, _)| !is_kept(what));
    // Each has a lock, which stays: who waits for it must find the same file.
    for entry in entries(&home.warm())? {
        let Some(name) = entry.strip_suffix(".lock").filter(|name| unwanted(name)) else { continue };
        let lock = File::open(home.warm().join(&entry))?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            // It is being warmed at this moment.
            Err(Errno::WOULDBLOCK) => continue,
            Err(errno) => return Err(errno.into()),
        }
        let (folder, snapshot) = (base.join(zygote_folder(home, name)), home.warm().join(name));
        if !folder.exists() && !snapshot.exists() {
            continue;
        }
        if let Ok(mut zygote) = Client::connect(&folder.join(SOCKET)) {
            zygote.set_timeout(Some(PATIENCE)).map_err(io::Error::other)?;
            // If it does not listen to reason the folder stays, and tells of it.
            zygote.send(&Request::VmmShutdown).map_err(io::Error::other)?;
        }
        for folder in [folder, snapshot] {
            match fs::remove_dir_all(&folder) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        gone.push(name.to_owned());
    }
    gone.sort();
    Ok(gone)
}

/// Whether what was warmed still belongs to a template and to this VMM.
pub fn current(home: &Home, vmm: &Path) -> impl Fn(&str) -> bool {
    move |what| {
        let name = what.split('@').next().unwrap_or_default();
        let template = template::open(home, name).ok();
        template.is_some_and(|template| fingerprint(&template, vmm).is_ok_and(|now| now == what))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::template::Manifest;

    #[test]
    fn another_template_or_vmm_is_another_warm_one() {
        let place = tempfile::tempdir().unwrap();
        let vmm = place.path().join("vmm");
        fs::write(&vmm, "1").unwrap();
        let template = |name: &str, version: &str| Template {
            folder: place.path().join(name),
            manifest: Manifest {
                files: BTreeMap::from([(version.into(), template::FileEntry { bytes: 1, sha256: version.into() })]),
                ..Manifest::new("trixie", "6.12", BTreeMap::new())
            },
        };
        let print = |template: &Template| fingerprint(template, &vmm).unwrap();
        let first = print(&template("web", "1"));
        assert!(first.starts_with("web@"), "{first}");
        assert_eq!(first, print(&template("web", "1")));
        assert_ne!(first, print(&template("web", "2")));
        fs::write(&vmm, "22").unwrap();
        assert_ne!(first, print(&template("web", "1")));
    }

    #[test]
    fn what_nobody_wants_is_swept() {
        let place = tempfile::tempdir().unwrap();
        let home = Home::at(place.path());
        for name in ["a-b@1-x", "a-b@2-x"] {
            fs::create_dir_all(home.warm().join(name)).unwrap();
            fs::write(home.warm().join(format!("{name}.lock")), "").unwrap();
        }
        assert_eq!(sweep(&home, |what| what == "a-b@1").unwrap(), ["a-b@2-x"]);
        let mut left: Vec<_> = fs::read_dir(home.warm()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["a-b@1-x", "a-b@1-x.lock", "a-b@2-x.lock"]);
    }
}
