//! Where `spectrum` keeps what a test runs: a home with the template in it, as `default`, and a runtime folder, nobody else's.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;
use tempfile::TempDir;

use crate::desktop::{Application, Desktop};
use crate::{agent, programs};

/// Both go away with this.
pub struct Place {
    home: TempDir,
    runtime: TempDir,
}

impl Default for Place {
    fn default() -> Self {
        Self::new()
    }
}

impl Place {
    /// A new one.
    ///
    /// # Panics
    /// If there is no template, or no room for files.
    #[must_use]
    pub fn new() -> Self {
        let home = tempfile::tempdir().expect("there is room for files");
        fs::create_dir(home.path().join("templates")).expect("our directory");
        symlink(agent::template(), home.path().join("templates/default")).expect("our directory");
        // Sockets are in it: their paths must be short.
        let runtime = tempfile::Builder::new().prefix("rt").tempdir().expect("there is room for files");
        Self { home, runtime }
    }

    /// Value of `SPECTRUM_HOME`.
    #[must_use]
    pub fn home(&self) -> &Path {
        self.home.path()
    }

    /// Value of `XDG_RUNTIME_DIR`.
    #[must_use]
    pub fn runtime(&self) -> &Path {
        self.runtime.path()
    }

    /// What tells `spectrum` of it.
    #[must_use]
    pub fn settings(&self) -> [(&'static str, &Path); 2] {
        [("SPECTRUM_HOME", self.home()), ("XDG_RUNTIME_DIR", self.runtime())]
    }

    /// Runs `command` in a VM of the template; its windows are on `desktop`, if any.
    #[must_use]
    pub fn start(&self, desktop: Option<&Desktop>, options: &[&str], command: &[&str]) -> Application {
        let options = [&["--template", "default"], options].concat();
        Application::start_with(desktop, &options, &self.settings(), command)
    }

    /// `spectrum`, with nothing to read.
    #[must_use]
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(programs::program("spectrum"));
        command.args(arguments).envs(self.settings()).stdin(Stdio::null());
        command
    }

    /// What came of that.
    ///
    /// # Panics
    /// If it cannot be started.
    #[must_use]
    pub fn output(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().expect("a program")
    }

    /// What it printed.
    ///
    /// # Panics
    /// If it failed.
    pub fn spectrum(&self, arguments: &[&str]) -> String {
        let output = self.output(arguments);
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("text")
    }

    /// The VMs that run, as `spectrum ps` tells them.
    ///
    /// # Panics
    /// If it fails.
    #[must_use]
    pub fn ps(&self) -> Vec<Value> {
        serde_json::from_str(&self.spectrum(&["ps", "--json"])).expect("an array")
    }

    /// The folders that `spectrum` has in the runtime folder: those of VMs begin with `vm-`, of zygotes with `zygote-`.
    #[must_use]
    pub fn folders(&self, prefix: &str) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.runtime().join("spectrum")).into_iter().flatten().flatten();
        entries
            .filter(|entry| entry.file_name().to_string_lossy().starts_with(prefix))
            .map(|entry| entry.path())
            .collect()
    }

    /// Processes of VMMs and zygotes, with their command lines. A clone has its zygote's.
    #[must_use]
    pub fn processes(&self) -> BTreeMap<u32, String> {
        programs::processes_of(self.runtime())
    }
}
