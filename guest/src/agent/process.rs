//! A process to be started, from the request and the user's account.

use std::{os::unix::process::CommandExt, path::Path, process::Command};

use guest_proto::Run;

use super::accounts::{self, Account};

/// Name of the Wayland socket in the user's runtime folder.
pub const WAYLAND_DISPLAY: &str = "wayland-0";

/// Name of the session bus's socket in the user's runtime folder.
pub const SESSION_BUS: &str = "bus";

/// Where xdg-desktop-portal is, if the template has it.
const PORTAL: &str = "/usr/libexec/xdg-desktop-portal";

/// What makes toolkits ask portals, as they do by themselves in other kinds of sandboxes: GTK 3 and GIO, GTK 4, Qt.
pub const USE_PORTALS: [(&str, &str); 3] =
    [("GTK_USE_PORTAL", "1"), ("GDK_DEBUG", "portals"), ("QT_QPA_PLATFORMTHEME", "xdgdesktopportal")];

const SEARCH_PATH: &str = "/usr/local/bin:/usr/bin:/bin:/usr/local/games:/usr/games";

/// Why there is no process. Each is one sentence for the user of the launcher.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The request names no program.
    #[error("no program was named")]
    Empty,
    /// The account is unknown.
    #[error("{0}")]
    Account(std::io::Error),
    /// The working directory is not there.
    #[error("there is no folder {0} in the VM")]
    Folder(String),
    /// A string has a zero byte or a variable name an equals sign.
    #[error("the environment variable {0:?} cannot be set")]
    Variable(String),
    /// The program is not there.
    #[error("there is no program {0} in the VM: add its package to the template")]
    NotFound(String),
    /// The system refused.
    #[error("cannot start {program}: {source}")]
    Start {
        /// The program.
        program: String,
        /// The system's reason.
        source: std::io::Error,
    },
}

/// The command for a request, with the account's identity and environment, and the account. Streams are still to be set, and with a
/// terminal a session; without one it is in a process group of its own.
pub fn command(run: &Run) -> Result<(Command, Account), StartError> {
    let (program, arguments) = run.argv.split_first().ok_or(StartError::Empty)?;
    if program.is_empty() {
        return Err(StartError::Empty);
    }
    let account = accounts::find(&run.user).map_err(StartError::Account)?;
    let folder = match &run.cwd {
        Some(folder) if !Path::new(folder).is_dir() => return Err(StartError::Folder(folder.clone())),
        Some(folder) => folder.into(),
        None if account.home.is_dir() => account.home.clone(),
        None => "/".into(),
    };
    let mut command = Command::new(program);
    command
        .args(arguments)
        .current_dir(folder)
        .env_clear()
        .env("PATH", SEARCH_PATH)
        .env("HOME", &account.home)
        .env("USER", &account.name)
        .env("LOGNAME", &account.name)
        .env("SHELL", &account.shell)
        .env("LANG", "C.UTF-8")
        .env("XDG_RUNTIME_DIR", account.runtime_folder())
        .env("XDG_SESSION_TYPE", "wayland")
        .env("WAYLAND_DISPLAY", WAYLAND_DISPLAY)
        // There is no accessibility bus in the VM; looking for one costs GTK applications a second.
        .env("NO_AT_BRIDGE", "1");
    let bus = account.runtime_folder().join(SESSION_BUS);
    if bus.exists() {
        command.env("DBUS_SESSION_BUS_ADDRESS", format!("unix:path={}", bus.display()));
        if Path::new(PORTAL).exists() {
            command.envs(USE_PORTALS);
        }
    }
    for (name, value) in &run.env {
        if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
            return Err(StartError::Variable(name.clone()));
        }
        command.env(name, value);
    }
    // Dropping to another account also drops every supplementary group.
    if account.uid != rustix::process::geteuid().as_raw() {
        command.uid(account.uid).gid(account.gid);
    }
    // Who leads a group cannot begin a session.
    if run.terminal.is_none() {
        command.process_group(0);
    }
    Ok((command, account))
}

/// Turns the system's reason for not starting `run` into one a user understands.
pub fn explain(run: &Run, source: std::io::Error) -> StartError {
    let program = run.argv.first().cloned().unwrap_or_default();
    match source.kind() {
        std::io::ErrorKind::NotFound => StartError::NotFound(program),
        _ => StartError::Start { program, source },
    }
}
