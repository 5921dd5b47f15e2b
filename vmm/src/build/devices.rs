//! Virtio devices: built by their kinds, then attached to the PCI bus.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use devices::irq::{Msi, MsiSink};
use hypervisor::Vm;
use passthrough::Grants;
use virtio_devices::device::{Device, Memory, WindowAddress};
use virtio_devices::mapping::Mapping;
use virtio_devices::registry::{BuildContext, KINDS, Kind, Request};
use virtio_devices::transport::{BAR0_SIZE, Doorbells, PciTransport, Setup};
use vm_memory::{GuestAddress, GuestMemoryAtomic};
use vmm_sys_util::eventfd::EventFd;

use super::platform::Platform;
use super::{BuildError, Ingredients};
use crate::memory;
use crate::plan::{PlannedDevice, WindowKind};
use crate::snapshot::SavedDevice;

/// A device that was built and is not attached yet.
pub struct BuiltDevice<'a> {
    planned: &'a PlannedDevice,
    kind: &'static Kind,
    device: Box<dyn Device>,
    /// Where files and directories can be granted through it.
    pub grants: Option<Grants>,
    /// Host memory of its window.
    pub window: Option<Arc<Mutex<Mapping>>>,
}

/// Builds the planned devices and shows their windows to the guest.
pub fn build<'a>(from: &Ingredients<'a>, vm: &dyn Vm) -> Result<Vec<BuiltDevice<'a>>, BuildError> {
    let mut all = Vec::new();
    for (index, planned) in from.plan.devices.iter().enumerate() {
        let kind = KINDS.iter().find(|k| k.name == planned.kind);
        let kind = *kind.ok_or_else(|| BuildError::Plan(format!("no device kind is called {}", planned.kind)))?;
        let console = from.console.map(|s| s.ends()).transpose();
        let listener = from.listeners.get(&planned.id).map(OwnedFd::try_clone).transpose();
        let request = Request { id: planned.id.clone(), index: planned.index, window: None };
        let built = (kind.build)(BuildContext {
            config: from.config,
            request: &request,
            window: planned.window.map(|w| WindowAddress { guest: GuestAddress(w.start), len: w.len }),
            console: console.map_err(|source| BuildError::Host { what: "open the console", source })?,
            listener: listener.map_err(|source| BuildError::Host { what: "take over a device's socket", source })?,
            renderer: from.renderer,
            grants: from.grants.get(&planned.id).cloned(),
            saved: saved_device(from, index).map(|saved| &saved.device),
        })?;
        let window = match (planned.window, built.memory) {
            (Some(planned), Some(memory)) => {
                let mapping = memory.mapping.lock().unwrap_or_else(PoisonError::into_inner);
                memory::add_window(vm, planned, &mapping, memory.read_only)?;
                drop(mapping);
                Some(memory.mapping)
            }
            (None, None) => None,
            _ => return Err(BuildError::Plan(format!("{} and its window do not belong together", planned.id))),
        };
        all.push(BuiltDevice { planned, kind, device: built.device, grants: built.grants, window });
    }
    Ok(all)
}

impl BuiltDevice<'_> {
    /// Its identifier and its table of grants, if it has one.
    pub fn grants(&self) -> Option<(String, Grants)> {
        Some((self.planned.id.clone(), self.grants.clone()?))
    }
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

/// Puts the built devices into their PCI slots.
pub fn attach(
    from: &Ingredients<'_>,
    built: Vec<BuiltDevice<'_>>,
    vm: &Arc<dyn Vm>,
    mem: &GuestMemoryAtomic<Memory>,
    platform: &mut Platform,
) -> Result<Vec<Arc<PciTransport>>, BuildError> {
    let through = Arc::new(ThroughKvm(vm.clone()));
    let mut transports = Vec::new();
    for (index, BuiltDevice { planned, kind, device, .. }) in built.into_iter().enumerate() {
        let window = planned.window.filter(|w| w.kind == WindowKind::SharedMemory);
        let transport = PciTransport::new(Setup {
            id: planned.id.clone(),
            device,
            bar0: planned.bar0,
            shared_memory: window.map(|w| WindowAddress { guest: GuestAddress(w.start), len: w.len }),
            mem: mem.clone(),
            msi: through.clone(),
            doorbells: through.clone(),
            thread_setup: from.confinement.device(kind),
            saved: saved_device(from, index).map(|saved| &saved.transport),
        })
        .map_err(|source| BuildError::Host { what: "make a device's PCI function", source })?;
        if !platform.pci.insert(planned.pci_slot, transport.clone()) {
            return Err(BuildError::Plan(format!("PCI slot {} is taken twice", planned.pci_slot)));
        }
        platform.mmio(planned.bar0, BAR0_SIZE, transport.clone())?;
        transports.push(transport);
    }
    Ok(transports)
}
