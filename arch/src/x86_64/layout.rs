//! The guest physical address map, the I/O ports and the interrupt lines of an x86_64 guest.
//!
//! ```text
//! 0x0000_0000_0000 +--------------------------------+
//!           0x0500 | GDT, then an empty IDT         |
//!           0x6000 | PVH start info, module list    |  only for ELF kernels
//!           0x6400 | PVH memory map                 |
//!           0x7000 | Linux zero page (boot_params)  |  only for bzImage kernels
//!           0x8ff0 | top of the boot stack          |
//!           0x9000 | page tables: PML4, PDPT, 4 PDs |  only for bzImage kernels
//!         0x2_0000 | kernel command line            |
//!         0x9_fc00 | reserved (extended BIOS area)  |
//!         0xa_0000 | not in the guest's memory map  |
//!         0xe_0000 | ACPI: RSDP first, then tables  |
//!         0xf_f000 | reserved: VM generation ID     |
//!         0xf_fff0 | code that resets the machine  |
//!        0x10_0000 | RAM: kernel ... initramfs      |
//!                  | end of RAM, at most 3 GiB      |
//!      0xc000_0000 | PCI memory, 32-bit window      |
//!      0xe800_0000 | PCI ECAM (one bus)             |
//!      0xfec0_0000 | IOAPIC                         |
//!      0xfee0_0000 | local APICs                    |
//!      0xfffb_c000 | KVM: identity map page, TSS    |
//!    0x1_0000_0000 | rest of the RAM                |
//!   next 1 GiB mark| device memory: pmem images     |  at most 1 TiB
//!                  | PCI memory, 64-bit window      |  at most 1 TiB
//!                  +--------------------------------+
//! ```
//!
//! All of the first MiB is backed by RAM; the memory map given to the kernel ([`memory_map`]) says which parts it may use.

use serde::{Deserialize, Serialize};
use vm_memory::GuestAddress;

/// Where the boot code's global descriptor table lies.
pub const GDT_START: u64 = 0x500;
/// Where the (empty) interrupt descriptor table lies.
pub const IDT_START: u64 = 0x540;
/// Where `hvm_start_info` lies for a PVH boot.
pub const PVH_START_INFO: u64 = 0x6000;
/// Where the PVH module list (the initramfs) lies.
pub const PVH_MODLIST: u64 = 0x6100;
/// Where the PVH memory map lies; it may grow to the zero page's address.
pub const PVH_MEMMAP: u64 = 0x6400;
/// Where `boot_params`, the Linux "zero page", lies.
pub const ZERO_PAGE: u64 = 0x7000;
/// What the stack pointer is at entry.
pub const BOOT_STACK_TOP: u64 = 0x8ff0;
/// Level 4 page table of the identity map for the 64-bit entry.
pub const PML4_START: u64 = 0x9000;
/// Level 3 page table.
pub const PDPT_START: u64 = 0xa000;
/// First of the four level 2 page tables, each mapping 1 GiB with 2 MiB pages.
pub const PD_START: u64 = 0xb000;
/// Where the kernel's command line lies.
pub const CMDLINE_START: u64 = 0x2_0000;
/// Bytes of the longest command line, its terminating NUL included (x86's `COMMAND_LINE_SIZE`).
pub const CMDLINE_MAX_SIZE: usize = 2048;
/// The reserved tail of conventional memory, where a BIOS keeps its data.
pub const EBDA_START: u64 = 0x9_fc00;
/// End of conventional memory.
pub const LOW_RAM_END: u64 = 0xa_0000;
/// Where the RSDP and after it the other ACPI tables lie; kernels without a boot protocol find it here by searching.
pub const ACPI_START: u64 = 0xe_0000;
/// Room for all ACPI tables together.
pub const ACPI_MAX_SIZE: u64 = FIRMWARE_START - ACPI_START;
/// The page that is the VMM's alone: no kernel may use it for anything else, also after it has read the ACPI tables.
pub const FIRMWARE_START: u64 = 0xf_f000;
/// The VM generation ID, 16 bytes. The specification wants them aligned to 8 and outside of what the memory map calls RAM or
/// ACPI tables; see [`super::acpi`].
pub const VM_GENERATION_ID: u64 = FIRMWARE_START;
/// Where real-mode code jumps to restart a PC, `f000:fff0`; see [`super::reset`].
pub const RESET_VECTOR: u64 = 0xf_fff0;
/// Where RAM free for the kernel begins.
pub const HIGH_RAM_START: u64 = 0x10_0000;

