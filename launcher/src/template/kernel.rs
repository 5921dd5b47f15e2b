//! The kernel of a template: fetched, uncompressed, and its modules in loading order.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use super::{
    apt::{AptError, Archive},
    tool::{Tool, ToolError},
};
use crate::{home::Home, progress::Progress};

/// Modules of the initramfs, beside what they depend on. What is needed to find the root comes first.
const MODULES: &[&str] = &[
    "virtio_pmem",
    "nd_pmem",
    "erofs",
    "overlay",
    "vmw_vsock_virtio_transport",
    "virtio-rng",
    "virtio_blk",
    "virtio_net",
    "button",
    "evdev",
    "virtio-gpu",
    "virtiofs",
];

/// Why there is no kernel.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The package could not be fetched.
    #[error(transparent)]
    Apt(#[from] AptError),
    /// A tool failed.
    #[error(transparent)]
    Tool(#[from] ToolError),
    /// A file could not be read or written.
    #[error("cannot use {path}: {source}")]
    File {
        /// The path.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The folder does not hold exactly one kernel.
    #[error("{0} has no kernel with modules: unpack one linux-image package into it with dpkg -x")]
    NoKernel(PathBuf),
    /// The file is not a kernel we can uncompress.
    #[error("{path} is not a compressed Linux kernel: {reason}")]
    NotKernel {
        /// The path.
        path: PathBuf,
        /// What is wrong.
        reason: &'static str,
    },
}

/// An unpacked kernel package.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// Release, as `uname -r` tells it.
    pub release: String,
    /// The compressed kernel (bzImage).
    pub image: PathBuf,
    /// The folder with `lib/modules`.
    base: PathBuf,
}

impl Kernel {
    /// Uses an unpacked package, or a folder with the kernel as `vmlinuz` and the package's modules below `root`.
    pub fn in_folder(folder: &Path) -> Result<Self, KernelError> {
        let missing = || KernelError::NoKernel(folder.to_owned());
        let base = ["", "usr", "root", "root/usr"].map(|base| folder.join(base));
        let base = base.into_iter().find(|base| base.join("lib/modules").is_dir()).ok_or_else(missing)?;
        let release = only_entry(&base.join("lib/modules")).ok_or_else(missing)?;
        let image = [folder.join("vmlinuz"), folder.join("boot").join(format!("vmlinuz-{release}"))];
        let image = image.into_iter().find(|image| image.is_file()).ok_or_else(missing)?;
        Ok(Self { release, image, base })
    }

    /// The present kernel of a Debian release, from an earlier download where it is the same.
    pub fn fetch(home: &Home, mirror: &str, suite: &str, progress: &Progress) -> Result<Self, KernelError> {
        let cache = home.cache().join("kernels");
        let fail = |path: &Path| {
            let path = path.to_owned();
            move |source| KernelError::File { path, source }
        };
        fs::create_dir_all(&cache).map_err(fail(&cache))?;
        let work = tempfile::tempdir_in(&cache).map_err(fail(&cache))?;
        let archive = Archive::open(work.path(), mirror, suite)?;
        let package = archive.kernel_package()?;
        let folder = cache.join(&package);
        if !folder.exists() {
            progress.note(&format!("fetching {package}"));
            let file = archive.download(&package)?;
            let unpacked = work.path().join("unpacked");
            Tool::new("dpkg-deb").arg("-x").arg(&file).arg(&unpacked).run()?;
            fs::rename(&unpacked, &folder).map_err(fail(&folder))?;
        }
        Self::in_folder(&folder)
    }

    /// The uncompressed kernel: an ELF file with a PVH note.
    pub fn uncompressed(&self) -> Result<Vec<u8>, KernelError> {
        let path = self.image.clone();
        let image = fs::read(&path).map_err(|source| KernelError::File { path: path.clone(), source })?;
        let not_kernel = |reason| KernelError::NotKernel { path: path.clone(), reason };
        let payload = payload(&image).map_err(not_kernel)?;
        let tool = decompressor(payload).ok_or_else(|| not_kernel("its compression is unknown"))?;
        let elf = Tool::new(tool).arg("-dc").filter(payload)?;
        if elf.starts_with(b"\x7fELF") { Ok(elf) } else { Err(not_kernel("its payload is no ELF file")) }
    }

    /// The modules a VM needs, uncompressed, each after what it depends on.
    pub fn modules(&self) -> Result<Vec<(String, Vec<u8>)>, KernelError> {
        let index = self.base.join("lib/modules").join(&self.release).join("modules.dep.bin");
        if !index.exists() {
            Tool::new("depmod").arg("-b").arg(&self.base).arg(&self.release).run()?;
        }
        let mut paths: Vec<PathBuf> = Vec::new();
        for module in MODULES {
            let text = Tool::new("modprobe")
                .args(["--show-depends", "-S", &self.release, "-d"])
                .arg(&self.base)
                .arg(module)
                .text()?;
            for path in module_paths(&text) {
                if !paths.contains(&path) {
                    paths.push(path);
                }
            }
        }
        paths.into_iter().map(|path| read_module(&path)).collect()
    }
}

/// Name of the only entry of a folder.
fn only_entry(folder: &Path) -> Option<String> {
    let mut entries = fs::read_dir(folder).ok()?.flatten();
    let name = entries.next()?.file_name().into_string().ok()?;
    entries.next().is_none().then_some(name)
}

/// Paths of the modules that `modprobe --show-depends` would load; built-in ones are not files.
fn module_paths(text: &str) -> Vec<PathBuf> {
    text.lines().filter_map(|line| line.strip_prefix("insmod ")).map(|path| PathBuf::from(path.trim())).collect()
}

/// Name without compression suffix, and content.
fn read_module(path: &Path) -> Result<(String, Vec<u8>), KernelError> {
    let content = fs::read(path).map_err(|source| KernelError::File { path: path.to_owned(), source })?;
    let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    match decompressor(&content) {
        Some(tool) => {
            let name = file.rsplit_once('.').map_or(file.as_str(), |(name, _)| name).to_owned();
            Ok((name, Tool::new(tool).arg("-dc").filter(&content)?))
        }
        None => Ok((file, content)),
    }
}

/// The tool that undoes a compression, by the first bytes.
fn decompressor(bytes: &[u8]) -> Option<&'static str> {
    let known: [(&[u8], &str); 4] = [
        (&[0x28, 0xb5, 0x2f, 0xfd], "zstd"),
        (&[0xfd, b'7', b'z', b'X', b'Z', 0], "xz"),
        (&[0x1f, 0x8b], "gzip"),
        (&[0x02, 0x21, 0x4c, 0x18], "lz4"),
    ];
    known.iter().find(|(magic, _)| bytes.starts_with(magic)).map(|(_, tool)| *tool)
}

