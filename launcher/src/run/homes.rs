//! `spectrum home`: home directories that are kept, and the files that are remembered with them.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use rustix::fs::{FlockOperation, flock};
use serde::Serialize;

use super::{
    grants::Record,
    persist::{self, Kept, PersistError},
    remembered::{Remembered, RememberedError},
};
use crate::{
    cli::HomeCommand,
    home::{Home, is_name},
    text,
};

/// What the folders of removed ones begin with: no home directory's name does.
const REMOVED: &str = ".removed-";

/// Why a home directory is not listed, removed or made to forget.
#[derive(Debug, thiserror::Error)]
pub enum HomesError {
    /// The home directory.
    #[error(transparent)]
    Persist(PersistError),
    /// What is remembered with it.
    #[error(transparent)]
    Remembered(#[from] RememberedError),
    /// A VM has it.
    #[error("the home directory {name:?} is in use by {by}: end it first")]
    InUse {
        /// The home directory.
        name: String,
        /// The VM.
        by: String,
    },
    /// No such file is remembered.
    #[error("no file called {grant:?} is remembered with the home directory {name:?}: see `spectrum home list --json`")]
    UnknownFile {
        /// The home directory.
        name: String,
        /// The file.
        grant: String,
    },
    /// Files.
    #[error("cannot use {path}: {source}")]
    File {
        /// Where.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// JSON.
    #[error("cannot write the list: {0}")]
    Json(#[from] serde_json::Error),
}

impl From<PersistError> for HomesError {
    /// Nothing is to be run in it.
    fn from(error: PersistError) -> Self {
        match error {
            PersistError::InUse { name, by } => Self::InUse { name, by },
            other => Self::Persist(other),
        }
    }
}

/// A home directory as `home list --json` shows it.
#[derive(Debug, Serialize)]
struct Line {
    name: String,
    /// Whether a VM has it, also one that is being started.
    in_use: bool,
    /// The VM that runs with it.
    vm: Option<String>,
    /// Files that the next VM is granted again; nothing if what is written down is damaged.
    remembered: Option<Vec<Record>>,
}

/// Carries one of the commands out, and gives what it prints.
pub fn dispatch(home: &Home, command: HomeCommand) -> Result<String, HomesError> {
    match command {
        HomeCommand::List { json } => return list(home, json),
        HomeCommand::Rm { name } => remove(home, &name)?,
        HomeCommand::Forget { name, grant } => forget(home, &name, grant.as_deref())?,
    }
    Ok(String::new())
}

fn list(home: &Home, json: bool) -> Result<String, HomesError> {
    let mut lines = Vec::new();
    if home.all_kept().is_dir() {
        let all = persist::lock_all(home)?;
        for (name, folder) in folders(home)?.into_iter().filter(|(name, _)| is_name(name)) {
            let (in_use, vm) = persist::user_of(&folder, &all);
            lines.push(Line { name, in_use, vm, remembered: Remembered::of(&folder).read().ok() });
        }
    }
    if json {
        return Ok(serde_json::to_string_pretty(&lines)? + "\n");
    }
    let mut rows = vec![["HOME", "REMEMBERED", "VM"].map(str::to_owned)];
    rows.extend(lines.into_iter().map(|line| {
        let remembered = line.remembered.map_or_else(|| "damaged".into(), |files| files.len().to_string());
        let vm = line.vm.unwrap_or_else(|| if line.in_use { "starting" } else { "-" }.into());
        [line.name, remembered, vm]
    }));
    Ok(text::table(&rows))
}

/// The folders among the home directories', by name.
fn folders(home: &Home) -> Result<Vec<(String, PathBuf)>, HomesError> {
    let all = home.all_kept();
    let entries = fs::read_dir(&all).map_err(fail(&all))?.flatten().map(|entry| entry.path());
    let name = |path: &Path| Some(path.file_name()?.to_str()?.to_owned());
    let mut folders: Vec<_> =
        entries.filter(|path| path.is_dir()).filter_map(|path| Some((name(&path)?, path))).collect();
    folders.sort();
    Ok(folders)
}

fn forget(home: &Home, name: &str, grant: Option<&str>) -> Result<(), HomesError> {
    let kept = Kept::take_existing(home, name)?;
    let forgotten = Remembered::of(kept.folder()).forget(|one| grant.is_none_or(|grant| one.name == grant))?;
    match grant {
        Some(grant) if forgotten == 0 => Err(HomesError::UnknownFile { name: name.into(), grant: grant.into() }),
        _ => Ok(()),
    }
}

/// Removes one that no VM has, and what is left of those whose removal was interrupted.
fn remove(home: &Home, name: &str) -> Result<(), HomesError> {
    // Until it has another name nobody can take it.
    let kept = Kept::take_existing(home, name)?;
    let removed = {
        let _all = persist::lock_all(home)?;
        let all = home.all_kept();
        let folder = tempfile::Builder::new().prefix(REMOVED).tempdir_in(&all).map_err(fail(&all))?;
        fs::rename(kept.folder(), folder.path().join("0")).map_err(fail(kept.folder()))?;
        let _ = folder.keep();
        File::open(&all).and_then(|all| all.sync_all()).map_err(fail(&all))?;
        let mut removed = Vec::new();
        for (name, folder) in folders(home)? {
            // One that is locked is being removed by another.
            if let Some(lock) = name.starts_with(REMOVED).then(|| locked(&folder)).flatten() {
                removed.push((folder, lock));
            }
        }
        removed
    };
    drop(kept);
    let remove = |(folder, _lock): (PathBuf, File)| remove_tree(&folder).map_err(fail(&folder));
    removed.into_iter().map(remove).fold(Ok(()), Result::and)
}

/// Locks a folder for as long as the file is open, if nobody else has.
fn locked(folder: &Path) -> Option<File> {
    let file = File::open(folder).ok()?;
    flock(&file, FlockOperation::NonBlockingLockExclusive).ok()?;
    Some(file)
}

/// Removes a folder with all that is in it. A guest has made that: it can be nested deeper than this process has files to open,
/// and closed to its owner. So each folder is opened up, and moved to the top before what is in it is removed.
fn remove_tree(top: &Path) -> io::Result<()> {
    let mut number = 0_u64;
    while let Some(entry) = fs::read_dir(top)?.next().transpose()? {
        if !entry.file_type()?.is_dir() {
            fs::remove_file(entry.path())?;
            continue;
        }
        for child in fs::read_dir(entry.path())? {
            let child = child?;
            if child.file_type()?.is_dir() {
                fs::set_permissions(child.path(), fs::Permissions::from_mode(0o700))?;
                move_into(top, &child.path(), &mut number)?;
            } else {
                fs::remove_file(child.path())?;
            }
        }
        fs::remove_dir(entry.path())?;
    }
    fs::remove_dir(top)
}

/// Moves a folder to where nothing is in its way, by a number above `number`.
fn move_into(top: &Path, folder: &Path, number: &mut u64) -> io::Result<()> {
    loop {
        *number = number.saturating_add(1);
        match fs::rename(folder, top.join(number.to_string())) {
            Err(error) if matches!(error.kind(), io::ErrorKind::AlreadyExists | io::ErrorKind::DirectoryNotEmpty) => {}
            result => return result,
        }
    }
}

/// What is told about a failed system call.
fn fail(path: &Path) -> impl FnOnce(io::Error) -> HomesError + use<> {
    let path = path.to_owned();
    move |source| HomesError::File { path, source }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use rustix::fs::{CWD, Mode, OFlags, mkdirat, openat};

    use super::*;

    fn record(name: &str) -> Record {
        Record { name: name.into(), path: format!("/x/{name}").into(), writable: false }
    }

    fn names(home: &Home) -> Vec<String> {
        let text = list(home, true).unwrap();
        let lines: Vec<serde_json::Value> = serde_json::from_str(&text).unwrap();
        lines.iter().map(|line| line["name"].as_str().unwrap().to_owned()).collect()
    }

    #[test]
    fn listed_with_who_has_them_and_what_is_remembered() {
        let place = tempfile::tempdir().unwrap();
        let home = Home::at(place.path());
        assert_eq!(list(&home, true).unwrap(), "[]\n");
        let mut web = Kept::take(&home, "web").unwrap();
        let _mail = Kept::take(&home, "mail").unwrap();
        drop(Kept::take(&home, "old").unwrap());
        web.used_by("web-1", Path::new("/run/vm-1")).unwrap();
        Remembered::of(web.folder()).add(&record("a")).unwrap();
        fs::write(home.kept("old").unwrap().join("picked.json"), "{").unwrap();
        fs::create_dir(home.all_kept().join(".removed-x")).unwrap();
        let expected =
            "HOME  REMEMBERED  VM\nmail  0           starting\nold   damaged     -\nweb   1           web-1\n";
        assert_eq!(list(&home, false).unwrap(), expected);
        let lines: Vec<serde_json::Value> = serde_json::from_str(&list(&home, true).unwrap()).unwrap();
        let file = serde_json::json!({ "name": "a", "path": "/x/a", "writable": false });
        let web = serde_json::json!({ "name": "web", "in_use": true, "vm": "web-1", "remembered": [file] });
        assert_eq!(lines[2], web);
        assert_eq!((&lines[1]["in_use"], &lines[1]["remembered"]), (&false.into(), &serde_json::Value::Null));
    }

    #[test]
    fn forgotten_while_no_vm_has_it() {
        let place = tempfile::tempdir().unwrap();
        let home = Home::at(place.path());
        let kept = Kept::take(&home, "web").unwrap();
        let remembered = Remembered::of(kept.folder());
        ["a", "b", "c"].iter().try_for_each(|name| remembered.add(&record(name))).unwrap();
        let busy = forget(&home, "web", None).unwrap_err().to_string();
        assert_eq!(busy, "the home directory \"web\" is in use by a VM that is being started: end it first");
        drop(kept);
        forget(&home, "web", Some("b")).unwrap();
        assert_eq!(remembered.read().unwrap(), [record("a"), record("c")]);
        let unknown = forget(&home, "web", Some("b")).unwrap_err();
        assert!(matches!(&unknown, HomesError::UnknownFile { grant, .. } if grant == "b"), "{unknown}");
        forget(&home, "web", None).unwrap();
        assert_eq!(remembered.read().unwrap(), []);
        forget(&home, "web", None).unwrap();
        let unknown = forget(&home, "wbe", None).unwrap_err();
        assert!(matches!(&unknown, HomesError::Persist(PersistError::Unknown(_))), "{unknown}");
        assert_eq!(names(&home), ["web"], "none was made");
    }

    #[test]
    fn removed_whole_and_only_while_no_vm_has_it() {
        let place = tempfile::tempdir().unwrap();
        let home = Home::at(place.path());
        assert!(matches!(remove(&home, "web"), Err(HomesError::Persist(PersistError::Unknown(_)))));
        let kept = Kept::take(&home, "web").unwrap();
        let files = kept.grant().path;
        fs::write(files.join("letter"), "kept").unwrap();
        assert!(matches!(remove(&home, "web"), Err(HomesError::InUse { .. })));
        assert!(files.join("letter").exists());
        drop(kept);
        // What an interrupted removal left goes too; what another is about to remove stays.
        let [left, other] = [".removed-a", ".removed-b"].map(|name| home.all_kept().join(name));
        [&left, &other].iter().try_for_each(|folder| fs::create_dir_all(folder.join("1/x"))).unwrap();
        let lock = locked(&other).unwrap();
        // What is outside stays, whatever leads there.
        fs::create_dir(place.path().join("outside")).unwrap();
        fs::write(place.path().join("outside/file"), "mine").unwrap();
        symlink(place.path().join("outside"), files.join("link")).unwrap();
        remove(&home, "web").unwrap();
        let there: Vec<_> = folders(&home).unwrap().into_iter().map(|(name, _)| name).collect();
        assert_eq!(there, [".removed-b"]);
        assert_eq!(fs::read_to_string(place.path().join("outside/file")).unwrap(), "mine");
        drop(lock);
        // The name is free again, for an empty one.
        let again = Kept::take(&home, "web").unwrap();
        assert_eq!(fs::read_dir(again.grant().path).unwrap().count(), 0);
    }

    #[test]
    fn what_a_guest_made_to_stay_goes() {
        let place = tempfile::tempdir().unwrap();
        let home = Home::at(place.path());
        let files = Kept::take(&home, "web").unwrap().grant().path;
        // Deeper than files can be open at once, and than a path can be long.
        let open = |at: &dyn std::os::fd::AsFd, path: &Path| {
            openat(at.as_fd(), path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).unwrap()
        };
        let mut folder = open(&CWD, &files);
        for _ in 0..2500 {
            mkdirat(&folder, "d", Mode::RWXU).unwrap();
            folder = open(&folder, Path::new("d"));
        }
        drop(folder);
        // As root all is open anyway.
        fs::create_dir_all(files.join("closed/within")).unwrap();
        fs::write(files.join("closed/within/file"), "").unwrap();
        for name in ["closed/within", "closed", ""] {
            fs::set_permissions(files.join(name), PermissionsExt::from_mode(0o000)).unwrap();
        }
        remove(&home, "web").unwrap();
        assert_eq!(fs::read_dir(home.all_kept()).unwrap().count(), 0);
    }
}
