//! MSI-X (PCI 3.0 section 6.8.2): the vector table, the pending bits, and delivery.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use super::Capability;
use crate::irq::{Msi, MsiSink};

/// Bytes of a table entry.
pub const TABLE_ENTRY_SIZE: u64 = 16;
/// Bytes of the pending bit array for up to 64 vectors.
pub const PBA_SIZE: u64 = 8;
/// Bytes of the capability after its header.
pub const MSIX_CAPABILITY_LEN: usize = 10;
/// The most vectors a function may have here.
pub const MAX_VECTORS: u16 = 64;

const CONTROL_ENABLE: u16 = 1 << 15;
const CONTROL_FUNCTION_MASK: u16 = 1 << 14;
const VECTOR_MASKED: u32 = 1;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    address_low: u32,
    address_high: u32,
    data: u32,
    control: u32,
}

impl Entry {
    fn word(&mut self, at: u64) -> Option<&mut u32> {
        match at {
            0 => Some(&mut self.address_low),
            1 => Some(&mut self.address_high),
            2 => Some(&mut self.data),
            3 => Some(&mut self.control),
            _ => None,
        }
    }
}

/// Table, pending bits and message control.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    control: u16,
    table: Vec<Entry>,
    pending: u64,
}

/// A function's MSI-X vectors.
pub struct Msix {
    state: Mutex<State>,
    sink: Arc<dyn MsiSink>,
}

impl Msix {
    /// `vectors` vectors (at most [`MAX_VECTORS`]), all masked, MSI-X disabled.
    #[must_use]
    pub fn new(vectors: u16, sink: Arc<dyn MsiSink>) -> Self {
        let masked = Entry { address_low: 0, address_high: 0, data: 0, control: VECTOR_MASKED };
        let table = vec![masked; usize::from(vectors.min(MAX_VECTORS))];
        Self { state: Mutex::new(State { control: 0, table, pending: 0 }), sink }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Number of vectors.
    #[must_use]
    pub fn vectors(&self) -> u16 {
        u16::try_from(self.lock().table.len()).unwrap_or(0)
    }

    /// The capability: table at `table` and pending bits at `pba`, both offsets into BAR `bar`.
    #[must_use]
    pub fn capability(&self, bar: u8, table: u32, pba: u32) -> Capability {
        let last = self.vectors().saturating_sub(1);
        let mut body = last.to_le_bytes().to_vec();
        body.extend((table | u32::from(bar)).to_le_bytes());
        body.extend((pba | u32::from(bar)).to_le_bytes());
        let writable = (CONTROL_ENABLE | CONTROL_FUNCTION_MASK).to_le_bytes().to_vec();
        Capability { id: 0x11, body, writable }
    }

    /// The guest wrote message control: what was held back may be due.
    pub fn set_control(&self, control: u16) {
        let due = {
            let mut state = self.lock();
            state.control = control & (CONTROL_ENABLE | CONTROL_FUNCTION_MASK);
            state.take_due()
        };
        self.deliver(&due);
    }

    /// Signals `vector`; masked, it stays pending. A vector the function does not have is nothing.
    pub fn signal(&self, vector: u16) {
        let due = {
            let mut state = self.lock();
            if usize::from(vector) >= state.table.len() || state.control & CONTROL_ENABLE == 0 {
                return;
            }
            state.pending |= 1 << vector;
            state.take_due()
        };
        self.deliver(&due);
    }

    fn deliver(&self, due: &[Msi]) {
        for msi in due {
            self.sink.signal(*msi);
        }
    }

    /// The guest reads the table.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        let mut state = self.lock();
        data.fill(0);
        for (at, word) in (offset / 4..).zip(data.chunks_mut(4)) {
            if let Some(value) = state.word(at).filter(|_| offset.is_multiple_of(4) && word.len() == 4) {
                word.copy_from_slice(&value.to_le_bytes());
            }
        }
    }

    /// The guest writes the table, in aligned 4 or 8 byte accesses; others are ignored.
    pub fn write_table(&self, offset: u64, data: &[u8]) {
        let due = {
            let mut state = self.lock();
            for (at, bytes) in (offset / 4..).zip(data.chunks(4)) {
                if let (Some(word), Ok(bytes)) = (state.word(at), <[u8; 4]>::try_from(bytes))
                    && offset.is_multiple_of(4)
                {
                    *word = u32::from_le_bytes(bytes);
                }
            }
            state.take_due()
        };
        self.deliver(&due);
    }

