//! A built machine and the verbs on it. One thread owns it.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use arch::layout::port::GED_EVENT_POWER_BUTTON;
use devices::legacy::{IoApic, Serial};
use devices::pci::LegacyConfig;
use devices::platform::GenericEvent;
use hypervisor::Vm;
use passthrough::Grants;
use virtio_devices::device::Memory;
use virtio_devices::mapping::Mapping;
use virtio_devices::transport::PciTransport;
use vmm_sys_util::eventfd::EventFd;

use crate::build::BuildError;
use crate::memory;
use crate::plan::{Plan, WindowKind};
use crate::snapshot::{MachineState, OnDemand, SavedDevice, SnapshotError};
use crate::vcpu::Vcpus;

/// What a running machine tells its owner.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MachineEvent {
    /// The guest powered the machine off.
    PowerOff,
    /// The guest wants a reset.
    Reset,
    /// The guest has started a device that has no thread yet: see [`Machine::start_devices`].
    DeviceStarted,
    /// The machine cannot go on.
    Fault(String),
}

/// A machine. Its parts are dropped from top to bottom: nothing runs any more when the memory goes.
pub struct Machine {
    pub(crate) vcpus: Vcpus,
    pub(crate) transports: Vec<Arc<PciTransport>>,
    pub(crate) parts: Parts,
    pub(crate) vm: Arc<dyn Vm>,
    pub(crate) plan: Plan,
    pub(crate) windows: Vec<Arc<Mutex<Mapping>>>,
    /// Where files and directories can be granted, by the identifier of the device.
    pub(crate) grants: BTreeMap<String, Grants>,
    /// Restores memory while there is somebody who could touch it.
    pub(crate) ondemand: Option<OnDemand>,
    pub(crate) ram: Memory,
}

/// What is on the board beside vCPUs and virtio devices.
pub(crate) struct Parts {
    pub serial: Option<SerialPort>,
    pub events: Arc<GenericEvent>,
    pub ioapic: Arc<IoApic>,
    pub pci: Arc<LegacyConfig>,
}

impl Parts {
    /// Takes over what a snapshot says of them; the serial port was made with its part.
    pub fn restore(&self, saved: &MachineState) {
        self.events.restore(saved.events);
        self.ioapic.restore(&saved.ioapic);
        self.pci.set_address(saved.pci_address);
    }
}

/// The serial port and the signal that it wants more input.
pub(crate) struct SerialPort {
    pub port: Arc<Serial>,
    pub drained: EventFd,
}

impl Machine {
    /// Starts the vCPUs, for the first time or after [`Machine::pause`], then the devices: what vCPUs want of them
    /// meanwhile waits, and the guest is running that much sooner.
    ///
    /// # Errors
    /// If the host has no thread left for a device, or some of the memory is lost; the machine is paused then.
    pub fn resume(&self) -> Result<(), BuildError> {
        self.ondemand.as_ref().map_or(Ok(()), OnDemand::run)?;
        self.vcpus.run();
        self.start_devices()
    }

    /// Lets the devices go on, and those that the guest has started meanwhile begin.
    ///
    /// # Errors
    /// If the host has no thread left for one; the machine is paused then.
    pub fn start_devices(&self) -> Result<(), BuildError> {
        let resumed = self.transports.iter().try_for_each(|t| t.resume());
        resumed.map_err(|source| {
            self.pause();
            BuildError::Host { what: "start a device's thread", source }
        })
    }

    /// Stops vCPUs, then devices. When this returns nothing changes the machine's state.
    pub fn pause(&self) {
        self.vcpus.pause(|| self.release());
        self.transports.iter().for_each(|t| t.pause());
    }

    /// Stops the devices alone. What vCPUs want of them waits until [`Machine::resume`].
    pub fn pause_devices(&self) {
        self.transports.iter().for_each(|t| t.pause());
    }

    /// No vCPU goes on in the guest, so that whoever waits for memory that is lost may stop waiting.
    fn release(&self) {
        self.ondemand.iter().for_each(OnDemand::rest);
    }

