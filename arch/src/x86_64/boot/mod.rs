//! Loads a kernel into guest memory and says with which registers the first vCPU starts.
//!
//! Two kinds of kernel are known, told apart by their contents: a bzImage is entered by Linux's 64-bit boot protocol ([`linux`]),
//! a 64-bit ELF file with a PVH note by the PVH protocol ([`pvh`]). Everything a file claims is checked against its real
//! length and against the guest's RAM before anything is copied, so that a damaged or hostile file ends in an [`Error`].

mod linux;
mod pvh;
#[cfg(test)]
mod tests;

use std::io::{self, Read, Seek, SeekFrom};

use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, ReadVolatile};

use super::layout::{CMDLINE_MAX_SIZE, CMDLINE_START, HIGH_RAM_START};
use super::regs::CpuRegs;

/// Why a kernel cannot be started. The messages name no file: that is for the caller, who knows its path.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel or initramfs could not be read.
    #[error("the {0} cannot be read: {1}")]
    Read(&'static str, #[source] io::Error),
    /// The file has no contents.
    #[error("the {0} is empty")]
    Empty(&'static str),
    /// The file ends before what its header announces.
    #[error("the kernel is truncated: it has {actual} bytes, its header announces {expected}")]
    Truncated {
        /// Bytes the file should have at least.
        expected: u64,
        /// Bytes it has.
        actual: u64,
    },
    /// Neither of the two kinds.
    #[error("this is not a kernel: it is neither a bzImage nor an ELF file{0}")]
    NotAKernel(&'static str),
    /// An ELF file that cannot be entered.
    #[error("the kernel is an ELF file without a PVH note; use a kernel built with CONFIG_PVH=y, or its bzImage")]
    NoPvhNote,
    /// The header contradicts itself or asks for something no kernel may.
    #[error("the kernel's header is damaged: {0}")]
    Damaged(&'static str),
    /// A kernel for another processor, or too old.
    #[error("this kernel cannot be started: {0}")]
    Unsupported(&'static str),
    /// The kernel needs memory the guest does not have.
    #[error("the kernel needs RAM up to address {needed:#x}, the guest's ends at {available:#x}; give it more memory")]
    KernelTooBig {
        /// Where the kernel's memory would end.
        needed: u64,
        /// Where the guest's low RAM ends.
        available: u64,
    },
    /// No room for the initramfs.
    #[error(
        "the initramfs of {size} bytes does not fit into the {available} bytes left above the kernel; give the guest more memory"
    )]
    InitramfsTooBig {
        /// Bytes of the initramfs.
        size: u64,
        /// Bytes between the kernel and the end of low RAM.
        available: u64,
    },
    /// The command line is too long.
    #[error("the kernel command line has {length} bytes, this kernel takes at most {max}")]
    CmdlineTooLong {
        /// Its length in bytes.
        length: usize,
        /// The most this kernel takes.
        max: usize,
    },
    /// The command line has a NUL in it, where the kernel would stop reading.
    #[error("the kernel command line contains a NUL byte")]
    CmdlineNul,
    /// The guest has no memory where boot data go.
    #[error("the guest's RAM must start at address 0 and be larger than 1 MiB to start a kernel")]
    NoLowRam,
    /// Boot data could not be written although the RAM's ranges said they could.
    #[error("guest memory cannot be written: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

/// What to start. `K` and `I` are usually both [`std::fs::File`].
pub struct Payload<'a, K, I> {
    /// The kernel: bzImage or ELF with PVH note.
    pub kernel: &'a mut K,
    /// The initial RAM file system.
    pub initramfs: Option<&'a mut I>,
    /// The kernel's command line, without a terminating NUL.
    pub cmdline: &'a str,
}

/// By which protocol a kernel is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Protocol {
    /// Linux's 64-bit protocol, for a bzImage.
    Linux64,
    /// PVH, for an ELF file.
    Pvh,
}

/// A loaded kernel, ready to be entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// How it is entered.
    pub protocol: Protocol,
    /// The registers of the first vCPU; `regs.general.rip` is the entry point.
    pub regs: CpuRegs,
}

/// The two kinds of kernel file.
enum Kind {
    BzImage,
    Elf,
}

/// Loads `payload` into `memory`, whose RAM lies in the ranges `ram` ([`super::layout::ram_ranges`]). `rsdp` is where the caller
/// puts the ACPI root pointer. RAM must read as zeroes beforehand, also when a guest is started again: of a kernel's memory only what
/// is in its file is written.
///
/// # Errors
/// When the kernel is damaged or of no known kind, or does not fit together with the initramfs; see [`Error`].
pub fn load<M, K, I>(
    memory: &M,
    payload: Payload<'_, K, I>,
    ram: &[(GuestAddress, u64)],
    rsdp: Option<GuestAddress>,
) -> Result<Entry, Error>
where
    M: GuestMemoryBackend,
    K: Read + ReadVolatile + Seek,
    I: ReadVolatile + Seek,
{
    let low_ram_end = match ram.first() {
        Some(&(GuestAddress(0), size)) if size > HIGH_RAM_START => size,
        _ => return Err(Error::NoLowRam),
    };
    let guest = Guest { memory, ram, low_ram_end, rsdp };
    let length = length(payload.kernel, "kernel")?;
    match detect(payload.kernel, length)? {
        Kind::BzImage => linux::load(&guest, payload, length),
        Kind::Elf => pvh::load(&guest, payload, length),
    }
}

