//! The PVH boot protocol for ELF kernels (Xen's docs/misc/pvh.pandoc and public/arch-x86/hvm/start_info.h).
//!
//! The file's segments are loaded at their physical addresses, and the 32-bit entry point named by its `XEN_ELFNOTE_PHYS32_ENTRY`
//! note is entered without paging, with `ebx` pointing to an `hvm_start_info`.

use std::io::{Read, Seek};

use linux_loader::loader::elf::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use linux_loader::loader::{Elf, KernelLoader, PvhBootCapability};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, ReadVolatile};

use super::{CMDLINE_MAX_LEN, Entry, Error, Guest, Payload, Placed, Protocol, read_at};
use crate::x86_64::layout::{
    CMDLINE_START, PVH_MEMMAP, PVH_MODLIST, PVH_START_INFO, RAM_64BIT_START, ZERO_PAGE, memory_map,
};
use crate::x86_64::regs::CpuRegs;

const EHDR_SIZE: usize = 64;
const PHDR_SIZE: usize = 56;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// More program headers than any kernel has.
const MAX_PROGRAM_HEADERS: u16 = 128;
/// More bytes of notes than any kernel has.
const MAX_NOTES_SIZE: u64 = 1 << 20;
/// Memory map entries for which there is room before the zero page.
const MAX_MEMMAP_ENTRIES: usize = ((ZERO_PAGE - PVH_MEMMAP) / 24) as usize;

pub(super) fn load<M, K, I>(guest: &Guest<'_, M>, payload: Payload<'_, K, I>, length: u64) -> Result<Entry, Error>
where
    M: GuestMemoryBackend,
    K: Read + ReadVolatile + Seek,
    I: ReadVolatile + Seek,
{
    let segments = check_elf(guest, payload.kernel, length)?;
    guest.write_cmdline(payload.cmdline, CMDLINE_MAX_LEN)?;
    let loaded = Elf::load(guest.memory, None, payload.kernel, None).map_err(|error| match error {
        linux_loader::loader::Error::Elf(linux_loader::loader::elf::Error::InvalidPvhNote) => {
            Error::Damaged("its PVH note is too short")
        }
        error => Error::Read("kernel", std::io::Error::other(error)),
    })?;
    let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else { return Err(Error::NoPvhNote) };
    if !segments.iter().any(|&(start, end)| (start..end).contains(&entry.0)) {
        return Err(Error::Damaged("its PVH entry point lies outside of what it loads"));
    }

    let kernel_end = segments.iter().map(|segment| segment.1).max().unwrap_or_default();
    let initramfs = match payload.initramfs {
        Some(file) => Some(guest.place_initramfs(file, kernel_end, RAM_64BIT_START)?),
        None => None,
    };
    write_start_info(guest, initramfs)?;
    let regs = CpuRegs::pvh(entry.0, PVH_START_INFO);
    regs.write_descriptor_tables(guest.memory)?;
    Ok(Entry { protocol: Protocol::Pvh, regs })
}

/// A little-endian field of a header, whose buffer is larger than any field's offset.
fn field<const N: usize>(header: &[u8], offset: usize) -> [u8; N] {
    header.get(offset..).and_then(<[u8]>::first_chunk).copied().unwrap_or([0; N])
}

