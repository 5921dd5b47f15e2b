//! Disk image formats and I/O engines: files to sectors, without virtio.
//!
//! [`image`] opens an image safely (locked, of a kind that has a size, never blocking).

#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::unreachable)
)]

pub mod image;
