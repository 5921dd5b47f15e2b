//! The local APIC's registers, as one page of 1024 bytes (Intel SDM volume 3, section 11.4).

/// Bytes of the register page that hypervisors save and restore.
pub const LAPIC_PAGE_SIZE: usize = 1024;
/// Offset of the local vector table entry of pin LINT0.
const LVT_LINT0: usize = 0x350;
/// Offset of the local vector table entry of pin LINT1.
const LVT_LINT1: usize = 0x360;
/// Where an entry has its delivery mode.
const DELIVERY_MODE_SHIFT: u32 = 8;
const DELIVERY_MODE_MASK: u32 = 0b111 << DELIVERY_MODE_SHIFT;
/// Delivery mode: non-maskable interrupt.
const NMI: u32 = 0b100;
/// Delivery mode: the vector comes from an external interrupt controller.
const EXT_INT: u32 = 0b111;

/// Connects the pins as firmware would: LINT0 to the external controller, LINT1 to NMI (as the MADT says).
pub fn connect_local_interrupts(page: &mut [u8; LAPIC_PAGE_SIZE]) {
    set_delivery_mode(page, LVT_LINT0, EXT_INT);
    set_delivery_mode(page, LVT_LINT1, NMI);
}

fn set_delivery_mode(page: &mut [u8; LAPIC_PAGE_SIZE], offset: usize, mode: u32) {
    if let Some(register) = page.get_mut(offset..).and_then(<[u8]>::first_chunk_mut::<4>) {
        let value = u32::from_le_bytes(*register) & !DELIVERY_MODE_MASK;
        *register = (value | mode << DELIVERY_MODE_SHIFT).to_le_bytes();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_delivery_modes_change() {
        let mut page = [0xff; LAPIC_PAGE_SIZE];
        connect_local_interrupts(&mut page);
        assert_eq!(page[LVT_LINT0..][..4], [0xff; 4]);
        assert_eq!(page[LVT_LINT1..][..4], [0xff, 0xfc, 0xff, 0xff]);
        // As after a reset: masked.
        let mut page = [0; LAPIC_PAGE_SIZE];
        page[LVT_LINT0 + 2] = 1;
        page[LVT_LINT1 + 2] = 1;
        connect_local_interrupts(&mut page);
        assert_eq!(page[LVT_LINT0..][..4], [0, 7, 1, 0]);
        assert_eq!(page[LVT_LINT1..][..4], [0, 4, 1, 0]);
        assert_eq!(page.iter().filter(|byte| **byte != 0).count(), 4);
    }
}
