//! Virtio devices as synchronous state machines, the virtio-pci transport, and the worker that runs devices.
//!
//! Start reading at [`device`], the whole device contract. A device is a folder here and one line in [`registry`].
#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::unreachable)
)]

pub mod blk;
pub mod console;
pub mod device;
pub mod fs;
pub mod gpu;
pub mod mapping;
pub mod net;
pub mod pagemap;
pub mod pmem;
pub mod registry;
pub mod rng;
#[cfg(any(test, feature = "testkit"))]
pub mod testkit;
pub mod transport;
pub mod virtqueue;
pub mod vsock;
pub mod worker;
