//! Disk image formats and I/O engines: files to bytes, without virtio.
//!
//! * [`image`] opens an image safely: locked, of a kind that has a size, never blocking.
//! * [`format`](mod@format) recognises images that are not raw, to refuse them.
//! * [`engine`] reads and writes an image straight from and to guest memory.

#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::unreachable)
)]

pub mod engine;
pub mod format;
pub mod image;
