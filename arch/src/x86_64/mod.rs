//! Everything specific to x86_64 guests.

pub mod boot;
pub mod layout;
pub mod regs;
