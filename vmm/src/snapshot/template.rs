//! A snapshot made ready for many machines: verified once, its memory in one place that nothing can change any more.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use vmm_config::VmConfig;

use crate::build::{Saved, SavedMemory};

use super::{MachineState, Snapshot, SnapshotError, WorkingSet, file_error};

/// A template in memory.
pub struct Template {
    /// The configuration of the machine it was made of.
    pub config: VmConfig,
    /// What that machine was in the middle of.
    pub state: MachineState,
    /// Its RAM: a sealed memfd.
    pub memory: Arc<File>,
    /// What clones have of it before they run.
    pub working_set: Option<WorkingSet>,
}

impl Template {
    /// Reads and verifies all of a snapshot; `prefault`: clones have its working set beforehand.
    ///
    /// # Errors
    /// If its memory is damaged or cannot be read, or the host has no room for it.
    pub fn load(snapshot: Snapshot, prefault: bool) -> Result<Self, SnapshotError> {
        let working_set = if prefault { Some(snapshot.working_set()?) } else { None };
        let Snapshot { config, state, memory, .. } = snapshot;
        let path = memory.path().to_owned();
        let fail = file_error("load into memory", &path);
        let make = || -> io::Result<File> {
            let file: File = memfd_create("template", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?.into();
            file.set_len(memory.len())?;
            Ok(file)
        };
        let file = make().map_err(&fail)?;
        memory.read(|chunk, part| file.write_all_at(part, chunk.offset))?;
        let seals = SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        fcntl_add_seals(&file, seals).map_err(|e| fail(e.into()))?;
        Ok(Self { config, state, memory: Arc::new(file), working_set })
    }

    /// What a clone is made from; `share`: with this memory, until it writes to it.
    pub(crate) fn saved(&self, share: bool) -> Saved<'_> {
        let memory = if share { SavedMemory::CopyOnWrite(&self.memory) } else { SavedMemory::CopyOf(&self.memory) };
        Saved { state: &self.state, memory, working_set: self.working_set.as_ref().filter(|_| share) }
    }
}
