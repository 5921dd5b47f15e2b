//! What CPUID tells each vCPU, made from what the host supports.
//!
//! The hypervisor's list of supported leaves describes the CPU it was asked on. Three things are changed for a guest: features
//! that cannot work there are hidden ([`HIDDEN_BITS`], [`HIDDEN_LEAVES`]), those that the hypervisor emulates are shown, and the
//! topology becomes one socket with as many cores as the guest has vCPUs, one thread each, where the APIC ID of a vCPU is its number.
//! References are to Intel's SDM volume 2A ("CPUID") and AMD's APM volume 3, appendix E.

use serde::{Deserialize, Serialize};

/// Leaf flag: the leaf has subleaves, `index` counts (KVM's `KVM_CPUID_FLAG_SIGNIFCANT_INDEX`).
pub const FLAG_SIGNIFICANT_INDEX: u32 = 1;

/// One leaf, or subleaf, of CPUID.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuidEntry {
    /// EAX going in.
    pub function: u32,
    /// ECX going in, if it matters.
    pub index: u32,
    /// [`FLAG_SIGNIFICANT_INDEX`] or 0.
    pub flags: u32,
    /// EAX coming out.
    pub eax: u32,
    /// EBX coming out.
    pub ebx: u32,
    /// ECX coming out.
    pub ecx: u32,
    /// EDX coming out.
    pub edx: u32,
}

/// What all vCPUs of a guest have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuidConfig {
    /// How many vCPUs there are, at least 1.
    pub vcpus: u32,
    /// Physical address bits to show; see [`physical_bits`].
    pub physical_bits: u8,
    /// Whether the guest may be a hypervisor itself (VMX or SVM).
    pub nested: bool,
}

/// An output register.
#[derive(Clone, Copy)]
enum Register {
    Ebx,
    Ecx,
    Edx,
}
use Register::{Ebx, Ecx, Edx};

const fn bits<const N: usize>(numbers: [u32; N]) -> u32 {
    let mut mask = 0;
    let mut i = 0;
    while i < N {
        mask |= 1 << numbers[i];
        i += 1;
    }
    mask
}

/// Feature bits (of subleaf 0) that are never shown, because nothing behind them works in the guest.
const HIDDEN_BITS: [(u32, Register, u32); 6] = [
    // 64-bit debug store, MONITOR, CPL-qualified debug store, SMX, SpeedStep, thermal monitor 2, performance capabilities, direct
    // cache access. OSXSAVE follows the guest's own CR4.
    (1, Ecx, bits([2, 3, 4, 6, 7, 8, 15, 18, 27])),
    // Debug store, ACPI thermal control, thermal monitor, pending break enable.
    (1, Edx, bits([21, 22, 29, 31])),
    // SGX, resource monitoring, resource allocation, processor trace.
    (7, Ebx, bits([2, 12, 15, 25])),
    // SGX launch control.
    (7, Ecx, bits([30])),
    // Hybrid CPU, PCONFIG, architectural LBR.
    (7, Edx, bits([15, 18, 19])),
    // Instruction based sampling, SKINIT, watchdog, lightweight profiling, node ID MSR, performance counters (3), MONITORX.
    (0x8000_0001, Ecx, bits([10, 12, 13, 15, 19, 23, 24, 28, 29])),
];

/// Leaves that are left out, so that they read as zeroes.
const HIDDEN_LEAVES: [u32; 14] = [
    0x5,         // MONITOR/MWAIT
    0xa,         // performance monitoring unit
    0xb,         // topology: made anew
    0x12,        // SGX
    0x14,        // processor trace
    0x1a,        // hybrid CPU
    0x1b,        // PCONFIG
    0x1c,        // last branch records
    0x1f,        // topology, second version: leaf 0xb says it all
    0x8000_001b, // instruction based sampling
    0x8000_001f, // memory encryption
    0x8000_0020, // resource allocation
    0x8000_0022, // performance counters
    0x8000_0026, // topology, AMD's second version
];

const LEAF_TOPOLOGY: u32 = 0xb;
/// Leaf 1 ECX: VMX.
const VMX: u32 = 1 << 5;
/// Leaf 1 ECX: x2APIC mode, the TSC deadline timer, and the mark of a virtual machine, all provided by the hypervisor.
pub(super) const EMULATED: u32 = 1 << 21 | 1 << 24 | 1 << 31;
/// Leaf 1 EDX: more than one logical processor.
pub(super) const HTT: u32 = 1 << 28;
/// Leaf 6 EAX: the APIC timer never stops.
const ARAT: u32 = 1 << 2;
/// Leaf 0x8000_0001 ECX: HTT means cores.
pub(super) const CMP_LEGACY: u32 = 1 << 1;
/// Leaf 0x8000_0001 ECX: SVM.
const SVM: u32 = 1 << 2;

