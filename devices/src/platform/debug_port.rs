//! The debug port: a guest writes a byte, the log tells when. Boot times are measured with it.

use std::time::Instant;

use crate::bus::BusDevice;

/// Logs each byte the guest writes, with the time since the VMM began to build the machine. Linux writes to this port
/// too, to pass the time; bytes of a guest's own are those from 0x40 on, as Cloud Hypervisor has it.
pub struct DebugPort {
    start: Instant,
}

/// The first byte that is a mark.
const FIRST_MARK: u8 = 0x40;

impl DebugPort {
    /// A port whose clock began at `start`.
    #[must_use]
    pub fn new(start: Instant) -> Self {
        Self { start }
    }
}

impl BusDevice for DebugPort {
    fn read(&self, _offset: u64, _data: &mut [u8]) {}

    fn write(&self, _offset: u64, data: &[u8]) {
        if let Some(code) = data.first().filter(|code| **code >= FIRST_MARK) {
            log::info!("debug port: {code:#04x} after {} us", self.start.elapsed().as_micros());
        }
    }
}
