//! Whether a guest that has begun on one host can go on on another: what CPUID told it must be there.

use super::cpuid::{CMP_LEGACY, CpuidEntry, EMULATED, HTT};

/// A leaf of feature bits.
struct Leaf {
    function: u32,
    index: u32,
    /// For EAX, EBX, ECX and EDX the bits that are not the host's to have; nothing where there are no feature bits.
    registers: [Option<u32>; 4],
}

const fn leaf(function: u32, index: u32, registers: [Option<u32>; 4]) -> Leaf {
    Leaf { function, index, registers }
}

/// Leaf 1 ECX: OSXSAVE, which follows the guest's own CR4.
const OSXSAVE: u32 = 1 << 27;
/// Leaf 1 EDX: there is an APIC, which follows the guest's own base address register.
const APIC: u32 = 1 << 9;
/// Leaf 7 ECX: OSPKE, which follows CR4 too.
const OSPKE: u32 = 1 << 4;

const FEATURES: [Leaf; 9] = [
    leaf(0x1, 0, [None, None, Some(EMULATED | OSXSAVE), Some(HTT | APIC)]),
    leaf(0x7, 0, [None, Some(0), Some(OSPKE), Some(0)]),
    leaf(0x7, 1, [Some(0), None, None, Some(0)]),
    // Parts of the extended state, and how they can be saved.
    leaf(0xd, 0, [Some(0), None, None, Some(0)]),
    leaf(0xd, 1, [Some(0), None, None, None]),
    leaf(0x8000_0001, 0, [None, None, Some(CMP_LEGACY), Some(0)]),
    leaf(0x8000_0007, 0, [None, None, None, Some(0)]),
    leaf(0x8000_0008, 0, [None, Some(0), None, None]),
    leaf(0x8000_0021, 0, [Some(0), None, None, None]),
];

fn find(list: &[CpuidEntry], function: u32, index: u32) -> [u32; 4] {
    let found = list.iter().find(|e| (e.function, e.index) == (function, index));
    found.map_or([0; 4], |e| [e.eax, e.ebx, e.ecx, e.edx])
}

/// What a guest that was told `then` may use and a host that supports `now` does not have, each in a few words; nothing
/// if the guest can go on there.
#[must_use]
pub fn lacking(then: &[CpuidEntry], now: &[CpuidEntry]) -> Vec<String> {
    let [_, maker_then @ ..] = find(then, 0, 0);
    let [_, maker_now @ ..] = find(now, 0, 0);
    if maker_then != maker_now {
        return vec!["its maker".into()];
    }
    let mut all = Vec::new();
    for Leaf { function, index, registers } in &FEATURES {
        let values = find(then, *function, *index).into_iter().zip(find(now, *function, *index));
        for ((name, provided), (then, now)) in ["EAX", "EBX", "ECX", "EDX"].into_iter().zip(registers).zip(values) {
            let Some(provided) = provided else { continue };
            let missing = then & !now & !provided;
            let bits = (0..32).filter(|bit| missing >> bit & 1 == 1);
            all.extend(bits.map(|bit| format!("CPUID {function:#x}.{index} {name} bit {bit}")));
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> CpuidEntry {
        CpuidEntry { function, eax, ebx, ecx, edx, ..CpuidEntry::default() }
    }

    #[test]
    fn what_is_missing_is_named() {
        let host = [entry(0, [16, 1, 2, 3]), entry(1, [0, 0, 0b110, 0]), entry(7, [0, 1 << 5, 0, 0])];
        assert!(lacking(&host, &host).is_empty());
        let less = [host[0], host[1]];
        assert!(lacking(&less, &host).is_empty(), "more than was there is no harm");
        assert_eq!(lacking(&host, &less), ["CPUID 0x7.0 EBX bit 5"]);
        // What the hypervisor provides or the guest itself switches is no feature of the host.
        let guest = [host[0], entry(1, [0, 0, 0b110 | EMULATED | OSXSAVE, HTT | APIC]), host[2]];
        assert!(lacking(&guest, &host).is_empty());
        assert_eq!(lacking(&[entry(0, [16, 9, 2, 3])], &host), ["its maker"]);
    }
}
