//! System-call filters by kind of thread, compiled once and installed by each thread before it does anything else.
//!
//! A forbidden call either ends the process, after a line that says which call it was (see [`super::trap`]), or is
//! written to the kernel's log and allowed, to find out what a list lacks.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use seccompiler::{BpfProgram, apply_filter};
use virtio_devices::registry::{KINDS, Kind};

use super::program::{Action, Verdict, assemble, for_this_process};
use super::table::{CLONE, CLONE3, CONTROL, DEVICE, EVERY, ONDEMAND, REFUSED, Rule, VCPU};
use super::trap;
use crate::build::Confinement;
use crate::vcpu::ThreadSetup;

/// Why there is no filter.
#[derive(Debug, thiserror::Error)]
pub enum SeccompError {
    /// The tables make no filter: a defect.
    #[error("cannot make a system-call filter: {0} is no system call")]
    Number(i64),
    /// The kernel refuses.
    #[error("cannot confine the VMM: {0}; the kernel needs seccomp filters (--seccomp false does without)")]
    Install(#[from] seccompiler::Error),
    /// The handler that says which call was forbidden.
    #[error("cannot handle forbidden system calls: {0}")]
    Handler(io::Error),
}

/// What becomes of a forbidden call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// It ends the process.
    Enforce,
    /// The kernel logs and allows it.
    Log,
}

/// The filters of a VMM.
pub struct Filters {
    mode: Mode,
    control: BpfProgram,
    vcpu: BpfProgram,
    /// By the name of the kind.
    devices: Mutex<BTreeMap<&'static str, Arc<BpfProgram>>>,
}

impl Filters {
    /// Compiles the filters of the control thread and of vCPUs; a device kind's is compiled when it is first asked for.
    ///
    /// # Errors
    /// If a table names what is no system call.
    pub fn new(mode: Mode) -> Result<Self, SeccompError> {
        let kinds = KINDS.iter().flat_map(|kind| listed(kind));
        let control = [EVERY, VCPU, DEVICE, ONDEMAND, CONTROL].into_iter().flatten().copied().chain(kinds);
        let vcpu = [EVERY, VCPU].into_iter().flatten().copied();
        Ok(Self {
            mode,
            control: compile(mode, control)?,
            vcpu: compile(mode, vcpu)?,
            devices: Mutex::new(BTreeMap::new()),
        })
    }

    /// Confines the calling thread, which is the one that runs the VMM, and all threads it makes from now on. To be
    /// called when the process has opened what is not the machine's: /dev/kvm, the log, the API's socket.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn confine_control(&self) -> Result<(), SeccompError> {
        if self.mode == Mode::Enforce {
            trap::install().map_err(SeccompError::Handler)?;
        }
        Ok(apply_filter(&for_this_process(&self.control))?)
    }

    /// Compiles the filters of these kinds of device now, for the processes that this one will fork.
    ///
    /// # Errors
    /// If a table names what is no system call.
    pub fn prepare(&self, mut kinds: impl Iterator<Item = &'static Kind>) -> Result<(), SeccompError> {
        kinds.try_for_each(|kind| self.device_program(kind).map(drop))
    }

    fn device_program(&self, kind: &Kind) -> Result<Arc<BpfProgram>, SeccompError> {
        let mut devices = self.devices.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(program) = devices.get(kind.name) {
            return Ok(program.clone());
        }
        let rules = [EVERY, DEVICE].into_iter().flatten().copied().chain(listed(kind));
        let program = Arc::new(compile(self.mode, rules)?);
        devices.insert(kind.name, program.clone());
        Ok(program)
    }
}

impl Confinement for Filters {
    fn vcpu(&self) -> ThreadSetup {
        let program = for_this_process(&self.vcpu);
        Arc::new(move || apply_filter(&program).map_err(io::Error::other))
    }

    fn device(&self, kind: &Kind) -> ThreadSetup {
        match self.device_program(kind) {
            // Most clones start few of their devices, so none is prepared for its thread before there is one.
            Ok(program) => Arc::new(move || apply_filter(&for_this_process(&program)).map_err(io::Error::other)),
            Err(e) => Arc::new(move || Err(io::Error::other(e.to_string()))),
        }
    }

    /// Compiled when it is asked for: a VMM has at most one such thread at a time, most have none.
    fn ondemand(&self) -> ThreadSetup {
        match compile(self.mode, [EVERY, ONDEMAND].into_iter().flatten().copied()) {
            Ok(program) => {
                let program = for_this_process(&program);
                Arc::new(move || apply_filter(&program).map_err(io::Error::other))
            }
            Err(e) => Arc::new(move || Err(io::Error::other(e.to_string()))),
        }
    }
}

