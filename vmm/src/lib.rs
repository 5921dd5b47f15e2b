//! Turns one configuration value into a running virtual machine.

pub mod cli;
pub mod inherited;
