//! The end of a text of any length, in files of bounded size.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

/// Bytes in one of the two files.
const HALF: u64 = 64 * 1024;

/// Where what came before is.
const FORMER: &str = "old";

/// A file that is put aside when it has become long, in place of what was put aside before.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
    length: u64,
}

impl Journal {
    /// Begins one.
    pub fn new(path: PathBuf) -> io::Result<Self> {
        Ok(Self { file: create(&path)?, path, length: 0 })
    }

    /// Adds to it.
    pub fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        let length = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        if self.length.saturating_add(length) > HALF && self.length > 0 {
            fs::rename(&self.path, self.path.with_extension(FORMER))?;
            self.file = create(&self.path)?;
            self.length = 0;
        }
        self.length = self.length.saturating_add(length);
        self.file.write_all(bytes)
    }
}

fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(path)
}

/// What is there of the journal at `path`, as it came.
pub fn read(path: &Path) -> Vec<u8> {
    let mut bytes = fs::read(path.with_extension(FORMER)).unwrap_or_default();
    bytes.extend(fs::read(path).unwrap_or_default());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_stays_and_the_size_is_bounded() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("console.log");
        let mut journal = Journal::new(path.clone()).unwrap();
        let mut all = Vec::new();
        for number in 0..40_000 {
            let line = format!("line {number}\n");
            journal.append(line.as_bytes()).unwrap();
            all.extend(line.as_bytes());
        }
        let kept = read(&path);
        assert!(kept.len() as u64 >= HALF / 2 && kept.len() as u64 <= 2 * HALF, "{}", kept.len());
        assert!(all.ends_with(&kept));
        assert_eq!(fs::read_dir(place.path()).unwrap().count(), 2);
    }
}
