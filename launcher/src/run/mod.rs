//! Runs one application in a VM of its own, from start to end.
//!
//! One thread and one poll loop for everything: the VMM's end, its messages, the guest's console, signals, and the
//! application's streams. Nothing is left behind: the VMM is a child that is ended and waited for, its sockets are in a
//! private folder that goes away.

mod folder;
mod grants;
mod identity;
mod journal;
pub mod network;
pub mod options;
mod process;
mod relay;
mod signals;
mod state;
mod tail;
mod vm;
pub mod vms;
mod warm;

use std::{path::Path, process::ExitCode};

use guest_proto::{ExitStatus, FORWARD_PORT, IdentityError, LinkError, Request, Run};
use options::Settings;
use relay::Relay;
use signals::Signals;
use vm::Vm;
use warm::Warm;

use crate::{
    apps::Network,
    cli::{RunOptions, WarmOptions},
    home::Home,
    progress, template,
};

/// Why the application was not run to its end.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    #[error(transparent)]
    Template(#[from] template::TemplateError),
    #[error(transparent)]
    Options(#[from] options::OptionsError),
    #[error(transparent)]
    Folder(#[from] folder::FolderError),
    #[error(transparent)]
    Vm(#[from] vm::VmError),
    #[error(transparent)]
    Vms(#[from] vms::VmsError),
    #[error(transparent)]
    Grant(#[from] grants::GrantError),
    #[error(transparent)]
    Network(#[from] network::NetworkError),
    #[error(transparent)]
    Warm(#[from] warm::WarmError),
    #[error("lost the agent in the VM: {0}")]
    Agent(#[from] LinkError),
    #[error(transparent)]
    Identity(#[from] IdentityError),
    #[error("{0}")]
    Application(String),
    #[error("cannot {what}: {source}")]
    Io { what: &'static str, source: std::io::Error },
    /// The user wants it to end. Not printed.
    #[error("ended by signal {0}")]
    Interrupted(i32),
}

/// What is told about a failed system call.
fn io_error<E: Into<std::io::Error>>(what: &'static str) -> impl Fn(E) -> RunError {
    move |source| RunError::Io { what, source: source.into() }
}

/// Runs the application and gives its exit status, as a shell would.
pub fn run(home: &Home, options: &RunOptions) -> Result<ExitCode, RunError> {
    if let Some(name) = &options.place.vm {
        return vms::run_in(name, options);
    }
    let settings = Settings::new(home, options)?;
    // Before anything is started, or a signal could leave it behind.
    let signals = Signals::new().map_err(io_error("receive signals"))?;
    let mut vm = start(home, &settings, &signals, options)?;
    let result = in_vm(&mut vm, &signals, &settings, options);
    match result {
        Ok(status) => {
            vm.wait_for_end(&signals);
            Ok(exit_code(status))
        }
        Err(RunError::Interrupted(signal)) => Ok(ExitCode::from(status_of_signal(signal))),
        // When the VMM is gone, that is the reason for whatever failed.
        Err(RunError::Agent(error)) => Err(vm.reason_for_loss().map_or(RunError::Agent(error), RunError::Vm)),
        Err(error) => Err(error),
    }
}

/// Says how the VM is started.
fn tell(text: &str) {
    if !progress::is_quiet() {
        eprintln!("spectrum: {text}");
    }
}

/// A clone of the warm template, or, where that cannot be, a VM that boots.
fn start(home: &Home, settings: &Settings, signals: &Signals, options: &RunOptions) -> Result<Vm, RunError> {
    if options.boot {
        return Vm::boot(settings);
    }
    if let Some(why) = settings.boots_because() {
        tell(&format!("booting: {why}"));
        return Vm::boot(settings);
    }
    let cloned = Warm::of(home, settings).and_then(|warm| {
        let mut zygote = warm.ready(settings, signals, tell)?;
        Vm::clone_of(&mut zygote, warm.log(), settings)
    });
    match cloned {
        // Booting would not help.
        Err(error @ (RunError::Interrupted(_) | RunError::Folder(_))) => Err(error),
        Err(error) => {
            tell(&format!("booting, since a clone is not to be had: {error}"));
            Vm::boot(settings)
        }
        cloned => cloned,
    }
}

/// Warms a template, so that VMs of it are clones.
pub fn warm(home: &Home, options: &WarmOptions) -> Result<(), RunError> {
    let settings = Settings::to_warm(home, options)?;
    let signals = Signals::new().map_err(io_error("receive signals"))?;
    Warm::of(home, &settings)?.ready(&settings, &signals, tell)?;
    Ok(())
}

/// Ends and removes what was warmed of templates that are gone or have changed. Prints what.
pub fn sweep(home: &Home, vmm: Option<&Path>) -> Result<(), RunError> {
    let vmm = options::find_vmm(vmm)?;
    let gone = warm::sweep(home, warm::current(home, &vmm)).map_err(io_error("remove what was warmed"))?;
    gone.iter().for_each(|name| println!("{name}"));
    Ok(())
}

/// Ends and removes all that was warmed of a template.
pub fn cool(home: &Home, template: &str) -> Result<(), RunError> {
    let prefix = format!("{template}@");
    warm::sweep(home, |what| !what.starts_with(&prefix)).map_err(io_error("remove what was warmed"))?;
    Ok(())
}

fn in_vm(vm: &mut Vm, signals: &Signals, settings: &Settings, options: &RunOptions) -> Result<ExitStatus, RunError> {
    vm.wait_for_agent(signals)?;
    identity::give(vm.connect()?, &settings.hostname)?;
    if !settings.grants.is_empty() {
        let mut api = vm.api().map_err(grants::GrantError::Vmm)?;
        settings.grants.iter().try_for_each(|grant| grant.give(&mut api).map(drop))?;
    }
    if let Network::Host(port) = settings.network {
        network::relay_port(&vm.path_of(FORWARD_PORT), port).map_err(io_error("listen for the VM"))?;
        network::forward(vm.connect()?, port)?;
    }
    if let Some(why) = vm.network_lost() {
        tell(&format!("there is no network, since passt ended: {why}"));
    }
    vm.is_ready()?;
    let request = Request::Run(Run {
        argv: options.command.clone(),
        env: settings.environment.clone(),
        user: options.user.clone(),
        cwd: options.cwd.clone(),
        then_power_off: true,
    });
    let mut relay = Relay::start(vm.connect()?, request)?;
    relay.run(vm, signals)
}

fn exit_code(status: ExitStatus) -> ExitCode {
    match status {
        ExitStatus::Code(code) => ExitCode::from(code),
        ExitStatus::Signal(signal) => ExitCode::from(status_of_signal(signal.into())),
    }
}

/// What a shell reports for a process that a signal ended.
fn status_of_signal(signal: i32) -> u8 {
    u8::try_from(signal.saturating_add(128)).unwrap_or(u8::MAX)
}
