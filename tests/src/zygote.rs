//! Clones: a zygote, and processes that are its children and not the test's.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use guest_proto::{BootId, Identity, MachineId, Seed};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use tempfile::TempDir;
use vmm_api::Client;
use vmm_config::CloneConfig;

use crate::agent::Host;
use crate::{Vmm, VmmCommand};

/// A zygote for the snapshot in `directory`, and a connection to it.
///
/// # Panics
/// If it does not start.
#[must_use]
pub fn start(directory: &Path) -> (Vmm, Client) {
    start_with(directory, "")
}

/// The same, with clones that wait.
///
/// # Panics
/// If it does not start.
#[must_use]
pub fn start_with_pool(directory: &Path, pool: u8) -> (Vmm, Client) {
    start_with(directory, &format!(",pool={pool}"))
}

/// The same, with more keys of `--zygote`.
///
/// # Panics
/// If it does not start.
#[must_use]
pub fn start_with(directory: &Path, keys: &str) -> (Vmm, Client) {
    let command = VmmCommand::new();
    let socket = command.path("api");
    let flag = format!("source_url=file://{},socket={}{keys}", directory.display(), socket.display());
    let mut zygote = command.arg("--zygote", flag).spawn();
    let client = zygote.client();
    (zygote, client)
}

/// Kills a clone and waits until it is gone.
///
/// # Panics
/// If it has ended before.
pub fn end(pid: Pid) {
    let process = pidfd_open(pid, PidfdFlags::empty()).expect("the clone lives");
    kill_process(pid, Signal::KILL).expect("the clone lives");
    poll(&mut [PollFd::new(&process, PollFlags::IN)], None).expect("a process can be waited for");
}

/// The processes that a zygote has made and that have not ended, as soon as there are `count` of them: those that just did
/// are gone then, and those of a pool are there.
///
/// # Panics
/// If the zygote is not there, or there are never so many.
#[must_use]
pub fn children(zygote: &Vmm, count: usize) -> Vec<Pid> {
    let path = format!("/proc/{0}/task/{0}/children", zygote.pid());
    // Nothing tells of either moment.
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let text = std::fs::read_to_string(&path).expect("the zygote lives");
        let pids: Vec<Pid> = text.split_whitespace().filter_map(|pid| Pid::from_raw(pid.parse().ok()?)).collect();
        if pids.len() == count {
            return pids;
        }
        assert!(Instant::now() < deadline, "{} processes instead of {count}", pids.len());
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// An identity that no other VM has.
///
/// # Panics
/// If the system has no random numbers or no clock.
#[must_use]
pub fn identity() -> Identity {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("it is later than 1970");
    Identity {
        seed: Seed::new(random()),
        realtime: u64::try_from(now.as_nanos()).expect("it is earlier than 2554"),
        machine_id: MachineId::from_random(random()),
        boot_id: BootId::from_random(random()),
        hostname: None,
    }
}

fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes)).expect("random numbers");
    bytes
}

/// A clone of a VM with an agent, the files it was given and its serial port.
pub struct Clone {
    /// Its process.
    pub pid: Pid,
    /// Where its agent is reached.
    pub host: Host,
    /// Its serial port.
    pub serial: UnixStream,
    /// Where its sockets are, which the test made.
    pub directory: TempDir,
}

impl Clone {
    /// Asks the zygote for one.
    ///
    /// # Panics
    /// If it makes none.
    #[must_use]
    pub fn new(client: &mut Client) -> Self {
        let directory = tempfile::tempdir().expect("there is room for files");
        let socket = directory.path().join("vsock");
        let host = Host::at(&socket);
        let listener = OwnedFd::from(UnixListener::bind(&socket).expect("nobody else listens"));
        let (serial, theirs) = UnixStream::pair().expect("descriptors");
        let fds = ["serial", "_vsock0"].map(String::from).into();
        let config = CloneConfig { fds, vsock_socket: Some(socket), ..CloneConfig::default() };
        let info = client.clone_vm(config, &[theirs.as_fd(), listener.as_fd()]).expect("a clone");
        let pid = i32::try_from(info.pid).ok().and_then(Pid::from_raw).expect("a process id");
        Self { pid, host, serial, directory }
    }
}
