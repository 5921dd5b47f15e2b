//! Power-off, reset and the event device of hardware-reduced ACPI (ACPI 6.5 sections 4.8.3.7, 4.8.4.6 and 5.6.9).

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use crate::bus::BusDevice;
use crate::irq::IrqLine;

/// What the guest asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PowerEvent {
    /// Sleep state S5: power off.
    PowerOff,
    /// Reset the machine.
    Reset,
}

/// The values the ACPI tables name.
#[derive(Debug, Clone, Copy)]
pub struct PowerValues {
    /// Offset of the sleep control register in the range.
    pub sleep_control: u64,
    /// Offset of the reset register in the range.
    pub reset: u64,
    /// What written to the reset register resets.
    pub reset_value: u8,
    /// SLP_EN of the sleep control register.
    pub sleep_enable: u8,
    /// SLP_TYP of S5, as in the `_S5` package.
    pub sleep_type_s5: u8,
}

/// Sleep control, sleep status and reset registers.
pub struct PowerControl {
    values: PowerValues,
    request: Box<dyn Fn(PowerEvent) + Send + Sync>,
}

impl PowerControl {
    /// Registers that call `request`, on a vCPU thread, when the guest wants something.
    #[must_use]
    pub fn new(values: PowerValues, request: Box<dyn Fn(PowerEvent) + Send + Sync>) -> Self {
        Self { values, request }
    }
}

impl BusDevice for PowerControl {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let (&[value], v) = (data, &self.values) else { return };
        if offset == v.sleep_control && value == v.sleep_enable | v.sleep_type_s5 << 2 {
            (self.request)(PowerEvent::PowerOff);
        } else if offset == v.reset && value == v.reset_value {
            (self.request)(PowerEvent::Reset);
        }
    }
}

/// The Generic Event Device: tells the guest's ACPI code which event its interrupt stands for.
pub struct GenericEvent {
    events: AtomicU8,
    irq: Arc<dyn IrqLine>,
}

impl GenericEvent {
    /// A device that interrupts through `irq`.
    #[must_use]
    pub fn new(irq: Arc<dyn IrqLine>) -> Self {
        Self { events: AtomicU8::new(0), irq }
    }

    /// The events the guest has not read yet, for a snapshot.
    #[must_use]
    pub fn pending(&self) -> u8 {
        self.events.load(Ordering::SeqCst)
    }

    /// Takes over the events of a snapshot. Their interrupt is on its way already.
    pub fn restore(&self, pending: u8) {
        self.events.store(pending, Ordering::SeqCst);
    }

    /// Raises the events set in `bits`.
    pub fn raise(&self, bits: u8) {
        self.events.fetch_or(bits, Ordering::SeqCst);
        self.irq.pulse();
    }
}

impl BusDevice for GenericEvent {
    /// Reading tells the events and clears them.
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(first) = data.first_mut() {
            *first = self.events.swap(0, Ordering::SeqCst);
        }
    }

    fn write(&self, _offset: u64, _data: &[u8]) {}
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[test]
    fn only_the_values_of_the_tables_do_something() {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let values = PowerValues { sleep_control: 0, reset: 2, reset_value: 1, sleep_enable: 1 << 5, sleep_type_s5: 5 };
        let record = seen.clone();
        let power = PowerControl::new(values, Box::new(move |e| record.lock().unwrap().push(e)));
        for (offset, value) in [(0, 0u8), (0, 0x20), (1, 0x34), (2, 0), (2, 6), (0, 0xff)] {
            power.write(offset, &[value]);
        }
        power.write(0, &[0x34, 0]);
        assert!(seen.lock().unwrap().is_empty());
        power.write(0, &[0x34]);
        power.write(2, &[1]);
        assert_eq!(*seen.lock().unwrap(), [PowerEvent::PowerOff, PowerEvent::Reset]);
    }

    struct Line(AtomicU8);
    impl IrqLine for Line {
        fn pulse(&self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    #[test]
    fn events_are_told_once() {
        let line = Arc::new(Line(AtomicU8::new(0)));
        let ged = GenericEvent::new(line.clone());
        ged.raise(1);
        assert_eq!(line.0.load(Ordering::SeqCst), 1);
        let mut data = [0; 4];
        ged.read(0, &mut data);
        assert_eq!(data, [1, 0, 0, 0]);
        ged.read(0, &mut data);
        assert_eq!(data, [0; 4]);
    }
}
