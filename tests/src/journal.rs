//! A file whose every block says which it is, for a guest that writes it and a host that looks what came of it.

use std::fs::File;
use std::io::Read;
use std::path::Path;

/// Bytes of a block.
pub const BLOCK: usize = 1 << 20;

/// The content of the block of this number; no two have a word in common.
#[must_use]
pub fn block(number: u32) -> Vec<u8> {
    let words = 0..u32::try_from(BLOCK / 8).expect("a block is small");
    words
        .flat_map(|word| (u64::from(number) << 32 | u64::from(word)).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes())
        .collect()
}

/// How many blocks from the start of a file are what they should be.
///
/// # Errors
/// If it cannot be read.
pub fn whole_blocks(path: &Path) -> std::io::Result<u32> {
    let (mut file, mut found) = (File::open(path)?, vec![0; BLOCK]);
    for number in 0.. {
        match file.read_exact(&mut found) {
            Ok(()) if found == block(number) => {}
            Ok(()) => return Ok(number),
            Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(number),
            Err(e) => return Err(e),
        }
    }
    Ok(u32::MAX)
}
