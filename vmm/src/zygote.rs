//! The zygote: a small process that has a template's memory mapped, its state parsed, KVM open and the system-call
//! filters compiled. For each clone it forks, and the child builds a machine from what is there already.
//!
//! ```text
//!   vm.clone + descriptors ──▶ zygote ──fork──▶ clone: closes what is not its own, builds, confines itself, runs
//! ```
//! It has one thread, so that a child has all of it, and runs no guest: a guest of a clone can reach its own process
//! only. A clone is a process like any other VMM, with its own sockets, which whoever asked for it hands in.

mod pool;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use hypervisor::Hypervisor;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, fstat};
use rustix::io::Errno;
use signal_hook::SigId;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use virtio_devices::gpu::RendererFactory;
use vmm_api::{CloneInfo, Failure, Reply, Request, Response, Server};
use vmm_config::{CloneConfig, ConsoleMode, ProblemKind, ZygoteConfig};

use pool::{Pool, Seat};

use crate::build::Confinement;
use crate::control::{Outcome, Vmm, VmmError, host_facts, ping};
use crate::process;
use crate::snapshot::{Snapshot, SnapshotError, Template, WorkingSet};

/// How long nobody may want a clone before another is made for the pool: who has just got one is to have the CPUs.
const QUIET: Timespec = Timespec { tv_sec: 0, tv_nsec: 10_000_000 };

/// What every clone is made with.
pub struct Zygote {
    template: Template,
    /// How many clones should wait, and those that do.
    wanted: usize,
    pool: Pool,
    hypervisor: Arc<dyn Hypervisor>,
    /// Makes the engine of a clone's virtio-gpu.
    renderer: fn() -> Box<dyn RendererFactory>,
    /// Confines the thread that calls it, and says how a clone's others are to be.
    confine: Box<Confine>,
    /// What a clone does beside running its machine, such as ending on signals.
    prepare: fn(&mut Vmm) -> Result<(), Failed>,
    /// Descriptors that belong to the whole process: the log's.
    keep: Option<&'static File>,
    /// Where something arrives when the zygote is asked to end, and what makes it.
    signals: (UnixStream, Vec<SigId>),
}

/// What becomes of a process that is forked.
enum Purpose {
    /// The clone that was asked for.
    Known(CloneConfig, Vec<OwnedFd>),
    /// A clone that waits until it is told.
    Told(Seat),
}

impl Purpose {
    /// The descriptors that go with it.
    fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let (fds, seat) = match self {
            Self::Known(_, fds) => (fds.as_slice(), None),
            Self::Told(seat) => (&[][..], Some(seat.as_fd())),
        };
        fds.iter().map(AsFd::as_fd).chain(seat)
    }
}

/// Why a clone ended early.
pub type Failed = Box<dyn std::error::Error>;

/// Confines a clone's control thread and says how its other threads are to be confined.
pub type Confine = dyn Fn() -> Result<Box<dyn Confinement>, Failed>;

impl Zygote {
    /// Reads and verifies the template.
    ///
    /// # Errors
    /// If it cannot be used here, or could not be cloned.
    pub fn new(
        from: &ZygoteConfig,
        hypervisor: Arc<dyn Hypervisor>,
        renderer: fn() -> Box<dyn RendererFactory>,
        confine: Box<Confine>,
        prepare: fn(&mut Vmm) -> Result<(), Failed>,
        keep: Option<&'static File>,
    ) -> Result<Self, VmmError> {
        let directory = from.directory().ok_or_else(|| SnapshotError::Url(from.source_url.clone()))?;
        let snapshot = Snapshot::open(directory)?;
        let capabilities = hypervisor.capabilities();
        snapshot.check_cpu(&capabilities.cpuid)?;
        snapshot.check_copy_on_write()?;
        let facts = host_facts(&snapshot.config, capabilities.max_vcpus);
        let problems = snapshot.config.check(&facts).into_iter().filter(|p| p.kind != ProblemKind::NoPayload);
        let problems: Vec<String> = problems.map(|p| p.to_string()).collect();
        if !problems.is_empty() {
            return Err(VmmError::Config(problems));
        }
        let mut template = Template::load(snapshot, from.prefault)?;
        // A terminal is the zygote's own, and no clone's.
        for stream in [&mut *template.config.serial, &mut template.config.console] {
            if stream.mode == ConsoleMode::Tty {
                stream.mode = ConsoleMode::Null;
            }
        }
        let signals = end_signals().map_err(|e| VmmError::Events(e.to_string()))?;
        let (wanted, pool) = (from.pool.into(), Pool::default());
        Ok(Self { template, wanted, pool, hypervisor, renderer, confine, prepare, keep, signals })
    }

