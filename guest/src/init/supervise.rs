//! The processes PID 1 keeps running, and the loop it spends its life in.

use std::{
    io,
    os::{
        fd::OwnedFd,
        unix::{fs::chown, net::UnixListener},
    },
    path::Path,
    process::{Command, Stdio},
};

use guest_proto::Run;
use rustix::process::{Pid, WaitOptions, WaitStatus, wait};
use signal_hook::{
    consts::{SIGCHLD, SIGINT, SIGTERM, SIGUSR2},
    iterator::Signals,
};

use super::{
    cmdline::{Ending, Parameters},
    system::USER,
};
use crate::{
    agent::{accounts, process},
    console::say,
    portal,
};

/// A process that ended this often is not started again.
const STARTS: u32 = 5;

/// Why the VM cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum SuperviseError {
    /// No signals: PID 1 could not see its children end.
    #[error("cannot set up signal handling: {0}")]
    Signals(#[source] io::Error),
    /// Something the VM cannot be without did not start.
    #[error("cannot start {name}: {source}")]
    Start {
        /// What.
        name: &'static str,
        /// The system's reason.
        source: io::Error,
    },
    /// Something the VM cannot be without does not stay up.
    #[error("{0} ended {STARTS} times")]
    KeepsFailing(&'static str),
}

/// What the end of a process means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    /// The VM is of no use without it.
    Vital,
    /// The VM goes on without it.
    Optional,
    /// The VM ends with it.
    Purpose,
}

/// One process kept running.
struct Service {
    name: &'static str,
    role: Role,
    start: Box<dyn Fn() -> io::Result<u32>>,
    pid: Option<Pid>,
    starts: u32,
}

impl Service {
    fn new(name: &'static str, role: Role, start: impl Fn() -> io::Result<u32> + 'static) -> Self {
        Self { name, role, start: Box::new(start), pid: None, starts: 0 }
    }

    fn start(&mut self) -> Result<(), SuperviseError> {
        self.starts += 1;
        self.pid = None;
        match (self.start)() {
            Ok(pid) => self.pid = i32::try_from(pid).ok().and_then(Pid::from_raw),
            Err(error) if self.role == Role::Optional => say!("init: cannot start {}: {error}", self.name),
            Err(source) => return Err(SuperviseError::Start { name: self.name, source }),
        }
        Ok(())
    }

    /// What to do after the process ended: an ending for the VM, or nothing after a restart.
    fn ended(&mut self, status: WaitStatus) -> Result<Option<Ending>, SuperviseError> {
        say!("init: {} ended: {}", self.name, describe(status));
        self.pid = None;
        match self.role {
            Role::Purpose => return Ok(Some(Ending::PowerOff)),
            _ if self.starts < STARTS => self.start()?,
            Role::Vital => return Err(SuperviseError::KeepsFailing(self.name)),
            Role::Optional => say!("init: {} ended {STARTS} times and stays off", self.name),
        }
        Ok(None)
    }
}

fn describe(status: WaitStatus) -> String {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => format!("status {code}"),
        (_, Some(signal)) => format!("signal {signal}"),
        _ => "unknown status".into(),
    }
}

/// Starts everything and stays until the VM shall end.
pub fn run(parameters: &Parameters) -> Result<Ending, SuperviseError> {
    // Before the first child, or its end could go unseen.
    let mut signals =
        Signals::new([SIGCHLD, SIGINT, SIGTERM, SIGUSR2, libc::SIGPWR]).map_err(SuperviseError::Signals)?;
    let mut services = services(parameters);
    for service in &mut services {
        service.start()?;
    }
    for signal in signals.forever() {
        match signal {
            SIGCHLD => {
                if let Some(ending) = reap(&mut services)? {
                    return Ok(ending);
                }
            }
            SIGINT => return Ok(Ending::Reboot),
            _ => return Ok(Ending::PowerOff),
        }
    }
    Ok(Ending::PowerOff)
}

fn reap(services: &mut [Service]) -> Result<Option<Ending>, SuperviseError> {
    while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
        if let Some(service) = services.iter_mut().find(|service| service.pid == Some(pid))
            && let Some(ending) = service.ended(status)?
        {
            return Ok(Some(ending));
        }
    }
    Ok(None)
}

fn services(parameters: &Parameters) -> Vec<Service> {
    let mut services = Vec::new();
    if parameters.debug {
        services.push(Service::new("the debug shell", Role::Optional, debug_shell));
    }
    if Path::new("/dev/dri/renderD128").exists() {
        match wayland_socket() {
            Ok(socket) => services.push(Service::new("the Wayland proxy", Role::Optional, move || {
                start_part("wayland", socket.try_clone()?.into())
            })),
            Err(error) => say!("init: cannot listen for Wayland clients: {error}"),
        }
    } else {
        say!("init: no GPU, so no Wayland");
    }
    match portal::prepare() {
        Ok(None) => say!("init: the template has no session bus"),
        Ok(Some(socket)) => services.push(Service::new("the session bus", Role::Optional, move || {
            start_part("portal", socket.try_clone()?.into())
        })),
        Err(error) => say!("init: cannot listen for clients of the session bus: {error}"),
    }
    if let Some(line) = parameters.exec.clone() {
        services.push(Service::new("the command", Role::Purpose, move || shell_command(&line)));
    } else {
        services.push(Service::new("the agent", Role::Vital, || start_part("agent", Stdio::null())));
    }
    services
}

/// Starts another part of this binary, which may have no name any more.
fn start_part(part: &str, stdin: Stdio) -> io::Result<u32> {
    Ok(Command::new("/proc/self/exe").arg(part).stdin(stdin).spawn()?.id())
}

fn debug_shell() -> io::Result<u32> {
    Ok(Command::new("setsid").args(["--ctty", "--wait", "/bin/sh"]).spawn()?.id())
}

fn shell_command(line: &str) -> io::Result<u32> {
    let run = Run {
        argv: vec!["/bin/sh".into(), "-c".into(), line.into()],
        env: [].into(),
        user: USER.into(),
        cwd: None,
        terminal: None,
        then_power_off: true,
    };
    Ok(process::command(&run).map_err(io::Error::other)?.0.spawn()?.id())
}

/// The socket applications look for. Made here and handed down, so that it is there before the first application, and
/// stays when the proxy has to be started again.
fn wayland_socket() -> io::Result<OwnedFd> {
    let account = accounts::find(USER)?;
    let path = account.runtime_folder().join(process::WAYLAND_DISPLAY);
    let listener = UnixListener::bind(&path)?;
    chown(&path, Some(account.uid), Some(account.gid))?;
    Ok(listener.into())
}
