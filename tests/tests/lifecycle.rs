//! VMs that run are found by their names, used, granted files, and ended, by others than the launcher that started them.

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;
use tests::desktop::{Application, Owner};
use tests::place::Place;

/// A place, and a folder of files.
struct Desk {
    place: Place,
    files: TempDir,
}

impl Desk {
    fn new() -> Self {
        Self { place: Place::new(), files: tempfile::tempdir().unwrap() }
    }

    /// Runs an application that says when it is there.
    fn run(&self, options: &[&str]) -> Application {
        self.place.start(None, options, &["sh", "-c", "echo up; exec sleep 1000"])
    }

    fn names(&self) -> Vec<String> {
        self.place.ps().iter().map(|vm| vm["name"].as_str().unwrap().to_owned()).collect()
    }

    /// What the VM of a running application is called.
    fn name_of(&self, application: &Application) -> String {
        let all = self.place.ps();
        let vm = all.iter().find(|vm| vm["launcher_pid"] == application.launcher()).unwrap();
        vm["name"].as_str().unwrap().to_owned()
    }

    fn file(&self, name: &str, text: &str) -> String {
        let path = self.files.path().join(name);
        fs::write(&path, text).unwrap();
        path.display().to_string()
    }

    /// What is in the runtime folder, but for zygotes.
    fn left(&self) -> Vec<PathBuf> {
        let mut all = self.place.folders("");
        let zygotes = self.place.folders("zygote-");
        all.retain(|folder| !zygotes.contains(folder));
        all
    }

    /// Lets the guest of a VM stand still, but for its kernel: nobody in it notices anything from then on. The process that had it do so.
    fn stop_guest(&self, name: &str) -> Child {
        let stopped = self.files.path().join("stopped");
        let _ = fs::remove_file(&stopped);
        let folder = self.files.path().display().to_string();
        self.place.spectrum(&["grant", name, &folder, "--write", "--as", "box"]);
        let stop_all = "kill -STOP -1; echo > /host/box/stopped";
        let stopping =
            self.place.command(&["exec", name, "--user", "root", "--", "sh", "-c", stop_all]).spawn().unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        while !stopped.exists() {
            assert!(Instant::now() < deadline, "the guest does not stop");
            std::thread::sleep(Duration::from_millis(5));
        }
        stopping
    }

    /// Kills the launcher of a VM, which then can do nothing. The VM's process.
    fn kill_launcher(&self, name: &str) -> Value {
        let all = self.place.ps();
        let vm = all.iter().find(|vm| vm["name"] == name).unwrap();
        assert!(is_running(&vm["pid"]));
        assert!(Command::new("kill").args(["-KILL", &vm["launcher_pid"].to_string()]).status().unwrap().success());
        wait_for_end(&vm["launcher_pid"]);
        vm["pid"].clone()
    }
}

