//! The control thread's verbs on snapshots.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmm_api::ForkInfo;
use vmm_config::{CloneConfig, ConsoleConfig, MemoryRestoreMode, RestoreConfig, SnapshotConfig, VmConfig};

use super::writer::Writer;
use super::{Created, Vmm, VmmError, no_machine};
use crate::build::{Chassis, Saved, SavedMemory};
use crate::machine::Machine;
use crate::memory;
use crate::snapshot::{Copies, Destination, Log, Snapshot, SnapshotError, Source, Template, WorkingSet};
use crate::stream::Stream;

impl Vmm {
    /// Saves the machine, which is paused and stays so.
    ///
    /// # Errors
    /// If there is none, or the directory cannot take it; the machine is as it was.
    pub fn snapshot(&mut self, to: &SnapshotConfig) -> Result<(), VmmError> {
        let directory = to.directory().ok_or_else(|| SnapshotError::Url(to.destination_url.clone()))?;
        self.event("vm", "snapshotting");
        let created = self.created.as_ref().filter(|created| created.paused);
        let machine = created.and_then(|created| created.machine.as_ref().map(|machine| (&created.config, machine)));
        let (config, machine) = machine.ok_or_else(|| VmmError::State("there is no paused machine to save".into()))?;
        let state = machine.save()?;
        Destination::open(directory)?.write(config, &state, machine.ram())?;
        self.event("vm", "snapshotted");
        Ok(())
    }

    /// Makes the machine that a snapshot holds. It is paused, unless it is to go on at once.
    ///
    /// # Errors
    /// If the snapshot cannot be used here; there is no machine then.
    pub fn restore(&mut self, from: &RestoreConfig) -> Result<(), VmmError> {
        let directory = from.directory().ok_or_else(|| SnapshotError::Url(from.source_url.clone()))?;
        self.event("vm", "restoring");
        let snapshot = Snapshot::open(directory)?;
        snapshot.check_cpu(&self.hypervisor.capabilities().cpuid)?;
        let mut config = snapshot.config.clone();
        if from.no_share {
            config.own_copies();
        }
        self.create(config)?;
        let result = self.build_saved(&snapshot, from);
        let result = result.and_then(|()| if from.resume { self.resume() } else { Ok(()) });
        if result.is_err() {
            self.created = None;
            return result;
        }
        self.event("vm", "restored");
        if from.resume {
            self.event("vm", "resumed");
        }
        Ok(())
    }

    fn build_saved(&mut self, snapshot: &Snapshot, from: &RestoreConfig) -> Result<(), VmmError> {
        let memory = &snapshot.memory;
        let mode = if from.no_share { MemoryRestoreMode::Copy } else { from.memory_restore_mode };
        match mode {
            MemoryRestoreMode::Copy => self.build_from(snapshot, SavedMemory::Copy(memory), None),
            MemoryRestoreMode::OnDemand => {
                let source = Source::new(snapshot, from.prefault)?;
                self.build_from(snapshot, SavedMemory::OnDemand(&source), None)
            }
            MemoryRestoreMode::CopyOnWrite => {
                snapshot.check_copy_on_write()?;
                memory.verify()?;
                let file = memory.file().try_clone().map(Arc::new);
                let file = file.map_err(|e| VmmError::State(format!("cannot map the snapshot's memory: {e}")))?;
                let working_set = if from.prefault { Some(snapshot.working_set()?) } else { None };
                self.build_from(snapshot, SavedMemory::CopyOnWrite(&file), working_set.as_ref())
            }
        }
    }

    fn build_from(
        &mut self,
        snapshot: &Snapshot,
        memory: SavedMemory<'_>,
        working_set: Option<&WorkingSet>,
    ) -> Result<(), VmmError> {
        let saved = Saved { state: &snapshot.state, memory, working_set };
        self.build(&snapshot.state.plan, Some(saved))
    }

