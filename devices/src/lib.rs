//! Buses, PCI and platform devices.