    /// The guest reads the pending bits.
    pub fn read_pba(&self, offset: u64, data: &mut [u8]) {
        let bytes = self.lock().pending.to_le_bytes();
        data.fill(0);
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        for (to, from) in data.iter_mut().zip(bytes.iter().skip(start)) {
            *to = *from;
        }
    }

    /// Everything, for a snapshot.
    #[must_use]
    pub fn save(&self) -> State {
        self.lock().clone()
    }

    /// Takes over the state of a snapshot; says whether it is that of a function with as many vectors. Nothing is
    /// delivered: what is pending is behind a mask.
    #[must_use]
    pub fn restore(&self, saved: &State) -> bool {
        let mut state = self.lock();
        let fits = saved.table.len() == state.table.len();
        if fits {
            *state = saved.clone();
        }
        fits
    }

    /// Back to the state after reset, as when the machine reboots.
    pub fn reset(&self) {
        let mut state = self.lock();
        state.control = 0;
        state.pending = 0;
        for entry in &mut state.table {
            *entry = Entry { address_low: 0, address_high: 0, data: 0, control: VECTOR_MASKED };
        }
    }
}

impl State {
    fn word(&mut self, at: u64) -> Option<&mut u32> {
        self.table.get_mut(usize::try_from(at / 4).ok()?)?.word(at % 4)
    }

    /// Takes the messages that may go out now.
    fn take_due(&mut self) -> Vec<Msi> {
        if self.pending == 0 || self.control & CONTROL_ENABLE == 0 || self.control & CONTROL_FUNCTION_MASK != 0 {
            return Vec::new();
        }
        let mut due = Vec::new();
        for (vector, entry) in self.table.iter().enumerate() {
            if self.pending & 1 << vector != 0 && entry.control & VECTOR_MASKED == 0 {
                self.pending &= !(1 << vector);
                let address = u64::from(entry.address_low) | u64::from(entry.address_high) << 32;
                due.push(Msi { address, data: entry.data });
            }
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Sink(Mutex<Vec<Msi>>);
    impl MsiSink for Sink {
        fn signal(&self, msi: Msi) {
            self.0.lock().unwrap().push(msi);
        }
    }

    fn entry(msix: &Msix, vector: u64, data: u32, control: u32) {
        msix.write_table(vector * 16, &0xfee0_1000u64.to_le_bytes());
        msix.write_table(vector * 16 + 8, &data.to_le_bytes());
        msix.write_table(vector * 16 + 12, &control.to_le_bytes());
    }

    #[test]
    fn signals_go_out_when_nothing_masks_them() {
        let sink = Arc::new(Sink::default());
        let msix = Msix::new(3, sink.clone());
        entry(&msix, 1, 0x41, 0);
        msix.signal(1);
        assert!(sink.0.lock().unwrap().is_empty(), "MSI-X is off");
        msix.set_control(CONTROL_ENABLE | CONTROL_FUNCTION_MASK);
        msix.signal(1);
        assert!(sink.0.lock().unwrap().is_empty(), "the function is masked");
        let mut pba = [0; 8];
        msix.read_pba(0, &mut pba);
        assert_eq!(pba[0], 0b10);
        msix.set_control(CONTROL_ENABLE);
        assert_eq!(*sink.0.lock().unwrap(), [Msi { address: 0xfee0_1000, data: 0x41 }]);
        msix.signal(2);
        assert_eq!(sink.0.lock().unwrap().len(), 1, "the vector is masked");
        entry(&msix, 2, 0x42, 0);
        assert_eq!(sink.0.lock().unwrap().len(), 2);
        msix.signal(3);
        msix.signal(u16::MAX);
        assert_eq!(sink.0.lock().unwrap().len(), 2);
    }

    #[test]
    fn wild_table_accesses_are_harmless() {
        let msix = Msix::new(2, Arc::new(Sink::default()));
        for offset in [1, 3, 30, 31, 32, 0x1000, u64::MAX - 3, u64::MAX] {
            msix.write_table(offset, &[0xff; 8]);
            msix.read_table(offset, &mut [0; 8]);
            msix.read_pba(offset, &mut [0; 8]);
        }
        let mut word = [0; 4];
        msix.read_table(12, &mut word);
        assert_eq!(u32::from_le_bytes(word), VECTOR_MASKED);
    }
}
