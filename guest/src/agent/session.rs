//! One connection: a request, and for a process its streams until it ends.
//!
//! One thread and one poll loop, which only ever waits for what it can make use of: a process's output while the last
//! piece has left, room on its standard input while there is something for it.

use std::{
    collections::VecDeque,
    fs::File,
    io::{self, Read, Write},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::process::ExitStatusExt,
    },
    process::{Child, Stdio},
};

use guest_proto::{
    CHUNK, ExitStatus, FORWARD_PORT, FromAgent, Identity, LinkError, ProtoError, Reply, Request, Run, STDIN_WINDOW,
    ToAgent, VERSION,
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::{Errno, ioctl_fionbio},
    process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open},
};

use super::{AgentLink, forward, gate::Gate, home, process, terminal, wake::WakeError};
use crate::{init::Ending, sys};

/// Seconds the launcher has for its request, and for taking the last frame.
const PATIENCE: u32 = 10;

/// Output still read after a process has ended, in bytes for each stream: a background process that inherited the stream
/// must not keep the application alive.
const LAST_OUTPUT: usize = 1024 * 1024;

/// Why a connection was given up.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error("the launcher sent more input than was granted")]
    TooMuchInput,
    #[error("the launcher's first message is not a request")]
    NoRequest,
    #[error("cannot follow a process: {0}")]
    Process(#[from] io::Error),
}

impl From<Errno> for SessionError {
    fn from(errno: Errno) -> Self {
        Self::Process(errno.into())
    }
}

/// Serves one connection to its end. `wake` and `end_vm` are called when the launcher wants the VM to take on an identity, or to
/// end.
pub fn serve(
    connection: OwnedFd,
    gate: &Gate,
    wake: impl Fn(&Identity) -> Result<(), WakeError>,
    end_vm: impl Fn(Ending) -> io::Result<()>,
) -> Result<(), SessionError> {
    let mut link = AgentLink::new(connection)?;
    let request = match link.exchange(PATIENCE) {
        Ok(ToAgent::Request(request)) => request,
        Ok(_) => return Err(SessionError::NoRequest),
        // Whoever writes a launcher wants to know.
        Err(LinkError::Protocol(error @ ProtoError::Payload { .. })) => {
            link.queue(&failed(&error))?;
            return Ok(link.finish(PATIENCE)?);
        }
        Err(error) => return Err(error.into()),
    };
    let (reply, ending) = match request {
        Request::Ping => (FromAgent::Reply(Reply::Pong { version: VERSION }), None),
        Request::Wake(identity) => (gate.wake(|| wake(&identity)).map_or_else(|error| failed(&error), |()| DONE), None),
        Request::PowerOff => (DONE, Some(Ending::PowerOff)),
        Request::Reboot => (DONE, Some(Ending::Reboot)),
        Request::Forward { port } => (start_forward(port), None),
        Request::Run(_) | Request::Home { .. } if !gate.is_awake() => (failed(&ASLEEP), None),
        Request::Home { user, source } => {
            (home::keep(&user, source.as_ref()).map_or_else(|error| failed(&error), |()| DONE), None)
        }
        Request::Run(run) => {
            let result = serve_run(&mut link, &run);
            if run.then_power_off {
                end_vm(Ending::PowerOff)?;
            }
            return result;
        }
    };
    link.queue(&reply)?;
    let finished = link.finish(PATIENCE);
    if let Some(ending) = ending {
        end_vm(ending)?;
    }
    Ok(finished?)
}

/// Why nothing runs in a VM that does not know that it is not its twin.
const ASLEEP: &str = "the VM has not been woken since it was booted or restored: send it an identity first";

fn start_forward(port: u16) -> FromAgent {
    forward::start(port, || sys::vsock_connect(sys::CID_HOST, FORWARD_PORT))
        .map_or_else(|error| failed(&format!("cannot listen on port {port} in the VM: {error}")), |()| DONE)
}

const DONE: FromAgent = FromAgent::Reply(Reply::Done);

fn failed(error: &impl ToString) -> FromAgent {
    FromAgent::Reply(Reply::Failed { message: error.to_string() })
}

