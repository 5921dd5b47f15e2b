//! Snapshots: a paused machine in a directory (`docs/snapshot-format.md`).
//!
//! ```text
//!   snapshot.json   version; size and BLAKE3 hash of each other file. Written last: what has none is no snapshot
//!   config.json     the machine's configuration, as the API takes it
//!   state.bin       plan, vCPUs, devices
//!   memory.sums     BLAKE3 hashes of the chunks of memory
//!   memory          guest RAM, sparse; the ranges of the plan one after the other
//! ```
//! Everything read from a snapshot is hostile: sizes are bounded, hashes compared, values checked by who takes them over.

mod copies;
mod destination;
mod manifest;
mod memory;
mod ondemand;
mod state;
mod template;
mod uffd;
mod working_set;

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arch::cpuid::{CpuidConfig, CpuidEntry, vcpu_cpuid};
use vmm_config::{JsonError, VmConfig};

pub use copies::{Copies, Log};
pub use destination::Destination;
use manifest::{FileSum, Manifest};
pub use memory::MemoryFile;
pub use ondemand::{OnDemand, Source};
pub use state::{MachineState, SavedDevice};
pub use template::Template;
pub use uffd::UffdError;
pub use working_set::WorkingSet;

/// The version of the format that is written and read.
pub const VERSION: u32 = 1;

const MANIFEST: &str = "snapshot.json";
const CONFIG: &str = "config.json";
const STATE: &str = "state.bin";
const SUMS: &str = "memory.sums";
/// No part of the snapshot, see [`WorkingSet`].
const WORKING_SET: &str = "working-set.json";
const MEMORY: &str = "memory";

/// The most bytes of each file but the memory, so that a damaged snapshot cannot exhaust the host.
const MAX_MANIFEST: u64 = 64 << 10;
const MAX_CONFIG: u64 = 1 << 20;
const MAX_STATE: u64 = 64 << 20;

