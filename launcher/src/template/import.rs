//! From a VM's folder of Spectrum OS to a template and an app: `vmlinux`, `blk/*.img`, `providers/net/*`, `fs/`.
//!
//! Such a machine brings its own system: kernel without initramfs, disks that are read only, and an init that runs one application.
//! There is no agent of ours in it.

use std::{
    fs::{self, File},
    io::{self, Read},
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use super::{Manifest, TemplateError, VMLINUX, file_error, put_in_place, work_folder};
use crate::{
    apps::{
        self,
        file::{App, Name, Network},
    },
    home::{Home, HomeError},
    places::Places,
    progress::Bar,
    text::{self, TextError},
};

/// The folder with what the guest sees as its configuration.
pub const CONFIG: &str = "fs";

/// The folder with its disks.
const DISKS: &str = "blk";

/// The machine this was made from, in place of a Debian release.
const ORIGIN: &str = "spectrum-os";

/// Longest path below `fs`, in folders: a loop cannot be, but a tree that nobody meant.
const DEPTH: usize = 64;

/// Why a machine was not imported.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// Templates.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// Names and places.
    #[error(transparent)]
    Home(#[from] HomeError),
    /// The app's file.
    #[error(transparent)]
    Text(#[from] TextError),
    /// The app's file.
    #[error("cannot write the app file: {0}")]
    Toml(#[from] toml::ser::Error),
    /// Something of it cannot be had.
    #[error("{path} cannot be imported: {why}")]
    Refused {
        /// What.
        path: PathBuf,
        /// Why.
        why: String,
    },
    /// The folder has no name that can be the template's.
    #[error("{0} has no name that a template can have: give one after it")]
    NoName(PathBuf),
    /// It would replace something.
    #[error("{0} is there already: nothing was changed; give another name, or remove it")]
    Exists(PathBuf),
}

fn refused(path: &Path, why: impl ToString) -> ImportError {
    ImportError::Refused { path: path.into(), why: why.to_string() }
}

/// Makes a template and an app of the machine in `from`. Gives their paths.
pub fn import(home: &Home, places: &Places, from: &Path, name: Option<&str>) -> Result<[PathBuf; 2], ImportError> {
    let own = from.file_name().and_then(|name| name.to_str()).filter(|name| crate::home::is_name(name));
    let name = name.or(own).ok_or_else(|| ImportError::NoName(from.into()))?;
    let (target, app_path) = (home.template(name)?, apps::file_in(&places.user_apps()?, name));
    for path in [&target, &app_path] {
        if fs::symlink_metadata(path).is_ok() {
            return Err(ImportError::Exists(path.clone()));
        }
    }
    let found = Found::look(from)?;
    let text = found.app(name)?.to_toml()?;

    let work = work_folder(home)?;
    let made = work.path().join("template");
    fs::create_dir_all(made.join(DISKS)).map_err(file_error(&made))?;
    let bar = Bar::new();
    let copy = |file: &str| {
        let (from, to) = (from.join(file), made.join(file));
        let bytes = fs::metadata(&from).map_or(0, |data| data.len());
        bar.writing(&to, bytes, || fs::copy(&from, &to)).map_err(|error| refused(&from, error))
    };
    copy(VMLINUX)?;
    found.disks.iter().try_for_each(|disk| copy(disk).map(drop))?;
    fs::create_dir(made.join(CONFIG)).map_err(file_error(&made))?;
    if from.join(CONFIG).is_dir() {
        copy_tree(&from.join(CONFIG), &made.join(CONFIG), DEPTH)?;
    }
    let mut manifest = Manifest::new(ORIGIN, "its own", [].into());
    manifest.disks.clone_from(&found.disks);
    let files: Vec<&str> = found.disks.iter().map(String::as_str).chain([VMLINUX]).collect();
    manifest.write(&made, &files, &bar).map_err(file_error(&made))?;
    put_in_place(&made, &target, work.path())?;
    if let Err(error) = text::write_new(&app_path, &text) {
        // Just made by us, and in the way of the next attempt.
        let _ = fs::remove_dir_all(&target);
        return Err(error.into());
    }
    Ok([target, app_path])
}

/// What is in a machine's folder.
#[derive(Debug, PartialEq, Eq)]
struct Found {
    /// Relative paths, sorted.
    disks: Vec<String>,
    has_network: bool,
}

impl Found {
    /// Looks for everything that means something, and refuses what would be lost.
    fn look(from: &Path) -> Result<Self, ImportError> {
        let kernel = from.join(VMLINUX);
        let mut magic = [0; 4];
        let read = File::open(&kernel).and_then(|mut file| file.read_exact(&mut magic));
        read.map_err(|error| refused(&kernel, error))?;
        if magic != *b"\x7fELF" {
            return Err(refused(&kernel, "it is no ELF file; a bzImage will not do"));
        }
        let mut has_network = false;
        for entry in names(from)? {
            let path = from.join(&entry);
            match entry.as_str() {
                VMLINUX | DISKS | CONFIG => {}
                "providers" => {
                    let provided = names(&path)?;
                    if let Some(other) = provided.iter().find(|kind| *kind != "net") {
                        return Err(refused(&path.join(other), "nothing but a network can be provided"));
                    }
                    has_network = !provided.is_empty() && !names(&path.join("net"))?.is_empty();
                }
                "shared-dirs" => {
                    let why = "list its folders as `shares` in the app's file, and remove it";
                    return Err(refused(&path, why));
                }
                // Each app has windows, unless its file says otherwise.
                "wayland" => {}
                _ => return Err(refused(&path, "it means nothing in a machine of Spectrum OS")),
            }
        }
        let mut disks = Vec::new();
        for entry in names(&from.join(DISKS))? {
            let path = from.join(DISKS).join(&entry);
            // It is the end of an option of the VMM.
            let is_plain = entry.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c));
            if !entry.ends_with(".img") || !is_plain || !path.is_file() {
                return Err(refused(
                    &path,
                    "a disk must be a file NAME.img, with letters, digits, '-', '_' and '.' in NAME",
                ));
            }
            disks.push(format!("{DISKS}/{entry}"));
        }
        if disks.is_empty() {
            return Err(refused(&from.join(DISKS), "there is no disk in it"));
        }
        Ok(Self { disks, has_network })
    }

    fn app(&self, name: &str) -> Result<App, HomeError> {
        let template = Name::try_from(name.to_owned()).map_err(|_| HomeError::Name(name.into()))?;
        let network = if self.has_network { Network::Internet } else { Network::None };
        Ok(App { template: Some(template), network, ..App::default() })
    }
}

/// Names in a folder, sorted.
fn names(folder: &Path) -> Result<Vec<String>, ImportError> {
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).map_err(|error| refused(folder, error))? {
        let entry = entry.map_err(|error| refused(folder, error))?;
        names.push(entry.file_name().into_string().map_err(|_| refused(&entry.path(), "its name is not UTF-8"))?);
    }
    names.sort();
    Ok(names)
}

