//! Register values with which a vCPU starts, and the descriptor and page tables they point to.

use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError};

use super::layout::{BOOT_STACK_TOP, GDT_START, IDT_START, PD_START, PDPT_START, PML4_START};

/// CR0: protected mode.
const CR0_PE: u64 = 1 << 0;
/// CR0: the FPU is a 387 (always 1 on a 64-bit CPU).
const CR0_ET: u64 = 1 << 4;
/// CR0: paging.
const CR0_PG: u64 = 1 << 31;
/// CR4: physical address extension, which long mode needs.
const CR4_PAE: u64 = 1 << 5;
/// EFER: long mode enabled, and active.
const EFER_LME_LMA: u64 = 1 << 8 | 1 << 10;
/// RFLAGS: bit 1 is always 1; interrupts are off.
const RFLAGS_RESERVED: u64 = 1 << 1;

/// Index of the code segment in the GDT, Linux's `__BOOT_CS` / 8.
const GDT_CODE: u16 = 2;
/// Index of the data segment, Linux's `__BOOT_DS` / 8.
const GDT_DATA: u16 = 3;
/// Index of the task state segment, whose descriptor takes two entries in long mode.
const GDT_TSS: u16 = 4;
const GDT_ENTRIES: u16 = 6;

/// Page table entry: present and writable.
const PTE_PRESENT_RW: u64 = 0b11;
/// Page directory entry: maps 2 MiB itself.
const PDE_LARGE: u64 = 1 << 7;
/// Level 2 tables, each for 1 GiB.
const PD_COUNT: u64 = 4;

/// General purpose registers, instruction pointer and flags.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "they are the processor's own names")]
pub struct GeneralRegs {
    pub rax: u64,
    pub rbx: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub rsp: u64,
    pub rbp: u64,
    pub r8: u64,
    pub r9: u64,
    pub r10: u64,
    pub r11: u64,
    pub r12: u64,
    pub r13: u64,
    pub r14: u64,
    pub r15: u64,
    pub rip: u64,
    pub rflags: u64,
}

/// A segment register with its hidden part, in the shape KVM has for it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// Linear address of its first byte.
    pub base: u64,
    /// Offset of its last byte, in bytes.
    pub limit: u32,
    /// The visible part of the register.
    pub selector: u16,
    /// Type field: 0xb code, 0x3 data, 0xb busy TSS.
    pub type_: u8,
    /// Present.
    pub present: u8,
    /// Privilege level.
    pub dpl: u8,
    /// Default operand size is 32 bits.
    pub db: u8,
    /// 1 for code and data, 0 for system segments.
    pub s: u8,
    /// 64-bit code.
    pub l: u8,
    /// The limit counts pages.
    pub g: u8,
}

impl Segment {
    /// A segment over all 4 GiB, for ring 0, at entry `index` of the GDT.
    const fn flat(index: u16, type_: u8) -> Self {
        Self { base: 0, limit: u32::MAX, selector: index * 8, type_, present: 1, dpl: 0, db: 1, s: 1, l: 0, g: 1 }
    }

    /// A task state segment, which the processor wants to have even if nothing uses it.
    const fn task_state() -> Self {
        Self { base: 0, limit: 0x67, selector: GDT_TSS * 8, type_: 0xb, present: 1, dpl: 0, db: 0, s: 0, l: 0, g: 0 }
    }

    /// As an entry of the descriptor table (Intel SDM volume 3, section 3.4.5).
    fn descriptor(&self) -> u64 {
        let limit = u64::from(if self.g == 1 { self.limit >> 12 } else { self.limit });
        let access =
            u64::from(self.type_) | u64::from(self.s) << 4 | u64::from(self.dpl) << 5 | u64::from(self.present) << 7;
        let flags = u64::from(self.l) << 1 | u64::from(self.db) << 2 | u64::from(self.g) << 3;
        (limit & 0xffff)
            | (self.base & 0xff_ffff) << 16
            | access << 40
            | (limit >> 16 & 0xf) << 48
            | flags << 52
            | (self.base >> 24 & 0xff) << 56
    }
}

/// A descriptor table register.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DescriptorTable {
    /// Address of the table.
    pub base: u64,
    /// Bytes of the table minus 1.
    pub limit: u16,
}

/// Segment and control registers. What is not named here keeps the value the vCPU was created with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SpecialRegs {
    /// Code segment.
    pub cs: Segment,
    /// The value of all of ds, es, fs, gs and ss.
    pub data: Segment,
    /// Task register.
    pub tr: Segment,
    /// Global descriptor table.
    pub gdt: DescriptorTable,
    /// Interrupt descriptor table.
    pub idt: DescriptorTable,
    /// Control register 0.
    pub cr0: u64,
    /// Control register 3: the page tables' address.
    pub cr3: u64,
    /// Control register 4.
    pub cr4: u64,
    /// Extended feature register.
    pub efer: u64,
}

/// With what the first vCPU enters the kernel. The other vCPUs keep their reset state and wait for the kernel to start them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuRegs {
    /// General purpose registers, instruction pointer and flags.
    pub general: GeneralRegs,
    /// Segment and control registers.
    pub special: SpecialRegs,
}

/// Legacy floating point state, as after FNINIT and with all SSE exceptions masked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FpuRegs {
    /// x87 control word.
    pub fcw: u16,
    /// SSE control and status.
    pub mxcsr: u32,
}

