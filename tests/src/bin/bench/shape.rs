//! A machine of as few calls to KVM as possible, with memory like a clone's: 256 MiB, a private mapping of a template in
//! a sealed file, all of it in use and 8 MiB of it changed.
#![expect(unsafe_code, reason = "mmap, a memory slot and reading what the guest may be writing")]

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::ptr;
use std::time::{Duration, Instant};

use kvm_bindings::{
    CpuId, KVM_CAP_SPLIT_IRQCHIP, KVM_MAX_CPUID_ENTRIES, KVM_MEM_LOG_DIRTY_PAGES, kvm_enable_cap,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use tests::tiny;

use crate::floor::{ENTRY, set_up};
use crate::{Failure, MEMORY_MIB};

/// Size of the memory.
pub const BYTES: usize = 256 << 20;
const _: () = assert!(BYTES as u64 == MEMORY_MIB << 20);
pub const PAGE: usize = 4096;

/// What all machines begin with.
pub struct Template {
    kvm: Kvm,
    cpuid: CpuId,
    memory: File,
}

impl Template {
    /// One with no page of zeroes.
    pub fn new() -> Result<Self, Failure> {
        let kvm = Kvm::new()?;
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
        let memory = File::from(memory_file()?);
        let some = vec![0x5a; 1 << 20];
        (0..MEMORY_MIB).try_for_each(|mib| memory.write_all_at(&some, mib << 20))?;
        memory.write_all_at(tiny::TOUCH, ENTRY)?;
        fcntl_add_seals(&memory, SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE)?;
        Ok(Self { kvm, cpuid, memory })
    }
}

/// An empty file in memory, for a template or for what is written out.
pub fn memory_file() -> Result<OwnedFd, Failure> {
    Ok(memfd_create("bench", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?)
}

/// Memory that is a template's until it is written to.
pub struct Memory {
    address: usize,
}

impl Memory {
    fn new(template: &Template) -> Result<Self, Failure> {
        // SAFETY: a new mapping.
        let address = unsafe {
            let access = libc::PROT_READ | libc::PROT_WRITE;
            libc::mmap(ptr::null_mut(), BYTES, access, libc::MAP_PRIVATE, template.memory.as_raw_fd(), 0)
        };
        if address == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error().into());
        }
        Ok(Self { address: address as usize })
    }

    /// Where it begins.
    pub fn address(&self) -> u64 {
        self.address as u64
    }

    /// Writes the `len` bytes from `at` on to the same place in a file.
    pub fn write_out(&self, file: &OwnedFd, at: usize, len: usize) -> Result<(), Failure> {
        if at.checked_add(len).is_none_or(|end| end > BYTES) {
            return Err("outside of the memory".into());
        }
        // SAFETY: inside of the mapping, by the check; the kernel reads it, whatever the guest does meanwhile.
        let written = unsafe {
            libc::pwrite(file.as_raw_fd(), (self.address + at) as *const libc::c_void, len, i64::try_from(at)?)
        };
        if usize::try_from(written) == Ok(len) { Ok(()) } else { Err(std::io::Error::last_os_error().into()) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the machine is gone, and nobody else has the address.
        unsafe { libc::munmap(self.address as *mut libc::c_void, BYTES) };
    }
}

/// The machine's only CPU.
pub struct Cpu(VcpuFd);

impl Cpu {
    /// Lets the guest run until it has printed `mark`, which is the next that it prints; how long that took.
    pub fn run_to(&mut self, mark: u8) -> Result<Duration, Failure> {
        let start = Instant::now();
        match self.0.run()? {
            VcpuExit::IoOut(0x3f8, [byte]) if *byte == mark => Ok(start.elapsed()),
            other => Err(format!("the guest stopped: {other:?}").into()),
        }
    }
}

/// The machine. What uses the memory goes before it.
pub struct Machine {
    pub cpu: Cpu,
    vm: VmFd,
    pub memory: Memory,
}

impl Machine {
    /// One whose guest has read from all of its memory, and then written to a part and read from all of it again.
    /// Also how long that writing takes when nothing is in its way.
    pub fn new(template: &Template) -> Result<(Self, Duration), Failure> {
        let memory = Memory::new(template)?;
        let vm = template.kvm.create_vm()?;
        set_slot(&vm, &memory, 0)?;
        let split = kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, args: [24, 0, 0, 0], ..kvm_enable_cap::default() };
        vm.enable_cap(&split)?;
        let vcpu = vm.create_vcpu(0)?;
        set_up(&vcpu, &template.cpuid)?;
        let mut cpu = Cpu(vcpu);
        for mark in [b'.', b':', b'.'] {
            cpu.run_to(mark)?;
        }
        let undisturbed = cpu.run_to(b':')?;
        cpu.run_to(b'.')?;
        Ok((Self { cpu, vm, memory }, undisturbed))
    }

    /// Has KVM note from now on which pages the guest writes to.
    pub fn log_dirty(&self) -> Result<(), Failure> {
        set_slot(&self.vm, &self.memory, KVM_MEM_LOG_DIRTY_PAGES)
    }

    /// The pages that were written to since that or the last time, a bit each.
    pub fn dirty(&self) -> Result<Vec<u64>, Failure> {
        Ok(self.vm.get_dirty_log(0, BYTES)?)
    }
}

fn set_slot(vm: &VmFd, memory: &Memory, flags: u32) -> Result<(), Failure> {
    let slot = kvm_userspace_memory_region {
        flags,
        memory_size: BYTES as u64,
        userspace_addr: memory.address(),
        ..kvm_userspace_memory_region::default()
    };
    // SAFETY: the mapping is dropped after the VM.
    unsafe { vm.set_user_memory_region(slot)? };
    Ok(())
}
