//! Files that the user picked for an app that keeps a home directory: they are granted to its next VM too.
//!
//! They are written down beside the home directory's files, out of the guest's reach. What is written there is checked like
//! anything else, since it can be damaged.

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::{
    folder::{BaseLock, lock_base},
    grants::{HOME_GRANT, Record, is_name},
};
use crate::text::{self, TextError};

/// Its name in the home directory's folder.
const FILE: &str = "picked.json";

/// What a damaged one is called afterwards.
const DAMAGED: &str = "picked.json.damaged";

/// The version of this format.
const VERSION: u32 = 1;

/// Files that are remembered. Then the oldest is forgotten for a new one.
const MOST: usize = 100;

/// Longest record of one, in bytes of JSON: a path is a part of it.
const LONGEST: usize = 8 * 1024;

/// Why what was picked is not known or not remembered.
#[derive(Debug, thiserror::Error)]
pub enum RememberedError {
    /// The file.
    #[error(transparent)]
    Text(#[from] TextError),
    /// Something else wrote it, or only a part of it is there.
    #[error("{0} is not what this program wrote: {1}")]
    Damaged(PathBuf, String),
    /// It is of another version of this program.
    #[error("{0} has version {1} of its format, known is {VERSION}")]
    Version(PathBuf, u32),
    /// Its path is too long.
    #[error("the path of {0} is too long to be remembered")]
    Long(String),
    /// Two cannot change it at once.
    #[error("cannot lock {path}: {source}")]
    Lock {
        /// The folder.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
}

/// The file.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Contents {
    version: u32,
    /// The one that was picked last comes last.
    files: Vec<Record>,
}

/// What is remembered beside one home directory. Launchers and commands may use it at once.
#[derive(Clone, Debug)]
pub struct Remembered {
    folder: PathBuf,
}

impl Remembered {
    /// Of the home directory in `folder`, which may not exist.
    pub fn of(folder: &Path) -> Self {
        Self { folder: folder.into() }
    }

    /// All of it, the one that was picked last at the end.
    pub fn read(&self) -> Result<Vec<Record>, RememberedError> {
        let path = self.folder.join(FILE);
        let Some(text) = text::read(&path)? else { return Ok(Vec::new()) };
        let damaged = |why: String| RememberedError::Damaged(path.clone(), why);
        let Contents { version, files } = serde_json::from_str(&text).map_err(|error| damaged(error.to_string()))?;
        if version != VERSION {
            return Err(RememberedError::Version(path, version));
        }
        if files.len() > MOST {
            return Err(damaged(format!("it has {} files", files.len())));
        }
        let mut names = BTreeSet::new();
        for record in &files {
            let fits = is_name(&record.name) && record.name != HOME_GRANT && record.path.is_absolute();
            if !fits || !names.insert(&record.name) {
                return Err(damaged(format!("it has a file called {:?}", record.name)));
            }
        }
        Ok(files)
    }

    /// The same for who changes it. A damaged file is put aside, so that nothing is written over it.
    pub fn read_or_put_aside(&self) -> Result<Vec<Record>, RememberedError> {
        let _lock = self.lock()?;
        self.read_locked()
    }

    fn read_locked(&self) -> Result<Vec<Record>, RememberedError> {
        let error = match self.read() {
            Err(error @ (RememberedError::Damaged(..) | RememberedError::Version(..))) => error,
            Err(error @ RememberedError::Text(TextError::Long(_) | TextError::Mistake(_))) => error,
            result => return result,
        };
        let aside = self.folder.join(DAMAGED);
        fs::rename(self.folder.join(FILE), &aside).map_err(TextError::file(&aside))?;
        log::warn!("no picked files are remembered: {error}; it is now called {}", aside.display());
        Ok(Vec::new())
    }

    /// Remembers one. If there are too many, the oldest is forgotten.
    pub fn add(&self, record: &Record) -> Result<(), RememberedError> {
        if serde_json::to_vec(record).is_ok_and(|json| json.len() > LONGEST) {
            return Err(RememberedError::Long(record.name.clone()));
        }
        self.change(|files| {
            // The VM has it by this name now, whatever was called so before.
            files.retain(|one| one.name != record.name && !is_same(one, &record.path, record.writable));
            files.push(record.clone());
            let excess = files.len().saturating_sub(MOST);
            for forgotten in files.drain(..excess) {
                log::info!("{} is forgotten: {MOST} later ones are remembered", forgotten.path.display());
            }
        })
    }

    /// Forgets those that `which` says, and gives how many they were.
    pub fn forget(&self, which: impl Fn(&Record) -> bool) -> Result<usize, RememberedError> {
        self.change(|files| {
            let before = files.len();
            files.retain(|one| !which(one));
            before.saturating_sub(files.len())
        })
    }

    fn change<T>(&self, change: impl FnOnce(&mut Vec<Record>) -> T) -> Result<T, RememberedError> {
        let _lock = self.lock()?;
        let mut files = self.read_locked()?;
        let before = files.clone();
        let result = change(&mut files);
        if files != before {
            let path = self.folder.join(FILE);
            let text = serde_json::to_string_pretty(&Contents { version: VERSION, files });
            let text = text.map_err(|error| TextError::file(&path)(error.into()))?;
            text::replace(&path, &text)?;
        }
        Ok(result)
    }

