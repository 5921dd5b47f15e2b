//! The PVH boot protocol for ELF kernels (Xen's docs/misc/pvh.pandoc and public/arch-x86/hvm/start_info.h).
//!
//! The file's segments are loaded at their physical addresses, and the 32-bit entry point named by its `XEN_ELFNOTE_PHYS32_ENTRY`
//! note is entered without paging, with `ebx` pointing to an `hvm_start_info`.

use std::io::{Read, Seek};

use linux_loader::loader::elf::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use linux_loader::loader::{Elf, KernelLoader};
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
const MAX_NOTES_SIZE: usize = 1 << 20;
/// Memory map entries for which there is room before the zero page.
const MAX_MEMMAP_ENTRIES: usize = ((ZERO_PAGE - PVH_MEMMAP) / 24) as usize;

pub(super) fn load<M, K, I>(guest: &Guest<'_, M>, payload: Payload<'_, K, I>, length: u64) -> Result<Entry, Error>
where
    M: GuestMemoryBackend,
    K: Read + ReadVolatile + Seek,
    I: ReadVolatile + Seek,
{
    let headers = program_headers(payload.kernel, length)?;
    // First of all, so that an ordinary program is not called a damaged kernel.
    let entry = pvh_entry(payload.kernel, &headers)?;
    let segments = load_ranges(guest, &headers)?;
    if !segments.iter().any(|&(start, end)| (start..end).contains(&entry)) {
        return Err(Error::Damaged("its PVH entry point lies outside of what it loads"));
    }
    guest.write_cmdline(payload.cmdline, CMDLINE_MAX_LEN)?;
    Elf::load(guest.memory, None, payload.kernel, None)
        .map_err(|error| Error::Read("kernel", std::io::Error::other(error)))?;

    let kernel_end = segments.iter().map(|segment| segment.1).max().unwrap_or_default();
    let initramfs = match payload.initramfs {
        Some(file) => Some(guest.place_initramfs(file, kernel_end, RAM_64BIT_START)?),
        None => None,
    };
    write_start_info(guest, initramfs)?;
    let regs = CpuRegs::pvh(entry, PVH_START_INFO);
    regs.write_descriptor_tables(guest.memory)?;
    Ok(Entry { protocol: Protocol::Pvh, regs })
}

/// A little-endian field of a header, whose buffer is larger than any field's offset.
fn field<const N: usize>(header: &[u8], offset: usize) -> [u8; N] {
    header.get(offset..).and_then(<[u8]>::first_chunk).copied().unwrap_or([0; N])
}

/// A program header of a kind that matters here.
struct ProgramHeader {
    kind: u32,
    offset: u64,
    address: u64,
    file_size: u64,
    memory_size: u64,
}

/// The segments and notes of a file (ELF-64 object file format, version 1.5), all of which lie inside of it.
fn program_headers<K: Read + Seek>(kernel: &mut K, length: u64) -> Result<Vec<ProgramHeader>, Error> {
    let inside = |offset: u64, size: u64| {
        let end = offset.checked_add(size).ok_or(Error::Damaged("a part of it wraps around"))?;
        if end > length { Err(Error::Truncated { expected: end, actual: length }) } else { Ok(()) }
    };
    inside(0, EHDR_SIZE as u64)?;
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
    let mut headers = vec![0; usize::from(count) * PHDR_SIZE];
    inside(table, headers.len() as u64)?;
    read_at(kernel, table, &mut headers)?;

    let parse = |header: &[u8]| ProgramHeader {
        kind: u32::from_le_bytes(field(header, 0)),
        offset: u64::from_le_bytes(field(header, 8)),
        address: u64::from_le_bytes(field(header, 24)),
        file_size: u64::from_le_bytes(field(header, 32)),
        memory_size: u64::from_le_bytes(field(header, 40)),
    };
    let mut headers: Vec<_> = headers.chunks_exact(PHDR_SIZE).map(parse).collect();
    headers.retain(|header| header.kind == PT_LOAD || header.kind == PT_NOTE);
    for header in &headers {
        inside(header.offset, header.file_size)?;
    }
    Ok(headers)
}

/// The ranges of guest memory that the segments will take.
fn load_ranges<M: GuestMemoryBackend>(
    guest: &Guest<'_, M>,
    headers: &[ProgramHeader],
) -> Result<Vec<(u64, u64)>, Error> {
    let mut ranges = Vec::new();
    for header in headers.iter().filter(|header| header.kind == PT_LOAD) {
        if header.memory_size < header.file_size {
            return Err(Error::Damaged("a segment is larger in the file than in memory"));
        }
        if header.memory_size > 0 {
            ranges.push((header.address, guest.kernel_range(header.address, header.memory_size)?));
        }
    }
    Ok(ranges)
}

/// The entry point that the PVH note names.
fn pvh_entry<K: Read + Seek>(kernel: &mut K, headers: &[ProgramHeader]) -> Result<u64, Error> {
    for header in headers.iter().filter(|header| header.kind == PT_NOTE) {
        let size = usize::try_from(header.file_size).ok().filter(|&size| size <= MAX_NOTES_SIZE);
        let Some(size) = size else { return Err(Error::Damaged("it has more than a MiB of notes")) };
        let mut notes = vec![0; size];
        read_at(kernel, header.offset, &mut notes)?;
        if let Some(contents) = find_note(&notes) {
            let address = contents.first_chunk().ok_or(Error::Damaged("its PVH note is too short"))?;
            return Ok(u32::from_le_bytes(*address).into());
        }
    }
    Err(Error::NoPvhNote)
}

/// The contents of the PVH note in a note segment; name and contents of each note are padded to four bytes.
fn find_note(mut notes: &[u8]) -> Option<&[u8]> {
    const NOTE_HEADER_SIZE: usize = 12;
    const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;
    loop {
        let (header, rest) = notes.split_at_checked(NOTE_HEADER_SIZE)?;
        let size = |offset| usize::try_from(u32::from_le_bytes(field(header, offset))).ok();
        let (name_size, contents_size) = (size(0)?, size(4)?);
        let (name, rest) = rest.split_at_checked(name_size.checked_next_multiple_of(4)?)?;
        let contents = rest.get(..contents_size)?;
        if u32::from_le_bytes(field(header, 8)) == XEN_ELFNOTE_PHYS32_ENTRY && name == b"Xen\0" {
            return Some(contents);
        }
        notes = rest.get(contents_size.checked_next_multiple_of(4)?..)?;
    }
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
