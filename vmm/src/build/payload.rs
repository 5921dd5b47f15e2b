//! Kernel, initramfs, command line and ACPI tables.

use std::fs::File;
use std::path::{Path, PathBuf};

use arch::acpi::{AcpiInput, tables};
use arch::boot::{Entry, Payload, load as load_kernel};
use arch::layout::{ACPI_START, PCI_MMIO32, RESET_VECTOR, VM_GENERATION_ID, Window};
use arch::reset;
use devices::platform::VmGenId;
use virtio_devices::device::Memory;
use vm_memory::{Bytes, GuestAddress};

use super::{BuildError, Ingredients};

fn open(what: &'static str, path: &Path) -> Result<File, BuildError> {
    let fail = |source| BuildError::Open { what, path: path.to_owned(), source };
    let file = File::open(path).map_err(fail)?;
    if file.metadata().map_err(fail)?.is_dir() {
        return Err(fail(std::io::ErrorKind::IsADirectory.into()));
    }
    Ok(file)
}

/// Fills guest memory and says where the first vCPU starts.
pub fn load(from: &Ingredients<'_>, ram: &Memory) -> Result<Entry, BuildError> {
    let plan = from.plan;
    let (start, size) = plan.pci_mmio64;
    let acpi = tables(
        &AcpiInput {
            vcpus: plan.vcpus,
            pci_mmio32: PCI_MMIO32,
            pci_mmio64: Window { start, size },
            serial: plan.serial,
        },
        GuestAddress(ACPI_START),
    )?;
    ram.write_slice(&acpi.bytes, GuestAddress(ACPI_START))
        .map_err(|e| BuildError::Plan(format!("no RAM where ACPI tables go: {e}")))?;
    ram.write_slice(&reset::CODE, GuestAddress(RESET_VECTOR))
        .map_err(|e| BuildError::Plan(format!("no RAM where the reset vector is: {e}")))?;
    VmGenId::initialise(ram, GuestAddress(VM_GENERATION_ID))?;
    let payload = from.config.payload.as_ref();
    let path: PathBuf = payload.and_then(|p| p.kernel.clone()).unwrap_or_default();
    let mut kernel = open("kernel", &path)?;
    let initramfs = payload.and_then(|p| p.initramfs.as_ref());
    let mut initramfs = initramfs.map(|p| open("initramfs", p)).transpose()?;
    let cmdline = payload.and_then(|p| p.cmdline.as_deref()).unwrap_or("");
    let ranges: Vec<_> = plan.ram.iter().map(|r| (GuestAddress(r.start), r.len)).collect();
    let payload = Payload { kernel: &mut kernel, initramfs: initramfs.as_mut(), cmdline };
    load_kernel(ram, payload, &ranges, Some(acpi.rsdp)).map_err(|source| BuildError::Boot { path, source })
}
