//! Files and folders of the host that a VM may use.
//!
//! The VMM has them. What it was told is also written down in the VM's folder, one file a grant, for `ps`: before the VM can use
//! the grant, and until it no longer can.

use std::{
    collections::BTreeSet,
    ffi::OsStr,
    fs, io,
    io::Write,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::{CWD, Mode, OFlags, openat},
    io::Errno,
};
use serde::{Deserialize, Serialize};
use vmm_api::{Client, ClientError, Request};
use vmm_config::{GrantConfig, GrantName};

/// The identifier that the VMM gives the first file system.
const DEVICE: &str = "_fs0";

/// Where the guest has it.
const MOUNT_POINT: &str = "/host";

/// The name of the home directory that is kept.
pub const HOME_GRANT: &str = ".home";

/// The folder in the VM's with what is written down.
const RECORDS: &str = "grants";

/// Why something is not granted, or not taken back.
#[derive(Debug, thiserror::Error)]
pub enum GrantError {
    #[error("cannot grant {path}: {source}")]
    Open { path: PathBuf, source: Errno },
    #[error("{0} has no name of its own that the VM could see it by: choose one with --as")]
    NoName(PathBuf),
    #[error("{0:?} cannot be what a file is called in the VM: choose another name with --as")]
    Name(String),
    #[error("{name} would be two files in the VM: {one} and {other}; share one of them in another way")]
    Twice { name: String, one: PathBuf, other: PathBuf },
    #[error("{MOUNT_POINT}/{0} is there already: choose another name with --as, or `spectrum revoke` that")]
    Exists(String),
    #[error("cannot write down what the VM is granted: {0}")]
    Record(#[from] io::Error),
    #[error("the VM's file system refuses: {0}")]
    Refused(String),
    #[error(transparent)]
    Vmm(ClientError),
}

impl From<ClientError> for GrantError {
    /// The VMM's own sentences suffice.
    fn from(error: ClientError) -> Self {
        match error {
            ClientError::Refused { lines, .. } => Self::Refused(lines.join(": ")),
            other => Self::Vmm(other),
        }
    }
}

/// A file or folder, and what the guest may do with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    /// Where it is on the host.
    pub path: PathBuf,
    /// The guest may change it.
    pub writable: bool,
    /// What the guest knows it by; without it, the path's last part.
    pub called: Option<String>,
}

impl Grant {
    /// Reads `PATH[:rw]`.
    pub fn parse(text: &OsStr) -> Self {
        let (path, writable) = match text.as_bytes().strip_suffix(b":rw") {
            Some(path) => (OsStr::from_bytes(path), true),
            None => (text, false),
        };
        Self { path: path.into(), writable, called: None }
    }

    /// What the guest knows it by.
    pub fn name(&self) -> Result<String, GrantError> {
        let name = self.called.clone().map_or_else(|| own_name(&self.path), Ok)?;
        if is_name(&name) { Ok(name) } else { Err(GrantError::Name(name)) }
    }

    fn open(&self) -> Result<OwnedFd, GrantError> {
        openat(CWD, &self.path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
            .map_err(|source| GrantError::Open { path: self.path.clone(), source })
    }

    /// Lets the guest of the VM in `folder` have it, and says where it is there.
    pub fn give(&self, api: &mut Client, folder: &Path) -> Result<String, GrantError> {
        // What is granted is what this user meant by the path, here and now: the VMM is given the thing itself.
        let file = self.open()?;
        let record = Record { name: self.name()?, path: std::path::absolute(&self.path)?, writable: self.writable };
        give_open(api, folder, file.as_fd(), &record)?;
        Ok(place_of(&record.name))
    }
}

/// What was granted, as `ps` tells it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// What the guest knows it by.
    pub name: String,
    /// Where it was on the host.
    pub path: PathBuf,
    /// The guest may change it.
    pub writable: bool,
}

impl Record {
    /// Writes down that `folder`'s VM has it. Only one can do so for a name.
    fn write_to(&self, folder: &Path) -> Result<PathBuf, GrantError> {
        let records = folder.join(RECORDS);
        fs::create_dir_all(&records)?;
        // Whole before it has its name; what is in progress is not in the folder that is listed.
        let mut file = tempfile::NamedTempFile::new_in(folder)?;
        file.write_all(&serde_json::to_vec(self).map_err(io::Error::other)?)?;
        let path = records.join(&self.name);
        match file.persist_noclobber(&path) {
            Ok(_) => Ok(path),
            Err(error) if error.error.kind() == io::ErrorKind::AlreadyExists => {
                Err(GrantError::Exists(self.name.clone()))
            }
            Err(error) => Err(error.error.into()),
        }
    }
}

/// What the VM in `folder` was granted, by name.
pub fn list(folder: &Path) -> Vec<Record> {
    let entries = fs::read_dir(folder.join(RECORDS)).into_iter().flatten().flatten();
    let read = |entry: fs::DirEntry| serde_json::from_slice(&fs::read(entry.path()).ok()?).ok();
    let mut records: Vec<Record> = entries.filter_map(read).collect();
    records.sort_by(|one, other| one.name.cmp(&other.name));
    records
}

