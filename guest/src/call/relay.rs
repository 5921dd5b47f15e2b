//! The streams of one call, in one poll loop that waits only for what it can make use of.

use std::{
    io::{self, Read, Write},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
};

use guest_proto::{CHUNK, ExitStatus, FromAgent, FromCaller, LinkError, STDIN_WINDOW};
use rustix::{
    event::{PollFd, PollFlags, poll},
    io::Errno,
};

use super::{CallError, CallLink};

/// Bytes written at a time: a pipe that is ready for writing takes them without blocking, see pipe(7).
const PIECE: usize = 4096;

/// An output with at most one frame waiting for it.
struct Sink {
    fd: OwnedFd,
    waiting: Vec<u8>,
    written: usize,
    broken: bool,
}

impl Sink {
    fn new(fd: OwnedFd) -> Self {
        Self { fd, waiting: Vec::new(), written: 0, broken: false }
    }

    fn is_idle(&self) -> bool {
        self.written >= self.waiting.len()
    }

    fn put(&mut self, bytes: Vec<u8>) {
        if !self.broken {
            (self.waiting, self.written) = (bytes, 0);
        }
    }

    /// Writes one piece. That nobody reads any more is for the service to find out.
    fn write(&mut self) {
        let rest = self.waiting.get(self.written..).unwrap_or_default();
        match rustix::io::write(&self.fd, rest.get(..PIECE).unwrap_or(rest)) {
            Ok(count) => self.written = self.written.saturating_add(count),
            Err(Errno::INTR | Errno::AGAIN) => {}
            Err(_) => {
                self.broken = true;
                self.waiting.clear();
            }
        }
    }
}

/// A call whose service runs.
pub struct Relay {
    link: CallLink,
    input: OwnedFd,
    input_open: bool,
    /// Bytes of input that the service's side has room for.
    granted: usize,
    output: Sink,
    errors: Sink,
}

impl Relay {
    /// Of a call that was answered with `Started`.
    pub fn new(link: CallLink, input: OwnedFd, output: OwnedFd) -> io::Result<Self> {
        let errors = Sink::new(io::stderr().as_fd().try_clone_to_owned()?);
        Ok(Self { link, input, input_open: true, granted: STDIN_WINDOW, output: Sink::new(output), errors })
    }

    /// Carries the streams until the service has ended.
    pub fn run(mut self) -> Result<ExitStatus, CallError> {
        let mut exit = None;
        let mut open = true;
        loop {
            self.link.flush()?;
            if exit.is_none() {
                exit = self.take_frames()?;
            }
            let idle = self.output.is_idle() && self.errors.is_idle();
            match exit {
                Some(exit) if idle => return Ok(exit),
                None if idle && !open => return Err(LinkError::Closed.into()),
                _ => {}
            }
            let running = exit.is_none() && open;
            let flag = |wanted: bool, flags: PollFlags| if wanted { flags } else { PollFlags::empty() };
            let mut link_flags = flag(running, self.link.interest());
            if !idle {
                link_flags.remove(PollFlags::IN);
            }
            let reads = running && self.input_open && self.granted > 0 && self.link.is_idle();
            let [link, input, output, errors] = wait([
                (self.link.as_fd(), link_flags),
                (self.input.as_fd(), flag(reads, PollFlags::IN)),
                (self.output.fd.as_fd(), flag(!self.output.is_idle(), PollFlags::OUT)),
                (self.errors.fd.as_fd(), flag(!self.errors.is_idle(), PollFlags::OUT)),
            ])?;
            if link && link_flags.contains(PollFlags::IN) {
                open = self.link.fill()?;
            }
            if input {
                self.read_input()?;
            }
            if output {
                self.output.write();
            }
            if errors {
                self.errors.write();
            }
        }
    }

    /// Handles received frames, as long as there is room for what they bring.
    fn take_frames(&mut self) -> Result<Option<ExitStatus>, CallError> {
        while self.output.is_idle() && self.errors.is_idle() {
            match self.link.received()? {
                None => break,
                Some(FromAgent::Stdout(bytes)) => self.output.put(bytes),
                Some(FromAgent::Stderr(bytes)) => self.errors.put(bytes),
                Some(FromAgent::StdinCredit(bytes)) => {
                    self.granted = self.granted.saturating_add(usize::try_from(bytes).unwrap_or(usize::MAX));
                }
                Some(FromAgent::Exit(status)) => return Ok(Some(status)),
                Some(FromAgent::Reply(_) | FromAgent::Hello(_)) => {
                    return Err(CallError::Refused("the launcher broke the protocol".into()));
                }
            }
        }
        Ok(None)
    }

    fn read_input(&mut self) -> Result<(), CallError> {
        let mut buffer = vec![0; CHUNK.min(self.granted)];
        let count = match rustix::io::read(&self.input, &mut buffer) {
            Ok(count) => count,
            Err(Errno::INTR | Errno::AGAIN) => return Ok(()),
            // Who has gone says nothing more.
            Err(_) => 0,
        };
        buffer.truncate(count);
        self.granted = self.granted.saturating_sub(count);
        self.input_open = count > 0;
        Ok(self.link.queue(&FromCaller::Stdin(buffer))?)
    }
}