/// Start of the hole below 4 GiB that holds memory-mapped devices.
pub const MMIO32_START: u64 = 0xc000_0000;
/// End of that hole, and start of the RAM above it.
pub const RAM_64BIT_START: u64 = 0x1_0000_0000;
/// Where PCI devices' 32-bit BARs lie.
pub const PCI_MMIO32: Window = Window { start: MMIO32_START, size: PCI_ECAM.start - MMIO32_START };
/// PCI configuration space, memory mapped: segment 0, bus 0.
pub const PCI_ECAM: Window = Window { start: 0xe800_0000, size: 1 << 20 };
/// The last PCI bus that the ECAM window covers.
pub const PCI_LAST_BUS: u8 = 0;
/// The IOAPIC's registers.
pub const IOAPIC: Window = Window { start: 0xfec0_0000, size: 0x1000 };
/// The local APICs' registers, which each vCPU sees for itself.
pub const LAPIC: Window = Window { start: 0xfee0_0000, size: 0x1000 };
/// The page KVM uses for its identity map (`KVM_SET_IDENTITY_MAP_ADDR`).
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// The three pages KVM uses for a TSS (`KVM_SET_TSS_ADDR`).
pub const KVM_TSS: u64 = 0xfffb_d000;

/// Alignment of everything mapped into the guest as one piece of memory, so that 2 MiB pages can back it.
pub const MEMORY_ALIGNMENT: u64 = 2 << 20;
/// Device memory and the 64-bit PCI window start on multiples of this.
const HIGH_ALIGNMENT: u64 = 1 << 30;
/// The most that either high window gets. A Linux guest can only describe memory (struct pages for DAX) a few TiB above its own
/// RAM, so the windows stay near it however many address bits there are.
const HIGH_WINDOW_MAX: u64 = 1 << 40;

/// I/O port numbers.
pub mod port {
    /// Writes are time stamps for measuring a boot (Linux also writes here to pass a microsecond).
    pub const DEBUG: u16 = 0x80;
    /// The first serial port, a 16550.
    pub const COM1: u16 = 0x3f8;
    /// Registers of the serial port.
    pub const COM1_SIZE: u16 = 8;
    /// ACPI 6.5 section 4.8.3.7: sleep control register, one byte; see [`SLEEP_ENABLE`] and [`SLEEP_TYPE_S5`].
    pub const SLEEP_CONTROL: u16 = 0x600;
    /// ACPI 6.5 section 4.8.3.7: sleep status register, one byte; it reads 0 and ignores writes.
    pub const SLEEP_STATUS: u16 = 0x601;
    /// ACPI 6.5 section 4.8.3.6: reset register, one byte; writing [`RESET_VALUE`] resets the machine.
    pub const RESET: u16 = 0x602;
    /// The event device's pending events, one byte of `GED_EVENT_*` bits; reading it clears them.
    pub const GED_EVENTS: u16 = 0x603;
    /// PCI configuration address.
    pub const PCI_CONFIG_ADDRESS: u16 = 0xcf8;
    /// PCI configuration data, four bytes.
    pub const PCI_CONFIG_DATA: u16 = 0xcfc;
    /// What the guest writes to [`RESET`].
    pub const RESET_VALUE: u8 = 1;
    /// The bit of [`SLEEP_CONTROL`] that makes it act.
    pub const SLEEP_ENABLE: u8 = 1 << 5;
    /// The sleep type that means power off, in bits 2 to 4 of [`SLEEP_CONTROL`].
    pub const SLEEP_TYPE_S5: u8 = 5;
    /// The bit of [`GED_EVENTS`] for a pressed power button.
    pub const GED_EVENT_POWER_BUTTON: u8 = 1 << 0;
    /// The bit of [`GED_EVENTS`] for a new VM generation ID.
    pub const GED_EVENT_VM_GENERATION: u8 = 1 << 1;
}

/// Global system interrupts; GSI n is pin n of the one IOAPIC.
pub mod gsi {
    /// The first serial port.
    pub const COM1: u32 = 4;
    /// The generic event device (power button, VM generation ID), edge triggered, active high.
    pub const GED: u32 = 5;
    /// Pins of the IOAPIC, hence the first number free for MSI routes.
    pub const IOAPIC_PINS: u32 = 24;
}

