//! PID 1, agent and Wayland proxy of an application VM: one static multi-call binary.

fn main() {}
