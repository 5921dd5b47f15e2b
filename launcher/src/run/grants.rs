//! Files and folders of the host that a VM may use.

use std::{
    ffi::OsStr,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::{CWD, Mode, OFlags, openat},
    io::Errno,
};
use vmm_api::{Client, ClientError, Request};
use vmm_config::{GrantConfig, GrantName};

/// The identifier that the VMM gives the first file system.
const DEVICE: &str = "_fs0";

/// Where the guest has it.
const MOUNT_POINT: &str = "/host";

/// Why something is not granted, or not taken back.
#[derive(Debug, thiserror::Error)]
pub enum GrantError {
    #[error("cannot grant {path}: {source}")]
    Open { path: PathBuf, source: Errno },
    #[error("{0} has no name of its own that the VM could see it by: choose one with --as")]
    NoName(PathBuf),
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

    /// Lets the guest have it, and says where it is there.
    pub fn give(&self, api: &mut Client) -> Result<String, GrantError> {
        // What is granted is what this user meant by the path, here and now: the VMM is given the thing itself.
        let file = openat(CWD, &self.path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
            .map_err(|source| GrantError::Open { path: self.path.clone(), source })?;
        let name = match &self.called {
            Some(name) => name.clone(),
            None => own_name(&self.path)?,
        };
        let place = format!("{MOUNT_POINT}/{name}");
        give_open(api, file.as_fd(), name, self.writable)?;
        Ok(place)
    }
}

/// Lets the guest have what is open, which may be a mere reference (O_PATH), by this name.
pub fn give_open(api: &mut Client, file: BorrowedFd<'_>, name: String, writable: bool) -> Result<(), GrantError> {
    let config = GrantConfig { id: DEVICE.into(), name, path: None, writable };
    api.send_with_fds(&Request::VmAddGrant(config), &[file])?;
    Ok(())
}

fn own_name(path: &Path) -> Result<String, GrantError> {
    let name = path.file_name().and_then(OsStr::to_str);
    name.map(str::to_owned).ok_or_else(|| GrantError::NoName(path.to_owned()))
}

/// Takes back what the guest knows by this name.
pub fn revoke(api: &mut Client, name: &str) -> Result<(), GrantError> {
    api.send(&Request::VmRemoveGrant(GrantName { id: DEVICE.into(), name: name.into() }))?;
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
        for nameless in ["/", "..", "/a/.."] {
            assert!(matches!(own_name(Path::new(nameless)), Err(GrantError::NoName(_))), "{nameless}");
        }
    }
}
