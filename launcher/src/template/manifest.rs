//! `template.json`: what a template is made of.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Read},
    path::Path,
};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::progress::Bar;

/// Name of the file in the template's folder.
pub const FILE: &str = "template.json";

/// The version of this format.
const VERSION: u32 = 1;

/// A template.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Version of this format.
    pub version: u32,
    /// Debian release.
    pub suite: String,
    /// Release of the kernel, as `uname -r` tells it.
    pub kernel: String,
    /// Every package of the root image, with its version.
    pub packages: BTreeMap<String, String>,
    /// Disks, as paths in the template's folder, of a machine that brings its own system. Others have none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<String>,
    /// Every file of the template, by name.
    pub files: BTreeMap<String, FileEntry>,
}

/// A file of a template.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileEntry {
    /// Size in bytes.
    pub bytes: u64,
    /// SHA-256, hexadecimal.
    pub sha256: String,
}

impl FileEntry {
    /// Describes a file. Its bytes are counted on `bar`.
    fn of(path: &Path, bar: &Bar) -> io::Result<Self> {
        let mut file = File::open(path)?;
        let mut hash = Sha256::new();
        let mut buffer = vec![0; 1024 * 1024];
        let mut bytes = 0;
        loop {
            let count = file.read(&mut buffer)?;
            if count == 0 {
                break;
            }
            hash.update(buffer.get(..count).unwrap_or_default());
            bytes += count as u64;
            bar.advance(count as u64);
        }
        let sha256 = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(Self { bytes, sha256 })
    }
}

impl Manifest {
    /// A manifest without files yet.
    pub fn new(suite: &str, kernel: &str, packages: BTreeMap<String, String>) -> Self {
        Self {
            version: VERSION,
            suite: suite.into(),
            kernel: kernel.into(),
            packages,
            disks: Vec::new(),
            files: BTreeMap::new(),
        }
    }

    /// Reads the manifest of a template's folder.
    pub fn read(folder: &Path) -> io::Result<Self> {
        let manifest: Self = serde_json::from_slice(&fs::read(folder.join(FILE))?)?;
        if manifest.version == VERSION {
            Ok(manifest)
        } else {
            let text = format!("its version is {}, known is {VERSION}: build the template anew", manifest.version);
            Err(io::Error::new(io::ErrorKind::InvalidData, text))
        }
    }

    /// Describes the files in `folder`, which takes long, and writes the manifest beside them.
    pub fn write(&mut self, folder: &Path, files: &[&str], bar: &Bar) -> io::Result<()> {
        let paths: Vec<_> = files.iter().map(|name| folder.join(name)).collect();
        let sizes = paths.iter().flat_map(fs::metadata).map(|data| data.len());
        bar.begin_bytes("hashing", sizes.fold(0, u64::saturating_add));
        for (name, path) in files.iter().zip(&paths) {
            self.files.insert((*name).into(), FileEntry::of(path, bar)?);
        }
        let mut text = serde_json::to_vec_pretty(self)?;
        text.push(b'\n');
        fs::write(folder.join(FILE), text)
    }
}

/// The packages of an unpacked system and their versions, from dpkg's status file.
pub fn installed_packages(status: &str) -> BTreeMap<String, String> {
    let field = |stanza: &str, name: &str| {
        stanza.lines().find_map(|line| line.strip_prefix(name)).map(|value| value.trim().to_owned())
    };
    status.split("\n\n").filter_map(|stanza| Some((field(stanza, "Package:")?, field(stanza, "Version:")?))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn written_and_read_again() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("a"), "abc").unwrap();
        let mut manifest = Manifest::new("trixie", "6.12", [("foot".to_owned(), "1.21".to_owned())].into());
        manifest.write(folder.path(), &["a"], &Bar::new()).unwrap();
        let read = Manifest::read(folder.path()).unwrap();
        assert_eq!(read, manifest);
        assert_eq!(read.files["a"].bytes, 3);
        assert_eq!(read.files["a"].sha256, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        manifest.version = 2;
        manifest.write(folder.path(), &[], &Bar::new()).unwrap();
        assert!(Manifest::read(folder.path()).unwrap_err().to_string().contains("build the template anew"));
    }

    #[test]
    fn packages_are_found() {
        let status =
            "Package: foot\nStatus: install ok installed\nVersion: 1.21.0-2\n\nPackage: zlib1g\nVersion: 1:1.3\n";
        let packages = installed_packages(status);
        assert_eq!(packages["foot"], "1.21.0-2");
        assert_eq!(packages["zlib1g"], "1:1.3");
        assert_eq!(packages.len(), 2);
    }
}
