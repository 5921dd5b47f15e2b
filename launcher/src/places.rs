//! Where what the user and the administrator wrote is kept: apps, the policy, entries of the desktop's menu.

use std::{env, path::PathBuf};

use crate::home::{HomeError, folder_variable};

/// The administrator's folder.
const SYSTEM: &str = "/etc/spectrum";

/// What the XDG base directory specification has for an XDG_DATA_DIRS that is not set.
const DATA_FOLDERS: &str = "/usr/local/share:/usr/share";

/// The folders. None of them need exist.
#[derive(Clone, Debug)]
pub struct Places {
    /// The user's home directory.
    home: Option<PathBuf>,
    /// The user's configuration: `$XDG_CONFIG_HOME/spectrum`. None for a user without a home.
    user: Option<PathBuf>,
    /// The system's, the one that wins first: `/etc/spectrum`, then `spectrum` in each of `$XDG_DATA_DIRS`.
    system: Vec<PathBuf>,
    /// The user's entries of the desktop's menu: `$XDG_DATA_HOME/applications`.
    menu: Option<PathBuf>,
    /// What the user's programs keep between runs: `$XDG_STATE_HOME/spectrum`.
    state: Option<PathBuf>,
}

impl Places {
    /// Finds them from the environment. Nothing is created.
    pub fn find() -> Result<Self, HomeError> {
        let home = folder_variable("HOME")?;
        let below_home = |name: &str| home.as_ref().map(|home| home.join(name));
        let config = folder_variable("XDG_CONFIG_HOME")?.or_else(|| below_home(".config"));
        let data = folder_variable("XDG_DATA_HOME")?.or_else(|| below_home(".local/share"));
        let folders = env::var_os("XDG_DATA_DIRS").filter(|value| !value.is_empty());
        let folders = folders.unwrap_or_else(|| DATA_FOLDERS.into());
        // Relative ones are to be ignored, the specification says.
        let shared = env::split_paths(&folders).filter(|path| path.is_absolute()).map(|path| path.join("spectrum"));
        let state = folder_variable("XDG_STATE_HOME")?.or_else(|| below_home(".local/state"));
        Ok(Self {
            user: config.map(|path| path.join("spectrum")),
            system: [PathBuf::from(SYSTEM)].into_iter().chain(shared).collect(),
            menu: data.map(|path| path.join("applications")),
            state: state.map(|path| path.join("spectrum")),
            home,
        })
    }

    /// Folders below one.
    #[cfg(test)]
    pub fn at(path: &std::path::Path) -> Self {
        let home = Some(path.join("home"));
        Self {
            home,
            user: Some(path.join("user")),
            system: vec![path.join("system")],
            menu: Some(path.join("menu")),
            state: Some(path.join("state")),
        }
    }

    /// What `~` stands for.
    pub fn home(&self) -> Option<&std::path::Path> {
        self.home.as_deref()
    }

    /// The folder with the user's apps.
    pub fn user_apps(&self) -> Result<PathBuf, HomeError> {
        self.user.as_ref().map(|path| path.join("apps")).ok_or(HomeError::NoUser)
    }

    /// All folders with apps, the one that wins first.
    pub fn apps(&self) -> impl Iterator<Item = PathBuf> {
        self.user.iter().chain(&self.system).map(|path| path.join("apps"))
    }

    /// The policies there may be, the one that counts first.
    pub fn policies(&self) -> impl Iterator<Item = PathBuf> {
        self.user.iter().chain(self.system.first()).map(|path| path.join("policy"))
    }

    /// The user's lists of applications for MIME types, the one that wins first.
    pub fn mime_lists(&self) -> Result<[PathBuf; 2], HomeError> {
        let config = self.user.as_ref().and_then(|path| path.parent()).ok_or(HomeError::NoUser)?;
        Ok([config.join("mimeapps.list"), self.menu()?.join("mimeapps.list")])
    }

    /// The folder of the user's menu entries.
    pub fn menu(&self) -> Result<PathBuf, HomeError> {
        self.menu.clone().ok_or(HomeError::NoUser)
    }

    /// The folder for what is kept between runs.
    pub fn state(&self) -> Result<PathBuf, HomeError> {
        self.state.clone().ok_or(HomeError::NoUser)
    }
}
