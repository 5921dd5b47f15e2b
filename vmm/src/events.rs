//! The event monitor: a line of JSON for each event in a machine's life, as Cloud Hypervisor's `--event-monitor` writes.
//!
//! ```text
//! {"timestamp":{"secs":0,"nanos":31415926},"source":"vm","event":"booted","properties":null}
//! ```
//! The time counts from the start of the VMM. A reader that does not read never holds up the machine: what does not fit
//! between the two is thrown away, in whole lines.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use serde::Serialize;

/// Bytes kept for a reader that is slow, beside what the kernel keeps.
const MAX_PENDING: usize = 64 << 10;

#[derive(Serialize)]
struct Event<'a> {
    timestamp: Duration,
    source: &'a str,
    event: &'a str,
    properties: Option<()>,
}

/// Where events go.
pub struct EventMonitor {
    /// Nothing once it has failed.
    output: Option<File>,
    start: Instant,
    pending: Vec<u8>,
}

impl EventMonitor {
    /// Appends to the file `path`, which may be a FIFO, also one that nobody reads yet.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlags::NONBLOCK.bits().cast_signed();
        let mut options = OpenOptions::new();
        options.create(true).append(true).custom_flags(flags);
        let file = match options.open(path) {
            // A FIFO without a reader: held open for reading too, it keeps what is written until there is one.
            Err(e) if e.raw_os_error() == Some(libc::ENXIO) => options.read(true).open(path),
            result => result,
        };
        Ok(Self { output: Some(file?), start: Instant::now(), pending: Vec::new() })
    }

    /// Writes to a descriptor that was handed down. It no longer blocks, for whoever else holds it either.
    ///
    /// # Errors
    /// If that cannot be set.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        fcntl_setfl(&fd, fcntl_getfl(&fd)? | OFlags::NONBLOCK)?;
        Ok(Self { output: Some(fd.into()), start: Instant::now(), pending: Vec::new() })
    }

    /// Tells of an event of the VMM (`source` is `vmm`) or the machine (`vm`).
    pub fn tell(&mut self, source: &str, event: &str) {
        self.flush();
        let event = Event { timestamp: self.start.elapsed(), source, event, properties: None };
        // Nothing in it can fail to be written as JSON.
        let Ok(mut line) = serde_json::to_vec(&event) else { return };
        line.push(b'\n');
        if self.output.is_some() && self.pending.len() + line.len() <= MAX_PENDING {
            self.pending.extend(line);
            self.flush();
        }
    }

    fn flush(&mut self) {
        let Some(output) = &mut self.output else { return };
        while !self.pending.is_empty() {
            match output.write(&self.pending) {
                Ok(n) => drop(self.pending.drain(..n)),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(e) => {
                    log::warn!("no more events are told: {e}");
                    self.output = None;
                    self.pending = Vec::new();
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Read};
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn each_event_is_a_line_of_cloud_hypervisors_json() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("events");
        let mut monitor = EventMonitor::open(&path).unwrap();
        monitor.tell("vmm", "starting");
        monitor.tell("vm", "booted");
        let text = std::fs::read_to_string(&path).unwrap();
        let events: Vec<serde_json::Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        assert_eq!((&events[0]["source"], &events[1]["event"]), (&"vmm".into(), &"booted".into()));
        assert!(events[1]["timestamp"]["secs"].is_u64() && events[1]["timestamp"]["nanos"].is_u64());
        assert!(events[1].get("properties").is_some());
    }

    #[test]
    fn a_reader_that_does_not_read_holds_nothing_up_and_gets_whole_lines() {
        let (mut reader, writer) = UnixStream::pair().unwrap();
        let mut monitor = EventMonitor::from_fd(writer.into()).unwrap();
        for _ in 0..20_000 {
            monitor.tell("vm", "paused");
        }
        assert!(monitor.pending.len() <= MAX_PENDING);
        // It reads after all: everything it gets is whole, and the next event comes through.
        let mut some = vec![0; 512 << 10];
        let n = reader.read(&mut some).unwrap();
        monitor.tell("vm", "resumed");
        drop(monitor);
        let all = BufReader::new(std::io::Cursor::new(some[..n].to_vec()).chain(reader));
        let lines: Vec<String> = all.lines().map(Result::unwrap).collect();
        let last = lines.len() - 1;
        for (i, line) in lines.iter().enumerate() {
            // What was pending when the monitor was dropped may be cut.
            assert!(serde_json::from_str::<serde_json::Value>(line).is_ok() || i == last, "{i}: {line}");
        }
    }

    #[test]
    fn a_reader_that_is_gone_is_forgotten() {
        let (reader, writer) = UnixStream::pair().unwrap();
        let mut monitor = EventMonitor::from_fd(writer.into()).unwrap();
        drop(reader);
        monitor.tell("vm", "booted");
        assert!(monitor.output.is_none());
        monitor.tell("vm", "shutdown");
    }
}