/// What a kind lists. Making threads means threads only, whatever the call could do besides.
fn listed(kind: &Kind) -> impl Iterator<Item = Rule> {
    kind.syscalls.iter().map(|call| match call.number {
        CLONE3 => CLONE,
        number if number == CLONE.number => CLONE,
        number => Rule { number, tests: &[], why: call.why },
    })
}

fn compile(mode: Mode, rules: impl Iterator<Item = Rule>) -> Result<BpfProgram, SeccompError> {
    let mut verdicts = verdicts(rules)?;
    let (otherwise, clone3) = match mode {
        Mode::Log => (Action::LOG, Action::ALLOW),
        Mode::Enforce => (Action::TRAP, Action::REFUSE),
    };
    if mode == Mode::Enforce {
        for number in REFUSED {
            verdicts.entry(as_number(*number)?).or_insert(Verdict::Always(Action::REFUSE));
        }
    }
    verdicts.insert(as_number(CLONE3)?, Verdict::Always(clone3));
    Ok(assemble(&verdicts, otherwise))
}

/// The rows of a table, brought together by number; no conditions at all if one row has none.
fn verdicts(rules: impl Iterator<Item = Rule>) -> Result<BTreeMap<u32, Verdict>, SeccompError> {
    let mut all = BTreeMap::new();
    for rule in rules {
        let verdict = all.entry(as_number(rule.number)?).or_insert_with(|| Verdict::AllowIf(Vec::new()));
        match verdict {
            Verdict::AllowIf(alternatives) if !rule.tests.is_empty() => alternatives.push(rule.tests),
            _ => *verdict = Verdict::Always(Action::ALLOW),
        }
    }
    Ok(all)
}