    /// The lock of all home directories: none is removed meanwhile.
    fn lock(&self) -> Result<BaseLock, RememberedError> {
        let all = self.folder.parent().unwrap_or(&self.folder);
        lock_base(all).map_err(|source| RememberedError::Lock { path: all.into(), source })
    }
}

/// Whether a record is about this file and this use of it.
pub fn is_same(record: &Record, path: &Path, writable: bool) -> bool {
    record.path == path && record.writable == writable
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(name: &str, path: &str) -> Record {
        Record { name: name.into(), path: path.into(), writable: false }
    }

    fn names(remembered: &Remembered) -> Vec<String> {
        remembered.read().unwrap().into_iter().map(|record| record.name).collect()
    }

    #[test]
    fn remembered_until_forgotten_and_no_more_than_fit() {
        let place = tempfile::tempdir().unwrap();
        let remembered = Remembered::of(&place.path().join("web"));
        assert_eq!(names(&remembered), [""; 0]);
        assert_eq!(remembered.forget(|_| true).unwrap(), 0);
        assert!(!place.path().join("web").exists(), "nothing is made where there is nothing to forget");
        for (name, path) in [("a", "/x/a"), ("b", "/x/b"), ("a-2", "/y/a"), ("b", "/z/b"), ("a", "/x/a")] {
            remembered.add(&record(name, path)).unwrap();
        }
        // A name is one file's, the last one's; who is picked again is the last.
        let expected = [record("a-2", "/y/a"), record("b", "/z/b"), record("a", "/x/a")];
        assert_eq!(remembered.read().unwrap(), expected);
        let changed = Record { writable: true, ..record("a-3", "/x/a") };
        remembered.add(&changed).unwrap();
        assert_eq!(names(&remembered), ["a-2", "b", "a", "a-3"]);
        assert_eq!(remembered.forget(|one| one.name == "b").unwrap(), 1);
        assert_eq!(names(&remembered), ["a-2", "a", "a-3"]);
        for number in 0..MOST {
            remembered.add(&record(&format!("n{number}"), &format!("/n/{number}"))).unwrap();
        }
        let left = names(&remembered);
        assert_eq!((left.len(), &*left[0], &*left[MOST - 1]), (MOST, "n0", "n99"));
        // As many as there can be of the longest can be read again.
        let long =
            |number: usize| record(&format!("l{number}"), &format!("/{number:05}{}", "\u{1}".repeat(LONGEST / 6 - 20)));
        for number in 0..MOST {
            remembered.add(&long(number)).unwrap();
        }
        assert_eq!(remembered.read().unwrap().len(), MOST);
        let longer = record("x", &format!("/{}", "x".repeat(LONGEST)));
        assert!(matches!(remembered.add(&longer), Err(RememberedError::Long(name)) if name == "x"));
        assert_eq!(fs::read_dir(place.path().join("web")).unwrap().count(), 1, "no temporary file is left");
    }

    #[test]
    fn a_damaged_file_is_put_aside() {
        let place = tempfile::tempdir().unwrap();
        let (file, aside) = (place.path().join("web").join(FILE), place.path().join("web").join(DAMAGED));
        let remembered = Remembered::of(&place.path().join("web"));
        remembered.add(&record("a", "/x/a")).unwrap();
        let good = fs::read_to_string(&file).unwrap();
        let many: Vec<_> = (0..=MOST).map(|n| record(&n.to_string(), "/x")).collect();
        let files = |files: &[Record]| serde_json::json!({ "version": 1, "files": files }).to_string();
        let table = [
            (good[..good.len() / 2].to_owned(), "EOF while parsing"),
            (good.replace("\"version\": 1", "\"version\": 2"), "has version 2 of its format, known is 1"),
            (good.replace("\"writable\"", "\"write\""), "missing field `writable`"),
            (files(&[record("../a", "/x")]), "called \"../a\""),
            (files(&[record("", "/x")]), "called \"\""),
            (files(&[record(HOME_GRANT, "/x")]), "called \".home\""),
            (files(&[record("a", "x")]), "called \"a\""),
            (files(&[record("a", "/x"), record("a", "/y")]), "called \"a\""),
            (files(&many), "it has 101 files"),
            (" ".repeat(2 << 20), "is longer than"),
            (String::new(), "EOF while parsing"),
        ];
        for (text, expected) in table {
            fs::write(&file, &text).unwrap();
            let error = remembered.read().unwrap_err().to_string();
            assert!(error.contains(expected) && error.contains(FILE), "{error}");
            assert_eq!(remembered.read_or_put_aside().unwrap(), []);
            assert!(!file.exists());
            assert_eq!(fs::read_to_string(&aside).unwrap(), text);
        }
        fs::write(&file, b"\xff").unwrap();
        remembered.add(&record("b", "/x/b")).unwrap();
        assert_eq!((names(&remembered), fs::read(&aside).unwrap()), (vec!["b".to_owned()], b"\xff".to_vec()));
        // What cannot be read is left alone.
        fs::remove_file(&file).unwrap();
        fs::create_dir(&file).unwrap();
        assert!(matches!(remembered.add(&record("c", "/x/c")), Err(RememberedError::Text(TextError::File { .. }))));
        assert!(file.is_dir());
    }
}
