//! What is written down about a running VM, in its private folder, for other commands.

use std::{
    collections::BTreeMap,
    fs, io,
    io::Write,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use serde::{Deserialize, Serialize};

use super::process::ProcessId;

/// Its name in the folder.
const FILE: &str = "state.json";

/// Longest name of a VM.
const LONGEST_NAME: usize = 64;

/// What a VM is started for.
#[derive(Clone, Debug)]
pub struct About {
    /// What it shall be called; else `program` and a number.
    pub name: Option<String>,
    /// The app, as the policy knows it.
    pub app: String,
    /// What it offers to others: the command of each service.
    pub services: BTreeMap<String, Vec<String>>,
    /// What the application is called, as a host name.
    pub program: String,
    /// The template.
    pub template: String,
    /// The application and its arguments.
    pub command: Vec<String>,
    /// The home directory that it keeps.
    pub persist: Option<String>,
}

/// How a VM came to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// Its kernel was booted.
    Boot,
    /// It is a clone of a warm template.
    Clone,
}

/// A VM, as its launcher describes it. Whether this still holds only locks and processes can tell.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// What the user calls it. No two have the same.
    pub name: String,
    /// The app, as the policy knows it.
    pub app: String,
    /// What it offers to others: the command of each service.
    pub services: BTreeMap<String, Vec<String>>,
    /// The template.
    pub template: String,
    /// The application it was started for, and its arguments.
    pub command: Vec<String>,
    /// The home directory that it keeps.
    pub persist: Option<String>,
    /// Where that is, with what is kept beside its files, once the VM has it.
    pub kept: Option<PathBuf>,
    /// How it came to be.
    pub origin: Origin,
    /// When, in seconds since 1970.
    pub started: u64,
    /// The launcher.
    pub launcher: ProcessId,
    /// The VMM, once there is one.
    pub vmm: Option<ProcessId>,
    /// Whether its application can run: the agent is there and knows which VM it is in.
    pub ready: bool,
    /// The VM's control group, if it has one.
    pub cgroup: Option<PathBuf>,
    /// Where the VMM's messages are, among those of its siblings, if not in the folder.
    pub zygote_log: Option<PathBuf>,
}

impl State {
    /// Of a VM that has a name and nothing else yet.
    pub fn new(name: String, about: &About, origin: Origin) -> io::Result<Self> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Ok(Self {
            name,
            app: about.app.clone(),
            services: about.services.clone(),
            template: about.template.clone(),
            command: about.command.clone(),
            persist: about.persist.clone(),
            kept: None,
            origin,
            started: now.as_secs(),
            launcher: ProcessId::own().ok_or_else(|| io::Error::other("/proc does not tell about this process"))?,
            vmm: None,
            ready: false,
            cgroup: None,
            zygote_log: None,
        })
    }

    /// Reads it.
    pub fn read(folder: &Path) -> io::Result<Self> {
        Ok(serde_json::from_slice(&fs::read(folder.join(FILE))?)?)
    }

    /// Writes it: who reads sees the former or this, whole.
    pub fn write(&self, folder: &Path) -> io::Result<()> {
        let mut file = tempfile::NamedTempFile::new_in(folder)?;
        file.write_all(&serde_json::to_vec(self)?)?;
        file.persist(folder.join(FILE)).map_err(|error| error.error)?;
        Ok(())
    }

    /// Whether this VM runs: it does as long as both of its processes do.
    pub fn is_alive(&self) -> bool {
        self.launcher.is_alive() && self.vmm.is_none_or(ProcessId::is_alive)
    }
}

/// Whether a VM can be called that.
pub fn is_name(name: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    !name.is_empty() && name.len() <= LONGEST_NAME && !name.starts_with(['.', '-']) && name.chars().all(allowed)
}

/// The first of `program`-1, -2, ... that nobody has.
pub fn free_name(program: &str, taken: impl Fn(&str) -> bool) -> String {
    let mut number = 1_u32;
    loop {
        let end = format!("-{number}");
        let program: String = program.chars().take(LONGEST_NAME.saturating_sub(end.len())).collect();
        let name = program + &end;
        if !taken(&name) {
            return name;
        }
        number = number.saturating_add(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        for name in ["foot", "foot-1", "My_App.2", &"a".repeat(64)] {
            assert!(is_name(name), "{name}");
        }
        for name in ["", "-foot", ".foot", "a b", "a/b", "\u{e4}", "a\n", &"a".repeat(65)] {
            assert!(!is_name(name), "{name:?}");
        }
        let taken = ["foot-1", "foot-3"];
        assert_eq!(free_name("foot", |name| taken.contains(&name)), "foot-2");
        let long = free_name(&"a".repeat(63), |name| name.len() < 64 || name.ends_with("-1"));
        assert!(is_name(&long) && long.ends_with("a-2"), "{long}");
    }
}
