//! The control thread's verbs on snapshots.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use vmm_api::ForkInfo;
use vmm_config::{CloneConfig, ConsoleConfig, MemoryRestoreMode, RestoreConfig, SnapshotConfig, VmConfig};

use super::writer::Writer;
use super::{Created, Vmm, VmmError, no_machine};
use crate::build::{Saved, SavedMemory};
use crate::snapshot::{Destination, Snapshot, SnapshotError, Source, Template};
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
        self.create(snapshot.config.clone())?;
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
        match from.memory_restore_mode {
            MemoryRestoreMode::Copy => self.build_from(snapshot, SavedMemory::Copy(memory)),
            MemoryRestoreMode::OnDemand => {
                let source = Source::new(snapshot, from.prefault)?;
                self.build_from(snapshot, SavedMemory::OnDemand(&source))
            }
            MemoryRestoreMode::CopyOnWrite => {
                snapshot.check_copy_on_write()?;
                memory.verify()?;
                let file = memory.file().try_clone().map(Arc::new);
                let file = file.map_err(|e| VmmError::State(format!("cannot map the snapshot's memory: {e}")))?;
                self.build_from(snapshot, SavedMemory::CopyOnWrite(&file))
            }
        }
    }

    fn build_from(&mut self, snapshot: &Snapshot, memory: SavedMemory<'_>) -> Result<(), VmmError> {
        let saved = Saved { state: &snapshot.state, memory };
        self.build(&snapshot.state.plan, Some(saved))
    }

    /// Makes a machine like the one of `template`, which shares its memory until it changes it, and lets it run. `handed`
    /// are descriptors for its serial port, its console and its devices.
    ///
    /// # Errors
    /// If something the configuration names cannot be had.
    pub(crate) fn clone_of(
        &mut self,
        template: &Template,
        clone: &CloneConfig,
        mut handed: BTreeMap<String, OwnedFd>,
    ) -> Result<(), VmmError> {
        let mut config = template.config.clone();
        if let (Some(vsock), Some(path)) = (&mut config.vsock, &clone.vsock_socket) {
            vsock.socket.clone_from(path);
        }
        for gpu in config.gpu.iter_mut().filter(|_| clone.wayland.is_some()) {
            gpu.wayland.clone_from(&clone.wayland);
        }
        let mut stream = |name: &str, config: &ConsoleConfig| match handed.remove(name) {
            Some(fd) => Stream::inherited(fd).map(Some),
            None => Stream::open(config),
        };
        let (serial, console) = (stream("serial", &config.serial)?, stream("console", &config.console)?);
        let (listeners, grants) = (handed, BTreeMap::new());
        self.created = Some(Created { config, serial, console, listeners, grants, machine: None, paused: false });
        let saved = Saved { state: &template.state, memory: SavedMemory::CopyOnWrite(&template.memory) };
        self.build(&template.state.plan, Some(saved))?;
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
        let start = Instant::now();
        machine.pause();
        let forked = machine.save().map_err(VmmError::from).and_then(|state| {
            Writer::start(destination, |to| to.write(&created.config, &state, machine.ram()))
                .map_err(|e| not_now(&format!("cannot fork: {e}")))
        });
        let resumed = machine.resume();
        let paused_us = u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX);
        if let Some(created) = self.created.as_mut().filter(|_| resumed.is_err()) {
            created.paused = true;
        }
        self.writer = Some(forked?);
        self.event("vm", "snapshotting");
        resumed?;
        Ok(ForkInfo { paused_us })
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
