//! Carries out a plan: the one recipe by which a machine comes into being.

mod devices;
mod payload;
mod platform;

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use ::devices::platform::{VmGenId, VmGenIdError};
use arch::layout::{VM_GENERATION_ID, port::GED_EVENT_VM_GENERATION};
use hypervisor::{Hypervisor, Vcpu, Vm};
use passthrough::Grants;
use virtio_devices::device::Memory;
use virtio_devices::gpu::RendererFactory;
use virtio_devices::registry::{BuildError as DeviceError, Kind, WindowMemory};
use vm_memory::{GuestAddress, GuestMemoryAtomic};
use vmm_config::VmConfig;

use devices::Devices;

use crate::machine::Machine;
use crate::memory::{self, MemoryError};
use crate::plan::Plan;
use crate::snapshot::{MachineState, MemoryFile, OnDemand, SnapshotError, Source, WorkingSet};
use crate::stream::Stream;
use crate::vcpu::{Report, ThreadSetup, Vcpus};

/// Why a machine could not be built: one sentence for the user.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// KVM refused.
    #[error(transparent)]
    Hypervisor(#[from] hypervisor::Error),
    /// No memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A device.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The snapshot cannot be used.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// Kernel or initramfs cannot be opened.
    #[error("cannot open the {what} {}: {source}", path.display())]
    Open {
        /// Kernel or initramfs.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// Kernel, initramfs and command line cannot be loaded.
    #[error("cannot boot {}: {source}", path.display())]
    Boot {
        /// The kernel.
        path: PathBuf,
        /// The cause.
        source: arch::boot::Error,
    },
    /// ACPI tables cannot be made.
    #[error("cannot describe the machine to the guest: {0}")]
    Acpi(#[from] arch::acpi::Error),
    /// The machine cannot be told apart from others.
    #[error(transparent)]
    Generation(#[from] VmGenIdError),
    /// The plan is not one of this program's: a defect, or a damaged snapshot.
    #[error("the machine's plan is inconsistent: {0}")]
    Plan(String),
    /// The host is out of something.
    #[error("cannot {what}: {source}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// The cause.
        source: std::io::Error,
    },
}

/// System-call filters by kind of thread.
pub trait Confinement: Send + Sync {
    /// What a vCPU's thread does first.
    fn vcpu(&self) -> ThreadSetup;
    /// What a device's thread does first.
    fn device(&self, kind: &Kind) -> ThreadSetup;
    /// What the thread that restores memory on demand does first.
    fn ondemand(&self) -> ThreadSetup;
}

impl<C: Confinement> Confinement for Arc<C> {
    fn vcpu(&self) -> ThreadSetup {
        self.as_ref().vcpu()
    }

    fn device(&self, kind: &Kind) -> ThreadSetup {
        self.as_ref().device(kind)
    }

    fn ondemand(&self) -> ThreadSetup {
        self.as_ref().ondemand()
    }
}

/// All that a machine is made from.
pub struct Ingredients<'a> {
    /// The definition.
    pub config: &'a VmConfig,
    /// Where everything goes.
    pub plan: &'a Plan,
    /// Who makes virtual machines.
    pub hypervisor: &'a dyn Hypervisor,
    /// The serial port's stream.
    pub serial: Option<&'a Stream>,
    /// The console's stream.
    pub console: Option<&'a Stream>,
    /// Listening sockets that were handed down, by the identifier of their device.
    pub handed: &'a BTreeMap<String, OwnedFd>,
    /// What was granted through each device, by its identifier, when the machine was started before.
    pub grants: &'a BTreeMap<String, Grants>,
    /// The engine of virtio-gpu.
    pub renderer: &'a dyn RendererFactory,
    /// System-call filters.
    pub confinement: &'a dyn Confinement,
    /// Whom the machine tells what happens.
    pub report: Report,
    /// What the machine was in the middle of, if it comes from a snapshot; the plan is the snapshot's then.
    pub saved: Option<Saved<'a>>,
}

/// A snapshot that a machine is made from.
#[derive(Clone, Copy)]
pub struct Saved<'a> {
    /// The parts' states.
    pub state: &'a MachineState,
    /// Guest RAM.
    pub memory: SavedMemory<'a>,
    /// What the guest has of a mapped file before it runs.
    pub working_set: Option<&'a WorkingSet>,
}

