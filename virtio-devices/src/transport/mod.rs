//! Virtio over PCI (virtio 1.3 section 4.1), modern only: features, status and queues of every device.
//!
//! ```text
//!  driver ──▶ config space, BAR 0 (pci.rs) ──▶ common configuration (common.rs) ──▶ device or worker
//!                                  ▲ MSI-X ◀── interrupt.rs ◀──────────────────────────┘
//! ```

mod common;
mod interrupt;
mod pci;
#[cfg(test)]
mod tests;

pub use pci::{BAR0_SIZE, Doorbells, PciTransport, SHARED_MEMORY_BAR, Setup, TransportState};
