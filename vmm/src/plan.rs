//! Where everything goes: a pure function from a configuration to every guest address, PCI slot and memory slot.
//!
//! A plan is made before anything is opened. It can be printed and compared, is the same for the same input, and
//! building a machine only carries it out, so boot, reboot and restore are the same recipe with a fresh or a saved plan.

use arch::layout::{self, HighWindows, MEMORY_ALIGNMENT, PCI_MMIO32, Window};
use serde::{Deserialize, Serialize};
use virtio_devices::registry::{KINDS, Kind, WindowRequest};
use virtio_devices::transport::BAR0_SIZE;
use vm_allocator::{AddressAllocator, AllocPolicy};
use vmm_config::{ConsoleMode, HostFacts, VmConfig};

/// The first slot for devices; the host bridge is in slot 0.
const FIRST_SLOT: u8 = 1;
/// Slots of the bus.
const SLOTS: u8 = 32;

/// What a plan is made for, beside the configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlanFacts {
    /// The host, with the sizes of the files that the configuration names.
    pub host: HostFacts,
    /// Physical address bits of the guest's CPUs.
    pub physical_bits: u8,
}

/// Why there is no plan.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// RAM leaves no room above it.
    #[error(transparent)]
    Address(#[from] layout::AddressSpaceFull),
    /// More devices than slots.
    #[error("{0} devices do not fit: the PCI bus has room for {max}", max = SLOTS - FIRST_SLOT)]
    Slots(usize),
    /// A window fits nowhere.
    #[error("device {device} wants {len} bytes of guest addresses, but there is no such room left")]
    Window {
        /// The device.
        device: String,
        /// Bytes it wants.
        len: u64,
    },
}

/// A range of guest RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedRam {
    /// First guest physical address.
    pub start: u64,
    /// Bytes.
    pub len: u64,
    /// Memory slot.
    pub slot: u32,
}

/// What kind of window a device has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum WindowKind {
    /// A shared memory BAR.
    SharedMemory,
    /// A range beside all BARs.
    Range,
}

/// A device's window.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedWindow {
    /// Which kind.
    pub kind: WindowKind,
    /// First guest physical address.
    pub start: u64,
    /// Bytes.
    pub len: u64,
    /// Memory slot.
    pub slot: u32,
}

/// A virtio device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedDevice {
    /// Name of its kind in the registry.
    pub kind: String,
    /// Its identifier.
    pub id: String,
    /// Which device of the kind in the configuration.
    pub index: usize,
    /// PCI slot on bus 0.
    pub pci_slot: u8,
    /// Guest address of BAR 0.
    pub bar0: u64,
    /// Its window.
    pub window: Option<PlannedWindow>,
}

/// The whole machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Physical address bits the guest sees.
    pub physical_bits: u8,
    /// Guest RAM.
    pub ram: Vec<PlannedRam>,
    /// Where 64-bit BARs lie.
    pub pci_mmio64: (u64, u64),
    /// Whether there is a serial port.
    pub serial: bool,
    /// The devices.
    pub devices: Vec<PlannedDevice>,
}