    /// Begins a machine like the one of `template`; `share`: which has its memory and images in common with others until
    /// it changes them.
    ///
    /// # Errors
    /// If something the configuration names cannot be had.
    pub(crate) fn begin_clone(&mut self, template: &Template, share: bool) -> Result<Chassis, VmmError> {
        let mut config = template.config.clone();
        if !share {
            config.own_copies();
        }
        let (handed, grants) = (BTreeMap::new(), BTreeMap::new());
        self.created =
            Some(Created { config, serial: None, console: None, handed, grants, machine: None, paused: false });
        self.generation += 1;
        self.chassis(&template.state.plan, Some(template.saved(share)))
    }

    /// Completes what [`Vmm::begin_clone`] began, and lets it run. `handed` are descriptors for its serial port, its console
    /// and its devices.
    ///
    /// # Errors
    /// If something the configuration names cannot be had.
    pub(crate) fn finish_clone(
        &mut self,
        chassis: Chassis,
        template: &Template,
        clone: &CloneConfig,
        mut handed: BTreeMap<String, OwnedFd>,
    ) -> Result<(), VmmError> {
        let created = self.created.as_mut().ok_or_else(no_machine)?;
        let config = &mut created.config;
        if let (Some(vsock), Some(path)) = (&mut config.vsock, &clone.vsock_socket) {
            vsock.socket.clone_from(path);
        }
        for gpu in config.gpu.iter_mut().filter(|_| clone.wayland.is_some()) {
            gpu.wayland.clone_from(&clone.wayland);
        }
        // A twin is never on its twin's network, where both would have one address.
        for net in &mut config.net {
            (net.tap, net.socket, net.fd) = (None, None, None);
            if let Some(deny) = &clone.net_deny {
                net.deny.clone_from(deny);
            }
        }
        let mut stream = |name: &str, config: &ConsoleConfig| match handed.remove(name) {
            Some(fd) => Stream::inherited(fd).map(Some),
            None => Stream::open(config),
        };
        (created.serial, created.console) = (stream("serial", &config.serial)?, stream("console", &config.console)?);
        created.handed = handed;
        self.confine()?;
        self.complete(chassis, &template.state.plan, Some(template.saved(!clone.no_share)))?;
        if clone.paused { Ok(()) } else { self.resume() }
    }

    /// Saves the machine, which runs, and stands still only for as long as it takes to fork this process: the child has
    /// the machine's memory as it was then, and writes it.
    ///
    /// # Errors
    /// If the snapshot cannot begin. How it went is told by an event, and by the directory: it holds a snapshot, or none.
    pub(super) fn live_snapshot(&mut self, to: &SnapshotConfig) -> Result<ForkInfo, VmmError> {
        let directory = to.directory().ok_or_else(|| SnapshotError::Url(to.destination_url.clone()))?;
        let not_now = |why: &str| VmmError::State(why.into());
        if self.writer.is_some() {
            return Err(not_now("another live snapshot is being written; wait for its end"));
        }
        let created = self.created.as_ref().ok_or_else(no_machine)?;
        let machine = created.machine.as_ref().ok_or_else(no_machine)?;
        if created.config.memory.shared {
            return Err(not_now(
                "memory.shared=on leaves no copy of the memory as it is now: pause the machine and save it",
            ));
        }
        if let Some(file) = written_by_guest(&created.config) {
            let why =
                format!("{} goes on changing and would not fit: pause the machine and save it then", file.display());
            return Err(VmmError::State(why));
        }
        let destination = Destination::open(directory)?;
        let (writer, paused) = match save_by_copies(&created.config, machine, destination) {
            Ok(result) => result,
            Err(destination) => save_by_fork(&created.config, machine, destination),
        };
        let resumed = machine.resume();
        if let Some(created) = self.created.as_mut().filter(|_| resumed.is_err()) {
            created.paused = true;
        }
        self.writer = Some(writer?);
        self.event("vm", "snapshotting");
        resumed?;
        Ok(ForkInfo { paused_us: u64::try_from(paused.as_micros()).unwrap_or(u64::MAX) })
    }