/// Guest RAM in a snapshot, and how it becomes a machine's.
#[derive(Clone, Copy)]
pub enum SavedMemory<'a> {
    /// All of it is verified and copied.
    Copy(&'a MemoryFile),
    /// All of the file, which has been verified, is copied.
    CopyOf(&'a Arc<File>),
    /// The file, which has been verified, is mapped; what the guest writes is its own.
    CopyOnWrite(&'a Arc<File>),
    /// Each part is read when it is first touched.
    OnDemand(&'a Source),
}

/// What a machine has before it is known what it will be connected to: memory, the windows of its devices, interrupt
/// controller and vCPUs. It is most of the work. Memory slots come before the interrupt controller, which is much cheaper
/// that way.
pub struct Chassis {
    // Dropped in this order: the VM before what it shows.
    vcpus: Vec<Box<dyn Vcpu>>,
    vm: Arc<dyn Vm>,
    windows: BTreeMap<usize, WindowMemory>,
    ondemand: Option<OnDemand>,
    ram: Memory,
}

impl Chassis {
    /// Begins a machine. Streams and sockets of `from` are not looked at.
    ///
    /// # Errors
    /// If the host lacks something the configuration names.
    pub fn new(from: &Ingredients<'_>) -> Result<Self, BuildError> {
        let plan = from.plan;
        let vm = from.hypervisor.create_vm()?;
        let ram = allocate_ram(from)?;
        let ondemand = match from.saved.map(|saved| saved.memory) {
            Some(SavedMemory::OnDemand(source)) => {
                Some(OnDemand::start(source, &ram, from.confinement.ondemand(), from.report.clone())?)
            }
            _ => None,
        };
        memory::set_ram(vm.as_ref(), &plan.ram, &ram, false)?;
        let windows = devices::map_windows(from, vm.as_ref())?;
        vm.create_interrupt_controller(arch::layout::gsi::IOAPIC_PINS)?;
        let vcpus = match from.saved {
            None => platform::create_vcpus(from, vm.as_ref(), payload::load(from, &ram)?)?,
            Some(saved) => platform::restore_vcpus(saved.state, vm.as_ref())?,
        };
        Ok(Self { vcpus, windows, vm, ondemand, ram })
    }

    /// Sets the clocks to what `saved` says once more, for a machine that has waited since they were.
    ///
    /// # Errors
    /// If the hypervisor refuses.
    pub fn set_clocks(&mut self, saved: &MachineState) -> Result<(), BuildError> {
        self.vm.set_clock(saved.clock)?;
        let mut vcpus = self.vcpus.iter_mut().zip(&saved.vcpus);
        Ok(vcpus.try_for_each(|(vcpu, state)| vcpu.set_time(state))?)
    }

    /// Lets the guest of a machine like `plan` have `set` before it runs: in this process, and in the hypervisor's tables, so that its first
    /// look at a page is no exit. What cannot be had is left for the guest to touch.
    pub fn have(&mut self, set: &WorkingSet, plan: &Plan) {
        set.populate(&self.ram);
        let Some(vcpu) = self.vcpus.first_mut() else { return };
        for (start, len) in set.in_guest(plan) {
            match vcpu.pre_fault(start, len) {
                Ok(true) => {}
                Ok(false) => return,
                Err(e) => return log::debug!("the guest has nothing from {start:#x} on beforehand: {e}"),
            }
        }
    }

    /// Completes the machine; it is paused.
    ///
    /// # Errors
    /// As [`Chassis::new`].
    pub fn build(self, from: &Ingredients<'_>) -> Result<Machine, BuildError> {
        let Self { vcpus, windows, vm, ondemand, ram } = self;
        let mut platform = platform::Platform::new(from, &vm)?;
        let mem = GuestMemoryAtomic::new(ram.clone());
        let mappings = windows.values().map(|window| window.mapping.clone()).collect();
        let Devices { transports, grants } = devices::build(from, windows, &vm, &mem, &mut platform)?;
        let (buses, parts) = platform.finish()?;
        if let Some(saved) = from.saved {
            parts.restore(saved.state);
            // Not before the local APICs have their state, or the event's interrupt would be lost.
            let address = GuestAddress(VM_GENERATION_ID);
            VmGenId::new(address, parts.events.clone(), GED_EVENT_VM_GENERATION).renew(&ram)?;
        }
        let start = Vcpus::start(vcpus, &Arc::new(buses), &from.confinement.vcpu(), &from.report);
        let vcpus = start.map_err(|source| BuildError::Host { what: "start a vCPU's thread", source })?;
        // Of what was touched here.
        ondemand.as_ref().map_or(Ok(()), OnDemand::check)?;
        Ok(Machine { vcpus, transports, parts, vm, plan: from.plan.clone(), windows: mappings, grants, ondemand, ram })
    }
}

fn allocate_ram(from: &Ingredients<'_>) -> Result<Memory, BuildError> {
    let ranges = &from.plan.ram;
    Ok(match from.saved.map(|saved| saved.memory) {
        None | Some(SavedMemory::OnDemand(_)) => memory::allocate(ranges, from.config.memory.shared)?,
        Some(SavedMemory::CopyOnWrite(file)) => {
            let ram = memory::map_private(ranges, file)?;
            if let Some(set) = from.saved.and_then(|saved| saved.working_set) {
                set.populate(&ram);
            }
            ram
        }
        Some(SavedMemory::CopyOf(file)) => memory::copy_of(ranges, file, from.config.memory.shared)?,
        Some(SavedMemory::Copy(file)) => {
            let ram = memory::allocate(ranges, from.config.memory.shared)?;
            file.copy_to(&ram)?;
            ram
        }
    })
}
