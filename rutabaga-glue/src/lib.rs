//! Cross-domain virtio-gpu engine on rutabaga_gfx.
