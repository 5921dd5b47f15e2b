//! The ACPI tables (ACPI 6.5): RSDP, XSDT, FADT, MADT, MCFG and DSDT, made as one piece of memory.
//!
//! The machine is "hardware-reduced": no SCI, no PM timer, no 8259 or 8254. Power off and reset are the FADT's sleep control and
//! reset registers; a pressed power button and a new generation of the machine come through the generic event device; see [`super::layout::port`].

mod dsdt;
#[cfg(test)]
mod tests;

use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use serde::{Deserialize, Serialize};
use vm_memory::GuestAddress;

use super::layout::{ACPI_MAX_SIZE, IOAPIC, LAPIC, PCI_ECAM, PCI_LAST_BUS, Window, port};

const OEM_ID: [u8; 6] = *b"SPCTRM";
const OEM_TABLE_ID: [u8; 8] = *b"SPCTRVMM";
const OEM_REVISION: u32 = 1;
/// Each table starts on a multiple of this.
const TABLE_ALIGNMENT: usize = 16;
/// vCPUs for which there are names in the DSDT.
const MAX_VCPUS: u32 = 0x1000;

/// What the tables describe; the fixed parts of the machine come from [`super::layout`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AcpiInput {
    /// vCPUs, numbered from 0; the number is also the APIC ID.
    pub vcpus: u32,
    /// Where 32-bit BARs may lie.
    pub pci_mmio32: Window,
    /// Where 64-bit BARs may lie.
    pub pci_mmio64: Window,
    /// Whether there is a 16550 at COM1.
    pub serial: bool,
}

/// The finished tables.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AcpiTables {
    /// What to write to guest memory, at the address the tables were made for.
    pub bytes: Vec<u8>,
    /// Where the RSDP is, for the boot protocol.
    pub rsdp: GuestAddress,
}

/// Why there can be no tables for a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// More vCPUs than the DSDT has names for, or none.
    #[error("a machine has 1 to {MAX_VCPUS} vCPUs, not {0}")]
    Vcpus(u32),
    /// A PCI window is empty, wraps around or does not lie where its kind must.
    #[error("no PCI window can lie at {start:#x} with {size:#x} bytes", start = .0.start, size = .0.size)]
    Window(Window),
    /// The tables are larger than the space set aside.
    #[error("the ACPI tables take {0} bytes, more than the {ACPI_MAX_SIZE} set aside for them")]
    TooBig(usize),
}

/// Makes the tables for the machine `input`, to be written to guest memory at `start`, a multiple of 16.
///
/// # Errors
/// When `input` describes no possible machine; see [`Error`].
pub fn tables(input: &AcpiInput, start: GuestAddress) -> Result<AcpiTables, Error> {
    if !(1..=MAX_VCPUS).contains(&input.vcpus) {
        return Err(Error::Vcpus(input.vcpus));
    }
    let mut image = Image { start: start.0, bytes: vec![0; Rsdp::len()] };
    let dsdt = image.add(&dsdt::dsdt(input)?);
    let entries = [image.add(&fadt(dsdt)), image.add(&madt(input)), image.add(&mcfg())];
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    for entry in entries {
        xsdt.add_entry(entry);
    }
    let xsdt = image.add(&xsdt);

    let mut bytes = Vec::new();
    Rsdp::new(OEM_ID, xsdt).to_aml_bytes(&mut bytes);
    bytes.extend(image.bytes.drain(bytes.len()..));
    if bytes.len() as u64 > ACPI_MAX_SIZE {
        return Err(Error::TooBig(bytes.len()));
    }
    Ok(AcpiTables { bytes, rsdp: start })
}

/// Tables one after the other.
struct Image {
    start: u64,
    bytes: Vec<u8>,
}

impl Image {
    /// Appends a table and returns its guest address.
    fn add(&mut self, table: &dyn Aml) -> u64 {
        self.bytes.resize(self.bytes.len().next_multiple_of(TABLE_ALIGNMENT), 0);
        let address = self.start.saturating_add(self.bytes.len() as u64);
        table.to_aml_bytes(&mut self.bytes);
        address
    }
}

/// A table of which `body` follows the header.
fn table(signature: [u8; 4], revision: u8, body: &[u8]) -> Sdt {
    /// Bytes of the header all tables have.
    const HEADER_SIZE: u32 = 36;
    let mut table = Sdt::new(signature, HEADER_SIZE, revision, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    table.append_slice(body);
    table
}

/// Section 5.2.9.
fn fadt(dsdt: u64) -> impl Aml {
    /// Boot flags: no VGA, no ASPM, no CMOS clock; and without bit 1 no 8042, without bit 0 no ISA devices.
    const BOOT_FLAGS: u16 = 1 << 2 | 1 << 4 | 1 << 5;
    let register = |port: u16| GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port.into());
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .preferred_pm_profile(PmProfile::Desktop)
        .flag(Flags::Wbinvd)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        // These two say that there is no such fixed hardware.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = BOOT_FLAGS.into();
    fadt.reset_reg = register(port::RESET);
    fadt.reset_value = port::RESET_VALUE;
    fadt.sleep_control_reg = register(port::SLEEP_CONTROL);
    fadt.sleep_status_reg = register(port::SLEEP_STATUS);
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(*b"SPECTRUM").into();
    fadt.finalize()
}

/// Section 5.2.12.
fn madt(input: &AcpiInput) -> Sdt {
    const REVISION: u8 = 5;
    const ENABLED: u32 = 1;
    let mut body = Vec::new();
    body.dword(address32(LAPIC));
    body.dword(0); // flags: no 8259
    for id in 0..input.vcpus {
        match u8::try_from(id) {
            // 255 means "all processors" in the short form.
            Ok(short) if short != u8::MAX => {
                ProcessorLocalApic::new(short, short, EnabledStatus::Enabled).to_aml_bytes(&mut body);
            }
            // Section 5.2.12.12, processor local x2APIC: type, length, reserved, APIC ID, flags, processor UID.
            _ => {
                body.vec(&[9, 16, 0, 0]);
                [id, ENABLED, id].into_iter().for_each(|word| body.dword(word));
            }
        }
    }
    IoApic::new(0, address32(IOAPIC), 0).to_aml_bytes(&mut body);
    // Section 5.2.12.7, local APIC NMI: type, length, all processors, flags (2 bytes), LINT1.
    body.vec(&[4, 6, 0xff, 0, 0, 1]);
    if input.vcpus > u32::from(u8::MAX) {
        // Section 5.2.12.13, local x2APIC NMI: type, length, flags (2), all processors, LINT1, reserved.
        body.vec(&[10, 12, 0, 0, 0xff, 0xff, 0xff, 0xff, 1, 0, 0, 0]);
    }
    table(*b"APIC", REVISION, &body)
}

/// The address of one of the layout's windows below 4 GiB.
const fn address32(window: Window) -> u32 {
    assert!(window.start < 1 << 32);
    #[expect(clippy::cast_possible_truncation, reason = "checked in the line above")]
    let address = window.start as u32;
    address
}

/// PCI Firmware Specification 3.3, section 4.1.2.
fn mcfg() -> MCFG {
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    mcfg.add_ecam(PCI_ECAM.start, 0, 0, PCI_LAST_BUS);
    mcfg
}
