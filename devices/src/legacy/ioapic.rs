//! The I/O APIC (Intel 82093AA datasheet). With KVM's split irqchip the local APICs are in the kernel and this is ours:
//! a pin's redirection entry becomes a message.
//!
//! All lines of this machine are edges (ISA serial port, ACPI event device): there is no INTx, PCI devices have MSI-X
//! only. An entry the guest programs as level-triggered is delivered per edge as well.

use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use crate::bus::BusDevice;
use crate::irq::{IrqLine, Msi, MsiSink};

/// Number of input pins.
pub const PINS: usize = 24;

const REG_SELECT: u64 = 0x00;
const REG_WINDOW: u64 = 0x10;
const ID: u8 = 0x00;
const VERSION: u8 = 0x01;
const ARBITRATION: u8 = 0x02;
const TABLE: u8 = 0x10;

/// Version 0x11, and the number of the last entry in bits 16-23.
const VERSION_VALUE: u32 = 0x11 | 0x17 << 16;

const MASKED: u64 = 1 << 16;
/// Delivery status and remote IRR are the controller's.
const READ_ONLY: u64 = 1 << 12 | 1 << 14;

/// The registers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    select: u8,
    id: u32,
    table: [u64; PINS],
    /// Edges that came while the pin was masked.
    pending: u32,
}

impl Default for State {
    fn default() -> Self {
        Self { select: 0, id: 0, table: [MASKED; PINS], pending: 0 }
    }
}

/// An I/O APIC with 24 pins.
pub struct IoApic {
    state: Mutex<State>,
    sink: Arc<dyn MsiSink>,
}

impl IoApic {
    /// An I/O APIC, all pins masked, that delivers to `sink`.
    #[must_use]
    pub fn new(sink: Arc<dyn MsiSink>) -> Self {
        Self { state: Mutex::default(), sink }
    }

    /// The registers, for a snapshot.
    #[must_use]
    pub fn save(&self) -> State {
        self.lock().clone()
    }

    /// Takes over the registers of a snapshot, any of which are possible ones.
    pub fn restore(&self, saved: &State) {
        *self.lock() = saved.clone();
    }

