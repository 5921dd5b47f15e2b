//! Clipboard and drag-and-drop data: pipes between an application and the host, in both directions.
//!
//! A *sink* is where an application wants data to arrive; the host's data comes as events. A *source* is a pipe an
//! application writes, for the host. Neither may ever block the connection.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::channel::MAX_WRITE;

/// Pipes one application may have open in each direction.
const MAX_PIPES: usize = 64;
/// Bytes waiting for slow readers before the host is asked for no more.
const HIGH_WATER: usize = 16 << 20;
/// How long a reader may take without reading anything, while others wait for it.
const STALL: Duration = Duration::from_secs(5);
/// Bytes written at a time. A pipe that is ready takes a page without blocking, even if it is in blocking mode (which is
/// the application's to choose: the flag belongs to the file it shares with us).
const WRITE_SIZE: usize = 4096;
/// Reads from one source in a row, before others get their turn.
const READS_PER_TURN: usize = 8;

#[derive(Debug)]
struct Sink {
    fd: OwnedFd,
    waiting: VecDeque<u8>,
    ended: bool,
}

/// One chunk of an application's data for the host.
#[derive(Debug, PartialEq, Eq)]
pub struct Chunk {
    /// The host's pipe.
    pub id: u32,
    /// At most [`MAX_WRITE`] bytes.
    pub bytes: Vec<u8>,
    /// Whether this was the last.
    pub end: bool,
}

/// All pipes of one application.
#[derive(Debug)]
pub struct Pipes {
    sinks: BTreeMap<u32, Sink>,
    sources: BTreeMap<u32, OwnedFd>,
    waiting: usize,
    progress: Instant,
}

impl Pipes {
    /// None yet.
    pub fn new() -> Self {
        Self { sinks: BTreeMap::new(), sources: BTreeMap::new(), waiting: 0, progress: Instant::now() }
    }

    /// Whether no more pipes may be opened.
    pub fn full(&self) -> bool {
        self.sinks.len() >= MAX_PIPES || self.sources.len() >= MAX_PIPES
    }

    /// Whether any data is still on its way.
    pub fn active(&self) -> bool {
        !self.sinks.is_empty() || !self.sources.is_empty()
    }

    /// Whether the host must wait for slow readers.
    pub fn congested(&self) -> bool {
        self.waiting > HIGH_WATER
    }

    /// `fd` gets what the host sends under `id`.
    pub fn add_sink(&mut self, id: u32, fd: OwnedFd) {
        self.sinks.insert(id, Sink { fd, waiting: VecDeque::new(), ended: false });
    }

    /// The host gets under `id` what is written to the returned descriptor.
    ///
    /// # Errors
    ///
    /// No descriptors left.
    pub fn add_source(&mut self, id: u32) -> io::Result<OwnedFd> {
        let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
        rustix::io::ioctl_fionbio(&read, true)?;
        self.sources.insert(id, read);
        Ok(write)
    }

    /// Sinks that can be written to if their descriptor is ready.
    pub fn sinks(&self) -> impl Iterator<Item = (u32, BorrowedFd<'_>)> {
        self.sinks.iter().filter(|(_, sink)| !sink.waiting.is_empty()).map(|(id, sink)| (*id, sink.fd.as_fd()))
    }

    /// Sources that can be read if their descriptor is ready.
    pub fn sources(&self) -> impl Iterator<Item = (u32, BorrowedFd<'_>)> {
        self.sources.iter().map(|(id, fd)| (*id, fd.as_fd()))
    }

    /// Data for a sink. Unknown ids are those whose reader has gone: their data is dropped.
    pub fn deliver(&mut self, id: u32, bytes: &[u8], end: bool) {
        let Some(sink) = self.sinks.get_mut(&id) else { return };
        if self.waiting == 0 {
            self.progress = Instant::now();
        }
        sink.waiting.extend(bytes);
        sink.ended |= end;
        self.waiting += bytes.len();
        if sink.waiting.is_empty() && sink.ended {
            self.sinks.remove(&id);
        }
    }

    /// A sink's descriptor is ready: writes one piece.
    pub fn write_sink(&mut self, id: u32) {
        let Some(sink) = self.sinks.get_mut(&id) else { return };
        let (front, _) = sink.waiting.as_slices();
        let piece = front.get(..WRITE_SIZE).unwrap_or(front);
        let done = match rustix::io::write(&sink.fd, piece) {
            Ok(count) => count,
            Err(Errno::AGAIN | Errno::INTR) => 0,
            Err(_) => {
                // The reader does not want it any more.
                self.drop_sink(id);
                return;
            }
        };
        sink.waiting.drain(..done);
        self.waiting -= done;
        if done > 0 {
            self.progress = Instant::now();
        }
        if sink.waiting.is_empty() && sink.ended {
            self.sinks.remove(&id);
        }
    }

