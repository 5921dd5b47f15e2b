//! Platform devices that every architecture can have: power control and the debug port.

mod debug_port;
mod power;

pub use debug_port::DebugPort;
pub use power::{GenericEvent, PowerControl, PowerEvent, PowerValues};
