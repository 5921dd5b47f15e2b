//! The DSDT: devices that are found by name and not by searching a bus, in AML.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Device, EISAName, Equal, Field, FieldAccessType, FieldEntry,
    FieldLockRule, FieldUpdateRule, IO, If, Interrupt, Local, Memory32Fixed, Method, Name, Notify, OpRegion,
    OpRegionSpace, Package, Path, ResourceTemplate, Scope, Store,
};
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, AmlSink};

use super::{AcpiInput, Error, address32, table};
use crate::x86_64::layout::{PCI_ECAM, PCI_LAST_BUS, RAM_64BIT_START, VM_GENERATION_ID, Window, gsi, port};

/// 2 or more makes integers 64 bits wide.
const REVISION: u8 = 2;
/// The power button's notification "pressed" (ACPI 6.5 section 4.8.2.2.1.2).
const NOTIFY_PRESSED: u8 = 0x80;
/// The generation counter's notification "changed" ("Virtual Machine Generation ID", Microsoft 2012).
const NOTIFY_NEW_GENERATION: u8 = 0x80;

pub(super) fn dsdt(input: &AcpiInput) -> Result<Sdt, Error> {
    let mut devices = Vec::new();
    for vcpu in 0..input.vcpus {
        processor(&mut devices, vcpu);
    }
    pci_root(&mut devices, input)?;
    motherboard(&mut devices);
    if input.serial {
        serial(&mut devices);
    }
    power_button(&mut devices);
    generation_counter(&mut devices);
    event_device(&mut devices);

    let mut body = Vec::new();
    // The value that power off writes to the sleep control register; the second number is for machines with two registers.
    Name::new("_S5_".into(), &Package::new(vec![&port::SLEEP_TYPE_S5, &0u8])).to_aml_bytes(&mut body);
    body.vec(&Scope::raw("\\_SB_".into(), devices));
    Ok(table(*b"DSDT", REVISION, &body))
}

/// A processor device; its `_UID` ties it to its MADT entry (ACPI 6.5 section 8.4).
fn processor(sink: &mut dyn AmlSink, vcpu: u32) {
    Device::new(
        Path::new(&format!("C{:03X}", vcpu & 0xfff)),
        vec![&Name::new("_HID".into(), &"ACPI0007"), &Name::new("_UID".into(), &vcpu)],
    )
    .to_aml_bytes(sink);
}

/// First and last address of a window.
fn bounds<T: TryFrom<u64>>(window: Window) -> Result<(T, T), Error> {
    let last =
        window.size.checked_sub(1).and_then(|size| window.start.checked_add(size)).ok_or(Error::Window(window))?;
    match (T::try_from(window.start), T::try_from(last)) {
        (Ok(first), Ok(last)) => Ok((first, last)),
        _ => Err(Error::Window(window)),
    }
}

/// The PCI Express root bridge (PCI Firmware Specification 3.3, section 4).
fn pci_root(sink: &mut dyn AmlSink, input: &AcpiInput) -> Result<(), Error> {
    let (first32, last32) = bounds::<u32>(input.pci_mmio32)?;
    let (first64, last64) = bounds::<u64>(input.pci_mmio64)?;
    if first64 < RAM_64BIT_START {
        return Err(Error::Window(input.pci_mmio64));
    }
    // Neither window is marked prefetchable: a BAR of either kind may lie in a window that is not, but a BAR that is not
    // prefetchable must not lie in one that is, and Linux moves it away if it does.
    let not_cacheable = AddressSpaceCacheable::NotCacheable;
    Device::new(
        "PCI0".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0A08")),
            &Name::new("_CID".into(), &EISAName::new("PNP0A03")),
            &Name::new("_SEG".into(), &0u8),
            &Name::new("_UID".into(), &0u8),
            &Name::new("_CCA".into(), &1u8),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &AddressSpace::new_bus_number(0u16, u16::from(PCI_LAST_BUS)),
                    &IO::new(port::PCI_CONFIG_ADDRESS, port::PCI_CONFIG_ADDRESS, 1, 8),
                    &AddressSpace::new_memory(not_cacheable, true, first32, last32, None),
                    &AddressSpace::new_memory(not_cacheable, true, first64, last64, None),
                ]),
            ),
        ],
    )
    .to_aml_bytes(sink);
    Ok(())
}

