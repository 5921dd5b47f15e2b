//! Signals that ask the launcher to end, as a descriptor for the poll loop.

use std::{
    io::{self, Read},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixStream,
    },
};

use signal_hook::{
    consts::{SIGHUP, SIGINT, SIGTERM},
    low_level::pipe,
};

/// Receives SIGINT, SIGTERM and SIGHUP.
#[derive(Debug)]
pub struct Signals {
    pipes: [(i32, UnixStream); 3],
}

impl Signals {
    /// Catches the signals from now on.
    pub fn new() -> io::Result<Self> {
        let catch = |signal| -> io::Result<(i32, UnixStream)> {
            let (read, write) = UnixStream::pair()?;
            read.set_nonblocking(true)?;
            pipe::register(signal, write)?;
            Ok((signal, read))
        };
        Ok(Self { pipes: [catch(SIGINT)?, catch(SIGTERM)?, catch(SIGHUP)?] })
    }

    /// What becomes readable when a signal arrives.
    pub fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.pipes.iter().map(|(_, pipe)| pipe.as_fd())
    }

    /// The signal that arrived, if one did.
    pub fn received(&self) -> Option<i32> {
        let arrived = |pipe: &UnixStream| {
            let mut pipe = pipe;
            pipe.read(&mut [0; 16]).is_ok_and(|count| count > 0)
        };
        self.pipes.iter().find(|(_, pipe)| arrived(pipe)).map(|(signal, _)| *signal)
    }
}
