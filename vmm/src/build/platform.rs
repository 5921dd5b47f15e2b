//! Interrupt controller, serial port, power control, PCI root and vCPUs.

use std::sync::Arc;
use std::time::Instant;

use arch::boot::Entry;
use arch::cpuid::{CpuidConfig, vcpu_cpuid};
use arch::layout::{self, gsi, port};
use arch::msr::BOOT_MSRS;
use arch::regs::FpuRegs;
use devices::bus::{Bus, BusDevice, Overlap};
use devices::legacy::{IoApic, Pin, Serial};
use devices::pci::{Ecam, LegacyConfig, PciRoot};
use devices::platform::{DebugPort, GenericEvent, PowerControl, PowerEvent, PowerValues};
use hypervisor::{Vcpu, VcpuSetup, Vm};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{BuildError, Ingredients, devices::msi_sink};
use crate::machine::{MachineEvent, Parts, SerialPort};
use crate::snapshot::MachineState;
use crate::vcpu::Buses;

/// The machine's buses while they are put together.
pub struct Platform {
    buses: Buses,
    /// The PCI bus.
    pub pci: PciRoot,
    serial: Option<SerialPort>,
    events: Arc<GenericEvent>,
    ioapic: Arc<IoApic>,
}

fn taken(e: Overlap) -> BuildError {
    BuildError::Plan(e.to_string())
}

impl Platform {
    /// Everything but PCI devices.
    pub fn new(from: &Ingredients<'_>, vm: &Arc<dyn Vm>) -> Result<Self, BuildError> {
        let ioapic = Arc::new(IoApic::new(msi_sink(vm)));
        let pin = |number| Arc::new(Pin { ioapic: ioapic.clone(), number });
        let events = Arc::new(GenericEvent::new(pin(gsi::GED)));
        let serial = serial(from, pin(gsi::COM1))?;
        let mut this = Self {
            buses: Buses { pio: Bus::new(), mmio: Bus::new() },
            pci: PciRoot::new(),
            serial,
            events: events.clone(),
            ioapic: ioapic.clone(),
        };
        this.mmio(layout::IOAPIC.start, layout::IOAPIC.size, ioapic)?;
        if let Some(serial) = this.serial.as_ref().map(|s| s.port.clone()) {
            this.port(port::COM1, u64::from(port::COM1_SIZE), serial)?;
        }
        this.port(port::DEBUG, 1, Arc::new(DebugPort::new(Instant::now())))?;
        let values = PowerValues {
            sleep_control: 0,
            reset: u64::from(port::RESET - port::SLEEP_CONTROL),
            reset_value: port::RESET_VALUE,
            sleep_enable: port::SLEEP_ENABLE,
            sleep_type_s5: port::SLEEP_TYPE_S5,
        };
        let report = from.report.clone();
        let power = PowerControl::new(
            values,
            Box::new(move |event| {
                report(match event {
                    PowerEvent::PowerOff => MachineEvent::PowerOff,
                    PowerEvent::Reset => MachineEvent::Reset,
                });
            }),
        );
        this.port(port::SLEEP_CONTROL, u64::from(port::GED_EVENTS - port::SLEEP_CONTROL), Arc::new(power))?;
        this.port(port::GED_EVENTS, 1, events)?;
        Ok(this)
    }

    fn port(&mut self, start: u16, len: u64, device: Arc<dyn BusDevice>) -> Result<(), BuildError> {
        self.buses.pio.insert(u64::from(start), len, device).map_err(taken)
    }

    /// Puts a device at an MMIO address.
    pub fn mmio(&mut self, start: u64, len: u64, device: Arc<dyn BusDevice>) -> Result<(), BuildError> {
        self.buses.mmio.insert(start, len, device).map_err(taken)
    }

    /// Ends the assembly: nothing is added to the buses any more.
    pub fn finish(mut self) -> Result<(Buses, Parts), BuildError> {
        let root = Arc::new(std::mem::take(&mut self.pci));
        let pci = Arc::new(LegacyConfig::new(root.clone()));
        self.port(port::PCI_CONFIG_ADDRESS, 8, pci.clone())?;
        self.mmio(layout::PCI_ECAM.start, layout::PCI_ECAM.size, Arc::new(Ecam::new(root)))?;
        let parts = Parts { serial: self.serial, events: self.events, ioapic: self.ioapic, pci };
        Ok((self.buses, parts))
    }
}

fn serial(from: &Ingredients<'_>, irq: Arc<Pin>) -> Result<Option<SerialPort>, BuildError> {
    let Some(stream) = from.serial.filter(|_| from.plan.serial) else { return Ok(None) };
    let fail = |source| BuildError::Host { what: "open the serial port", source };
    let drained = EventFd::new(EFD_NONBLOCK).map_err(fail)?;
    let signal = drained.try_clone().map_err(fail)?;
    let output = stream.writer().map_err(fail)?;
    let port = match from.saved.and_then(|saved| saved.state.serial.as_ref()) {
        None => Serial::new(irq, output, signal),
        Some(saved) => Serial::restored(irq, output, signal, saved).map_err(fail)?,
    };
    Ok(Some(SerialPort { port: Arc::new(port), drained }))
}

/// Makes the vCPUs; the first starts at `entry`.
pub fn create_vcpus(from: &Ingredients<'_>, vm: &dyn Vm, entry: Entry) -> Result<Vec<Box<dyn Vcpu>>, BuildError> {
    let plan = from.plan;
    let supported = &from.hypervisor.capabilities().cpuid;
    let config = CpuidConfig { vcpus: plan.vcpus, physical_bits: plan.physical_bits, nested: false };
    let mut vcpus = Vec::new();
    for id in 0..plan.vcpus {
        let mut vcpu = vm.create_vcpu(id)?;
        vcpu.setup(&VcpuSetup {
            cpuid: vcpu_cpuid(supported, &config, id),
            msrs: BOOT_MSRS.to_vec(),
            fpu: FpuRegs::default(),
            regs: (id == 0).then_some(entry.regs),
        })?;
        vcpus.push(vcpu);
    }
    Ok(vcpus)
}

/// Makes the vCPUs of a snapshot. The clock they count by is set first.
pub fn restore_vcpus(saved: &MachineState, vm: &dyn Vm) -> Result<Vec<Box<dyn Vcpu>>, BuildError> {
    vm.set_clock(saved.clock)?;
    let mut vcpus = Vec::new();
    for (id, state) in (0..).zip(&saved.vcpus) {
        let mut vcpu = vm.create_vcpu(id)?;
        vcpu.restore(state)?;
        vcpus.push(vcpu);
    }
    Ok(vcpus)
}
