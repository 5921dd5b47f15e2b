//! Many clones of a guest of a few bytes that live at the same time.

use std::io::{BufRead, BufReader, PipeReader};
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tests::tiny;
use vmm_api::{Client, VmState};
use vmm_config::CloneConfig;

use crate::clone::{Process, connect, end, first_byte, snapshot, vmm};
use crate::report::{self, Report, Samples};
use crate::{Failure, memory};

/// How long they live before their memory is looked at. Their guests count all the time, as fast as they can: what nobody
/// reads is thrown away. So the later clones are made on busy processors.
const REST: Duration = Duration::from_secs(60);

struct Live {
    pid: Pid,
    api: PathBuf,
    output: BufReader<PipeReader>,
}

impl Live {
    fn new(client: &mut Client, directory: &Path, name: usize) -> Result<Self, Failure> {
        let (read, write) = std::io::pipe()?;
        // What it prints when nobody reads is soon old, and thrown away when this is full.
        rustix::pipe::fcntl_setpipe_size(&write, 4096)?;
        let path = |what: &str| directory.join(format!("{what}-{name}"));
        let (api, vsock) = (UnixListener::bind(path("api"))?, UnixListener::bind(path("vsock"))?);
        let fds = ["serial", "api", "_vsock0"].map(String::from).into();
        let config = CloneConfig { fds, vsock_socket: Some(path("vsock")), ..CloneConfig::default() };
        let clone = client.clone_vm(config, &[write.as_fd(), api.as_fd(), vsock.as_fd()])?;
        let pid = Pid::from_raw(i32::try_from(clone.pid)?).ok_or("a process id")?;
        Ok(Self { pid, api: path("api"), output: BufReader::new(read) })
    }

    fn line(&mut self) -> Result<String, Failure> {
        let mut line = String::new();
        if self.output.read_line(&mut line)? == 0 {
            return Err("the guest ended".into());
        }
        Ok(line)
    }

    /// Its API says that it runs, and its guest counts on: two numbers that follow each other, and are far from the oldest
    /// that is there, so that they were printed just now. Lines between them may be torn.
    fn answers(&mut self) -> Result<bool, Failure> {
        let running = Client::connect(&self.api)?.info()?.state == VmState::Running;
        let (mut oldest, mut last) = (None, None);
        loop {
            let next = tiny::tick(&self.line()?);
            let Some(tick) = next else { continue };
            let from = *oldest.get_or_insert(tick);
            if tick.saturating_sub(from) > 2000 && last.and_then(|last: u32| last.checked_add(1)) == next {
                return Ok(running);
            }
            last = next;
        }
    }
}

/// System calls of a clone until its guest's first byte went out, counted by strace where it is installed.
fn system_calls(client: &mut Client, zygote: u32, directory: &Path) -> Result<Option<Samples>, Failure> {
    let log = directory.join("strace");
    let mut strace = Command::new("strace");
    strace.args(["-f", "-o"]).arg(&log).args(["-p", &zygote.to_string()]).stderr(Stdio::piped());
    let Ok(mut strace) = strace.spawn().map(Process) else { return Ok(None) };
    let mut attached = String::new();
    // Open until the end: strace dies of a pipe that nobody reads.
    let mut says = BufReader::new(strace.0.stderr.take().ok_or("a pipe")?);
    says.read_line(&mut attached)?;
    let clone = Live::new(client, directory, usize::MAX);
    let clone = clone.and_then(|mut clone| first_byte(&mut clone.output).map(|()| clone))?;
    end(clone.pid)?;
    kill_process(Pid::from_child(&strace.0), Signal::TERM)?;
    strace.0.wait()?;
    let (text, zygote) = (std::fs::read_to_string(log)?, zygote.to_string());
    // A line each, and another one when a call ends that others came in between of.
    let calls = text.lines().filter(|l| l.split_whitespace().next() != Some(&zygote) && !l.contains(" resumed>"));
    let count = calls.take_while(|line| !(line.contains(" write(") && line.contains("\", 1"))).count();
    let mut samples = Samples::default();
    samples.add(f64::from(u32::try_from(count)?));
    Ok(Some(samples))
}

/// That many.
pub fn clones(count: usize) -> Result<Vec<Report>, Failure> {
    let directory = tempfile::tempdir()?;
    let url = snapshot(directory.path())?;
    let socket = directory.path().join("zygote");
    let mut zygote = vmm();
    zygote.args(["--zygote", &format!("source_url={url},socket={}", socket.display())]);
    let mut zygote = Process(zygote.spawn()?);
    let mut client = connect(&socket, &mut zygote)?;
    let calls = system_calls(&mut client, zygote.0.id(), directory.path())?;
    let before = memory::kernel_kib()?;
    let (mut times, mut faults, mut alive) = (Samples::default(), Samples::default(), Samples::default());
    let mut clones = Vec::new();
    for name in 0..count {
        let start = Instant::now();
        let mut clone = Live::new(&mut client, directory.path(), name)?;
        first_byte(&mut clone.output)?;
        times.add(start.elapsed().as_secs_f64() * 1e3);
        faults.add(memory::minor_faults(clone.pid)?);
        clones.push(clone);
    }
    std::thread::sleep(REST);
    let pids: Vec<_> = clones.iter().map(|clone| clone.pid).collect();
    let [private, unique] = memory::unique_kib(&pids, before)?;
    let mut answers = 0;
    for clone in &mut clones {
        answers += u32::from(clone.answers().inspect_err(|e| eprintln!("bench: {e}")).unwrap_or(false));
    }
    alive.add(f64::from(answers));
    pids.into_iter().try_for_each(end)?;
    let mut reports = report::compare("live_clones", "clones", &["tiny guest"], &[alive]);
    reports.extend(report::compare("clone_in_a_row", "ms", &["tiny guest"], &[times]));
    reports.extend(report::compare("clone_minor_faults", "faults", &["tiny guest"], &[faults]));
    reports.extend(report::compare("clone_private_kib", "KiB", &["tiny guest"], &[private]));
    reports.extend(report::compare("clone_unique_kib", "KiB", &["tiny guest"], &[unique]));
    match calls {
        Some(calls) => reports.extend(report::compare("clone_syscalls", "calls", &["tiny guest"], &[calls])),
        None => eprintln!("bench: strace is not installed: clone_syscalls was not measured"),
    }
    Ok(reports)
}
