//! Templates of users who are not root: their files have several owners, so they are made in a user namespace
//! (user_namespaces(7)) that has several users, of the range that is this user's to use (subuid(5)).

use std::{env, io, os::unix::process::CommandExt, process::Command};

use super::tool::{Tool, ToolError};

/// The program that makes one, and how: this user is root in it, and the range is everybody else.
const UNSHARE: &str = "unshare";
const OPTIONS: [&str; 4] = ["--user", "--map-root-user", "--map-auto", "--mount"];

/// Why this user cannot make files of several owners.
#[derive(Debug, thiserror::Error)]
pub enum NamespaceError {
    /// There is no namespace with several users for this one.
    #[error(
        "{0}\nThe files of a template have several owners, so for who is not root it is made in a user namespace. If the user has no range of \
         further users, install the Debian package uidmap and give one (usermod --add-subuids 100000-165535 --add-subgids \
         100000-165535 USER); if user namespaces are switched off, do this as root"
    )]
    Refused(ToolError),
    /// This program was not started again.
    #[error("cannot run this program again in a user namespace: {0}")]
    Again(io::Error),
}

/// Returns in a process that may make files of several owners: this one, if its user is root. Otherwise this program starts from
/// the beginning, with the same arguments.
pub fn enter() -> Result<(), NamespaceError> {
    if rustix::process::geteuid().is_root() {
        return Ok(());
    }
    Tool::new(UNSHARE).args(OPTIONS).arg("true").run().map_err(NamespaceError::Refused)?;
    let program = env::current_exe().map_err(NamespaceError::Again)?;
    let mut again = Command::new(UNSHARE);
    Err(NamespaceError::Again(again.args(OPTIONS).arg("--").arg(program).args(env::args_os().skip(1)).exec()))
}
