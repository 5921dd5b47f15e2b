//! Clones: a zygote, and processes that are its children and not the test's.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use vmm_api::Client;

use crate::{Vmm, VmmCommand};

/// A zygote for the snapshot in `directory`, and a connection to it.
///
/// # Panics
/// If it does not start.
#[must_use]
pub fn start(directory: &Path) -> (Vmm, Client) {
    let command = VmmCommand::new();
    let socket = command.path("api");
    let flag = format!("source_url=file://{},socket={}", directory.display(), socket.display());
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

/// The processes that a zygote has made and that have not ended.
///
/// # Panics
/// If it is not there.
#[must_use]
pub fn children(zygote: &Vmm) -> String {
    let path = format!("/proc/{0}/task/{0}/children", zygote.pid());
    std::fs::read_to_string(path).expect("the zygote lives").trim().to_owned()
}

/// Bytes that nobody else has.
///
/// # Panics
/// If the system has none.
#[must_use]
pub fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes)).expect("random numbers");
    bytes
}
