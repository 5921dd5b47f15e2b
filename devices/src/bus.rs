//! An address space: port I/O or MMIO ranges, and the devices behind them.
//!
//! A bus is put together once, then shared by all vCPU threads without a lock; each device has its own.

use std::sync::Arc;

/// A device that answers accesses to a range of a bus. Called on vCPU threads, several at a time.
pub trait BusDevice: Send + Sync {
    /// The guest reads `data.len()` bytes (1, 2, 4 or 8) at `offset` from the range's start. What is left untouched reads
    /// as all ones.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// The guest writes `data` at `offset` from the range's start.
    fn write(&self, offset: u64, data: &[u8]);
}

/// Two devices want the same addresses: a mistake of the plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the range {start:#x}+{len:#x} overlaps another device's, is empty, or wraps")]
pub struct Overlap {
    /// First address.
    pub start: u64,
    /// Length.
    pub len: u64,
}

struct Range {
    start: u64,
    last: u64,
    device: Arc<dyn BusDevice>,
}

/// An address space.
#[derive(Default)]
pub struct Bus {
    ranges: Vec<Range>,
}

impl Bus {
    /// An empty address space.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts `device` at `start..start + len`.
    ///
    /// # Errors
    /// If any of it is taken.
    pub fn insert(&mut self, start: u64, len: u64, device: Arc<dyn BusDevice>) -> Result<(), Overlap> {
        let overlap = Overlap { start, len };
        let last = len.checked_sub(1).and_then(|n| start.checked_add(n)).ok_or(overlap)?;
        let at = self.ranges.partition_point(|r| r.start < start);
        let before_ends = at.checked_sub(1).and_then(|i| self.ranges.get(i)).is_none_or(|r| r.last < start);
        let after_begins = self.ranges.get(at).is_none_or(|r| last < r.start);
        if !before_ends || !after_begins {
            return Err(overlap);
        }
        self.ranges.insert(at, Range { start, last, device });
        Ok(())
    }

    /// The device that answers the whole access, and the offset into its range.
    fn find(&self, addr: u64, len: usize) -> Option<(&dyn BusDevice, u64)> {
        let at = self.ranges.partition_point(|r| r.start <= addr).checked_sub(1)?;
        let range = self.ranges.get(at)?;
        let end = addr.checked_add(u64::try_from(len).ok()?.checked_sub(1)?)?;
        (end <= range.last).then(|| (range.device.as_ref(), addr - range.start))
    }

    /// The guest reads. Where nothing answers, the bus floats: all ones.
    pub fn read(&self, addr: u64, data: &mut [u8]) {
        data.fill(0xff);
        match self.find(addr, data.len()) {
            Some((device, offset)) => device.read(offset, data),
            None => log::trace!("read of {} bytes at {addr:#x}: nothing there", data.len()),
        }
    }

    /// The guest writes. Where nothing answers, nothing happens.
    pub fn write(&self, addr: u64, data: &[u8]) {
        match self.find(addr, data.len()) {
            Some((device, offset)) => device.write(offset, data),
            None => log::trace!("write of {data:x?} at {addr:#x}: nothing there"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[derive(Default)]
    struct Recorder(Mutex<Vec<(u64, Vec<u8>)>>);

    impl BusDevice for Recorder {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(u8::try_from(offset).unwrap());
        }
        fn write(&self, offset: u64, data: &[u8]) {
            self.0.lock().unwrap().push((offset, data.to_vec()));
        }
    }

    #[test]
    fn accesses_reach_the_device_they_lie_in() {
        let (a, b) = (Arc::new(Recorder::default()), Arc::new(Recorder::default()));
        let mut bus = Bus::new();
        bus.insert(0x100, 0x10, a.clone()).unwrap();
        bus.insert(0x110, 0x10, b.clone()).unwrap();
        bus.write(0x104, &[1]);
        bus.write(0x110, &[2, 3]);
        bus.write(0x10f, &[9, 9]);
        bus.write(0xff, &[9]);
        assert_eq!(*a.0.lock().unwrap(), [(4, vec![1])]);
        assert_eq!(*b.0.lock().unwrap(), [(0, vec![2, 3])]);
        let mut data = [0; 2];
        bus.read(0x11e, &mut data);
        assert_eq!(data, [14, 14]);
        bus.read(0x11f, &mut data);
        assert_eq!(data, [0xff, 0xff], "an access across the end is nobody's");
    }

    #[test]
    fn overlaps_are_refused() {
        let d = || Arc::new(Recorder::default());
        let mut bus = Bus::new();
        bus.insert(0x100, 0x10, d()).unwrap();
        for (start, len) in [(0x10f, 1), (0xf0, 0x11), (0x80, 0x200), (0x104, 2), (0x200, 0), (u64::MAX, 2)] {
            assert!(bus.insert(start, len, d()).is_err(), "{start:#x}+{len:#x}");
        }
        bus.insert(u64::MAX, 1, d()).unwrap();
    }
}
