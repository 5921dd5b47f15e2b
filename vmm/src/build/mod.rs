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
use hypervisor::Hypervisor;
use passthrough::Grants;
use virtio_devices::device::Memory;
use virtio_devices::gpu::RendererFactory;
use virtio_devices::registry::{BuildError as DeviceError, Kind};
use vm_memory::{GuestAddress, GuestMemoryAtomic};
use vmm_config::VmConfig;

use crate::machine::Machine;
use crate::memory::{self, MemoryError};
use crate::plan::Plan;
use crate::snapshot::{MachineState, MemoryFile, OnDemand, SnapshotError, Source};
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
    pub listeners: &'a BTreeMap<String, OwnedFd>,
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
}

/// Guest RAM in a snapshot, and how it becomes a machine's.
#[derive(Clone, Copy)]
pub enum SavedMemory<'a> {
    /// All of it is verified and copied.
    Copy(&'a MemoryFile),
    /// The file, which has been verified, is mapped; what the guest writes is its own.
    CopyOnWrite(&'a Arc<File>),
    /// Each part is read when it is first touched.
    OnDemand(&'a Source),
}

/// Builds a machine; it is paused. Memory slots come before the interrupt controller, which is much cheaper that way.
///
/// # Errors
/// If the host lacks something the configuration names.
pub fn build(from: &Ingredients<'_>) -> Result<Machine, BuildError> {
    let plan = from.plan;
    let vm = from.hypervisor.create_vm()?;
    let ram = allocate_ram(from)?;
    let ondemand = match from.saved.map(|saved| saved.memory) {
        Some(SavedMemory::OnDemand(source)) => {
            Some(OnDemand::start(source, &ram, from.confinement.ondemand(), from.report.clone())?)
        }
        _ => None,
    };
    memory::add_ram(vm.as_ref(), &plan.ram, &ram)?;
    let built = devices::build(from, vm.as_ref())?;
    let windows = built.iter().filter_map(|d| d.window.clone()).collect();
    let grants = built.iter().filter_map(|d| d.grants()).collect();
    vm.create_interrupt_controller(arch::layout::gsi::IOAPIC_PINS)?;
    let mut platform = platform::Platform::new(from, &vm)?;
    let mem = GuestMemoryAtomic::new(ram.clone());
    let transports = devices::attach(from, built, &vm, &mem, &mut platform)?;
    let (buses, parts) = platform.finish()?;
    let vcpus = match from.saved {
        None => platform::create_vcpus(from, vm.as_ref(), payload::load(from, &ram)?)?,
        Some(saved) => {
            parts.restore(saved.state);
            let vcpus = platform::restore_vcpus(saved.state, vm.as_ref())?;
            // Not before the local APICs have their state, or the event's interrupt would be lost.
            let address = GuestAddress(VM_GENERATION_ID);
            VmGenId::new(address, parts.events.clone(), GED_EVENT_VM_GENERATION).renew(&ram)?;
            vcpus
        }
    };
    let start = Vcpus::start(vcpus, &Arc::new(buses), &from.confinement.vcpu(), &from.report);
    let vcpus = start.map_err(|source| BuildError::Host { what: "start a vCPU's thread", source })?;
    // Of what was touched here.
    ondemand.as_ref().map_or(Ok(()), OnDemand::check)?;
    Ok(Machine { vcpus, transports, parts, vm, plan: plan.clone(), _windows: windows, grants, ondemand, ram })
}

fn allocate_ram(from: &Ingredients<'_>) -> Result<Memory, BuildError> {
    let ranges = &from.plan.ram;
    Ok(match from.saved.map(|saved| saved.memory) {
        None | Some(SavedMemory::OnDemand(_)) => memory::allocate(ranges, from.config.memory.shared)?,
        Some(SavedMemory::CopyOnWrite(file)) => memory::map_private(ranges, file)?,
        Some(SavedMemory::Copy(file)) => {
            let ram = memory::allocate(ranges, from.config.memory.shared)?;
            file.copy_to(&ram)?;
            ram
        }
    })
}
