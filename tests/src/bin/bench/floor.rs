//! The least a clone can cost: a process that forks, maps a template's memory copy-on-write, makes a VM and a vCPU,
//! sets its state, confines itself and runs it. The same calls to KVM as the real one makes, no devices, one thread.
#![expect(unsafe_code, reason = "fork, mmap and the vCPU's memory, as little around them as possible")]

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::ptr;

use kvm_bindings::{
    CpuId, KVM_CAP_SPLIT_IRQCHIP, KVM_MAX_CPUID_ENTRIES, kvm_enable_cap, kvm_regs, kvm_segment,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use landlock::{ABI, Access, AccessFs, Ruleset, RulesetAttr};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};

use crate::{Failure, MEMORY_MIB};

/// Where the guest's program is.
pub const ENTRY: u64 = 0x10_0000;
/// Writes to a port for ever: mov dx, 0x3f8; out dx, al; jmp -3.
const PROGRAM: &[u8] = &[0x66, 0xba, 0xf8, 0x03, 0xee, 0xeb, 0xfd];
const BYTES: u64 = MEMORY_MIB << 20;

/// A process that makes such clones, and the way to ask it for one.
pub struct Floor {
    ask: UnixStream,
}

struct Template {
    kvm: Kvm,
    cpuid: CpuId,
    memory: File,
    filter: BpfProgram,
}

impl Floor {
    /// Starts the process.
    pub fn start() -> Result<Self, Failure> {
        let (ask, asked) = UnixStream::pair()?;
        // SAFETY: this process has one thread, and the child calls nothing but its own code.
        match unsafe { libc::fork() } {
            -1 => Err(std::io::Error::last_os_error().into()),
            0 => {
                drop(ask);
                let status = i32::from(zygote(asked).is_err());
                // SAFETY: it ends the process.
                unsafe { libc::_exit(status) }
            }
            _ => Ok(Self { ask }),
        }
    }

    /// Asks for a clone; returns when its guest has written to the port.
    pub fn clone_once(&mut self) -> Result<(), Failure> {
        self.ask.write_all(b"c")?;
        let mut mark = [0];
        self.ask.read_exact(&mut mark)?;
        if mark == *b"!" { Ok(()) } else { Err("the floor's clone failed".into()) }
    }
}

fn zygote(mut asked: UnixStream) -> Result<(), Failure> {
    // SAFETY: no handler; children are gone when they end.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
    let kvm = Kvm::new()?;
    let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
    // SAFETY: the name is a string, and the descriptor is new.
    let memory = unsafe { File::from(OwnedFd::from_raw_fd(libc::memfd_create(c"floor".as_ptr(), libc::MFD_CLOEXEC))) };
    memory.set_len(BYTES)?;
    memory.write_all_at(PROGRAM, ENTRY)?;
    // As long as a VMM's own: what it holds is of no account, its length is.
    let rules: BTreeMap<i64, Vec<_>> = (0..90).map(|number| (number, Vec::new())).collect();
    let filter =
        SeccompFilter::new(rules, SeccompAction::Trap, SeccompAction::Allow, std::env::consts::ARCH.try_into()?)?;
    let template = Template { kvm, cpuid, memory, filter: filter.try_into()? };
    let mut request = [0];
    while asked.read(&mut request)? == 1 {
        // SAFETY: as above.
        match unsafe { libc::fork() } {
            -1 => return Err(std::io::Error::last_os_error().into()),
            0 => {
                let mark = if run(&template).is_ok() { b"!" } else { b"?" };
                let _ = asked.write_all(mark);
                // SAFETY: it ends the process.
                unsafe { libc::_exit(0) }
            }
            _ => {}
        }
    }
    Ok(())
}

/// The state in which a guest begins that has no memory but its own, all of it at the addresses it says: 32-bit protected
/// mode at [`ENTRY`].
pub fn set_up(vcpu: &VcpuFd, cpuid: &CpuId) -> Result<(), Failure> {
    vcpu.set_cpuid2(cpuid)?;
    let mut sregs = vcpu.get_sregs()?;
    let flat = kvm_segment { limit: u32::MAX, present: 1, db: 1, s: 1, g: 1, type_: 3, selector: 0x18, ..sregs.ds };
    (sregs.ds, sregs.es, sregs.ss) = (flat, flat, flat);
    sregs.cs = kvm_segment { type_: 11, selector: 0x10, ..flat };
    sregs.cr0 = 0x11;
    vcpu.set_sregs(&sregs)?;
    Ok(vcpu.set_regs(&kvm_regs { rip: ENTRY, rflags: 2, ..kvm_regs::default() })?)
}

fn run(template: &Template) -> Result<(), Failure> {
    let len = usize::try_from(BYTES)?;
    // SAFETY: a new mapping, which stays for as long as the process.
    let memory = unsafe {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        libc::mmap(ptr::null_mut(), len, access, libc::MAP_PRIVATE, template.memory.as_raw_fd(), 0)
    };
    let vm = template.kvm.create_vm()?;
    let slot = kvm_userspace_memory_region {
        memory_size: BYTES,
        userspace_addr: memory as u64,
        ..kvm_userspace_memory_region::default()
    };
    // SAFETY: the mapping stays.
    unsafe { vm.set_user_memory_region(slot)? };
    vm.enable_cap(&kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, args: [24, 0, 0, 0], ..kvm_enable_cap::default() })?;
    let mut vcpu = vm.create_vcpu(0)?;
    set_up(&vcpu, &template.cpuid)?;
    // SAFETY: no dynamically enabled features.
    unsafe { vcpu.set_xsave(&vcpu.get_xsave()?)? };
    vcpu.set_lapic(&vcpu.get_lapic()?)?;
    Ruleset::default().handle_access(AccessFs::from_all(ABI::V1))?.create()?.restrict_self()?;
    seccompiler::apply_filter(&template.filter)?;
    match vcpu.run()? {
        VcpuExit::IoOut(0x3f8, _) => Ok(()),
        other => Err(format!("the floor's guest stopped: {other:?}").into()),
    }
}
