//! Virtio devices as synchronous state machines, and the virtio-pci transport.