fn serve_run(link: &mut AgentLink, run: &Run) -> Result<(), SessionError> {
    let spawned = process::command(run).and_then(|(mut command, account)| {
        let explain = |source| process::explain(run, source);
        let terminal = match run.terminal {
            Some(window) => Some(terminal::give(&mut command, &account, window).map_err(explain)?),
            None => {
                command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
                None
            }
        };
        Ok((command.spawn().map_err(explain)?, terminal))
    });
    let last = match spawned {
        Err(error) => failed(&error),
        Ok((child, terminal)) => {
            let mut relay = Relay::new(child, terminal)?;
            link.queue(&FromAgent::Reply(Reply::Started { pid: relay.child.id() }))?;
            FromAgent::Exit(relay.run(link)?)
        }
    };
    link.queue(&last)?;
    Ok(link.finish(PATIENCE)?)
}

/// One of the two output pipes, or the terminal.
struct Output {
    pipe: Box<dyn ReadPipe>,
    wrap: fn(Vec<u8>) -> FromAgent,
    /// Bytes read after the process had ended.
    late: usize,
}

trait ReadPipe: Read + AsFd {}
impl<T: Read + AsFd> ReadPipe for T {}

trait WritePipe: Write + AsFd {}
impl<T: Write + AsFd> WritePipe for T {}

/// A process and what is on the way to and from it.
struct Relay {
    child: Child,
    pidfd: OwnedFd,
    group: Option<Pid>,
    stdin: Option<Box<dyn WritePipe>>,
    /// The one it has, if any.
    terminal: Option<File>,
    pending: VecDeque<u8>,
    stdin_ends: bool,
    /// Input the process has taken and the launcher may send again, not yet told.
    credit: usize,
    outputs: [Option<Output>; 2],
    exit: Option<ExitStatus>,
}

impl Drop for Relay {
    /// Whatever happens, nothing of the process group stays behind unseen.
    fn drop(&mut self) {
        if self.exit.is_none() {
            self.signal(Signal::KILL);
            let _ = self.child.wait();
        }
    }
}

impl Relay {
    fn new(mut child: Child, terminal: Option<File>) -> Result<Self, SessionError> {
        let group = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        let pidfd = pidfd_open(group.ok_or(Errno::SRCH)?, PidfdFlags::empty())?;
        let mut stdin: Option<Box<dyn WritePipe>> = child.stdin.take().map(|pipe| Box::new(pipe) as _);
        let output = |pipe, wrap| Output { pipe, wrap, late: 0 };
        let stdout = child.stdout.take().map(|pipe| output(Box::new(pipe), FromAgent::Stdout));
        let stderr = child.stderr.take().map(|pipe| output(Box::new(pipe), FromAgent::Stderr));
        let mut outputs = [stdout, stderr];
        if let Some(terminal) = &terminal {
            stdin = Some(Box::new(terminal.try_clone()?));
            outputs = [Some(output(Box::new(terminal.try_clone()?), FromAgent::Stdout)), None];
        }
        for pipe in outputs.iter().flatten() {
            ioctl_fionbio(&pipe.pipe, true)?;
        }
        if let Some(pipe) = &stdin {
            ioctl_fionbio(pipe, true)?;
        }
        Ok(Self {
            child,
            pidfd,
            group,
            stdin,
            terminal,
            pending: VecDeque::new(),
            stdin_ends: false,
            credit: 0,
            outputs,
            exit: None,
        })
    }

    /// Carries the streams until the process has ended and its output has been read.
    fn run(&mut self, link: &mut AgentLink) -> Result<ExitStatus, SessionError> {
        loop {
            link.flush()?;
            self.grant(link)?;
            if link.is_idle()
                && self.outputs.iter().all(Option::is_none)
                && let Some(exit) = self.exit
            {
                return Ok(exit);
            }
            let ready = self.wait(link)?;
            if ready.link {
                self.receive(link)?;
            }
            self.feed();
            if ready.ended && self.exit.is_none() {
                self.exit = self.child.try_wait()?.map(exit_status);
            }
            self.read_outputs(link)?;
        }
    }

