//! Templates: made from Debian packages, kept in one folder each.
//!
//! A template is `root.erofs` (read-only root, an uncompressed EROFS image for a pmem device), `vmlinuz` and `vmlinux`
//! (the kernel as bzImage and as ELF), `initramfs`, and `template.json`, which names everything they were made from.

mod apt;
mod cpio;
pub mod import;
mod initramfs;
mod kernel;
mod manifest;
mod namespace;
mod root;
mod tool;

use std::{
    fs, io,
    path::{Path, PathBuf},
};

pub use import::CONFIG;
use kernel::Kernel;
#[cfg(test)]
pub use manifest::FileEntry;
pub use manifest::Manifest;

use crate::{
    cli::{BootOptions, BuildOptions, RefreshOptions},
    home::{Home, HomeError},
    progress::Progress,
};

/// The root image's file.
pub const ROOT: &str = "root.erofs";
/// The kernel as bzImage.
pub const VMLINUZ: &str = "vmlinuz";
/// The kernel as ELF file with a PVH note.
pub const VMLINUX: &str = "vmlinux";
/// The initramfs.
pub const INITRAMFS: &str = "initramfs";

const FILES: [&str; 4] = [INITRAMFS, ROOT, VMLINUX, VMLINUZ];

/// Why something about a template failed.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    #[error(transparent)]
    Home(#[from] HomeError),
    #[error(transparent)]
    Apt(#[from] apt::AptError),
    #[error(transparent)]
    Kernel(#[from] kernel::KernelError),
    #[error(transparent)]
    Root(#[from] root::RootError),
    #[error(transparent)]
    Namespace(#[from] namespace::NamespaceError),
    #[error(transparent)]
    Initramfs(#[from] initramfs::InitramfsError),
    #[error("there is no template {0:?}: `spectrum template list` shows those there are")]
    Unknown(String),
    #[error("the template in {path} is damaged: {source}; build it anew with `spectrum template build`")]
    Damaged { path: PathBuf, source: io::Error },
    #[error("the template {0} was imported: it brings its own kernel and system, and is not made anew or warmed")]
    Foreign(String),
    #[error("cannot write {path}: {source}")]
    File { path: PathBuf, source: io::Error },
}

fn file_error(path: &Path) -> impl FnOnce(io::Error) -> TemplateError + use<> {
    let path = path.to_owned();
    move |source| TemplateError::File { path, source }
}

/// Makes a template.
pub fn build(home: &Home, options: &BuildOptions) -> Result<(), TemplateError> {
    let target = home.template(&options.name)?;
    // What can be wrong with the command is told before anything is fetched.
    let guest = initramfs::guest_binary(options.boot.guest.as_deref())?;
    let mirror = apt::mirror()?;
    let source =
        root::Source { suite: &options.suite, mirror: &mirror, include: &options.include, minimal: options.minimal };
    source.packages()?;
    namespace::enter()?;
    let mut progress = Progress::new(4);
    progress.step("kernel");
    let kernel = find_kernel(home, &options.boot, &progress)?;
    let work = work_folder(home)?;
    let tree = work.path().join("tree");
    progress.step(&format!("packages of {}", options.suite));
    let packages = source.install(&tree, &progress)?;
    progress.step("root image");
    root::normalise(&tree)?;
    let made = work.path().join("template");
    fs::create_dir(&made).map_err(file_error(&made))?;
    root::write_image(&tree, &made.join(ROOT), progress.bar())?;
    progress.step("kernel image and initramfs");
    let mut manifest = Manifest::new(&options.suite, &kernel.release, packages);
    add_boot_files(&made, &kernel, &guest)?;
    manifest.write(&made, &FILES, progress.bar()).map_err(file_error(&made))?;
    put_in_place(&made, &target, work.path())?;
    progress.finish(&format!("template {} is in {}", options.name, target.display()));
    Ok(())
}

/// Makes the kernel and initramfs of a template anew.
pub fn refresh(home: &Home, options: &RefreshOptions) -> Result<(), TemplateError> {
    let template = open(home, &options.name)?;
    if template.is_foreign() {
        return Err(TemplateError::Foreign(options.name.clone()));
    }
    let Template { folder, mut manifest } = template;
    let guest = initramfs::guest_binary(options.boot.guest.as_deref())?;
    let mut progress = Progress::new(2);
    progress.step("kernel");
    let kernel = find_kernel(home, &options.boot, &progress)?;
    progress.step("kernel image and initramfs");
    let work = work_folder(home)?;
    let made = work.path().join("template");
    fs::create_dir(&made).map_err(file_error(&made))?;
    // The same file under a second name: nothing is copied, and the old template stays whole until the new one is.
    fs::hard_link(folder.join(ROOT), made.join(ROOT)).map_err(file_error(&made))?;
    add_boot_files(&made, &kernel, &guest)?;
    manifest.kernel = kernel.release;
    manifest.write(&made, &FILES, progress.bar()).map_err(file_error(&made))?;
    put_in_place(&made, &folder, work.path())?;
    progress.finish(&format!("template {} is in {}", options.name, folder.display()));
    Ok(())
}

/// Prints the templates, one a line.
pub fn list(home: &Home) -> Result<(), TemplateError> {
    for name in names(home)? {
        match Manifest::read(&home.template(&name)?) {
            Ok(manifest) => {
                let bytes: u64 = manifest.files.get(ROOT).map_or(0, |file| file.bytes);
                println!("{name}\t{}\tkernel {}\t{} MiB", manifest.suite, manifest.kernel, bytes >> 20);
            }
            Err(error) => println!("{name}\tdamaged: {error}"),
        }
    }
    Ok(())
}

/// Removes a template. VMs that run from it keep its files until they end.
pub fn remove(home: &Home, name: &str) -> Result<(), TemplateError> {
    let folder = home.template(name)?;
    if !folder.is_dir() {
        return Err(TemplateError::Unknown(name.to_owned()));
    }
    let work = work_folder(home)?;
    fs::rename(&folder, work.path().join("removed")).map_err(file_error(&folder))
}

/// A template that is there.
#[derive(Clone, Debug)]
pub struct Template {
    /// Its folder.
    pub folder: PathBuf,
    /// What it is made of.
    pub manifest: Manifest,
}

impl Template {
    /// Whether it brings its own system, without an agent of ours.
    pub fn is_foreign(&self) -> bool {
        !self.manifest.disks.is_empty()
    }
}

/// Opens a template and checks that its files are there.
pub fn open(home: &Home, name: &str) -> Result<Template, TemplateError> {
    let folder = home.template(name)?;
    if !folder.is_dir() {
        return Err(TemplateError::Unknown(name.to_owned()));
    }
    let damaged = |source| TemplateError::Damaged { path: folder.clone(), source };
    let manifest = Manifest::read(&folder).map_err(damaged)?;
    for (file, entry) in &manifest.files {
        let missing = |error: io::Error| damaged(io::Error::new(error.kind(), format!("{file}: {error}")));
        let size = fs::metadata(folder.join(file)).map_err(missing)?.len();
        if size != entry.bytes {
            let text = format!("{file} has {size} bytes instead of {}", entry.bytes);
            return Err(damaged(io::Error::new(io::ErrorKind::InvalidData, text)));
        }
    }
    Ok(Template { folder, manifest })
}

/// The command that makes the first one.
pub const HOW_TO_BUILD: &str = "spectrum template build default";

/// The names of all templates, sorted.
pub fn names(home: &Home) -> Result<Vec<String>, TemplateError> {
    let entries = match fs::read_dir(home.templates()) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(file_error(&home.templates())(error)),
    };
    let mut names: Vec<String> = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.retain(|name| !name.starts_with('.'));
    names.sort();
    Ok(names)
}

fn find_kernel(home: &Home, options: &BootOptions, progress: &Progress) -> Result<Kernel, TemplateError> {
    let kernel = match &options.kernel {
        Some(folder) => Kernel::in_folder(folder)?,
        None => Kernel::fetch(home, &apt::mirror()?, &options.kernel_suite, progress)?,
    };
    progress.note(&kernel.release);
    Ok(kernel)
}

/// A folder on the file system of the templates that goes away with the value.
fn work_folder(home: &Home) -> Result<tempfile::TempDir, TemplateError> {
    let templates = home.templates();
    fs::create_dir_all(&templates).map_err(file_error(&templates))?;
    tempfile::Builder::new().prefix(".work-").tempdir_in(&templates).map_err(file_error(&templates))
}

fn add_boot_files(folder: &Path, kernel: &Kernel, guest: &[u8]) -> Result<(), TemplateError> {
    let vmlinuz = folder.join(VMLINUZ);
    fs::copy(&kernel.image, &vmlinuz).map_err(file_error(&vmlinuz))?;
    let vmlinux = folder.join(VMLINUX);
    fs::write(&vmlinux, kernel.uncompressed()?).map_err(file_error(&vmlinux))?;
    initramfs::write(&folder.join(INITRAMFS), guest, &kernel.modules()?)?;
    Ok(())
}

/// Puts a finished template where it belongs; one that was there moves into the work folder and goes away with it.
fn put_in_place(made: &Path, target: &Path, work: &Path) -> Result<(), TemplateError> {
    if target.exists() {
        fs::rename(target, work.join("old")).map_err(file_error(target))?;
    }
    fs::rename(made, target).map_err(file_error(target))
}

#[cfg(test)]
mod tests;
