//! What an app's file keeps and shares: a home directory that outlives its VMs, and files of the host.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;
use tempfile::TempDir;
use tests::desktop::{Application, Owner};
use tests::{agent, programs};

/// A user's home with the template, an app and a folder of notes, and a runtime folder, of the test's own.
struct Place {
    user: TempDir,
    runtime: TempDir,
}

impl Place {
    fn new() -> Self {
        let user = tempfile::tempdir().unwrap();
        let runtime = tempfile::Builder::new().prefix("rt").tempdir().unwrap();
        let place = Self { user, runtime };
        for folder in ["kept/templates", "config/spectrum/apps", "home/notes"] {
            fs::create_dir_all(place.path(folder)).unwrap();
        }
        symlink(agent::template(), place.path("kept/templates/default")).unwrap();
        let app = "template = \"default\"\ncommand = [\"sh\", \"-c\"]\nwayland = false\npersist = \"mine\"\n\
                   shares = [{ path = \"~/notes\", write = true }, { path = \"~/letter\" }]\n";
        fs::write(place.path("config/spectrum/apps/office.toml"), app).unwrap();
        place
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.user.path().join(name)
    }

    fn settings(&self) -> [(&'static str, std::path::PathBuf); 5] {
        [
            ("SPECTRUM_TEMPLATE", "default".into()),
            ("SPECTRUM_HOME", self.path("kept")),
            ("XDG_CONFIG_HOME", self.path("config")),
            ("HOME", self.path("home")),
            ("XDG_RUNTIME_DIR", self.runtime.path().to_owned()),
        ]
    }

    fn run(&self, script: &str) -> Application {
        let settings = self.settings();
        let settings: Vec<(&str, &Path)> = settings.iter().map(|(name, path)| (*name, path.as_path())).collect();
        Application::start_with(None, &[], &settings, &["office", script])
    }

    fn output(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(programs::program("spectrum"));
        command.args(arguments).envs(self.settings()).stdin(Stdio::null());
        command.output().unwrap()
    }

    fn spectrum(&self, arguments: &[&str]) -> String {
        let output = self.output(arguments);
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }
}

/// What its user picked once is there for the next VM before the app runs, as the policy still allows, until it is forgotten.
fn what_was_picked_is_granted_again(place: &Place) {
    let remember = |name: &str, writable: bool| {
        let path = fs::canonicalize(place.path("home")).unwrap().join(name);
        fs::write(&path, "picked\n").unwrap();
        serde_json::json!({ "name": name, "path": path, "writable": writable })
    };
    let files = [remember("read", false), remember("write", true), remember("denied", false)];
    let picked = place.path("kept/homes/mine/picked.json");
    fs::write(&picked, serde_json::json!({ "version": 1, "files": files }).to_string()).unwrap();
    let denied = files[2]["path"].as_str().unwrap();
    fs::write(place.path("config/spectrum/policy"), format!("files * {denied} deny\nfiles office * ask\n")).unwrap();
    let script =
        "cat /host/read; echo more >> /host/write; (echo more >> /host/read) 2>/dev/null; ls /host; exec sleep 1000";
    let mut application = place.run(script);
    application.hear("write\n");
    let said = application.said();
    assert!(said.contains("output:\npicked\nletter\nnotes\nread\nwrite\n"), "{said}");
    assert_eq!(fs::read_to_string(place.path("home/write")).unwrap(), "picked\nmore\n");
    assert_eq!(fs::read_to_string(place.path("home/read")).unwrap(), "picked\n");
    place.spectrum(&["revoke", "sh-1", "read"]);
    let homes: Value = serde_json::from_str(&place.spectrum(&["home", "list", "--json"])).unwrap();
    let home = serde_json::json!({ "name": "mine", "in_use": true, "vm": "sh-1", "remembered": files[1..] });
    assert_eq!(homes, serde_json::json!([home]));
    let refused = place.output(&["home", "rm", "mine"]);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("in use by the VM sh-1: end it first"), "{refused:?}");
    place.spectrum(&["kill", "sh-1"]);
    drop(application);
    place.spectrum(&["home", "forget", "mine", "write"]);
    let (_, text) = place.run("ls /host; cat ~/papers/file").wait();
    assert_eq!(text, "letter\nnotes\ntwo\n");
}