    /// Answers requests until it is told to end.
    ///
    /// # Errors
    /// If it cannot wait for them.
    pub fn run(mut self, mut server: Server) -> Result<(), VmmError> {
        let single = process::only_one_thread().and_then(|()| process::never_wait_for_children());
        single.map_err(|e| VmmError::Events(e.to_string()))?;
        let mut ended = false;
        // Clones that are to be made for the pool: as many as have left it, so that some that fail do not lead to more.
        let mut missing = self.wanted;
        while !ended {
            let mut ready = [PollFd::new(&server, PollFlags::IN), PollFd::new(&self.signals.0, PollFlags::IN)];
            match poll(&mut ready, (missing > 0).then_some(&QUIET)) {
                // Nobody wants anything now.
                Ok(0) => {
                    missing -= 1;
                    self.add_to_pool();
                    continue;
                }
                Ok(_) => ended = ready.last().is_some_and(|signals| !signals.revents().is_empty()),
                Err(Errno::INTR) => continue,
                Err(e) => return Err(VmmError::Events(e.to_string())),
            }
            let result = server.dispatch(&mut |request, fds| match request {
                Request::VmmShutdown => {
                    ended = true;
                    Ok(Reply::Done)
                }
                Request::VmmPing => Ok(Reply::Ping(ping())),
                Request::VmClone(config) => {
                    let response = self.clone_machine(&config, fds);
                    missing = self.wanted.saturating_sub(self.pool.len());
                    response
                }
                other => Err(Failure::Other(vec![format!("a zygote does not answer {}", other.action().name())])),
            });
            result.map_err(|e| VmmError::Events(e.to_string()))?;
        }
        Ok(())
    }

    fn clone_machine(&mut self, config: &CloneConfig, fds: Vec<OwnedFd>) -> Response {
        let fail = |why: String| Failure::Other(vec![why]);
        self.check(config, &fds).map_err(fail)?;
        // Those that wait share what they have.
        let waited = if config.no_share { None } else { self.pool.serve(config, &fds) };
        let pid = match waited {
            Some(pid) => pid,
            None => self.fork(Purpose::Known(config.clone(), fds)).map_err(|e| fail(format!("cannot fork: {e}")))?,
        };
        Ok(Reply::Cloned(CloneInfo { pid: pid.into() }))
    }

    fn add_to_pool(&mut self) {
        let added = Seat::new().and_then(|(seat, socket)| Ok((self.fork(Purpose::Told(seat))?, socket)));
        match added {
            Ok((pid, socket)) => self.pool.add(pid, socket),
            Err(e) => log::warn!("cannot keep another clone waiting: {e}"),
        }
    }

    fn fork(&self, purpose: Purpose) -> io::Result<u32> {
        // A signal that comes before the clone handles its own waits.
        process::hold_end_signals(true)?;
        let forked = process::fork(|| self.be_clone(purpose));
        process::hold_end_signals(false)?;
        forked
    }

