//! Buses, PCI and platform devices: what a machine has beside its virtio devices.
//!
//! Nothing here knows KVM or owns a thread. A device is reached through a [`bus::Bus`] from vCPU threads, and reaches
//! the guest through the small traits in [`irq`].
#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::unreachable)
)]

pub mod bus;
pub mod irq;
#[cfg(target_arch = "x86_64")]
pub mod legacy;
pub mod pci;
pub mod platform;