    /// Whether memory was lost that the guest cannot be without.
    #[must_use]
    pub fn has_lost_memory(&self) -> bool {
        self.ondemand.as_ref().is_some_and(|memory| memory.check().is_err())
    }

    /// The state of the machine, which is paused. All of its memory is there afterwards.
    ///
    /// # Errors
    /// If a part is gone, or cannot be read.
    pub fn save(&self) -> Result<MachineState, SnapshotError> {
        self.ondemand.as_ref().map_or(Ok(()), OnDemand::load)?;
        let device = |transport: &Arc<PciTransport>| {
            let (state, device) = transport.save().map_err(SnapshotError::Unsaved)?;
            Ok(SavedDevice { id: transport.id().to_owned(), transport: state, device })
        };
        let hypervisor = |e: hypervisor::Error| SnapshotError::Unsaved(e.to_string());
        Ok(MachineState {
            plan: self.plan.clone(),
            clock: self.vm.clock().map_err(hypervisor)?,
            ioapic: self.parts.ioapic.save(),
            serial: self.parts.serial.as_ref().map(|s| s.port.save()),
            events: self.parts.events.pending(),
            pci_address: self.parts.pci.address(),
            devices: self.transports.iter().map(device).collect::<Result<_, SnapshotError>>()?,
            vcpus: self.vcpus.save().map_err(hypervisor)?,
        })
    }

    /// Whether its memory is a private mapping of a snapshot's.
    #[must_use]
    pub(crate) fn shares_memory(&self) -> bool {
        memory::template(&self.ram).is_some()
    }

    /// Guest RAM.
    #[must_use]
    pub fn ram(&self) -> &Memory {
        &self.ram
    }

    /// The images that the guest sees as memory: identifiers of their devices, addresses in this process and lengths in bytes.
    pub(crate) fn images(&self) -> impl Iterator<Item = (String, u64, u64)> {
        let devices = self.plan.devices.iter().filter_map(|device| Some((device, device.window?)));
        let shown = devices.zip(&self.windows).filter(|((_, planned), _)| planned.kind == WindowKind::Range);
        shown.map(|((device, _), window)| {
            let window = window.lock().unwrap_or_else(PoisonError::into_inner);
            (device.id.clone(), window.host_address(), window.len())
        })
    }

    /// The serial port, if there is one.
    pub(crate) fn serial(&self) -> Option<&SerialPort> {
        self.parts.serial.as_ref()
    }

    /// Presses the power button.
    pub fn press_power_button(&self) {
        self.parts.events.raise(GED_EVENT_POWER_BUTTON);
    }

    /// Gives the serial port as much of `read`'s input as it has room for. Says whether it wants more now, and whether
    /// the input has ended.
    ///
    /// # Errors
    /// What `read` answers.
    pub(crate) fn serial_input(&self, read: impl FnOnce(&mut [u8]) -> io::Result<usize>) -> io::Result<InputState> {
        let Some(serial) = &self.parts.serial else { return Ok(InputState::Ended) };
        let mut buffer = [0; 64];
        let room = serial.port.room().min(buffer.len());
        let part = buffer.get_mut(..room).unwrap_or_default();
        if part.is_empty() {
            return Ok(InputState::Full);
        }
        let n = read(part)?;
        if n == 0 {
            return Ok(InputState::Ended);
        }
        serial.port.input(part.get(..n).unwrap_or_default());
        Ok(if serial.port.room() == 0 { InputState::Full } else { InputState::Open })
    }
}

/// What the serial port says of its input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum InputState {
    /// More is welcome.
    Open,
    /// Wait until the guest has read it.
    Full,
    /// There will be no more.
    Ended,
}

impl Drop for Machine {
    fn drop(&mut self) {
        let ondemand = &self.ondemand;
        self.vcpus.stop(|| ondemand.iter().for_each(OnDemand::rest));
        self.transports.iter().for_each(|t| t.shut_down());
    }
}