impl Plan {
    /// Plans a machine. The same input gives the same plan.
    ///
    /// # Errors
    /// If something does not fit.
    pub fn new(config: &VmConfig, facts: &PlanFacts) -> Result<Self, PlanError> {
        let mut slots = 0..;
        let mut memory_slot = || slots.next().unwrap_or(u32::MAX);
        let ram = layout::ram_ranges(config.memory.size)
            .into_iter()
            .map(|(start, len)| PlannedRam { start: start.0, len, slot: memory_slot() })
            .collect();
        let HighWindows { device_memory, pci } = layout::high_windows(config.memory.size, facts.physical_bits)?;
        let mut ranges = allocator(device_memory);
        let mut bars = allocator(pci);
        let mut devices = Vec::new();
        for kind in KINDS {
            for request in (kind.requests)(config, &facts.host) {
                let place = |from: &mut Option<AddressAllocator>, len: u64, align: u64| {
                    let range = from.as_mut().and_then(|a| a.allocate(len, align, AllocPolicy::FirstMatch).ok());
                    range.map(|r| r.start()).ok_or_else(|| PlanError::Window { device: request.id.clone(), len })
                };
                let placed = match request.window {
                    None => None,
                    Some(WindowRequest::SharedMemory { len }) => {
                        Some((WindowKind::SharedMemory, place(&mut bars, len, len)?, len))
                    }
                    Some(WindowRequest::Range { len }) => {
                        Some((WindowKind::Range, place(&mut ranges, len, MEMORY_ALIGNMENT)?, len))
                    }
                };
                let window = placed.map(|(kind, start, len)| PlannedWindow { kind, start, len, slot: memory_slot() });
                devices.push(PlannedDevice {
                    kind: kind.name.into(),
                    id: request.id,
                    index: request.index,
                    pci_slot: 0,
                    bar0: 0,
                    window,
                });
            }
        }
        let count = devices.len();
        for (i, device) in devices.iter_mut().enumerate() {
            let slot = u8::try_from(i).ok().and_then(|i| i.checked_add(FIRST_SLOT)).filter(|s| *s < SLOTS);
            device.pci_slot = slot.ok_or(PlanError::Slots(count))?;
            device.bar0 = PCI_MMIO32.start + u64::from(device.pci_slot) * BAR0_SIZE;
        }
        Ok(Self {
            vcpus: config.cpus.boot_vcpus,
            physical_bits: facts.physical_bits,
            ram,
            pci_mmio64: (pci.start, pci.size),
            serial: config.serial.mode != ConsoleMode::Off,
            devices,
        })
    }
}

impl Plan {
    /// Whether this plan, which comes from a snapshot, is one of a machine with `config`: everything of it is there once,
    /// and nothing lies over anything else.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn check(&self, config: &VmConfig) -> Result<(), String> {
        let requests = |kind: &&Kind| (kind.requests)(config, &HostFacts::default());
        let wanted: Vec<_> =
            KINDS.iter().flat_map(|k| requests(k).into_iter().map(|r| (k.name.to_owned(), r.id, r.index))).collect();
        let planned: Vec<_> = self.devices.iter().map(|d| (d.kind.clone(), d.id.clone(), d.index)).collect();
        if wanted != planned {
            return Err(format!("its plan has the devices {planned:?} instead of {wanted:?}"));
        }
        if self.vcpus != config.cpus.boot_vcpus || self.serial != (config.serial.mode != ConsoleMode::Off) {
            return Err("its plan and its configuration are of different machines".into());
        }
        let ram = self.ram.iter().try_fold(0u64, |sum, r| sum.checked_add(r.len));
        if ram != Some(config.memory.size) {
            return Err(format!("its plan has no {} bytes of RAM", config.memory.size));
        }
        let mut ranges: Vec<(u64, u64)> = self.ram.iter().map(|r| (r.start, r.len)).collect();
        ranges.extend(self.devices.iter().map(|d| (d.bar0, BAR0_SIZE)));
        ranges.extend(self.devices.iter().filter_map(|d| d.window).map(|w| (w.start, w.len)));
        let mut slots: Vec<u32> = self.ram.iter().map(|r| r.slot).collect();
        slots.extend(self.devices.iter().filter_map(|d| d.window).map(|w| w.slot));
        ranges.sort_unstable();
        slots.sort_unstable();
        let aligned = |(start, len): &(u64, u64)| *len > 0 && start.is_multiple_of(PAGE) && len.is_multiple_of(PAGE);
        let apart = |pair: &[(u64, u64)]| match *pair {
            [(start, len), (next, _)] => start.checked_add(len).is_some_and(|end| end <= next),
            _ => true,
        };
        let inside = ranges.last().is_none_or(|(start, len)| start.checked_add(*len).is_some());
        if !inside || !ranges.iter().all(aligned) || !ranges.windows(2).all(apart) {
            return Err(format!("its plan has ranges that overlap or begin in the middle of a page: {ranges:x?}"));
        }
        if slots.windows(2).any(|pair| pair.first() == pair.last()) {
            return Err("its plan uses a memory slot twice".into());
        }
        Ok(())
    }
}

