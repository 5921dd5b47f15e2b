//! Files that the user picked, granted to the VM until it ends; to the next VM with the same home directory, too.

use std::{
    fs,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use rustix::{
    fs::{CWD, FileType, Mode, OFlags, ResolveFlags, fstat, openat, openat2},
    io::Errno,
};
use vmm_api::Client;

use crate::{
    policy::{DecisionPoint, Service},
    run::{
        grants::{self, GrantError, Record},
        remembered::{Remembered, is_same},
    },
};

/// How long the VMM may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// Names that are tried for files that are called alike.
const NAMES: u32 = 1000;

/// Why a file is not granted.
#[derive(Debug, thiserror::Error)]
pub enum FilesError {
    #[error("{0} has no name")]
    NoName(PathBuf),
    #[error("cannot grant {path}: {source}")]
    Open { path: PathBuf, source: Errno },
    #[error("cannot grant {0}: it is a link, and what it leads to is not what was seen")]
    Link(PathBuf),
    #[error("cannot grant {0}: it is neither a file nor a folder")]
    Kind(PathBuf),
    #[error("cannot find the folder of {path}: {source}")]
    Folder { path: PathBuf, source: std::io::Error },
    #[error("{0} is in another place: there is a link on the way to it")]
    Moved(PathBuf),
    #[error("the policy denies {0}")]
    Denied(String),
    #[error("too many files are called {0:?}")]
    Names(String),
    #[error(transparent)]
    Grant(#[from] GrantError),
}

impl FilesError {
    /// Whether the file does not exist.
    fn is_absence(&self) -> bool {
        match self {
            Self::Open { source, .. } => *source == Errno::NOENT,
            Self::Folder { source, .. } => source.kind() == std::io::ErrorKind::NotFound,
            _ => false,
        }
    }
}

/// What is done with a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// It is there, to be read.
    Read,
    /// It is there, to be changed.
    Write,
    /// It is to be written; an empty one is made if it is not there.
    Create,
}

/// What of the host's files the VM has.
#[derive(Debug)]
pub struct Files {
    /// The VMM's socket.
    api: PathBuf,
    /// The VM's folder.
    folder: PathBuf,
    /// One is granted at a time: no two get the same name.
    turn: Mutex<()>,
    /// Where what is picked is remembered, if it is.
    remembered: Option<Remembered>,
}

/// A file or folder of the host without links in its path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    folder: PathBuf,
    name: PathBuf,
}

impl Place {
    /// Where `path` is in truth. Links on the way are followed, as the dialog did; its last part is what the user saw, so it is taken
    /// for itself: a guest that may write to a folder could have put a link there.
    pub fn find(path: &Path) -> Result<Self, FilesError> {
        let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(FilesError::NoName(path.to_owned()));
        };
        let folder = fs::canonicalize(folder).map_err(|source| FilesError::Folder { path: path.to_owned(), source })?;
        Ok(Self { folder, name: name.into() })
    }

    /// The whole path.
    pub fn path(&self) -> PathBuf {
        self.folder.join(&self.name)
    }

    /// Opens it as a reference, and makes it first where that is wanted.
    fn open(&self, access: Access) -> Result<OwnedFd, FilesError> {
        let path = self.path();
        let fail = |source: Errno| FilesError::Open { path: path.clone(), source };
        let reference = OFlags::PATH | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let folder =
            openat2(CWD, &self.folder, reference | OFlags::DIRECTORY, Mode::empty(), ResolveFlags::NO_SYMLINKS)
                .map_err(fail)?;
        if access == Access::Create {
            let new = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
            match openat(&folder, &self.name, new, Mode::from_raw_mode(0o666)) {
                Ok(_) | Err(Errno::EXIST) => {}
                Err(errno) => return Err(fail(errno)),
            }
        }
        let file = openat(&folder, &self.name, reference, Mode::empty()).map_err(fail)?;
        match FileType::from_raw_mode(fstat(&file).map_err(fail)?.st_mode) {
            FileType::RegularFile | FileType::Directory => Ok(file),
            FileType::Symlink => Err(FilesError::Link(path)),
            _ => Err(FilesError::Kind(path)),
        }
    }
}

impl Files {
    /// Those of the VM in `folder`, whose VMM's socket is `api`.
    pub fn new(api: PathBuf, folder: PathBuf, remembered: Option<Remembered>) -> Self {
        Self { api, folder, turn: Mutex::default(), remembered }
    }

