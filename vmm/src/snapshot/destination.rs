//! Where a snapshot is written.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use virtio_devices::device::Memory;
use vmm_config::VmConfig;

use super::manifest::{FileSum, Manifest};
use super::{CONFIG, MANIFEST, MEMORY, MachineState, STATE, SUMS, SnapshotError, VERSION, file_error, memory};

/// What a file is called until it is whole.
const PARTIAL: &str = ".partial";

/// A directory that is to hold a snapshot, and is nobody else's to write one to until this is dropped. Only its owner can
/// read what is written: all that the guest has in its memory is there.
pub struct Destination {
    directory: PathBuf,
    /// Locked. A forked process that writes has it too.
    lock: File,
    /// The files that are there because of this.
    made: Vec<PathBuf>,
}

impl Destination {
    /// Takes `directory`, which is made if it is not there.
    ///
    /// # Errors
    /// If it holds a snapshot already, is being written to, or cannot be made.
    pub fn open(directory: &Path) -> Result<Self, SnapshotError> {
        let free = || -> Result<(), SnapshotError> {
            match fs::exists(directory.join(MANIFEST)).map_err(file_error("look into", directory))? {
                true => Err(SnapshotError::Exists(directory.to_owned())),
                false => Ok(()),
            }
        };
        free()?;
        let made = DirBuilder::new().recursive(true).mode(0o700).create(directory);
        made.map_err(file_error("make the directory", directory))?;
        let lock = File::open(directory).map_err(file_error("open", directory))?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => return Err(SnapshotError::Busy(directory.to_owned())),
            Err(e) => return Err(file_error("lock", directory)(e.into())),
        }
        // Another one may have finished meanwhile.
        free()?;
        Ok(Self { directory: directory.to_owned(), lock, made: Vec::new() })
    }

    /// Writes a snapshot. Whatever happens, the directory either holds all of it in the end, or none.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn write(mut self, config: &VmConfig, state: &MachineState, memory: &Memory) -> Result<(), SnapshotError> {
        let result = self.write_all(config, state, memory);
        if result.is_err() {
            // Without a manifest they are nothing; if one cannot be removed, the next attempt overwrites it.
            self.made.iter().for_each(|path| drop(fs::remove_file(path)));
        }
        result
    }

    fn write_all(&mut self, config: &VmConfig, state: &MachineState, memory: &Memory) -> Result<(), SnapshotError> {
        let (file, partial) = self.create(MEMORY)?;
        let sums = memory::write(memory, &state.plan.ram, &file).map_err(file_error("write", &partial))?;
        self.finish(&file, &partial, MEMORY)?;
        let text = serde_json::to_vec_pretty(config)
            .map_err(|e| SnapshotError::Unsaved(format!("the configuration cannot be saved: {e}")))?;
        let manifest = Manifest {
            version: VERSION,
            config: self.write_file(CONFIG, &text)?,
            state: self.write_file(STATE, &state.to_bytes().map_err(SnapshotError::Unsaved)?)?,
            memory_sums: self.write_file(SUMS, &sums)?,
        };
        // The others' names are on the disk before the manifest says that they are there.
        self.sync()?;
        self.write_file(MANIFEST, &manifest.to_text())?;
        self.sync()
    }

    /// A file under the name that it has until it is whole.
    fn create(&mut self, name: &str) -> Result<(File, PathBuf), SnapshotError> {
        let partial = self.directory.join(format!("{name}{PARTIAL}"));
        let file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&partial);
        let file = file.map_err(file_error("make", &partial))?;
        self.made.push(partial.clone());
        Ok((file, partial))
    }

    fn write_file(&mut self, name: &str, bytes: &[u8]) -> Result<FileSum, SnapshotError> {
        let (mut file, partial) = self.create(name)?;
        file.write_all(bytes).map_err(file_error("write", &partial))?;
        self.finish(&file, &partial, name)?;
        Ok(FileSum::of(bytes))
    }

    /// Gives a file that is whole its name.
    fn finish(&mut self, file: &File, partial: &Path, name: &str) -> Result<(), SnapshotError> {
        let path = self.directory.join(name);
        file.sync_all().map_err(file_error("write", partial))?;
        fs::rename(partial, &path).map_err(file_error("give its name to", &path))?;
        self.made.push(path);
        Ok(())
    }

    fn sync(&self) -> Result<(), SnapshotError> {
        self.lock.sync_all().map_err(file_error("write", &self.directory))
    }
}

impl AsFd for Destination {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.lock.as_fd()
    }
}
