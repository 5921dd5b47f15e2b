//! The only crate that talks to /dev/kvm.
//!
//! [`Hypervisor`], [`Vm`] and [`Vcpu`] are what the VMM needs of a hypervisor and no more. [`kvm`] implements them;
//! [`fake`] is a scripted machine for tests.
#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

pub mod fake;
pub mod kvm;

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use arch::cpuid::CpuidEntry;
use arch::msr::MsrEntry;
use arch::regs::{CpuRegs, FpuRegs};
pub use kvm::VcpuState;
use vmm_sys_util::eventfd::EventFd;

/// Why the hypervisor cannot be used, or refused something.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The device node is not there.
    #[error(
        "{path} does not exist: load the KVM module (kvm_intel or kvm_amd) or enable virtualisation in the firmware"
    )]
    Missing {
        /// The device node.
        path: String,
    },
    /// The device node may not be opened.
    #[error("no permission to open {path}: add your user to the group that owns it (usually kvm)")]
    Permission {
        /// The device node.
        path: String,
    },
    /// The device node cannot be opened for another reason.
    #[error("cannot open {path}: {source}")]
    Open {
        /// The device node.
        path: String,
        /// The cause.
        source: io::Error,
    },
    /// The kernel's KVM cannot do what this VMM needs.
    #[error("this kernel's KVM lacks {0}: Linux 5.10 or newer is needed")]
    Capability(&'static str),
    /// An operation failed.
    #[error("KVM cannot {what}: {source}")]
    Operation {
        /// What was tried.
        what: &'static str,
        /// The cause.
        source: io::Error,
    },
}

/// What the host offers.
#[derive(Debug, Clone)]
pub struct Capabilities {
    /// The most vCPUs a machine may have.
    pub max_vcpus: u32,
    /// CPUID leaves a guest may see.
    pub cpuid: Vec<CpuidEntry>,
}

/// A range of guest physical memory and the host memory behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemorySlot {
    /// Number of the slot.
    pub slot: u32,
    /// First guest physical address.
    pub guest: u64,
    /// Bytes, a multiple of the page size.
    pub len: u64,
    /// First host address.
    pub host: u64,
    /// What vCPUs write to it is logged, for [`Vm::dirty_log`].
    pub log_dirty: bool,
}

/// With what a vCPU starts.
#[derive(Debug, Clone)]
pub struct VcpuSetup {
    /// Its CPUID.
    pub cpuid: Vec<CpuidEntry>,
    /// Model-specific registers.
    pub msrs: Vec<MsrEntry>,
    /// Floating point state.
    pub fpu: FpuRegs,
    /// Registers of the boot CPU; the others wait for the guest to start them.
    pub regs: Option<CpuRegs>,
}

/// A hypervisor.
pub trait Hypervisor: Send + Sync {
    /// What the host offers.
    fn capabilities(&self) -> &Capabilities;

    /// Whether it works without hardware virtualisation, where unmodified kernels do not run. Asked only when a guest has
    /// failed: finding out takes time.
    fn software_only(&self) -> bool;

    /// What a process that was forked has to keep open in order to use it.
    fn descriptor(&self) -> Option<BorrowedFd<'_>>;

    /// Makes an empty machine.
    ///
    /// # Errors
    /// If the hypervisor refuses.
    fn create_vm(&self) -> Result<Arc<dyn Vm>, Error>;
}

/// A machine. Add memory first, then the interrupt controller, then vCPUs: on recent kernels another order costs
/// milliseconds.
pub trait Vm: Send + Sync {
    /// Shows host memory to the guest.
    ///
    /// # Safety
    /// `slot.host..slot.host + slot.len` must be a mapping of this process that stays until the VM is gone, and that the
    /// rest of the process treats as memory that changes at any time.
    ///
    /// # Errors
    /// If the hypervisor refuses.
    #[expect(unsafe_code, reason = "the caller vouches for the mapping")]
    unsafe fn add_memory_slot(&self, slot: &MemorySlot) -> Result<(), Error>;

    /// The pages of slot `slot`, which has `len` bytes, that vCPUs have written since the log began or was last taken
    /// (KVM_GET_DIRTY_LOG): a bit for each, the lowest first.
    ///
    /// # Errors
    /// If it is not logged.
    fn dirty_log(&self, slot: u32, len: u64) -> Result<Vec<u64>, Error>;

    /// Makes the interrupt controllers that live in the hypervisor; on x86_64 the local APICs of the split irqchip.
    ///
    /// # Errors
    /// If the hypervisor refuses.
    fn create_interrupt_controller(&self, ioapic_pins: u32) -> Result<(), Error>;

