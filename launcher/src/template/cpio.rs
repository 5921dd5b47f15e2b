//! Writes cpio archives in the "newc" format, the one Linux unpacks as initramfs.
//!
//! See the kernel's Documentation/driver-api/early-userspace/buffer-format.rst. Times and owners are always zero, so the
//! same entries give the same bytes.

use std::io::{self, Write};

const REGULAR: u32 = 0o100_000;
const DIRECTORY: u32 = 0o040_000;
const CHARACTER: u32 = 0o020_000;

/// An archive being written.
#[derive(Debug)]
pub struct Archive<W> {
    out: W,
    written: usize,
    inode: u32,
}

/// One entry's header fields that are not always the same.
#[derive(Clone, Copy, Default)]
struct Header {
    mode: u32,
    size: usize,
    device: (u32, u32),
}

impl<W: Write> Archive<W> {
    /// Starts an archive.
    pub fn new(out: W) -> Self {
        Self { out, written: 0, inode: 0 }
    }

    /// A folder; `path` has no slash in front, and its parent came before.
    pub fn directory(&mut self, path: &str) -> io::Result<()> {
        self.entry(path, Header { mode: DIRECTORY | 0o755, ..Header::default() }, &[])
    }

    /// A regular file.
    pub fn file(&mut self, path: &str, permissions: u32, content: &[u8]) -> io::Result<()> {
        let mode = REGULAR | (permissions & 0o7777);
        self.entry(path, Header { mode, size: content.len(), ..Header::default() }, content)
    }

    /// A character device.
    pub fn character_device(&mut self, path: &str, permissions: u32, device: (u32, u32)) -> io::Result<()> {
        self.entry(path, Header { mode: CHARACTER | (permissions & 0o7777), device, ..Header::default() }, &[])
    }

    /// Ends the archive and gives the writer back.
    pub fn finish(mut self) -> io::Result<W> {
        self.inode = u32::MAX;
        self.entry("TRAILER!!!", Header::default(), &[])?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn entry(&mut self, path: &str, header: Header, content: &[u8]) -> io::Result<()> {
        let too_large = || io::Error::new(io::ErrorKind::InvalidInput, format!("{path} is too large for an initramfs"));
        let size = u32::try_from(header.size).map_err(|_| too_large())?;
        let name_size = u32::try_from(path.len() + 1).map_err(|_| too_large())?;
        self.inode = self.inode.wrapping_add(1);
        let links = if header.mode & DIRECTORY == DIRECTORY { 2 } else { 1 };
        let (major, minor) = header.device;
        // inode, mode, uid, gid, links, time, size, device of the file (2), device it is (2), name size, checksum
        let fields = [self.inode, header.mode, 0, 0, links, 0, size, 0, 0, major, minor, name_size, 0];
        let mut text = String::from("070701");
        for field in fields {
            text.push_str(&format!("{field:08x}"));
        }
        self.write(text.as_bytes())?;
        self.write(path.as_bytes())?;
        self.write(&[0])?;
        self.pad()?;
        self.write(content)?;
        self.pad()
    }

    fn pad(&mut self) -> io::Result<()> {
        let zeroes = [0; 3];
        let missing = self.written.next_multiple_of(4) - self.written;
        self.write(zeroes.get(..missing).unwrap_or_default())
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.out.write_all(bytes)?;
        self.written += bytes.len();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Vec<u8> {
        let mut archive = Archive::new(Vec::new());
        archive.directory("dev").unwrap();
        archive.character_device("dev/console", 0o600, (5, 1)).unwrap();
        archive.file("init", 0o755, b"hello").unwrap();
        archive.file("empty", 0o644, b"").unwrap();
        archive.finish().unwrap()
    }

    #[test]
    fn the_same_entries_give_the_same_aligned_bytes() {
        let bytes = sample();
        assert_eq!(bytes, sample());
        assert_eq!(bytes.len() % 4, 0);
    }

    #[test]
    fn a_file_entry_byte_for_byte() {
        let mut archive = Archive::new(Vec::new());
        archive.file("a", 0o644, b"xy").unwrap();
        let header = "070701 00000001 000081a4 00000000 00000000 00000001 00000000 00000002 00000000 00000000 \
                      00000000 00000000 00000002 00000000"
            .replace(' ', "");
        let expected = [header.as_bytes(), b"a\0xy\0\0"].concat();
        assert_eq!(archive.out, expected);
    }

    #[test]
    fn the_system_cpio_reads_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.cpio");
        std::fs::write(&path, sample()).unwrap();
        let listing = std::process::Command::new("cpio")
            .args(["-itv", "--numeric-uid-gid", "-F"])
            .arg(&path)
            .env("TZ", "UTC")
            .output()
            .unwrap();
        let listing = String::from_utf8(listing.stdout).unwrap();
        let lines: Vec<&str> = listing.lines().collect();
        assert_eq!(lines.len(), 4, "{listing}");
        assert!(lines[0].starts_with("drwxr-xr-x") && lines[0].ends_with(" dev"), "{listing}");
        assert!(lines[1].starts_with("crw-------") && lines[1].contains("5,   1"), "{listing}");
        assert!(lines[2].starts_with("-rwxr-xr-x") && lines[2].contains(" 5 "), "{listing}");
    }
}
