//! A vCPU's whole state, for snapshots (Documentation/virt/kvm/api.rst, the KVM_GET_* and KVM_SET_* calls named below).

use std::io;

use arch::cpuid::CpuidEntry;
use arch::msr::{IA32_TSC, IA32_TSC_DEADLINE, MsrEntry};
use kvm_bindings::{
    CpuId, Msrs, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use super::operation;
use crate::Error;

/// All that makes a stopped vCPU what it is; there is no nested state, since no guest may be a hypervisor. Most parts are structures of KVM's interface, which are the same bytes on
/// every kernel.
#[derive(Default, Serialize, Deserialize)]
pub struct VcpuState {
    /// What CPUID says.
    pub cpuid: Vec<CpuidEntry>,
    /// Ticks of the time stamp counter in a millisecond; 0 if the host does not say.
    pub tsc_khz: u32,
    /// Model-specific registers, in the order in which they are to be set.
    pub msrs: Vec<MsrEntry>,
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    xcrs: kvm_xcrs,
    debug_regs: kvm_debugregs,
    lapic: kvm_lapic_state,
    events: kvm_vcpu_events,
}

fn fam<T>(_: vmm_sys_util::fam::Error) -> Result<T, Error> {
    Err(Error::Operation { what: "take that many registers", source: io::ErrorKind::InvalidInput.into() })
}

pub(super) fn set_cpuid(fd: &VcpuFd, cpuid: &[CpuidEntry]) -> Result<(), Error> {
    let leaf = |e: &CpuidEntry| kvm_cpuid_entry2 {
        function: e.function,
        index: e.index,
        flags: e.flags,
        eax: e.eax,
        ebx: e.ebx,
        ecx: e.ecx,
        edx: e.edx,
        ..kvm_cpuid_entry2::default()
    };
    let leaves: Vec<_> = cpuid.iter().map(leaf).collect();
    fd.set_cpuid2(&CpuId::from_entries(&leaves).or_else(fam)?).map_err(operation("set a vCPU's CPUID"))
}

/// Sets registers, all or none counted as success: KVM stops at the first it does not take.
pub(super) fn set_msrs(fd: &VcpuFd, msrs: &[MsrEntry]) -> Result<(), Error> {
    let entry = |m: &MsrEntry| kvm_msr_entry { index: m.index, data: m.data, ..kvm_msr_entry::default() };
    let mut rest = msrs;
    while !rest.is_empty() {
        let entries: Vec<_> = rest.iter().map(entry).collect();
        let set = fd
            .set_msrs(&Msrs::from_entries(&entries).or_else(fam)?)
            .map_err(operation("set a vCPU's model-specific registers"))?;
        // A register this host does not have is no loss if nothing was in it.
        match rest.get(set) {
            None => break,
            Some(m) if m.data == 0 => rest = rest.get(set + 1..).unwrap_or_default(),
            Some(m) => {
                let why = format!("this host's KVM refuses {:#x} in register {:#x}", m.data, m.index);
                let source = io::Error::new(io::ErrorKind::Unsupported, why);
                return Err(Error::Operation { what: "set a vCPU's model-specific registers", source });
            }
        }
    }
    Ok(())
}

/// The registers of `list` that can be read.
fn get_msrs(fd: &VcpuFd, list: &[u32]) -> Result<Vec<MsrEntry>, Error> {
    let mut found = Vec::with_capacity(list.len());
    let mut rest = list;
    while !rest.is_empty() {
        let wanted: Vec<_> = rest.iter().map(|i| kvm_msr_entry { index: *i, ..kvm_msr_entry::default() }).collect();
        let mut msrs = Msrs::from_entries(&wanted).or_else(fam)?;
        let count = fd.get_msrs(&mut msrs).map_err(operation("read a vCPU's model-specific registers"))?;
        found.extend(msrs.as_slice().iter().take(count).map(|m| MsrEntry { index: m.index, data: m.data }));
        // KVM lists registers that only some CPUs have, and stops at the first that is not there.
        rest = rest.get(count + 1..).unwrap_or_default();
    }
    Ok(found)
}

/// Puts the deadline of the APIC's timer last, since it counts in ticks of a counter that is to be set before it. A
/// deadline that has just passed reads as 0 although its interrupt may not have been delivered: it is made due again,
/// and an interrupt too many is one that every kernel knows how to ignore.
fn order_timer(msrs: &mut Vec<MsrEntry>) {
    let now = msrs.iter().find(|m| m.index == IA32_TSC).map_or(0, |m| m.data);
    if let Some(at) = msrs.iter().position(|m| m.index == IA32_TSC_DEADLINE) {
        let mut deadline = msrs.remove(at);
        if deadline.data == 0 {
            deadline.data = now;
        }
        msrs.push(deadline);
    }
}

/// Reads everything but CPUID, which the guest cannot change; `msr_list` are the registers to read.
pub(super) fn save(fd: &VcpuFd, cpuid: Vec<CpuidEntry>, msr_list: &[u32]) -> Result<VcpuState, Error> {
    // The order matters in places: the run state first, since asking for it settles a pending INIT; the local APIC
    // before the registers of its timer (api.rst, KVM_GET_MP_STATE and KVM_GET_VCPU_EVENTS).
    let mp_state = fd.get_mp_state().map_err(operation("read a vCPU's run state"))?;
    let lapic = fd.get_lapic().map_err(operation("read a local APIC"))?;
    let mut msrs = get_msrs(fd, msr_list)?;
    order_timer(&mut msrs);
    Ok(VcpuState {
        cpuid,
        tsc_khz: fd.get_tsc_khz().unwrap_or(0),
        msrs,
        mp_state,
        regs: fd.get_regs().map_err(operation("read a vCPU's registers"))?,
        sregs: fd.get_sregs().map_err(operation("read a vCPU's segment registers"))?,
        xsave: fd.get_xsave().map_err(operation("read a vCPU's extended state"))?,
        xcrs: fd.get_xcrs().map_err(operation("read a vCPU's extended control registers"))?,
        debug_regs: fd.get_debug_regs().map_err(operation("read a vCPU's debug registers"))?,
        lapic,
        events: fd.get_vcpu_events().map_err(operation("read a vCPU's pending events"))?,
    })
}

/// By how much, in millionths, a host's time stamp counter may run at another pace: what a crystal may drift.
const TSC_TOLERANCE_PPM: u64 = 250;

fn set_tsc_khz(fd: &VcpuFd, then: u32) -> Result<(), Error> {
    let now = fd.get_tsc_khz().unwrap_or(0);
    if then == 0 || now == 0 || u64::from(then.abs_diff(now)) * 1_000_000 <= u64::from(then) * TSC_TOLERANCE_PPM {
        return Ok(());
    }
    fd.set_tsc_khz(then)
        .map_err(operation("run the guest's time stamp counter at the pace it had (the CPU is another)"))
}

/// Writes everything into a new vCPU.
pub(super) fn restore(fd: &VcpuFd, state: &VcpuState) -> Result<(), Error> {
    set_cpuid(fd, &state.cpuid)?;
    set_tsc_khz(fd, state.tsc_khz)?;
    fd.set_mp_state(state.mp_state).map_err(operation("set a vCPU's run state"))?;
    fd.set_regs(&state.regs).map_err(operation("set a vCPU's registers"))?;
    fd.set_sregs(&state.sregs).map_err(operation("set a vCPU's segment registers"))?;
    #[expect(unsafe_code, reason = "KVM_SET_XSAVE")]
    // SAFETY: the kernel reads more than the 4 KiB of the structure only in a process that asked for dynamically
    // enabled features with arch_prctl, and this one never does.
    unsafe { fd.set_xsave(&state.xsave) }.map_err(operation("set a vCPU's extended state"))?;
    fd.set_xcrs(&state.xcrs).map_err(operation("set a vCPU's extended control registers"))?;
    fd.set_debug_regs(&state.debug_regs).map_err(operation("set a vCPU's debug registers"))?;
    fd.set_lapic(&state.lapic).map_err(operation("set a local APIC"))?;
    set_msrs(fd, &state.msrs)?;
    fd.set_vcpu_events(&state.events).map_err(operation("set a vCPU's pending events"))
}

/// Writes the registers that count time once more; the timer's deadline comes after its counter, as in the state.
pub(super) fn set_time(fd: &VcpuFd, state: &VcpuState) -> Result<(), Error> {
    let time = |m: &&MsrEntry| [IA32_TSC, IA32_TSC_DEADLINE].contains(&m.index);
    let registers: Vec<MsrEntry> = state.msrs.iter().filter(time).copied().collect();
    set_msrs(fd, &registers)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn msr(index: u32, data: u64) -> MsrEntry {
        MsrEntry { index, data }
    }

    #[test]
    fn the_timer_comes_last_and_is_due_if_it_just_was() {
        let mut msrs = vec![msr(IA32_TSC_DEADLINE, 0), msr(IA32_TSC, 7), msr(1, 2)];
        order_timer(&mut msrs);
        assert_eq!(msrs, [msr(IA32_TSC, 7), msr(1, 2), msr(IA32_TSC_DEADLINE, 7)]);
        let mut msrs = vec![msr(IA32_TSC_DEADLINE, 9), msr(IA32_TSC, 7)];
        order_timer(&mut msrs);
        assert_eq!(msrs, [msr(IA32_TSC, 7), msr(IA32_TSC_DEADLINE, 9)]);
    }
}
