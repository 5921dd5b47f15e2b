//! The VM generation ID ("Virtual Machine Generation ID", Microsoft 2012; Linux' drivers/virt/vmgenid.c): 16 bytes of guest
//! memory that are others whenever the machine goes on from a snapshot, so that the guest does not use the random numbers,
//! keys and serial numbers twice that its twins use too.

use std::sync::Arc;

use rustix::rand::{GetRandomFlags, getrandom};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::GenericEvent;

/// Bytes of an ID.
const SIZE: usize = 16;

/// Why a machine has no new generation ID.
#[derive(Debug, thiserror::Error)]
pub enum VmGenIdError {
    /// The host gives no random numbers.
    #[error("the host gives no random numbers for the VM generation ID: {0}")]
    Random(#[source] std::io::Error),
    /// There is no RAM where the ID goes.
    #[error("no RAM where the VM generation ID goes, at {address:#x}: {source}")]
    Memory {
        /// Where it goes.
        address: u64,
        /// What guest memory says.
        source: GuestMemoryError,
    },
}

/// Where the ID is, and how the guest learns of a new one. It has no state of its own: the ID is in guest memory.
pub struct VmGenId {
    address: GuestAddress,
    events: Arc<GenericEvent>,
    event: u8,
}

impl VmGenId {
    /// An ID at `address`; `event` are the bits of `events` that tell of a new one. Both are what the ACPI tables say.
    #[must_use]
    pub fn new(address: GuestAddress, events: Arc<GenericEvent>, event: u8) -> Self {
        Self { address, events, event }
    }

    /// Gives the machine an ID before its first instruction. There is nobody to be told.
    ///
    /// # Errors
    /// See [`VmGenIdError`].
    pub fn initialise(
        memory: &impl Bytes<GuestAddress, E = GuestMemoryError>,
        address: GuestAddress,
    ) -> Result<(), VmGenIdError> {
        let mut id = [0; SIZE];
        // Up to 256 bytes come whole.
        getrandom(&mut id, GetRandomFlags::empty()).map_err(|errno| VmGenIdError::Random(errno.into()))?;
        memory.write_slice(&id, address).map_err(|source| VmGenIdError::Memory { address: address.0, source })
    }

    /// Gives a machine that was restored or cloned a new ID and tells the guest. To be called while no vCPU runs, when the
    /// interrupt controller has its state back: the ID is new from the guest's first instruction on, but the guest looks at
    /// it only when it serves the interrupt.
    ///
    /// # Errors
    /// See [`VmGenIdError`]. Then the machine must not go on: it would take itself for its twin.
    pub fn renew(&self, memory: &impl Bytes<GuestAddress, E = GuestMemoryError>) -> Result<(), VmGenIdError> {
        Self::initialise(memory, self.address)?;
        self.events.raise(self.event);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use vm_memory::GuestMemoryMmap;

    use super::*;
    use crate::bus::BusDevice;
    use crate::irq::IrqLine;

    const ADDRESS: GuestAddress = GuestAddress(0x1000);

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x2000)]).unwrap()
    }

    fn id(memory: &GuestMemoryMmap) -> [u8; SIZE] {
        memory.read_obj(ADDRESS).unwrap()
    }

    /// Remembers what the ID was when the guest was interrupted.
    struct Line {
        memory: GuestMemoryMmap,
        seen: Arc<Mutex<Vec<[u8; SIZE]>>>,
    }

    impl IrqLine for Line {
        fn pulse(&self) {
            self.seen.lock().unwrap().push(id(&self.memory));
        }
    }

    #[test]
    fn the_guest_is_told_of_each_new_id_when_it_is_there() {
        let memory = memory();
        VmGenId::initialise(&memory, ADDRESS).unwrap();
        let mut ids = vec![[0; SIZE], id(&memory)];
        let seen = Arc::new(Mutex::new(Vec::new()));
        let events = Arc::new(GenericEvent::new(Arc::new(Line { memory: memory.clone(), seen: seen.clone() })));
        let generation = VmGenId::new(ADDRESS, events.clone(), 1 << 1);
        for _ in 0..3 {
            generation.renew(&memory).unwrap();
            ids.push(id(&memory));
        }
        assert_eq!(seen.lock().unwrap()[..], ids[2..], "an interrupt for each, after its ID was written");
        let mut event = [0];
        events.read(0, &mut event);
        assert_eq!(event, [1 << 1]);
        for (index, one) in ids.iter().enumerate() {
            assert!(!ids[..index].contains(one), "{ids:x?}");
        }
        let after: u64 = memory.read_obj(GuestAddress(ADDRESS.0 + SIZE as u64)).unwrap();
        assert_eq!(after, 0, "16 bytes and no more");
    }

    #[test]
    fn a_machine_without_memory_for_it_is_told_apart_and_not_interrupted() {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let events = Arc::new(GenericEvent::new(Arc::new(Line { memory: memory(), seen: seen.clone() })));
        let error = VmGenId::new(GuestAddress(0x1ff8), events, 1).renew(&memory()).unwrap_err().to_string();
        assert!(error.contains("at 0x1ff8"), "{error}");
        assert!(seen.lock().unwrap().is_empty());
    }
}
