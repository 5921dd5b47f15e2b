//! Everything specific to x86_64 guests.

pub mod acpi;
pub mod boot;
pub mod cpuid;
pub mod features;
pub mod lapic;
pub mod layout;
pub mod msr;
pub mod regs;
pub mod reset;
