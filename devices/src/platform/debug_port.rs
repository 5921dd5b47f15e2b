//! The debug port: a guest writes a byte, the log tells when. Boot times are measured with it.

use std::time::Instant;

use crate::bus::BusDevice;

/// Logs each byte the guest writes with the time since the VMM started the machine.
pub struct DebugPort {
    start: Instant,
}

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
        if let Some(code) = data.first() {
            log::debug!("debug port: {code:#04x} after {} us", self.start.elapsed().as_micros());
        }
    }
}
