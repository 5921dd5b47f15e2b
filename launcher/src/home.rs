//! Where templates are kept.

use std::{env, path::PathBuf};

/// Why there is no place for templates.
#[derive(Debug, thiserror::Error)]
pub enum HomeError {
    /// Nothing in the environment says where.
    #[error("no place for templates: set SPECTRUM_HOME, XDG_DATA_HOME or HOME")]
    Nowhere,
    /// The user has no place for configuration.
    #[error("no place for this user's configuration: set HOME")]
    NoUser,
    /// A relative path would mean another place in each folder.
    #[error("{0} is {1:?}, but must be an absolute path")]
    Relative(&'static str, PathBuf),
    /// The name cannot be that of a home directory.
    #[error(
        "{0:?} cannot be a home directory's name: use letters, digits, '-', '_' and '.', at most 64, not '.' first"
    )]
    Kept(String),
    /// The name cannot be that of a template.
    #[error("{0:?} cannot be a template's name: use letters, digits, '-', '_' and '.', at most 64, not '.' first")]
    Name(String),
}

/// Whether templates and apps may be called this: it is the name of a file in the folder it is looked for in.
pub fn is_name(name: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    (1..=64).contains(&name.len()) && !name.starts_with('.') && name.chars().all(allowed)
}

/// The folder that an environment variable names, if it is set and not empty.
pub fn folder_variable(name: &'static str) -> Result<Option<PathBuf>, HomeError> {
    match env::var_os(name).filter(|value| !value.is_empty()) {
        Some(value) if PathBuf::from(&value).is_relative() => Err(HomeError::Relative(name, value.into())),
        value => Ok(value.map(PathBuf::from)),
    }
}

/// The folder everything is kept in: `$SPECTRUM_HOME`, else `$XDG_DATA_HOME/spectrum`, else `~/.local/share/spectrum`.
#[derive(Clone, Debug)]
pub struct Home(PathBuf);

impl Home {
    /// Finds it from the environment. Nothing is created.
    pub fn find() -> Result<Self, HomeError> {
        if let Some(path) = folder_variable("SPECTRUM_HOME")? {
            return Ok(Self(path));
        }
        if let Some(path) = folder_variable("XDG_DATA_HOME")? {
            return Ok(Self(path.join("spectrum")));
        }
        let home = folder_variable("HOME")?.ok_or(HomeError::Nowhere)?;
        Ok(Self(home.join(".local/share/spectrum")))
    }

    /// A given folder.
    #[cfg(test)]
    pub fn at(path: &std::path::Path) -> Self {
        Self(path.to_owned())
    }

    /// The folder with one folder for each template.
    pub fn templates(&self) -> PathBuf {
        self.0.join("templates")
    }

    /// The folder of one template, which may not exist.
    pub fn template(&self, name: &str) -> Result<PathBuf, HomeError> {
        if !is_name(name) {
            return Err(HomeError::Name(name.to_owned()));
        }
        Ok(self.templates().join(name))
    }

    /// The folder with what was saved of warm templates.
    pub fn warm(&self) -> PathBuf {
        self.0.join("warm")
    }

    /// The folder with the home directories that are kept.
    pub fn all_kept(&self) -> PathBuf {
        self.0.join("homes")
    }

    /// The folder of one home directory that is kept, which may not exist.
    pub fn kept(&self, name: &str) -> Result<PathBuf, HomeError> {
        if !is_name(name) {
            return Err(HomeError::Kept(name.to_owned()));
        }
        Ok(self.all_kept().join(name))
    }

    /// The folder for downloads that a later build can use again.
    pub fn cache(&self) -> PathBuf {
        self.0.join("cache")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_leave_the_folder() {
        let home = Home("/x".into());
        assert_eq!(home.template("foot-1.2_b").unwrap(), PathBuf::from("/x/templates/foot-1.2_b"));
        for name in ["", ".", "..", "../a", "a/b", ".hidden", "a b", "ä", &"a".repeat(65)] {
            assert!(matches!(home.template(name), Err(HomeError::Name(_))), "{name:?}");
        }
    }
}
