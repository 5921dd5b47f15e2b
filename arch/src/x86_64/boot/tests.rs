//! Kernels made byte by byte: good ones, damaged ones, and random ones.

use std::io::{Cursor, Write};

use linux_loader::loader::bootparam::boot_params;
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use proptest::prelude::*;
use vm_memory::{ByteValued, GuestMemoryMmap};

use super::*;
use crate::x86_64::layout::{self, PVH_MEMMAP, PVH_MODLIST, PVH_START_INFO, ZERO_PAGE, ram_ranges};

const MIB: u64 = 1 << 20;
const RAM: u64 = 64 * MIB;
const LOAD: u64 = 16 * MIB;
const RSDP: GuestAddress = GuestAddress(layout::ACPI_START);

fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), usize::try_from(RAM).unwrap())]).unwrap()
}

fn load_with(memory: &GuestMemoryMmap, kernel: &[u8], initramfs: Option<&[u8]>, cmdline: &str) -> Result<Entry, Error> {
    let mut initramfs = initramfs.map(Cursor::new);
    let payload = Payload { kernel: &mut Cursor::new(kernel), initramfs: initramfs.as_mut(), cmdline };
    load(memory, payload, &ram_ranges(RAM), Some(RSDP))
}

fn load_plain(kernel: &[u8]) -> Result<Entry, Error> {
    load_with(&memory(), kernel, None, "console=ttyS0")
}