/// What the protocols need to know about the machine.
struct Guest<'a, M> {
    memory: &'a M,
    ram: &'a [(GuestAddress, u64)],
    /// Where the RAM that starts at 0 ends; the kernel and all boot data lie below.
    low_ram_end: u64,
    rsdp: Option<GuestAddress>,
}

/// Where an initramfs was put.
#[derive(Clone, Copy)]
struct Placed {
    start: u64,
    size: u64,
}

impl<M: GuestMemoryBackend> Guest<'_, M> {
    fn rsdp_address(&self) -> u64 {
        self.rsdp.map_or(0, |address| address.0)
    }

    /// Checks that `[start, start + size)` is RAM free for a kernel, and returns its end.
    fn kernel_range(&self, start: u64, size: u64) -> Result<u64, Error> {
        if start < HIGH_RAM_START {
            return Err(Error::Damaged("it wants to be loaded into the first MiB"));
        }
        let end = start.checked_add(size).ok_or(Error::Damaged("its memory wraps around the address space"))?;
        if end > self.low_ram_end {
            return Err(Error::KernelTooBig { needed: end, available: self.low_ram_end });
        }
        Ok(end)
    }

    /// Copies the initramfs as far up as possible, between `bottom` and `top`.
    fn place_initramfs<I: ReadVolatile + Seek>(&self, file: &mut I, bottom: u64, top: u64) -> Result<Placed, Error> {
        const PAGE: u64 = 4096;
        let size = length(file, "initramfs")?;
        let top = top.min(self.low_ram_end);
        let too_big = Error::InitramfsTooBig { size, available: top.saturating_sub(bottom) };
        let Some(start) = top.checked_sub(size).map(|start| start / PAGE * PAGE).filter(|&start| start >= bottom)
        else {
            return Err(too_big);
        };
        let Ok(count) = usize::try_from(size) else { return Err(too_big) };
        rewind(file, "initramfs")?;
        self.memory
            .read_exact_volatile_from(GuestAddress(start), file, count)
            .map_err(|error| Error::Read("initramfs", io::Error::other(error)))?;
        Ok(Placed { start, size })
    }

    /// Copies the command line, of which the kernel takes `max` bytes at most.
    fn write_cmdline(&self, cmdline: &str, max: usize) -> Result<(), Error> {
        check_cmdline(cmdline, max)?;
        let mut bytes = cmdline.as_bytes().to_vec();
        bytes.push(0);
        Ok(self.memory.write_slice(&bytes, GuestAddress(CMDLINE_START))?)
    }
}

/// Bytes of the longest command line without its NUL, for any kernel.
const CMDLINE_MAX_LEN: usize = CMDLINE_MAX_SIZE - 1;

fn check_cmdline(cmdline: &str, max: usize) -> Result<(), Error> {
    if cmdline.contains('\0') {
        return Err(Error::CmdlineNul);
    }
    let max = max.min(CMDLINE_MAX_LEN);
    if cmdline.len() > max {
        return Err(Error::CmdlineTooLong { length: cmdline.len(), max });
    }
    Ok(())
}

fn length<F: Seek>(file: &mut F, what: &'static str) -> Result<u64, Error> {
    match file.seek(SeekFrom::End(0)) {
        Ok(0) => Err(Error::Empty(what)),
        Ok(length) => Ok(length),
        Err(error) => Err(Error::Read(what, error)),
    }
}

fn rewind<F: Seek>(file: &mut F, what: &'static str) -> Result<(), Error> {
    file.rewind().map_err(|error| Error::Read(what, error))
}

/// Reads `buffer.len()` bytes of the kernel, which the caller knows to be there, from offset `at`.
fn read_at<K: Read + Seek>(kernel: &mut K, at: u64, buffer: &mut [u8]) -> Result<(), Error> {
    kernel.seek(SeekFrom::Start(at)).and_then(|_| kernel.read_exact(buffer)).map_err(|e| Error::Read("kernel", e))
}

/// Tells the kinds apart by their magic numbers.
fn detect<K: Read + Seek>(kernel: &mut K, length: u64) -> Result<Kind, Error> {
    /// Where a bzImage has "HdrS".
    const HDRS: std::ops::Range<usize> = 0x202..0x206;
    let mut start = [0; HDRS.end];
    let available = usize::try_from(length).unwrap_or(usize::MAX).min(start.len());
    let (head, _) = start.split_at_mut(available);
    read_at(kernel, 0, head)?;
    if start.starts_with(b"\x7fELF") {
        return Ok(Kind::Elf);
    }
    if available == start.len() && start.ends_with(b"HdrS") {
        return Ok(Kind::BzImage);
    }
    Err(match start {
        // Kernels that can also be started by UEFI begin like a PE file, and so with the DOS magic number.
        [b'M', b'Z', ..] if available < start.len() => Error::Truncated { expected: HDRS.end as u64, actual: length },
        [0x1f, 0x8b, ..] => Error::NotAKernel(" (it is compressed with gzip: decompress it first)"),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Error::NotAKernel(" (it is compressed with zstd: decompress it first)"),
        [0xfd, b'7', b'z', b'X', b'Z', ..] => Error::NotAKernel(" (it is compressed with xz: decompress it first)"),
        _ => Error::NotAKernel(""),
    })
}
