//! A scripted machine: what tests of the VMM run on where there is no KVM.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use crate::{Capabilities, Error, Exit, ExitHandler, Hypervisor, MemorySlot, Vcpu, VcpuSetup, VcpuState, Vm};

/// One thing the fake vCPU does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Write to a port.
    PortWrite(u16, Vec<u8>),
    /// Read a byte from a port and remember it in [`Log::port_reads`].
    PortRead(u16),
    /// Write to an MMIO address.
    MmioWrite(u64, Vec<u8>),
    /// Come back with this.
    Exit(Exit),
}

/// What was done to the fake machine.
#[derive(Debug, Default)]
pub struct Log {
    /// Memory slots.
    pub slots: Vec<MemorySlot>,
    /// Messages delivered: address and data.
    pub msis: Vec<(u64, u32)>,
    /// Results of [`Step::PortRead`].
    pub port_reads: Vec<u8>,
    /// What the next log of written pages says of every slot.
    pub dirty: Vec<u64>,
    /// The guest's clock.
    pub clock: u64,
    /// Calls in order, by name.
    pub calls: Vec<&'static str>,
}

/// A hypervisor whose vCPU 0 plays a script; the others halt.
pub struct FakeHypervisor {
    capabilities: Capabilities,
    script: Vec<Step>,
    /// What happened.
    pub log: Arc<Mutex<Log>>,
}

impl FakeHypervisor {
    /// A hypervisor for up to 8 vCPUs.
    #[must_use]
    pub fn new(script: Vec<Step>) -> Self {
        let capabilities = Capabilities { max_vcpus: 8, cpuid: Vec::new() };
        Self { capabilities, script, log: Arc::default() }
    }
}

fn note(log: &Mutex<Log>, change: impl FnOnce(&mut Log)) {
    change(&mut log.lock().unwrap_or_else(PoisonError::into_inner));
}

impl Hypervisor for FakeHypervisor {
    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn software_only(&self) -> bool {
        false
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn create_vm(&self) -> Result<Arc<dyn Vm>, Error> {
        Ok(Arc::new(FakeVm { script: self.script.clone(), log: self.log.clone() }))
    }
}

struct FakeVm {
    script: Vec<Step>,
    log: Arc<Mutex<Log>>,
}

impl Vm for FakeVm {
    #[expect(unsafe_code, reason = "the trait's contract")]
    unsafe fn add_memory_slot(&self, slot: &MemorySlot) -> Result<(), Error> {
        note(&self.log, |l| {
            l.slots.push(*slot);
            l.calls.push("add_memory_slot");
        });
        Ok(())
    }

    fn dirty_log(&self, _: u32, _: u64) -> Result<Vec<u64>, Error> {
        let mut dirty = Vec::new();
        note(&self.log, |l| {
            l.calls.push("dirty_log");
            dirty = std::mem::take(&mut l.dirty);
        });
        Ok(dirty)
    }

    fn create_interrupt_controller(&self, _: u32) -> Result<(), Error> {
        note(&self.log, |l| l.calls.push("create_interrupt_controller"));
        Ok(())
    }

    fn create_vcpu(&self, id: u32) -> Result<Box<dyn Vcpu>, Error> {
        note(&self.log, |l| l.calls.push("create_vcpu"));
        let script = if id == 0 { self.script.clone().into() } else { VecDeque::new() };
        Ok(Box::new(FakeVcpu { script, log: self.log.clone() }))
    }

    fn add_ioeventfd(&self, _: u64, _: &EventFd) -> Result<(), Error> {
        Ok(())
    }

    fn remove_ioeventfd(&self, _: u64, _: &EventFd) -> Result<(), Error> {
        Ok(())
    }

    fn signal_msi(&self, address: u64, data: u32) -> Result<(), Error> {
        note(&self.log, |l| l.msis.push((address, data)));
        Ok(())
    }

    fn clock(&self) -> Result<u64, Error> {
        Ok(self.log.lock().unwrap_or_else(PoisonError::into_inner).clock)
    }

    fn set_clock(&self, nanoseconds: u64) -> Result<(), Error> {
        note(&self.log, |l| l.clock = nanoseconds);
        Ok(())
    }
}

struct FakeVcpu {
    script: VecDeque<Step>,
    log: Arc<Mutex<Log>>,
}

impl Vcpu for FakeVcpu {
    fn setup(&mut self, _: &VcpuSetup) -> Result<(), Error> {
        Ok(())
    }

    fn run(&mut self, handler: &mut dyn ExitHandler) -> Result<Exit, Error> {
        Ok(match self.script.pop_front() {
            Some(Step::PortWrite(port, data)) => {
                handler.port_write(port, &data);
                Exit::Handled
            }
            Some(Step::PortRead(port)) => {
                let mut data = [0];
                handler.port_read(port, &mut data);
                note(&self.log, |l| l.port_reads.extend(data));
                Exit::Handled
            }
            Some(Step::MmioWrite(address, data)) => {
                handler.mmio_write(address, &data);
                Exit::Handled
            }
            Some(Step::Exit(exit)) => exit,
            None => Exit::Halted,
        })
    }

    fn complete_access(&mut self, _: &mut dyn ExitHandler) -> Result<(), Error> {
        Ok(())
    }

    fn pre_fault(&mut self, _: u64, _: u64) -> Result<bool, Error> {
        Ok(false)
    }

    fn save(&self) -> Result<VcpuState, Error> {
        Ok(VcpuState::default())
    }

    fn restore(&mut self, _: &VcpuState) -> Result<(), Error> {
        note(&self.log, |l| l.calls.push("restore"));
        Ok(())
    }

    fn set_time(&mut self, _: &VcpuState) -> Result<(), Error> {
        note(&self.log, |l| l.calls.push("set_time"));
        Ok(())
    }

    fn notify_paused(&self) {}
}
