//! PCI: configuration spaces, MSI-X, and the root bus with both ways to reach configuration space.
//!
//! BARs are placed by the VMM's plan before the guest runs and stay there: a guest that writes another address into a
//! BAR reads it back, but the device goes on answering where it was put (the root bridge's ACPI windows leave a kernel
//! no reason to move anything).

mod config;
mod msix;
mod root;

pub use config::{Bar, Capability, ConfigSpace, Identity};
pub use msix::{MSIX_CAPABILITY_LEN, Msix, PBA_SIZE, State as MsixState, TABLE_ENTRY_SIZE};
pub use root::{Ecam, LegacyConfig, PciDevice, PciRoot};