/// Files, folders and links: what a link means, it means in the guest.
fn copy_tree(from: &Path, to: &Path, depth: usize) -> Result<(), ImportError> {
    let left = depth.checked_sub(1).ok_or_else(|| refused(from, "there are too many folders in each other"))?;
    for name in names(from)? {
        let (path, target) = (from.join(&name), to.join(&name));
        let data = fs::symlink_metadata(&path).map_err(|error| refused(&path, error))?;
        let copied = if data.is_dir() {
            fs::create_dir(&target).map_err(|error| refused(&path, error))?;
            copy_tree(&path, &target, left)?;
            Ok(())
        } else if data.is_symlink() {
            fs::read_link(&path).and_then(|link| symlink(link, &target))
        } else if data.is_file() {
            fs::copy(&path, &target).map(drop)
        } else {
            Err(io::Error::new(io::ErrorKind::InvalidInput, "it is neither a file, a folder nor a link"))
        };
        copied.map_err(|error| refused(&path, error))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Machine(tempfile::TempDir);

    impl Machine {
        fn new() -> Self {
            let machine = Self(tempfile::tempdir().unwrap());
            machine.write("appvm/vmlinux", "\x7fELF...");
            machine.write("appvm/blk/root.img", "root");
            machine
        }

        fn write(&self, name: &str, text: &str) {
            let path = self.0.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }

        fn import(&self, name: Option<&str>) -> Result<[PathBuf; 2], ImportError> {
            let (home, places) = (Home::at(&self.0.path().join("kept")), Places::at(self.0.path()));
            import(&home, &places, &self.0.path().join("appvm"), name)
        }

        fn refuses(&self) -> String {
            let error = self.import(None).unwrap_err().to_string();
            let left = self.0.path().join("kept/templates/appvm").exists() || self.0.path().join("user/apps").exists();
            assert!(!left, "{error}");
            error
        }
    }

    #[test]
    fn a_machine_becomes_a_template_and_an_app() {
        let machine = Machine::new();
        machine.write("appvm/blk/data.img", "data");
        machine.write("appvm/providers/net/sys.netvm", "");
        machine.write("appvm/fs/type", "nix");
        symlink("/nix/store/x/bin/foot", machine.0.path().join("appvm/fs/run")).unwrap();
        let [template, app] = machine.import(None).unwrap();
        let manifest = Manifest::read(&template).unwrap();
        assert_eq!(
            (manifest.disks.as_slice(), manifest.files.len()),
            (&["blk/data.img".into(), "blk/root.img".into()][..], 3)
        );
        assert_eq!(fs::read_to_string(template.join("blk/root.img")).unwrap(), "root");
        assert_eq!(fs::read_to_string(template.join("fs/type")).unwrap(), "nix");
        assert_eq!(fs::read_link(template.join("fs/run")).unwrap(), Path::new("/nix/store/x/bin/foot"));
        let text = fs::read_to_string(&app).unwrap();
        let app = App::parse(&app, &text).unwrap();
        assert_eq!((app.template.map(String::from).as_deref(), app.network), (Some("appvm"), Network::Internet));
        assert!(matches!(machine.import(None), Err(ImportError::Exists(_))));
        machine.import(Some("other")).unwrap();
        let open = super::super::open(&Home::at(&machine.0.path().join("kept")), "other").unwrap();
        assert!(open.is_foreign());
    }

    #[test]
    fn what_would_be_lost_is_refused() {
        let cases: [(&str, &str, &str); 6] = [
            ("appvm/vmlinux", "MZ.....", "it is no ELF file"),
            ("appvm/providers/usb/x", "", "nothing but a network can be provided"),
            ("appvm/shared-dirs/x", "", "as `shares` in the app's file"),
            ("appvm/memory", "1G", "it means nothing in a machine"),
            ("appvm/blk/a,b.img", "", "a disk must be a file NAME.img"),
            ("appvm/blk/notes", "", "a disk must be a file NAME.img"),
        ];
        for (file, text, expected) in cases {
            let machine = Machine::new();
            machine.write(file, text);
            let error = machine.refuses();
            assert!(error.contains(expected), "{file}: {error}");
        }
        let machine = Machine::new();
        fs::remove_file(machine.0.path().join("appvm/blk/root.img")).unwrap();
        assert!(machine.refuses().contains("there is no disk in it"));
        fs::remove_file(machine.0.path().join("appvm/vmlinux")).unwrap();
        assert!(machine.refuses().contains("vmlinux cannot be imported: No such file"));
    }
}
