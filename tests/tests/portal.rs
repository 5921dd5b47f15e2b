//! Files that the user picks in the desktop's own dialog, for applications in VMs that ask their portals as they always do.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;
use tempfile::TempDir;
use tests::desktop::{Application, Desktop};
use tests::session::Session;
use tests::{agent, programs};

/// The host: a desktop, its session bus with portals, a home with a policy, a folder of files.
struct Host {
    desktop: Desktop,
    session: Session,
    home: TempDir,
    runtime: TempDir,
    files: TempDir,
}

impl Host {
    fn new() -> Self {
        let mut desktop = Desktop::new();
        desktop.plug_keyboard();
        let session = Session::new(&desktop);
        let home = tempfile::tempdir().unwrap();
        fs::create_dir_all(home.path().join("templates")).unwrap();
        symlink(agent::template(), home.path().join("templates/default")).unwrap();
        fs::create_dir_all(home.path().join("config/spectrum")).unwrap();
        fs::write(home.path().join("config/spectrum/policy"), "files * * ask\n").unwrap();
        let runtime = tempfile::Builder::new().prefix("rt").tempdir().unwrap();
        Self { desktop, session, home, runtime, files: tempfile::tempdir().unwrap() }
    }

    fn run(&self, command: &[&str]) -> Application {
        let config = self.home.path().join("config");
        let settings: [(&str, &Path); 5] = [
            ("SPECTRUM_HOME", self.home.path()),
            ("XDG_RUNTIME_DIR", self.runtime.path()),
            ("XDG_CONFIG_HOME", &config),
            ("DBUS_SESSION_BUS_ADDRESS", self.session.address()),
            ("RUST_LOG", Path::new("spectrum=info,policy=info")),
        ];
        let options = ["--boot", "--template", "default", "--name", "vm"];
        Application::start_with(Some(&self.desktop), &options, &settings, command)
    }

    /// Runs a command in the VM.
    fn exec(&self, script: &str) -> Output {
        let mut command = Command::new(programs::program("spectrum"));
        command.env("XDG_RUNTIME_DIR", self.runtime.path()).env("SPECTRUM_HOME", self.home.path());
        command.args(["exec", "vm", "--", "sh", "-c", script]).stdin(Stdio::null()).output().unwrap()
    }

    fn in_vm(&self, script: &str) -> String {
        let output = self.exec(script);
        assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    fn file(&self, name: &str, text: &str) -> String {
        let path = self.files.path().join(name);
        fs::write(&path, text).unwrap();
        path.display().to_string()
    }

    fn press(&self, arguments: &[&str]) {
        let _ = self.desktop.output("wtype", arguments);
    }

    fn dialog(&mut self, app: &mut Application, title: &str) -> Value {
        self.desktop.wait_for_window(app, |window| window["name"] == title && window["focused"] == true)
    }
}

/// A GTK application of the distribution, which knows nothing of VMs, opens a file: it shows its content, and has it alone.
#[test]
fn an_application_opens_the_file_that_is_picked_and_sees_no_other() {
    let mut host = Host::new();
    let picked = host.file("picked.txt", "text for one application\n");
    host.file("other.txt", "for nobody\n");
    let mut app = host.run(&["gtk3-demo-application"]);
    host.desktop.wait_for_window(&mut app, |window| window["focused"] == true);
    assert_eq!(host.in_vm("ls /host"), "");

    host.press(&["-M", "ctrl", "o", "-m", "ctrl"]);
    host.dialog(&mut app, "[gtk3-demo-application] Open File");
    let _ = host.desktop.screenshot("portal-open");
    host.desktop.type_line(&picked);
    // It opens a further window for the file.
    host.desktop.wait_for(&mut app, |windows| {
        (windows.len() == 2 && windows.iter().all(|window| window["app_id"] == windows[0]["app_id"])).then_some(())
    });
    host.press(&["-M", "ctrl", "a", "c", "-m", "ctrl"]);
    let shown = host.desktop.output("wl-paste", &["-n"]);
    assert_eq!(String::from_utf8_lossy(&shown), "text for one application\n");

    assert_eq!(host.in_vm("ls /host; cat /host/picked.txt"), "picked.txt\ntext for one application\n");
    assert!(!host.exec("echo more >> /host/picked.txt").status.success(), "it was picked for reading");
    assert!(!host.exec("cat /host/other.txt /host/picked.txt/../other.txt").status.success());
    assert_eq!(fs::read_to_string(picked).unwrap(), "text for one application\n");
}
