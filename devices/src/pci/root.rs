//! The root bus: one segment, bus 0, 32 slots, reached through ports 0xcf8/0xcfc and through ECAM (PCI Express base
//! specification section 7.2.2).

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{ConfigSpace, Identity};
use crate::bus::BusDevice;

/// Slots of a bus.
pub const SLOTS: usize = 32;

/// A function's configuration space as the root sees it. Called on vCPU threads.
pub trait PciDevice: Send + Sync {
    /// The guest reads up to 4 bytes at `offset`, which do not cross a dword.
    fn config_read(&self, offset: u16, data: &mut [u8]);
    /// The guest writes up to 4 bytes at `offset`, which do not cross a dword.
    fn config_write(&self, offset: u16, data: &[u8]);
}

/// The host bridge in slot 0: nothing but an identity.
struct HostBridge(Mutex<ConfigSpace>);

impl HostBridge {
    fn lock(&self) -> MutexGuard<'_, ConfigSpace> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PciDevice for HostBridge {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.lock().read(offset, data);
    }
    fn config_write(&self, offset: u16, data: &[u8]) {
        self.lock().write(offset, data);
    }
}

/// The devices of bus 0.
pub struct PciRoot {
    slots: Vec<Option<Arc<dyn PciDevice>>>,
}

impl Default for PciRoot {
    fn default() -> Self {
        Self::new()
    }
}

impl PciRoot {
    /// A bus with its host bridge in slot 0.
    #[must_use]
    pub fn new() -> Self {
        // A generic Intel host bridge number, which Linux treats without quirks.
        let id = Identity {
            vendor: 0x8086,
            device: 0x0d57,
            subsystem_vendor: 0,
            subsystem: 0,
            revision: 0,
            class: [0x06, 0, 0],
        };
        let mut slots: Vec<Option<Arc<dyn PciDevice>>> = vec![None; SLOTS];
        if let Some(first) = slots.first_mut() {
            *first = Some(Arc::new(HostBridge(Mutex::new(ConfigSpace::new(id)))));
        }
        Self { slots }
    }

    /// Puts a device into a free slot; says whether that was possible.
    #[must_use]
    pub fn insert(&mut self, slot: u8, device: Arc<dyn PciDevice>) -> bool {
        match self.slots.get_mut(usize::from(slot)) {
            Some(free @ None) => {
                *free = Some(device);
                true
            }
            _ => false,
        }
    }

    /// The function at bus, device and function number `bdf` (8, 5 and 3 bits).
    fn find(&self, bdf: u32) -> Option<&dyn PciDevice> {
        // One bus, and only function 0 of each device.
        if bdf & 0xff07 != 0 {
            return None;
        }
        self.slots.get(usize::try_from(bdf >> 3).ok()?)?.as_deref()
    }

    fn read(&self, bdf: u32, offset: u16, data: &mut [u8]) {
        let crosses = usize::from(offset & 3) + data.len() > 4;
        match self.find(bdf) {
            Some(device) if !crosses => device.config_read(offset, data),
            _ => data.fill(0xff),
        }
    }

    fn write(&self, bdf: u32, offset: u16, data: &[u8]) {
        let crosses = usize::from(offset & 3) + data.len() > 4;
        if let Some(device) = self.find(bdf).filter(|_| !crosses) {
            device.config_write(offset, data);
        }
    }
}

/// Ports 0xcf8 to 0xcff: configuration mechanism #1 (PCI 3.0 section 3.2.2.3.2).
pub struct LegacyConfig {
    root: Arc<PciRoot>,
    address: AtomicU32,
}

const ADDRESS_ENABLE: u32 = 1 << 31;

impl LegacyConfig {
    /// The mechanism for `root`.
    #[must_use]
    pub fn new(root: Arc<PciRoot>) -> Self {
        Self { root, address: AtomicU32::new(0) }
    }