/// The compressed part of a bzImage: see "the real-mode kernel header" in the kernel's
/// Documentation/arch/x86/boot.rst. The kernel's build appends the uncompressed size, which is no part of it.
fn payload(image: &[u8]) -> Result<&[u8], &'static str> {
    let word = |offset: usize| -> Option<usize> {
        let bytes = image.get(offset..)?.first_chunk::<4>()?;
        usize::try_from(u32::from_le_bytes(*bytes)).ok()
    };
    if image.get(0x202..0x206) != Some(b"HdrS") {
        return Err("it has no boot header");
    }
    let sectors = match image.get(0x1f1) {
        Some(0) => 4,
        Some(sectors) => usize::from(*sectors),
        None => return Err("it is truncated"),
    };
    let place = || {
        let start = word(0x248)?.checked_add((sectors + 1) * 512)?;
        let length = word(0x24c)?.checked_sub(4)?;
        image.get(start..start.checked_add(length)?)
    };
    place().ok_or("it is truncated")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(payload_offset: u32, payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 1024];
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x248..0x24c].copy_from_slice(&payload_offset.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&u32::try_from(payload.len() + 4).unwrap().to_le_bytes());
        image.extend_from_slice(payload);
        image.extend_from_slice(&[9; 4]);
        image
    }

    #[test]
    fn the_payload_is_found() {
        assert_eq!(payload(&image(0, b"data")).unwrap(), b"data");
    }

    #[test]
    fn broken_images_are_refused() {
        assert_eq!(payload(b"short"), Err("it has no boot header"));
        assert_eq!(payload(&vec![0; 4096]), Err("it has no boot header"));
        assert_eq!(payload(&image(1000, b"data")), Err("it is truncated"));
        assert_eq!(payload(&image(u32::MAX, b"data")), Err("it is truncated"));
        let mut tiny = image(0, b"data");
        tiny[0x24c..0x250].copy_from_slice(&[1, 0, 0, 0]);
        assert_eq!(payload(&tiny), Err("it is truncated"));
    }

    #[test]
    fn modprobe_lines() {
        let text = "insmod /x/a.ko.xz \nbuiltin virtio_pci\ninsmod /x/b.ko\n";
        assert_eq!(module_paths(text), [PathBuf::from("/x/a.ko.xz"), PathBuf::from("/x/b.ko")]);
    }

    #[test]
    fn a_folder_without_kernel_is_explained() {
        let folder = tempfile::tempdir().unwrap();
        assert!(matches!(Kernel::in_folder(folder.path()), Err(KernelError::NoKernel(_))));
        fs::create_dir_all(folder.path().join("root/usr/lib/modules/6.12")).unwrap();
        assert!(matches!(Kernel::in_folder(folder.path()), Err(KernelError::NoKernel(_))));
        fs::write(folder.path().join("vmlinuz"), "").unwrap();
        assert_eq!(Kernel::in_folder(folder.path()).unwrap().release, "6.12");
        fs::create_dir(folder.path().join("root/usr/lib/modules/6.13")).unwrap();
        assert!(matches!(Kernel::in_folder(folder.path()), Err(KernelError::NoKernel(_))));
    }
}
