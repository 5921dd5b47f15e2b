//! The streams between the launcher's own and the application's.

use std::{
    io::{self, IsTerminal},
    os::fd::{AsFd, BorrowedFd},
    time::Instant,
};

use guest_proto::{CHUNK, ExitStatus, FromAgent, LinkError, Reply, Request, Run, STDIN_WINDOW, ToAgent};
use rustix::{event::PollFlags, io::Errno};

use super::{RunError, escapes::Escapes, io_error, signals::Signals, tail::printable, terminal::Raw, vm::AgentLink};

/// Seconds the agent has to start the application, or to do something else.
const PATIENCE: u32 = 60;

/// Bytes written at a time: a pipe that is ready for writing takes them without blocking, see pipe(7).
const PIECE: usize = 4096;

/// A running VM, as far as waiting goes.
pub trait Waits {
    /// Waits until one of `wanted` is ready, and gives what happened to each. Signals and the VMM's end are noticed meanwhile.
    /// `Ok(None)` when `end` has passed.
    fn wait(
        &mut self,
        signals: &Signals,
        wanted: &[(BorrowedFd<'_>, PollFlags)],
        end: Option<Instant>,
    ) -> Result<Option<Vec<PollFlags>>, RunError>;
}

/// One of the launcher's outputs, with at most one frame waiting for it.
struct Sink {
    fd: BorrowedFd<'static>,
    cleaning: Cleaning,
    waiting: Vec<u8>,
    written: usize,
    broken: bool,
}

/// A terminal must not be given the commands a hostile application prints.
enum Cleaning {
    /// It is none.
    None,
    /// Only text.
    Text,
    /// What a program draws with.
    Drawing(Escapes),
}

impl Sink {
    fn new(stream: impl IsTerminal, fd: BorrowedFd<'static>) -> Self {
        let cleaning = if stream.is_terminal() { Cleaning::Text } else { Cleaning::None };
        Self { fd, cleaning, waiting: Vec::new(), written: 0, broken: false }
    }

    fn is_idle(&self) -> bool {
        self.written >= self.waiting.len()
    }

    fn put(&mut self, bytes: Vec<u8>) {
        if self.broken {
            return;
        }
        self.waiting = match &mut self.cleaning {
            Cleaning::None => bytes,
            Cleaning::Text => printable(&bytes),
            Cleaning::Drawing(escapes) => escapes.filter(&bytes),
        };
        self.written = 0;
    }

    /// Writes one piece. An output nobody reads any more is not an error: the application may not care.
    fn write(&mut self) {
        let rest = self.waiting.get(self.written..).unwrap_or_default();
        match rustix::io::write(self.fd, rest.get(..PIECE).unwrap_or(rest)) {
            Ok(count) => self.written = self.written.saturating_add(count),
            Err(Errno::INTR | Errno::AGAIN) => {}
            Err(_) => {
                self.broken = true;
                self.waiting.clear();
            }
        }
    }
}

/// What the agent says it cannot do, safe to print.
pub fn refused(message: &str) -> RunError {
    RunError::Application(String::from_utf8_lossy(&printable(message.as_bytes())).into())
}

/// Has the agent carry out a request that starts nothing.
pub fn carry_out(mut link: AgentLink, request: Request) -> Result<(), RunError> {
    link.queue(&ToAgent::Request(request))?;
    match link.exchange(PATIENCE)? {
        FromAgent::Reply(Reply::Done) => Ok(()),
        FromAgent::Reply(Reply::Failed { message }) => Err(refused(&message)),
        _ => Err(broken()),
    }
}

/// The agent said what nobody asked for.
pub fn broken() -> RunError {
    RunError::Application("the agent in the VM broke the protocol".into())
}

/// A running application.
pub struct Relay {
    link: AgentLink,
    stdin_open: bool,
    granted: usize,
    stdout: Sink,
    stderr: Sink,
    /// The user's, if the application has one.
    terminal: Option<Raw>,
}

impl Relay {
    /// Starts the application.
    pub fn start(mut link: AgentLink, request: Request) -> Result<Self, RunError> {
        let with_terminal = matches!(&request, Request::Run(Run { terminal: Some(_), .. }));
        link.queue(&ToAgent::Request(request))?;
        match link.exchange(PATIENCE)? {
            FromAgent::Reply(Reply::Started { .. }) => {}
            FromAgent::Reply(Reply::Failed { message }) => return Err(refused(&message)),
            _ => return Err(broken()),
        }
        let mut stdout = Sink::new(io::stdout(), rustix::stdio::stdout());
        let terminal = with_terminal.then(Raw::new).transpose().map_err(io_error("use the terminal"))?;
        if terminal.is_some() {
            stdout.cleaning = Cleaning::Drawing(Escapes::default());
        }
        Ok(Self {
            link,
            stdin_open: true,
            granted: STDIN_WINDOW,
            stdout,
            stderr: Sink::new(io::stderr(), rustix::stdio::stderr()),
            terminal,
        })
    }

    /// Carries the streams until the application has ended.
    pub fn run(&mut self, vm: &mut impl Waits, signals: &Signals) -> Result<ExitStatus, RunError> {
        let mut exit = None;
        let mut open = true;
        loop {
            self.link.flush()?;
            if exit.is_none() {
                exit = self.take_frames()?;
            }
            let idle = self.stdout.is_idle() && self.stderr.is_idle();
            match exit {
                Some(exit) if idle => return Ok(exit),
                None if idle && !open => return Err(LinkError::Closed.into()),
                _ => {}
            }
            let running = exit.is_none() && open;
            let reads_input = running && self.stdin_open && self.granted > 0 && self.link.is_idle();
            let mut link_flags = if running { self.link.interest() } else { PollFlags::empty() };
            if !idle {
                link_flags.remove(PollFlags::IN);
            }
            let flag = |wanted: bool, flags: PollFlags| if wanted { flags } else { PollFlags::empty() };
            let stdin = io::stdin();
            // Without a terminal nothing is wanted of it.
            let resized = self.terminal.as_ref().map_or_else(|| self.link.as_fd(), Raw::fd);
            let all = [
                (self.link.as_fd(), link_flags),
                (stdin.as_fd(), flag(reads_input, PollFlags::IN)),
                (self.stdout.fd, flag(!self.stdout.is_idle(), PollFlags::OUT)),
                (self.stderr.fd, flag(!self.stderr.is_idle(), PollFlags::OUT)),
                (resized, flag(running && self.terminal.is_some() && self.link.is_idle(), PollFlags::IN)),
            ];
            // A descriptor nothing is wanted of must not be in the set at all: its hang-up would be reported for ever.
            let wanted: Vec<_> = all.iter().filter(|(_, flags)| !flags.is_empty()).copied().collect();
            let Some(happened) = vm.wait(signals, &wanted, None)? else { continue };
            let mut happened = happened.into_iter();
            let [link, input, output, errors, resized] =
                all.map(|(_, flags)| !flags.is_empty() && happened.next().is_some_and(|happened| !happened.is_empty()));
            if link && link_flags.contains(PollFlags::IN) {
                open = self.link.fill()?;
            }
            if input {
                self.read_input()?;
            }
            if resized && let Some(terminal) = &self.terminal {
                self.link.queue(&ToAgent::Resize(terminal.resized()))?;
            }
            if output {
                self.stdout.write();
            }
            if errors {
                self.stderr.write();
            }
        }
    }

    /// Handles received frames, as long as there is room for what they bring.
    fn take_frames(&mut self) -> Result<Option<ExitStatus>, RunError> {
        while self.stdout.is_idle() && self.stderr.is_idle() {
            match self.link.received()? {
                None => break,
                Some(FromAgent::Stdout(bytes)) => self.stdout.put(bytes),
                Some(FromAgent::Stderr(bytes)) => self.stderr.put(bytes),
                Some(FromAgent::StdinCredit(bytes)) => {
                    self.granted = self.granted.saturating_add(usize::try_from(bytes).unwrap_or(usize::MAX));
                }
                Some(FromAgent::Exit(status)) => return Ok(Some(status)),
                Some(FromAgent::Hello(_) | FromAgent::Reply(_)) => {
                    return Err(broken());
                }
            }
        }
        Ok(None)
    }

    fn read_input(&mut self) -> Result<(), RunError> {
        let mut buffer = vec![0; CHUNK.min(self.granted)];
        let count = match rustix::io::read(rustix::stdio::stdin(), &mut buffer) {
            Ok(count) => count,
            Err(Errno::INTR | Errno::AGAIN) => return Ok(()),
            // A closed standard input is an empty one.
            Err(Errno::BADF | Errno::IO) => 0,
            Err(errno) => return Err(io_error("read standard input")(errno)),
        };
        buffer.truncate(count);
        self.granted = self.granted.saturating_sub(count);
        self.stdin_open = count > 0;
        Ok(self.link.queue(&ToAgent::Stdin(buffer))?)
    }
}