    /// Waits until one of the descriptors has something this loop can act on.
    fn wait(&self, link: &AgentLink) -> Result<Ready, SessionError> {
        let mut set: Vec<(BorrowedFd<'_>, PollFlags)> = vec![(link.as_fd(), link.interest())];
        // Once the process has ended its outputs are read to the end without waiting for them.
        let mut busy = false;
        if self.exit.is_none() {
            set.push((self.pidfd.as_fd(), PollFlags::IN));
        } else {
            busy = link.is_idle();
        }
        if link.is_idle() {
            set.extend(self.outputs.iter().flatten().map(|output| (output.pipe.as_fd(), PollFlags::IN)));
        }
        if let Some(stdin) = self.stdin.as_ref().filter(|_| !self.pending.is_empty()) {
            set.push((stdin.as_fd(), PollFlags::OUT));
        }
        let mut polled: Vec<PollFd<'_>> = set.iter().map(|(fd, flags)| PollFd::from_borrowed_fd(*fd, *flags)).collect();
        let timeout = busy.then(Timespec::default);
        match poll(&mut polled, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let fired = |index: usize| polled.get(index).is_some_and(|fd| !fd.revents().is_empty());
        let link_in = polled.first().is_some_and(|fd| fd.revents().intersects(!PollFlags::OUT));
        Ok(Ready { link: link_in, ended: self.exit.is_none() && fired(1) })
    }

    /// Takes everything the launcher sent.
    fn receive(&mut self, link: &mut AgentLink) -> Result<(), SessionError> {
        let open = link.fill()?;
        while let Some(message) = link.received()? {
            match message {
                ToAgent::Stdin(bytes) if bytes.is_empty() => self.stdin_ends = true,
                ToAgent::Stdin(_) if self.stdin_ends => return Err(SessionError::TooMuchInput),
                ToAgent::Stdin(bytes) => {
                    if bytes.len() > STDIN_WINDOW.saturating_sub(self.pending.len()) {
                        return Err(SessionError::TooMuchInput);
                    }
                    self.pending.extend(bytes);
                }
                ToAgent::Signal(number) => {
                    if let Some(signal) = Signal::from_named_raw(number.into()) {
                        self.signal(signal);
                    }
                }
                ToAgent::Resize(window) => {
                    // A size that the terminal does not take is the launcher's loss.
                    let _ = self.terminal.as_ref().map(|terminal| terminal::resize(terminal, window));
                }
                ToAgent::Request(_) => return Err(SessionError::NoRequest),
            }
        }
        if open { Ok(()) } else { Err(LinkError::Closed.into()) }
    }

    /// Writes what is pending to standard input, and counts what may be granted again.
    fn feed(&mut self) {
        while let Some(stdin) = self.stdin.as_mut().filter(|_| !self.pending.is_empty()) {
            match stdin.write(self.pending.as_slices().0) {
                Ok(count) => {
                    self.pending.drain(..count.min(self.pending.len()));
                    self.credit = self.credit.saturating_add(count);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // The process does not want any more.
                Err(_) => self.stdin = None,
            }
        }
        if self.stdin.is_none() {
            self.credit = self.credit.saturating_add(self.pending.len());
            self.pending.clear();
        } else if self.stdin_ends && self.pending.is_empty() {
            self.stdin = None;
        }
    }

    /// Grants the launcher what the process has taken. Only when the last frame has left: a launcher that sends and never
    /// reads must not fill this queue.
    fn grant(&mut self, link: &mut AgentLink) -> Result<(), SessionError> {
        if self.credit > 0 && link.is_idle() {
            link.queue(&FromAgent::StdinCredit(u32::try_from(self.credit).unwrap_or(u32::MAX)))?;
            self.credit = 0;
            link.flush()?;
        }
        Ok(())
    }

    /// Sends at most one piece of each stream, and only when the last one has left.
    fn read_outputs(&mut self, link: &mut AgentLink) -> Result<(), SessionError> {
        if !link.is_idle() {
            return Ok(());
        }
        let ended = self.exit.is_some();
        for slot in &mut self.outputs {
            let Some(output) = slot else { continue };
            let mut buffer = vec![0; CHUNK];
            let count = match output.pipe.read(&mut buffer) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && !ended => continue,
                Err(_) => 0,
            };
            buffer.truncate(count);
            if ended {
                output.late = output.late.saturating_add(count);
            }
            let over = count == 0 || output.late > LAST_OUTPUT;
            link.queue(&(output.wrap)(buffer))?;
            if over {
                *slot = None;
            }
        }
        Ok(())
    }

    fn signal(&self, signal: Signal) {
        if let Some(group) = self.group {
            let _ = kill_process_group(group, signal);
        }
    }
}

struct Ready {
    link: bool,
    ended: bool,
}

/// How a process ended, as the protocol says it.
pub fn exit_status(status: std::process::ExitStatus) -> ExitStatus {
    match (status.code(), status.signal()) {
        (Some(code), _) => ExitStatus::Code(u8::try_from(code).unwrap_or(u8::MAX)),
        (None, Some(signal)) => ExitStatus::Signal(u8::try_from(signal).unwrap_or(u8::MAX)),
        (None, None) => ExitStatus::Code(u8::MAX),
    }
}

#[cfg(test)]
mod tests {
    use std::{os::unix::net::UnixStream, sync::mpsc, thread};

    use guest_proto::{BootId, Link, MachineId, Seed, Window};

    use super::*;

    type LauncherLink = Link<FromAgent, ToAgent>;

    /// What the launcher saw of one process.
    #[derive(Debug, Default, PartialEq)]
    struct Seen {
        stdout: Vec<u8>,
        stderr: Vec<u8>,
        credit: usize,
        end: Option<FromAgent>,
    }

    struct Session {
        link: LauncherLink,
        thread: thread::JoinHandle<Result<(), SessionError>>,
        endings: mpsc::Receiver<Ending>,
    }

    fn me() -> String {
        let passwd = std::fs::read_to_string("/etc/passwd").unwrap();
        let uid = rustix::process::geteuid().as_raw().to_string();
        let line = passwd.lines().find(|line| line.split(':').nth(2) == Some(&uid)).unwrap();
        line.split(':').next().unwrap().to_owned()
    }

    fn shell(script: &str) -> Run {
        Run {
            argv: vec!["sh".into(), "-c".into(), script.into()],
            env: [("GREETING".to_owned(), "hello".to_owned())].into(),
            user: me(),
            cwd: Some("/".into()),
            terminal: None,
            then_power_off: false,
        }
    }

    fn start(request: Request) -> Session {
        let (a, b) = UnixStream::pair().unwrap();
        let (tell, endings) = mpsc::channel();
        let end = move |ending| tell.send(ending).map_err(io::Error::other);
        let thread = thread::spawn(move || serve(b.into(), &awake(), wake, end));
        let mut link = LauncherLink::new(a.into()).unwrap();
        link.queue(&ToAgent::Request(request)).unwrap();
        Session { link, thread, endings }
    }

    /// Takes on every identity but those of the year 1970.
    fn wake(identity: &Identity) -> Result<(), WakeError> {
        match identity.realtime {
            0 => Err(WakeError::Seed(io::ErrorKind::PermissionDenied.into())),
            _ => Ok(()),
        }
    }

    fn awake() -> Gate {
        let gate = Gate::default();
        gate.wake(|| Ok::<_, SessionError>(())).unwrap();
        gate
    }

    fn identity() -> Identity {
        Identity {
            seed: Seed::new([9; Seed::LEN]),
            realtime: 1,
            machine_id: MachineId::from_random([1; 16]),
            boot_id: BootId::from_random([2; 16]),
            hostname: None,
        }
    }

    fn started(run: Run) -> Session {
        let mut session = start(Request::Run(run));
        let reply = session.link.exchange(20).unwrap();
        assert!(matches!(reply, FromAgent::Reply(Reply::Started { .. })), "{reply:?}");
        session
    }

    impl Session {
        fn send(&mut self, message: &ToAgent) {
            self.link.queue(message).unwrap();
        }

        fn watch(mut self) -> (Seen, Result<(), SessionError>) {
            let mut seen = Seen::default();
            while seen.end.is_none() {
                match self.link.exchange(20).unwrap() {
                    FromAgent::Stdout(bytes) => seen.stdout.extend(bytes),
                    FromAgent::Stderr(bytes) => seen.stderr.extend(bytes),
                    FromAgent::StdinCredit(bytes) => seen.credit += bytes as usize,
                    end => seen.end = Some(end),
                }
            }
            drop(self.link);
            (seen, self.thread.join().unwrap())
        }

        fn end(self) -> FromAgent {
            self.watch().0.end.unwrap()
        }
    }

    #[test]
    fn streams_environment_folder_and_status() {
        let script = r#"echo "$GREETING $PWD ${SECRET-unset} $WAYLAND_DISPLAY"; echo oops >&2; exit 7"#;
        let (seen, result) = started(shell(script)).watch();
        assert_eq!(String::from_utf8_lossy(&seen.stdout), "hello / unset wayland-0\n");
        assert_eq!(seen.stderr, b"oops\n");
        assert_eq!(seen.end, Some(FromAgent::Exit(ExitStatus::Code(7))));
        result.unwrap();
    }

    #[test]
    fn input_is_granted_as_it_is_read() {
        let mut session = started(shell("cat | wc -c"));
        let total = 5 * STDIN_WINDOW;
        let (mut sent, mut granted) = (0, STDIN_WINDOW);
        while sent < total {
            while sent < granted.min(total) {
                let piece = CHUNK.min(granted.min(total) - sent);
                session.send(&ToAgent::Stdin(vec![b'x'; piece]));
                sent += piece;
            }
            match session.link.exchange(20).unwrap() {
                FromAgent::StdinCredit(bytes) => granted += bytes as usize,
                other => panic!("{other:?}"),
            }
        }
        session.send(&ToAgent::Stdin(vec![]));
        let (seen, _) = session.watch();
        assert_eq!(String::from_utf8_lossy(&seen.stdout).trim(), total.to_string());
    }

    #[test]
    fn more_input_than_granted_ends_the_connection_and_the_process() {
        let mut session = started(shell("exec sleep 1000"));
        for _ in 0..4 {
            session.send(&ToAgent::Stdin(vec![0; STDIN_WINDOW - 1]));
        }
        // Credit for what fitted into the pipe may come first.
        while session.link.exchange(20).is_ok() {}
        assert!(matches!(session.thread.join().unwrap(), Err(SessionError::TooMuchInput)));
    }

    #[test]
    fn a_signal_overtakes_input_nobody_reads() {
        let mut session = started(shell("exec sleep 1000"));
        session.send(&ToAgent::Stdin(vec![0; STDIN_WINDOW - 1]));
        session.send(&ToAgent::Signal(15));
        assert_eq!(session.end(), FromAgent::Exit(ExitStatus::Signal(15)));
    }

    #[test]
    fn a_process_that_closes_its_input_still_gets_credit_and_goes_on() {
        let mut session = started(shell("exec <&-; echo done"));
        session.send(&ToAgent::Stdin(vec![0; CHUNK]));
        let (seen, _) = session.watch();
        assert_eq!(seen.stdout, b"done\n");
    }

    #[test]
    fn much_output_arrives_whole() {
        let (seen, _) = started(shell("head -c 3000000 /dev/zero; head -c 1000 /dev/zero >&2")).watch();
        assert_eq!((seen.stdout.len(), seen.stderr.len()), (3_000_000, 1000));
    }

    #[test]
    fn a_background_process_does_not_keep_the_application_alive() {
        let session = started(shell("sleep 1000 & echo $!"));
        let (seen, _) = session.watch();
        assert_eq!(seen.end, Some(FromAgent::Exit(ExitStatus::Code(0))));
        let pid: i32 = String::from_utf8(seen.stdout).unwrap().trim().parse().unwrap();
        rustix::process::kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
    }

    #[test]
    fn the_process_dies_with_the_connection() {
        let session = started(shell("exec sleep 1000"));
        drop(session.link);
        let result = session.thread.join().unwrap();
        assert!(matches!(result, Err(SessionError::Link(LinkError::Closed))), "{result:?}");
    }

    #[test]
    fn a_terminal_has_a_size_and_passes_keys_on() {
        let script = "trap 'stty size; exit 3' WINCH; stty size; test -t 0 -a -t 1 -a -t 2 && ps -o tty= -p $$; \
                      read -r line; echo got $line; while :; do sleep 0.1; done";
        let run = Run { terminal: Some(Window { rows: 33, columns: 111 }), ..shell(script) };
        let mut session = started(run);
        session.send(&ToAgent::Stdin(b"wordx\x7f\r".to_vec()));
        let mut text = String::new();
        let mut resized = false;
        let end = loop {
            match session.link.exchange(20).unwrap() {
                FromAgent::Stdout(bytes) => text += &String::from_utf8_lossy(&bytes),
                FromAgent::StdinCredit(_) => {}
                other => break other,
            }
            if text.contains("got word") && !resized {
                resized = true;
                session.send(&ToAgent::Resize(Window { rows: 22, columns: 99 }));
            }
        };
        assert_eq!(end, FromAgent::Exit(ExitStatus::Code(3)), "{text}");
        // The terminal shows what is typed when it comes, in the midst of what is said.
        assert!(text.contains("33 111\r\n") && text.contains("pts/"), "{text:?}");
        assert!(text.contains("got word\r\n") && text.ends_with("22 99\r\n"), "{text:?}");
    }

    #[test]
    fn keys_of_a_terminal_are_signals() {
        let run = Run { terminal: Some(Window { rows: 24, columns: 80 }), ..shell("echo up; exec sleep 1000") };
        let mut session = started(run);
        while !matches!(session.link.exchange(20).unwrap(), FromAgent::Stdout(_)) {}
        session.send(&ToAgent::Stdin(vec![3]));
        assert_eq!(session.watch().0.end, Some(FromAgent::Exit(ExitStatus::Signal(2))));
    }

    #[test]
    fn what_cannot_be_started_is_one_sentence() {
        let failed = |change: fn(&mut Run)| {
            let mut run = shell("");
            change(&mut run);
            match start(Request::Run(run)).end() {
                FromAgent::Reply(Reply::Failed { message }) => message,
                other => panic!("{other:?}"),
            }
        };
        assert!(failed(|run| run.argv = vec!["no-such-program".into()]).contains("no program no-such-program"));
        assert!(failed(|run| run.argv.clear()).contains("no program was named"));
        assert!(failed(|run| run.user = "nobody-like-this".into()).contains("no user"));
        assert!(failed(|run| run.cwd = Some("/no/such".into())).contains("/no/such"));
        assert!(failed(|run| drop(run.env.insert("A=B".into(), "".into()))).contains("A=B"));
    }

    #[test]
    fn ping_power_and_what_comes_first() {
        assert_eq!(start(Request::Ping).end(), FromAgent::Reply(Reply::Pong { version: VERSION }));
        for (request, ending) in [(Request::PowerOff, Ending::PowerOff), (Request::Reboot, Ending::Reboot)] {
            let mut session = start(request);
            assert_eq!(session.link.exchange(20).unwrap(), FromAgent::Reply(Reply::Done));
            drop(session.link);
            assert_eq!(session.endings.recv().unwrap(), ending);
        }
        let (a, b) = UnixStream::pair().unwrap();
        let mut link = LauncherLink::new(a.into()).unwrap();
        link.queue(&ToAgent::Signal(9)).unwrap();
        link.flush().unwrap();
        assert!(matches!(serve(b.into(), &awake(), wake, |_| Ok(())), Err(SessionError::NoRequest)));
    }

    #[test]
    fn identities_are_taken_on_or_it_is_said_why_not() {
        assert_eq!(start(Request::Wake(identity())).end(), DONE);
        let message = "cannot seed the VM's random numbers: permission denied".into();
        let impossible = Identity { realtime: 0, ..identity() };
        assert_eq!(start(Request::Wake(impossible)).end(), FromAgent::Reply(Reply::Failed { message }));
    }

    #[test]
    fn nothing_runs_in_a_vm_that_was_not_woken() {
        let gate = Gate::default();
        let end_vm = |_| panic!("it ends");
        let ask = |request| {
            let (a, b) = UnixStream::pair().unwrap();
            let mut link = LauncherLink::new(a.into()).unwrap();
            link.queue(&ToAgent::Request(request)).unwrap();
            thread::scope(|scope| {
                let agent = scope.spawn(|| serve(b.into(), &gate, wake, end_vm));
                let answer = link.exchange(20).unwrap();
                drop(link);
                let _ = agent.join().unwrap();
                answer
            })
        };
        let mut run = shell("");
        run.then_power_off = true;
        let asleep = FromAgent::Reply(Reply::Failed { message: ASLEEP.into() });
        assert_eq!(ask(Request::Run(run)), asleep);
        assert_eq!(ask(Request::Ping), FromAgent::Reply(Reply::Pong { version: VERSION }));
        assert_eq!(ask(Request::Wake(identity())), DONE);
        let answer = ask(Request::Run(shell("")));
        assert!(matches!(answer, FromAgent::Reply(Reply::Started { .. })), "{answer:?}");
        gate.sleep();
        assert_eq!(ask(Request::Run(shell(""))), asleep);
    }

    #[test]
    fn a_request_that_makes_no_sense_is_answered() {
        let (a, b) = UnixStream::pair().unwrap();
        let thread = thread::spawn(move || serve(b.into(), &awake(), wake, |_| Ok(())));
        let payload = br#"{"wake":{"seed":"00","realtime":1,"machine_id":"","boot_id":""}}"#;
        let frame = [&u32::try_from(payload.len() + 1).unwrap().to_le_bytes()[..], &[1], payload].concat();
        (&a).write_all(&frame).unwrap();
        let mut link = LauncherLink::new(a.into()).unwrap();
        let answer = link.exchange(20).unwrap();
        let FromAgent::Reply(Reply::Failed { message }) = &answer else { panic!("{answer:?}") };
        assert!(message.contains("64 hexadecimal digits"), "{message}");
        drop(link);
        thread.join().unwrap().unwrap();
    }

    #[test]
    fn the_vm_ends_with_the_application_even_if_the_launcher_is_gone() {
        let mut run = shell("exec sleep 1000");
        run.then_power_off = true;
        let session = started(run);
        drop(session.link);
        assert_eq!(session.endings.recv().unwrap(), Ending::PowerOff);
    }
}
