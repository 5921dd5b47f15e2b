//! One application's connection: its socket on one side, a cross-domain context on the other, one thread, one loop.

use std::collections::HashMap;
use std::io;
use std::os::unix::net::UnixStream;
use std::rc::Weak;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};

use super::channel::{Channel, Event, HostFd};
use super::error::{SessionError, code};
use super::gpu::Gpu;
use super::objects::Objects;
use super::pipes::Pipes;
use super::shm::{Pool, Store};
use super::socket::{AppSocket, Read};
use super::table::{Table, op};
use super::wire::{self, Arg, Builder};

/// How long the host may take to say its first word once it was asked something.
const FIRST_ANSWER: Duration = Duration::from_secs(20);
/// How long the pipes of an application that has gone are kept, if it has no windows.
const LINGER: Duration = Duration::from_secs(10);
/// Wakes up for timeouts even if nothing else happens.
const TICK: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };
/// Wayland bytes collected before they are sent to the host.
const BATCH: usize = 3744;

/// What a descriptor that became ready means.
#[derive(Debug, Clone, Copy)]
enum Token {
    App,
    Host,
    Sink(u32),
    Source(u32),
}

/// The state of one connection.
#[derive(Debug)]
pub struct Session<G> {
    pub(super) app: AppSocket,
    pub(super) channel: Channel<G>,
    pub(super) objects: Objects,
    pub(super) pipes: Pipes,
    /// Globals the application was told of: by the host's name for them, the interface and the highest version.
    pub(super) globals: HashMap<u32, (Table, u32)>,
    pub(super) store: Store,
    pub(super) pools: Vec<Weak<Pool>>,
    pub(super) serial: u64,
    pub(super) args: Vec<Arg>,
    /// Bytes from the host that are no complete message yet, and descriptors no message has claimed yet.
    pub(super) from_host: Vec<u8>,
    pub(super) host_fds: std::collections::VecDeque<HostFd>,
    to_host: Vec<u8>,
    /// When the host was asked for the first time: an application may take its time between connecting and that.
    asked: Option<Instant>,
    answered: bool,
}

/// Runs a connection until either side ends it.
///
/// # Errors
///
/// Why it ended early. The application has then been told, if it was still listening.
pub fn run<G: Gpu>(stream: UnixStream, gpu: G) -> Result<(), SessionError> {
    let app = AppSocket::new(stream).map_err(SessionError::io("setting up a connection"))?;
    let mut session = Session {
        app,
        channel: Channel::open(gpu)?,
        objects: Objects::new(),
        pipes: Pipes::new(),
        globals: HashMap::new(),
        store: Store::default(),
        pools: Vec::new(),
        serial: 0,
        args: Vec::new(),
        from_host: Vec::new(),
        host_fds: std::collections::VecDeque::new(),
        to_host: Vec::new(),
        asked: None,
        answered: false,
    };
    let result = session.serve();
    if let Err(error) = &result {
        session.post_error(error);
    }
    result
}

