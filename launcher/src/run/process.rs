//! A process that is known again later, though its number may meanwhile be another's.

use std::{
    fs, io,
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};
use serde::{Deserialize, Serialize};

/// A process: number, and start in clock ticks since the machine's own. No two have the same of both.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// Its number.
    pub pid: u32,
    /// Field 22 of /proc/PID/stat: see proc_pid_stat(5).
    start: u64,
}

impl ProcessId {
    /// The process that has this number now, if it has not ended.
    pub fn of(pid: u32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name, in parentheses, can have anything in it.
        let (_, fields) = stat.rsplit_once(')')?;
        let mut fields = fields.split_ascii_whitespace();
        let state = fields.next()?;
        let start = fields.nth(18)?.parse().ok()?;
        (!matches!(state, "Z" | "X")).then_some(Self { pid, start })
    }

    /// This process.
    pub fn own() -> Option<Self> {
        Self::of(std::process::id())
    }

    /// Whether it still runs.
    pub fn is_alive(self) -> bool {
        Self::of(self.pid) == Some(self)
    }

    /// A descriptor of it; nothing if it has ended.
    pub fn open(self) -> Option<Running> {
        // Opened first: if the number is this process's afterwards, it was so before, and the descriptor is this process's.
        let running = Running::open(self.pid).ok()?;
        self.is_alive().then_some(running)
    }
}

/// A descriptor of a process, which becomes readable when that ends.
#[derive(Debug)]
pub struct Running(OwnedFd);

impl Running {
    /// Of the process with this number.
    pub fn open(pid: u32) -> io::Result<Self> {
        let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(Errno::SRCH)?;
        Ok(Self(pidfd_open(pid, PidfdFlags::empty())?))
    }

    /// The descriptor.
    pub fn fd(&self) -> &OwnedFd {
        &self.0
    }

    /// Sends it a signal, if it still runs.
    pub fn signal(&self, signal: Signal) {
        let _ = pidfd_send_signal(&self.0, signal);
    }

    /// Waits until it has ended. False when it did not in time.
    pub fn wait(&self, time: Duration) -> bool {
        let end = Instant::now() + time;
        loop {
            let left = Timespec::try_from(end.saturating_duration_since(Instant::now())).unwrap_or_default();
            match poll(&mut [PollFd::new(&self.0, PollFlags::IN)], Some(&left)) {
                Err(Errno::INTR) => {}
                result => return result.is_ok_and(|count| count > 0),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn known_until_it_ends() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let process = ProcessId::of(child.id()).unwrap();
        assert!(process.is_alive());
        let other = ProcessId { start: process.start + 1, ..process };
        assert!(!other.is_alive() && other.open().is_none(), "another that has the number");
        let running = process.open().unwrap();
        assert!(!running.wait(Duration::ZERO));
        running.signal(Signal::KILL);
        assert!(running.wait(Duration::from_secs(60)));
        assert!(!process.is_alive(), "a zombie has ended");
        child.wait().unwrap();
        assert!(!process.is_alive() && process.open().is_none());
        assert!(ProcessId::own().unwrap().is_alive());
    }
}
