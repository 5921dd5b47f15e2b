//! The agent: carries out the launcher's requests, see the `guest-proto` crate for the protocol.

pub mod accounts;
mod announce;
mod forward;
mod gate;
mod home;
pub mod process;
mod session;
mod terminal;
mod wake;

use std::{
    io,
    os::fd::OwnedFd,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use gate::Gate;
use guest_proto::{AGENT_PORT, FromAgent, Link, READY_PORT, ToAgent};
use rustix::{
    io::Errno,
    net::{SocketFlags, acceptfrom_with},
};
pub use session::exit_status;

use crate::{console::say, sys};

/// The agent's end of a connection.
type AgentLink = Link<ToAgent, FromAgent>;

/// More connections than this at once are closed unheard.
const CONNECTIONS: usize = 64;

/// Serves until the VM ends.
pub fn main() -> ExitCode {
    let error = match run() {
        Ok(()) => return ExitCode::SUCCESS,
        Err(error) => error,
    };
    say!("agent: {error}");
    ExitCode::FAILURE
}

#[derive(Debug, thiserror::Error)]
enum AgentError {
    #[error("cannot listen on vsock port {AGENT_PORT}: {0}")]
    Listen(#[source] io::Error),
    #[error("cannot accept a connection: {0}")]
    Accept(#[source] io::Error),
    #[error("cannot start a thread: {0}")]
    Thread(#[source] io::Error),
}

fn run() -> Result<(), AgentError> {
    let listener = sys::vsock_listen(AGENT_PORT).map_err(AgentError::Listen)?;
    let gate = Arc::new(Gate::default());
    let announced = gate.clone();
    thread::Builder::new()
        .name("announce".into())
        .spawn(move || announce::keep_announced(&announced, || sys::vsock_connect(sys::CID_HOST, READY_PORT)))
        .map_err(AgentError::Thread)?;
    let active = Arc::new(AtomicUsize::new(0));
    loop {
        let connection = accept(&listener).map_err(AgentError::Accept)?;
        let Some(connection) = connection else { continue };
        gate.knock();
        if active.fetch_add(1, Ordering::SeqCst) >= CONNECTIONS {
            active.fetch_sub(1, Ordering::SeqCst);
            say!("agent: refused a connection, {CONNECTIONS} are open");
            continue;
        }
        let (counter, gate) = (active.clone(), gate.clone());
        let started = thread::Builder::new().name("session".into()).spawn(move || {
            if let Err(error) = session::serve(connection, &gate, wake::wake, crate::init::request_end) {
                say!("agent: {error}");
            }
            counter.fetch_sub(1, Ordering::SeqCst);
        });
        if let Err(error) = started {
            active.fetch_sub(1, Ordering::SeqCst);
            say!("agent: cannot start a thread: {error}");
        }
    }
}

/// The next connection from the host; processes in the VM have no business here.
pub fn accept(listener: &OwnedFd) -> io::Result<Option<OwnedFd>> {
    match acceptfrom_with(listener, SocketFlags::CLOEXEC) {
        Ok((fd, peer)) => {
            let from_host = peer.as_ref().and_then(sys::VsockAddr::from_any).is_some_and(|a| a.cid == sys::CID_HOST);
            Ok(from_host.then_some(fd))
        }
        Err(Errno::INTR | Errno::CONNABORTED) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}
