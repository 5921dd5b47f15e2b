//! A home directory that is kept by the host, in the place of the account's own.

use std::{
    fs, io,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
};

use rustix::mount::mount_bind;

use super::accounts;

/// Why an account has no other home. One sentence for the user of the launcher.
#[derive(Debug, thiserror::Error)]
pub enum HomeError {
    /// The account is unknown.
    #[error("{0}")]
    Account(io::Error),
    /// A new one could not be filled.
    #[error("cannot copy {path} of the template into the home directory: {source}")]
    Copy {
        /// What was to be copied.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// It stays where it is.
    #[error("cannot put {source_path} in the place of {home}: {source}")]
    Mount {
        /// What was to be mounted.
        source_path: PathBuf,
        /// Where.
        home: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
}

/// Mounts `source` over the home of the account `user`. What is in that is copied into an empty `source` first.
pub fn keep(user: &str, source: &Path) -> Result<(), HomeError> {
    let home = accounts::find(user).map_err(HomeError::Account)?.home;
    let fail = |error| HomeError::Mount { source_path: source.into(), home: home.clone(), source: error };
    if fs::read_dir(source).map_err(fail)?.next().is_none() {
        copy_below(&home, source)?;
    }
    mount_bind(source, &home).map_err(|errno| fail(errno.into()))
}

/// Copies files, folders and links below `from`: a home that was just made has nothing else.
fn copy_below(from: &Path, to: &Path) -> Result<(), HomeError> {
    let fail = |path: &Path| {
        let path = path.to_owned();
        move |source| HomeError::Copy { path, source }
    };
    for entry in fs::read_dir(from).map_err(fail(from))? {
        let entry = entry.map_err(fail(from))?;
        let (path, target) = (entry.path(), to.join(entry.file_name()));
        let data = fs::symlink_metadata(&path).map_err(fail(&path))?;
        if data.is_dir() {
            fs::create_dir(&target).map_err(fail(&path))?;
            copy_below(&path, &target)?;
            let mode = fs::Permissions::from_mode(data.permissions().mode() & 0o777);
            fs::set_permissions(&target, mode).map_err(fail(&path))?;
        } else if data.is_symlink() {
            fs::read_link(&path).and_then(|link| symlink(link, &target)).map_err(fail(&path))?;
        } else if data.is_file() {
            fs::copy(&path, &target).map_err(fail(&path))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_home_begins_with_is_copied() {
        let place = tempfile::tempdir().unwrap();
        let [from, to] = ["from", "to"].map(|name| place.path().join(name));
        fs::create_dir_all(from.join(".config/a")).unwrap();
        fs::create_dir(&to).unwrap();
        fs::write(from.join(".profile"), "PATH=x\n").unwrap();
        fs::write(from.join(".config/a/b"), "c").unwrap();
        fs::set_permissions(from.join(".config"), PermissionsExt::from_mode(0o700)).unwrap();
        symlink("/nowhere", from.join("link")).unwrap();
        copy_below(&from, &to).unwrap();
        assert_eq!(fs::read_to_string(to.join(".profile")).unwrap(), "PATH=x\n");
        assert_eq!(fs::read_to_string(to.join(".config/a/b")).unwrap(), "c");
        assert_eq!(fs::metadata(to.join(".config")).unwrap().permissions().mode() & 0o777, 0o700);
        assert_eq!(fs::read_link(to.join("link")).unwrap(), Path::new("/nowhere"));
        // Nothing that is there is replaced.
        assert!(matches!(copy_below(&from, &to), Err(HomeError::Copy { .. })));
    }

    #[test]
    fn what_is_not_there_is_told() {
        let error = keep("nobody-like-this", Path::new("/")).unwrap_err().to_string();
        assert!(error.contains("no user"), "{error}");
        let error = keep("root", Path::new("/no/such")).unwrap_err().to_string();
        assert!(error.contains("cannot put /no/such in the place of /root"), "{error}");
    }
}
