//! The root image of a template: Debian packages as an uncompressed EROFS file system.
//!
//! The same packages give the same bytes: everything that depends on when, where or in which order it was made is removed
//! or set to a fixed value.

use std::{
    collections::BTreeMap,
    fs::{self, OpenOptions},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, utimensat};

use super::{
    manifest::installed_packages,
    tool::{Tool, ToolError},
};
use crate::progress::{Bar, Progress};

/// Packages of every template that is not asked to be minimal.
const APPLICATIONS: &[&str] = &[
    "adwaita-icon-theme",
    "dbus",
    "foot",
    "fonts-dejavu-core",
    "gtk-3-examples",
    "openssh-client",
    "weston",
    "wl-clipboard",
    "xdg-desktop-portal",
];

/// Packages no template works without.
const BASE: &[&str] = &["libglib2.0-bin", "passwd", "procps", "xkb-data"];

/// The time of every file, in seconds since 1970.
const EPOCH: i64 = 1_704_067_200;

/// Identity of the file system: fixed, because the manifest's hash is the better identity.
const UUID: &str = "6d0f39a4-8c1b-4c5e-9d3e-5a1f0c7b2e64";

/// Size of the image's blocks, in bytes.
const BLOCK: u64 = 4096;

/// Size the image is padded to, in bytes: what a pmem device is made of.
const ALIGNMENT: u64 = 2 * 1024 * 1024;

/// Contents of these folders are removed; the folders stay.
const EMPTIED: &[&str] = &[
    "boot",
    "dev",
    "run",
    "tmp",
    "usr/lib/x86_64-linux-gnu/installed-tests",
    "usr/libexec/installed-tests",
    "usr/share/doc",
    "usr/share/info",
    "usr/share/lintian",
    "usr/share/locale",
    "usr/share/man",
    "var/cache",
    "var/lib/apt",
    "var/lib/systemd",
    "var/log",
    "var/tmp",
];

/// These files are removed.
const REMOVED: &[&str] = &[
    "etc/.pwd.lock",
    "etc/apt/sources.list",
    "etc/group-",
    "etc/gshadow-",
    "etc/hostname",
    "etc/ld.so.cache-",
    "etc/passwd-",
    "etc/resolv.conf",
    "etc/shadow-",
    "etc/subgid-",
    "etc/subuid-",
    "var/lib/dbus/machine-id",
    "var/lib/dpkg/available",
    "var/lib/dpkg/available-old",
    "var/lib/dpkg/diversions-old",
    "var/lib/dpkg/lock",
    "var/lib/dpkg/lock-frontend",
    "var/lib/dpkg/statoverride-old",
    "var/lib/dpkg/status-old",
];

/// Why there is no root image.
#[derive(Debug, thiserror::Error)]
pub enum RootError {
    /// A tool failed.
    #[error(transparent)]
    Tool(#[from] ToolError),
    /// A package name that is none.
    #[error("{0:?} is not a package name")]
    Package(String),
    /// A file operation failed.
    #[error("cannot prepare {path}: {source}")]
    File {
        /// The path.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
}

fn file_error(path: &Path) -> impl FnOnce(io::Error) -> RootError + use<> {
    let path = path.to_owned();
    move |source| RootError::File { path, source }
}

/// What a root image is made from.
pub struct Source<'a> {
    /// Debian release.
    pub suite: &'a str,
    /// Address of the mirror.
    pub mirror: &'a str,
    /// Packages asked for by the user.
    pub include: &'a [String],
    /// Leave the usual applications out.
    pub minimal: bool,
}

impl Source<'_> {
    /// The packages to be installed, checked and in a fixed order.
    pub fn packages(&self) -> Result<Vec<String>, RootError> {
        let usual = if self.minimal { &[] } else { APPLICATIONS };
        let named = self.include.iter().map(|name| name.trim()).filter(|name| !name.is_empty());
        let mut packages: Vec<String> = BASE.iter().chain(usual).copied().chain(named).map(str::to_owned).collect();
        packages.sort();
        packages.dedup();
        let wrong = |name: &&String| {
            !name.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
                || !name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || "+-.:".contains(c))
        };
        match packages.iter().find(wrong) {
            Some(name) => Err(RootError::Package(name.clone())),
            None => Ok(packages),
        }
    }

    /// Installs the packages into the new folder `tree` and gives them with their versions. This process must be allowed to make files of
    /// several owners.
    pub fn install(&self, tree: &Path, progress: &Progress) -> Result<BTreeMap<String, String>, RootError> {
        rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
        let packages = self.packages()?;
        Tool::new("mmdebstrap")
            .args(["--mode=root", "--variant=apt", "--format=directory"])
            .arg("--aptopt=APT::Install-Recommends \"false\"")
            .arg(format!("--include={}", packages.join(",")))
            .arg("--customize-hook=chroot \"$1\" useradd --create-home --shell /bin/bash --uid 1000 user")
            .arg(self.suite)
            .arg(tree)
            .arg(self.mirror)
            .env("SOURCE_DATE_EPOCH", EPOCH.to_string())
            .watch(|line| {
                if let Some(text) = line.strip_prefix("I: ") {
                    progress.at(text);
                }
            })?;
        let status = tree.join("var/lib/dpkg/status");
        Ok(installed_packages(&fs::read_to_string(&status).map_err(file_error(&status))?))
    }
}

