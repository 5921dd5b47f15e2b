//! Linux's 64-bit boot protocol for a bzImage (Documentation/arch/x86/boot.rst).
//!
//! The protected-mode part of the file is loaded at the address it prefers and entered 0x200 bytes in, with paging on, four GiB
//! mapped one to one, and `rsi` pointing to a `boot_params` with the file's own setup header completed by ours.

use std::io::{Read, Seek};

use linux_loader::loader::bootparam::{self, boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::{BzImage, KernelLoader};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryBackend, ReadVolatile};

use super::{Entry, Error, Guest, Payload, Placed, Protocol, read_at};
use crate::x86_64::layout::{CMDLINE_START, RAM_64BIT_START, ZERO_PAGE, memory_map};
use crate::x86_64::regs::{CpuRegs, write_identity_map};

/// Where the setup header lies in the file and in `boot_params`.
const HEADER_OFFSET: u64 = 0x1f1;
/// The first protocol version that tells whether there is a 64-bit entry (Linux 3.8).
const VERSION_XLOADFLAGS: u16 = 0x020c;
/// Offset of the 64-bit entry point from the load address.
const ENTRY_64_OFFSET: u64 = 0x200;
/// `type_of_loader` for a boot loader without a number of its own.
const LOADER_UNDEFINED: u8 = 0xff;
const SECTOR: u64 = 512;

pub(super) fn load<M, K, I>(guest: &Guest<'_, M>, payload: Payload<'_, K, I>, length: u64) -> Result<Entry, Error>
where
    M: GuestMemoryBackend,
    K: Read + ReadVolatile + Seek,
    I: ReadVolatile + Seek,
{
    let header = read_header(payload.kernel, length)?;
    let payload_size = check_header(&header, length)?;
    let start = header.pref_address;
    // The kernel decompresses itself in place and needs `init_size` bytes for that.
    let kernel_end = guest.kernel_range(start, payload_size.max(u64::from(header.init_size)))?;
    guest.write_cmdline(payload.cmdline, usize::try_from(header.cmdline_size).unwrap_or(usize::MAX))?;

    BzImage::load(guest.memory, Some(GuestAddress(start)), payload.kernel, None)
        .map_err(|error| Error::Read("kernel", std::io::Error::other(error)))?;
    let initramfs = match payload.initramfs {
        Some(file) => {
            let top = u64::from(header.initrd_addr_max).saturating_add(1).min(RAM_64BIT_START);
            Some(guest.place_initramfs(file, kernel_end, top)?)
        }
        None => None,
    };

    guest.memory.write_obj(zero_page(guest, header, initramfs)?, GuestAddress(ZERO_PAGE))?;
    write_identity_map(guest.memory)?;
    let regs = CpuRegs::long_mode(start + ENTRY_64_OFFSET, ZERO_PAGE);
    regs.write_descriptor_tables(guest.memory)?;
    Ok(Entry { protocol: Protocol::Linux64, regs })
}

fn read_header<K: Read + Seek>(kernel: &mut K, length: u64) -> Result<setup_header, Error> {
    let mut header = setup_header::default();
    let expected = HEADER_OFFSET + header.as_slice().len() as u64;
    if length < expected {
        return Err(Error::Truncated { expected, actual: length });
    }
    read_at(kernel, HEADER_OFFSET, header.as_mut_slice())?;
    Ok(header)
}

/// Checks what the file says about itself, and returns the size of its protected-mode part.
fn check_header(header: &setup_header, length: u64) -> Result<u64, Error> {
    if header.version < VERSION_XLOADFLAGS || header.xloadflags & bootparam::XLF_KERNEL_64 == 0 {
        return Err(Error::Unsupported("it has no 64-bit entry point; use an x86_64 kernel of Linux 3.8 or newer"));
    }
    if header.loadflags & bootparam::LOADED_HIGH == 0 {
        return Err(Error::Unsupported("it is a zImage, which loads into the first MiB; use its bzImage"));
    }
    // 0 stands for 4, for very old kernels.
    let setup_sectors = if header.setup_sects == 0 { 4 } else { u64::from(header.setup_sects) };
    let setup_size = (setup_sectors + 1) * SECTOR;
    let announced = u64::from(header.syssize) * 16;
    if announced <= ENTRY_64_OFFSET {
        return Err(Error::Damaged("it announces no code"));
    }
    let expected = setup_size + announced;
    if length < expected {
        return Err(Error::Truncated { expected, actual: length });
    }
    Ok(length - setup_size)
}

fn zero_page<M: GuestMemoryBackend>(
    guest: &Guest<'_, M>,
    header: setup_header,
    initramfs: Option<Placed>,
) -> Result<boot_params, Error> {
    let below_4_gib = |value: u64| u32::try_from(value).map_err(|_| Error::Damaged("its data lie above 4 GiB"));
    let mut params = boot_params { hdr: header, acpi_rsdp_addr: guest.rsdp_address(), ..boot_params::default() };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.code32_start = below_4_gib(header.pref_address)?;
    params.hdr.cmd_line_ptr = below_4_gib(CMDLINE_START)?;
    params.hdr.setup_data = 0;
    params.hdr.ramdisk_image = below_4_gib(initramfs.map_or(0, |placed| placed.start))?;
    params.hdr.ramdisk_size = below_4_gib(initramfs.map_or(0, |placed| placed.size))?;
    for (slot, entry) in params.e820_table.iter_mut().zip(memory_map(guest.ram)) {
        *slot = boot_e820_entry { addr: entry.start, size: entry.size, r#type: entry.kind as u32 };
        params.e820_entries += 1;
    }
    Ok(params)
}