/// The app's files are there whenever it runs, for one VM at a time, also after its launcher was killed; others do not see them.
#[test]
fn a_home_directory_is_kept_and_files_are_shared() {
    let place = Place::new();
    let refused = place.output(&["run", "office", "true"]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(said.contains("shares") && said.contains("home/letter, which cannot be used"), "{said}");
    fs::write(place.path("home/letter"), "dear\n").unwrap();

    let first = "ls -A ~ | grep -x .profile; cat /host/letter; echo changed > /host/letter || echo refused; \
                 echo note > /host/notes/note; mkdir ~/papers; echo one > ~/papers/file; ln -s file ~/papers/link; stat -c %U ~; \
                 pwd; exec sleep 1000";
    let mut application = place.run(first);
    application.hear("/home/user");
    let said = application.said();
    for line in [".profile\n", "dear\n", "refused\n", "user\n"] {
        assert!(said.contains(line), "{line:?}: {said}");
    }
    assert_eq!(fs::read_to_string(place.path("home/letter")).unwrap(), "dear\n");
    assert_eq!(fs::read_to_string(place.path("home/notes/note")).unwrap(), "note\n");

    // What it has is told, and nobody else gets the home directory meanwhile.
    let vms: Vec<Value> = serde_json::from_str(&place.spectrum(&["ps", "--json"])).unwrap();
    assert_eq!((vms.len(), &vms[0]["persist"]), (1, &"mine".into()), "{vms:?}");
    let grants: Vec<_> =
        vms[0]["grants"].as_array().unwrap().iter().map(|grant| (&grant["name"], &grant["writable"])).collect();
    let expected = [(".home", true), ("letter", false), ("notes", true)];
    assert_eq!(
        grants,
        expected
            .map(|(name, writable)| (name.into(), writable.into()))
            .each_ref()
            .map(|(n, w): &(Value, Value)| (n, w))
    );
    let refused = place.output(&["run", "office", "true"]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(said.contains("\"mine\" is in use by the VM sh-1: end it"), "{said}");
    assert_eq!(place.spectrum(&["run", "--vm", "sh-1", "office", "cat ~/papers/link /host/letter"]), "one\ndear\n");
    let other = place.output(&["run", "--vm", "sh-1", "--persist", "other", "sh", "-c", "true"]);
    assert!(String::from_utf8_lossy(&other.stderr).contains("is not the one of the VM sh-1"), "{other:?}");
    let disposable =
        ["run", "--no-wayland", "sh", "-c", "ls ~/papers /host/.home /host/notes 2>/dev/null; echo nothing"];
    assert_eq!(place.spectrum(&disposable), "nothing\n");

    // Whoever comes next ends what a killed launcher has left, and has the files.
    let launcher = vms[0]["launcher_pid"].to_string();
    assert!(Command::new("kill").args(["-KILL", &launcher]).status().unwrap().success());
    let (status, text) = place.run("cat ~/papers/link; echo two > ~/papers/file").wait();
    assert_eq!((status.code(), text.as_str()), (Some(0), "one\n"));
    assert_eq!(fs::read_to_string(place.path("kept/homes/mine/files/papers/file")).unwrap(), "two\n");
    let (_, text) = place.run("cat ~/papers/file; ls -A ~ | grep -xc .profile").wait();
    assert_eq!(text, "two\n1\n");

    what_was_picked_is_granted_again(&place);

    // A file that is opened is all there is, whatever the app has otherwise.
    let viewer = "command = [\"sh\", \"-c\", \"cat $0; ls -A /host ~/papers\"]\nwayland = false\npersist = \"mine\"\n\
                  mime = [\"text/plain\"]\nshares = [{ path = \"~/notes\" }]\n";
    fs::write(place.path("config/spectrum/apps/viewer.toml"), viewer).unwrap();
    let letter = place.path("home/letter").display().to_string();
    let opened = place.output(&["open", &letter]);
    assert_eq!(String::from_utf8_lossy(&opened.stdout), "dear\n/host:\nletter\n", "{opened:?}");
    place.spectrum(&["home", "rm", "mine"]);
    assert_eq!(place.spectrum(&["home", "list"]), "HOME  REMEMBERED  VM\n");
    assert_eq!(fs::read_dir(place.path("kept/homes")).unwrap().count(), 0);
    place.spectrum(&["template", "rm", "default"]);
}
