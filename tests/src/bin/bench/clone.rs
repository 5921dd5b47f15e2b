//! Clones of a guest of a few bytes, from the request to the zygote to the guest's first port write.

use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use tests::{programs, tiny};
use vmm_api::{Client, CloneInfo, Request};
use vmm_config::{CloneConfig, SnapshotConfig};

use crate::floor::Floor;
use crate::report::{self, Report, Samples};
use crate::{Failure, MEMORY_MIB};

/// What is compared, ours first.
const ARMS: [&str; 4] = ["zygote", "floor", "pool", "exec"];

/// A child that is killed when it goes.
pub struct Process(pub Child);

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub fn vmm() -> Command {
    let mut command = Command::new(programs::program("spectrum-vmm"));
    command.stdin(Stdio::null()).stderr(Stdio::inherit());
    command
}

/// A connection, as soon as somebody listens.
pub fn connect(socket: &Path, process: &mut Process) -> Result<Client, Failure> {
    loop {
        match Client::connect(socket) {
            Ok(client) => return Ok(client),
            Err(e) if process.0.try_wait()?.is_some() => return Err(e.into()),
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}

/// Boots the guest that `kernel` writes with every default device and a vsock device, and saves it when it has printed
/// `mark`; the snapshot's URL.
pub fn snapshot_of(directory: &Path, write_kernel: fn(&Path), mark: u8) -> Result<String, Failure> {
    let (kernel, socket) = (directory.join("kernel"), directory.join("api"));
    write_kernel(&kernel);
    let mut command = vmm();
    command.arg("--kernel").arg(&kernel).arg("--api-socket").arg(&socket).arg("--vsock");
    command.arg(format!("cid=3,socket={}", directory.join("vsock").display()));
    command.args(["--memory", &format!("size={MEMORY_MIB}M"), "--serial", "tty", "--console", "null"]);
    command.args(["--landlock", "--landlock-rules", &format!("path={},access=rw", directory.display())]);
    let mut process = Process(command.stdout(Stdio::piped()).spawn()?);
    wait_for(&mut process.0.stdout.take().ok_or("a pipe")?, mark)?;
    let mut client = connect(&socket, &mut process)?;
    client.send(&Request::VmPause)?;
    let url = format!("file://{}", directory.join("snapshot").display());
    client.send(&Request::VmSnapshot(SnapshotConfig { destination_url: url.clone() }))?;
    Ok(url)
}

/// The same with a guest that counts.
pub fn snapshot(directory: &Path) -> Result<String, Failure> {
    snapshot_of(directory, tiny::write_counter, b't')
}

/// Reads until `mark` comes.
pub fn wait_for(output: &mut impl Read, mark: u8) -> Result<(), Failure> {
    let mut byte = [0];
    while byte != [mark] {
        output.read_exact(&mut byte)?;
    }
    Ok(())
}

/// A zygote of the snapshot at `url`, and a connection to it.
pub fn zygote(url: &str, directory: &Path) -> Result<(Process, Client), Failure> {
    zygote_with_pool(url, &directory.join("zygote"), 0)
}

/// The same, which listens at `socket` and keeps `pool` clones waiting.
fn zygote_with_pool(url: &str, socket: &Path, pool: u8) -> Result<(Process, Client), Failure> {
    let mut command = vmm();
    command.args(["--zygote", &format!("source_url={url},socket={},pool={pool}", socket.display())]);
    let mut process = Process(command.spawn()?);
    let client = connect(socket, &mut process)?;
    Ok((process, client))
}

pub fn first_byte(output: &mut impl Read) -> Result<(), Failure> {
    let mut byte = [0];
    Ok(output.read_exact(&mut byte)?)
}

/// From the request to the first byte, in milliseconds. The clone is gone when this returns.
fn through_zygote(client: &mut Client, directory: &Path) -> Result<f64, Failure> {
    let (mut read, write) = std::io::pipe()?;
    let path = directory.join("clone-vsock");
    let listener = UnixListener::bind(&path)?;
    let fds = vec!["serial".into(), "_vsock0".into()];
    let config = CloneConfig { fds, vsock_socket: Some(path.clone()), ..CloneConfig::default() };
    let start = Instant::now();
    let clone = client.clone_vm(config, &[write.as_fd(), listener.as_fd()])?;
    drop(write);
    first_byte(&mut read)?;
    let time = start.elapsed();
    end(process_id(clone)?)?;
    std::fs::remove_file(path)?;
    Ok(time.as_secs_f64() * 1e3)
}

/// Waits until the one clone of a pool of one waits.
fn fill(zygote: &Process) -> Result<(), Failure> {
    let pid = zygote.0.id();
    let children = format!("/proc/{pid}/task/{pid}/children");
    let waits = || -> Result<bool, Failure> {
        let text = std::fs::read_to_string(&children)?;
        let [child] = text.split_whitespace().collect::<Vec<_>>()[..] else { return Ok(false) };
        // It sleeps when it has nothing more to do.
        Ok(std::fs::read_to_string(format!("/proc/{child}/stat"))?.contains(") S "))
    };
    while !waits()? {
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// The process of a clone.
pub fn process_id(clone: CloneInfo) -> Result<Pid, Failure> {
    Ok(Pid::from_raw(i32::try_from(clone.pid)?).ok_or("a process id")?)
}

/// Kills a clone and waits until it is gone.
pub fn end(pid: Pid) -> Result<(), Failure> {
    let process = pidfd_open(pid, PidfdFlags::empty())?;
    kill_process(pid, Signal::KILL)?;
    let mut gone = [rustix::event::PollFd::new(&process, rustix::event::PollFlags::IN)];
    rustix::event::poll(&mut gone, None)?;
    Ok(())
}

/// The same with a program that is started for it.
fn through_exec(url: &str) -> Result<f64, Failure> {
    let mut command = vmm();
    command.args(["--restore", &format!("source_url={url},resume=true")]).stdout(Stdio::piped());
    let start = Instant::now();
    let mut process = Process(command.spawn()?);
    first_byte(&mut process.0.stdout.take().ok_or("a pipe")?)?;
    Ok(start.elapsed().as_secs_f64() * 1e3)
}

/// All arms in turn.
pub fn first_instruction(runs: usize) -> Result<Vec<Report>, Failure> {
    // Before anything else: it forks this process.
    let mut floor = Floor::start()?;
    let directory = tempfile::tempdir()?;
    let url = snapshot(directory.path())?;
    let (_zygote, mut client) = zygote(&url, directory.path())?;
    let (pool, mut pool_client) = zygote_with_pool(&url, &directory.path().join("pool"), 1)?;
    let mut samples: [Samples; ARMS.len()] = Default::default();
    for run in 0..=runs {
        let ours = through_zygote(&mut client, directory.path())?;
        let start = Instant::now();
        floor.clone_once()?;
        let least = start.elapsed().as_secs_f64() * 1e3;
        fill(&pool)?;
        let waited = through_zygote(&mut pool_client, directory.path())?;
        // The next is made now and not while something else is measured.
        fill(&pool)?;
        let exec = through_exec(&url)?;
        // The first is there to warm up.
        if run > 0 {
            samples.iter_mut().zip([ours, least, waited, exec]).for_each(|(samples, time)| samples.add(time));
        }
    }
    Ok(report::compare("clone_to_first_instruction", "ms", &ARMS, &samples))
}
