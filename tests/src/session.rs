//! A session bus on the host's side, with the desktop's own portals on it: xdg-desktop-portal and its GTK back-end, which have their
//! dialogs on a [`Desktop`].

use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;

use crate::desktop::Desktop;

/// The bus. It, and what it has started, ends when this goes out of scope.
pub struct Session {
    directory: TempDir,
    bus: Child,
    address: PathBuf,
}

impl Session {
    /// Starts one.
    ///
    /// # Panics
    /// If it does not start.
    #[must_use]
    pub fn new(desktop: &Desktop) -> Self {
        let directory = tempfile::Builder::new().prefix("bus").tempdir().expect("there is room for files");
        std::fs::set_permissions(directory.path(), PermissionsExt::from_mode(0o700)).expect("our directory");
        // What is on the screen changes when something happens, and only then.
        let settings = directory.path().join(".config/glib-2.0/settings");
        std::fs::create_dir_all(&settings).expect("our directory");
        let still = "[org/gnome/desktop/interface]\ncursor-blink=false\nenable-animations=false\n";
        std::fs::write(settings.join("keyfile"), still).expect("our directory");
        let socket = directory.path().join("bus");
        let mut bus = Command::new("dbus-daemon")
            .args(["--session", "--nofork", "--nopidfile", "--nosyslog", "--print-address"])
            .arg(format!("--address=unix:path={}", socket.display()))
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .env("HOME", directory.path())
            .env("XDG_RUNTIME_DIR", directory.path())
            .env("XDG_CURRENT_DESKTOP", "GNOME")
            .env("WAYLAND_DISPLAY", desktop.wayland())
            .env("GDK_BACKEND", "wayland")
            .env("GSETTINGS_BACKEND", "keyfile")
            .env("GIO_USE_VFS", "local")
            .env("NO_AT_BRIDGE", "1")
            .env("LANG", "C.UTF-8")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("dbus-daemon is installed");
        let mut line = String::new();
        BufReader::new(bus.stdout.take().expect("a pipe")).read_line(&mut line).expect("it says its address");
        assert!(line.starts_with("unix:"), "{line:?}");
        Self { directory, bus, address: line.trim_end().into() }
    }

    /// Value of `DBUS_SESSION_BUS_ADDRESS`.
    #[must_use]
    pub fn address(&self) -> &Path {
        &self.address
    }

    /// Kills the processes that it has started and that have this name.
    pub fn kill(&self, name: &str) {
        for pid in self.processes() {
            let comm = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            // The kernel keeps 15 bytes of a name.
            if !comm.trim_end().is_empty() && name.starts_with(comm.trim_end()) {
                let _ = Command::new("kill").args(["-KILL", &pid.to_string()]).status();
            }
        }
    }

    /// All that have its directory for their home.
    fn processes(&self) -> Vec<u32> {
        let home = format!("HOME={}\0", self.directory.path().display());
        let all = std::fs::read_dir("/proc").expect("proc").flatten();
        let pids = all.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        pids.filter(|pid| {
            let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            String::from_utf8_lossy(&environment).contains(&home)
        })
        .collect()
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        for pid in self.processes() {
            let _ = Command::new("kill").args(["-KILL", &pid.to_string()]).status();
        }
        let _ = self.bus.wait();
    }
}
