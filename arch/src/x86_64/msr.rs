//! Model-specific registers that a vCPU starts with (Intel SDM volume 4).

use serde::{Deserialize, Serialize};

/// One model-specific register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsrEntry {
    /// Its number.
    pub index: u32,
    /// Its value.
    pub data: u64,
}

/// Time stamp counter.
pub const IA32_TSC: u32 = 0x10;
const IA32_SYSENTER_CS: u32 = 0x174;
const IA32_SYSENTER_ESP: u32 = 0x175;
const IA32_SYSENTER_EIP: u32 = 0x176;
/// At which count of the time stamp counter the local APIC's timer is due.
pub const IA32_TSC_DEADLINE: u32 = 0x6e0;
const IA32_MISC_ENABLE: u32 = 0x1a0;
const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;
const IA32_STAR: u32 = 0xc000_0081;
const IA32_LSTAR: u32 = 0xc000_0082;
const IA32_CSTAR: u32 = 0xc000_0083;
const IA32_FMASK: u32 = 0xc000_0084;
const IA32_KERNEL_GS_BASE: u32 = 0xc000_0102;

/// `IA32_MISC_ENABLE`: fast string instructions.
const FAST_STRINGS: u64 = 1;
/// `IA32_MTRR_DEF_TYPE`: MTRRs on, write-back unless one says otherwise. The fixed-range ones stay off: unset, they would make the
/// first MiB uncached.
const MTRR_ENABLE_WRITE_BACK: u64 = 1 << 11 | 6;

/// The registers to set on every vCPU before it first runs; all others keep their reset values.
pub const BOOT_MSRS: [MsrEntry; 11] = [
    MsrEntry { index: IA32_SYSENTER_CS, data: 0 },
    MsrEntry { index: IA32_SYSENTER_ESP, data: 0 },
    MsrEntry { index: IA32_SYSENTER_EIP, data: 0 },
    MsrEntry { index: IA32_STAR, data: 0 },
    MsrEntry { index: IA32_CSTAR, data: 0 },
    MsrEntry { index: IA32_KERNEL_GS_BASE, data: 0 },
    MsrEntry { index: IA32_FMASK, data: 0 },
    MsrEntry { index: IA32_LSTAR, data: 0 },
    MsrEntry { index: IA32_TSC, data: 0 },
    MsrEntry { index: IA32_MISC_ENABLE, data: FAST_STRINGS },
    MsrEntry { index: IA32_MTRR_DEF_TYPE, data: MTRR_ENABLE_WRITE_BACK },
];