/// A range of guest physical addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Window {
    /// First address.
    pub start: u64,
    /// Bytes.
    pub size: u64,
}

impl Window {
    /// The address after the last one.
    #[must_use]
    pub const fn end(&self) -> u64 {
        self.start.saturating_add(self.size)
    }
}

/// What the memory map says about a range; the values are those of e820 and of PVH's memory map, which agree.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[repr(u32)]
pub enum MemoryKind {
    /// Usable by the kernel.
    Ram = 1,
    /// Not to be touched.
    Reserved = 2,
    /// ACPI tables, usable once they have been read.
    Acpi = 3,
}

/// One line of the memory map given to the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MapEntry {
    /// First address.
    pub start: u64,
    /// Bytes, never 0.
    pub size: u64,
    /// What lies there.
    pub kind: MemoryKind,
}

/// Where `size` bytes of RAM lie: up to 3 GiB from address 0, the rest from 4 GiB.
#[must_use]
pub fn ram_ranges(size: u64) -> Vec<(GuestAddress, u64)> {
    let low = size.min(MMIO32_START);
    [(GuestAddress(0), low), (GuestAddress(RAM_64BIT_START), size - low)]
        .into_iter()
        .filter(|range| range.1 > 0)
        .collect()
}

/// The memory map for a kernel whose RAM lies in `ram` (see [`ram_ranges`]), sorted by address.
#[must_use]
pub fn memory_map(ram: &[(GuestAddress, u64)]) -> Vec<MapEntry> {
    let mut map = vec![MapEntry { start: PCI_ECAM.start, size: PCI_ECAM.size, kind: MemoryKind::Reserved }];
    let mut add = |start: u64, end: u64, kind| {
        if start < end {
            map.push(MapEntry { start, size: end - start, kind });
        }
    };
    for &(start, size) in ram {
        let end = start.0.saturating_add(size);
        add(start.0, end.min(EBDA_START), MemoryKind::Ram);
        add(start.0.max(EBDA_START), end.min(LOW_RAM_END), MemoryKind::Reserved);
        add(start.0.max(ACPI_START), end.min(FIRMWARE_START), MemoryKind::Acpi);
        add(start.0.max(FIRMWARE_START), end.min(HIGH_RAM_START), MemoryKind::Reserved);
        add(start.0.max(HIGH_RAM_START), end, MemoryKind::Ram);
    }
    map.sort_unstable_by_key(|entry| entry.start);
    map
}

/// The windows above RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HighWindows {
    /// For pmem images and other memory that is no PCI BAR; allocate in multiples of [`MEMORY_ALIGNMENT`].
    pub device_memory: Window,
    /// For 64-bit PCI BARs.
    pub pci: Window,
}

/// The guest's RAM and devices need more address bits than the CPU has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{ram} bytes of guest memory leave no room for devices below the {bits} physical address bits of this CPU")]
pub struct AddressSpaceFull {
    /// Bytes of RAM asked for.
    pub ram: u64,
    /// Physical address bits of the guest.
    pub bits: u8,
}

