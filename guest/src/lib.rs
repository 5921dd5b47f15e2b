//! What the guest's multi-call binary is made of, as a library so that it can be tested.

pub mod wayland;
