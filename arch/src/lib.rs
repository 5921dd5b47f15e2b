//! Guest memory layout, boot protocols, CPUID and ACPI: numbers in, bytes and register values out.
//!
//! This crate opens nothing and calls no hypervisor. It decides where things lie in guest physical memory, writes what a kernel
//! expects to find there, and says with which register values a vCPU starts; others carry that out. Each architecture has a
//! folder of its own with the same module names, and the modules of the one being built for are re-exported here, so that callers
//! write `arch::layout` and `arch::boot` without naming an architecture.

#![forbid(unsafe_code)]

#[cfg(target_arch = "x86_64")]
pub mod x86_64;
#[cfg(target_arch = "x86_64")]
pub use x86_64::*;