/// The windows above `ram_size` bytes of RAM for a guest with `physical_bits` address bits.
///
/// # Errors
/// When less than 2 GiB of addresses are left above the RAM.
pub fn high_windows(ram_size: u64, physical_bits: u8) -> Result<HighWindows, AddressSpaceFull> {
    let full = AddressSpaceFull { ram: ram_size, bits: physical_bits };
    let top = 1u64.checked_shl(u32::from(physical_bits)).ok_or(full)?;
    let ram_end = RAM_64BIT_START.checked_add(ram_size.saturating_sub(MMIO32_START)).ok_or(full)?;
    let start = ram_end.checked_next_multiple_of(HIGH_ALIGNMENT).ok_or(full)?;
    let half = top.saturating_sub(start) / 2;
    let size = half.min(HIGH_WINDOW_MAX) / HIGH_ALIGNMENT * HIGH_ALIGNMENT;
    if size == 0 {
        return Err(full);
    }
    let device_memory = Window { start, size };
    Ok(HighWindows { device_memory, pci: Window { start: device_memory.end(), size } })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GIB: u64 = 1 << 30;

    fn ranges(size: u64) -> Vec<(u64, u64)> {
        ram_ranges(size).into_iter().map(|(start, size)| (start.0, size)).collect()
    }

    #[test]
    fn ram_goes_around_the_hole_below_4_gib() {
        assert_eq!(ranges(0), []);
        assert_eq!(ranges(256 << 20), [(0, 256 << 20)]);
        assert_eq!(ranges(3 * GIB), [(0, 3 * GIB)]);
        assert_eq!(ranges(3 * GIB + 4096), [(0, 3 * GIB), (4 * GIB, 4096)]);
    }

    #[test]
    fn fixed_areas_do_not_overlap() {
        let mut areas = [
            (GDT_START, 0x30),
            (IDT_START, 8),
            (PVH_START_INFO, 56),
            (PVH_MODLIST, 32),
            (PVH_MEMMAP, ZERO_PAGE - PVH_MEMMAP),
            (ZERO_PAGE, 0x1000),
            (PML4_START, 0x1000),
            (PDPT_START, 0x1000),
            (PD_START, 0x4000),
            (CMDLINE_START, CMDLINE_MAX_SIZE as u64),
            (EBDA_START, LOW_RAM_END - EBDA_START),
            (ACPI_START, ACPI_MAX_SIZE),
            (VM_GENERATION_ID, 16),
            (RESET_VECTOR, 16),
            (PCI_MMIO32.start, PCI_MMIO32.size),
            (PCI_ECAM.start, PCI_ECAM.size),
            (IOAPIC.start, IOAPIC.size),
            (LAPIC.start, LAPIC.size),
            (KVM_IDENTITY_MAP, 0x1000),
            (KVM_TSS, 0x3000),
        ];
        areas.sort_unstable();
        for pair in areas.windows(2) {
            assert!(pair[0].0 + pair[0].1 <= pair[1].0, "{pair:x?}");
        }
    }

    #[test]
    fn memory_map_of_a_small_machine() {
        use MemoryKind::{Acpi, Ram, Reserved};
        let map: Vec<_> =
            memory_map(&ram_ranges(4 * GIB)).iter().map(|e| (e.start, e.start + e.size, e.kind)).collect();
        assert_eq!(
            map,
            [
                (0, 0x9_fc00, Ram),
                (0x9_fc00, 0xa_0000, Reserved),
                (0xe_0000, 0xf_f000, Acpi),
                (0xf_f000, 0x10_0000, Reserved),
                (0x10_0000, 0xc000_0000, Ram),
                (0xe800_0000, 0xe810_0000, Reserved),
                (0x1_0000_0000, 0x1_4000_0000, Ram),
            ]
        );
    }

    #[test]
    fn high_windows_follow_ram() {
        let windows = high_windows(256 << 20, 40).unwrap();
        assert_eq!(windows.device_memory, Window { start: 4 * GIB, size: 510 * GIB });
        assert_eq!(windows.pci, Window { start: 514 * GIB, size: 510 * GIB });
        assert_eq!(high_windows(8 * GIB, 52).unwrap().device_memory, Window { start: 9 * GIB, size: 1 << 40 });
        let error = high_windows(64 * GIB, 36).unwrap_err().to_string();
        assert!(error.contains("36 physical address bits"), "{error}");
    }

    proptest! {
        #[test]
        fn high_windows_stay_inside_the_address_space(ram in any::<u64>(), bits in any::<u8>()) {
            if let Ok(windows) = high_windows(ram, bits) {
                prop_assert!(windows.device_memory.start >= RAM_64BIT_START);
                prop_assert!(windows.device_memory.start - RAM_64BIT_START >= ram.saturating_sub(MMIO32_START));
                prop_assert!(windows.device_memory.end() <= windows.pci.start);
                prop_assert!(bits == 63 || windows.pci.end() <= 1 << bits);
                prop_assert_eq!(windows.device_memory.start % MEMORY_ALIGNMENT, 0);
                prop_assert_eq!(windows.pci.start % MEMORY_ALIGNMENT, 0);
            }
        }

        #[test]
        fn memory_map_is_sorted_and_disjoint(ram in 0..1u64 << 45) {
            let map = memory_map(&ram_ranges(ram));
            for pair in map.windows(2) {
                prop_assert!(pair[0].start + pair[0].size <= pair[1].start);
            }
        }
    }
}