/// The physical address bits a guest can use on a host with these supported leaves.
#[must_use]
pub fn physical_bits(supported: &[CpuidEntry]) -> u8 {
    /// What a CPU without the leaf has.
    const DEFAULT: u8 = 36;
    let Some(leaf) = supported.iter().find(|entry| entry.function == 0x8000_0008) else { return DEFAULT };
    // The second field, if set, is what second-level paging can map.
    let [bits, _linear, guest_bits, _] = leaf.eax.to_le_bytes();
    match guest_bits {
        0 => bits,
        guest_bits => bits.min(guest_bits),
    }
}

/// The leaves for the vCPU with the number (and APIC ID) `vcpu`.
#[must_use]
pub fn vcpu_cpuid(supported: &[CpuidEntry], config: &CpuidConfig, vcpu: u32) -> Vec<CpuidEntry> {
    let is_intel = supported.iter().any(|entry| entry.function == 0 && entry.ebx == u32::from_le_bytes(*b"Genu"));
    let visible = |entry: &&CpuidEntry| {
        !HIDDEN_LEAVES.contains(&entry.function) && (config.nested || entry.function != 0x8000_000a)
    };
    let mut leaves: Vec<_> = supported.iter().filter(visible).copied().collect();
    for leaf in &mut leaves {
        hide(leaf, config.nested);
        if leaf.function < 0x4000_0000 {
            adjust_basic(leaf, config, vcpu);
        } else {
            adjust_extended(leaf, config, vcpu, is_intel);
        }
    }
    leaves.extend(topology(config, vcpu));
    leaves
}

fn hide(leaf: &mut CpuidEntry, nested: bool) {
    if leaf.index == 0 {
        for &(_, register, mask) in HIDDEN_BITS.iter().filter(|hidden| hidden.0 == leaf.function) {
            match register {
                Ebx => leaf.ebx &= !mask,
                Ecx => leaf.ecx &= !mask,
                Edx => leaf.edx &= !mask,
            }
        }
    }
    match leaf.function {
        1 if !nested => leaf.ecx &= !VMX,
        0x8000_0001 if !nested => leaf.ecx &= !SVM,
        _ => {}
    }
}

/// Bits of an APIC ID that number the cores.
fn core_bits(vcpus: u32) -> u32 {
    u32::BITS - vcpus.saturating_sub(1).leading_zeros()
}

/// "One less than the number of APIC IDs set aside for `vcpus`", at most `max`.
fn ids_minus_one(vcpus: u32, max: u32) -> u32 {
    vcpus.clamp(1, 1 << 16).next_power_of_two().saturating_sub(1).min(max)
}

/// Says of a cache (leaf 4 or 0x8000_001d) which vCPUs share it: all a level 3 cache, none any other.
fn share_cache(leaf: &mut CpuidEntry, vcpus: u32) {
    let level = leaf.eax >> 5 & 7;
    let sharing = if level >= 3 { ids_minus_one(vcpus, 0xfff) } else { 0 };
    leaf.eax = (leaf.eax & !(0xfff << 14)) | sharing << 14;
}

fn adjust_basic(leaf: &mut CpuidEntry, config: &CpuidConfig, vcpu: u32) {
    match leaf.function {
        0 => leaf.eax = leaf.eax.max(LEAF_TOPOLOGY),
        1 => {
            // APIC ID, logical processors (both only 8 bits wide; the topology leaf has all), cache line size, brand index.
            leaf.ebx = (leaf.ebx & 0xffff) | (config.vcpus.min(0xff) << 16) | (vcpu & 0xff) << 24;
            leaf.ecx |= EMULATED;
            leaf.edx = if config.vcpus > 1 { leaf.edx | HTT } else { leaf.edx & !HTT };
        }
        4 if leaf.eax & 0x1f != 0 => {
            share_cache(leaf, config.vcpus);
            leaf.eax = (leaf.eax & !(0x3f << 26)) | ids_minus_one(config.vcpus, 0x3f) << 26;
        }
        6 => *leaf = CpuidEntry { eax: ARAT, ebx: 0, ecx: 0, edx: 0, ..*leaf },
        _ => {}
    }
}

fn adjust_extended(leaf: &mut CpuidEntry, config: &CpuidConfig, vcpu: u32, is_intel: bool) {
    match leaf.function {
        0x8000_0001 if !is_intel => {
            leaf.ecx = if config.vcpus > 1 { leaf.ecx | CMP_LEGACY } else { leaf.ecx & !CMP_LEGACY };
        }
        0x8000_0008 => {
            let [_, linear, guest, reserved] = leaf.eax.to_le_bytes();
            leaf.eax = u32::from_le_bytes([config.physical_bits, linear, guest.min(config.physical_bits), reserved]);
            if !is_intel {
                leaf.ecx =
                    (leaf.ecx & !0xf0ff) | core_bits(config.vcpus).min(0xf) << 12 | (config.vcpus.clamp(1, 256) - 1);
            }
        }
        0x8000_001d if leaf.eax & 0x1f != 0 => share_cache(leaf, config.vcpus),
        // Extended APIC ID; core number and one thread a core; node 0 of one.
        0x8000_001e => *leaf = CpuidEntry { eax: vcpu, ebx: vcpu & 0xff, ecx: 0, edx: 0, ..*leaf },
        _ => {}
    }
}

