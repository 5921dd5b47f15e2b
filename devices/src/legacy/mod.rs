//! Devices of the PC platform.

mod ioapic;
mod serial;

pub use ioapic::{IoApic, Pin, State as IoApicState};
pub use serial::{Serial, State as SerialState};
