//! Requests that wait for their fence.
//!
//! A fence is on a timeline: one of a context's rings, or the device's own. A timeline only goes forward, so it is
//! enough to remember how far it got; a fence may be reported before its request is parked (the engine may reach it
//! while it is being created), and an earlier one after a later one.

use std::collections::{BTreeSet, HashMap};

/// What a fence is ordered by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Timeline {
    /// The device's own.
    Device,
    /// Of one ring of one context. Both count: contexts have rings with the same number.
    Ring {
        /// The context.
        context: u32,
        /// The ring.
        ring: u8,
    },
}

/// A point on a timeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fence {
    /// Of which timeline.
    pub timeline: Timeline,
    /// The guest's number for it.
    pub id: u64,
}

/// The requests that wait, as values of type `T`.
#[derive(Debug)]
pub struct FenceTable<T> {
    reached: HashMap<Timeline, u64>,
    parked: Vec<(Fence, T)>,
}

impl<T> Default for FenceTable<T> {
    fn default() -> Self {
        Self { reached: HashMap::new(), parked: Vec::new() }
    }
}

impl<T> FenceTable<T> {
    /// The engine reached `fence`.
    pub fn reach(&mut self, fence: Fence) {
        let reached = self.reached.entry(fence.timeline).or_insert(fence.id);
        *reached = (*reached).max(fence.id);
    }

    /// Keeps `value` until `fence` is reached.
    pub fn park(&mut self, fence: Fence, value: T) {
        self.parked.push((fence, value));
    }

    fn is_reached(&self, fence: Fence) -> bool {
        self.reached.get(&fence.timeline).is_some_and(|id| *id >= fence.id)
    }

    /// Takes out what need not wait any more, oldest first.
    pub fn take_reached(&mut self) -> Vec<T> {
        if !self.parked.iter().any(|(fence, _)| self.is_reached(*fence)) {
            return Vec::new();
        }
        let (done, parked) =
            std::mem::take(&mut self.parked).into_iter().partition(|(fence, _)| self.is_reached(*fence));
        self.parked = parked;
        let done: Vec<(Fence, T)> = done;
        done.into_iter().map(|(_, value)| value).collect()
    }

    /// Takes out what waits for contexts that are not among `alive`, and forgets how far their rings got: the next
    /// context with such a number begins anew.
    pub fn take_contexts_except(&mut self, alive: &BTreeSet<u32>) -> Vec<T> {
        let dead = |timeline: &Timeline| matches!(timeline, Timeline::Ring { context, .. } if !alive.contains(context));
        self.reached.retain(|timeline, _| !dead(timeline));
        if !self.parked.iter().any(|(fence, _)| dead(&fence.timeline)) {
            return Vec::new();
        }
        let (done, parked): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.parked).into_iter().partition(|(fence, _)| dead(&fence.timeline));
        self.parked = parked;
        done.into_iter().map(|(_, value)| value).collect()
    }

    /// Takes out everything. How far the timelines got stays known.
    pub fn take_all(&mut self) -> Vec<T> {
        std::mem::take(&mut self.parked).into_iter().map(|(_, value)| value).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn on(context: u32, ring: u8, id: u64) -> Fence {
        Fence { timeline: Timeline::Ring { context, ring }, id }
    }

    #[test]
    fn a_fence_reached_while_it_was_created_does_not_wait() {
        let mut t = FenceTable::default();
        t.reach(on(1, 1, 7));
        t.park(on(1, 1, 7), "a");
        assert_eq!(t.take_reached(), ["a"]);
    }

    #[test]
    fn reports_out_of_order_do_not_set_a_timeline_back() {
        let mut t = FenceTable::default();
        t.reach(on(1, 1, 9));
        t.reach(on(1, 1, 3));
        t.park(on(1, 1, 8), "a");
        assert_eq!(t.take_reached(), ["a"]);
    }

    #[test]
    fn a_ring_of_another_context_is_another_timeline() {
        let mut t = FenceTable::default();
        t.park(on(1, 1, 5), "a");
        t.park(on(2, 1, 6), "b");
        t.park(Fence { timeline: Timeline::Device, id: 1 }, "c");
        t.reach(on(2, 1, 6));
        assert_eq!(t.take_reached(), ["b"]);
        t.reach(Fence { timeline: Timeline::Device, id: 2 });
        assert_eq!(t.take_reached(), ["c"]);
        assert_eq!(t.take_all(), ["a"]);
    }

    #[test]
    fn a_context_goes_with_all_that_waits_for_it() {
        let mut t = FenceTable::default();
        t.reach(on(1, 1, 100));
        t.park(on(1, 1, 101), "a");
        t.park(on(2, 1, 101), "b");
        assert_eq!(t.take_contexts_except(&BTreeSet::from([2])), ["a"]);
        t.park(on(1, 1, 50), "new");
        assert!(t.take_reached().is_empty(), "the new context does not inherit the old one's fences");
    }
}