impl Default for FpuRegs {
    fn default() -> Self {
        Self { fcw: 0x37f, mxcsr: 0x1f80 }
    }
}

impl CpuRegs {
    /// 64-bit mode, paging with 4 GiB mapped one to one: the Linux 64-bit boot protocol
    /// (Documentation/arch/x86/boot.rst, "64-bit Boot Protocol").
    pub(crate) fn long_mode(rip: u64, zero_page: u64) -> Self {
        let cs = Segment { l: 1, db: 0, ..Segment::flat(GDT_CODE, 0xb) };
        let mut regs = Self::protected(cs, CR0_PE | CR0_ET | CR0_PG);
        regs.general = GeneralRegs { rip, rsi: zero_page, rsp: BOOT_STACK_TOP, rbp: BOOT_STACK_TOP, ..regs.general };
        regs.special = SpecialRegs { cr3: PML4_START, cr4: CR4_PAE, efer: EFER_LME_LMA, ..regs.special };
        regs
    }

    /// 32-bit protected mode without paging: the PVH boot protocol (Xen's docs/misc/pvh.pandoc).
    pub(crate) fn pvh(rip: u64, start_info: u64) -> Self {
        let mut regs = Self::protected(Segment::flat(GDT_CODE, 0xb), CR0_PE | CR0_ET);
        regs.general = GeneralRegs { rip, rbx: start_info, ..regs.general };
        regs
    }

    fn protected(cs: Segment, cr0: u64) -> Self {
        Self {
            general: GeneralRegs { rflags: RFLAGS_RESERVED, ..GeneralRegs::default() },
            special: SpecialRegs {
                cs,
                data: Segment::flat(GDT_DATA, 0x3),
                tr: Segment::task_state(),
                gdt: DescriptorTable { base: GDT_START, limit: GDT_ENTRIES * 8 - 1 },
                idt: DescriptorTable { base: IDT_START, limit: 7 },
                cr0,
                ..SpecialRegs::default()
            },
        }
    }

    /// Writes the descriptor tables these registers point to.
    pub(crate) fn write_descriptor_tables<M: GuestMemoryBackend>(&self, memory: &M) -> Result<(), GuestMemoryError> {
        let special = &self.special;
        let gdt: [u64; GDT_ENTRIES as usize] =
            [0, 0, special.cs.descriptor(), special.data.descriptor(), special.tr.descriptor(), 0];
        memory.write_slice(&gdt.map(u64::to_le_bytes).concat(), GuestAddress(special.gdt.base))?;
        memory.write_slice(&[0; 8], GuestAddress(special.idt.base))
    }
}

/// Writes page tables that map the first 4 GiB one to one with 2 MiB pages.
pub(crate) fn write_identity_map<M: GuestMemoryBackend>(memory: &M) -> Result<(), GuestMemoryError> {
    let write_table = |entries: Vec<u64>, at: u64| {
        let bytes: Vec<u8> = entries.into_iter().flat_map(u64::to_le_bytes).collect();
        memory.write_slice(&bytes, GuestAddress(at))
    };
    write_table(vec![PDPT_START | PTE_PRESENT_RW], PML4_START)?;
    write_table((0..PD_COUNT).map(|i| (PD_START + i * 0x1000) | PTE_PRESENT_RW).collect(), PDPT_START)?;
    write_table((0..PD_COUNT * 512).map(|i| i << 21 | PDE_LARGE | PTE_PRESENT_RW).collect(), PD_START)
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::GuestMemoryMmap;

    #[test]
    fn descriptors_are_those_linux_documents() {
        let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap();
        let entry = |index: u64| memory.read_obj::<u64>(GuestAddress(GDT_START + index * 8)).unwrap();
        let regs = CpuRegs::long_mode(0x100_0200, 0x7000);
        regs.write_descriptor_tables(&memory).unwrap();
        assert_eq!([entry(0), entry(1), entry(5)], [0; 3]);
        assert_eq!(entry(2), 0x00af_9b00_0000_ffff);
        assert_eq!(entry(3), 0x00cf_9300_0000_ffff);
        assert_eq!(entry(4), 0x0000_8b00_0000_0067);
        assert_eq!((regs.special.cs.selector, regs.special.data.selector), (0x10, 0x18));

        CpuRegs::pvh(0x100_0000, 0x6000).write_descriptor_tables(&memory).unwrap();
        assert_eq!(entry(2), 0x00cf_9b00_0000_ffff);
    }

    /// Walks the tables as the processor does.
    #[test]
    fn identity_map_covers_4_gib() {
        let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap();
        write_identity_map(&memory).unwrap();
        let entry =
            |table: u64, index: u64| memory.read_obj::<u64>(GuestAddress((table & !0xfff) + index * 8)).unwrap();
        for address in [0u64, 0x10_0000, 0x3fff_ffff, 0x4000_0000, 0xfee0_0000, 0xffff_ffff] {
            let pml4e = entry(PML4_START, address >> 39);
            let pdpte = entry(pml4e, address >> 30 & 0x1ff);
            let pde = entry(pdpte, address >> 21 & 0x1ff);
            assert!([pml4e, pdpte, pde].iter().all(|entry| entry & 3 == 3));
            assert_eq!(pde & 0x80, 0x80);
            assert_eq!((pde & !0x1f_ffff) | (address & 0x1f_ffff), address);
        }
        assert_eq!(entry(entry(PML4_START, 0), 4), 0, "nothing above 4 GiB");
    }
}
