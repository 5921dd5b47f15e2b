//! A split virtqueue (virtio 1.3 section 2.7) with the checks that every device needs.
//!
//! [`VirtQueue`] adds three things to `virtio_queue::Queue`: it knows which chains the device holds, so that a driver
//! which offers a chain twice, or a device which returns one twice, is caught; it bounds how much one dispatch takes, so
//! that a driver that never stops adding buffers cannot keep a worker from being stopped; and errors carry the queue's
//! number.

use std::sync::Arc;

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryLoadGuard};

use crate::device::{Broken, Interrupt, Memory};

/// A descriptor chain taken from a queue. It keeps the memory it points into alive.
pub type Chain = DescriptorChain<GuestMemoryLoadGuard<Memory>>;

/// A virtqueue in use by a device.
pub struct VirtQueue {
    index: u16,
    queue: Queue,
    mem: GuestMemoryAtomic<Memory>,
    interrupt: Arc<dyn Interrupt>,
    held: Vec<bool>,
    budget: u16,
    /// The last pop found the ring empty.
    drained: bool,
    /// Chains were given back since the driver was last told.
    unsignalled: bool,
}

impl VirtQueue {
    /// Takes over a configured queue. A queue that is not ready yields nothing.
    #[must_use]
    pub fn new(index: u16, queue: Queue, mem: GuestMemoryAtomic<Memory>, interrupt: Arc<dyn Interrupt>) -> Self {
        let held = vec![false; usize::from(queue.size())];
        let budget = queue.size();
        Self { index, queue, mem, interrupt, held, budget, drained: false, unsignalled: false }
    }

    /// The queue's number.
    #[must_use]
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Number of descriptors in the ring.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Whether the driver enabled the queue.
    #[must_use]
    pub fn ready(&self) -> bool {
        self.queue.ready()
    }

    fn ring(&self, source: virtio_queue::Error) -> Broken {
        Broken::Ring { index: self.index, source }
    }

    /// The next available chain, or nothing when the ring is empty or this dispatch has had its share (the worker
    /// then calls again).
    ///
    /// # Errors
    /// If the ring's indices are impossible or the chain is held already.
    pub fn pop(&mut self) -> Result<Option<Chain>, Broken> {
        if !self.queue.ready() || self.budget == 0 {
            return Ok(None);
        }
        let mem = self.mem.memory();
        let chain = match self.queue.iter(mem) {
            Ok(mut iter) => iter.next(),
            Err(source) => return Err(self.ring(source)),
        };
        self.drained = chain.is_none();
        let Some(chain) = chain else { return Ok(None) };
        let (index, head) = (self.index, chain.head_index());
        match self.held.get_mut(usize::from(head)) {
            Some(held) if !*held => *held = true,
            _ => return Err(Broken::DuplicateHead { index, head }),
        }
        self.budget = self.budget.saturating_sub(1);
        Ok(Some(chain))
    }

    /// Puts the chain popped last back, as if it had not been taken: the device has no use for it yet.
    pub fn undo_pop(&mut self, chain: &Chain) {
        if let Some(held) = self.held.get_mut(usize::from(chain.head_index())) {
            *held = false;
        }
        self.queue.go_to_previous_position();
    }

    /// Gives a chain back to the driver, `len` bytes of its device-writable part having been written.
    ///
    /// # Errors
    /// If the device does not hold the chain, or the used ring is not in guest memory.
    pub fn push(&mut self, head: u16, len: u32) -> Result<(), Broken> {
        match self.held.get_mut(usize::from(head)) {
            Some(held) if *held => *held = false,
            _ => return Err(Broken::UnknownHead { index: self.index, head }),
        }
        self.unsignalled = true;
        let mem = self.mem.memory();
        self.queue.add_used(&*mem, head, len).map_err(|e| self.ring(e))
    }

    /// Interrupts the driver if it wants to hear of what was pushed (virtio 1.3 section 2.7.7). Call it once after a
    /// batch; without anything pushed it does nothing.
    ///
    /// # Errors
    /// If the rings are not in guest memory.
    pub fn notify(&mut self) -> Result<(), Broken> {
        if !std::mem::take(&mut self.unsignalled) {
            return Ok(());
        }
        let mem = self.mem.memory();
        if self.queue.needs_notification(&*mem).map_err(|e| self.ring(e))? {
            self.interrupt.queue(self.index);
        }
        Ok(())
    }

