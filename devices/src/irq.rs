//! How devices interrupt the guest.

/// A message-signalled interrupt as PCI writes it (PCI 3.0 section 6.8.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Msi {
    /// Message address.
    pub address: u64,
    /// Message data.
    pub data: u32,
}

/// Delivers messages to the guest's interrupt controllers.
pub trait MsiSink: Send + Sync {
    /// Delivers one message; one that the guest made up and nobody takes is lost.
    fn signal(&self, msi: Msi);
}

/// One input pin of an interrupt controller.
pub trait IrqLine: Send + Sync {
    /// An edge: the line goes up and down.
    fn pulse(&self);
}
