//! The entropy device, driven directly and by the worker.

use std::fs::File;

use super::Rng;
use crate::testkit::{Buffer, Driver};

fn rng() -> Box<Rng> {
    Box::new(Rng::new(File::open("/dev/urandom").unwrap()))
}

#[test]
fn fills_the_writable_buffers() {
    let mut d = Driver::new(rng());
    let head = d.offer(0, &[Buffer::writable(64), Buffer::writable(32)]);
    d.run(0).unwrap();
    let used = d.used(0);
    assert_eq!(used, vec![(head, 96)]);
    assert_ne!(d.read(0, head, 1), vec![0; 32]);
    assert_eq!(d.interrupts(0), 1);
}

#[test]
fn readable_buffers_and_wild_addresses_are_answered_with_nothing() {
    let mut d = Driver::new(rng());
    d.offer(0, &[Buffer::readable(&[1, 2, 3])]);
    d.offer_raw(0, u64::MAX - 4, 64, true);
    d.offer_raw(0, 0, u32::MAX, true);
    d.run(0).unwrap();
    let lens: Vec<u32> = d.used(0).into_iter().map(|(_, len)| len).collect();
    assert_eq!(lens, [0, 0, 4096]);
}

#[test]
fn an_impossible_ring_index_breaks_the_queue() {
    let mut d = Driver::new(rng());
    d.set_avail_idx(0, 1000);
    assert!(d.run(0).is_err());
}

#[test]
fn more_chains_than_one_dispatch_takes_are_all_served() {
    let mut d = Driver::new(rng());
    for _ in 0..64 {
        d.offer(0, &[Buffer::writable(8)]);
    }
    let running = d.start_worker();
    running.wait_for_interrupt(0);
    let mut d = running.stop();
    d.run(0).unwrap();
    assert_eq!(d.used(0).len(), 64);
}

#[test]
fn runs_on_a_worker_and_comes_back() {
    let mut d = Driver::new(rng());
    d.offer(0, &[Buffer::writable(64)]);
    let running = d.start_worker();
    running.wait_for_interrupt(0);
    let mut d = running.stop();
    assert_eq!(d.used(0).len(), 1);
    d.offer(0, &[Buffer::writable(8)]);
    d.run(0).unwrap();
    assert_eq!(d.used(0).len(), 2);
}

crate::conformance_tests!(super::rng);