#[track_caller]
fn assert_error(kernel: &[u8], expected: &str) {
    let error = load_plain(kernel).unwrap_err().to_string();
    assert!(error.contains(expected), "{error:?} does not contain {expected:?}");
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

/// Two setup sectors, then 4 KiB of code whose bytes count up.
fn bzimage() -> Vec<u8> {
    let mut setup = vec![0; 3 * 512];
    put(&mut setup, 0, b"MZ");
    setup[0x1f1] = 2;
    put(&mut setup, 0x1f4, &(4096u32 / 16).to_le_bytes()); // syssize
    put(&mut setup, 0x202, b"HdrS");
    put(&mut setup, 0x206, &0x020fu16.to_le_bytes());
    setup[0x211] = 1; // LOADED_HIGH
    put(&mut setup, 0x214, &0x10_0000u32.to_le_bytes()); // code32_start
    put(&mut setup, 0x22c, &0x7fff_ffffu32.to_le_bytes()); // initrd_addr_max
    put(&mut setup, 0x236, &1u16.to_le_bytes()); // XLF_KERNEL_64
    put(&mut setup, 0x238, &2047u32.to_le_bytes()); // cmdline_size
    put(&mut setup, 0x258, &LOAD.to_le_bytes()); // pref_address
    put(&mut setup, 0x260, &(8u32 << 20).to_le_bytes()); // init_size
    setup.extend((0..4096u32).map(|i| i.to_le_bytes()[0]));
    setup
}

const NOTE_AT: usize = 64 + 2 * 56;
const CODE_AT: usize = 0x200;

/// One loadable segment of 4 KiB in the file and 8 KiB in memory, and one PVH note.
fn elf() -> Vec<u8> {
    let mut file = vec![0; CODE_AT];
    put(&mut file, 0, b"\x7fELF\x02\x01\x01");
    put(&mut file, 16, &2u16.to_le_bytes());
    put(&mut file, 18, &62u16.to_le_bytes());
    put(&mut file, 20, &1u32.to_le_bytes());
    put(&mut file, 24, &LOAD.to_le_bytes()); // e_entry
    put(&mut file, 32, &64u64.to_le_bytes()); // e_phoff
    put(&mut file, 54, &56u16.to_le_bytes());
    put(&mut file, 56, &2u16.to_le_bytes()); // e_phnum
    let mut program_header = |at: usize, kind: u32, offset: usize, address: u64, sizes: [u64; 2]| {
        put(&mut file, at, &kind.to_le_bytes());
        put(&mut file, at + 8, &(offset as u64).to_le_bytes());
        put(&mut file, at + 24, &address.to_le_bytes());
        put(&mut file, at + 32, &sizes[0].to_le_bytes());
        put(&mut file, at + 40, &sizes[1].to_le_bytes());
    };
    program_header(64, 1, CODE_AT, LOAD, [4096, 8192]);
    program_header(120, 4, NOTE_AT, 0, [40, 40]);
    // A note of another kind first: 12 bytes of header, 4 of name, 4 of contents.
    for (i, word) in [4u32, 4, 1, u32::from_le_bytes(*b"Xen\0"), 7].into_iter().enumerate() {
        put(&mut file, NOTE_AT + i * 4, &word.to_le_bytes());
    }
    let entry = u32::try_from(LOAD).unwrap() + 0x40;
    for (i, word) in [4u32, 4, 18, u32::from_le_bytes(*b"Xen\0"), entry].into_iter().enumerate() {
        put(&mut file, NOTE_AT + 20 + i * 4, &word.to_le_bytes());
    }
    file.extend((0..4096u32).map(|i| i.to_le_bytes()[0] ^ 0x55));
    file
}

fn read_vec(memory: &GuestMemoryMmap, at: u64, size: usize) -> Vec<u8> {
    let mut bytes = vec![0; size];
    memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
    bytes
}

#[test]
fn bzimage_is_entered_in_64_bit_mode() {
    let memory = memory();
    let initramfs = vec![0xa5; 10_000];
    let entry = load_with(&memory, &bzimage(), Some(&initramfs), "quiet").unwrap();
    assert_eq!(entry.protocol, Protocol::Linux64);
    assert_eq!(entry.regs.general.rip, LOAD + 0x200);
    assert_eq!(entry.regs.general.rsi, ZERO_PAGE);
    assert_eq!(entry.regs.general.rflags, 2);
    let special = entry.regs.special;
    assert_eq!((special.cr0, special.cr3, special.cr4, special.efer), (0x8000_0011, layout::PML4_START, 0x20, 0x500));
    assert_eq!(read_vec(&memory, layout::PML4_START, 8), (layout::PDPT_START | 3).to_le_bytes());
    assert_ne!(read_vec(&memory, special.gdt.base + 16, 8), [0; 8]);
    assert_eq!(entry.regs.special.cs.l, 1);
    assert_eq!(read_vec(&memory, LOAD, 4096), bzimage()[3 * 512..]);
    assert_eq!(read_vec(&memory, layout::CMDLINE_START, 6), b"quiet\0");

    let params: boot_params = memory.read_obj(GuestAddress(ZERO_PAGE)).unwrap();
    let header = params.hdr;
    assert_eq!({ params.acpi_rsdp_addr }, RSDP.0);
    assert_eq!({ header.cmd_line_ptr }, 0x2_0000);
    assert_eq!(header.type_of_loader, 0xff);
    assert_eq!({ header.header }, 0x5372_6448);
    let start = u64::from(header.ramdisk_image);
    assert_eq!((start, header.ramdisk_size), ((RAM - 10_000) / 4096 * 4096, 10_000));
    assert_eq!(read_vec(&memory, start, 10_000), initramfs);

    let e820: Vec<_> =
        params.e820_table[..params.e820_entries.into()].iter().map(|e| (e.addr, e.addr + e.size, e.r#type)).collect();
    assert_eq!(
        e820,
        [
            (0, 0x9_fc00, 1),
            (0x9_fc00, 0xa_0000, 2),
            (0xe_0000, 0xf_f000, 3),
            (0xf_f000, 0x10_0000, 2),
            (0x10_0000, RAM, 1),
            (0xe800_0000, 0xe810_0000, 2)
        ]
    );
}

#[test]
fn initramfs_stays_below_what_the_kernel_can_reach() {
    let memory = memory();
    let mut kernel = bzimage();
    put(&mut kernel, 0x22c, &0x01ff_ffffu32.to_le_bytes());
    load_with(&memory, &kernel, Some(&[1; 4097]), "").unwrap();
    let params: boot_params = memory.read_obj(GuestAddress(ZERO_PAGE)).unwrap();
    assert_eq!({ params.hdr.ramdisk_image }, 0x0200_0000 - 0x2000);
}

#[test]
fn elf_is_entered_by_its_pvh_note() {
    let memory = memory();
    let entry = load_with(&memory, &elf(), Some(b"cpio"), "panic=-1").unwrap();
    assert_eq!(entry.protocol, Protocol::Pvh);
    assert_eq!(entry.regs.general.rip, LOAD + 0x40);
    assert_eq!(entry.regs.general.rbx, PVH_START_INFO);
    assert_eq!((entry.regs.special.cr0, entry.regs.special.cr4, entry.regs.special.efer), (0x11, 0, 0));
    assert_eq!((entry.regs.special.cs.l, entry.regs.special.cs.db), (0, 1));
    assert_ne!(read_vec(&memory, entry.regs.special.gdt.base + 16, 8), [0; 8]);
    assert_eq!(read_vec(&memory, LOAD, 4096), elf()[CODE_AT..]);
    assert_eq!(read_vec(&memory, layout::CMDLINE_START, 9), b"panic=-1\0");

    let info: hvm_start_info = memory.read_obj(GuestAddress(PVH_START_INFO)).unwrap();
    assert_eq!((info.magic, info.version, info.nr_modules), (0x336e_c578, 1, 1));
    assert_eq!((info.rsdp_paddr, info.cmdline_paddr, info.modlist_paddr), (RSDP.0, 0x2_0000, PVH_MODLIST));
    let module: hvm_modlist_entry = memory.read_obj(GuestAddress(PVH_MODLIST)).unwrap();
    assert_eq!((module.paddr, module.size), (RAM - 4096, 4));
    assert_eq!(read_vec(&memory, module.paddr, 4), b"cpio");
    assert_eq!((info.memmap_paddr, info.memmap_entries), (PVH_MEMMAP, 6));
    let entry: hvm_memmap_table_entry = memory.read_obj(GuestAddress(PVH_MEMMAP + 4 * 24)).unwrap();
    assert_eq!((entry.addr, entry.size, entry.type_), (MIB, RAM - MIB, 1));
}

#[test]
fn files_are_taken_as_they_come() {
    let mut kernel = tempfile::tempfile().unwrap();
    kernel.write_all(&elf()).unwrap();
    let mut initramfs = tempfile::tempfile().unwrap();
    initramfs.write_all(b"cpio").unwrap();
    let payload = Payload { kernel: &mut kernel, initramfs: Some(&mut initramfs), cmdline: "" };
    load(&memory(), payload, &ram_ranges(RAM), None).unwrap();
}

#[test]
fn what_is_no_kernel_is_named() {
    assert_error(b"", "the kernel is empty");
    assert_error(b"x", "neither a bzImage nor an ELF file");
    assert_error(&[0; 8192], "neither a bzImage nor an ELF file");
    assert_error(b"\x1f\x8b\x08\x00", "gzip");
    assert_error(b"\x28\xb5\x2f\xfd\x00", "zstd");
    assert_error(b"\xfd7zXZ\x00", "xz");
    assert_error(b"\x7fELF", "truncated: it has 4 bytes, its header announces 64");
    assert_error(b"MZ\0\0", "truncated");
    // An ordinary program is an ELF file too.
    let program = std::fs::read(std::env::current_exe().unwrap()).unwrap();
    assert_error(&program, "an ELF file without a PVH note");
}

#[test]
fn every_truncation_is_an_error() {
    for kernel in [bzimage(), elf()] {
        for length in (0..600).chain((600..kernel.len()).step_by(97)) {
            let error = load_plain(&kernel[..length]).unwrap_err();
            let expected = matches!(error, Error::Truncated { .. } | Error::Empty(_) | Error::NotAKernel(_));
            assert!(expected, "{length} bytes: {error}");
        }
    }
}

#[test]
fn damaged_bzimage_headers_are_refused() {
    let patched = |at: usize, value: &[u8]| {
        let mut kernel = bzimage();
        put(&mut kernel, at, value);
        kernel
    };
    assert_error(&patched(0x206, &0x0206u16.to_le_bytes()), "64-bit entry point");
    assert_error(&patched(0x236, &0u16.to_le_bytes()), "64-bit entry point");
    assert_error(&patched(0x211, &[0]), "zImage");
    assert_error(&patched(0x1f1, &[0xff]), "truncated");
    assert_error(&patched(0x1f4, &u32::MAX.to_le_bytes()), "truncated");
    assert_error(&patched(0x1f4, &0u32.to_le_bytes()), "no code");
    assert_error(&patched(0x258, &0x7000u64.to_le_bytes()), "first MiB");
    assert_error(&patched(0x258, &u64::MAX.to_le_bytes()), "wraps around");
    assert_error(
        &patched(0x258, &(RAM - 4096).to_le_bytes()),
        "needs RAM up to address 0x47ff000, the guest's ends at 0x4000000",
    );
    assert_error(&patched(0x260, &u32::MAX.to_le_bytes()), "needs RAM");
    // Kernels before 2.00 had "4" written as 0.
    load_plain(&patched(0x260, &0u32.to_le_bytes())).unwrap();
}

#[test]
fn damaged_elf_headers_are_refused() {
    let patched = |at: usize, value: &[u8]| {
        let mut kernel = elf();
        put(&mut kernel, at, value);
        kernel
    };
    assert_error(&patched(4, &[1]), "32-bit");
    assert_error(&patched(5, &[2]), "another processor");
    assert_error(&patched(18, &183u16.to_le_bytes()), "another processor");
    assert_error(&patched(32, &u64::MAX.to_le_bytes()), "wraps around");
    assert_error(&patched(32, &(1u64 << 40).to_le_bytes()), "truncated");
    assert_error(&patched(32, &0u64.to_le_bytes()), "program header table");
    assert_error(&patched(54, &1u16.to_le_bytes()), "program header table");
    assert_error(&patched(56, &u16::MAX.to_le_bytes()), "128 program headers");
    assert_error(&patched(56, &0u16.to_le_bytes()), "without a PVH note");
    assert_error(&patched(56, &1u16.to_le_bytes()), "without a PVH note");
    assert_error(&patched(NOTE_AT + 28, &17u32.to_le_bytes()), "without a PVH note");
    assert_error(&patched(NOTE_AT + 32, b"Zen\0"), "without a PVH note");
    assert_error(&patched(NOTE_AT + 24, &2u32.to_le_bytes()), "PVH note is too short");
    assert_error(&patched(NOTE_AT + 36, &0x7c00u32.to_le_bytes()), "entry point lies outside");
    assert_error(&patched(64 + 8, &u64::MAX.to_le_bytes()), "wraps around");
    assert_error(&patched(64 + 24, &0u64.to_le_bytes()), "first MiB");
    assert_error(&patched(64 + 24, &(u64::MAX - 7).to_le_bytes()), "wraps around");
    assert_error(&patched(64 + 32, &(1u64 << 40).to_le_bytes()), "truncated");
    assert_error(&patched(64 + 40, &1u64.to_le_bytes()), "larger in the file");
    assert_error(&patched(64 + 40, &(1u64 << 40).to_le_bytes()), "needs RAM");
    assert_error(&patched(64, &7u32.to_le_bytes()), "entry point lies outside");
    let mut long_notes = patched(120 + 32, &(2u64 << 20).to_le_bytes());
    long_notes.resize(4 << 20, 0);
    assert_error(&long_notes, "more than a MiB of notes");
    assert_error(&patched(120 + 32, &u64::MAX.to_le_bytes()), "wraps around");
}

#[test]
fn what_does_not_fit_is_refused() {
    let too_long = "x".repeat(2048);
    let error = load_with(&memory(), &bzimage(), None, &too_long).unwrap_err().to_string();
    assert_eq!(error, "the kernel command line has 2048 bytes, this kernel takes at most 2047");
    load_with(&memory(), &bzimage(), None, &too_long[1..]).unwrap();
    load_with(&memory(), &elf(), None, &too_long[1..]).unwrap();
    assert!(matches!(load_with(&memory(), &elf(), None, &too_long), Err(Error::CmdlineTooLong { .. })));
    let mut short = bzimage();
    put(&mut short, 0x238, &255u32.to_le_bytes());
    assert!(matches!(
        load_with(&memory(), &short, None, &too_long[..256]),
        Err(Error::CmdlineTooLong { max: 255, .. })
    ));
    assert!(matches!(load_with(&memory(), &elf(), None, "a\0b"), Err(Error::CmdlineNul)));

    let big = vec![0; usize::try_from(RAM - LOAD).unwrap()];
    for kernel in [bzimage(), elf()] {
        let error = load_with(&memory(), &kernel, Some(&big), "").unwrap_err();
        assert!(matches!(error, Error::InitramfsTooBig { .. }), "{error}");
        let error = load_with(&memory(), &kernel, Some(b""), "").unwrap_err();
        assert_eq!(error.to_string(), "the initramfs is empty");
    }
    let mut kernel = Cursor::new(elf());
    for ram in [ram_ranges(0), ram_ranges(MIB), vec![(GuestAddress(4096), RAM)]] {
        let payload = Payload { kernel: &mut kernel, initramfs: None::<&mut Cursor<Vec<u8>>>, cmdline: "" };
        assert!(matches!(load(&memory(), payload, &ram, None), Err(Error::NoLowRam)));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    /// Any few bytes of a good kernel replaced by any others: an answer, never a panic, and no kernel outside of RAM.
    #[test]
    fn random_damage_never_panics(
        use_elf in any::<bool>(),
        patches in prop::collection::vec((0..0x300usize, prop_oneof![any::<u64>(), 0..64u64, Just(u64::MAX)], 1..9usize), 1..6),
        length in prop_oneof![Just(usize::MAX), 0..6000usize],
    ) {
        let mut kernel = if use_elf { elf() } else { bzimage() };
        for (at, value, size) in patches {
            put(&mut kernel, at, &value.to_le_bytes()[..size]);
        }
        kernel.truncate(length);
        if let Ok(entry) = load_with(&memory(), &kernel, Some(b"cpio"), "") {
            prop_assert!((MIB..RAM).contains(&(entry.regs.general.rip - 0x200 * u64::from(entry.protocol == Protocol::Linux64))));
        }
    }

    #[test]
    fn random_bytes_never_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..2048), magic in 0..3u8) {
        match magic {
            1 if bytes.len() >= 4 => put(&mut bytes, 0, b"\x7fELF"),
            2 if bytes.len() >= 0x206 => put(&mut bytes, 0x202, b"HdrS"),
            _ => {}
        }
        let _ = load_plain(&bytes);
    }
}

/// The header's size is the file format's, not the compiler's.
#[test]
fn setup_header_has_no_padding() {
    assert_eq!(linux_loader::loader::bootparam::setup_header::default().as_slice().len(), 123);
}
