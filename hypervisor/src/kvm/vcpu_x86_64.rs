//! A vCPU's file descriptor, on x86_64.

use std::cell::Cell;
use std::io;
use std::ptr;
use std::sync::Arc;

use arch::cpuid::CpuidEntry;
use arch::lapic::{LAPIC_PAGE_SIZE, connect_local_interrupts};
use arch::regs::{CpuRegs, DescriptorTable, Segment};
use kvm_bindings::{KVMIO, kvm_dtable, kvm_fpu, kvm_pre_fault_memory, kvm_regs, kvm_segment};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::ioctl::ioctl_with_mut_ref;
use vmm_sys_util::ioctl_iowr_nr;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use super::Shared;
use super::operation;
use super::state_x86_64::{self, VcpuState, set_cpuid, set_msrs};
use crate::{Error, Exit, ExitHandler, Vcpu, VcpuSetup};

thread_local! {
    /// `kvm_run.immediate_exit` of the vCPU this thread runs, while it runs one.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
    /// A kick came while this thread was not running its vCPU; the next run comes back at once.
    static KICKED: Cell<bool> = const { Cell::new(false) };
}

/// The signal that makes [`Vcpu::run`] come back.
#[must_use]
pub fn kick_signal() -> i32 {
    SIGRTMIN()
}

#[expect(unsafe_code, reason = "a signal handler writes one byte of a mapping")]
extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let flag = IMMEDIATE_EXIT.get();
    if flag.is_null() {
        KICKED.set(true);
    } else {
        // SAFETY: the pointer is set only while this thread is inside `run`, which borrows the vCPU and with it the
        // mapping of kvm_run; a volatile byte store is async-signal-safe.
        unsafe { flag.write_volatile(1) };
    }
}

/// Installs the handler of [`kick_signal`] for the process.
///
/// # Errors
/// If the signal cannot be handled.
pub fn install_kick_handler() -> Result<(), Error> {
    register_signal_handler(kick_signal(), on_kick)
        .map_err(|e| Error::Operation { what: "be interrupted", source: io::Error::from_raw_os_error(e.errno()) })
}

pub(super) struct KvmVcpu {
    fd: VcpuFd,
    shared: Arc<Shared>,
    /// As it was set: without hardware virtualisation KVM_GET_CPUID2 answers with the host's.
    cpuid: Vec<CpuidEntry>,
}

impl KvmVcpu {
    pub(super) fn new(fd: VcpuFd, shared: Arc<Shared>) -> Self {
        Self { fd, shared, cpuid: Vec::new() }
    }

    fn set_registers(&self, regs: &CpuRegs) -> Result<(), Error> {
        let g = &regs.general;
        let general = kvm_regs {
            rax: g.rax,
            rbx: g.rbx,
            rcx: g.rcx,
            rdx: g.rdx,
            rsi: g.rsi,
            rdi: g.rdi,
            rsp: g.rsp,
            rbp: g.rbp,
            r8: g.r8,
            r9: g.r9,
            r10: g.r10,
            r11: g.r11,
            r12: g.r12,
            r13: g.r13,
            r14: g.r14,
            r15: g.r15,
            rip: g.rip,
            rflags: g.rflags,
        };
        let mut special = self.fd.get_sregs().map_err(operation("read a vCPU's segment registers"))?;
        let s = &regs.special;
        special.cs = segment(&s.cs);
        for register in [&mut special.ds, &mut special.es, &mut special.fs, &mut special.gs, &mut special.ss] {
            *register = segment(&s.data);
        }
        special.tr = segment(&s.tr);
        special.gdt = table(s.gdt);
        special.idt = table(s.idt);
        (special.cr0, special.cr3, special.cr4, special.efer) = (s.cr0, s.cr3, s.cr4, s.efer);
        self.fd.set_sregs(&special).map_err(operation("set a vCPU's segment registers"))?;
        self.fd.set_regs(&general).map_err(operation("set a vCPU's registers"))
    }

