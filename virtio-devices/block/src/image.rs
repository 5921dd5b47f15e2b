//! Opening an image: the right kind of file, its size, and a lock that keeps two writers apart.
//!
//! The lock is flock(2): it belongs to the open file, so it goes when the last descriptor of it is closed, however the
//! process ends, and it needs no write permission. Readers share the file; a writer has it alone.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{FlockOperation, OFlags, flock};
use rustix::io::Errno;

/// What the image is opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Nobody writes: shared with other readers.
    ReadOnly,
    /// Read and written by one process alone.
    ReadWrite,
}

/// Why an image cannot be used. The caller says which image.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// open(2) or a question about the file failed.
    #[error(transparent)]
    Open(#[from] io::Error),
    /// Not a file with a size.
    #[error("it is neither a regular file nor a block device")]
    Kind,
    /// The lock is held elsewhere.
    #[error("it is in use: another machine, or another disk of this one, {}", match wanted {
        Access::ReadOnly => "writes to it",
        Access::ReadWrite => "has it open; a writable image can have one user only",
    })]
    Locked {
        /// What it was wanted for.
        wanted: Access,
    },
}

/// An open image.
#[derive(Debug)]
pub struct Image {
    file: File,
    size: u64,
    block_device: bool,
}

impl Image {
    /// Opens and locks the image at `path`. `direct`: go around the host's page cache.
    ///
    /// # Errors
    /// If it cannot be opened, has no size, or is in use in a way that does not go with `access`.
    pub fn open(path: &Path, access: Access, direct: bool) -> Result<Self, Error> {
        // A pipe or terminal at the path must not hang the VMM (O_NONBLOCK) nor become its terminal (O_NOCTTY).
        let mut flags = OFlags::NONBLOCK | OFlags::NOCTTY;
        flags.set(OFlags::DIRECT, direct);
        let mut file = OpenOptions::new()
            .read(true)
            .write(access == Access::ReadWrite)
            .custom_flags(flags.bits().cast_signed())
            .open(path)?;
        let metadata = file.metadata()?;
        let block_device = metadata.file_type().is_block_device();
        let size = if block_device {
            file.seek(SeekFrom::End(0))?
        } else if metadata.is_file() {
            metadata.len()
        } else {
            return Err(Error::Kind);
        };
        lock(&file, path, access)?;
        Ok(Self { file, size, block_device })
    }

    /// Size in bytes when it was opened.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Whether it is a block device of the host.
    #[must_use]
    pub fn is_block_device(&self) -> bool {
        self.block_device
    }

    /// The file.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }
}

impl AsFd for Image {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn lock(file: &File, path: &Path, access: Access) -> Result<(), Error> {
    let operation = match access {
        Access::ReadOnly => FlockOperation::NonBlockingLockShared,
        Access::ReadWrite => FlockOperation::NonBlockingLockExclusive,
    };
    match flock(file, operation) {
        Ok(()) => Ok(()),
        Err(Errno::WOULDBLOCK) => Err(Error::Locked { wanted: access }),
        Err(e) if e == Errno::OPNOTSUPP || e == Errno::NOLCK || e == Errno::NOSYS => {
            log::warn!("{}: its file system has no locks ({e}); a second user would not be noticed", path.display());
            Ok(())
        }
        Err(e) => Err(Error::Open(e.into())),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn image(bytes: usize) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&vec![1; bytes]).unwrap();
        file
    }

    #[test]
    fn readers_share_and_a_writer_is_alone() {
        let file = image(1000);
        let first = Image::open(file.path(), Access::ReadOnly, false).unwrap();
        let second = Image::open(file.path(), Access::ReadOnly, false).unwrap();
        assert_eq!((first.size(), second.size()), (1000, 1000));
        let refused = Image::open(file.path(), Access::ReadWrite, false).unwrap_err();
        assert!(refused.to_string().contains("one user only"), "{refused}");
        drop((first, second));
        let writer = Image::open(file.path(), Access::ReadWrite, false).unwrap();
        let refused = Image::open(file.path(), Access::ReadOnly, false).unwrap_err();
        assert!(refused.to_string().contains("writes to it"), "{refused}");
        assert!(matches!(Image::open(file.path(), Access::ReadWrite, false), Err(Error::Locked { .. })));
        drop(writer);
        Image::open(file.path(), Access::ReadOnly, false).unwrap();
    }

    #[test]
    fn what_has_no_size_is_refused_without_waiting() {
        let folder = tempfile::tempdir().unwrap();
        let pipe = folder.path().join("pipe");
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR, 0).unwrap();
        assert!(matches!(Image::open(&pipe, Access::ReadOnly, false), Err(Error::Kind)));
        assert!(matches!(Image::open(folder.path(), Access::ReadOnly, false), Err(Error::Kind)));
        assert!(matches!(Image::open(Path::new("/dev/null"), Access::ReadOnly, false), Err(Error::Kind)));
        assert!(matches!(Image::open(&folder.path().join("no"), Access::ReadOnly, false), Err(Error::Open(_))));
    }
}
