//! The control thread's verbs on snapshots.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use vmm_config::{CloneConfig, ConsoleConfig, MemoryRestoreMode, RestoreConfig, SnapshotConfig};

use super::{Created, Vmm, VmmError};
use crate::build::{Saved, SavedMemory};
use crate::snapshot::{Snapshot, SnapshotError, Source, Template};
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
        Snapshot::write(directory, config, &machine.save()?, machine.ram())?;
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
        if result.is_err() {
            self.created = None;
            return result;
        }
        self.event("vm", "restored");
        if from.resume {
            self.resume()?;
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
        self.created = Some(Created { config, serial, console, listeners: handed, machine: None, paused: false });
        let saved = Saved { state: &template.state, memory: SavedMemory::CopyOnWrite(&template.memory) };
        self.build(&template.state.plan, Some(saved))?;
        if clone.paused { Ok(()) } else { self.resume() }
    }
}
