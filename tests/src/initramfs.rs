//! The initramfs of a guest, as an uncompressed cpio archive ("newc": Documentation/driver-api/early-userspace/
//! buffer-format.rst of Linux).

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::programs;

/// File mode bits of a directory.
const DIRECTORY: u32 = 0o040_755;
/// File mode bits of an executable file.
const FILE: u32 = 0o100_755;

/// An image under construction.
#[derive(Default)]
pub struct Initramfs {
    archive: Vec<u8>,
    directories: BTreeSet<PathBuf>,
    count: u32,
}

impl Initramfs {
    /// An image with only the usual directories.
    #[must_use]
    pub fn new() -> Self {
        let mut this = Self::default();
        for directory in ["/dev", "/proc", "/sys", "/tmp", "/run"] {
            this.directory(Path::new(directory));
        }
        this
    }

    /// An image whose first process is `guest-probe`, which loads `modules` before it does its jobs.
    #[must_use]
    pub fn probe(modules: &[&str]) -> Self {
        Self::new().program("/init", &programs::program("guest-probe")).modules(modules)
    }

    /// Adds a program and the shared libraries it needs.
    #[must_use]
    pub fn program(self, path: &str, from: &Path) -> Self {
        let needed = shared_libraries(from);
        let this = self.file(path, &read(from));
        needed.iter().fold(this, |this, library| {
            let name = library.to_str().expect("libraries have plain names");
            if this.has(library) { this } else { this.file(name, &read(library)) }
        })
    }

    /// Adds kernel modules and what they need, as files in `/modules` whose names sort in the order to load them.
    #[must_use]
    pub fn modules(self, names: &[&str]) -> Self {
        let files = programs::modules(names);
        files.iter().enumerate().fold(self, |this, (i, file)| {
            let name = file.file_name().and_then(|n| n.to_str()).expect("modules have plain names");
            this.file(&format!("/modules/{i:02}-{name}"), &read(file))
        })
    }

    /// Adds a file that may be executed.
    #[must_use]
    pub fn file(mut self, path: &str, content: &[u8]) -> Self {
        let path = Path::new(path);
        if let Some(parent) = path.parent() {
            self.directory(parent);
        }
        self.directories.insert(path.to_owned());
        self.entry(path, FILE, content);
        self
    }

    fn has(&self, path: &Path) -> bool {
        self.directories.contains(path)
    }

    fn directory(&mut self, path: &Path) {
        if path == Path::new("/") || self.has(path) {
            return;
        }
        if let Some(parent) = path.parent() {
            self.directory(parent);
        }
        self.directories.insert(path.to_owned());
        self.entry(path, DIRECTORY, &[]);
    }

    fn entry(&mut self, path: &Path, mode: u32, content: &[u8]) {
        self.count += 1;
        let name = path.to_str().expect("plain names").trim_start_matches('/');
        append(&mut self.archive, self.count, name, mode, content);
    }

    /// Writes the image to `path`.
    ///
    /// # Panics
    /// If that fails.
    pub fn write(mut self, path: &Path) {
        append(&mut self.archive, 0, "TRAILER!!!", 0, &[]);
        std::fs::write(path, &self.archive).expect("the initramfs can be written");
    }
}

fn append(archive: &mut Vec<u8>, inode: u32, name: &str, mode: u32, content: &[u8]) {
    let size = u32::try_from(content.len()).expect("files are small");
    let name_size = u32::try_from(name.len() + 1).expect("names are short");
    // inode, mode, uid, gid, links, mtime, size, device (4 numbers), name size, checksum
    let fields = [inode, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0];
    archive.extend(b"070701");
    fields.iter().for_each(|field| archive.extend(format!("{field:08x}").bytes()));
    archive.extend(name.bytes());
    archive.push(0);
    archive.resize(archive.len().next_multiple_of(4), 0);
    archive.extend(content);
    archive.resize(archive.len().next_multiple_of(4), 0);
}

fn read(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap_or_else(|e| panic!("cannot read {}: {e}", path.display()))
}

/// What `ldd` names: nothing for a static program.
fn shared_libraries(program: &Path) -> Vec<PathBuf> {
    let output = Command::new("ldd").arg(program).output().expect("ldd can be run");
    let words = String::from_utf8_lossy(&output.stdout).into_owned();
    words.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from).filter(|p| p.exists()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_archive_is_what_cpio_understands() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        Initramfs::new().file("/a/b/c", b"content").write(&path);
        let list = Command::new("cpio").args(["-it", "--quiet", "-F"]).arg(&path).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&list.stdout), "dev\nproc\nsys\ntmp\nrun\na\na/b\na/b/c\n");
    }
}
