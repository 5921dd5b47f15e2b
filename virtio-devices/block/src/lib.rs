//! Disk image formats and I/O engines, no virtio.
