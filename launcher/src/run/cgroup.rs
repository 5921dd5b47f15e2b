//! Limits for whole VMs: a control group (cgroup v2) for each, where this user may make one.
//!
//! That is the case below a user's service manager, in what was delegated otherwise, and for root. Nobody may have processes in a
//! group that hands limits on, so the place is the nearest group above this process's that can.

use std::{
    fs::{self, File},
    io::{self, Seek, Write},
    path::{Component, Path, PathBuf},
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{Access, access},
};

/// Where the hierarchy is mounted.
const ROOT: &str = "/sys/fs/cgroup";

/// What the names of our groups begin with.
const PREFIX: &str = "spectrum-";

/// What is limited. Shares of the CPUs come on top where they are to be had.
const NEEDED: [&str; 2] = ["memory", "pids"];

/// Memory of a VMM beside its guest's, in bytes: page tables, buffers of devices, and buffers that the guest's windows have.
const OVERHEAD: u64 = 512 << 20;

/// Threads of a VMM: one for each CPU and device, and a writer of snapshots with as many as there are CPUs.
const THREADS: u32 = 512;

/// Shares of the CPUs for each virtual one; 100 is what the kernel gives to a group.
const WEIGHT: u32 = 100;

/// How long the processes of a group may take to end once they were killed.
const PATIENCE: Duration = Duration::from_secs(5);

/// A group, which goes away with this value.
#[derive(Debug)]
pub struct Group {
    path: PathBuf,
}

impl Group {
    /// Where the one of the VM in `folder` belongs.
    pub fn path_for(folder: &Path) -> io::Result<PathBuf> {
        let name = folder.file_name().unwrap_or_default().to_string_lossy();
        Ok(place()?.join(format!("{PREFIX}{name}")))
    }

    /// Makes it, for a VM with so many bytes of memory and so many CPUs.
    pub fn new(path: PathBuf, memory: u64, cpus: u8) -> io::Result<Self> {
        fs::create_dir(&path)?;
        let group = Self { path };
        group.set("memory.max", memory.saturating_add(OVERHEAD))?;
        group.set("pids.max", THREADS)?;
        // Not everybody hands CPUs on.
        let _ = group.set("cpu.weight", WEIGHT.saturating_mul(cpus.into()).min(10_000));
        Ok(group)
    }

    /// Puts a process in it.
    pub fn take(&self, pid: u32) -> io::Result<()> {
        self.set("cgroup.procs", pid)
    }

    /// Whether the kernel has ended a process of it for want of memory.
    pub fn out_of_memory(&self) -> bool {
        let events = fs::read_to_string(self.path.join("memory.events")).unwrap_or_default();
        events.lines().any(|line| line.strip_prefix("oom_kill ").is_some_and(|count| count != "0"))
    }

    fn set(&self, file: &str, value: impl ToString) -> io::Result<()> {
        fs::write(self.path.join(file), value.to_string())
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = remove(&self.path);
    }
}

/// Removes a group of ours, and ends what is in it. One that is gone is no mistake.
pub fn remove(path: &Path) -> io::Result<()> {
    let is_ours = path.starts_with(ROOT)
        && path.components().all(|part| part != Component::ParentDir)
        && path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(PREFIX.as_bytes()));
    if !is_ours {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{} is no group of a VM", path.display())));
    }
    let end = Instant::now() + PATIENCE;
    loop {
        match fs::remove_dir(path) {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy && Instant::now() < end => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            result => return result,
        }
        fs::write(path.join("cgroup.kill"), "1")?;
        wait_until_empty(path, end)?;
    }
}

/// cgroup.events tells of changes as an exceptional condition.
fn wait_until_empty(path: &Path, end: Instant) -> io::Result<()> {
    let mut events = File::open(path.join("cgroup.events"))?;
    while io::read_to_string(&events)?.lines().any(|line| line == "populated 1") {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            break;
        }
        let left = Timespec::try_from(left).unwrap_or_default();
        poll(&mut [PollFd::new(&events, PollFlags::PRI)], Some(&left))?;
        events.rewind()?;
    }
    Ok(())
}

