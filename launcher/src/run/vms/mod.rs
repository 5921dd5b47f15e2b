//! Commands about VMs that run: whoever's launcher they belong to, they are found by what is in their folders.

mod list;

use std::{
    collections::BTreeMap,
    io::{self, Write},
    os::fd::{AsFd, BorrowedFd},
    path::PathBuf,
    process::ExitCode,
    time::{Duration, Instant},
};

use guest_proto::{FromAgent, Reply, Request, Run, ToAgent, Window};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    process::Signal,
};
use vmm_api::Client;

use super::{
    RunError, exit_code,
    folder::{self, API, CONSOLE, MESSAGES, VSOCK},
    grants::{self, Grant, GrantError},
    io_error, journal,
    options::{environment, grants_of},
    process::Running,
    relay::{Relay, Waits},
    remembered::Remembered,
    signals::Signals,
    state::State,
    status_of_signal,
    tail::printable,
    terminal,
    vm::{self, VmError},
};
use crate::cli::{GrantOptions, RunOptions, VmCommand};

/// How long a VMM may take to answer, and to end once it was killed; and its launcher to clean up.
const PATIENCE: Duration = Duration::from_secs(10);

/// Lets the account's own shell read standard input, with prompts if that is a terminal.
const SHELL: &str = "exec \"${SHELL:-/bin/sh}\"";

/// Why a VM does not do what is asked.
#[derive(Debug, thiserror::Error)]
pub enum VmsError {
    #[error("there is no VM called {name:?}{hint}")]
    Unknown { name: String, hint: String },
    #[error("the VM {0} ended")]
    Ended(String),
    #[error("the VM {0} does not end though it was killed: its VMM hangs in the kernel")]
    Immortal(String),
    #[error("the VM {0} is not ready yet: wait until `spectrum ps` says that it is running")]
    NotReady(String),
    #[error("--tty needs a terminal for standard input and output")]
    NoTerminal,
    #[error("the home directory {wanted:?} is not the one of the VM {name}: run it in a VM of its own")]
    OtherHome { name: String, wanted: String },
}

