//! One function's configuration space (PCI 3.0 section 6.1): 256 bytes with a mask of what the guest may write.

/// Bytes of conventional configuration space.
pub const SIZE: usize = 256;

const VENDOR: usize = 0x00;
const DEVICE: usize = 0x02;
const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const REVISION: usize = 0x08;
const CLASS: usize = 0x09;
const BAR0: usize = 0x10;
const SUBSYSTEM_VENDOR: usize = 0x2c;
const SUBSYSTEM: usize = 0x2e;
const CAPABILITIES: usize = 0x34;
const FIRST_CAPABILITY: usize = 0x40;

/// Status: has a capability list.
const STATUS_CAPABILITIES: u16 = 1 << 4;
/// Command: memory space, bus master, interrupt disable.
const COMMAND_WRITABLE: u16 = 1 << 1 | 1 << 2 | 1 << 10;

/// Who the function is.
#[derive(Debug, Clone, Copy)]
pub struct Identity {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Subsystem vendor ID.
    pub subsystem_vendor: u16,
    /// Subsystem ID.
    pub subsystem: u16,
    /// Revision ID.
    pub revision: u8,
    /// Class code: base class, sub-class, programming interface.
    pub class: [u8; 3],
}

/// A 64-bit memory BAR.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bar {
    /// Its first register: 0, 2 or 4.
    pub index: u8,
    /// Where the plan put it.
    pub address: u64,
    /// Bytes, a power of two of at least 16.
    pub size: u64,
    /// Whether reads have no side effects.
    pub prefetchable: bool,
}

/// A capability: its ID, its bytes after the two of the header, and which bits of those the guest may write.
#[derive(Debug, Clone)]
pub struct Capability {
    /// Capability ID.
    pub id: u8,
    /// What follows the ID and the next pointer.
    pub body: Vec<u8>,
    /// Mask of writable bits, as long as `body` or shorter.
    pub writable: Vec<u8>,
}

/// A function's registers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigSpace {
    bytes: Vec<u8>,
    writable: Vec<u8>,
    /// Where the last capability's next pointer and the free space are.
    last_next: usize,
    free: usize,
}

impl ConfigSpace {
    /// A type 0 header without BARs or capabilities.
    #[must_use]
    pub fn new(id: Identity) -> Self {
        let mut space =
            Self { bytes: vec![0; SIZE], writable: vec![0; SIZE], last_next: CAPABILITIES, free: FIRST_CAPABILITY };
        space.set(VENDOR, &id.vendor.to_le_bytes());
        space.set(DEVICE, &id.device.to_le_bytes());
        space.set(REVISION, &[id.revision]);
        let [base, sub, interface] = id.class;
        space.set(CLASS, &[interface, sub, base]);
        space.set(SUBSYSTEM_VENDOR, &id.subsystem_vendor.to_le_bytes());
        space.set(SUBSYSTEM, &id.subsystem.to_le_bytes());
        space.allow(COMMAND, &COMMAND_WRITABLE.to_le_bytes());
        space
    }

    fn set(&mut self, at: usize, value: &[u8]) {
        for (to, from) in self.bytes.iter_mut().skip(at).zip(value) {
            *to = *from;
        }
    }

    fn allow(&mut self, at: usize, mask: &[u8]) {
        for (to, from) in self.writable.iter_mut().skip(at).zip(mask) {
            *to = *from;
        }
    }

    /// Adds a 64-bit memory BAR. The guest can find its size in the usual way.
    pub fn add_bar(&mut self, bar: Bar) {
        let at = BAR0 + 4 * usize::from(bar.index.min(4));
        // Memory, 64 bits wide, and whether it is prefetchable.
        let kind = 0b100 | u64::from(bar.prefetchable) << 3;
        self.set(at, &(bar.address | kind).to_le_bytes());
        self.allow(at, &(!(bar.size.wrapping_sub(1)) & !0xf).to_le_bytes());
    }

    /// Adds a capability and returns its offset, or nothing if there is no room left.
    pub fn add_capability(&mut self, capability: &Capability) -> Option<u8> {
        let at = self.free;
        let end = at.checked_add(2)?.checked_add(capability.body.len())?;
        if end > SIZE {
            return None;
        }
        let offset = u8::try_from(at).ok()?;
        self.set(STATUS, &STATUS_CAPABILITIES.to_le_bytes());
        self.set(self.last_next, &[offset]);
        self.set(at, &[capability.id, 0]);
        self.set(at + 2, &capability.body);
        self.allow(at + 2, &capability.writable);
        self.last_next = at + 1;
        self.free = end.next_multiple_of(4);
        Some(offset)
    }

