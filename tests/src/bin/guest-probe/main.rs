//! The first process of a guest under test: does the jobs on the kernel command line (behind `--`), one after another,
//! prints one line for each, and powers off.
//!
//! A line is `probe: JOB: RESULT`; a job that failed has the result `FAILED: REASON`.

mod board;
mod files;
mod graphics;
mod hostile;
mod jobs;
mod region;
mod vsock;

use std::fs::File;
use std::path::Path;

use rustix::mount::{MountFlags, mount};
use rustix::system::{RebootCommand, finit_module, reboot};

/// Prints a line and waits until the console has taken it.
fn say(line: &str) {
    println!("probe: {line}");
    // A console that is no terminal has nothing to drain.
    let _ = rustix::termios::tcdrain(std::io::stdout());
}

/// What a job came to: what it found, or why it did not work.
type Outcome = Result<String, String>;

fn main() {
    if !rustix::process::getpid().is_init() {
        eprintln!("guest-probe: this is the first process of a virtual machine under test");
        std::process::exit(2);
    }
    for (kind, place) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        if let Err(e) = mount(kind, place, kind, MountFlags::empty(), None) {
            say(&format!("{place}: FAILED: {e}"));
        }
    }
    load_modules();
    say("started");
    for job in std::env::args().skip(1) {
        match jobs::run(&job) {
            Ok(result) => say(&format!("{job}: {result}")),
            Err(reason) => say(&format!("{job}: FAILED: {reason}")),
        }
    }
    say("done");
    end(RebootCommand::PowerOff);
}

/// Ends the machine.
fn end(how: RebootCommand) -> ! {
    rustix::fs::sync();
    if let Err(e) = reboot(how) {
        say(&format!("end: FAILED: {e}"));
    }
    loop {
        std::thread::park();
    }
}

fn load_modules() {
    let Ok(entries) = Path::new("/modules").read_dir() else { return };
    let mut files: Vec<_> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    files.sort();
    for file in files {
        let loaded = File::open(&file).and_then(|f| Ok(finit_module(f, c"", 0)?));
        // One for hardware that is not there (crc32c-intel) is no failure.
        if let Err(e) = loaded
            && e.raw_os_error() != Some(rustix::io::Errno::NODEV.raw_os_error())
        {
            say(&format!("{}: FAILED: {e}", file.display()));
        }
    }
}