    /// Keeps what the machine has touched of a snapshot's memory beside that snapshot.
    ///
    /// # Errors
    /// If its memory is no snapshot's, or the list cannot be written.
    pub(super) fn working_set(&mut self, to: &SnapshotConfig) -> Result<(), VmmError> {
        let directory = to.directory().ok_or_else(|| SnapshotError::Url(to.destination_url.clone()))?;
        let machine = self.created.as_ref().and_then(|created| created.machine.as_ref()).ok_or_else(no_machine)?;
        if !machine.shares_memory() {
            let why = "the machine has its memory for itself: only one that came copy-on-write from a snapshot can say \
                       what it needs of it";
            return Err(VmmError::State(why.into()));
        }
        let set = WorkingSet::record(machine.ram(), machine.images());
        let set =
            set.map_err(|e| VmmError::State(format!("it cannot be found out what the machine has touched: {e}")))?;
        Ok(set.write(directory)?)
    }

    /// The writer of a live snapshot has something to say, or has ended.
    pub(super) fn hear_writer(&mut self) {
        let Some(result) = self.writer.as_mut().and_then(Writer::hear) else { return };
        self.writer = None;
        match result {
            Ok(()) => self.event("vm", "snapshotted"),
            Err(why) => {
                log::error!("the live snapshot failed: {why}");
                self.event("vm", "snapshot-failed");
            }
        }
    }
}

/// A file that the guest writes to, which is no part of a snapshot; nothing if there is none.
fn written_by_guest(config: &VmConfig) -> Option<&Path> {
    let disks = config.disks.iter().filter(|disk| !disk.readonly).map(|disk| disk.path.as_path());
    let images = config.pmem.iter().filter(|pmem| !pmem.discard_writes).map(|pmem| pmem.file.as_path());
    disks.chain(images).next()
}

/// The writer of a live snapshot and how long the machine stood still; it may still do so.
type Saving = (Result<Writer, VmmError>, Duration);

/// The child has the memory as it was.
fn save_by_fork(config: &VmConfig, machine: &Machine, destination: Destination) -> Saving {
    let start = Instant::now();
    machine.pause();
    let forked = machine.save().map_err(VmmError::from).and_then(|state| {
        Writer::start(destination, None, |to| to.write(config, &state, machine.ram())).map_err(|e| cannot_fork(&e))
    });
    // Whoever called lets it go on, too; here it does so as early as it can.
    let _ = machine.resume();
    (forked, start.elapsed())
}

/// The child gets copies of the pages that are not the template's any more: it stands still for those that change while
/// they are made, whatever else it has mapped. Its devices rest for all of that. Where that is no way the destination comes
/// back, and the machine runs, perhaps without its devices.
fn save_by_copies(config: &VmConfig, machine: &Machine, destination: Destination) -> Result<Saving, Destination> {
    let (ram, memory) = (machine.plan.ram.as_slice(), machine.ram());
    if !machine.shares_memory() {
        return Err(destination);
    }
    machine.pause_devices();
    let Ok(log) = Log::begin(machine.vm.as_ref(), ram, memory) else { return Err(destination) };
    let Ok(Some(mut copies)) = Copies::of(memory, ram) else { return Err(destination) };
    let start = Instant::now();
    machine.pause();
    let state = copies.complete(memory, &log).and_then(|()| machine.save());
    // As above.
    let _ = machine.resume();
    let paused = start.elapsed();
    drop(log);
    let writer = state.map_err(VmmError::from).and_then(|state| {
        memory::keep_from_forks(memory, true).map_err(|e| cannot_fork(&e))?;
        let writer =
            Writer::start(destination, Some(copies.template()), |to| to.write(config, &state, &copies.memory(ram)?));
        memory::keep_from_forks(memory, false).map_err(|e| cannot_fork(&e))?;
        writer.map_err(|e| cannot_fork(&e))
    });
    Ok((writer, paused))
}

fn cannot_fork(why: &std::io::Error) -> VmmError {
    VmmError::State(format!("cannot fork: {why}"))
}
