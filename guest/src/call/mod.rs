//! Calls of services that other apps offer, for processes in the VM: see "Calls between apps" in the `guest-proto` crate.

mod relay;

use std::{
    ffi::OsString,
    io,
    net::Shutdown,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    process::{Command, ExitCode},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use guest_proto::{CALL_PORT, Call, ExitStatus, FromAgent, FromCaller, Link, LinkError, Reply};
use relay::Relay;

use crate::{agent::exit_status, sys};

/// A process's end of a call.
type CallLink = Link<FromAgent, FromCaller>;

/// Exit status when there was no call.
const FAILURE: u8 = 125;

/// Seconds until the service runs: the user may be asked first, and a VM may be slow.
const PATIENCE: u32 = 300;

/// Connections to a socket that are served at once. More are closed: the launcher carries no more calls of one VM either.
const CONNECTIONS: usize = 16;

/// Why there was no call, or not to its end.
#[derive(Debug, thiserror::Error)]
enum CallError {
    #[error("{}", crate::USAGE)]
    Usage,
    #[error("the host does not listen for calls: {0}")]
    Host(#[source] io::Error),
    #[error("{0}")]
    Refused(String),
    #[error("lost the call: {0}")]
    Link(#[from] LinkError),
    #[error("cannot use {path}: {source}")]
    Socket { path: String, source: io::Error },
    #[error("cannot start {program}: {source}")]
    Start { program: String, source: io::Error },
    #[error("cannot relay the streams: {0}")]
    Stream(#[from] io::Error),
}

/// `call`: connects this process's streams with a service; with `--listen` each connection to a socket with one of its own, for as
/// long as a command runs.
pub fn main(arguments: impl Iterator<Item = OsString>) -> ExitCode {
    finish(run(&texts(arguments)))
}

/// `connect`: connects this process's streams with a socket in the VM. It is what a service of a socket's owner runs.
pub fn connect(arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let arguments = texts(arguments);
    finish(match arguments.as_slice() {
        [path] => connect_to(path).map(|()| ExitStatus::Code(0)),
        _ => Err(CallError::Usage),
    })
}

fn texts(arguments: impl Iterator<Item = OsString>) -> Vec<String> {
    arguments.map(|argument| argument.to_string_lossy().into_owned()).collect()
}

fn finish(result: Result<ExitStatus, CallError>) -> ExitCode {
    match result {
        Ok(ExitStatus::Code(code)) => ExitCode::from(code),
        Ok(ExitStatus::Signal(signal)) => ExitCode::from(signal.saturating_add(128)),
        Err(error) => {
            eprintln!("spectrum-guest: {error}");
            ExitCode::from(FAILURE)
        }
    }
}

fn run(arguments: &[String]) -> Result<ExitStatus, CallError> {
    match arguments {
        [option, socket, app, service, program, rest @ ..] if option == "--listen" => {
            listen(socket, to(app, service))?;
            let mut command = Command::new(program);
            let status =
                command.args(rest).status().map_err(|source| CallError::Start { program: program.clone(), source });
            let _ = std::fs::remove_file(socket);
            Ok(exit_status(status?))
        }
        [app, service] if !app.starts_with('-') => {
            let streams = [io::stdin().as_fd(), io::stdout().as_fd()].map(|fd| fd.try_clone_to_owned());
            let [input, output] = streams;
            place(&to(app, service), input?, output?)
        }
        _ => Err(CallError::Usage),
    }
}

fn to(app: &str, service: &str) -> Call {
    Call { app: app.into(), service: service.into() }
}

/// One call with these streams; what the service says on standard error goes to this process's.
fn place(call: &Call, input: OwnedFd, output: OwnedFd) -> Result<ExitStatus, CallError> {
    let host = sys::vsock_connect(sys::CID_HOST, CALL_PORT).map_err(CallError::Host)?;
    let mut link = CallLink::new(host)?;
    link.queue(&FromCaller::Call(call.clone()))?;
    match link.exchange(PATIENCE)? {
        FromAgent::Reply(Reply::Started { .. }) => {}
        FromAgent::Reply(Reply::Failed { message }) => return Err(CallError::Refused(message)),
        _ => return Err(CallError::Refused("the launcher broke the protocol".into())),
    }
    Relay::new(link, input, output)?.run()
}

/// Serves connections to a socket from now on, for as long as this process lives.
fn listen(path: &str, call: Call) -> Result<(), CallError> {
    let fail = |source| CallError::Socket { path: path.into(), source };
    // For this account alone.
    let mask = rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    let listener = UnixListener::bind(path);
    rustix::process::umask(mask);
    let listener = listener.map_err(fail)?;
    let accept = move || {
        let active = Arc::new(AtomicUsize::new(0));
        for stream in listener.incoming() {
            let stream = match stream {
                Ok(stream) => stream,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return eprintln!("spectrum-guest: no more calls: {error}"),
            };
            if active.fetch_add(1, Ordering::SeqCst) >= CONNECTIONS {
                active.fetch_sub(1, Ordering::SeqCst);
                continue;
            }
            let (call, counter) = (call.clone(), active.clone());
            let started = thread::Builder::new().name("call".into()).spawn(move || {
                if let Err(error) = serve(&call, stream) {
                    eprintln!("spectrum-guest: {error}");
                }
                counter.fetch_sub(1, Ordering::SeqCst);
            });
            if started.is_err() {
                active.fetch_sub(1, Ordering::SeqCst);
            }
        }
    };
    Ok(thread::Builder::new().name("listen".into()).spawn(accept).map(drop)?)
}

fn serve(call: &Call, stream: UnixStream) -> Result<(), CallError> {
    stream.set_nonblocking(true)?;
    let output = stream.try_clone()?;
    place(call, stream.into(), output.into()).map(drop)
}

fn connect_to(path: &str) -> Result<(), CallError> {
    let fail = |source| CallError::Socket { path: path.into(), source };
    let stream = UnixStream::connect(path).map_err(fail)?;
    let writer = stream.try_clone().map_err(fail)?;
    // It ends with the process: when the other side has said all, nobody reads what more there is.
    thread::Builder::new().name("input".into()).spawn(move || {
        let _ = io::copy(&mut io::stdin().lock(), &mut &writer);
        let _ = writer.shutdown(Shutdown::Write);
    })?;
    let mut output = io::stdout().lock();
    relay::copy_unbuffered(&stream, &mut output)?;
    Ok(())
}