fn wait_for_end(pid: &Value) {
    let deadline = Instant::now() + Duration::from_secs(120);
    while is_running(pid) {
        assert!(Instant::now() < deadline, "process {pid} does not end");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Whether a process has not ended; a zombie has.
fn is_running(pid: &Value) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
}

/// From the first of their lives to the last.
#[test]
fn vms_are_found_used_granted_files_and_ended() {
    let desk = Desk::new();
    let place = &desk.place;
    let letter = desk.file("letter.txt", "for one alone\n");
    let given = desk.file("given.txt", "from the start\n");
    let mut one = desk.run(&["--boot", "--name", "one", "--grant", &format!("{given}:rw")]);
    let mut two = desk.run(&["--boot"]);
    let mut three = desk.run(&["--boot"]);
    for vm in [&mut one, &mut two, &mut three] {
        vm.hear("up");
    }
    assert_eq!(desk.names(), ["one", "sh-1", "sh-2"]);
    for vm in place.ps() {
        assert_eq!((&vm["state"], &vm["origin"]), (&"running".into(), &"boot".into()), "{vm}");
        assert!(is_running(&vm["pid"]) && is_running(&vm["launcher_pid"]), "{vm}");
    }

    let output = place.output(&["exec", "one", "--", "sh", "-c", "hostname; echo no >&2; exit 3"]);
    assert_eq!((output.status.code(), &*output.stdout, &*output.stderr), (Some(3), &b"sh\n"[..], &b"no\n"[..]));
    let output = place.output(&["exec", "oen", "--", "true"]);
    assert_eq!(String::from_utf8_lossy(&output.stderr), "spectrum: there is no VM called \"oen\": did you mean one?\n");
    let in_vm = ["run", "--vm", "one", "sh", "-c", "echo $WAYLAND_DISPLAY; pgrep -c -x sleep"];
    assert_eq!(place.spectrum(&in_vm), "wayland-0\n1\n", "it is the same VM");

    // A file for reading, a folder for writing, nothing for others.
    assert_eq!(place.spectrum(&["grant", "one", &letter]), "/host/letter.txt\n");
    let read = ["exec", "one", "--", "cat", "/host/letter.txt"];
    assert_eq!(place.spectrum(&read), "for one alone\n");
    let write = |path: &str| place.output(&["exec", "one", "--", "sh", "-c", &format!("echo changed > {path}")]).status;
    assert!(!write("/host/letter.txt").success(), "it was granted for reading");
    assert!(!place.output(&["exec", "sh-1", "--", "cat", "/host/letter.txt"]).status.success());
    assert!(write("/host/given.txt").success());
    assert_eq!(fs::read_to_string(&given).unwrap(), "changed\n");
    let folder = desk.files.path().display().to_string();
    assert_eq!(place.spectrum(&["grant", "one", &folder, "--write", "--as", "box"]), "/host/box\n");
    assert!(write("/host/box/new").success());
    assert_eq!(fs::read_to_string(desk.files.path().join("new")).unwrap(), "changed\n");
    place.spectrum(&["revoke", "one", "letter.txt"]);
    assert!(!place.output(&read).status.success(), "it was taken back");

    // What the guest says is kept.
    let said = ["exec", "one", "--user", "root", "--", "sh", "-c", "echo hello from within > /dev/console"];
    place.spectrum(&said);
    let deadline = Instant::now() + Duration::from_secs(60);
    while !place.spectrum(&["logs", "one"]).contains("hello from within") {
        assert!(Instant::now() < deadline, "{}", place.spectrum(&["logs", "one"]));
        std::thread::sleep(Duration::from_millis(50));
    }

    place.spectrum(&["stop", "one", "--timeout", "120"]);
    assert!(one.ended().is_some(), "its launcher ends with it");
    assert_eq!(desk.names(), ["sh-1", "sh-2"]);
    // They were started at the same time: either may have been the first to take a name.
    let [second, third] = [&two, &three].map(|vm| desk.name_of(vm));
    place.spectrum(&["kill", &second]);
    assert_eq!(two.wait().0.code(), Some(125));

    // The guest notices that its launcher is gone, and powers off; the files wait for who looks next.
    wait_for_end(&desk.kill_launcher(&third));
    assert!(three.ended().is_some());
    assert_eq!(desk.left().len(), 1);
    assert_eq!(desk.names(), [""; 0]);
    assert!(desk.left().is_empty(), "{:?}", desk.left());
}

/// Clones are no children of their launchers, and yet end with them.
#[test]
fn a_clone_is_found_granted_files_and_ended_with_its_launcher() {
    let desk = Desk::new();
    let place = &desk.place;
    let letter = desk.file("letter.txt", "for a clone\n");
    let mut clone = desk.run(&["--name", "clone", "--grant", &letter]);
    clone.hear("up");
    let vms = place.ps();
    assert!(vms.len() == 1 && vms[0]["origin"] == "clone", "{vms:?}\n{}", clone.said());
    assert_eq!(place.spectrum(&["exec", "clone", "--", "cat", "/host/letter.txt"]), "for a clone\n");
    // It ends with its launcher whatever the guest does about that, before anybody looks.
    let mut stopping = desk.stop_guest("clone");
    wait_for_end(&desk.kill_launcher("clone"));
    assert_eq!(desk.left().len(), 1);
    assert_eq!(desk.names(), [""; 0]);
    assert!(desk.left().is_empty(), "{:?}", desk.left());
    assert_eq!(stopping.wait().unwrap().code(), Some(125));

    // Its siblings do not notice.
    let mut other = desk.run(&[]);
    other.hear("up");
    assert_eq!(desk.names(), ["sh-1"]);
    assert!(!place.output(&["exec", "sh-1", "--", "cat", "/host/letter.txt"]).status.success());
    place.spectrum(&["stop", "sh-1", "--timeout", "120"]);
    assert_eq!(desk.names(), [""; 0]);
    assert!(desk.left().is_empty(), "{:?}", desk.left());
    place.spectrum(&["template", "rm", "default"]);
}

/// A VM that booted is no clone: nothing ends it with its launcher but its own guest, or whoever looks.
#[test]
fn a_booted_guest_that_does_nothing_is_ended_by_who_looks_next() {
    let desk = Desk::new();
    let mut vm = desk.run(&["--boot", "--name", "vm"]);
    vm.hear("up");
    let mut stopping = desk.stop_guest("vm");
    let vmm = desk.kill_launcher("vm");
    assert!(is_running(&vmm));
    assert_eq!(desk.names(), [""; 0]);
    assert!(!is_running(&vmm), "it lives on");
    assert!(desk.left().is_empty(), "{:?}", desk.left());
    assert_eq!(stopping.wait().unwrap().code(), Some(125));
}
