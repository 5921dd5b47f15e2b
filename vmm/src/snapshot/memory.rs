//! Guest RAM in a file: sparse, with a hash for each chunk, so that each way of reading it can verify what it reads.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::SeekFrom;
use rustix::io::Errno;
use virtio_devices::device::Memory;
use vm_memory::{Bytes, GuestAddress};

use super::{SnapshotError, damaged, file_error, open_file};
use crate::plan::PlannedRam;

/// Bytes that are written, hashed and restored together; a multiple of the page size.
pub const CHUNK: u64 = 64 << 10;

/// BLAKE3 of a chunk.
type Sum = [u8; blake3::OUT_LEN];
/// Stands for a chunk of zeroes, for which nothing is written.
const ZEROES: Sum = [0; blake3::OUT_LEN];

/// A part of RAM that has a hash of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Chunk {
    /// Where it is in the guest's physical memory.
    pub guest: u64,
    /// Where it is in the file.
    pub offset: u64,
    /// Bytes.
    pub len: usize,
}

impl Chunk {
    /// The chunk with byte `at` of a range that is at `base` in the file.
    fn of(range: &PlannedRam, base: u64, at: u64) -> Self {
        let start = at / CHUNK * CHUNK;
        let len = usize::try_from((range.len - start).min(CHUNK)).unwrap_or(0);
        Self { guest: range.start + start, offset: base + start, len }
    }
}

/// The chunks of RAM in the order of the file. No chunk is in two ranges.
fn chunks(ram: &[PlannedRam]) -> impl Iterator<Item = Chunk> {
    let mut start = 0u64;
    ram.iter().flat_map(move |range| {
        let base = start;
        start = start.saturating_add(range.len);
        (0..range.len.div_ceil(CHUNK)).map(move |i| Chunk::of(range, base, i * CHUNK))
    })
}

fn is_zero(bytes: &[u8]) -> bool {
    // In parts: an answer comes early where there is data, and each part is one vector operation.
    bytes.chunks(64).all(|part| part.iter().fold(0, |all, byte| all | byte) == 0)
}

fn sum(bytes: &[u8]) -> Sum {
    if is_zero(bytes) { ZEROES } else { blake3::hash(bytes).into() }
}

fn unreadable(e: impl std::error::Error + Send + Sync + 'static) -> io::Error {
    io::Error::other(e)
}

/// Writes `memory` to `file` and returns the hashes of its chunks, one after the other.
pub(super) fn write(memory: &Memory, ram: &[PlannedRam], file: &File) -> io::Result<Vec<u8>> {
    let mut sums = Vec::new();
    let mut buffer = vec![0; usize::try_from(CHUNK).unwrap_or(0)];
    for chunk in chunks(ram) {
        let part = buffer.get_mut(..chunk.len).unwrap_or_default();
        memory.read_slice(part, GuestAddress(chunk.guest)).map_err(unreadable)?;
        let sum = sum(part);
        if sum != ZEROES {
            file.write_all_at(part, chunk.offset)?;
        }
        sums.extend(sum);
    }
    file.set_len(ram.iter().map(|r| r.len).sum())?;
    Ok(sums)
}

/// Bytes of the hashes of `ram`.
pub(super) fn sums_size(ram: &[PlannedRam]) -> u64 {
    let count = ram.iter().fold(0u64, |all, range| all.saturating_add(range.len.div_ceil(CHUNK)));
    count.saturating_mul(blake3::OUT_LEN as u64)
}

/// The memory of an opened snapshot. Its size is what the plan says; the rest is verified when it is read.
pub struct MemoryFile {
    file: File,
    path: PathBuf,
    sums: Vec<Sum>,
    ram: Vec<PlannedRam>,
}

impl MemoryFile {
    pub(super) fn open(path: PathBuf, sums: &[u8], ram: &[PlannedRam]) -> Result<Self, SnapshotError> {
        let (sums, rest) = sums.as_chunks();
        if !rest.is_empty() || (sums.len() * blake3::OUT_LEN) as u64 != sums_size(ram) {
            return Err(damaged(&path, "there are not as many hashes as it has chunks"));
        }
        let file = open_file(&path)?;
        let found = file.metadata().map_err(file_error("look at", &path))?;
        let wanted: u64 = ram.iter().map(|r| r.len).sum();
        if found.len() != wanted {
            return Err(damaged(&path, format!("it has {} bytes instead of {wanted}", found.len())));
        }
        Ok(Self { file, path, sums: sums.to_vec(), ram: ram.to_vec() })
    }

    /// The file, in which the ranges of RAM follow one another.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Its path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes of RAM.
    pub(super) fn len(&self) -> u64 {
        self.ram.iter().map(|r| r.len).sum()
    }

    /// Reads all of it, compares the hashes, and calls `take` with each chunk that is not all zeroes.
    pub(super) fn read(&self, mut take: impl FnMut(Chunk, &[u8]) -> io::Result<()>) -> Result<(), SnapshotError> {
        let mut buffer = vec![0; usize::try_from(CHUNK).unwrap_or(0)];
        let mut next_data = 0;
        for (chunk, expected) in chunks(&self.ram).zip(&self.sums) {
            let end = chunk.offset + chunk.len as u64;
            if next_data < chunk.offset {
                next_data = self.next_data(chunk.offset).map_err(file_error("read", &self.path))?;
            }
            let part = buffer.get_mut(..chunk.len).unwrap_or_default();
            // A hole reads as zeroes.
            let hole = next_data >= end;
            if !hole {
                self.file.read_exact_at(part, chunk.offset).map_err(file_error("read", &self.path))?;
            }
            if *expected != if hole { ZEROES } else { sum(part) } {
                return Err(self.damaged(chunk));
            }
            if *expected != ZEROES {
                take(chunk, part).map_err(file_error("restore memory from", &self.path))?;
            }
        }
        Ok(())
    }

