//! Reads the tables as an operating system does, from the RSDP on.

use std::collections::BTreeMap;

use super::*;
use crate::x86_64::layout::{ACPI_START, MemoryKind, PCI_MMIO32, VM_GENERATION_ID, gsi, memory_map, ram_ranges};

const START: GuestAddress = GuestAddress(ACPI_START);

fn input(vcpus: u32) -> AcpiInput {
    let pci_mmio64 = Window { start: 514 << 30, size: 510 << 30 };
    AcpiInput { vcpus, pci_mmio32: PCI_MMIO32, pci_mmio64, serial: true }
}

fn make(vcpus: u32) -> Vec<u8> {
    let tables = tables(&input(vcpus), START).unwrap();
    assert_eq!(tables.rsdp, START);
    tables.bytes
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(*bytes[at..].first_chunk().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(*bytes[at..].first_chunk().unwrap())
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

fn table_at(image: &[u8], address: u64) -> &[u8] {
    assert_eq!(address % 16, 0);
    let at = usize::try_from(address - START.0).unwrap();
    let size = usize::try_from(u32_at(image, at + 4)).unwrap();
    let table = &image[at..at + size];
    assert_eq!(sum(table), 0, "checksum of {:?}", std::str::from_utf8(&table[..4]));
    table
}

/// All tables by signature.
fn walk(image: &[u8]) -> BTreeMap<&str, &[u8]> {
    assert_eq!(image[..8], *b"RSD PTR ");
    assert_eq!((sum(&image[..20]), sum(&image[..36])), (0, 0));
    assert_eq!(image[15], 2);
    let xsdt = table_at(image, u64_at(image, 24));
    let mut tables: Vec<_> = xsdt[36..].chunks(8).map(|entry| table_at(image, u64_at(entry, 0))).collect();
    let fadt = *tables.iter().find(|table| table.starts_with(b"FACP")).unwrap();
    tables.extend([xsdt, table_at(image, u64_at(fadt, 140))]);
    tables.into_iter().map(|table| (std::str::from_utf8(&table[..4]).unwrap(), table)).collect()
}

#[test]
fn every_table_is_reached_from_the_rsdp() {
    let image = make(2);
    let tables = walk(&image);
    assert_eq!(tables.keys().copied().collect::<Vec<_>>(), ["APIC", "DSDT", "FACP", "MCFG", "XSDT"]);
}

#[test]
fn fadt_names_the_power_registers() {
    let image = make(1);
    let fadt = walk(&image)["FACP"];
    assert_eq!(fadt.len(), 276);
    assert_eq!(u32_at(fadt, 112), 1 | 1 << 4 | 1 << 5 | 1 << 10 | 1 << 20);
    let register = |at: usize| (fadt[at..at + 4].to_vec(), u64_at(fadt, at + 4));
    assert_eq!(register(116), (vec![1, 8, 0, 1], port::RESET.into()));
    assert_eq!(fadt[128], port::RESET_VALUE);
    assert_eq!(register(244), (vec![1, 8, 0, 1], port::SLEEP_CONTROL.into()));
    assert_eq!(register(256), (vec![1, 8, 0, 1], port::SLEEP_STATUS.into()));
}

/// Type and contents of each MADT entry.
fn madt_entries(image: &[u8]) -> Vec<(u8, Vec<u8>)> {
    let madt = walk(image)["APIC"];
    assert_eq!((u32_at(madt, 36), u32_at(madt, 40)), (0xfee0_0000, 0));
    let mut rest = &madt[44..];
    let mut entries = Vec::new();
    while let [kind, length, ..] = *rest {
        let (entry, after) = rest.split_at(length.into());
        entries.push((kind, entry[2..].to_vec()));
        rest = after;
    }
    assert!(rest.is_empty());
    entries
}

#[test]
fn madt_has_every_vcpu_once() {
    let entries = madt_entries(&make(3));
    for id in 0..3u8 {
        assert_eq!(entries[usize::from(id)], (0, vec![id, id, 1, 0, 0, 0]));
    }
    assert_eq!(entries[3], (1, vec![0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0]));
    assert_eq!(entries[4], (4, vec![0xff, 0, 0, 1]));
    assert_eq!(entries.len(), 5);
}

#[test]
fn apic_ids_from_255_on_take_the_long_form() {
    let entries = madt_entries(&make(300));
    assert_eq!(entries.iter().filter(|entry| entry.0 == 0).count(), 255);
    let long: Vec<_> = entries.iter().filter(|entry| entry.0 == 9).collect();
    assert_eq!(long.len(), 45);
    assert_eq!(long[0].1, [0, 0, 255, 0, 0, 0, 1, 0, 0, 0, 255, 0, 0, 0]);
    assert_eq!(long[44].1[2..4], [43, 1]);
}

#[test]
fn mcfg_has_the_ecam_window() {
    let image = make(1);
    let mcfg = walk(&image)["MCFG"];
    assert_eq!(mcfg.len(), 60);
    assert_eq!((u64_at(mcfg, 44), u32_at(mcfg, 52), u32_at(mcfg, 56)), (0xe800_0000, 0, 0));
}

fn contains(table: &[u8], part: &[u8]) -> bool {
    table.windows(part.len()).any(|window| window == part)
}

#[test]
fn dsdt_follows_the_input() {
    let image = make(2);
    let dsdt = walk(&image)["DSDT"];
    for name in [b"C000", b"C001", b"PCI0", b"COM1", b"PWRB", b"VGEN", b"GED_", b"_S5_"] {
        assert!(contains(dsdt, name), "{:?}", std::str::from_utf8(name));
    }
    assert!(!contains(dsdt, b"C002"));
    // Extended interrupt descriptor: length 6, consumer and edge, one interrupt.
    assert!(contains(dsdt, &[0x89, 6, 0, 3, 1, u8::try_from(gsi::GED).unwrap(), 0, 0, 0]));
    // 64-bit window: granularity, first, last, translation, length.
    let window: Vec<u8> = [0, 514u64 << 30, (1024 << 30) - 1, 0, 510 << 30].map(u64::to_le_bytes).concat();
    assert!(contains(dsdt, &window));

    let bare = tables(&AcpiInput { serial: false, ..input(1) }, START).unwrap().bytes;
    assert!(!contains(walk(&bare)["DSDT"], b"COM1"));
}

/// "Virtual Machine Generation ID": the names drivers look for, the package ADDR, and where its memory must not be.
#[test]
fn dsdt_says_where_the_generation_id_is() {
    let image = make(1);
    let dsdt = walk(&image)["DSDT"];
    assert!(contains(dsdt, b"_HID\x0dVMGENCTR\0"));
    for name in [b"_CID", b"_DDN"] {
        assert!(contains(dsdt, &[&name[..], b"\x0dVM_Gen_Counter\0"].concat()));
    }
    // Package of 2 elements: a double word and ZeroOp.
    let address = u32::try_from(VM_GENERATION_ID).unwrap().to_le_bytes();
    assert!(contains(dsdt, &[b"ADDR\x12\x08\x02\x0c", &address[..], b"\0"].concat()));
    assert_eq!(VM_GENERATION_ID % 8, 0);
    let map = memory_map(&ram_ranges(1 << 30));
    let entry = map.iter().find(|entry| (entry.start..entry.start + entry.size).contains(&VM_GENERATION_ID)).unwrap();
    assert_eq!(entry.kind, MemoryKind::Reserved);
    // Notify(\_SB.VGEN, 0x80) when the event register has its bit.
    assert!(contains(dsdt, b"\x86\\\x2e_SB_VGEN\x0a\x80"));
    assert!(contains(dsdt, &[b"\x7b\x60\x0a", &[port::GED_EVENT_VM_GENERATION][..], b"\x61"].concat()));
}

#[test]
fn impossible_machines_are_refused() {
    let refused = |input: AcpiInput| tables(&input, START).unwrap_err();
    assert_eq!(refused(input(0)), Error::Vcpus(0));
    assert_eq!(refused(input(0x1001)).to_string(), "a machine has 1 to 4096 vCPUs, not 4097");
    // Enough names, but not enough room.
    assert!(matches!(refused(input(0x1000)), Error::TooBig(_)));
    make(1024);
    for window in [Window { start: 4 << 30, size: 0 }, Window { start: u64::MAX, size: 2 }, PCI_MMIO32] {
        assert_eq!(refused(AcpiInput { pci_mmio64: window, ..input(1) }), Error::Window(window));
    }
    let wide = Window { start: 0xc000_0000, size: 1 << 32 };
    assert_eq!(refused(AcpiInput { pci_mmio32: wide, ..input(1) }), Error::Window(wide));
}

/// The exact bytes, as disassembled and read with `iasl -d` when they were last changed.
#[test]
fn golden_image() {
    let dump: Vec<String> = make(2)
        .chunks(16)
        .map(|line| {
            let hex: String = line.iter().map(|byte| format!("{byte:02x} ")).collect();
            let text: String = line.iter().map(|b| if b.is_ascii_graphic() { char::from(*b) } else { '.' }).collect();
            format!("{hex:48} {text}")
        })
        .collect();
    insta::assert_snapshot!(dump.join("\n"));
}