impl<G: Gpu> Session<G> {
    fn serve(&mut self) -> Result<(), SessionError> {
        loop {
            if let Err(error) = self.app.flush() {
                // It closed its socket without reading the rest.
                log::debug!("an application left early: {error}");
                return self.drain_sources();
            }
            if !self.app.congested() && !self.pipes.congested() {
                self.channel.arm()?;
            }
            for (token, ready) in self.wait(true)? {
                match token {
                    Token::App if ready.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR) => {
                        if self.read_app()? == Read::End {
                            return self.linger();
                        }
                    }
                    Token::Host => {
                        if !self.read_host()? {
                            let _ = self.app.flush();
                            return Ok(());
                        }
                    }
                    Token::App => {}
                    Token::Sink(id) => self.pipes.write_sink(id),
                    Token::Source(id) => self.read_source(id)?,
                }
            }
            self.check_time()?;
        }
    }

    /// Waits until something can be done, also for the application if `app`; returns what is ready.
    fn wait(&self, app: bool) -> Result<Vec<(Token, PollFlags)>, SessionError> {
        let mut tokens = Vec::new();
        let mut fds = Vec::new();
        if app {
            let events = if self.app.pending() { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN };
            tokens.push(Token::App);
            fds.push(PollFd::from_borrowed_fd(self.app.as_fd(), events));
        }
        if self.channel.armed() {
            tokens.push(Token::Host);
            fds.push(PollFd::from_borrowed_fd(self.channel.event_fd(), PollFlags::IN));
        }
        for (id, fd) in self.pipes.sinks() {
            tokens.push(Token::Sink(id));
            fds.push(PollFd::from_borrowed_fd(fd, PollFlags::OUT));
        }
        for (id, fd) in self.pipes.sources() {
            tokens.push(Token::Source(id));
            fds.push(PollFd::from_borrowed_fd(fd, PollFlags::IN));
        }
        match rustix::event::poll(&mut fds, Some(&TICK)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(SessionError::io("waiting for events")(error)),
        }
        let ready = fds.iter().map(PollFd::revents);
        Ok(tokens.into_iter().zip(ready).filter(|(_, ready)| !ready.is_empty()).collect())
    }

    fn check_time(&mut self) -> Result<(), SessionError> {
        self.pipes.drop_stalled();
        if !self.answered && self.asked.is_some_and(|asked| asked.elapsed() > FIRST_ANSWER) {
            return Err(SessionError::host("the host's compositor does not answer"));
        }
        Ok(())
    }

    /// Reads from the application and forwards what is complete.
    fn read_app(&mut self) -> Result<Read, SessionError> {
        let state = self.app.receive().map_err(|error| match error.kind() {
            io::ErrorKind::InvalidData => SessionError::application(1, code::NO_MEMORY, error.to_string()),
            _ => SessionError::Io { what: "reading from an application", source: error },
        })?;
        let mut input = std::mem::take(&mut self.app.input);
        let mut at = 0;
        while let Some(rest) = input.get_mut(at..) {
            let Some(header) = wire::header(rest).map_err(SessionError::request(1))? else { break };
            let Some(message) = rest.get_mut(..header.size) else { break };
            self.request(header, message)?;
            at += header.size;
        }
        input.drain(..at);
        self.app.input = input;
        self.flush_host()?;
        Ok(state)
    }

    /// Reads one event of the host. `false` if it was the last.
    fn read_host(&mut self) -> Result<bool, SessionError> {
        match self.channel.event()? {
            None => return Ok(true),
            Some(Event::Closed) => return Ok(false),
            Some(Event::Pipe { id, bytes, hang_up }) => self.pipes.deliver(id, &bytes, hang_up),
            Some(Event::Data { bytes, fds }) => {
                // Ask for the next while this one is being worked on.
                if !self.app.congested() {
                    self.channel.arm()?;
                }
                self.host_data(&bytes, fds)?;
            }
        }
        self.answered = true;
        Ok(true)
    }

    fn host_data(&mut self, bytes: &[u8], fds: Vec<HostFd>) -> Result<(), SessionError> {
        self.host_fds.extend(fds);
        let mut stream = std::mem::take(&mut self.from_host);
        stream.extend_from_slice(bytes);
        let mut at = 0;
        while let Some(rest) = stream.get_mut(at..) {
            let Some(header) = wire::header(rest).map_err(SessionError::event)? else { break };
            let Some(message) = rest.get_mut(..header.size) else { break };
            self.event(header, message)?;
            at += header.size;
        }
        stream.drain(..at);
        self.from_host = stream;
        if self.host_fds.len() > wire::MAX_MESSAGE {
            return Err(SessionError::host("descriptors that belong to no message"));
        }
        self.flush_host()
    }

    fn read_source(&mut self, id: u32) -> Result<(), SessionError> {
        for chunk in self.pipes.read_source(id) {
            self.channel.write_pipe(chunk.id, &chunk.bytes, chunk.end)?;
        }
        Ok(())
    }

    /// Queues a message for the host.
    pub(super) fn tell_host(&mut self, message: &[u8], fds: &[HostFd]) -> Result<(), SessionError> {
        if !fds.is_empty() {
            self.flush_host()?;
            return self.channel.send(message, fds);
        }
        if self.to_host.len() + message.len() > BATCH {
            self.flush_host()?;
        }
        self.to_host.extend_from_slice(message);
        Ok(())
    }

    /// Sends what is queued for the host.
    pub(super) fn flush_host(&mut self) -> Result<(), SessionError> {
        let batch = std::mem::take(&mut self.to_host);
        if !batch.is_empty() {
            self.asked.get_or_insert_with(Instant::now);
        }
        self.channel.send(&batch, &[])?;
        self.to_host = batch;
        self.to_host.clear();
        Ok(())
    }

    /// The application has gone. Its windows must go at once; data it wrote or still reads may take a moment longer.
    fn linger(&mut self) -> Result<(), SessionError> {
        if self.objects.has_surfaces() {
            return self.drain_sources();
        }
        let start = Instant::now();
        while self.pipes.active() && start.elapsed() < LINGER {
            if !self.pipes.congested() {
                self.channel.arm()?;
            }
            for (token, _) in self.wait(false)? {
                match token {
                    Token::Host => match self.channel.event()? {
                        Some(Event::Closed) => return Ok(()),
                        Some(Event::Pipe { id, bytes, hang_up }) => self.pipes.deliver(id, &bytes, hang_up),
                        Some(Event::Data { .. }) | None => {}
                    },
                    Token::App => {}
                    Token::Sink(id) => self.pipes.write_sink(id),
                    Token::Source(id) => self.read_source(id)?,
                }
            }
        }
        Ok(())
    }

    /// Passes on what the application wrote before it left.
    fn drain_sources(&mut self) -> Result<(), SessionError> {
        let ids: Vec<u32> = self.pipes.sources().map(|(id, _)| id).collect();
        for id in ids {
            for chunk in self.pipes.read_source(id) {
                self.channel.write_pipe(chunk.id, &chunk.bytes, chunk.end)?;
            }
        }
        Ok(())
    }

    /// Tells the application why its connection ends, as far as its socket takes it.
    fn post_error(&mut self, error: &SessionError) {
        let (object, code, text) = match error {
            SessionError::Application { object, code, text } => (*object, *code, text.clone()),
            other => (1, code::IMPLEMENTATION, other.to_string()),
        };
        let message = Builder::new(1, op::DISPLAY_ERROR).word(object).word(code).text(&text).finish();
        self.app.queue(&message, []);
        let _ = self.app.flush();
    }
}