/// Waits for what is wanted of each descriptor. One that nothing is wanted of is left out, or its hang-up would be reported for ever.
fn wait(all: [(BorrowedFd<'_>, PollFlags); 4]) -> io::Result<[bool; 4]> {
    let wanted = all.iter().filter(|(_, flags)| !flags.is_empty());
    let mut set: Vec<PollFd<'_>> = wanted.map(|(fd, flags)| PollFd::from_borrowed_fd(*fd, *flags)).collect();
    match poll(&mut set, None) {
        Ok(_) => {}
        Err(Errno::INTR) => return Ok([false; 4]),
        Err(errno) => return Err(errno.into()),
    }
    let mut happened = set.iter().map(|fd| !fd.revents().is_empty());
    Ok(all.map(|(_, flags)| !flags.is_empty() && happened.next() == Some(true)))
}

/// Copies until the end, each piece as soon as it is there: an answer must not wait for the next one.
pub fn copy_unbuffered(mut from: &UnixStream, to: &mut impl Write) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => {
                to.write_all(buffer.get(..count).unwrap_or_default())?;
                to.flush()?;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use guest_proto::Link;

    use super::*;

    type Launcher = Link<FromCaller, FromAgent>;

    struct Fixture {
        launcher: Launcher,
        program: UnixStream,
        call: thread::JoinHandle<Result<ExitStatus, CallError>>,
    }

    fn started() -> Fixture {
        let (a, b) = UnixStream::pair().unwrap();
        let (program, stream) = UnixStream::pair().unwrap();
        stream.set_nonblocking(true).unwrap();
        let output = stream.try_clone().unwrap();
        let relay = Relay::new(CallLink::new(a.into()).unwrap(), stream.into(), output.into()).unwrap();
        Fixture { launcher: Launcher::new(b.into()).unwrap(), program, call: thread::spawn(|| relay.run()) }
    }

    fn send(launcher: &mut Launcher, messages: &[FromAgent]) {
        for message in messages {
            launcher.queue(message).unwrap();
        }
        while !launcher.is_idle() {
            launcher.flush().unwrap();
        }
    }

    #[test]
    fn streams_and_status() {
        let Fixture { mut launcher, mut program, call } = started();
        program.write_all(b"question").unwrap();
        assert_eq!(launcher.exchange(20).unwrap(), FromCaller::Stdin(b"question".to_vec()));
        send(&mut launcher, &[FromAgent::Stdout(b"answer".to_vec())]);
        let mut answer = [0; 6];
        program.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"answer");
        program.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!(launcher.exchange(20).unwrap(), FromCaller::Stdin(vec![]));
        send(&mut launcher, &[FromAgent::Stdout(b"last".to_vec()), FromAgent::Exit(ExitStatus::Code(7))]);
        let mut rest = String::new();
        program.read_to_string(&mut rest).unwrap();
        assert_eq!((rest.as_str(), call.join().unwrap().unwrap()), ("last", ExitStatus::Code(7)));
    }

    /// Whatever the program sends, no more than was granted is on the way, and what comes back is not lost meanwhile.
    #[test]
    fn no_more_than_was_granted_is_sent() {
        let Fixture { mut launcher, program, call } = started();
        let writer = program.try_clone().unwrap();
        let feeder = thread::spawn(move || (&writer).write_all(&vec![1; 3 * STDIN_WINDOW]).unwrap());
        let mut seen = 0;
        while seen < STDIN_WINDOW {
            let FromCaller::Stdin(bytes) = launcher.exchange(20).unwrap() else { panic!() };
            seen += bytes.len();
        }
        assert_eq!(seen, STDIN_WINDOW);
        assert!(matches!(launcher.exchange(0), Err(LinkError::TimedOut(_))));
        let all = u32::try_from(2 * STDIN_WINDOW).unwrap();
        send(&mut launcher, &[FromAgent::StdinCredit(all)]);
        while seen < 3 * STDIN_WINDOW {
            let FromCaller::Stdin(bytes) = launcher.exchange(20).unwrap() else { panic!() };
            seen += bytes.len();
        }
        feeder.join().unwrap();
        send(&mut launcher, &[FromAgent::Exit(ExitStatus::Signal(9))]);
        assert_eq!(call.join().unwrap().unwrap(), ExitStatus::Signal(9));
    }

    #[test]
    fn a_launcher_that_goes_away_or_breaks_the_protocol_ends_the_call() {
        let Fixture { launcher, call, program: _program } = started();
        drop(launcher);
        assert!(matches!(call.join().unwrap(), Err(CallError::Link(LinkError::Closed))));
        let Fixture { mut launcher, call, program: _program } = started();
        send(&mut launcher, &[FromAgent::Reply(guest_proto::Reply::Done)]);
        assert!(matches!(call.join().unwrap(), Err(CallError::Refused(_))));
    }
}
