//! Benchmarks of whole programs. `scripts/bench` builds what they need and calls this.
//!
//!     bench boot [--json] [--runs N]      boot to init and memory overhead, where /dev/kvm is real
//!     bench first-instruction [--json] [--runs N]     on /dev/kvm of any kind, with a guest of a few bytes
//!     bench clone [--json] [--runs N]     the same; a clone to its first instruction, beside the least it could cost
//!     bench live-clones [--json] [--runs N]     the same; N clones at once: do all live, and what does each take
//!     bench live-fork [--json] [--runs N]     the same; for how long a live snapshot stops a machine, and what other
//!                                                ways to keep its memory would cost
//!     bench agent-clones [--json] [--runs N]    clones of the template to their agent's first answer, where /dev/kvm is real
//!     bench app-grants [--json] [--runs N]      files of the host in a guest, beside virtiofsd in QEMU, where /dev/kvm is real
//!     bench app-commit [--json] [--runs N]      foot from `spectrum run` to its first commit, as a clone and with a boot
//!     bench app-unique [--json] [--runs N]      the memory of N VMs with foot
//!
//! Where a rival is on PATH it runs in turn with ours, and its figures are compared.

mod agents;
mod app;
mod arms;
mod clone;
mod floor;
mod fork;
mod live;
mod memory;
mod others;
mod report;
mod shape;
mod ways;

use std::io::Read;
use std::path::Path;
use std::process::{Child, ExitCode, Stdio};
use std::time::Instant;

use arms::Arm;
use report::{Report, Samples};

/// What the benchmark's guest prints when its init runs.
const MARK: &str = "BENCH-INIT";
/// The guest's memory, in MiB.
const MEMORY_MIB: u64 = 256;

type Failure = Box<dyn std::error::Error>;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let json = arguments.iter().any(|a| a == "--json");
    let runs = arguments.iter().position(|a| a == "--runs").and_then(|at| arguments.get(at + 1));
    let runs = runs.map(|n| n.parse::<usize>());
    let result = match (arguments.first().map(String::as_str), runs) {
        (Some("boot"), None) => boot(5),
        (Some("boot"), Some(Ok(runs))) => boot(runs),
        (Some("first-instruction"), None) => first_instruction(40),
        (Some("first-instruction"), Some(Ok(runs))) => first_instruction(runs),
        (Some("clone"), None) => clone::first_instruction(40),
        (Some("clone"), Some(Ok(runs))) => clone::first_instruction(runs),
        (Some("live-clones"), None) => live::clones(200),
        (Some("live-clones"), Some(Ok(runs))) => live::clones(runs),
        (Some("live-fork"), None) => fork::pause(40),
        (Some("live-fork"), Some(Ok(runs))) => fork::pause(runs),
        (Some("agent-clones"), None) => agents::clones(10),
        (Some("app-commit"), None) => app::apps::first_commit(10),
        (Some("app-commit"), Some(Ok(runs))) => app::apps::first_commit(runs),
        (Some("app-unique"), None) => app::apps::unique(20),
        (Some("app-unique"), Some(Ok(runs))) => app::apps::unique(runs),
        (Some("app-grants"), None) => app::grants::measure(20),
        (Some("app-grants"), Some(Ok(runs))) => app::grants::measure(runs),
        (Some("agent-clones"), Some(Ok(runs))) => agents::clones(runs),
        _ => {
            Err("usage: bench boot|first-instruction|clone|live-clones|live-fork|agent-clones [--json] [--runs N]"
                .into())
        }
    };
    match result {
        Ok(reports) => {
            reports.iter().for_each(|r| println!("{}", if json { r.json() } else { r.text() }));
            ExitCode::SUCCESS
        }
        Err(e) => {
            eprintln!("bench: {e}");
            ExitCode::FAILURE
        }
    }
}