/// Carries one of the commands out.
pub fn dispatch(command: VmCommand) -> Result<ExitCode, RunError> {
    match command {
        VmCommand::Ps { json } => list::print(json)?,
        VmCommand::Stop { name, timeout } => Found::by_name(&name)?.stop(Duration::from_secs(timeout.into()))?,
        VmCommand::Kill { name } => Found::by_name(&name)?.kill()?,
        VmCommand::Logs { name } => Found::by_name(&name)?.print_logs()?,
        VmCommand::Exec(options) => {
            let mut env = environment(&options.env)?;
            if options.tty && !terminal::is_there() {
                return Err(VmsError::NoTerminal.into());
            }
            let terminal = options.tty.then(|| with_terminal(&mut env));
            let (argv, user, cwd) = (options.command, options.user, options.cwd);
            return Found::by_name(&options.name)?.exec(Run { argv, env, user, cwd, terminal, then_power_off: false });
        }
        VmCommand::Shell { name, user } => {
            let mut env = BTreeMap::new();
            let terminal = terminal::is_there().then(|| with_terminal(&mut env));
            let argv = ["sh", "-c", SHELL].map(String::from).to_vec();
            let run = Run { argv, env, user, cwd: None, terminal, then_power_off: false };
            return Found::by_name(&name)?.exec(run);
        }
        VmCommand::Grant(options) => grant(options)?,
        VmCommand::Revoke { name, grant } => Found::by_name(&name)?.revoke(&grant)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Runs an application in a VM that runs already.
pub fn run_in(name: &str, options: &RunOptions) -> Result<ExitCode, RunError> {
    let found = Found::by_name(name)?;
    // An app that loses what it means to keep, or misses a file, is worse than one that does not start.
    if let Some(wanted) = options.place.persist.as_ref().filter(|wanted| Some(*wanted) != found.state.persist.as_ref())
    {
        return Err(VmsError::OtherHome { name: name.into(), wanted: wanted.clone() }.into());
    }
    found.give_missing(&grants_of(options))?;
    found.exec(Run {
        argv: options.command.clone(),
        env: environment(&options.env)?,
        user: options.user.clone(),
        cwd: options.cwd.clone(),
        terminal: None,
        then_power_off: false,
    })
}

/// The size of the user's terminal. Programs find out what it can do by its name.
fn with_terminal(environment: &mut BTreeMap<String, String>) -> Window {
    if !environment.contains_key("TERM") {
        let name = std::env::var("TERM").ok().filter(|name| !name.is_empty());
        environment.insert("TERM".into(), name.unwrap_or_else(|| "xterm-256color".into()));
    }
    terminal::window()
}

fn grant(options: GrantOptions) -> Result<(), RunError> {
    let grant = Grant { path: options.path, writable: options.write, called: options.called };
    let found = Found::by_name(&options.name)?;
    let place = grant.give(&mut found.api()?, &found.folder)?;
    writeln!(io::stdout(), "{place}").map_err(io_error("write to standard output"))
}

/// A VM of another launcher.
struct Found {
    folder: PathBuf,
    state: State,
    /// Nothing if there is none yet.
    vmm: Option<Running>,
    launcher: Running,
}

impl Found {
    fn by_name(name: &str) -> Result<Self, RunError> {
        let mut all = folder::running().map_err(io_error("look for running VMs"))?;
        let Some(index) = all.iter().position(|(_, state)| state.name == name) else {
            let names: Vec<&str> = all.iter().map(|(_, state)| state.name.as_str()).collect();
            return Err(VmsError::Unknown { name: name.into(), hint: list::hint(name, &names) }.into());
        };
        let (folder, state) = all.swap_remove(index);
        let ended = || VmsError::Ended(state.name.clone());
        let launcher = state.launcher.open().ok_or_else(ended)?;
        let vmm = state.vmm.map(|vmm| vmm.open().ok_or_else(ended)).transpose()?;
        Ok(Self { folder, state, vmm, launcher })
    }

    fn api(&self) -> Result<Client, GrantError> {
        let mut api = Client::connect(&self.folder.join(API))?;
        api.set_timeout(Some(PATIENCE))?;
        Ok(api)
    }

    /// Lets it have those of `grants` that it does not have yet.
    fn give_missing(&self, grants: &[Grant]) -> Result<(), GrantError> {
        grants::check(grants)?;
        let has = grants::list(&self.folder);
        for grant in grants {
            let name = grant.name()?;
            let path = std::path::absolute(&grant.path)?;
            if !has.iter().any(|had| had.name == name && had.path == path && had.writable == grant.writable) {
                grant.give(&mut self.api()?, &self.folder)?;
            }
        }
        Ok(())
    }

    /// Takes a grant back, and lets the next VM with its home directory not have it either.
    fn revoke(&self, name: &str) -> Result<(), RunError> {
        let had = grants::list(&self.folder).iter().any(|record| record.name == name);
        let revoked = self.api().and_then(|mut api| grants::revoke(&mut api, &self.folder, name));
        let remembered = self.state.kept.as_deref().map(Remembered::of);
        let forgotten = remembered.map_or(Ok(0), |remembered| remembered.forget(|one| one.name == name));
        // It can be remembered and not granted: the policy may have changed.
        if had || !matches!(forgotten, Ok(1..)) {
            revoked?;
        }
        forgotten?;
        Ok(())
    }

    /// Asks the agent to power off, and does without it when that takes too long.
    fn stop(self, time: Duration) -> Result<(), RunError> {
        let asked = self.power_off(time);
        let ended = asked && self.vmm.as_ref().is_none_or(|vmm| vmm.wait(time));
        if !ended {
            eprintln!("spectrum: {} does not power off by itself: ending it", self.state.name);
        }
        self.kill()
    }

    /// Whether the agent heard of it.
    fn power_off(&self, time: Duration) -> bool {
        let Ok(mut link) = vm::connect_within(&self.folder.join(VSOCK), time) else { return false };
        let seconds = u32::try_from(time.as_secs()).unwrap_or(u32::MAX);
        let answer = link.queue(&ToAgent::Request(Request::PowerOff)).and_then(|()| link.exchange(seconds));
        matches!(answer, Ok(FromAgent::Reply(Reply::Done)))
    }

    /// Ends the VMM, and waits until its launcher has removed what there was of it.
    fn kill(self) -> Result<(), RunError> {
        match &self.vmm {
            Some(vmm) => vmm.signal(Signal::KILL),
            // It would only start one.
            None => self.launcher.signal(Signal::TERM),
        }
        if self.vmm.as_ref().is_some_and(|vmm| !vmm.wait(PATIENCE)) {
            return Err(VmsError::Immortal(self.state.name).into());
        }
        // A launcher that has more to do than this is no longer the VM's.
        self.launcher.wait(PATIENCE);
        Ok(())
    }

    fn print_logs(&self) -> Result<(), RunError> {
        let mut text = match (&self.state.zygote_log, self.state.vmm) {
            (Some(log), Some(vmm)) => vm::said_by(vmm.pid, log).iter().flat_map(|line| [line, "\n"]).collect(),
            _ => printable_text(&journal::read(&self.folder.join(MESSAGES))),
        };
        text += &printable_text(&journal::read(&self.folder.join(CONSOLE)));
        io::stdout().write_all(text.as_bytes()).map_err(io_error("write to standard output"))
    }

    /// Runs a command in the VM, with this process's streams.
    fn exec(mut self, run: Run) -> Result<ExitCode, RunError> {
        if !self.state.ready {
            return Err(VmsError::NotReady(self.state.name).into());
        }
        let signals = Signals::new().map_err(io_error("receive signals"))?;
        let result = vm::connect(&self.folder.join(VSOCK))
            .and_then(|link| Relay::start(link, Request::Run(run)))
            .and_then(|mut relay| relay.run(&mut self, &signals));
        match result {
            Ok(status) => Ok(exit_code(status)),
            Err(RunError::Interrupted(signal)) => Ok(ExitCode::from(status_of_signal(signal))),
            // When the VMM is gone, that is the reason for whatever failed.
            Err(RunError::Agent(_) | RunError::Vm(VmError::NoConnection(_)))
                if self.vmm.as_ref().is_none_or(|vmm| vmm.wait(Duration::from_secs(1))) =>
            {
                Err(VmsError::Ended(self.state.name).into())
            }
            Err(error) => Err(error),
        }
    }
}

impl Waits for Found {
    fn wait(
        &mut self,
        signals: &Signals,
        wanted: &[(BorrowedFd<'_>, PollFlags)],
        end: Option<Instant>,
    ) -> Result<Option<Vec<PollFlags>>, RunError> {
        let others = signals.fds().chain(self.vmm.iter().map(|vmm| vmm.fd().as_fd()));
        let others = others.map(|fd| (fd, PollFlags::IN));
        let mut set: Vec<PollFd<'_>> =
            wanted.iter().copied().chain(others).map(|(fd, flags)| PollFd::from_borrowed_fd(fd, flags)).collect();
        let left = end.map(|end| end.saturating_duration_since(Instant::now()));
        let left = left.and_then(|left| Timespec::try_from(left).ok());
        let count = match poll(&mut set, left.as_ref()) {
            Ok(count) => count,
            Err(Errno::INTR) => return Ok(Some(vec![PollFlags::empty(); wanted.len()])),
            Err(errno) => return Err(io_error("wait for the VM")(errno)),
        };
        if let Some(signal) = signals.received() {
            return Err(RunError::Interrupted(signal));
        }
        let happened: Vec<PollFlags> = set.iter().take(wanted.len()).map(PollFd::revents).collect();
        // What the guest still said before its end comes first.
        if happened.iter().all(|flags| flags.is_empty())
            && self.vmm.as_ref().is_some_and(|vmm| vmm.wait(Duration::ZERO))
        {
            return Err(VmsError::Ended(self.state.name.clone()).into());
        }
        Ok((count > 0).then_some(happened))
    }
}

fn printable_text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(&printable(bytes)).into_owned()
}