    /// Grants a file that was picked, and gives its name in the VM. What was granted already has the name it had.
    pub fn give(&self, place: &Place, access: Access) -> Result<String, FilesError> {
        let file = place.open(access)?;
        let (path, writable) = (place.path(), access != Access::Read);
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        // It may have been revoked since, or granted by other means.
        let given = grants::list(&self.folder);
        let record = match given.iter().find(|one| is_same(one, &path, writable)) {
            Some(one) => one.clone(),
            None => {
                let record = Record { name: self.name_for(place, writable, &given)?, path, writable };
                self.grant(file.as_fd(), &record)?;
                record
            }
        };
        if let Some(Err(error)) = self.remembered.as_ref().map(|remembered| remembered.add(&record)) {
            log::warn!("{} is not granted to the next VM: {error}", record.path.display());
        }
        Ok(record.name)
    }

    /// What a file that is not granted is called: what it was before, else what no other is, also none that is remembered.
    fn name_for(&self, place: &Place, writable: bool, given: &[Record]) -> Result<String, FilesError> {
        let path = place.path();
        // What cannot be read is told when something is added.
        let remembered = self.remembered.as_ref().and_then(|remembered| remembered.read().ok()).unwrap_or_default();
        let is_given = |name: &str| given.iter().any(|one| one.name == name);
        if let Some(one) = remembered.iter().find(|one| is_same(one, &path, writable) && !is_given(&one.name)) {
            return Ok(one.name.clone());
        }
        let wanted = place.name.to_str().ok_or_else(|| FilesError::NoName(path.clone()))?;
        let taken = |name: &str| is_given(name) || remembered.iter().any(|one| one.name == name);
        let mut names = (1..NAMES).map(|number| numbered(wanted, number)).filter(|name| !taken(name));
        names.next().ok_or_else(|| FilesError::Names(wanted.to_owned()))
    }

    fn grant(&self, file: BorrowedFd<'_>, record: &Record) -> Result<(), FilesError> {
        let mut api = Client::connect(&self.api).map_err(GrantError::from)?;
        api.set_timeout(Some(PATIENCE)).map_err(GrantError::from)?;
        grants::give_open(&mut api, &self.folder, file, record)?;
        let how = if record.writable { "writing" } else { "reading" };
        log::info!("granted {} for {how}", record.path.display());
        Ok(())
    }

    /// Grants what was picked for former VMs, by the names it had. What is no longer there is forgotten.
    pub fn restore(&self, point: &DecisionPoint) {
        let Some(remembered) = &self.remembered else { return };
        let records = remembered.read_or_put_aside().unwrap_or_else(|error| {
            log::warn!("no picked files are remembered: {error}");
            Vec::new()
        });
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let mut gone = Vec::new();
        for record in records {
            if let Err(error) = self.give_again(&record, point) {
                log::info!("{} is not granted again: {error}", record.path.display());
                if error.is_absence() {
                    gone.push(record);
                }
            }
        }
        if let Err(error) = remembered.forget(|one| gone.contains(one)) {
            log::warn!("files that are gone are not forgotten: {error}");
        }
    }

    fn give_again(&self, record: &Record, point: &DecisionPoint) -> Result<(), FilesError> {
        let place = Place::find(&record.path)?;
        // Nobody sees a link that was put on the way since, as one does in a dialog.
        if place.path() != record.path {
            return Err(FilesError::Moved(record.path.clone()));
        }
        let file = place.open(if record.writable { Access::Write } else { Access::Read })?;
        let target = record.path.display().to_string();
        if !point.decide_remembered(Service::Files, &target).allowed {
            return Err(FilesError::Denied(target));
        }
        self.grant(file.as_fd(), record)
    }
}

/// `a.txt`, then `a-2.txt`, `a-3.txt`. The end of a name is what programs know its kind by.
fn numbered(name: &str, number: u32) -> String {
    if number == 1 {
        return name.to_owned();
    }
    match name.rsplit_once('.').filter(|(stem, _)| !stem.is_empty()) {
        Some((stem, end)) => format!("{stem}-{number}.{end}"),
        None => format!("{name}-{number}"),
    }
}

/// The path that a file: URI of this host names.
pub fn path_of_uri(uri: &str) -> Option<PathBuf> {
    let path = uri.strip_prefix("file://").filter(|path| path.starts_with('/'))?;
    let bytes: Vec<u8> = percent_encoding::percent_decode_str(path).collect();
    (!bytes.contains(&0)).then(|| Path::new(std::ffi::OsStr::from_bytes(&bytes)).to_owned())
}

/// The URI by which the guest knows what it was granted by this name, beneath `root`.
pub fn uri_in_guest(root: &str, name: &str) -> String {
    /// All but what RFC 3986 calls unreserved, and the separator.
    const ESCAPED: &percent_encoding::AsciiSet =
        &percent_encoding::NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~').remove(b'/');
    format!("file://{}", percent_encoding::utf8_percent_encode(&format!("{root}/{name}"), ESCAPED))
}
