//! The initramfs of a template: spectrum-guest as PID 1 and the modules it loads.

use std::{
    fs::{self, File},
    io::{self, BufWriter},
    path::{Path, PathBuf},
};

use super::cpio::Archive;

/// Why there is no initramfs.
#[derive(Debug, thiserror::Error)]
pub enum InitramfsError {
    /// No guest binary was found.
    #[error("spectrum-guest was not found next to this program: build it, and name it with --guest or SPECTRUM_GUEST")]
    NoGuest,
    /// The binary needs libraries that an initramfs does not have.
    #[error("{0} is not a static x86-64 program: build it with RUSTFLAGS=-Ctarget-feature=+crt-static")]
    NotStatic(PathBuf),
    /// A file could not be read or written.
    #[error("cannot use {path}: {source}")]
    File {
        /// The path.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
}

/// Finds and reads the guest binary: the one named, or the one built beside this program.
pub fn guest_binary(named: Option<&Path>) -> Result<Vec<u8>, InitramfsError> {
    let path = match named {
        Some(path) => path.to_owned(),
        None => beside_this_program().ok_or(InitramfsError::NoGuest)?,
    };
    let binary = fs::read(&path).map_err(|source| InitramfsError::File { path: path.clone(), source })?;
    if is_static(&binary) == Some(true) { Ok(binary) } else { Err(InitramfsError::NotStatic(path)) }
}

/// `cargo build --target` puts its results one folder further down, in a profile folder of the same name.
fn beside_this_program() -> Option<PathBuf> {
    let program = std::env::current_exe().ok()?;
    let folder = program.parent()?;
    let target = folder.parent()?.join("x86_64-unknown-linux-gnu");
    let places = [folder.to_owned(), target.join(folder.file_name()?), target.join("release"), target.join("debug")];
    let candidates = places.iter().map(|place| place.join("spectrum-guest"));
    candidates.into_iter().find(|path| fs::read(path).is_ok_and(|binary| is_static(&binary) == Some(true)))
}

/// True for an x86-64 ELF program without an interpreter; nothing for what is none.
fn is_static(binary: &[u8]) -> Option<bool> {
    const PROGRAM_INTERPRETER: u32 = 3;
    const X86_64: u16 = 62;
    let half = |at: usize| binary.get(at..)?.first_chunk::<2>().map(|b| u16::from_le_bytes(*b));
    let quad = |at: usize| binary.get(at..)?.first_chunk::<8>().map(|b| u64::from_le_bytes(*b));
    // 64-bit, little-endian
    if !binary.starts_with(b"\x7fELF\x02\x01") || half(18)? != X86_64 {
        return None;
    }
    let table = usize::try_from(quad(32)?).ok()?;
    let (size, count) = (usize::from(half(54)?), usize::from(half(56)?));
    for index in 0..count {
        let at = table.checked_add(index.checked_mul(size)?)?;
        let kind = binary.get(at..)?.first_chunk::<4>().map(|b| u32::from_le_bytes(*b))?;
        if kind == PROGRAM_INTERPRETER {
            return Some(false);
        }
    }
    Some(true)
}

/// Writes the initramfs. Uncompressed: the VMM copies it as it is, and unpacking costs the guest nothing.
pub fn write(path: &Path, guest: &[u8], modules: &[(String, Vec<u8>)]) -> Result<(), InitramfsError> {
    let fail = |source| InitramfsError::File { path: path.to_owned(), source };
    let file = BufWriter::new(File::create(path).map_err(fail)?);
    write_archive(file, guest, modules).map_err(fail)
}

fn write_archive(out: impl io::Write, guest: &[u8], modules: &[(String, Vec<u8>)]) -> io::Result<()> {
    let mut archive = Archive::new(out);
    for folder in ["dev", "modules", "proc", "run", "sys"] {
        archive.directory(folder)?;
    }
    // The kernel opens it for PID 1 before anything is mounted.
    archive.character_device("dev/console", 0o600, (5, 1))?;
    archive.character_device("dev/null", 0o666, (1, 3))?;
    let mut list = String::new();
    for (name, content) in modules {
        archive.file(&format!("modules/{name}"), 0o644, content)?;
        list.push_str(name);
        list.push('\n');
    }
    archive.file("modules/modules.list", 0o644, list.as_bytes())?;
    archive.file("init", 0o755, guest)?;
    archive.finish().map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn static_and_other_programs_are_told_apart() {
        assert_eq!(is_static(&fs::read("/bin/sh").unwrap()), Some(false));
        assert_eq!(is_static(b"#!/bin/sh\n"), None);
        assert_eq!(is_static(b"\x7fELF\x02\x01"), None);
        let mut elf = vec![0; 64 + 56];
        elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
        elf[18] = 62;
        elf[32] = 64;
        elf[54] = 56;
        elf[56] = 1;
        elf[64] = 1;
        assert_eq!(is_static(&elf), Some(true));
        elf[64] = 3;
        assert_eq!(is_static(&elf), Some(false));
        elf[56] = 2;
        assert_eq!(is_static(&elf), Some(false));
        elf[64] = 1;
        assert_eq!(is_static(&elf), None, "a table beyond the end");
    }

    #[test]
    fn the_same_inputs_give_the_same_bytes() {
        let modules = [("b.ko".to_owned(), vec![1, 2, 3]), ("a.ko".to_owned(), vec![4])];
        let build = || {
            let mut bytes = Vec::new();
            write_archive(&mut bytes, b"guest", &modules).unwrap();
            bytes
        };
        let bytes = build();
        assert_eq!(bytes, build());
        assert!(String::from_utf8_lossy(&bytes).contains("b.ko\na.ko\n"), "the order of loading is kept");
    }

    #[test]
    fn a_missing_guest_is_explained() {
        let error = guest_binary(Some(Path::new("/no/such/guest"))).unwrap_err().to_string();
        assert!(error.starts_with("cannot use /no/such/guest: No such file"), "{error}");
        let error = guest_binary(Some(Path::new("/bin/sh"))).unwrap_err().to_string();
        assert!(error.contains("is not a static"), "{error}");
    }
}