    /// The address register, which is all the state there is.
    #[must_use]
    pub fn address(&self) -> u32 {
        self.address.load(Ordering::Relaxed)
    }

    /// Sets the address register, as a snapshot has it.
    pub fn set_address(&self, address: u32) {
        self.address.store(address, Ordering::Relaxed);
    }

    /// The function and register selected, for an access at port `offset` (4 to 7).
    fn target(&self, offset: u64) -> Option<(u32, u16)> {
        let address = self.address.load(Ordering::Relaxed);
        if address & ADDRESS_ENABLE == 0 {
            return None;
        }
        let register = u16::try_from(address & 0xfc).ok()? + u16::try_from(offset.checked_sub(4)?).ok()?;
        Some((address >> 8 & 0xffff, register))
    }
}

impl BusDevice for LegacyConfig {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if offset < 4 {
            let bytes = self.address.load(Ordering::Relaxed).to_le_bytes();
            for (to, from) in data.iter_mut().zip(bytes.iter().skip(usize::try_from(offset).unwrap_or(0))) {
                *to = *from;
            }
        } else if let Some((bdf, register)) = self.target(offset) {
            self.root.read(bdf, register, data);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if offset == 0 {
            if let Ok(bytes) = data.try_into() {
                self.address.store(u32::from_le_bytes(bytes), Ordering::Relaxed);
            }
        } else if let Some((bdf, register)) = self.target(offset) {
            self.root.write(bdf, register, data);
        }
    }
}

/// The memory-mapped configuration space of the bus: 4 KiB a function.
pub struct Ecam {
    root: Arc<PciRoot>,
}

impl Ecam {
    /// The window for `root`.
    #[must_use]
    pub fn new(root: Arc<PciRoot>) -> Self {
        Self { root }
    }
}

fn ecam_target(offset: u64) -> Option<(u32, u16)> {
    Some((u32::try_from(offset >> 12).ok()?, u16::try_from(offset & 0xfff).ok()?))
}

impl BusDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let Some((bdf, register)) = ecam_target(offset) {
            self.root.read(bdf, register, data);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some((bdf, register)) = ecam_target(offset) {
            self.root.write(bdf, register, data);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Echo;
    impl PciDevice for Echo {
        fn config_read(&self, offset: u16, data: &mut [u8]) {
            data.fill(u8::try_from(offset & 0xff).unwrap());
        }
        fn config_write(&self, _: u16, _: &[u8]) {}
    }

    fn root() -> Arc<PciRoot> {
        let mut root = PciRoot::new();
        assert!(root.insert(3, Arc::new(Echo)));
        assert!(!root.insert(3, Arc::new(Echo)), "the slot is taken");
        assert!(!root.insert(0, Arc::new(Echo)), "the host bridge is there");
        assert!(!root.insert(32, Arc::new(Echo)));
        Arc::new(root)
    }

    #[test]
    fn both_mechanisms_reach_the_same_function() {
        let root = root();
        let (legacy, ecam) = (LegacyConfig::new(root.clone()), Ecam::new(root));
        legacy.write(0, &(ADDRESS_ENABLE | 3 << 11 | 0x40).to_le_bytes());
        let mut data = [0; 2];
        legacy.read(6, &mut data);
        assert_eq!(data, [0x42; 2]);
        ecam.read(3 << 15 | 0x42, &mut data);
        assert_eq!(data, [0x42; 2]);
    }

    #[test]
    fn absent_functions_read_as_ones() {
        let ecam = Ecam::new(root());
        for offset in [1 << 15, 3 << 15 | 1 << 12, 1 << 20, 1 << 40, u64::MAX] {
            let mut data = [0xff; 4];
            ecam.read(offset & !3, &mut data);
            assert_eq!(data, [0xff; 4]);
            ecam.write(offset, &[0; 8]);
        }
        let mut data = [0; 8];
        ecam.read(3 << 15, &mut data);
        assert_eq!(data, [0xff; 8], "no access crosses a dword");
    }
}
