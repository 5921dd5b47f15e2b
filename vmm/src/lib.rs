//! Turns one configuration value into a running virtual machine.
//!
//! ```text
//!  VmConfig ──check──▶ Plan ──build──▶ Machine ◀──owned by── Vmm (control loop) ◀── API, signals, guest events
//! ```
//! [`control::Vmm`] is the way in for programs that embed it; `examples/boot.rs` boots a kernel with it.

pub mod build;
pub mod cli;
pub mod control;
pub mod events;
pub mod inherited;
pub mod lifecycle;
pub mod machine;
pub mod memory;
pub mod panics;
pub mod plan;
mod process;
pub mod sandbox;
pub mod snapshot;
pub mod stream;
pub mod vcpu;
pub mod zygote;

pub use control::{Outcome, Vmm, VmmError};
pub use process::survive_file_size_limit;