    /// The guest reads; beyond the end are zeros (no extended capabilities).
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        data.fill(0);
        for (to, from) in data.iter_mut().zip(self.bytes.iter().skip(usize::from(offset))) {
            *to = *from;
        }
    }

    /// The guest writes; only what it may write changes.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        let at = usize::from(offset);
        for ((byte, mask), new) in self.bytes.iter_mut().zip(&self.writable).skip(at).zip(data) {
            *byte = *byte & !mask | new & mask;
        }
    }

    /// All registers as they are now, for a snapshot.
    #[must_use]
    pub fn save(&self) -> Vec<u8> {
        self.bytes.clone()
    }

    /// Takes over the registers of a snapshot; says whether they are those of a function like this one.
    #[must_use]
    pub fn restore(&mut self, saved: &[u8]) -> bool {
        let fixed = |bytes: &[u8]| -> Vec<u8> { bytes.iter().zip(&self.writable).map(|(b, w)| b & !w).collect() };
        if saved.len() != SIZE || fixed(saved) != fixed(&self.bytes) {
            return false;
        }
        self.bytes.copy_from_slice(saved);
        true
    }

    /// `N` bytes as they are now, for the device behind the registers.
    #[must_use]
    pub fn get<const N: usize>(&self, at: u8) -> [u8; N] {
        let mut data = [0; N];
        self.read(u16::from(at), &mut data);
        data
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space() -> ConfigSpace {
        ConfigSpace::new(Identity {
            vendor: 0x1af4,
            device: 0x1044,
            subsystem_vendor: 0x1af4,
            subsystem: 0x40,
            revision: 1,
            class: [0xff, 0, 0],
        })
    }

    #[test]
    fn identity_cannot_be_written() {
        let mut s = space();
        s.write(0, &[0xff; 16]);
        assert_eq!(s.get(0), [0xf4, 0x1a, 0x44, 0x10]);
        assert_eq!(s.get(4), 0x0406u16.to_le_bytes(), "command keeps what is implemented");
    }

    #[test]
    fn a_bar_is_sized_and_moved_back() {
        let mut s = space();
        s.add_bar(Bar { index: 2, address: 0x10_4000_0000, size: 0x1000_0000, prefetchable: true });
        s.write(0x18, &[0xff; 8]);
        assert_eq!(u64::from_le_bytes(s.get(0x18)), !0xfff_ffff | 0b1100);
        s.write(0x18, &0x10_4000_0000u64.to_le_bytes());
        assert_eq!(u64::from_le_bytes(s.get(0x18)), 0x10_4000_0000 | 0b1100);
    }

    #[test]
    fn capabilities_are_linked() {
        let mut s = space();
        let a = s.add_capability(&Capability { id: 9, body: vec![5, 6, 7], writable: vec![0, 0xff] }).unwrap();
        let b = s.add_capability(&Capability { id: 0x11, body: vec![8; 10], writable: vec![] }).unwrap();
        assert_eq!(s.get(0x34), [a]);
        assert_eq!(s.get(a), [9, b, 5, 6, 7]);
        assert_eq!(s.get(b), [0x11, 0]);
        s.write(u16::from(a), &[0; 5]);
        assert_eq!(s.get(a), [9, b, 5, 0, 7]);
        assert!(s.add_capability(&Capability { id: 9, body: vec![0; 250], writable: vec![] }).is_none());
    }

    #[test]
    fn registers_are_taken_over_by_the_same_function_only() {
        let mut s = space();
        s.write(4, &[6, 0]);
        let saved = s.save();
        let mut restored = space();
        assert!(restored.restore(&saved));
        assert_eq!(restored, s);
        for bad in [&saved[..255], &[0; SIZE], &[]] {
            assert!(!restored.restore(bad));
        }
        assert_eq!(restored, s);
    }

    #[test]
    fn accesses_beyond_the_end_are_harmless() {
        let mut s = space();
        let before = s.clone();
        s.write(0xfe, &[0xff; 8]);
        s.write(u16::MAX, &[0xff; 8]);
        let mut data = [1; 8];
        s.read(0x1000, &mut data);
        assert_eq!(data, [0; 8]);
        assert_eq!(s, before);
    }
}