/// Why there is no snapshot, or none that can be used: one sentence for the user.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The URL names no directory.
    #[error("{0:?} names no snapshot: write file:// and the absolute path of a directory")]
    Url(String),
    /// There is one already.
    #[error("{} holds a snapshot already; choose another directory or remove it", .0.display())]
    Exists(PathBuf),
    /// A snapshot is on its way there.
    #[error("{} is being written to; wait for the end of it or choose another directory", .0.display())]
    Busy(PathBuf),
    /// The directory holds none.
    #[error("{} holds no snapshot: there is no {MANIFEST} in it", .0.display())]
    Missing(PathBuf),
    /// A file cannot be read or written.
    #[error("cannot {what} {}: {source}", path.display())]
    File {
        /// What was tried.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// Another version's.
    #[error("{} has format version {found}, and this program reads version {VERSION}; take the snapshot again", path.display())]
    Version {
        /// The manifest.
        path: PathBuf,
        /// Its version.
        found: u64,
    },
    /// A file is not what was written.
    #[error("{} is damaged: {what}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// How it can be seen.
        what: String,
    },
    /// The configuration cannot be read.
    #[error("{}: {source}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: JsonError,
    },
    /// The guest was told of features that this host's CPU does not have.
    #[error("the snapshot was taken on another kind of CPU; this one lacks {}", .0.join(", "))]
    Cpu(Vec<String>),
    /// Guest memory has to be a machine's own.
    #[error("guest memory cannot be copy-on-write: {0}; restore it with memory_restore_mode=copy")]
    NotCopyOnWrite(&'static str),
    /// Guest memory has to be there at once.
    #[error("guest memory cannot be restored on demand: {0}; restore it with memory_restore_mode=copy")]
    NotOnDemand(&'static str),
    /// Page faults cannot be served.
    #[error(transparent)]
    Uffd(#[from] UffdError),
    /// Memory that was to be restored on demand cannot be had.
    #[error("{0}")]
    Lost(String),
    /// The machine cannot be saved as it is.
    #[error("{0}")]
    Unsaved(String),
}

/// The error of an operation on a file.
fn file_error<'a>(what: &'static str, path: &'a Path) -> impl Fn(io::Error) -> SnapshotError + 'a {
    move |source| SnapshotError::File { what, path: path.to_owned(), source }
}

fn damaged(path: &Path, what: impl Into<String>) -> SnapshotError {
    SnapshotError::Damaged { path: path.to_owned(), what: what.into() }
}

/// An opened snapshot. All but the memory has been read and verified.
pub struct Snapshot {
    /// The machine's configuration.
    pub config: VmConfig,
    /// What it was in the middle of.
    pub state: MachineState,
    /// Guest RAM.
    pub memory: Arc<MemoryFile>,
    directory: PathBuf,
}

impl Snapshot {
    /// Opens the snapshot in `directory` and verifies everything but the memory.
    ///
    /// # Errors
    /// If a file is missing, damaged or of another version.
    pub fn open(directory: &Path) -> Result<Self, SnapshotError> {
        let manifest = Manifest::read(directory)?;
        let path = directory.join(CONFIG);
        let text = read_verified(&path, &manifest.config, MAX_CONFIG)?;
        let config = VmConfig::from_json(&text).map_err(|source| SnapshotError::Config { path, source })?;
        let path = directory.join(STATE);
        let bytes = read_verified(&path, &manifest.state, MAX_STATE)?;
        let state = MachineState::from_bytes(&bytes).map_err(|what| damaged(&path, what))?;
        state.check(&config).map_err(|what| damaged(&path, what))?;
        let max_sums = memory::sums_size(&state.plan.ram);
        let sums = read_verified(&directory.join(SUMS), &manifest.memory_sums, max_sums)?;
        let memory = Arc::new(MemoryFile::open(directory.join(MEMORY), &sums, &state.plan.ram)?);
        Ok(Self { config, state, memory, directory: directory.to_owned() })
    }

    /// Whether its guest can go on on a host that supports `cpuid`, and was told nothing that no guest is told.
    ///
    /// # Errors
    /// [`SnapshotError::Cpu`].
    pub fn check_cpu(&self, cpuid: &[CpuidEntry]) -> Result<(), SnapshotError> {
        let plan = &self.state.plan;
        let config = CpuidConfig { vcpus: plan.vcpus, physical_bits: plan.physical_bits, nested: false };
        for (number, vcpu) in (0..).zip(&self.state.vcpus) {
            let lacking = arch::features::lacking(&vcpu.cpuid, &vcpu_cpuid(cpuid, &config, number));
            if !lacking.is_empty() {
                return Err(SnapshotError::Cpu(lacking));
            }
        }
        Ok(())
    }

    /// The pages that a machine is to have beforehand: those that are known to be needed, or all.
    ///
    /// # Errors
    /// If what is known cannot be read.
    pub fn working_set(&self) -> Result<WorkingSet, SnapshotError> {
        let len = self.memory.len();
        Ok(WorkingSet::read(&self.directory, len)?.unwrap_or_else(|| WorkingSet::whole(len)))
    }

    /// Whether its memory can be the private mapping of a file.
    ///
    /// # Errors
    /// [`SnapshotError::NotCopyOnWrite`].
    pub fn check_copy_on_write(&self) -> Result<(), SnapshotError> {
        let memory = &self.config.memory;
        if memory.shared {
            let why = "memory.shared=on makes all of it visible to other processes";
            return Err(SnapshotError::NotCopyOnWrite(why));
        }
        Ok(())
    }
}

/// Opens a regular file to read; anything else could keep its reader waiting.
fn open_file(path: &Path) -> Result<File, SnapshotError> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path);
    let file = file.map_err(file_error("open", path))?;
    match file.metadata().map_err(file_error("look at", path))?.is_file() {
        true => Ok(file),
        false => Err(damaged(path, "it is no regular file")),
    }
}

/// All of a file of at most `max` bytes.
fn read_file(path: &Path, max: u64) -> Result<Vec<u8>, SnapshotError> {
    let mut bytes = Vec::new();
    open_file(path)?.take(max.saturating_add(1)).read_to_end(&mut bytes).map_err(file_error("read", path))?;
    if bytes.len() as u64 > max {
        return Err(damaged(path, format!("it is longer than {max} bytes")));
    }
    Ok(bytes)
}

fn read_verified(path: &Path, sum: &FileSum, max: u64) -> Result<Vec<u8>, SnapshotError> {
    let bytes = read_file(path, max.min(sum.size))?;
    if FileSum::of(&bytes) != *sum {
        return Err(damaged(path, "its contents are not what was written"));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests;