    /// Whether each descriptor has one purpose, and the clone a use for it.
    fn check(&self, config: &CloneConfig, fds: &[OwnedFd]) -> Result<(), String> {
        if config.fds.len() != fds.len() {
            return Err(format!("{} descriptors came along, and {} were announced", fds.len(), config.fds.len()));
        }
        let names: BTreeSet<&str> = config.fds.iter().map(String::as_str).collect();
        if names.len() != fds.len() {
            return Err("two descriptors have the same purpose".into());
        }
        let devices = self.template.state.plan.devices.iter().map(|d| d.id.as_str());
        let known: BTreeSet<&str> =
            ["api", "owner", "serial", "console", "working-set"].into_iter().chain(devices).collect();
        let list = || known.iter().copied().collect::<Vec<_>>().join(", ");
        if let Some(name) = names.difference(&known).next() {
            return Err(format!("a descriptor is for {name}, and a clone has {}", list()));
        }
        for (name, fd) in config.fds.iter().zip(fds) {
            let is_of =
                |kinds: &[FileType]| fstat(fd).is_ok_and(|d| kinds.contains(&FileType::from_raw_mode(d.st_mode)));
            match name.as_str() {
                "owner" if !is_of(&[FileType::Socket, FileType::Fifo]) => {
                    return Err("the owner's descriptor is neither a socket nor a pipe".into());
                }
                "working-set" if !is_of(&[FileType::RegularFile]) => {
                    return Err("the working set's descriptor is no file".into());
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// What a child does from the fork to its end.
    fn be_clone(&self, purpose: Purpose) -> u8 {
        // The zygote's, which would be told of the clone's.
        for id in &self.signals.1 {
            signal_hook::low_level::unregister(*id);
        }
        let keep = self.hypervisor.descriptor().into_iter().chain([self.template.memory.as_fd()]);
        let keep: Vec<_> = keep.chain(self.keep.iter().map(AsFd::as_fd)).chain(purpose.descriptors()).collect();
        let closed = process::close_all_but(&keep).map_err(Failed::from);
        let why = match closed.and_then(|()| self.run_clone(purpose)) {
            Ok(Outcome::Ended) => return 0,
            Ok(Outcome::Failed(why)) => why,
            Err(e) => e.to_string(),
        };
        eprintln!("spectrum-vmm: clone {}: {why}", std::process::id());
        1
    }

    fn run_clone(&self, purpose: Purpose) -> Result<Outcome, Failed> {
        let mut vmm = Vmm::new(self.hypervisor.clone(), (self.renderer)(), (self.confine)()?)?;
        (self.prepare)(&mut vmm)?;
        process::hold_end_signals(false)?;
        let share = !matches!(&purpose, Purpose::Known(config, _) if config.no_share);
        let mut chassis = vmm.begin_clone(&self.template, share)?;
        let (config, fds) = match purpose {
            Purpose::Known(config, fds) => (config, fds),
            Purpose::Told(seat) => {
                if !vmm.wait_for(&seat)? {
                    return Ok(Outcome::Ended);
                }
                let Some(told) = seat.hear()? else { return Ok(Outcome::Ended) };
                chassis.set_clocks(&self.template.state)?;
                told
            }
        };
        let mut handed: BTreeMap<String, OwnedFd> = config.fds.iter().cloned().zip(fds).collect();
        let server = handed.remove("api").map(Server::from_listener).transpose()?;
        if let Some(list) = handed.remove("working-set") {
            match WorkingSet::read_from(list.into(), self.template.state.plan.ram.iter().map(|range| range.len).sum()) {
                Ok(set) => chassis.have(&set, &self.template.state.plan),
                Err(e) => log::warn!("the clone has nothing beforehand: {e}"),
            }
        }
        if let Some(owner) = handed.remove("owner") {
            vmm.end_with(owner);
        }
        vmm.finish_clone(chassis, &self.template, &config, handed)?;
        // The guest runs. What it does not need for that comes now.
        if let Some(server) = server {
            vmm.serve(server);
        }
        Ok(vmm.run()?)
    }
}

/// A socket on which something arrives when the process is asked to end.
fn end_signals() -> io::Result<(UnixStream, Vec<SigId>)> {
    let (read, write) = UnixStream::pair()?;
    let register = |signal| signal_hook::low_level::pipe::register(signal, write.try_clone()?);
    Ok((read, [SIGINT, SIGTERM, SIGHUP].into_iter().map(register).collect::<io::Result<_>>()?))
}
