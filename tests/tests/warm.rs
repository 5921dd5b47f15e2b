//! Applications in clones of a warm template, as `spectrum run` starts them.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;
use tests::desktop::{Application, Desktop, Owner};
use tests::{agent, programs};

/// A home with the template in it, and a runtime folder, of the test's own.
struct Place {
    home: TempDir,
    runtime: TempDir,
}

impl Place {
    fn new() -> Self {
        let home = tempfile::tempdir().unwrap();
        fs::create_dir(home.path().join("templates")).unwrap();
        symlink(agent::template(), home.path().join("templates/default")).unwrap();
        Self { home, runtime: tempfile::Builder::new().prefix("rt").tempdir().unwrap() }
    }

    fn settings(&self) -> [(&str, &Path); 2] {
        [("SPECTRUM_HOME", self.home.path()), ("XDG_RUNTIME_DIR", self.runtime.path())]
    }

    fn run(&self, desktop: Option<&Desktop>, command: &[&str]) -> Application {
        Application::start_with(desktop, &["--template", "default"], &self.settings(), command)
    }

    fn spectrum(&self, arguments: &[&str]) -> String {
        let mut command = Command::new(programs::program("spectrum"));
        let output = command.args(arguments).envs(self.settings()).output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    fn zygotes(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.runtime.path().join("spectrum")).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).filter(|path| path.to_string_lossy().contains("/zygote-")).collect()
    }

    /// The list of what an app touched, as soon as there is one.
    fn wait_for_working_set(&self) -> PathBuf {
        let folders = |path: &Path| fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path());
        let find = || {
            let all = folders(&self.home.path().join("warm"))
                .flat_map(|warm| folders(&warm.join("apps")).collect::<Vec<_>>());
            all.map(|app| app.join("working-set.json")).find(|list| list.exists())
        };
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            if let Some(list) = find() {
                return list;
            }
            assert!(Instant::now() < deadline, "no list of what the app touched is written");
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    fn zygote_says(&self, text: &str) -> bool {
        self.zygotes().iter().any(|zygote| fs::read_to_string(zygote.join("lock")).is_ok_and(|log| log.contains(text)))
    }

    /// Processes that have a path of this place on their command line.
    fn processes(&self) -> Vec<String> {
        let lines = fs::read_dir("/proc").unwrap().flatten().filter_map(|entry| {
            let line = fs::read(entry.path().join("cmdline")).ok()?;
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            line.contains(&*self.runtime.path().to_string_lossy()).then_some(line)
        });
        lines.collect()
    }
}

fn named(name: &'static str) -> impl Fn(&Value) -> bool {
    move |window| window["name"] == name
}

/// The first application warms the template, the others are there at once; each is in a VM of its own, and nothing but the
/// zygote is left, which goes with the template.
#[test]
fn applications_are_clones_of_a_template_that_warms_itself() {
    let place = Place::new();
    let mut desktop = Desktop::new();
    let start = Instant::now();
    let foot = |title: &str| ["foot", "-T", title, "-o", "locked-title=yes", "cat"].map(String::from);
    let words = |words: &[String; 6]| words.clone().map(|word| Box::leak(word.into_boxed_str()) as &str);
    let mut first = place.run(Some(&desktop), &words(&foot("first")));
    desktop.wait_for_window(&mut first, named("first"));
    let warmed = start.elapsed();
    assert!(first.said().contains("this template is not warm yet"), "{}", first.said());
    assert!(!first.said().contains("booting, since"), "{}", first.said());
    assert_eq!(place.zygotes().len(), 1);

    let start = Instant::now();
    let mut second = place.run(Some(&desktop), &words(&foot("second")));
    desktop.wait_for_window(&mut second, named("second"));
    println!("to the first window: {warmed:?}, warm: {:?}", start.elapsed());
    assert!(!second.said().contains("not warm yet") && !second.said().contains("booting"), "{}", second.said());

    // What the app touched while it started the next one has beforehand. It is a hint: a damaged list is no harm.
    let list = place.wait_for_working_set();
    let mut third = place.run(Some(&desktop), &words(&foot("third")));
    desktop.wait_for_window(&mut third, named("third"));
    drop(third);
    assert!(!place.zygote_says("nothing beforehand"));
    fs::write(list, "{}").unwrap();
    let mut fourth = place.run(Some(&desktop), &words(&foot("fourth")));
    desktop.wait_for_window(&mut fourth, named("fourth"));
    drop(fourth);
    assert!(place.zygote_says("nothing beforehand"));

    // Each is another machine, has its streams and tells how it ended.
    let ask =
        "cat /etc/machine-id /proc/sys/kernel/random/boot_id; hostname; head -c 16 /dev/urandom | od -An -tx1; exit 7";
    let [one, two] = [(); 2].map(|()| {
        let (status, text) = place.run(Some(&desktop), &["sh", "-c", ask]).wait();
        assert_eq!(status.code(), Some(7));
        text.lines().map(str::to_owned).collect::<Vec<_>>()
    });
    assert_eq!((one.len(), two.len()), (4, 4), "{one:?} {two:?}");
    for (a, b) in one.iter().zip(&two) {
        assert_eq!(a == b, a == "sh", "{one:?} {two:?}");
    }

    // One ends; the other does not notice.
    desktop.command("[title=\"first\"] kill");
    let (status, _) = first.wait();
    assert_ne!(status.code(), Some(125), "{status}");
    desktop.wait_for_window(&mut second, named("second"));
    drop(second);

    // Where a clone is impossible it boots, and says why.
    let options = ["--template", "default", "--vmm-arg=-v"];
    let mut booted = Application::start_with(Some(&desktop), &options, &place.settings(), &["sleep", "1000"]);
    booted.hear_error("booting: a clone's VMM takes no --vmm-arg");
    drop(booted);

    assert_eq!(place.spectrum(&["template", "gc"]), "", "all of it is still good");
    place.spectrum(&["template", "rm", "default"]);
    assert!(place.zygotes().is_empty());
    let mut left = fs::read_dir(place.home.path().join("warm")).unwrap().flatten().map(|entry| entry.path());
    assert!(left.all(|path| path.extension().is_some_and(|end| end == "lock")), "snapshots are left");
    // It ends when it has answered.
    let deadline = Instant::now() + Duration::from_secs(30);
    while !place.processes().is_empty() {
        assert!(Instant::now() < deadline, "{:?}", place.processes());
        std::thread::sleep(Duration::from_millis(50));
    }
}