/// A running arm, killed when it goes.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Running {
    fn start(arm: &Arm, directory: &Path) -> Result<(Self, Instant), Failure> {
        let mut command = arm.command(directory)?;
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        let start = Instant::now();
        let child = command.spawn().map_err(|e| format!("cannot start {}: {e}", arm.name))?;
        Ok((Self(child), start))
    }

    /// Reads the guest's output until it holds `mark`.
    fn wait_for(&mut self, mark: &str) -> Result<(), Failure> {
        let output = self.0.stdout.as_mut().ok_or("the guest's output was read already")?;
        let (mut seen, mut buffer) = (Vec::new(), [0; 4096]);
        while !String::from_utf8_lossy(&seen).contains(mark) {
            let n = output.read(&mut buffer)?;
            if n == 0 {
                return Err(
                    format!("the guest ended before it printed {mark}: {}", String::from_utf8_lossy(&seen)).into()
                );
            }
            seen.extend_from_slice(buffer.get(..n).unwrap_or_default());
        }
        Ok(())
    }

    fn proc(&self, file: &str) -> Result<String, Failure> {
        Ok(std::fs::read_to_string(format!("/proc/{}/{file}", self.0.id()))?)
    }

    /// Private memory in KiB of all mappings but the guest's RAM.
    fn overhead_kib(&self) -> Result<f64, Failure> {
        let (mut total, mut is_ram) = (0u64, false);
        for line in self.proc("smaps")?.lines() {
            let mut words = line.split_whitespace();
            let (Some(key), Some(value)) = (words.next(), words.next()) else { continue };
            let kib = value.parse::<u64>().unwrap_or(0);
            match key {
                "Size:" => is_ram = kib == MEMORY_MIB << 10,
                "Private_Clean:" | "Private_Dirty:" if !is_ram => total += kib,
                _ => {}
            }
        }
        Ok(u32::try_from(total).map(f64::from)?)
    }

    /// CPU time of all its threads, in milliseconds.
    fn cpu_ms(&self) -> Result<f64, Failure> {
        let mut total = std::time::Duration::ZERO;
        for thread in std::fs::read_dir(format!("/proc/{}/task", self.0.id()))? {
            let text = std::fs::read_to_string(thread?.path().join("schedstat"))?;
            let ns = text.split_whitespace().next().and_then(|n| n.parse().ok()).ok_or("no schedstat")?;
            total += std::time::Duration::from_nanos(ns);
        }
        Ok(total.as_secs_f64() * 1e3)
    }
}

fn boot(runs: usize) -> Result<Vec<Report>, Failure> {
    let directory = tempfile::tempdir()?;
    let arms = Arm::linux(directory.path())?;
    let mut boot: Vec<Samples> = arms.iter().map(|_| Samples::default()).collect();
    let mut overhead: Vec<Samples> = arms.iter().map(|_| Samples::default()).collect();
    for run in 0..runs {
        for (i, arm) in arms.iter().enumerate() {
            let (mut running, start) = Running::start(arm, directory.path())?;
            running.wait_for(MARK)?;
            boot[i].add(start.elapsed().as_secs_f64());
            overhead[i].add(running.overhead_kib()?);
            eprintln!("bench: run {} of {runs}: {}", run + 1, arm.name);
        }
    }
    let names: Vec<_> = arms.iter().map(|arm| arm.name).collect();
    let mut reports = report::compare("boot_to_init", "s", &names, &boot);
    reports.extend(report::compare("vmm_overhead_kib", "KiB", &names, &overhead));
    Ok(reports)
}

fn first_instruction(runs: usize) -> Result<Vec<Report>, Failure> {
    let directory = tempfile::tempdir()?;
    let arms = Arm::tiny(directory.path())?;
    let mut cpu: Vec<Samples> = arms.iter().map(|_| Samples::default()).collect();
    let mut wall: Vec<Samples> = arms.iter().map(|_| Samples::default()).collect();
    for _ in 0..runs {
        for (i, arm) in arms.iter().enumerate() {
            let (mut running, start) = Running::start(arm, directory.path())?;
            running.wait_for("!")?;
            wall[i].add(start.elapsed().as_secs_f64() * 1e3);
            cpu[i].add(running.cpu_ms()?);
        }
    }
    let names: Vec<_> = arms.iter().map(|arm| arm.name).collect();
    let mut reports = report::compare("exec_to_first_instruction_cpu_ms", "ms", &names, &cpu);
    reports.extend(report::compare("exec_to_first_instruction_wall_ms", "ms", &names, &wall));
    Ok(reports)
}