    fn connect_local_interrupts(&self) -> Result<(), Error> {
        let mut lapic = self.fd.get_lapic().map_err(operation("read a local APIC"))?;
        let mut page = lapic.regs.map(|b| b.to_ne_bytes()[0]);
        const { assert!(LAPIC_PAGE_SIZE == 1024) };
        connect_local_interrupts(&mut page);
        lapic.regs = page.map(|b| i8::from_ne_bytes([b]));
        self.fd.set_lapic(&lapic).map_err(operation("set a local APIC"))
    }
}

ioctl_iowr_nr!(KVM_PRE_FAULT_MEMORY, KVMIO, 0xd5, kvm_pre_fault_memory);

/// Does some of `range`, and makes it what is left.
#[expect(unsafe_code, reason = "kvm-ioctls does not have the call")]
fn pre_fault_some(vcpu: &VcpuFd, range: &mut kvm_pre_fault_memory) -> io::Result<()> {
    // SAFETY: the kernel reads and writes the structure, which is of the call's type, and changes nothing else of this process.
    match unsafe { ioctl_with_mut_ref(vcpu, KVM_PRE_FAULT_MEMORY(), range) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

fn segment(s: &Segment) -> kvm_segment {
    kvm_segment {
        base: s.base,
        limit: s.limit,
        selector: s.selector,
        type_: s.type_,
        present: s.present,
        dpl: s.dpl,
        db: s.db,
        s: s.s,
        l: s.l,
        g: s.g,
        ..kvm_segment::default()
    }
}

fn table(t: DescriptorTable) -> kvm_dtable {
    kvm_dtable { base: t.base, limit: t.limit, ..kvm_dtable::default() }
}

impl Vcpu for KvmVcpu {
    fn setup(&mut self, setup: &VcpuSetup) -> Result<(), Error> {
        set_cpuid(&self.fd, &setup.cpuid)?;
        self.cpuid.clone_from(&setup.cpuid);
        set_msrs(&self.fd, &setup.msrs)?;
        let fpu = kvm_fpu { fcw: setup.fpu.fcw, mxcsr: setup.fpu.mxcsr, ..kvm_fpu::default() };
        self.fd.set_fpu(&fpu).map_err(operation("set a vCPU's floating point registers"))?;
        if let Some(regs) = &setup.regs {
            self.set_registers(regs)?;
        }
        self.connect_local_interrupts()
    }

    fn run(&mut self, handler: &mut dyn ExitHandler) -> Result<Exit, Error> {
        let flag: *mut u8 = &raw mut self.fd.get_kvm_run().immediate_exit;
        IMMEDIATE_EXIT.set(flag);
        // Looked at only now: a kick from here on finds the flag.
        let result = if KICKED.take() { Ok(Exit::Interrupted) } else { run_once(&mut self.fd, handler) };
        IMMEDIATE_EXIT.set(ptr::null_mut());
        if result == Ok(Exit::Interrupted) {
            self.fd.set_kvm_immediate_exit(0);
        }
        match result {
            Ok(exit) => Ok(exit),
            Err(libc::EFAULT) => Ok(Exit::Fault(
                "the guest touched memory that is not there any more (a file behind it became shorter)".into(),
            )),
            Err(errno) => Err(Error::Operation { what: "run a vCPU", source: io::Error::from_raw_os_error(errno) }),
        }
    }

    fn complete_access(&mut self, handler: &mut dyn ExitHandler) -> Result<(), Error> {
        self.fd.set_kvm_immediate_exit(1);
        // One instruction may be several accesses, one after the other.
        let mut result = run_once(&mut self.fd, handler);
        for _ in 1..MAX_ACCESSES {
            if result != Ok(Exit::Handled) {
                break;
            }
            result = run_once(&mut self.fd, handler);
        }
        self.fd.set_kvm_immediate_exit(0);
        match result {
            Ok(Exit::Handled) => Err(Error::Operation { what: "pause a vCPU", source: io::ErrorKind::TimedOut.into() }),
            Ok(_) => Ok(()),
            Err(errno) => Err(Error::Operation { what: "pause a vCPU", source: io::Error::from_raw_os_error(errno) }),
        }
    }

    fn pre_fault(&mut self, start: u64, len: u64) -> Result<bool, Error> {
        let mut range = kvm_pre_fault_memory { gpa: start, size: len, ..kvm_pre_fault_memory::default() };
        while range.size > 0 {
            match pre_fault_some(&self.fd, &mut range) {
                Ok(()) => {}
                Err(e) if matches!(e.raw_os_error(), Some(libc::EINTR | libc::EAGAIN)) => {}
                // No such call, or no tables of the processor's to enter anything into.
                Err(e) if matches!(e.raw_os_error(), Some(libc::ENOTTY | libc::EINVAL | libc::EOPNOTSUPP)) => {
                    return Ok(false);
                }
                Err(source) => return Err(Error::Operation { what: "enter memory beforehand", source }),
            }
        }
        Ok(true)
    }

    fn save(&self) -> Result<VcpuState, Error> {
        state_x86_64::save(&self.fd, self.cpuid.clone(), self.shared.msr_list()?)
    }

    fn restore(&mut self, state: &VcpuState) -> Result<(), Error> {
        state_x86_64::restore(&self.fd, state)?;
        self.cpuid.clone_from(&state.cpuid);
        // Its clock stood still.
        self.notify_paused();
        Ok(())
    }

    fn set_time(&mut self, state: &VcpuState) -> Result<(), Error> {
        state_x86_64::set_time(&self.fd, state)
    }

    fn notify_paused(&self) {
        // Refused when the guest uses no kvmclock: then there is nothing to tell.
        if let Err(e) = self.fd.kvmclock_ctrl() {
            log::debug!("the guest has no clock to tell of the pause: {e}");
        }
    }
}

/// More accesses than one instruction makes: a repeated string instruction comes out page by page.
const MAX_ACCESSES: usize = 8192;

/// The largest single port access; longer ones are repeated string instructions.
const MAX_PORT_ACCESS: usize = 4;

fn run_once(fd: &mut VcpuFd, handler: &mut dyn ExitHandler) -> Result<Exit, i32> {
    let exit = match fd.run() {
        Ok(exit) => exit,
        Err(e) if e.errno() == libc::EINTR || e.errno() == libc::EAGAIN => return Ok(Exit::Interrupted),
        Err(e) => return Err(e.errno()),
    };
    Ok(match exit {
        VcpuExit::IoIn(port, data) if data.len() <= MAX_PORT_ACCESS => {
            handler.port_read(port, data);
            Exit::Handled
        }
        // String instructions: byte by byte, the only width that ports behind a FIFO have.
        VcpuExit::IoIn(port, data) => {
            data.chunks_mut(1).for_each(|byte| handler.port_read(port, byte));
            Exit::Handled
        }
        VcpuExit::IoOut(port, data) if data.len() <= MAX_PORT_ACCESS => {
            handler.port_write(port, data);
            Exit::Handled
        }
        VcpuExit::IoOut(port, data) => {
            data.chunks(1).for_each(|byte| handler.port_write(port, byte));
            Exit::Handled
        }
        VcpuExit::MmioRead(address, data) => {
            handler.mmio_read(address, data);
            Exit::Handled
        }
        VcpuExit::MmioWrite(address, data) => {
            handler.mmio_write(address, data);
            Exit::Handled
        }
        VcpuExit::Intr | VcpuExit::IrqWindowOpen => Exit::Interrupted,
        VcpuExit::IoapicEoi(_) | VcpuExit::SetTpr => Exit::Handled,
        VcpuExit::Hlt => Exit::Halted,
        VcpuExit::Shutdown => Exit::Reset,
        VcpuExit::FailEntry(reason, cpu) => {
            Exit::Fault(format!("the processor refused to enter the guest (reason {reason:#x} on CPU {cpu})"))
        }
        VcpuExit::InternalError => Exit::Fault("KVM could not emulate an instruction of the guest".into()),
        other => Exit::Fault(format!("unexpected exit {other:?}")),
    })
}
