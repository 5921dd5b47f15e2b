//! The control thread's verbs on snapshots.

use std::sync::Arc;

use vmm_config::{MemoryRestoreMode, RestoreConfig, SnapshotConfig, VmConfig};

use super::{Vmm, VmmError};
use crate::build::{Saved, SavedMemory};
use crate::machine::Machine;
use crate::snapshot::{Snapshot, SnapshotError};

/// Why guest memory cannot be the private mapping of a file; nothing if it can.
fn not_copy_on_write(config: &VmConfig) -> Option<&'static str> {
    let memory = &config.memory;
    match () {
        () if memory.shared => Some("memory.shared=on makes all of it visible to other processes"),
        () if memory.hugepages => Some("memory.hugepages=on needs memory of its own"),
        () => None,
    }
}

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
        self.check_cpu(&snapshot)?;
        self.create(snapshot.config.clone())?;
        let result = self.build_saved(&snapshot, from);
        if result.is_err() {
            self.created = None;
            return result;
        }
        self.event("vm", "restored");
        if from.resume {
            self.with_machine(false, Machine::resume);
            self.event("vm", "resumed");
        }
        Ok(())
    }

    fn check_cpu(&self, snapshot: &Snapshot) -> Result<(), SnapshotError> {
        let here = &self.hypervisor.capabilities().cpuid;
        let lacking = snapshot.state.vcpus.first().map(|vcpu| arch::features::lacking(&vcpu.cpuid, here));
        match lacking {
            Some(lacking) if !lacking.is_empty() => Err(SnapshotError::Cpu(lacking)),
            _ => Ok(()),
        }
    }

    fn build_saved(&mut self, snapshot: &Snapshot, from: &RestoreConfig) -> Result<(), VmmError> {
        let memory = &snapshot.memory;
        match from.memory_restore_mode {
            MemoryRestoreMode::Copy => self.build_from(snapshot, SavedMemory::Copy(memory)),
            MemoryRestoreMode::OnDemand => {
                Err(VmmError::State("memory_restore_mode=ondemand is not supported yet; use copyonwrite".into()))
            }
            MemoryRestoreMode::CopyOnWrite => {
                if let Some(why) = not_copy_on_write(&snapshot.config) {
                    let advice = "restore it with memory_restore_mode=copy";
                    return Err(VmmError::State(format!("guest memory cannot be copy-on-write: {why}; {advice}")));
                }
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
}