    /// Makes vCPU number `id`.
    ///
    /// # Errors
    /// If the hypervisor refuses.
    fn create_vcpu(&self, id: u32) -> Result<Box<dyn Vcpu>, Error>;

    /// Makes a guest write to MMIO address `address` signal `event` without an exit.
    ///
    /// # Errors
    /// If the hypervisor refuses.
    fn add_ioeventfd(&self, address: u64, event: &EventFd) -> Result<(), Error>;

    /// Ends that.
    ///
    /// # Errors
    /// If it was not there.
    fn remove_ioeventfd(&self, address: u64, event: &EventFd) -> Result<(), Error>;

    /// Delivers a message-signalled interrupt.
    ///
    /// # Errors
    /// If no interrupt controller takes it.
    fn signal_msi(&self, address: u64, data: u32) -> Result<(), Error>;

    /// The guest's paravirtual clock, in nanoseconds since the machine began.
    ///
    /// # Errors
    /// If the hypervisor fails.
    fn clock(&self) -> Result<u64, Error>;

    /// Lets that clock go on from `nanoseconds`.
    ///
    /// # Errors
    /// If the hypervisor refuses.
    fn set_clock(&self, nanoseconds: u64) -> Result<(), Error>;
}

/// What the machine's devices answer during [`Vcpu::run`].
pub trait ExitHandler {
    /// The guest reads `data.len()` bytes from a port.
    fn port_read(&mut self, port: u16, data: &mut [u8]);
    /// The guest writes to a port.
    fn port_write(&mut self, port: u16, data: &[u8]);
    /// The guest reads from an MMIO address.
    fn mmio_read(&mut self, address: u64, data: &mut [u8]);
    /// The guest writes to an MMIO address.
    fn mmio_write(&mut self, address: u64, data: &[u8]);
}

/// Why [`Vcpu::run`] came back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Exit {
    /// The handler answered an access; run again.
    Handled,
    /// A signal arrived: look at what is wanted of this vCPU.
    Interrupted,
    /// The vCPU halted with nothing to wake it.
    Halted,
    /// Triple fault: the machine resets.
    Reset,
    /// The vCPU cannot go on. The text says why.
    Fault(String),
}

/// A virtual CPU. It belongs to the thread that runs it.
pub trait Vcpu: Send {
    /// Sets the state it starts with.
    ///
    /// # Errors
    /// If the hypervisor refuses a value.
    fn setup(&mut self, setup: &VcpuSetup) -> Result<(), Error>;

    /// Runs the guest until `handler` answered one access, or something else happened. A thread signalled with
    /// [`kvm::kick_signal`] comes back with [`Exit::Interrupted`], even if the signal came just before.
    ///
    /// # Errors
    /// If the hypervisor fails.
    fn run(&mut self, handler: &mut dyn ExitHandler) -> Result<Exit, Error>;

    /// Finishes the access that the last [`Exit::Handled`] left half done, without running the guest further, so that
    /// the vCPU's state is whole.
    ///
    /// # Errors
    /// If the hypervisor fails.
    fn complete_access(&mut self, handler: &mut dyn ExitHandler) -> Result<(), Error>;

    /// Enters `len` bytes of guest memory from `start` on into the hypervisor's page tables, as the guest's first look at each page would
    /// (KVM_PRE_FAULT_MEMORY); both are multiples of the page size. False if the hypervisor cannot do that.
    ///
    /// # Errors
    /// If the host has no memory for it, or the guest none there.
    fn pre_fault(&mut self, start: u64, len: u64) -> Result<bool, Error>;

    /// The state of a vCPU that is not running and has no access left half done.
    ///
    /// # Errors
    /// If the hypervisor fails.
    fn save(&self) -> Result<VcpuState, Error>;

    /// Gives a new vCPU the state of another one, instead of [`Vcpu::setup`]. The machine's clock is set before.
    ///
    /// # Errors
    /// If the hypervisor refuses a value.
    fn restore(&mut self, state: &VcpuState) -> Result<(), Error>;

    /// Sets the time stamp counter, and the timer that counts by it, to what `state` says, in a vCPU that has the rest of
    /// it and has not run.
    ///
    /// # Errors
    /// If the hypervisor refuses a value.
    fn set_time(&mut self, state: &VcpuState) -> Result<(), Error>;

    /// Tells the guest's clock that the machine was paused, so that its watchdogs do not fire.
    fn notify_paused(&self);
}