/// The subleaves of leaf 0xb: threads of a core, cores of the socket, end.
fn topology(config: &CpuidConfig, vcpu: u32) -> [CpuidEntry; 3] {
    const THREADS: u32 = 1;
    const CORES: u32 = 2;
    let level = |index: u32, kind: u32, shift: u32, count: u32| CpuidEntry {
        function: LEAF_TOPOLOGY,
        index,
        flags: FLAG_SIGNIFICANT_INDEX,
        eax: shift,
        ebx: count & 0xffff,
        ecx: kind << 8 | index,
        edx: vcpu,
    };
    [level(0, THREADS, 0, 1), level(1, CORES, core_bits(config.vcpus), config.vcpus), level(2, 0, 0, 0)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn leaf(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> CpuidEntry {
        CpuidEntry { function, index, flags: 0, eax, ebx, ecx, edx }
    }

    fn vendor(name: &[u8; 12], max: u32) -> CpuidEntry {
        let word = |at: usize| u32::from_le_bytes(*name[at..].first_chunk().unwrap());
        leaf(0, 0, [max, word(0), word(8), word(4)])
    }

    fn host(name: &[u8; 12]) -> Vec<CpuidEntry> {
        vec![
            vendor(name, 0xd),
            leaf(1, 0, [0x000a_0f11, 0x1234_0800, u32::MAX, u32::MAX]),
            leaf(4, 0, [0x7c00_4121, 1, 2, 3]),
            leaf(4, 3, [0x7c0f_c163, 1, 2, 3]),
            leaf(4, 4, [0; 4]),
            leaf(5, 0, [64, 64, 3, 0]),
            leaf(6, 0, [0x77, 2, 9, 0]),
            leaf(7, 0, [1, u32::MAX, u32::MAX, u32::MAX]),
            leaf(7, 1, [0x30, 0, 0, u32::MAX]),
            leaf(0xa, 0, [0x0730_0403, 0, 0, 0x603]),
            leaf(0xb, 0, [0; 4]),
            leaf(0xd, 0, [7, 0x340, 0x340, 0]),
            leaf(0x12, 0, [1; 4]),
            leaf(0x4000_0000, 0, [0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x4d]),
            leaf(0x4000_0001, 0, [0x0100_7efb, 0, 0, 0]),
            leaf(0x8000_0001, 0, [0, 0, u32::MAX, 0]),
            leaf(0x8000_0008, 0, [0x0030_3934, 0, 0x0003_701f, 0]),
            leaf(0x8000_000a, 0, [1, 2, 3, 4]),
            leaf(0x8000_001d, 0, [0x4121, 1, 2, 3]),
            leaf(0x8000_001d, 3, [0x3c163, 1, 2, 3]),
            leaf(0x8000_001e, 0, [9; 4]),
        ]
    }

    const CONFIG: CpuidConfig = CpuidConfig { vcpus: 4, physical_bits: 40, nested: false };

    fn find(leaves: &[CpuidEntry], function: u32, index: u32) -> CpuidEntry {
        let mut found = leaves.iter().filter(|leaf| leaf.function == function && leaf.index == index);
        let first = *found.next().unwrap();
        assert!(found.next().is_none(), "{function:#x} is there twice");
        first
    }

    fn is_there(leaves: &[CpuidEntry], function: u32) -> bool {
        leaves.iter().any(|leaf| leaf.function == function)
    }

    #[test]
    fn topology_is_one_socket_of_single_threaded_cores() {
        let leaves = vcpu_cpuid(&host(b"GenuineIntel"), &CONFIG, 3);
        let first = find(&leaves, 1, 0);
        assert_eq!(first.ebx, 0x0304_0800);
        assert_eq!(first.edx & HTT, HTT);
        assert_eq!(find(&leaves, 0xb, 0), CpuidEntry { flags: 1, ..leaf(0xb, 0, [0, 1, 0x100, 3]) });
        assert_eq!(find(&leaves, 0xb, 1), CpuidEntry { flags: 1, ..leaf(0xb, 1, [2, 4, 0x201, 3]) });
        assert_eq!(find(&leaves, 0xb, 2).ecx, 2);
        assert_eq!(find(&leaves, 4, 0).eax, 3 << 26 | 0x121);
        assert_eq!(find(&leaves, 4, 3).eax, 3 << 26 | 3 << 14 | 0x163);
        assert_eq!(find(&leaves, 4, 4).eax, 0);

        let single = vcpu_cpuid(&host(b"GenuineIntel"), &CpuidConfig { vcpus: 1, ..CONFIG }, 0);
        assert_eq!(find(&single, 1, 0).edx & HTT, 0);
        assert_eq!((find(&single, 0xb, 1).eax, find(&single, 0xb, 1).ebx), (0, 1));
    }

    #[test]
    fn amd_has_its_own_topology_leaves() {
        let leaves = vcpu_cpuid(&host(b"AuthenticAMD"), &CpuidConfig { vcpus: 5, ..CONFIG }, 4);
        assert_eq!(find(&leaves, 0x8000_0008, 0).ecx, 0x0003_3004);
        assert_eq!(find(&leaves, 0x8000_001e, 0), leaf(0x8000_001e, 0, [4, 4, 0, 0]));
        assert_eq!(find(&leaves, 0x8000_001d, 0).eax, 0x121);
        assert_eq!(find(&leaves, 0x8000_001d, 3).eax, 7 << 14 | 0x163);
        assert_eq!(find(&leaves, 0x8000_0001, 0).ecx & CMP_LEGACY, CMP_LEGACY);
    }

    #[test]
    fn what_cannot_work_is_hidden() {
        let leaves = vcpu_cpuid(&host(b"AuthenticAMD"), &CONFIG, 0);
        let ecx = find(&leaves, 1, 0).ecx;
        assert_eq!(ecx & bits([3, 5, 15, 27]), 0, "MONITOR, VMX, PDCM, OSXSAVE");
        assert_eq!(ecx & bits([21, 24, 31]), bits([21, 24, 31]), "x2APIC, TSC deadline, hypervisor");
        assert_eq!(find(&leaves, 7, 0).ebx & bits([2]), 0, "SGX");
        assert_eq!(find(&leaves, 7, 1).edx, u32::MAX, "only subleaf 0 is masked");
        assert_eq!(find(&leaves, 0x8000_0001, 0).ecx & (SVM | bits([29])), 0, "SVM, MONITORX");
        assert_eq!(find(&leaves, 6, 0), leaf(6, 0, [4, 0, 0, 0]));
        for function in [5, 0xa, 0x12, 0x8000_000a] {
            assert!(!is_there(&leaves, function), "{function:#x}");
        }

        let nested = vcpu_cpuid(&host(b"AuthenticAMD"), &CpuidConfig { nested: true, ..CONFIG }, 0);
        assert_eq!(find(&nested, 0x8000_0001, 0).ecx & SVM, SVM);
        assert_eq!(find(&nested, 1, 0).ecx & VMX, VMX);
        assert!(is_there(&nested, 0x8000_000a));
    }

    #[test]
    fn the_hypervisors_own_leaves_pass_unchanged() {
        let host = host(b"AuthenticAMD");
        let leaves = vcpu_cpuid(&host, &CONFIG, 0);
        for function in [0x4000_0000, 0x4000_0001, 0xd] {
            assert_eq!(find(&leaves, function, 0), find(&host, function, 0));
        }
    }

    #[test]
    fn address_bits_are_what_second_level_paging_can_map() {
        assert_eq!(physical_bits(&[]), 36);
        assert_eq!(physical_bits(&[leaf(0x8000_0008, 0, [0x3934, 0, 0, 0])]), 52);
        assert_eq!(physical_bits(&host(b"AuthenticAMD")), 48);
        let leaves = vcpu_cpuid(&host(b"AuthenticAMD"), &CONFIG, 0);
        assert_eq!(find(&leaves, 0x8000_0008, 0).eax, 0x0028_3928);
    }

    #[test]
    fn old_hosts_get_the_topology_leaf() {
        let leaves = vcpu_cpuid(&[vendor(b"AuthenticAMD", 7)], &CONFIG, 0);
        assert_eq!(find(&leaves, 0, 0).eax, 0xb);
        assert_eq!(leaves.len(), 4);
    }

    proptest! {
        #[test]
        fn apic_ids_are_unique_and_fit_the_core_bits(vcpus in 1..5000u32, host_words in any::<[u32; 4]>()) {
            let config = CpuidConfig { vcpus, ..CONFIG };
            let supported = [1, 4, 7, 0x8000_0008, 0x8000_001d].map(|function| leaf(function, 0, host_words));
            for vcpu in [0, vcpus / 2, vcpus - 1] {
                let leaves = vcpu_cpuid(&supported, &config, vcpu);
                let cores = find(&leaves, 0xb, 1);
                prop_assert_eq!(cores.edx, vcpu);
                prop_assert_eq!(vcpu >> cores.eax, 0, "all in one socket");
                prop_assert_eq!(cores.ebx, vcpus);
            }
        }
    }
}