/// The group below which those of VMs can be.
pub fn place() -> io::Result<PathBuf> {
    let own = fs::read_to_string("/proc/self/cgroup")?;
    place_for(Path::new(ROOT), &own)
}

fn place_for(root: &Path, own: &str) -> io::Result<PathBuf> {
    let none = |text: &str| io::Error::new(io::ErrorKind::Unsupported, text);
    if !root.join("cgroup.controllers").exists() {
        return Err(none("this machine has no cgroup v2 hierarchy alone"));
    }
    let own = own.lines().find_map(|line| line.strip_prefix("0::/")).ok_or_else(|| none("it is in no cgroup"))?;
    let own = root.join(own);
    let mut groups = own.ancestors().take_while(|group| group.starts_with(root));
    let found = groups.find(|group| hands_on(group)).map(Path::to_owned);
    found.ok_or_else(|| none("no cgroup is delegated to this user"))
}

/// Whether groups below this one have limits and may be made by us.
fn hands_on(group: &Path) -> bool {
    let may_write = |path: PathBuf| access(path, Access::WRITE_OK).is_ok();
    let has = |file: &str| {
        let text = fs::read_to_string(group.join(file)).unwrap_or_default();
        NEEDED.iter().all(|needed| text.split_ascii_whitespace().any(|one| one == *needed))
    };
    if !may_write(group.to_owned()) || !may_write(group.join("cgroup.procs")) {
        return false;
    }
    // The second is refused where processes are in the group itself.
    has("cgroup.subtree_control") || (has("cgroup.controllers") && enable(&group.join("cgroup.subtree_control")))
}

fn enable(file: &Path) -> bool {
    let write = |text: &str| {
        // Never made: it is the kernel's.
        let file = fs::OpenOptions::new().write(true).open(file);
        file.and_then(|mut file| file.write_all(text.as_bytes()))
    };
    let enabled = write(&NEEDED.map(|name| format!("+{name}")).join(" ")).is_ok();
    if enabled {
        let _ = write("+cpu");
    }
    enabled
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A hierarchy of plain files: what the kernel refuses it does not.
    fn group(root: &Path, path: &str, controllers: &str, enabled: &str) -> PathBuf {
        let group = root.join(path);
        fs::create_dir_all(&group).unwrap();
        for (file, text) in
            [("cgroup.controllers", controllers), ("cgroup.subtree_control", enabled), ("cgroup.procs", "")]
        {
            fs::write(group.join(file), text).unwrap();
        }
        group
    }

    #[test]
    fn the_nearest_that_hands_limits_on() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        assert!(place_for(root, "0::/\n").unwrap_err().to_string().contains("no cgroup v2"));
        group(root, "", "cpu memory pids", "");
        let slice = group(root, "user/app", "memory pids\n", "memory pids\n");
        let leaf = group(root, "user/app/x.scope", "cpu\n", "");
        assert_eq!(place_for(root, "1:cpu:/\n0::/user/app/x.scope\n").unwrap(), slice);
        assert!(place_for(root, "1:cpu:/\n").is_err());
        // One that can, and does not yet.
        fs::write(leaf.join("cgroup.controllers"), "cpu memory pids").unwrap();
        assert_eq!(place_for(root, "0::/user/app/x.scope").unwrap(), leaf);
        // A plain file has both of what was written.
        assert_eq!(fs::read_to_string(leaf.join("cgroup.subtree_control")).unwrap(), "+cpuory +pids");
    }

    #[test]
    fn only_groups_of_vms_are_removed() {
        for path in ["/sys/fs/cgroup/x", "/tmp/spectrum-vm-x", "/sys/fs/cgroup/../spectrum-vm-x", "/"] {
            let error = remove(Path::new(path)).unwrap_err().to_string();
            assert!(error.ends_with("is no group of a VM"), "{error}");
        }
        remove(Path::new("/sys/fs/cgroup/spectrum-vm-not-there")).unwrap();
    }
}