/// Checks beforehand what a VM shall have from the start.
pub fn check(grants: &[Grant]) -> Result<(), GrantError> {
    let mut names = BTreeSet::from([HOME_GRANT.to_owned()]);
    for grant in grants {
        grant.open()?;
        let name = grant.name()?;
        if name == HOME_GRANT {
            return Err(GrantError::Name(name));
        }
        if !names.insert(name.clone()) {
            let one = grants.iter().find(|one| one.name().is_ok_and(|one| one == name));
            let one = one.map(|one| one.path.clone()).unwrap_or_default();
            return Err(GrantError::Twice { name, one, other: grant.path.clone() });
        }
    }
    Ok(())
}

/// Whether something can be granted by this name. It is also the name of a file here.
pub fn is_name(name: &str) -> bool {
    (1..=255).contains(&name.len()) && name != "." && name != ".." && !name.contains(['/', '\0'])
}

/// Where the guest has what it knows by this name.
pub fn place_of(name: &str) -> String {
    format!("{MOUNT_POINT}/{name}")
}

/// Lets the guest of the VM in `folder` have what is open, which may be a mere reference (O_PATH).
pub fn give_open(api: &mut Client, folder: &Path, file: BorrowedFd<'_>, record: &Record) -> Result<(), GrantError> {
    let written = record.write_to(folder)?;
    let config = GrantConfig { id: DEVICE.into(), name: record.name.clone(), path: None, writable: record.writable };
    if let Err(error) = api.send_with_fds(&Request::VmAddGrant(config), &[file]) {
        fs::remove_file(written)?;
        return Err(error.into());
    }
    Ok(())
}

fn own_name(path: &Path) -> Result<String, GrantError> {
    let name = path.file_name().and_then(OsStr::to_str);
    name.map(str::to_owned).ok_or_else(|| GrantError::NoName(path.to_owned()))
}

/// Takes back what the guest of the VM in `folder` knows by this name.
pub fn revoke(api: &mut Client, folder: &Path, name: &str) -> Result<(), GrantError> {
    let answer = api.send(&Request::VmRemoveGrant(GrantName { id: DEVICE.into(), name: name.into() }));
    // What the VMM does not know is not granted either.
    let known = list(folder).into_iter().any(|record| record.name == name);
    if known && matches!(answer, Ok(_) | Err(ClientError::Refused { .. })) {
        fs::remove_file(folder.join(RECORDS).join(name))?;
    }
    answer?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_and_what_may_be_done() {
        let parse = |text: &str| {
            let grant = Grant::parse(OsStr::new(text));
            (grant.path.display().to_string(), grant.writable)
        };
        assert_eq!(parse("/a/b"), ("/a/b".into(), false));
        assert_eq!(parse("/a/b:rw"), ("/a/b".into(), true));
        assert_eq!(parse("b:rwx"), ("b:rwx".into(), false));
        assert_eq!(own_name(Path::new("/a/b.txt/")).unwrap(), "b.txt");
        for name in ["", ".", "..", "a/b", "a\0", &"a".repeat(256)] {
            let grant = Grant { called: Some(name.into()), ..Grant::parse(OsStr::new("/")) };
            assert!(matches!(grant.name(), Err(GrantError::Name(_))), "{name:?}");
        }
        for nameless in ["/", "..", "/a/.."] {
            assert!(matches!(own_name(Path::new(nameless)), Err(GrantError::NoName(_))), "{nameless}");
        }
    }

    #[test]
    fn what_is_granted_from_the_start_is_checked_beforehand() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["a", "b"] {
            fs::create_dir_all(folder.path().join(name).join("same")).unwrap();
        }
        let grants = |names: &[&str]| -> Vec<Grant> {
            names.iter().map(|name| Grant::parse(folder.path().join(name).as_os_str())).collect()
        };
        check(&grants(&["a", "b", "a/same"])).unwrap();
        let error = check(&grants(&["a", "a/same", "b/same"])).unwrap_err().to_string();
        assert!(error.starts_with("same would be two files in the VM: ") && error.contains("b/same;"), "{error}");
        assert!(matches!(check(&grants(&["a", "missing"])), Err(GrantError::Open { .. })));
        fs::create_dir(folder.path().join(HOME_GRANT)).unwrap();
        assert!(matches!(check(&grants(&[HOME_GRANT])), Err(GrantError::Name(_))));
    }

    #[test]
    fn a_name_is_written_down_once() {
        let folder = tempfile::tempdir().unwrap();
        let record = Record { name: "etc".into(), path: "/etc".into(), writable: true };
        assert_eq!(list(folder.path()), []);
        let path = record.write_to(folder.path()).unwrap();
        assert!(matches!(record.write_to(folder.path()), Err(GrantError::Exists(_))));
        assert_eq!(list(folder.path()), std::slice::from_ref(&record));
        fs::remove_file(path).unwrap();
        record.write_to(folder.path()).unwrap();
    }
}
