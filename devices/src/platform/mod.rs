//! Platform devices that every architecture can have: power control, the VM generation ID and the debug port.

mod debug_port;
mod power;
mod vmgenid;

pub use debug_port::DebugPort;
pub use power::{GenericEvent, PowerControl, PowerEvent, PowerValues};
pub use vmgenid::{VmGenId, VmGenIdError};
