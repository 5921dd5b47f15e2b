//! The log of everything that was decided: text of bounded length, for people.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use jiff::Timestamp;
use rustix::fs::{FlockOperation, flock};

use crate::places::Places;

/// The log, in the user's state folder.
const FILE: &str = "policy.log";
/// The one before it.
const OLD: &str = "policy.log.1";

/// Longest log, in bytes; with the one before it there are twice as many.
const LONGEST: u64 = 1024 * 1024;

/// Where decisions are written down. Several launchers share it.
#[derive(Clone, Debug)]
pub struct Record {
    folder: PathBuf,
}

impl Record {
    /// In this folder, which is made when something is written.
    pub fn new(folder: PathBuf) -> Self {
        Self { folder }
    }

    /// Adds a line, with the time.
    pub fn append(&self, text: &str) -> io::Result<()> {
        let _turn = self.lock()?;
        let path = self.folder.join(FILE);
        let line = format!("{:.0} {text}\n", Timestamp::now());
        let length = fs::metadata(&path).map_or(0, |data| data.len());
        if length.saturating_add(line.len() as u64) > LONGEST {
            fs::rename(&path, self.folder.join(OLD))?;
        }
        OpenOptions::new().append(true).create(true).mode(0o600).open(&path)?.write_all(line.as_bytes())
    }

    /// Nobody else writes while this is open.
    fn lock(&self) -> io::Result<File> {
        make_private(&self.folder)?;
        let folder = File::open(&self.folder)?;
        flock(&folder, FlockOperation::LockExclusive)?;
        Ok(folder)
    }

    /// The right to ask about `app`; nothing if another launcher asks about it.
    pub fn turn_to_ask(&self, app: &str) -> io::Result<Option<Turn>> {
        let folder = self.folder.join("asking");
        make_private(&folder)?;
        let file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(folder.join(app))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(Turn(file))),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Everything that is kept, the oldest first.
    fn read(&self) -> io::Result<String> {
        let mut text = String::new();
        for name in [OLD, FILE] {
            match fs::read(self.folder.join(name)) {
                Ok(bytes) => text += &String::from_utf8_lossy(&bytes),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(text)
    }
}

fn make_private(folder: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(folder)
}

/// The log as `spectrum policy log` prints it.
pub fn read(places: &Places) -> Result<String, Box<dyn std::error::Error>> {
    let folder = places.state()?;
    let failed = |error: io::Error| format!("cannot read the log in {}: {error}", folder.display());
    Ok(Record::new(folder.clone()).read().map_err(failed)?)
}

/// The right to ask, until this goes out of scope.
#[derive(Debug)]
pub struct Turn(File);

impl Drop for Turn {
    fn drop(&mut self) {
        // A process that was forked meanwhile has the lock too, until it becomes another program: closing the file is not enough.
        let _ = flock(&self.0, FlockOperation::Unlock);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_have_a_time_and_the_oldest_go() {
        let place = tempfile::tempdir().unwrap();
        let folder = place.path().join("state/spectrum");
        let record = Record::new(folder.clone());
        assert_eq!(record.read().unwrap(), "");
        let long = "x".repeat(1000);
        for number in 0..2500 {
            record.append(&format!("{number} {long}")).unwrap();
        }
        let text = record.read().unwrap();
        let numbers: Vec<u32> = text.lines().map(|line| line.split(' ').nth(1).unwrap().parse().unwrap()).collect();
        assert!(numbers.is_sorted() && numbers.last() == Some(&2499) && numbers[0] > 0, "{numbers:?}");
        assert!(numbers.len() > 1000 && text.len() as u64 <= 2 * LONGEST, "{}", text.len());
        let time = text.split(' ').next().unwrap();
        assert!(time.parse::<Timestamp>().is_ok() && time.ends_with('Z') && time.len() == 20, "{time}");
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 2);
    }

    #[test]
    fn one_asks_about_an_app_at_a_time() {
        let place = tempfile::tempdir().unwrap();
        let [one, other] = [(); 2].map(|()| Record::new(place.path().into()));
        let turn = one.turn_to_ask("mail").unwrap();
        assert!(turn.is_some() && other.turn_to_ask("mail").unwrap().is_none());
        assert!(other.turn_to_ask("web").unwrap().is_some());
        // As a process has it that was forked and has not become another program yet.
        let _copy = turn.as_ref().unwrap().0.try_clone().unwrap();
        drop(turn);
        assert!(other.turn_to_ask("mail").unwrap().is_some());
    }
}
