//! The machine's own package sources: which mirror it uses, and fetching a package of another release from it.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use super::tool::{Tool, ToolError};

/// Debian's signing keys, from the package debian-archive-keyring.
pub const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Why packages cannot be fetched.
#[derive(Debug, thiserror::Error)]
pub enum AptError {
    /// A tool failed.
    #[error(transparent)]
    Tool(#[from] ToolError),
    /// The machine has no Debian mirror.
    #[error("no Debian mirror in this machine's package sources: set SPECTRUM_MIRROR to the address of one")]
    NoMirror,
    /// The keyring is missing.
    #[error("{KEYRING} is missing: install the Debian package debian-archive-keyring")]
    NoKeyring,
    /// A release has no kernel.
    #[error("{0} has no kernel package: name another release with --kernel-suite")]
    NoKernel(String),
    /// A file operation failed.
    #[error("cannot prepare {path}: {source}")]
    File {
        /// The path.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
}

/// Address of the Debian mirror this machine uses, or `$SPECTRUM_MIRROR`.
pub fn mirror() -> Result<String, AptError> {
    if !Path::new(KEYRING).exists() {
        return Err(AptError::NoKeyring);
    }
    if let Ok(mirror) = std::env::var("SPECTRUM_MIRROR") {
        return Ok(mirror);
    }
    let os_release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let codename = os_release.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME=")).unwrap_or_default();
    let targets =
        Tool::new("apt-get").args(["indextargets", "--format", "$(SITE)|$(RELEASE)", "Identifier: Packages"]).text()?;
    mirror_in(&targets, codename.trim_matches('"')).ok_or(AptError::NoMirror)
}

/// The site of the machine's own release; security and updates may live elsewhere.
fn mirror_in(targets: &str, codename: &str) -> Option<String> {
    let site = |line: &str| line.split_once('|').filter(|(_, release)| *release == codename).map(|(s, _)| s.to_owned());
    targets.lines().find_map(site)
}

/// A package archive of a release, apart from the machine's own state.
pub struct Archive {
    folder: PathBuf,
    suite: String,
}

impl Archive {
    /// Fetches the release's package list into `folder`.
    pub fn open(folder: &Path, mirror: &str, suite: &str) -> Result<Self, AptError> {
        let fail = |path: &Path| {
            let path = path.to_owned();
            move |source| AptError::File { path, source }
        };
        for name in ["lists/partial", "archives/partial"] {
            let path = folder.join(name);
            fs::create_dir_all(&path).map_err(fail(&path))?;
        }
        let quoted = folder.display();
        let configuration = format!(
            "Dir::Etc::SourceList \"{quoted}/sources.list\";\nDir::Etc::SourceParts \"-\";\n\
             Dir::State::Lists \"{quoted}/lists\";\nDir::State::Status \"{quoted}/status\";\n\
             Dir::Cache \"{quoted}\";\nAPT::Sandbox::User \"root\";\nAPT::Architecture \"amd64\";\n"
        );
        let sources = format!("deb [signed-by={KEYRING}] {mirror} {suite} main\n");
        for (name, content) in [("status", ""), ("sources.list", &sources), ("apt.conf", &configuration)] {
            let path = folder.join(name);
            fs::write(&path, content).map_err(fail(&path))?;
        }
        let archive = Self { folder: folder.to_owned(), suite: suite.to_owned() };
        archive.tool("apt-get").args(["-qq", "update"]).run()?;
        Ok(archive)
    }

    fn tool(&self, name: &str) -> Tool {
        Tool::new(name).env("APT_CONFIG", self.folder.join("apt.conf")).folder(&self.folder)
    }

    /// Name of the release's present kernel package.
    pub fn kernel_package(&self) -> Result<String, AptError> {
        let depends = self.tool("apt-cache").args(["depends", "linux-image-amd64"]).text()?;
        kernel_in(&depends).ok_or_else(|| AptError::NoKernel(self.suite.clone()))
    }

    /// Downloads a package and gives its file.
    pub fn download(&self, package: &str) -> Result<PathBuf, AptError> {
        self.tool("apt-get").args(["-qq", "download", package]).run()?;
        let fail = |source| AptError::File { path: self.folder.clone(), source };
        let prefix = format!("{package}_");
        for entry in fs::read_dir(&self.folder).map_err(fail)? {
            let path = entry.map_err(fail)?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if name.starts_with(&prefix) && name.ends_with(".deb") {
                return Ok(path);
            }
        }
        Err(fail(io::Error::new(io::ErrorKind::NotFound, format!("{package} was not downloaded"))))
    }
}

fn kernel_in(depends: &str) -> Option<String> {
    let package = |line: &str| line.trim().strip_prefix("Depends: ").map(str::to_owned);
    depends.lines().filter_map(package).find(|name| name.starts_with("linux-image-"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mirror_is_that_of_the_own_release() {
        let targets = "http://a/security|bookworm-security\nhttp://a/debian|bookworm\nhttp://b|bookworm\n";
        assert_eq!(mirror_in(targets, "bookworm").as_deref(), Some("http://a/debian"));
        assert_eq!(mirror_in(targets, "trixie"), None);
        assert_eq!(mirror_in("", ""), None);
    }

    #[test]
    fn the_kernel_is_what_the_metapackage_needs() {
        let depends = "linux-image-amd64\n  Depends: linux-image-6.12.95+deb12-amd64\n  Recommends: x\n";
        assert_eq!(kernel_in(depends).as_deref(), Some("linux-image-6.12.95+deb12-amd64"));
        assert_eq!(kernel_in("linux-image-amd64\n"), None);
    }
}