    /// An edge on input `pin`; nothing happens if there is no such pin.
    pub fn pulse(&self, pin: u32) {
        let msi = {
            let mut state = self.lock();
            let Some(&entry) = usize::try_from(pin).ok().and_then(|p| state.table.get(p)) else { return };
            if entry & MASKED != 0 {
                state.pending |= 1 << pin;
                return;
            }
            message(entry)
        };
        self.sink.signal(msi);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read_register(state: &State) -> u32 {
        match state.select {
            ID | ARBITRATION => state.id,
            VERSION => VERSION_VALUE,
            select => {
                let at = select.wrapping_sub(TABLE);
                let entry = state.table.get(usize::from(at / 2)).copied().unwrap_or(0);
                let half = if at % 2 == 0 { entry } else { entry >> 32 };
                // Half of a 64-bit entry: the mask makes it exact.
                u32::try_from(half & 0xffff_ffff).unwrap_or(0)
            }
        }
    }

    /// Writes the selected register; a message is due if that unmasked a pin with an edge waiting.
    fn write_register(state: &mut State, value: u32) -> Option<Msi> {
        if state.select == ID {
            state.id = value & 0x0f00_0000;
            return None;
        }
        let at = state.select.checked_sub(TABLE)?;
        let pin = usize::from(at / 2);
        let entry = state.table.get_mut(pin)?;
        let value = u64::from(value);
        let new = if at % 2 == 0 { *entry & !0xffff_ffff | value } else { *entry & 0xffff_ffff | value << 32 };
        *entry = new & !READ_ONLY;
        let (bit, entry) = (1u32.checked_shl(u32::try_from(pin).ok()?)?, *entry);
        if entry & MASKED == 0 && state.pending & bit != 0 {
            state.pending &= !bit;
            return Some(message(entry));
        }
        None
    }
}

/// The message a redirection entry stands for: destination, delivery and destination mode, vector.
fn message(entry: u64) -> Msi {
    let destination = entry >> 56 & 0xff;
    let logical = entry >> 11 & 1;
    let data = u32::try_from(entry & 0x7ff).unwrap_or(0);
    Msi { address: 0xfee0_0000 | destination << 12 | logical << 2, data }
}

impl BusDevice for IoApic {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let state = self.lock();
        let value = match offset {
            REG_SELECT => u32::from(state.select),
            REG_WINDOW => Self::read_register(&state),
            _ => 0,
        };
        for (to, from) in data.iter_mut().zip(value.to_le_bytes().into_iter().chain(std::iter::repeat(0))) {
            *to = from;
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut bytes = [0; 4];
        for (to, from) in bytes.iter_mut().zip(data) {
            *to = *from;
        }
        let due = {
            let mut state = self.lock();
            match offset {
                REG_SELECT => {
                    state.select = bytes[0];
                    None
                }
                REG_WINDOW => Self::write_register(&mut state, u32::from_le_bytes(bytes)),
                _ => None,
            }
        };
        if let Some(msi) = due {
            self.sink.signal(msi);
        }
    }
}

/// One pin of an I/O APIC.
pub struct Pin {
    /// The controller.
    pub ioapic: Arc<IoApic>,
    /// The pin's number.
    pub number: u32,
}

impl IrqLine for Pin {
    fn pulse(&self) {
        self.ioapic.pulse(self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Sink(Mutex<Vec<Msi>>);
    impl MsiSink for Sink {
        fn signal(&self, msi: Msi) {
            self.0.lock().unwrap().push(msi);
        }
    }

    fn set(ioapic: &IoApic, register: u8, value: u32) {
        ioapic.write(REG_SELECT, &[register]);
        ioapic.write(REG_WINDOW, &value.to_le_bytes());
    }

    fn get(ioapic: &IoApic, register: u8) -> u32 {
        let mut data = [0; 4];
        ioapic.write(REG_SELECT, &[register]);
        ioapic.read(REG_WINDOW, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn an_edge_becomes_the_entrys_message() {
        let sink = Arc::new(Sink::default());
        let ioapic = IoApic::new(sink.clone());
        set(&ioapic, TABLE + 8 + 1, 3 << 24);
        set(&ioapic, TABLE + 8, 0x31);
        ioapic.pulse(4);
        assert_eq!(*sink.0.lock().unwrap(), [Msi { address: 0xfee0_3000, data: 0x31 }]);
        ioapic.pulse(99);
        assert_eq!(sink.0.lock().unwrap().len(), 1);
    }

    #[test]
    fn an_edge_on_a_masked_pin_waits() {
        let sink = Arc::new(Sink::default());
        let ioapic = IoApic::new(sink.clone());
        ioapic.pulse(4);
        assert!(sink.0.lock().unwrap().is_empty());
        set(&ioapic, TABLE + 8, 0x31);
        assert_eq!(sink.0.lock().unwrap().len(), 1);
        set(&ioapic, TABLE + 8, 0x31);
        assert_eq!(sink.0.lock().unwrap().len(), 1, "the edge is delivered once");
    }

    #[test]
    fn registers_read_back_and_wild_ones_are_harmless() {
        let ioapic = IoApic::new(Arc::new(Sink::default()));
        assert_eq!(get(&ioapic, VERSION), 0x17_0011);
        set(&ioapic, TABLE + 3, 0x0100_0000);
        set(&ioapic, TABLE + 2, 0xffff_ffff);
        assert_eq!(get(&ioapic, TABLE + 2), 0xffff_afff, "the controller's own bits stay clear");
        assert_eq!(get(&ioapic, TABLE + 3), 0x0100_0000);
        for register in 0..=255 {
            set(&ioapic, register, 0x1234_5678);
            get(&ioapic, register);
        }
        ioapic.write(0x44, &[0; 8]);
        ioapic.read(0x1, &mut [0; 8]);
    }
}