/// Bytes of the smallest page.
const PAGE: u64 = 4096;

fn allocator(window: Window) -> Option<AddressAllocator> {
    AddressAllocator::new(window.start, window.size).ok()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::PathBuf;

    use proptest::prelude::*;

    use super::*;

    fn facts(files: &[(&str, u64)]) -> PlanFacts {
        let file_sizes: BTreeMap<_, _> = files.iter().map(|(p, s)| (PathBuf::from(p), *s)).collect();
        let host = HostFacts { memory: 64 << 30, page_size: 4096, max_vcpus: 64, file_sizes };
        PlanFacts { host, physical_bits: 40 }
    }

    fn config(json: &str) -> VmConfig {
        VmConfig::from_json(json.as_bytes()).unwrap()
    }

    fn application() -> VmConfig {
        config(
            r#"{"cpus":{"boot_vcpus":2,"max_vcpus":2},"memory":{"size":536870912},
                "pmem":[{"file":"/a","discard_writes":true},{"file":"/b"}],
                "vsock":{"cid":3,"socket":"/s"},"gpu":[{"wayland":"/w"}]}"#,
        )
    }

    #[test]
    fn an_application_machine() {
        let plan = Plan::new(&application(), &facts(&[("/a", 100 << 20), ("/b", 5)])).unwrap();
        insta::assert_json_snapshot!(plan);
    }

    #[test]
    fn ram_above_4_gib_moves_the_windows() {
        let plan = Plan::new(&config(r#"{"memory":{"size":8589934592}}"#), &facts(&[])).unwrap();
        assert_eq!(plan.ram.iter().map(|r| r.len).sum::<u64>(), 8 << 30);
        assert!(plan.pci_mmio64.0 > plan.ram[1].start + plan.ram[1].len);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let huge = Plan::new(&application(), &facts(&[("/a", 1 << 45)]));
        assert!(matches!(huge, Err(PlanError::Window { device, .. }) if device == "_pmem0"));
        let many: Vec<String> = (0..40).map(|i| format!(r#"{{"file":"/{i}"}}"#)).collect();
        let many = config(&format!(r#"{{"pmem":[{}]}}"#, many.join(",")));
        assert!(matches!(Plan::new(&many, &facts(&[])), Err(PlanError::Slots(_))));
    }

    #[test]
    fn a_plan_is_told_from_one_that_was_tampered_with() {
        let (config, plan) = (application(), Plan::new(&application(), &facts(&[("/a", 1 << 20), ("/b", 5)])).unwrap());
        plan.check(&config).unwrap();
        let refused = |change: &dyn Fn(&mut Plan)| {
            let mut plan = plan.clone();
            change(&mut plan);
            plan.check(&config).unwrap_err()
        };
        assert!(refused(&|p| p.vcpus = 3).contains("different machines"));
        assert!(refused(&|p| p.serial = false).contains("different machines"));
        assert!(refused(&|p| p.ram[0].len += 4096).contains("bytes of RAM"));
        assert!(refused(&|p| drop(p.devices.pop())).contains("devices"));
        assert!(refused(&|p| p.devices[0].kind = "blk".into()).contains("devices"));
        assert!(refused(&|p| p.devices[0].bar0 = 0).contains("overlap"));
        assert!(refused(&|p| p.devices[0].bar0 += 1).contains("page"));
        assert!(refused(&|p| p.devices[1].window.as_mut().unwrap().len = !4095).contains("overlap"));
        assert!(refused(&|p| p.devices[1].window.as_mut().unwrap().slot = 0).contains("slot"));
    }

    proptest! {
        #[test]
        fn nothing_overlaps(a in 0u64..1 << 33, b in 0u64..1 << 33, ram in 1u64..1 << 24) {
            let mut config = application();
            config.memory.size = ram << 12;
            let Ok(plan) = Plan::new(&config, &facts(&[("/a", a), ("/b", b)])) else { return Ok(()) };
            prop_assert_eq!(plan.check(&config), Ok(()));
        }
    }
}
