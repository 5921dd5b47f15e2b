//! `state.bin`: everything of a paused machine that is not its memory.

use devices::legacy::{IoApicState, SerialState};
use hypervisor::VcpuState;
use serde::{Deserialize, Serialize};
use virtio_devices::device::SavedState;
use virtio_devices::transport::TransportState;
use vmm_config::VmConfig;

use crate::plan::Plan;

/// A virtio device and its transport.
#[derive(Serialize, Deserialize)]
pub struct SavedDevice {
    /// Its identifier, as the plan has it.
    pub id: String,
    /// The PCI function.
    pub transport: TransportState,
    /// The device itself.
    pub device: SavedState,
}

/// A paused machine without its memory. The form in the file is postcard's: fields in this order.
#[derive(Serialize, Deserialize)]
pub struct MachineState {
    /// Where everything is.
    pub plan: Plan,
    /// The guest's paravirtual clock, in nanoseconds.
    pub clock: u64,
    /// The I/O APIC.
    pub ioapic: IoApicState,
    /// The serial port, if there is one.
    pub serial: Option<SerialState>,
    /// Events of the generic event device that the guest has not read yet.
    pub events: u8,
    /// The address register of PCI configuration mechanism #1.
    pub pci_address: u32,
    /// The virtio devices, in the order of the plan.
    pub devices: Vec<SavedDevice>,
    /// The vCPUs, by number.
    pub vcpus: Vec<VcpuState>,
}

impl MachineState {
    /// The file's contents.
    ///
    /// # Errors
    /// Why there are none, in a sentence.
    pub fn to_bytes(&self) -> Result<Vec<u8>, String> {
        postcard::to_allocvec(self).map_err(|e| format!("the machine's state cannot be saved: {e}"))
    }

    /// Reads the file's contents.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, String> {
        match postcard::take_from_bytes(bytes) {
            Ok((state, [])) => Ok(state),
            Ok((_, rest)) => Err(format!("{} bytes are left over", rest.len())),
            Err(e) => Err(e.to_string()),
        }
    }

    /// Whether the parts go together, and with `config`.
    ///
    /// # Errors
    /// What does not.
    pub fn check(&self, config: &VmConfig) -> Result<(), String> {
        self.plan.check(config)?;
        if self.vcpus.len() as u64 != u64::from(self.plan.vcpus) {
            return Err(format!("it has {} vCPUs instead of {}", self.vcpus.len(), self.plan.vcpus));
        }
        if self.serial.is_some() != self.plan.serial {
            return Err("the serial port is not where the plan has it".into());
        }
        let ids = |ids: &mut dyn Iterator<Item = &String>| ids.cloned().collect::<Vec<_>>();
        let (planned, saved) =
            (ids(&mut self.plan.devices.iter().map(|d| &d.id)), ids(&mut self.devices.iter().map(|d| &d.id)));
        if planned != saved {
            return Err(format!("its devices are {saved:?} instead of {planned:?}"));
        }
        Ok(())
    }
}