    /// This dispatch has had its share, though the ring may have more: the device is called again, after whoever else waits.
    pub fn end_turn(&mut self) {
        self.budget = 0;
    }

    /// Ends a dispatch: asks the driver for kicks (event index) and gives the queue its next share. Says whether the
    /// device should be called again at once, because it stopped for its share or because chains arrived after it had
    /// seen the ring empty. Chains it left in the ring on purpose are no reason: it takes them when it has a use.
    pub(crate) fn rearm(&mut self) -> Result<bool, Broken> {
        let (exhausted, drained) = (self.exhausted(), std::mem::take(&mut self.drained));
        self.budget = self.queue.size();
        if !self.queue.ready() {
            return Ok(false);
        }
        let mem = self.mem.memory();
        let available = self.queue.enable_notification(&*mem).map_err(|e| self.ring(e))?;
        Ok(available && (exhausted || drained))
    }

    /// Whether the last dispatch ended because it had its share, not because the ring was empty.
    pub(crate) fn exhausted(&self) -> bool {
        self.budget == 0
    }

    /// Whether something was popped since the last [`VirtQueue::rearm`], or was looked for in vain.
    pub(crate) fn wants_rearm(&self) -> bool {
        self.drained || self.budget != self.queue.size()
    }

    /// How many chains the device holds.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.held.iter().filter(|h| **h).count()
    }

    /// The queue's state, for the transport and for snapshots.
    #[must_use]
    pub fn state(&self) -> QueueState {
        self.queue.state()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use virtio_queue::{Queue, QueueT};
    use vm_memory::{Bytes, GuestAddress, GuestMemoryAtomic};

    use super::VirtQueue;
    use crate::device::{Broken, Interrupt, Memory};

    struct Silent;
    impl Interrupt for Silent {
        fn queue(&self, _: u16) {}
        fn config_changed(&self) {}
        fn needs_reset(&self) {}
        fn is_broken(&self) -> bool {
            false
        }
    }

    fn queue(heads: &[u16]) -> VirtQueue {
        let mem = Memory::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
        for i in 0..8u64 {
            mem.write_obj(0x8000u64, GuestAddress(i * 16)).unwrap();
            mem.write_obj(64u32, GuestAddress(i * 16 + 8)).unwrap();
        }
        for (i, head) in (0u64..).zip(heads) {
            mem.write_obj(*head, GuestAddress(0x1004 + 2 * i)).unwrap();
        }
        mem.write_obj(u16::try_from(heads.len()).unwrap(), GuestAddress(0x1002)).unwrap();
        let mut q = Queue::new(8).unwrap();
        q.set_size(8);
        q.try_set_desc_table_address(GuestAddress(0)).unwrap();
        q.try_set_avail_ring_address(GuestAddress(0x1000)).unwrap();
        q.try_set_used_ring_address(GuestAddress(0x2000)).unwrap();
        q.set_ready(true);
        VirtQueue::new(0, q, GuestMemoryAtomic::new(mem), Arc::new(Silent))
    }

    #[test]
    fn a_chain_offered_while_held_breaks_the_queue() {
        let mut q = queue(&[3, 3]);
        let first = q.pop().unwrap().unwrap();
        assert!(matches!(q.pop(), Err(Broken::DuplicateHead { head: 3, .. })));
        assert_eq!(q.in_flight(), 1);
        q.push(first.head_index(), 0).unwrap();
        assert!(matches!(q.push(3, 0), Err(Broken::UnknownHead { head: 3, .. })));
    }

    #[test]
    fn a_dispatch_ends_after_the_size_of_the_queue() {
        let mut q = queue(&[0, 1, 2, 3, 4, 5, 6, 7]);
        while let Some(chain) = q.pop().unwrap() {
            q.push(chain.head_index(), 0).unwrap();
        }
        assert!(q.exhausted());
        assert!(!q.rearm().unwrap(), "nothing is left");
        assert!(!q.exhausted());
    }

    #[test]
    fn chains_left_alone_on_purpose_do_not_call_the_device_again() {
        let mut q = queue(&[0, 1]);
        let chain = q.pop().unwrap().unwrap();
        q.undo_pop(&chain);
        assert!(!q.rearm().unwrap());
        assert_eq!(q.pop().unwrap().unwrap().head_index(), 0);
    }

    #[test]
    fn heads_outside_the_table_are_refused() {
        let mut q = queue(&[8]);
        assert!(matches!(q.pop(), Ok(None) | Err(_)));
    }
}
