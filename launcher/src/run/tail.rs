//! The last of what a VMM or a guest's console printed: kept in bounded memory, shown when something fails.

use std::{
    collections::VecDeque,
    io::Write,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::io::Errno;

use super::journal::Journal;

/// Bytes kept.
const KEPT: usize = 16 * 1024;

/// Bytes read before other work has its turn.
const AT_ONCE: usize = 256 * 1024;

/// A non-blocking descriptor and what last came from it.
#[derive(Debug)]
pub struct Tail {
    fd: Option<OwnedFd>,
    kept: VecDeque<u8>,
    echo: bool,
    journal: Option<Journal>,
}

impl Tail {
    /// Reads from `fd`, which does not block. With `echo`, everything also goes to standard error as it comes.
    pub fn new(fd: OwnedFd, echo: bool) -> Self {
        Self { fd: Some(fd), kept: VecDeque::new(), echo, journal: None }
    }

    /// Lets others read it in `journal`, too.
    pub fn kept_in(self, journal: Journal) -> Self {
        Self { journal: Some(journal), ..self }
    }

    /// What to wait for, until the other end is closed.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.fd.as_ref().map(AsFd::as_fd)
    }

    /// Reads what is there.
    pub fn drain(&mut self) {
        let mut buffer = [0; 4096];
        let mut total = 0;
        while let Some(fd) = self.fd.as_ref().filter(|_| total < AT_ONCE) {
            match rustix::io::read(fd, &mut buffer) {
                Ok(0) => self.fd = None,
                Ok(count) => {
                    total += count;
                    self.keep(buffer.get(..count).unwrap_or_default());
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                Err(_) => self.fd = None,
            }
        }
    }

    fn keep(&mut self, bytes: &[u8]) {
        if self.echo {
            let _ = std::io::stderr().write_all(&printable(bytes));
        }
        // A full disk must not end the VM.
        let _ = self.journal.as_mut().map(|journal| journal.append(bytes));
        self.kept.extend(bytes);
        let excess = self.kept.len().saturating_sub(KEPT);
        self.kept.drain(..excess);
    }

    /// The last `count` lines, safe to print.
    pub fn lines(&self, count: usize) -> String {
        let bytes: Vec<u8> = self.kept.iter().copied().collect();
        let text = String::from_utf8_lossy(&printable(&bytes)).into_owned();
        let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
        lines.get(lines.len().saturating_sub(count)..).unwrap_or_default().join("\n")
    }
}

/// Text from a guest without what a terminal would take for a command: only line ends, tabs and printable bytes stay.
pub fn printable(bytes: &[u8]) -> Vec<u8> {
    let text = String::from_utf8_lossy(bytes);
    let safe = |c: char| match c {
        '\n' | '\t' => Some(c),
        '\r' => None,
        c if c.is_control() => Some('\u{fffd}'),
        c => Some(c),
    };
    text.chars().filter_map(safe).collect::<String>().into_bytes()
}

#[cfg(test)]
mod tests {
    use rustix::event::{PollFd, PollFlags};

    use super::*;

    #[test]
    fn only_the_end_is_kept() {
        let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::NONBLOCK).unwrap();
        let mut tail = Tail::new(read, false);
        for number in 0..10_000 {
            rustix::io::write(&write, format!("line {number}\n").as_bytes()).unwrap();
            tail.drain();
        }
        assert!(tail.kept.len() <= KEPT);
        assert_eq!(tail.lines(2), "line 9998\nline 9999");
        assert!(tail.fd().is_some());
        drop(write);
        // A process that another test is starting may have the writing end for a moment more.
        while let Some(fd) = tail.fd() {
            let mut ready = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
            rustix::event::poll(&mut ready, None).unwrap();
            tail.drain();
        }
    }

    #[test]
    fn terminal_commands_are_defused() {
        assert_eq!(printable(b"a\x1b[2Jb\r\n\tc\x9b"), "a\u{fffd}[2Jb\n\tc\u{fffd}".as_bytes());
    }
}
