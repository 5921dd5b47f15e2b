//! foot in a VM of its own: from `spectrum run` to its first surface on the host, as a clone and with a boot; and what
//! each of many takes.

use std::time::{Duration, Instant};

use rustix::process::Pid;
use serde_json::Value;
use tests::desktop::{Application, Desktop};
use tests::place::Place;

use super::tap::{Commit, Tap};
use crate::report::{self, Report, Samples};
use crate::{Failure, memory};

/// For how long they do nothing before that.
const REST: Duration = Duration::from_secs(60);

/// How long until the launcher has asked what an application touched while it started.
const SETTLED: Duration = Duration::from_secs(10);

/// A place, a desktop, and a socket of it that is watched.
struct Desk {
    place: Place,
    tap: Tap,
    _desktop: Desktop,
}

impl Desk {
    fn new() -> Result<Self, Failure> {
        let (place, desktop) = (Place::new(), Desktop::new());
        let tap = Tap::new(place.runtime().join("wayland-tap"), desktop.wayland())?;
        Ok(Self { place, tap, _desktop: desktop })
    }

    fn start(&self, options: &[&str]) -> Application {
        let options = [&["--template", "default"], options].concat();
        Application::start_at(Some(self.tap.socket()), &options, &self.place.settings(), &["foot", "cat"])
    }

    /// Seconds to the first commit, and to the first one with a picture.
    /// `settle` lets it run until what it touched has been written down.
    fn time(&self, options: &[&str], settle: bool) -> Result<[f64; 2], Failure> {
        self.tap.forget();
        let start = Instant::now();
        let application = self.start(options);
        let times = [Commit::First, Commit::Picture].map(|commit| self.tap.wait(commit));
        if settle {
            std::thread::sleep(SETTLED);
        }
        drop(application);
        let [first, picture] = times;
        Ok([(first? - start).as_secs_f64(), (picture? - start).as_secs_f64()])
    }

    /// The processes of the VMMs and those of their launchers.
    fn processes(&self) -> Result<[Vec<Pid>; 2], Failure> {
        let rows = self.place.ps();
        let of = |key: &str| -> Result<Vec<Pid>, Failure> {
            let pid = |row: &Value| Pid::from_raw(i32::try_from(row[key].as_i64()?).ok()?);
            rows.iter().map(|row| pid(row).ok_or_else(|| format!("no {key} in {row}").into())).collect()
        };
        Ok([of("pid")?, of("launcher_pid")?])
    }
}

/// Both arms in turn.
pub fn first_commit(runs: usize) -> Result<Vec<Report>, Failure> {
    let desk = Desk::new()?;
    let mut samples: [[Samples; 2]; 2] = Default::default();
    for run in 0..=runs {
        for (arm, options) in [&[][..], &["--boot"]].into_iter().enumerate() {
            // The first makes the template warm, and tells what foot needs.
            let times = desk.time(options, run == 0)?;
            if run > 0 {
                samples.iter_mut().zip(times).for_each(|(samples, time)| samples[arm].add(time));
            }
            eprintln!("bench: run {run} of {runs}: {times:.3?} s");
        }
    }
    let arms = ["clone", "cold boot"];
    let [first, picture] = samples;
    let mut reports = report::compare("app_to_first_commit", "s", &arms, &first);
    reports.extend(report::compare("app_to_first_picture", "s", &arms, &picture));
    Ok(reports)
}

/// That many at once.
pub fn unique(count: usize) -> Result<Vec<Report>, Failure> {
    let desk = Desk::new()?;
    // Makes the template warm, and the zygote, which is not counted.
    desk.time(&[], true)?;
    let before = memory::kernel_kib()?;
    let mut applications = Vec::new();
    for number in 1..=count {
        desk.tap.forget();
        applications.push(desk.start(&[]));
        desk.tap.wait(Commit::Picture)?;
        eprintln!("bench: application {number} of {count}");
    }
    std::thread::sleep(REST);
    let [vmms, launchers] = desk.processes()?;
    if vmms.len() != count {
        return Err(format!("{} VMs run instead of {count}", vmms.len()).into());
    }
    let [private, unique] = memory::unique_kib(&vmms, before)?;
    let [launcher, _] = memory::unique_kib(&launchers, before)?;
    drop(applications);
    let mut reports = report::compare("app_private_kib", "KiB", &["foot"], &[private]);
    reports.extend(report::compare("app_unique_kib", "KiB", &["foot"], &[unique]));
    reports.extend(report::compare("app_launcher_private_kib", "KiB", &["foot"], &[launcher]));
    Ok(reports)
}