    fn damaged(&self, chunk: Chunk) -> SnapshotError {
        damaged(&self.path, format!("the bytes at {:#x} are not what was written", chunk.offset))
    }

    /// How many chunks there are.
    pub(super) fn chunks(&self) -> usize {
        self.sums.len()
    }

    /// The number of the chunk with the guest's address `guest`, unless that is no RAM.
    pub(super) fn chunk_at(&self, guest: u64) -> Option<usize> {
        let mut first = 0u64;
        for range in &self.ram {
            match guest.checked_sub(range.start) {
                Some(at) if at < range.len => return usize::try_from(first + at / CHUNK).ok(),
                _ => first += range.len.div_ceil(CHUNK),
            }
        }
        None
    }

    /// Chunk number `number`.
    fn chunk(&self, number: usize) -> Option<Chunk> {
        let (mut left, mut base) = (number as u64, 0);
        for range in &self.ram {
            let count = range.len.div_ceil(CHUNK);
            if left < count {
                return Some(Chunk::of(range, base, left * CHUNK));
            }
            left -= count;
            base += range.len;
        }
        None
    }

    /// Reads chunk number `number` into `buffer` and compares its hash; no bytes if they are all zeroes, for which the
    /// hash is enough.
    pub(super) fn load<'b>(
        &self,
        number: usize,
        buffer: &'b mut [u8],
    ) -> Result<(Chunk, Option<&'b [u8]>), SnapshotError> {
        let found = self.chunk(number).zip(self.sums.get(number));
        let (chunk, expected) = found.ok_or_else(|| damaged(&self.path, format!("it has no chunk {number}")))?;
        if *expected == ZEROES {
            return Ok((chunk, None));
        }
        let part = buffer.get_mut(..chunk.len).unwrap_or_default();
        self.file.read_exact_at(part, chunk.offset).map_err(file_error("read", &self.path))?;
        if *expected != sum(part) { Err(self.damaged(chunk)) } else { Ok((chunk, Some(part))) }
    }

    /// Where the first data at or after `offset` is; beyond every offset if there is none.
    fn next_data(&self, offset: u64) -> io::Result<u64> {
        match rustix::fs::seek(&self.file, SeekFrom::Data(offset)) {
            Ok(at) => Ok(at),
            Err(Errno::NXIO) => Ok(u64::MAX),
            Err(e) => Err(e.into()),
        }
    }

    /// Verifies all of it.
    ///
    /// # Errors
    /// If it is damaged or cannot be read.
    pub fn verify(&self) -> Result<(), SnapshotError> {
        self.read(|_, _| Ok(()))
    }

    /// Verifies all of it and copies it into `memory`, which is all zeroes.
    ///
    /// # Errors
    /// If it is damaged or cannot be read.
    pub fn copy_to(&self, memory: &Memory) -> Result<(), SnapshotError> {
        self.read(|chunk, part| memory.write_slice(part, GuestAddress(chunk.guest)).map_err(unreadable))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_cover_each_range_and_no_two() {
        let range = |start, len| PlannedRam { start, len, slot: 0 };
        let ram = [range(0, CHUNK + 4096), range(1 << 32, CHUNK)];
        let all: Vec<_> = chunks(&ram).map(|c| (c.guest, c.offset, c.len as u64)).collect();
        let second = CHUNK + 4096;
        assert_eq!(all, [(0, 0, CHUNK), (CHUNK, CHUNK, 4096), (1 << 32, second, CHUNK)]);
        assert_eq!(chunks(&[]).count(), 0);
    }

    #[test]
    fn chunks_are_found_by_address_and_number() {
        let range = |start, len| PlannedRam { start, len, slot: 0 };
        let ram = vec![range(0, CHUNK + 4096), range(1 << 32, 2 * CHUNK)];
        let file = File::open("/dev/null").unwrap();
        let memory = MemoryFile { file, path: PathBuf::new(), sums: vec![ZEROES; 4], ram: ram.clone() };
        for (number, chunk) in chunks(&ram).enumerate() {
            assert_eq!(memory.chunk(number), Some(chunk));
            for at in [0, 1, chunk.len as u64 - 1] {
                assert_eq!(memory.chunk_at(chunk.guest + at), Some(number));
            }
        }
        assert_eq!((memory.chunk(4), memory.chunks()), (None, 4));
        for none in [CHUNK + 4096, (1 << 32) - 1, (1 << 32) + 2 * CHUNK, u64::MAX] {
            assert_eq!(memory.chunk_at(none), None);
        }
    }

    #[test]
    fn zeroes_are_told_from_all_else() {
        assert!(is_zero(&[]) && is_zero(&[0; 100]));
        for at in [0, 7, 63, 64, 99] {
            let mut bytes = [0; 100];
            bytes[at] = 1;
            assert!(!is_zero(&bytes), "{at}");
        }
    }
}
