//! virtio-gpu (virtio 1.3 section 5.7), for cross-domain contexts.

/// Makes the engine behind a virtio-gpu device.
pub trait RendererFactory {}