    fn drop_sink(&mut self, id: u32) {
        if let Some(sink) = self.sinks.remove(&id) {
            self.waiting -= sink.waiting.len();
        }
    }

    /// Gives up on readers that hold up everything else and do not read.
    pub fn drop_stalled(&mut self) {
        if self.congested() && self.progress.elapsed() > STALL {
            let largest = self.sinks.iter().max_by_key(|(_, sink)| sink.waiting.len()).map(|(id, _)| *id);
            if let Some(id) = largest {
                log::warn!("dropped a paste of {} bytes that nobody reads", self.waiting);
                self.drop_sink(id);
            }
        }
    }

    /// A source's descriptor is ready: reads what is there, in pieces the host takes.
    pub fn read_source(&mut self, id: u32) -> Vec<Chunk> {
        let mut chunks = Vec::new();
        let Some(fd) = self.sources.get(&id) else { return chunks };
        for _ in 0..READS_PER_TURN {
            let mut bytes = vec![0; MAX_WRITE];
            match rustix::io::read(fd, &mut bytes) {
                Ok(count) if count > 0 => {
                    bytes.truncate(count);
                    chunks.push(Chunk { id, bytes, end: false });
                }
                Err(Errno::AGAIN | Errno::INTR) => break,
                Ok(_) | Err(_) => {
                    chunks.push(Chunk { id, bytes: Vec::new(), end: true });
                    self.sources.remove(&id);
                    break;
                }
            }
        }
        chunks
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pipe() -> (OwnedFd, OwnedFd) {
        rustix::pipe::pipe_with(rustix::pipe::PipeFlags::NONBLOCK).unwrap()
    }

    fn writable(fd: BorrowedFd<'_>) -> bool {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::OUT)], Some(&now)).unwrap() == 1
    }

    #[test]
    fn a_slow_reader_gets_everything_and_then_the_end() {
        let (read, write) = rustix::pipe::pipe().unwrap();
        let mut pipes = Pipes::new();
        pipes.add_sink(7, write);
        let data: Vec<u8> = (0..300_000u32).map(|at| at.to_le_bytes()[0]).collect();
        pipes.deliver(7, &data, false);
        pipes.deliver(7, &[], true);
        let mut got = Vec::new();
        let mut piece = [0; 1000];
        loop {
            while pipes.sinks().any(|(_, fd)| writable(fd)) {
                pipes.write_sink(7);
            }
            match rustix::io::read(&read, &mut piece).unwrap() {
                0 => break,
                count => got.extend_from_slice(&piece[..count]),
            }
        }
        assert!(got == data, "{} bytes", got.len());
        assert!(!pipes.active());
        assert_eq!(pipes.waiting, 0);
    }

    #[test]
    fn a_reader_that_went_away_is_forgotten() {
        let (read, write) = pipe();
        let mut pipes = Pipes::new();
        pipes.add_sink(1, write);
        drop(read);
        pipes.deliver(1, b"unwanted", false);
        pipes.write_sink(1);
        assert!(!pipes.active());
        pipes.deliver(1, b"more", true);
        assert_eq!(pipes.waiting, 0);
    }

    #[test]
    fn congestion_ends_when_the_stalled_reader_is_dropped() {
        let (_read, write) = pipe();
        let mut pipes = Pipes::new();
        pipes.add_sink(1, write);
        let block = vec![0; 1 << 20];
        while !pipes.congested() {
            pipes.deliver(1, &block, false);
        }
        pipes.drop_stalled();
        assert!(pipes.congested(), "not before its time is up");
        pipes.progress = Instant::now().checked_sub(STALL * 2).unwrap();
        pipes.drop_stalled();
        assert!(!pipes.congested() && !pipes.active());
    }

    #[test]
    fn a_source_is_read_in_bounded_pieces_until_it_ends() {
        let mut pipes = Pipes::new();
        let write = pipes.add_source(9).unwrap();
        assert!(pipes.read_source(9).is_empty(), "nothing there yet");
        rustix::io::write(&write, &[5; 10_000]).unwrap();
        drop(write);
        let chunks = pipes.read_source(9);
        assert!(chunks.iter().all(|chunk| chunk.bytes.len() <= MAX_WRITE));
        assert_eq!(chunks.iter().map(|chunk| chunk.bytes.len()).sum::<usize>(), 10_000);
        assert_eq!(chunks.last(), Some(&Chunk { id: 9, bytes: vec![], end: true }));
        assert!(!pipes.active());
    }
}
