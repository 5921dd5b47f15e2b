//! Portals: the session bus of the VM's applications, and the way from it to the host's portals.
//!
//! Nothing of it runs before an application wants the bus. Its socket is there from the start; whoever connects first makes
//! this part start the bus, and offer it to the launcher. So a VM that needs no bus has none, and those that are clones of one
//! template have buses of their own.
//!
//! The launcher joins the bus and answers there as `org.freedesktop.impl.portal.desktop.spectrum`, the back-end of the VM's own
//! xdg-desktop-portal. See `guest-proto` for how it gets there.

mod bridge;
mod files;

use std::{
    convert::Infallible,
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::{fs::chown, net::UnixListener},
    },
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
};

use guest_proto::Run;
use rustix::{
    event::{PollFd, PollFlags, poll},
    io::Errno,
};

use crate::{
    agent::{accounts, process},
    console::say,
};

/// The account whose bus it is.
const USER: &str = crate::init::USER;

/// The program of the bus.
const BUS: &str = "/usr/bin/dbus-daemon";

/// Hands standard input down as systemd does (sd_listen_fds(3)), which is how the bus takes a socket that exists already.
const START_BUS: &str = "LISTEN_PID=$$ LISTEN_FDS=1 exec dbus-daemon --session --nofork --nopidfile --nosyslog \
                         --address=systemd: 3<&0 0</dev/null";

/// Why there is no bus.
#[derive(Debug, thiserror::Error)]
enum PortalError {
    #[error("cannot wait for applications: {0}")]
    Wait(#[source] io::Error),
    #[error("cannot listen for the launcher: {0}")]
    Listen(#[source] io::Error),
    #[error("cannot start the session bus: {0}")]
    Start(#[source] io::Error),
    #[error(transparent)]
    Command(#[from] process::StartError),
}

/// Puts files in place and makes the socket of the bus. By PID 1, before the first application. None if the template has no bus.
pub fn prepare() -> io::Result<Option<OwnedFd>> {
    if !Path::new(BUS).exists() {
        return Ok(None);
    }
    files::put_in_place()?;
    let account = accounts::find(USER)?;
    let path = bus_path(&account);
    let listener = UnixListener::bind(&path)?;
    chown(&path, Some(account.uid), Some(account.gid))?;
    Ok(Some(listener.into()))
}

fn bus_path(account: &accounts::Account) -> PathBuf {
    account.runtime_folder().join(process::SESSION_BUS)
}

/// Serves until the VM ends. The listening socket is standard input.
pub fn main() -> ExitCode {
    let Err(error) = serve();
    say!("portal: {error}");
    ExitCode::FAILURE
}

fn serve() -> Result<Infallible, PortalError> {
    let account = accounts::find(USER).map_err(PortalError::Start)?;
    bridge::listen(bus_path(&account)).map_err(PortalError::Listen)?;
    loop {
        serve_once(&account)?;
    }
}

/// Waits for the first client, then runs a bus to its end.
fn serve_once(account: &accounts::Account) -> Result<(), PortalError> {
    let listener = io::stdin().as_fd().try_clone_to_owned().map_err(PortalError::Wait)?;
    loop {
        match poll(&mut [PollFd::new(&listener, PollFlags::IN)], None) {
            Ok(_) => break,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(PortalError::Wait(errno.into())),
        }
    }
    // Before the bus, which then knows from its start whether there is somebody to wait for.
    match bridge::offer() {
        Ok(()) => files::announce(account).unwrap_or_else(|error| say!("portal: cannot announce portals: {error}")),
        Err(error) => say!("portal: no portals of the host: {error}"),
    }
    let status = bus_command()?
        .stdin(Stdio::from(listener))
        .spawn()
        .and_then(|mut bus| bus.wait())
        .map_err(PortalError::Start)?;
    say!("portal: the session bus ended: {status}");
    if status.success() { Ok(()) } else { Err(PortalError::Start(io::Error::other(status.to_string()))) }
}

/// What the bus starts has this environment, too: the portal must not ask itself.
fn bus_command() -> Result<Command, PortalError> {
    let run = Run {
        argv: ["/bin/sh", "-c", START_BUS].map(String::from).into(),
        env: [].into(),
        user: USER.into(),
        cwd: None,
        then_power_off: false,
        terminal: None,
    };
    let (mut command, _) = process::command(&run)?;
    for (name, _) in process::USE_PORTALS {
        command.env_remove(name);
    }
    Ok(command)
}
