//! The control thread: owns the machine, answers requests, hears of signals, input and what the guest does.

mod event_loop;
mod grants;
mod saving;
mod writer;

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use hypervisor::Hypervisor;
use passthrough::{GrantError, Grants};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use virtio_devices::gpu::RendererFactory;
use vmm_api::{Failure, PingInfo, Reply, Request, Response, Server, VmInfo, VmState};
use vmm_config::{HostFacts, ProblemKind, VmConfig};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use writer::Writer;

use crate::build::{BuildError, Chassis, Confinement, Ingredients, Saved};
use crate::events::EventMonitor;
use crate::lifecycle::{Decision, decide};
use crate::machine::{Machine, MachineEvent};
use crate::plan::{Plan, PlanError, PlanFacts};
use crate::sandbox::{Files, LandlockError};
use crate::snapshot::SnapshotError;
use crate::stream::{Stream, StreamError};

/// Why the VMM cannot do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// The configuration makes no sense.
    #[error("{}", .0.join("\n"))]
    Config(Vec<String>),
    /// KVM cannot be used.
    #[error(transparent)]
    Hypervisor(#[from] hypervisor::Error),
    /// The machine does not fit.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The machine cannot be built.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// Serial port or console cannot be opened.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// The process cannot be confined to the machine's files.
    #[error(transparent)]
    Landlock(#[from] LandlockError),
    /// The snapshot cannot be taken, or not be used.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// A file or directory cannot be granted, or taken back.
    #[error(transparent)]
    Grant(#[from] GrantError),
    /// Not now.
    #[error("{0}")]
    State(String),
    /// The event loop failed.
    #[error("the VMM cannot wait for events: {0}")]
    Events(String),
}

/// What a user should know when a guest fails on a KVM that works without the CPU's help.
const SOFTWARE_ONLY: &str = "this host's KVM works without hardware virtualisation (the CPU has neither vmx nor svm), \
                             and unmodified kernels do not run on that; use a host with virtualisation enabled";

/// How the VMM came to its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The guest powered off, or the VMM was asked to end.
    Ended,
    /// The machine failed, and why.
    Failed(String),
}

/// What a machine said, and which machine it was: events of one that is gone are stale.
type Told = (u64, MachineEvent);

/// A machine that was created, booted or not.
struct Created {
    config: VmConfig,
    serial: Option<Stream>,
    console: Option<Stream>,
    /// Descriptors that were handed down, by the identifier of their device.
    handed: BTreeMap<String, OwnedFd>,
    /// What was granted through each device, by its identifier: it stays when the machine is started anew.
    grants: BTreeMap<String, Grants>,
    machine: Option<Machine>,
    paused: bool,
}

/// The VMM: at most one machine, and who may say what becomes of it.
pub struct Vmm {
    hypervisor: Arc<dyn Hypervisor>,
    renderer: Box<dyn RendererFactory>,
    confinement: Box<dyn Confinement>,
    files: Files,
    /// Sockets the process removes when it ends.
    own_sockets: Vec<PathBuf>,
    monitor: Option<EventMonitor>,
    created: Option<Created>,
    server: Option<Server>,
    signals: Option<UnixStream>,
    /// Ends the VMM with whoever has its other end.
    owner: Option<OwnedFd>,
    events: (Sender<Told>, Receiver<Told>, EventFd),
    generation: u64,
    outcome: Option<Outcome>,
    /// Who writes a live snapshot.
    writer: Option<Writer>,
}

/// What is told about the process, whatever machine it runs.
const ANY_MACHINE: u64 = u64::MAX;

impl Vmm {
    /// A VMM without a machine.
    ///
    /// # Errors
    /// If the process has no file descriptor left, or signals cannot be handled.
    pub fn new(
        hypervisor: Arc<dyn Hypervisor>,
        renderer: Box<dyn RendererFactory>,
        confinement: Box<dyn Confinement>,
    ) -> Result<Self, VmmError> {
        hypervisor::kvm::install_kick_handler()?;
        let wake = EventFd::new(EFD_NONBLOCK).map_err(|e| VmmError::Events(e.to_string()))?;
        let (sender, receiver) = channel();
        Ok(Self {
            hypervisor,
            renderer,
            confinement,
            files: Files::default(),
            own_sockets: Vec::new(),
            monitor: None,
            created: None,
            server: None,
            signals: None,
            owner: None,
            events: (sender, receiver, wake),
            generation: 0,
            outcome: None,
            writer: None,
        })
    }

    /// Answers requests on `server`.
    pub fn serve(&mut self, server: Server) {
        self.server = Some(server);
    }

    /// Tells `monitor` of what happens.
    pub fn tell(&mut self, monitor: EventMonitor) {
        self.monitor = Some(monitor);
        self.event("vmm", "starting");
    }

    /// The process removes the socket at `path` when it ends; Landlock is to allow that.
    pub fn own_socket(&mut self, path: PathBuf) {
        self.own_sockets.push(path);
    }

    /// A function, for whatever thread, that ends the machine and the VMM with an error.
    pub fn fail_with(&self) -> impl Fn(String) + Send + Sync + 'static {
        let report = self.reporter(ANY_MACHINE);
        move |why| report(MachineEvent::Fault(why))
    }

    /// Ends the VMM when something arrives on `signals`.
    pub fn end_on(&mut self, signals: UnixStream) {
        self.signals = Some(signals);
    }

    /// Ends the VMM when the other end of `owner`, a socket or a pipe, is closed: at the latest with the process that has it.
    pub fn end_with(&mut self, owner: OwnedFd) {
        self.owner = Some(owner);
    }

    /// Waits until there is something to read from `fd`; false if something arrives on [`Vmm::end_on`]'s socket first.
    ///
    /// # Errors
    /// If it cannot be waited for.
    pub(crate) fn wait_for(&self, fd: impl AsFd) -> Result<bool, VmmError> {
        let signals = self.signals.iter().map(|signals| PollFd::new(signals, PollFlags::IN));
        let mut fds: Vec<_> = [PollFd::new(&fd, PollFlags::IN)].into_iter().chain(signals).collect();
        loop {
            match poll(&mut fds, None) {
                Ok(_) => return Ok(fds.iter().skip(1).all(|signals| signals.revents().is_empty())),
                Err(Errno::INTR) => {}
                Err(e) => return Err(VmmError::Events(e.to_string())),
            }
        }
    }

    fn state(&self) -> Option<VmState> {
        self.created.as_ref().map(|c| match (&c.machine, c.paused) {
            (None, _) => VmState::Created,
            (Some(_), false) => VmState::Running,
            (Some(_), true) => VmState::Paused,
        })
    }

    /// Defines the machine and opens its streams, so that a pseudo-terminal has its path from now on.
    ///
    /// # Errors
    /// If the definition makes no sense, or a stream cannot be opened.
    pub fn create(&mut self, config: VmConfig) -> Result<(), VmmError> {
        self.create_with(config, BTreeMap::new())
    }

    /// As [`Vmm::create`]; `handed` are descriptors for the machine's devices, by their identifiers.
    ///
    /// # Errors
    /// As [`Vmm::create`].
    pub fn create_with(&mut self, mut config: VmConfig, handed: BTreeMap<String, OwnedFd>) -> Result<(), VmmError> {
        let facts = host_facts(&config, self.hypervisor.capabilities().max_vcpus);
        // What is to be booted may be missing until then.
        let problems = config.check(&facts).into_iter().filter(|p| p.kind != ProblemKind::NoPayload);
        let problems: Vec<String> = problems.map(|p| p.to_string()).collect();
        if !problems.is_empty() {
            return Err(VmmError::Config(problems));
        }
        if config.cpus.max_vcpus > config.cpus.boot_vcpus {
            let cpus = &config.cpus;
            log::warn!(
                "the guest has {} CPUs; adding more, up to {}, is not possible yet",
                cpus.boot_vcpus,
                cpus.max_vcpus
            );
        }
        let serial = Stream::open(&config.serial)?;
        let console = Stream::open(&config.console)?;
        if let Some(path) = serial.as_ref().and_then(Stream::path) {
            config.serial.file = Some(path.clone());
        }
        if let Some(path) = console.as_ref().and_then(Stream::path) {
            config.console.file = Some(path.clone());
        }
        let grants = BTreeMap::new();
        self.created = Some(Created { config, serial, console, handed, grants, machine: None, paused: false });
        Ok(())
    }

    /// Builds the machine that was created and starts it.
    ///
    /// # Errors
    /// If there is none, or it cannot be built.
    pub fn boot(&mut self) -> Result<(), VmmError> {
        let physical_bits = arch::cpuid::physical_bits(&self.hypervisor.capabilities().cpuid);
        let max_vcpus = self.hypervisor.capabilities().max_vcpus;
        self.event("vm", "booting");
        let created = self.created.as_ref().ok_or_else(no_machine)?;
        let facts = PlanFacts { host: host_facts(&created.config, max_vcpus), physical_bits };
        let missing = created.config.check(&facts.host).into_iter().find(|p| p.kind == ProblemKind::NoPayload);
        if let Some(problem) = missing {
            return Err(VmmError::Config(vec![problem.to_string()]));
        }
        let plan = Plan::new(&created.config, &facts)?;
        self.build(&plan, None)?;
        self.resume()?;
        self.event("vm", "booted");
        Ok(())
    }

    /// Builds the machine that was created; it is paused.
    fn build(&mut self, plan: &Plan, saved: Option<Saved<'_>>) -> Result<(), VmmError> {
        self.generation += 1;
        self.confine()?;
        let chassis = self.chassis(plan, saved)?;
        self.complete(chassis, plan, saved)
    }

    /// From now on the process reaches what the machine that was created needs, if that was asked for.
    fn confine(&mut self) -> Result<(), VmmError> {
        let created = self.created.as_ref().ok_or_else(no_machine)?;
        Ok(self.files.confine(&created.config, &self.own_sockets)?)
    }

    /// Begins the machine that was created.
    fn chassis(&self, plan: &Plan, saved: Option<Saved<'_>>) -> Result<Chassis, VmmError> {
        let created = self.created.as_ref().ok_or_else(no_machine)?;
        Ok(Chassis::new(&self.ingredients(created, plan, saved))?)
    }

    /// Completes the machine that was created; it is paused.
    fn complete(&mut self, chassis: Chassis, plan: &Plan, saved: Option<Saved<'_>>) -> Result<(), VmmError> {
        let created = self.created.as_ref().ok_or_else(no_machine)?;
        let machine = chassis.build(&self.ingredients(created, plan, saved))?;
        if let Some(created) = &mut self.created {
            created.grants.clone_from(&machine.grants);
            (created.machine, created.paused) = (Some(machine), true);
        }
        Ok(())
    }

    fn ingredients<'a>(&'a self, created: &'a Created, plan: &'a Plan, saved: Option<Saved<'a>>) -> Ingredients<'a> {
        Ingredients {
            config: &created.config,
            plan,
            hypervisor: self.hypervisor.as_ref(),
            serial: created.serial.as_ref(),
            console: created.console.as_ref(),
            handed: &created.handed,
            grants: &created.grants,
            renderer: self.renderer.as_ref(),
            confinement: self.confinement.as_ref(),
            report: self.reporter(self.generation),
            saved,
        }
    }

    fn event(&mut self, source: &str, event: &str) {
        if let Some(monitor) = &mut self.monitor {
            monitor.tell(source, event);
        }
    }

    /// What the machine `generation` calls to tell something.
    fn reporter(&self, generation: u64) -> crate::vcpu::Report {
        let sender = self.events.0.clone();
        // A duplicate of the eventfd, so that the machine needs nothing of this struct.
        let wake = self.events.2.try_clone();
        Arc::new(move |event| {
            // The receiver is gone only when the VMM is.
            let _ = sender.send((generation, event));
            if let Ok(wake) = &wake {
                let _ = wake.write(1);
            }
        })
    }

    /// Answers a request, with which `fds` came along.
    fn handle(&mut self, request: Request, fds: Vec<OwnedFd>) -> Response {
        match decide(self.state(), request.action()) {
            Decision::Admit => {}
            Decision::Nothing => return Ok(Reply::Done),
            Decision::Refuse(failure) => return Err(failure),
        }
        self.carry_out(request, fds)
    }

    fn carry_out(&mut self, request: Request, fds: Vec<OwnedFd>) -> Response {
        match request {
            Request::VmmPing => return Ok(Reply::Ping(ping())),
            Request::VmInfo => return self.info(),
            Request::VmmShutdown => {
                self.shut_down();
                self.outcome = Some(Outcome::Ended);
            }
            Request::VmCreate(config) => self.create(*config).map_err(|e| failure(&e))?,
            Request::VmBoot => self.boot().map_err(|e| failure(&e))?,
            Request::VmReboot => self.reboot().map_err(|e| failure(&e))?,
            Request::VmShutdown => self.shut_down(),
            Request::VmDelete => {
                self.shut_down();
                if self.created.take().is_some() {
                    self.event("vm", "deleted");
                }
            }
            Request::VmPause => {
                self.event("vm", "pausing");
                self.with_machine(true, Machine::pause);
                self.event("vm", "paused");
            }
            Request::VmResume => {
                self.event("vm", "resuming");
                self.resume().map_err(|e| failure(&e))?;
                self.event("vm", "resumed");
            }
            Request::VmSnapshot(to) => self.snapshot(&to).map_err(|e| failure(&e))?,
            Request::VmLiveSnapshot(to) => return self.live_snapshot(&to).map(Reply::Forked).map_err(|e| failure(&e)),
            Request::VmWorkingSet(to) => self.working_set(&to).map_err(|e| failure(&e))?,
            Request::VmRestore(from) => self.restore(&from).map_err(|e| failure(&e))?,
            Request::VmAddGrant(grant) => self.add_grant(&grant, fds).map_err(|e| failure(&e))?,
            Request::VmRemoveGrant(grant) => self.remove_grant(&grant).map_err(|e| failure(&e))?,
            // Refused before.
            Request::VmClone(_) => {}
            Request::VmPowerButton => self.with_machine(false, Machine::press_power_button),
        }
        Ok(Reply::Done)
    }

    fn resume(&mut self) -> Result<(), VmmError> {
        let Some(created) = &mut self.created else { return Ok(()) };
        let Some(machine) = &created.machine else { return Ok(()) };
        machine.resume()?;
        created.paused = false;
        Ok(())
    }

    fn with_machine(&mut self, paused: bool, act: impl FnOnce(&Machine)) {
        if let Some(created) = &mut self.created
            && let Some(machine) = &created.machine
        {
            act(machine);
            created.paused = paused;
        }
    }

    fn info(&self) -> Response {
        let created = self.created.as_ref().ok_or(Failure::NotCreated)?;
        let state = self.state().unwrap_or(VmState::Created);
        let config = created.config.clone();
        let memory_actual_size = config.memory.size;
        Ok(Reply::Info(Box::new(VmInfo { config, state, memory_actual_size })))
    }

    fn shut_down(&mut self) {
        let Some(created) = &mut self.created else { return };
        created.paused = false;
        if created.machine.take().is_some() {
            self.event("vm", "shutdown");
        }
    }

    /// Whether the machine has lost memory. If so it stays as it is until the process ends: stopping it would give zeroes to
    /// whoever waits for that memory, perhaps a device in the middle of a write to a disk.
    fn abandon_without_memory(&mut self) -> bool {
        let machine = self.created.as_mut().and_then(|c| c.machine.take_if(|machine| machine.has_lost_memory()));
        let lost = machine.is_some();
        if lost {
            std::mem::forget(machine);
            self.event("vm", "shutdown");
        }
        lost
    }

    fn reboot(&mut self) -> Result<(), VmmError> {
        self.event("vm", "rebooting");
        self.shut_down();
        self.boot()?;
        self.event("vm", "rebooted");
        Ok(())
    }

    fn machine_events(&mut self) {
        let _ = self.events.2.read();
        while let Ok((generation, event)) = self.events.1.try_recv() {
            if ![self.generation, ANY_MACHINE].contains(&generation) {
                continue;
            }
            match event {
                MachineEvent::PowerOff => {
                    log::info!("the guest powered off");
                    self.shut_down();
                    self.outcome = Some(Outcome::Ended);
                }
                MachineEvent::Reset => {
                    log::info!("the guest reboots");
                    if let Err(e) = self.reboot() {
                        self.outcome = Some(Outcome::Failed(format!("cannot boot again: {e}")));
                    }
                }
                MachineEvent::DeviceStarted => self.start_devices(),
                MachineEvent::Fault(why) => {
                    let lost = self.abandon_without_memory();
                    self.shut_down();
                    let why = if self.hypervisor.software_only() && !lost { SOFTWARE_ONLY.into() } else { why };
                    self.outcome = Some(Outcome::Failed(format!("the machine stopped: {why}")));
                }
            }
        }
    }

    fn start_devices(&mut self) {
        // One that is paused does so when it goes on.
        let running = self.created.as_ref().filter(|created| !created.paused);
        let started = running.and_then(|created| created.machine.as_ref()).map_or(Ok(()), Machine::start_devices);
        if let Err(e) = started {
            self.shut_down();
            self.outcome = Some(Outcome::Failed(format!("the machine stopped: {e}")));
        }
    }
}

fn no_machine() -> VmmError {
    VmmError::State("there is no machine".into())
}

fn failure(error: &VmmError) -> Failure {
    Failure::because(error)
}

pub(crate) fn ping() -> PingInfo {
    let version = format!("v{}", env!("CARGO_PKG_VERSION"));
    PingInfo { build_version: version.clone(), version, pid: i64::from(std::process::id()), features: Vec::new() }
}

/// What the configuration's check and the plan need to know of this host.
pub(crate) fn host_facts(config: &VmConfig, max_vcpus: u32) -> HostFacts {
    let info = rustix::system::sysinfo();
    let size = |path: &PathBuf| Some((path.clone(), std::fs::metadata(path).ok()?.len()));
    HostFacts {
        memory: info.totalram.saturating_mul(u64::from(info.mem_unit)),
        page_size: rustix::param::page_size() as u64,
        max_vcpus,
        file_sizes: config.pmem.iter().filter_map(|p| size(&p.file)).collect(),
    }
}
