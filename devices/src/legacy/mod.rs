//! Devices of the PC platform.

mod ioapic;
mod serial;

pub use ioapic::{IoApic, Pin};
pub use serial::Serial;