/// Removes and fixes everything in `tree` that is not the packages' own.
pub fn normalise(tree: &Path) -> Result<(), RootError> {
    for name in EMPTIED {
        empty(&tree.join(name))?;
    }
    for name in REMOVED {
        let path = tree.join(name);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(file_error(&path)(error)),
            _ => {}
        }
    }
    // PID 1 fills it with a new identity.
    let machine_id = tree.join("etc/machine-id");
    fs::write(&machine_id, "").map_err(file_error(&machine_id))?;
    let hosts = tree.join("etc/hosts");
    fs::write(&hosts, "127.0.0.1 localhost\n::1 localhost\n").map_err(file_error(&hosts))?;
    remove_bytecode(&tree.join("usr"))?;
    // The font cache is compared with the times of the font folders, which must be final before it is made.
    set_times(tree)?;
    if tree.join("usr/bin/fc-cache").exists() {
        Tool::new("chroot").arg(tree).args(["fc-cache", "-s"]).env("SOURCE_DATE_EPOCH", EPOCH.to_string()).run()?;
    }
    Ok(())
}

fn empty(folder: &Path) -> Result<(), RootError> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(file_error(folder)(error)),
    };
    for entry in entries {
        let path = entry.map_err(file_error(folder))?.path();
        let is_folder = fs::symlink_metadata(&path).is_ok_and(|data| data.is_dir());
        let result = if is_folder { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        result.map_err(file_error(&path))?;
    }
    Ok(())
}

/// Calls `visit` for everything below `folder`, folders after what they contain.
fn walk(folder: &Path, visit: &mut dyn FnMut(&Path, &fs::Metadata) -> io::Result<()>) -> Result<(), RootError> {
    for entry in fs::read_dir(folder).map_err(file_error(folder))? {
        let path = entry.map_err(file_error(folder))?.path();
        let data = fs::symlink_metadata(&path).map_err(file_error(&path))?;
        if data.is_dir() {
            walk(&path, visit)?;
        }
        visit(&path, &data).map_err(file_error(&path))?;
    }
    Ok(())
}

/// Python's compiled files contain the times of their sources.
fn remove_bytecode(folder: &Path) -> Result<(), RootError> {
    walk(folder, &mut |path, data| {
        if data.is_dir() && path.ends_with("__pycache__") { fs::remove_dir_all(path) } else { Ok(()) }
    })
}

fn set_times(tree: &Path) -> Result<(), RootError> {
    let time = Timespec { tv_sec: EPOCH, tv_nsec: 0 };
    let times = Timestamps { last_access: time, last_modification: time };
    walk(tree, &mut |path, data| {
        if data.mtime() == EPOCH {
            return Ok(());
        }
        Ok(utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW)?)
    })
}

/// Makes the image from the tree.
pub fn write_image(tree: &Path, image: &Path, bar: &Bar) -> Result<(), RootError> {
    let mut bytes: u64 = 0;
    walk(tree, &mut |_, data| {
        // A file of several names is there once.
        bytes = bytes.saturating_add(data.len().next_multiple_of(BLOCK) / data.nlink().max(1));
        Ok(())
    })?;
    // No inline tails: only whole blocks can be mapped directly, and all files shall be. No extended attributes: file
    // capabilities and lists of access rights have no use for one user.
    let tool = Tool::new("mkfs.erofs")
        .args(["--quiet", "-x-1", "-Enoinline_data", &format!("-T{EPOCH}"), &format!("-U{UUID}")])
        .arg(image)
        .arg(tree);
    bar.writing(image, bytes, || tool.run())?;
    let file = OpenOptions::new().write(true).open(image).map_err(file_error(image))?;
    let size = file.metadata().map_err(file_error(image))?.len();
    file.set_len(size.next_multiple_of(ALIGNMENT)).map_err(file_error(image))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(include: &[&str], minimal: bool) -> Result<Vec<String>, RootError> {
        let include: Vec<String> = include.iter().map(|name| (*name).to_owned()).collect();
        Source { suite: "trixie", mirror: "http://mirror.invalid", include: &include, minimal }.packages()
    }

    #[test]
    fn packages_are_sorted_unique_and_checked() {
        let packages = source(&["gedit", "foot", "foot"], false).unwrap();
        assert!(packages.is_sorted() && packages.contains(&"gedit".to_owned()));
        assert_eq!(packages.iter().filter(|name| *name == "foot").count(), 1);
        assert!(!source(&["gedit"], true).unwrap().contains(&"foot".to_owned()));
        for name in ["--hook", "a b", "Foot", "a;b", "$x", "a,b"] {
            assert!(matches!(source(&[name], true), Err(RootError::Package(_))), "{name}");
        }
    }

    /// Two trees with the same content, made in another order at another time, give one image.
    #[test]
    fn the_same_tree_gives_the_same_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let mut images = Vec::new();
        for (name, order) in [("a", ["x", "y", "z"]), ("b", ["z", "x", "y"])] {
            let tree = folder.path().join(name);
            fs::create_dir_all(tree.join("etc")).unwrap();
            fs::create_dir_all(tree.join("usr/lib/__pycache__")).unwrap();
            fs::create_dir_all(tree.join("var/log")).unwrap();
            fs::write(tree.join("var/log").join(name), name).unwrap();
            fs::write(tree.join("usr/lib/__pycache__/m.pyc"), name).unwrap();
            fs::write(tree.join("etc/machine-id"), name).unwrap();
            for file in order {
                fs::write(tree.join("usr").join(file), file.repeat(5000)).unwrap();
            }
            normalise(&tree).unwrap();
            let image = folder.path().join(format!("{name}.erofs"));
            write_image(&tree, &image, &Bar::new()).unwrap();
            images.push(fs::read(image).unwrap());
        }
        assert_eq!(images[0].len() as u64 % ALIGNMENT, 0);
        assert!(images[0] == images[1]);
    }
}
