//! What processes cost in memory that nobody shares with them, and in page faults.

use rustix::process::Pid;

use crate::Failure;
use crate::report::Samples;

/// What the kernel holds for its users all over the machine and never gives back by itself: slabs, stacks, page tables
/// of its own for guests. Page tables of processes are counted with them.
const KERNEL: [&str; 3] = ["SUnreclaim:", "KernelStack:", "SecPageTables:"];

fn read(path: &str) -> Result<String, Failure> {
    Ok(std::fs::read_to_string(path).map_err(|e| format!("{path}: {e}"))?)
}

/// The sum of the fields of these names, in KiB.
fn sum(text: &str, names: &[&str]) -> f64 {
    let field = |line: &str| -> Option<f64> {
        let (name, value) = line.split_once(char::is_whitespace)?;
        if names.contains(&name) { value.split_whitespace().next()?.parse().ok() } else { None }
    };
    text.lines().filter_map(field).sum()
}

/// See [`KERNEL`], in KiB.
pub fn kernel_kib() -> Result<f64, Failure> {
    Ok(sum(&read("/proc/meminfo")?, &KERNEL))
}

/// Of each process, in KiB: its private memory; and the same with its page tables and its share of what the kernel holds
/// more than `before`.
pub fn unique_kib(pids: &[Pid], before: f64) -> Result<[Samples; 2], Failure> {
    let kernel = (kernel_kib()? - before) / f64::from(u32::try_from(pids.len())?);
    let mut samples: [Samples; 2] = Default::default();
    for pid in pids.iter().map(|pid| pid.as_raw_pid()) {
        let private = sum(&read(&format!("/proc/{pid}/smaps_rollup"))?, &["Private_Clean:", "Private_Dirty:"]);
        let tables = sum(&read(&format!("/proc/{pid}/status"))?, &["VmPTE:"]);
        samples.iter_mut().zip([private, private + tables + kernel]).for_each(|(samples, kib)| samples.add(kib));
    }
    Ok(samples)
}

/// Page faults of a process that needed no disk.
pub fn minor_faults(pid: Pid) -> Result<f64, Failure> {
    let text = read(&format!("/proc/{}/stat", pid.as_raw_pid()))?;
    // The name, in parentheses, may hold anything.
    let (_, fields) = text.rsplit_once(')').ok_or("no fields")?;
    Ok(fields.split_whitespace().nth(7).ok_or("too few fields")?.parse()?)
}