/// Checks the ELF header and all program headers (ELF-64 object file format, version 1.5), and returns the ranges of guest memory
/// that the kernel will take.
fn check_elf<M: GuestMemoryBackend, K: Read + Seek>(
    guest: &Guest<'_, M>,
    kernel: &mut K,
    length: u64,
) -> Result<Vec<(u64, u64)>, Error> {
    let truncated = |expected| Error::Truncated { expected, actual: length };
    if length < EHDR_SIZE as u64 {
        return Err(truncated(EHDR_SIZE as u64));
    }
    let mut header = [0; EHDR_SIZE];
    read_at(kernel, 0, &mut header)?;
    check_ident(&header)?;
    let table = u64::from_le_bytes(field(&header, 32));
    let count = u16::from_le_bytes(field(&header, 56));
    if usize::from(u16::from_le_bytes(field(&header, 54))) != PHDR_SIZE || table < EHDR_SIZE as u64 {
        return Err(Error::Damaged("its program header table is not where an ELF file has it"));
    }
    if count > MAX_PROGRAM_HEADERS {
        return Err(Error::Damaged("it has more than 128 program headers"));
    }
    let table_size = usize::from(count) * PHDR_SIZE;
    match table.checked_add(table_size as u64) {
        Some(end) if end <= length => {}
        end => return Err(truncated(end.unwrap_or(u64::MAX))),
    }
    let mut headers = vec![0; table_size];
    read_at(kernel, table, &mut headers)?;

    let mut segments = Vec::new();
    for program_header in headers.chunks_exact(PHDR_SIZE) {
        let kind = u32::from_le_bytes(field(program_header, 0));
        let offset = u64::from_le_bytes(field(program_header, 8));
        let address = u64::from_le_bytes(field(program_header, 24));
        let file_size = u64::from_le_bytes(field(program_header, 32));
        let memory_size = u64::from_le_bytes(field(program_header, 40));
        if kind != PT_LOAD && kind != PT_NOTE {
            continue;
        }
        let end = offset.checked_add(file_size).ok_or(Error::Damaged("a segment wraps around"))?;
        if end > length {
            return Err(truncated(end));
        }
        if kind == PT_NOTE && file_size > MAX_NOTES_SIZE {
            return Err(Error::Damaged("it has more than a MiB of notes"));
        }
        if kind == PT_LOAD && memory_size > 0 {
            if memory_size < file_size {
                return Err(Error::Damaged("a segment is larger in the file than in memory"));
            }
            segments.push((address, guest.kernel_range(address, memory_size)?));
        }
    }
    if segments.is_empty() {
        return Err(Error::Damaged("it has nothing to load"));
    }
    Ok(segments)
}

fn check_ident(header: &[u8; EHDR_SIZE]) -> Result<(), Error> {
    const CLASS_64: u8 = 2;
    const LITTLE_ENDIAN: u8 = 1;
    const EM_X86_64: u16 = 62;
    let [class, data] = field(header, 4);
    if class != CLASS_64 {
        return Err(Error::Unsupported("it is a 32-bit ELF file; use a 64-bit one"));
    }
    if data != LITTLE_ENDIAN || u16::from_le_bytes(field(header, 18)) != EM_X86_64 {
        return Err(Error::Unsupported("it is an ELF file for another processor than x86_64"));
    }
    Ok(())
}

fn write_start_info<M: GuestMemoryBackend>(guest: &Guest<'_, M>, initramfs: Option<Placed>) -> Result<(), Error> {
    let mut memmap_entries = 0;
    for (slot, entry) in (0u64..).zip(memory_map(guest.ram).into_iter().take(MAX_MEMMAP_ENTRIES)) {
        let entry =
            hvm_memmap_table_entry { addr: entry.start, size: entry.size, type_: entry.kind as u32, reserved: 0 };
        guest.memory.write_obj(entry, GuestAddress(PVH_MEMMAP + slot * size_of::<hvm_memmap_table_entry>() as u64))?;
        memmap_entries += 1;
    }
    if let Some(Placed { start, size }) = initramfs {
        let module = hvm_modlist_entry { paddr: start, size, ..hvm_modlist_entry::default() };
        guest.memory.write_obj(module, GuestAddress(PVH_MODLIST))?;
    }
    let start_info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: 1,
        nr_modules: u32::from(initramfs.is_some()),
        modlist_paddr: if initramfs.is_some() { PVH_MODLIST } else { 0 },
        cmdline_paddr: CMDLINE_START,
        rsdp_paddr: guest.rsdp_address(),
        memmap_paddr: PVH_MEMMAP,
        memmap_entries,
        ..hvm_start_info::default()
    };
    Ok(guest.memory.write_obj(start_info, GuestAddress(PVH_START_INFO))?)
}