/// Claims the ECAM window, without which an operating system does not trust the MCFG (PCI Firmware Specification 3.3, 4.1.2).
fn motherboard(sink: &mut dyn AmlSink) {
    const ECAM_SIZE: u32 = (PCI_LAST_BUS as u32 + 1) << 20;
    Device::new(
        "MBRD".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0C02")),
            &Name::new("_UID".into(), &0u8),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&Memory32Fixed::new(true, address32(PCI_ECAM), ECAM_SIZE)]),
            ),
        ],
    )
    .to_aml_bytes(sink);
}

/// A 16550.
fn serial(sink: &mut dyn AmlSink) {
    // Eight registers, as `port::COM1_SIZE` says.
    Device::new(
        "COM1".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &0u8),
            &Name::new("_DDN".into(), &"COM1"),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &Interrupt::new(true, true, false, false, gsi::COM1),
                    &IO::new(port::COM1, port::COM1, 1, 8),
                ]),
            ),
        ],
    )
    .to_aml_bytes(sink);
}

fn power_button(sink: &mut dyn AmlSink) {
    Device::new(
        "PWRB".into(),
        vec![&Name::new("_HID".into(), &EISAName::new("PNP0C0C")), &Name::new("_UID".into(), &0u8)],
    )
    .to_aml_bytes(sink);
}

/// The VM generation ID ("Virtual Machine Generation ID", Microsoft 2012): 16 bytes that are others after the machine was
/// restored or cloned, and where they are. Linux seeds its random number generator anew when they change.
fn generation_counter(sink: &mut dyn AmlSink) {
    const NAME: &str = "VM_Gen_Counter";
    let (low, high) = (VM_GENERATION_ID & 0xffff_ffff, VM_GENERATION_ID >> 32);
    Device::new(
        "VGEN".into(),
        vec![
            // Ours to choose: the one Linux knows. Other drivers look for the next two, as the specification says.
            &Name::new("_HID".into(), &"VMGENCTR"),
            &Name::new("_CID".into(), &NAME),
            &Name::new("_DDN".into(), &NAME),
            &Name::new("_UID".into(), &0u8),
            &Name::new("ADDR".into(), &Package::new(vec![&low, &high])),
        ],
    )
    .to_aml_bytes(sink);
}

/// The generic event device (ACPI 6.5 section 5.6.9): its interrupt makes the operating system run `_EVT`, which asks the event
/// register what happened and notifies those concerned.
fn event_device(sink: &mut dyn AmlSink) {
    let (pressed, generation) = (port::GED_EVENT_POWER_BUTTON, port::GED_EVENT_VM_GENERATION);
    Device::new(
        "GED_".into(),
        vec![
            &Name::new("_HID".into(), &"ACPI0013"),
            &Name::new("_UID".into(), &0u8),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&Interrupt::new(true, true, false, false, gsi::GED)]),
            ),
            &OpRegion::new("EREG".into(), OpRegionSpace::SystemIO, &port::GED_EVENTS, &1u8),
            &Field::new(
                "EREG".into(),
                FieldAccessType::Byte,
                FieldLockRule::NoLock,
                FieldUpdateRule::WriteAsZeroes,
                vec![FieldEntry::Named(*b"EVTS", 8)],
            ),
            &Method::new(
                "_EVT".into(),
                1,
                true,
                vec![
                    // Reading clears it, so it is read once.
                    &Store::new(&Local(0), &Path::new("EVTS")),
                    &And::new(&Local(1), &Local(0), &pressed),
                    &If::new(
                        &Equal::new(&Local(1), &pressed),
                        vec![&Notify::new(&Path::new("\\_SB_.PWRB"), &NOTIFY_PRESSED)],
                    ),
                    &And::new(&Local(1), &Local(0), &generation),
                    &If::new(
                        &Equal::new(&Local(1), &generation),
                        vec![&Notify::new(&Path::new("\\_SB_.VGEN"), &NOTIFY_NEW_GENERATION)],
                    ),
                ],
            ),
        ],
    )
    .to_aml_bytes(sink);
}
