//! Runs one application in a VM of its own, from start to end.
//!
//! One thread and one poll loop for everything but portals: the VMM's end, its messages, the guest's console, signals, and the
//! application's streams. Nothing is left behind: the VMM is a child that is ended and waited for, its sockets are in a
//! private folder that goes away.

mod calls;
pub mod cgroup;
mod escapes;
pub mod folder;
mod foreign;
pub mod grants;
pub mod homes;
mod identity;
mod journal;
pub mod network;
pub mod options;
mod persist;
pub mod process;
mod relay;
pub mod remembered;
mod signals;
mod state;
mod tail;
mod terminal;
pub mod vm;
pub mod vms;
mod warm;
mod working_set;

use std::{path::Path, process::ExitCode, sync::Arc};

use guest_proto::{CALL_PORT, ExitStatus, FORWARD_PORT, IdentityError, LinkError, Request, Run};
use options::Settings;
use persist::Kept;
use relay::Relay;
use remembered::Remembered;
use signals::Signals;
use vm::Vm;
use warm::Warm;

use crate::{
    apps::Network,
    cli::{RunOptions, WarmOptions},
    doctor,
    home::Home,
    places::Places,
    policy::{DecisionPoint, Service},
    portal::Portals,
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
    Persist(#[from] persist::PersistError),
    #[error(transparent)]
    Remembered(#[from] remembered::RememberedError),
    #[error(transparent)]
    Network(#[from] network::NetworkError),
    #[error(transparent)]
    Warm(#[from] warm::WarmError),
    #[error("{app} is not started: it asks for {key} ({target}), which the policy denies: {because}")]
    Denied { app: String, key: &'static str, target: String, because: String },
    #[error("lost the agent in the VM: {0}")]
    Agent(#[from] LinkError),
    #[error(transparent)]
    Identity(#[from] IdentityError),
    #[error("{0}")]
    NoKvm(String),
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
pub fn run(home: &Home, places: &Places, options: &RunOptions) -> Result<ExitCode, RunError> {
    if let Some(name) = &options.place.vm {
        return vms::run_in(name, options);
    }
    let settings = Settings::new(home, options)?;
    // Before anything is started, or a signal could leave it behind.
    let signals = Signals::new().map_err(io_error("receive signals"))?;
    let point = Arc::new(DecisionPoint::new(places.clone(), &settings.about.app));
    permit(&point, &options.asks)?;
    // Given up after the VM, which is dropped first.
    let mut kept = settings.about.persist.as_ref().map(|name| Kept::take(home, name)).transpose()?;
    let mut vm = start(home, &settings, &signals, options).map_err(explained)?;
    let result = if settings.template.is_foreign() {
        foreign::run(&mut vm, &signals, &settings, kept.as_mut())
    } else {
        in_vm(&mut vm, &signals, &settings, options, kept.as_mut(), &point)
    };
    match result {
        Ok(status) => {
            vm.wait_for_end(&signals);
            Ok(exit_code(status))
        }
        Err(RunError::Interrupted(signal)) => Ok(ExitCode::from(status_of_signal(signal))),
        // When the VMM is gone, that is the reason for whatever failed.
        Err(RunError::Agent(error)) => Err(vm.reason_for_loss().map_or(RunError::Agent(error), RunError::Vm)),
        Err(error) => Err(explained(error)),
    }
}

/// Where no VM can run, that is the reason for whatever failed.
fn explained(error: RunError) -> RunError {
    match error {
        RunError::Vm(_) | RunError::Warm(_) => doctor::no_kvm().map_or(error, RunError::NoKvm),
        error => error,
    }
}

/// Has the policy allow what the app's file asks for. An app that may not have all of it is not started: it would not be the one
/// that the file describes.
fn permit(point: &DecisionPoint, asks: &[(&'static str, Service, String)]) -> Result<(), RunError> {
    for (key, service, target) in asks {
        let verdict = point.decide(*service, target);
        if !verdict.allowed {
            let (app, because) = (point.app().to_owned(), verdict.because);
            return Err(RunError::Denied { app, key, target: target.clone(), because });
        }
    }
    Ok(())
}

/// Says how the VM is started.
fn tell(text: &str) {
    if !progress::is_quiet() {
        eprintln!("spectrum: {text}");
    }
}

/// A clone of the warm template, or, where that cannot be, a VM that boots.
fn start(home: &Home, settings: &Settings, signals: &Signals, options: &RunOptions) -> Result<Vm, RunError> {
    if options.boot || settings.template.is_foreign() {
        return Vm::boot(settings);
    }
    if let Some(why) = settings.boots_because() {
        tell(&format!("booting: {why}"));
        return Vm::boot(settings);
    }
    // To make a template warm takes long, and is in vain without.
    if let Some(why) = doctor::no_kvm() {
        return Err(RunError::NoKvm(why));
    }
    let cloned = Warm::of(home, settings).and_then(|warm| {
        let mut zygote = warm.ready(settings, signals, tell)?;
        Vm::clone_of(&mut zygote, warm.log(), settings, warm.working_set(&settings.about.app))
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

fn in_vm(
    vm: &mut Vm,
    signals: &Signals,
    settings: &Settings,
    options: &RunOptions,
    kept: Option<&mut Kept>,
    point: &Arc<DecisionPoint>,
) -> Result<ExitStatus, RunError> {
    vm.wait_for_agent(signals)?;
    identity::give(vm.connect()?, &settings.hostname)?;
    let remembered = kept.as_ref().map(|kept| Remembered::of(kept.folder()));
    if !settings.grants.is_empty() || kept.is_some() {
        let (mut api, folder) = (vm.api().map_err(grants::GrantError::Vmm)?, vm.folder().folder());
        settings.grants.iter().try_for_each(|grant| grant.give(&mut api, folder).map(drop))?;
        if let Some(kept) = kept {
            kept.used_by(vm.folder().name(), folder)?;
            kept.grant().give(&mut api, folder)?;
            persist::mount(vm.connect()?, &options.user)?;
            vm.keeps(kept.folder())?;
        }
    }
    calls::serve(vm.listen(CALL_PORT)?, point.clone()).map_err(io_error("serve the VM's calls"))?;
    let _ = Portals::start(point.clone(), vm.portal_places(), remembered)
        .inspect_err(|error| log::warn!("no portals for the VM: {error}"));
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
        terminal: None,
        then_power_off: true,
    });
    let mut relay = Relay::start(vm.connect()?, request)?;
    vm.has_application();
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_app_that_may_not_have_what_it_asks_for_is_not_started() {
        let folder = tempfile::tempdir().unwrap();
        let places = Places::at(folder.path());
        let file = places.policies().next().unwrap();
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        std::fs::write(&file, "network web internet allow\n").unwrap();
        let asks = |app: &str, asks: &[_]| permit(&DecisionPoint::new(places.clone(), app), asks);
        let network = ("network", Service::Network, "internet".to_owned());
        asks("web", &[]).unwrap();
        asks("web", std::slice::from_ref(&network)).unwrap();
        let sound = ("sound", Service::Sound, "-".to_owned());
        let error = asks("web", &[network.clone(), sound]).unwrap_err().to_string();
        let expected = "web is not started: it asks for sound (-), which the policy denies: no rule of ";
        assert!(error.starts_with(expected), "{error}");
        let error = asks("mail", &[network]).unwrap_err().to_string();
        assert!(error.contains("asks for network (internet)"), "{error}");
    }
}
