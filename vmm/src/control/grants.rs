//! The control thread's verbs on grants.

use std::os::fd::OwnedFd;

use rustix::fs::{Mode, OFlags, open};
use vmm_config::{GrantConfig, GrantName};

use super::{Grants, Vmm, VmmError, no_machine};

impl Vmm {
    /// Lets the guest use a file or directory, while it runs or is paused.
    ///
    /// # Errors
    /// If there is no such device, or the file cannot be granted.
    pub(super) fn add_grant(&mut self, grant: &GrantConfig, mut fds: Vec<OwnedFd>) -> Result<(), VmmError> {
        let grants = self.grants(&grant.id)?;
        let target = match (&grant.path, fds.pop(), fds.is_empty()) {
            (None, Some(fd), true) => fd,
            (Some(path), None, _) => {
                let opened = open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
                opened.map_err(|e| VmmError::State(format!("cannot find {}: {e}", path.display())))?
            }
            _ => {
                let why = "a grant has either a path, or one descriptor that comes along with the request";
                return Err(VmmError::State(why.into()));
            }
        };
        Ok(grants.add(&grant.name, target, grant.writable)?)
    }

    /// Takes back what [`Vmm::add_grant`] gave.
    ///
    /// # Errors
    /// If there is no such device or grant.
    pub(super) fn remove_grant(&mut self, grant: &GrantName) -> Result<(), VmmError> {
        Ok(self.grants(&grant.id)?.remove(&grant.name)?)
    }

    fn grants(&self, id: &str) -> Result<&Grants, VmmError> {
        let created = self.created.as_ref().ok_or_else(no_machine)?;
        created.grants.get(id).ok_or_else(|| {
            let all: Vec<&str> = created.grants.keys().map(String::as_str).collect();
            VmmError::State(match all.is_empty() {
                true => "the machine has no device for grants; start it with --fs tag=NAME".into(),
                false => format!("there is no device for grants called {id}, but {}", all.join(", ")),
            })
        })
    }
}
