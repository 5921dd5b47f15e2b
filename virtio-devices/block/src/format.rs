//! Recognising image formats by their magic numbers.
//!
//! It never decides how an image is read: that is raw unless the user says otherwise, because the guest writes the
//! bytes this looks at. A header found here only means that raw is probably not what the user wants.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

const SECTOR: usize = 512;

/// (offset in the first sector, magic number, name)
const MAGICS: &[(usize, &[u8], &str)] = &[
    (0, b"QFI\xfb", "qcow2"),
    (0, b"QED\0", "QED"),
    (0, b"vhdxfile", "VHDX"),
    (0, b"conectix", "VHD"),
    (0, b"KDMV", "VMDK"),
    (0, b"# Disk DescriptorFile", "VMDK"),
    (0, b"WithoutFreeSpace", "Parallels"),
    (0, b"WithouFreSpacExt", "Parallels"),
    (64, b"\x7f\x10\xda\xbe", "VDI"),
];

/// The name of the format `file` of `size` bytes seems to have; nothing: it looks like the bytes of a disk.
///
/// # Errors
/// If the file cannot be read.
pub fn detect(file: &File, size: u64) -> io::Result<Option<&'static str>> {
    let mut sector = [0; SECTOR];
    let n = file.read_at(&mut sector, 0)?;
    let head = sector.get(..n).unwrap_or_default();
    if let Some(name) = of_header(head) {
        return Ok(Some(name));
    }
    // A VHD of fixed size has its header at the end.
    let footer = size.saturating_sub(SECTOR as u64) / SECTOR as u64 * SECTOR as u64;
    let n = file.read_at(&mut sector, footer)?;
    let tail = sector.get(..n).unwrap_or_default();
    Ok(tail.starts_with(b"conectix").then_some("VHD"))
}

fn of_header(head: &[u8]) -> Option<&'static str> {
    let (_, _, name) =
        MAGICS.iter().find(|(offset, magic, _)| head.get(*offset..).is_some_and(|h| h.starts_with(magic)))?;
    Some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn detected(pieces: &[(u64, &[u8])], size: u64) -> Option<&'static str> {
        let file = tempfile::tempfile().unwrap();
        file.set_len(size).unwrap();
        for (offset, bytes) in pieces {
            file.write_all_at(bytes, *offset).unwrap();
        }
        detect(&file, size).unwrap()
    }

    #[test]
    fn headers_are_recognised_and_nothing_else_is() {
        assert_eq!(detected(&[], 1 << 20), None);
        assert_eq!(detected(&[], 0), None);
        assert_eq!(detected(&[(0, b"QFI\xfb")], 4), Some("qcow2"));
        assert_eq!(detected(&[(0, b"QFI")], 3), None);
        assert_eq!(detected(&[(1, b"QFI\xfb")], 1 << 20), None);
        assert_eq!(detected(&[(0, b"vhdxfile")], 1 << 20), Some("VHDX"));
        assert_eq!(detected(&[(64, b"\x7f\x10\xda\xbe")], 1 << 20), Some("VDI"));
        assert_eq!(detected(&[(1024, b"conectix")], 1536), Some("VHD"));
        assert_eq!(detected(&[(510, b"\x55\xaa")], 1 << 20), None, "a partition table is a raw disk");
    }
}
