//! KVM (Documentation/virt/kvm/api.rst).

mod state_x86_64;
mod vcpu_x86_64;
mod vm;

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::Path;
use std::sync::{Arc, OnceLock};

use arch::cpuid::CpuidEntry;
use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::Cap;

pub use state_x86_64::VcpuState;
pub use vcpu_x86_64::{install_kick_handler, kick_signal};

use crate::{Capabilities, Error, Hypervisor, Vm};

/// The usual device node.
pub const DEVICE: &str = "/dev/kvm";

/// An open /dev/kvm.
pub struct Kvm {
    shared: Arc<Shared>,
    capabilities: Capabilities,
}

/// What machines and vCPUs need of it.
struct Shared {
    kvm: kvm_ioctls::Kvm,
    /// Model-specific registers that belong to a vCPU's state; asked for with the first snapshot.
    msr_list: OnceLock<Vec<u32>>,
}

impl Shared {
    fn msr_list(&self) -> Result<&[u32], Error> {
        if let Some(list) = self.msr_list.get() {
            return Ok(list);
        }
        let list = self.kvm.get_msr_index_list().map_err(operation("list model-specific registers"))?;
        Ok(self.msr_list.get_or_init(|| list.as_slice().to_vec()))
    }
}

fn operation(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> Error {
    move |e| Error::Operation { what, source: io::Error::from_raw_os_error(e.errno()) }
}

impl Kvm {
    /// Opens KVM and checks that it can do what is needed.
    ///
    /// # Errors
    /// If there is no KVM, it may not be used, or it is too old.
    pub fn open() -> Result<Self, Error> {
        Self::open_at(DEVICE)
    }

    /// As [`Kvm::open`], from another device node.
    ///
    /// # Errors
    /// As [`Kvm::open`].
    pub fn open_at(path: &str) -> Result<Self, Error> {
        let name = std::ffi::CString::new(path).map_err(|e| Error::Open { path: path.into(), source: e.into() })?;
        let kvm = kvm_ioctls::Kvm::new_with_path(name).map_err(|e| {
            let source = io::Error::from_raw_os_error(e.errno());
            match source.kind() {
                io::ErrorKind::NotFound => Error::Missing { path: path.into() },
                io::ErrorKind::PermissionDenied => Error::Permission { path: path.into() },
                _ => Error::Open { path: path.into(), source },
            }
        })?;
        for (cap, name) in [
            (Cap::UserMemory, "user memory regions"),
            (Cap::SplitIrqchip, "the split irqchip"),
            (Cap::Ioeventfd, "ioeventfd"),
            (Cap::SignalMsi, "message-signalled interrupts"),
            (Cap::ImmediateExit, "immediate exit"),
            (Cap::ReadonlyMem, "read-only memory slots"),
        ] {
            if !kvm.check_extension(cap) {
                return Err(Error::Capability(name));
            }
        }
        let supported =
            kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(operation("say which CPUID it supports"))?;
        let cpuid = supported.as_slice().iter().map(from_kvm).collect();
        let capabilities = Capabilities { max_vcpus: u32::try_from(kvm.get_max_vcpus()).unwrap_or(u32::MAX), cpuid };
        Ok(Self { shared: Arc::new(Shared { kvm, msr_list: OnceLock::new() }), capabilities })
    }
}

/// Whether the CPU has neither VMX nor SVM, though there is a KVM.
fn software_only() -> bool {
    let Ok(info) = std::fs::read_to_string(Path::new("/proc/cpuinfo")) else { return false };
    let mut flags = info.lines().filter(|l| l.starts_with("flags")).flat_map(str::split_whitespace);
    !flags.any(|f| f == "vmx" || f == "svm")
}

fn from_kvm(e: &kvm_bindings::kvm_cpuid_entry2) -> CpuidEntry {
    CpuidEntry { function: e.function, index: e.index, flags: e.flags, eax: e.eax, ebx: e.ebx, ecx: e.ecx, edx: e.edx }
}

impl Hypervisor for Kvm {
    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn software_only(&self) -> bool {
        software_only()
    }

    #[expect(unsafe_code, reason = "the crate's Kvm has no AsFd")]
    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        // SAFETY: it is open for as long as the object that is borrowed.
        Some(unsafe { BorrowedFd::borrow_raw(self.shared.kvm.as_raw_fd()) })
    }

    fn create_vm(&self) -> Result<Arc<dyn Vm>, Error> {
        // Waiting for a grace period can be interrupted by a signal: then it is tried again.
        loop {
            match self.shared.kvm.create_vm() {
                Ok(fd) => return Ok(Arc::new(vm::KvmVm::new(fd, self.shared.clone()))),
                Err(e) if e.errno() == libc::EINTR => {}
                Err(e) => return Err(operation("create a virtual machine")(e)),
            }
        }
    }
}