fn as_number(number: i64) -> Result<u32, SeccompError> {
    u32::try_from(number).map_err(|_| SeccompError::Number(number))
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::{self, Command, Output};

    use vmm_config::{ConsoleConfig, ConsoleMode, VmConfig};

    use super::super::{Files, LandlockError};
    use super::*;
    use crate::stream::Stream;

    /// A machine that asks for Landlock.
    fn confined() -> VmConfig {
        VmConfig { landlock_enable: true, ..VmConfig::default() }
    }

    const SCENARIO: &str = "SPECTRUM_TEST_SECCOMP";

    /// Runs a scenario of `child` in a process of its own.
    fn in_child(scenario: &str) -> Output {
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "--nocapture", "sandbox::seccomp::tests::child"])
            .env(SCENARIO, scenario)
            .env("RUST_BACKTRACE", "1")
            .output()
            .unwrap()
    }

    fn on_thread(name: &str, setup: ThreadSetup, act: impl FnOnce() + Send + 'static) {
        let run = move || {
            setup().unwrap();
            act();
        };
        // A panic was printed when this returns; it must be all that happens.
        let _ = std::thread::Builder::new().name(name.into()).spawn(run).unwrap().join();
    }

    fn ioctl(command: u32) -> i32 {
        #[expect(unsafe_code, reason = "a call with a descriptor that is not open")]
        // SAFETY: there is no such descriptor, and so nothing for the kernel to do.
        unsafe {
            libc::ioctl(-1, u64::from(command), 0)
        }
    }

    /// Not a test by itself: what the process of `in_child` does.
    #[test]
    fn child() {
        let Ok(scenario) = std::env::var(SCENARIO) else { return };
        let filters = Filters::new(if scenario == "log" { Mode::Log } else { Mode::Enforce }).unwrap();
        filters.confine_control().unwrap();
        let socket = || drop(std::os::unix::net::UnixDatagram::unbound());
        match scenario.as_str() {
            "control" | "log" => on_thread("free", Arc::new(|| Ok(())), socket),
            "streams" => {
                let dir = std::env::temp_dir().join(format!("spectrum-streams-{}", process::id()));
                let file = ConsoleConfig { file: Some(dir.clone()), ..ConsoleConfig::of(ConsoleMode::File) };
                for config in [ConsoleConfig::of(ConsoleMode::Pty), ConsoleConfig::of(ConsoleMode::Tty), file] {
                    drop(Stream::open(&config).unwrap().unwrap().ends().unwrap());
                }
                std::fs::remove_file(dir).unwrap();
            }
            "landlock" => match Files::default().confine(&confined(), &[]) {
                Ok(()) | Err(LandlockError::Missing(_)) => {}
                Err(e) => panic!("{e}"),
            },
            "vcpu-socket" => on_thread("vcpu0", filters.vcpu(), socket),
            "vcpu-file" => on_thread("vcpu0", filters.vcpu(), || {
                assert_eq!(std::fs::File::open("/dev/null").unwrap_err().raw_os_error(), Some(libc::ENOSYS));
            }),
            "vcpu-ioctl" => on_thread("vcpu0", filters.vcpu(), || assert_eq!(ioctl(0xae80), -1)),
            "vcpu-other-ioctl" => on_thread("vcpu0", filters.vcpu(), || {
                let _ = ioctl(0x5412);
            }),
            "vcpu-panic" => on_thread("vcpu0", filters.vcpu(), || panic!("as planned")),
            "device-socket" => on_thread("_rng", filters.device(&virtio_devices::rng::KIND), socket),
            "device-ioctl" => on_thread("_rng", filters.device(&virtio_devices::rng::KIND), || {
                let _ = ioctl(0xae80);
            }),
            "ondemand-copy" => on_thread("ondemand", filters.ondemand(), || assert_eq!(ioctl(0xc028_aa03), -1)),
            "ondemand-register" => on_thread("ondemand", filters.ondemand(), || {
                let _ = ioctl(0xc020_aa00);
            }),
            "ondemand-socket" => on_thread("ondemand", filters.ondemand(), socket),
            "fork" => drop(Command::new("/bin/true").status()),
            other => panic!("no scenario {other}"),
        }
        println!("survived");
    }

    #[track_caller]
    fn survives(scenario: &str) -> String {
        let output = in_child(scenario);
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success() && out.contains("survived"), "{scenario}: {}\n{out}{err}", output.status);
        err.into_owned()
    }

    #[track_caller]
    fn ends(scenario: &str, number: i64, thread: &str) {
        let output = in_child(scenario);
        let err = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(159), "{scenario}: {:?}\n{err}", output.status.signal());
        assert!(err.contains(&format!("system call {number} is not allowed on thread {thread}.")), "{err}");
    }

    #[test]
    fn what_is_needed_is_allowed() {
        survives("control");
        survives("vcpu-ioctl");
        survives("ondemand-copy");
        survives("streams");
        survives("landlock");
    }

    #[test]
    fn a_forbidden_call_ends_the_process_and_is_named() {
        ends("vcpu-socket", libc::SYS_socket, "vcpu0");
        ends("vcpu-other-ioctl", libc::SYS_ioctl, "vcpu0");
        ends("device-socket", libc::SYS_socket, "_rng");
        ends("device-ioctl", libc::SYS_ioctl, "_rng");
        ends("ondemand-register", libc::SYS_ioctl, "ondemand");
        ends("ondemand-socket", libc::SYS_socket, "ondemand");
    }

    #[test]
    fn no_process_can_be_made() {
        // The C library blocks signals meanwhile, so that the kernel itself ends the process.
        let status = in_child("fork").status;
        assert_eq!(status.signal(), Some(libc::SIGSYS), "{status}");
    }

    #[test]
    fn files_are_refused_without_killing() {
        survives("vcpu-file");
        let said = survives("vcpu-panic");
        assert!(said.contains("as planned") && said.contains("stack backtrace"), "{said}");
    }

    #[test]
    fn the_log_mode_allows_all() {
        survives("log");
    }

    #[test]
    fn every_kind_has_a_list_that_adds_to_the_base() {
        let base: Vec<i64> =
            [EVERY, DEVICE].into_iter().flatten().filter(|r| r.tests.is_empty()).map(|r| r.number).collect();
        for kind in KINDS {
            Filters::new(Mode::Enforce).unwrap().device_program(kind).unwrap();
            for call in kind.syscalls {
                let (name, number) = (kind.name, call.number);
                assert!((0..1 << 16).contains(&number) && !call.why.is_empty(), "{name}: {call:?}");
                assert!(!base.contains(&number), "{name} lists call {number}, which every device's thread may make");
            }
        }
    }

    #[test]
    fn every_row_says_why_and_is_needed() {
        for list in [VCPU, DEVICE, ONDEMAND, CONTROL] {
            for rule in list {
                let everywhere = EVERY.iter().any(|r| r.number == rule.number && r.tests.is_empty());
                assert!(!everywhere, "call {} is allowed on every thread: {}", rule.number, rule.why);
            }
        }
        assert!([EVERY, VCPU, DEVICE, ONDEMAND, CONTROL].into_iter().flatten().all(|rule| !rule.why.is_empty()));
    }
}
