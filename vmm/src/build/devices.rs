//! Virtio devices: their windows are mapped by their kinds, then they are built and attached to the PCI bus.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, PoisonError};

use devices::irq::{Msi, MsiSink};
use hypervisor::Vm;
use passthrough::Grants;
use virtio_devices::device::{Memory, WindowAddress};
use virtio_devices::registry::{BuildContext, Built, KINDS, Kind, Request, WindowContext, WindowMemory};
use virtio_devices::transport::{BAR0_SIZE, Doorbells, PciTransport, Setup};
use vm_memory::{GuestAddress, GuestMemoryAtomic};
use vmm_sys_util::eventfd::EventFd;

use super::platform::Platform;
use super::{BuildError, Ingredients};
use crate::machine::MachineEvent;
use crate::memory;
use crate::plan::{PlannedDevice, WindowKind};
use crate::snapshot::SavedDevice;

fn kind_of(planned: &PlannedDevice) -> Result<&'static Kind, BuildError> {
    let kind = KINDS.iter().find(|k| k.name == planned.kind);
    kind.copied().ok_or_else(|| BuildError::Plan(format!("no device kind is called {}", planned.kind)))
}

fn request_of(planned: &PlannedDevice) -> Request {
    Request { id: planned.id.clone(), index: planned.index, window: None }
}

/// Makes the windows of the planned devices, by the number of the device, and shows them to the guest.
pub fn map_windows(from: &Ingredients<'_>, vm: &dyn Vm) -> Result<BTreeMap<usize, WindowMemory>, BuildError> {
    let mut windows = BTreeMap::new();
    for (number, planned) in from.plan.devices.iter().enumerate() {
        let Some(window) = planned.window else { continue };
        let context = WindowContext { config: from.config, request: &request_of(planned), len: window.len };
        let memory = (kind_of(planned)?.map)(context)?;
        memory::add_window(vm, window, &memory.mapping.lock().unwrap_or_else(PoisonError::into_inner))?;
        windows.insert(number, memory);
    }
    Ok(windows)
}

/// What a snapshot says of the plan's device number `index`.
fn saved_device<'a>(from: &Ingredients<'a>, index: usize) -> Option<&'a SavedDevice> {
    from.saved?.state.devices.get(index)
}

/// Messages and doorbells through KVM.
struct ThroughKvm(Arc<dyn Vm>);

impl MsiSink for ThroughKvm {
    fn signal(&self, msi: Msi) {
        if let Err(e) = self.0.signal_msi(msi.address, msi.data) {
            log::debug!("nobody takes the interrupt {msi:x?}: {e}");
        }
    }
}

impl Doorbells for ThroughKvm {
    fn add(&self, address: u64, event: &EventFd) -> io::Result<()> {
        self.0.add_ioeventfd(address, event).map_err(io::Error::other)
    }

    fn remove(&self, address: u64, event: &EventFd) {
        if let Err(e) = self.0.remove_ioeventfd(address, event) {
            log::warn!("a doorbell stays: {e}");
        }
    }
}

/// The way interrupts take into the machine.
pub fn msi_sink(vm: &Arc<dyn Vm>) -> Arc<dyn MsiSink> {
    Arc::new(ThroughKvm(vm.clone()))
}

/// The devices of a machine.
#[derive(Default)]
pub struct Devices {
    /// Their PCI functions, in the order of the plan.
    pub transports: Vec<Arc<PciTransport>>,
    /// Where files and directories can be granted, by the identifier of the device.
    pub grants: BTreeMap<String, Grants>,
}

/// Builds the planned devices and puts them into their PCI slots.
pub fn build(
    from: &Ingredients<'_>,
    mut windows: BTreeMap<usize, WindowMemory>,
    vm: &Arc<dyn Vm>,
    mem: &GuestMemoryAtomic<Memory>,
    platform: &mut Platform,
) -> Result<Devices, BuildError> {
    let through = Arc::new(ThroughKvm(vm.clone()));
    let report = from.report.clone();
    let wanting: Arc<dyn Fn() + Send + Sync> = Arc::new(move || report(MachineEvent::DeviceStarted));
    let mut devices = Devices::default();
    for (number, planned) in from.plan.devices.iter().enumerate() {
        let kind = kind_of(planned)?;
        let saved = saved_device(from, number);
        let address = planned.window.map(|w| WindowAddress { guest: GuestAddress(w.start), len: w.len });
        let console = from.console.map(|s| s.ends()).transpose();
        let handed = from.handed.get(&planned.id).map(OwnedFd::try_clone).transpose();
        let Built { device, grants } = (kind.build)(BuildContext {
            config: from.config,
            request: &request_of(planned),
            window: address.zip(windows.remove(&number)),
            console: console.map_err(|source| BuildError::Host { what: "open the console", source })?,
            handed: handed.map_err(|source| BuildError::Host { what: "take over a device's socket", source })?,
            renderer: from.renderer,
            grants: from.grants.get(&planned.id).cloned(),
            saved: saved.map(|saved| &saved.device),
        })?;
        let is_bar = planned.window.is_some_and(|w| w.kind == WindowKind::SharedMemory);
        let transport = PciTransport::new(Setup {
            id: planned.id.clone(),
            device,
            bar0: planned.bar0,
            shared_memory: address.filter(|_| is_bar),
            mem: mem.clone(),
            msi: through.clone(),
            doorbells: through.clone(),
            thread_setup: from.confinement.device(kind),
            wanting: wanting.clone(),
            saved: saved.map(|saved| &saved.transport),
        })
        .map_err(|source| BuildError::Host { what: "make a device's PCI function", source })?;
        if !platform.pci.insert(planned.pci_slot, transport.clone()) {
            return Err(BuildError::Plan(format!("PCI slot {} is taken twice", planned.pci_slot)));
        }
        platform.mmio(planned.bar0, BAR0_SIZE, transport.clone())?;
        devices.transports.push(transport);
        devices.grants.extend(grants.map(|grants| (planned.id.clone(), grants)));
    }
    Ok(devices)
}
