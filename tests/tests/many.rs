//! Many applications at once, some of which end badly.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tests::desktop::Application;
use tests::place::Place;

const COUNT: usize = 30;
/// How long what was killed may take to be gone, where nothing tells of it.
const GONE_WITHIN: Duration = Duration::from_secs(120);

/// A place, and a file to be granted.
struct Desk {
    place: Place,
    letter: PathBuf,
}

impl Desk {
    fn new() -> Self {
        let place = Place::new();
        let letter = place.home().join("letter");
        fs::write(&letter, "dear\n").unwrap();
        Self { place, letter }
    }

    /// An application that says that it has its file.
    fn run(&self, name: &str) -> Application {
        let letter = self.letter.display().to_string();
        let command = ["sh", "-c", "cat /host/letter; exec sleep 1000000"];
        self.place.start(None, &["--name", name, "--grant", &letter], &command)
    }

    /// Waits until there are as many processes of VMMs and zygotes as that.
    fn wait_for_vmms(&self, count: usize) -> BTreeSet<u64> {
        let deadline = Instant::now() + GONE_WITHIN;
        loop {
            let vmms = self.place.processes();
            if vmms.len() == count {
                return vmms.into_keys().map(u64::from).collect();
            }
            assert!(Instant::now() < deadline, "{} processes instead of {count}:\n{}", vmms.len(), describe(&vmms));
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

fn describe(processes: &BTreeMap<u32, String>) -> String {
    let read = |pid: &u32, file: &str| fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
    let one = |(pid, line): (&u32, &String)| {
        let status = read(pid, "status");
        let parent = status.lines().find(|line| line.starts_with("PPid")).unwrap_or_default();
        format!("{pid} ({parent}, waits in {}): {line}\n", read(pid, "wchan"))
    };
    processes.iter().map(one).collect()
}

fn kill(process: u64) {
    let pid = Pid::from_raw(i32::try_from(process).unwrap()).unwrap();
    kill_process(pid, Signal::KILL).unwrap();
}

fn number(vm: &Value, key: &str) -> u64 {
    vm[key].as_u64().unwrap_or_else(|| panic!("no {key}: {vm}"))
}

fn mounts() -> String {
    fs::read_to_string("/proc/self/mountinfo").unwrap()
}

/// Half of them are killed: launchers while they start, VMMs, launchers of applications that run, of which some are started again under
/// the same names. What is told is true, and nothing is left.
#[test]
fn of_thirty_applications_half_are_killed_and_nothing_is_left() {
    let desk = Desk::new();
    let place = &desk.place;
    let mut first = desk.run("first");
    first.hear("dear");
    drop(first);
    let mounts_before = mounts();
    // A zygote, and a clone that waits for the next.
    let idle = desk.wait_for_vmms(2);

    let name = |n: usize| format!("app-{n}");
    let mut applications: Vec<_> = (0..COUNT).map(|n| (n, desk.run(&name(n)))).collect();
    for (_, application) in applications.extract_if(.., |(n, _)| *n % 6 == 0) {
        kill(u64::from(application.launcher()));
    }
    for (_, application) in &mut applications {
        application.hear("dear");
    }
    let row = |rows: &[Value], n: usize| rows.iter().find(|row| row["name"] == *name(n)).unwrap().clone();
    let rows = place.ps();
    for (n, application) in applications.extract_if(.., |(n, _)| *n % 6 == 1) {
        kill(number(&row(&rows, n), "pid"));
        let (status, _) = application.wait();
        assert_eq!(status.code(), Some(125), "the launcher of {n} says that its VM is gone");
    }
    let killed: Vec<_> = applications.extract_if(.., |(n, _)| *n % 6 == 2).collect();
    for (n, application) in &killed {
        let row = row(&rows, *n);
        assert_eq!(number(&row, "launcher_pid"), u64::from(application.launcher()));
        kill(u64::from(application.launcher()));
    }
    // They are VMs of nobody: nobody has to ask for them to end.
    desk.wait_for_vmms(COUNT / 2 + 2);
    drop(killed);
    for n in (2..COUNT).step_by(6) {
        let mut again = desk.run(&name(n));
        again.hear("dear");
        applications.push((n, again));
    }

    let rows = place.ps();
    let told: BTreeSet<_> =
        rows.iter().map(|row| (row["name"].as_str().unwrap().to_owned(), number(row, "launcher_pid"))).collect();
    let running: BTreeSet<_> = applications.iter().map(|(n, one)| (name(*n), u64::from(one.launcher()))).collect();
    assert_eq!(told, running);
    let granted = |row: &Value| row["grants"].as_array().unwrap().len();
    assert!(rows.iter().all(|row| row["state"] == "running" && granted(row) == 1), "{rows:?}");
    let vmms = desk.wait_for_vmms(running.len() + 2);
    let told: BTreeSet<_> = rows.iter().map(|row| number(row, "pid")).collect();
    assert!(told.is_subset(&vmms) && idle.intersection(&vmms).count() >= 1, "{told:?} {vmms:?}");
    assert_eq!(place.folders("vm-").len(), running.len());

    for (n, application) in applications {
        place.spectrum(&[if n % 2 == 0 { "stop" } else { "kill" }, &name(n)]);
        let _ = application.wait();
    }
    assert_eq!(place.ps(), [0; 0], "no VM is left");
    assert!(place.folders("vm-").is_empty(), "{:?}", place.folders("vm-"));
    desk.wait_for_vmms(2);
    place.spectrum(&["template", "rm", "default"]);
    desk.wait_for_vmms(0);
    let left: Vec<_> = fs::read_dir(place.runtime().join("spectrum")).unwrap().flatten().collect();
    assert!(left.is_empty(), "{left:?}");
    assert_eq!(mounts(), mounts_before);
}
