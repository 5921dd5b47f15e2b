//! A machine's file descriptor.

use std::sync::Arc;

use kvm_bindings::{
    KVM_CAP_SPLIT_IRQCHIP, KVM_MEM_LOG_DIRTY_PAGES, kvm_clock_data, kvm_enable_cap, kvm_msi,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::EventFd;

use super::Shared;
use super::operation;
use super::vcpu_x86_64::KvmVcpu;
use crate::{Error, MemorySlot, Vcpu, Vm};

pub(super) struct KvmVm {
    fd: VmFd,
    shared: Arc<Shared>,
}

impl KvmVm {
    pub(super) fn new(fd: VmFd, shared: Arc<Shared>) -> Self {
        Self { fd, shared }
    }
}

impl Vm for KvmVm {
    #[expect(unsafe_code, reason = "KVM_SET_USER_MEMORY_REGION")]
    unsafe fn add_memory_slot(&self, slot: &MemorySlot) -> Result<(), Error> {
        let region = kvm_userspace_memory_region {
            slot: slot.slot,
            flags: if slot.log_dirty { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
            guest_phys_addr: slot.guest,
            memory_size: slot.len,
            userspace_addr: slot.host,
        };
        // SAFETY: the caller promises that the host range is a mapping that outlives the VM.
        unsafe { self.fd.set_user_memory_region(region) }.map_err(operation("add guest memory"))
    }

    fn dirty_log(&self, slot: u32, len: u64) -> Result<Vec<u64>, Error> {
        let bytes = usize::try_from(len).map_err(|e| std::io::Error::new(std::io::ErrorKind::InvalidInput, e));
        let log = bytes.and_then(|bytes| Ok(self.fd.get_dirty_log(slot, bytes)?));
        log.map_err(|source| Error::Operation { what: "tell what the guest has written", source })
    }

    fn create_interrupt_controller(&self, ioapic_pins: u32) -> Result<(), Error> {
        // The identity map and the TSS are where Intel CPUs without unrestricted guest mode need them.
        let tss = usize::try_from(arch::layout::KVM_TSS).unwrap_or(usize::MAX);
        self.fd
            .set_identity_map_address(arch::layout::KVM_IDENTITY_MAP)
            .map_err(operation("place its identity map"))?;
        self.fd.set_tss_address(tss).map_err(operation("place its task state segment"))?;
        let cap = kvm_enable_cap {
            cap: KVM_CAP_SPLIT_IRQCHIP,
            args: [u64::from(ioapic_pins), 0, 0, 0],
            ..kvm_enable_cap::default()
        };
        self.fd.enable_cap(&cap).map_err(operation("create the split irqchip"))
    }

    fn create_vcpu(&self, id: u32) -> Result<Box<dyn Vcpu>, Error> {
        let fd = self.fd.create_vcpu(u64::from(id)).map_err(operation("create a vCPU"))?;
        Ok(Box::new(KvmVcpu::new(fd, self.shared.clone())))
    }

    fn add_ioeventfd(&self, address: u64, event: &EventFd) -> Result<(), Error> {
        self.fd
            .register_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch)
            .map_err(operation("add an ioeventfd"))
    }

    fn remove_ioeventfd(&self, address: u64, event: &EventFd) -> Result<(), Error> {
        self.fd
            .unregister_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch)
            .map_err(operation("remove an ioeventfd"))
    }

    fn signal_msi(&self, address: u64, data: u32) -> Result<(), Error> {
        let [address_lo, address_hi] = split(address);
        let msi = kvm_msi { address_lo, address_hi, data, ..kvm_msi::default() };
        self.fd.signal_msi(msi).map(drop).map_err(operation("deliver an interrupt"))
    }

    fn clock(&self) -> Result<u64, Error> {
        self.fd.get_clock().map(|data| data.clock).map_err(operation("read the guest's clock"))
    }

    fn set_clock(&self, nanoseconds: u64) -> Result<(), Error> {
        let data = kvm_clock_data { clock: nanoseconds, ..kvm_clock_data::default() };
        self.fd.set_clock(&data).map_err(operation("set the guest's clock"))
    }
}

fn split(value: u64) -> [u32; 2] {
    let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
    [u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h])]
}
