//! The transport, driven as a guest's virtio-pci driver would, and as no driver should.

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use devices::bus::BusDevice;
use devices::irq::{Msi, MsiSink};
use devices::pci::PciDevice;
use vm_memory::{Bytes, GuestAddress, GuestMemoryAtomic};
use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::device::Memory;
use crate::rng::Rng;

#[derive(Default)]
struct Sink {
    seen: Mutex<Vec<Msi>>,
    changed: Condvar,
}

impl MsiSink for Sink {
    fn signal(&self, msi: Msi) {
        self.seen.lock().unwrap().push(msi);
        self.changed.notify_all();
    }
}

impl Sink {
    fn wait(&self, count: usize) {
        let guard = self.seen.lock().unwrap();
        let (_g, timeout) =
            self.changed.wait_timeout_while(guard, Duration::from_secs(60), |s| s.len() < count).unwrap();
        assert!(!timeout.timed_out());
    }
}

#[derive(Default)]
struct Bells(Mutex<Vec<u64>>);

impl Doorbells for Bells {
    fn add(&self, address: u64, _: &EventFd) -> io::Result<()> {
        self.0.lock().unwrap().push(address);
        Ok(())
    }
    fn remove(&self, address: u64, _: &EventFd) {
        let mut bells = self.0.lock().unwrap();
        let at = bells.iter().position(|a| *a == address).expect("a doorbell that was added");
        bells.remove(at);
    }
}

struct Guest {
    transport: Arc<PciTransport>,
    mem: Memory,
    sink: Arc<Sink>,
    bells: Arc<Bells>,
    /// The transport asked for its owner.
    wanting: Arc<AtomicBool>,
    /// Threads that were made.
    threads: Arc<AtomicUsize>,
}

const BAR0: u64 = 0xc000_8000;

fn guest() -> Guest {
    let mem = Memory::from_ranges(&[(GuestAddress(0), 0x20000)]).unwrap();
    guest_with(mem, None).unwrap()
}

fn guest_with(mem: Memory, saved: Option<&TransportState>) -> io::Result<Guest> {
    let (sink, bells) = (Arc::new(Sink::default()), Arc::new(Bells::default()));
    let wanting = Arc::new(AtomicBool::new(false));
    let asked = wanting.clone();
    let threads = Arc::new(AtomicUsize::new(0));
    let made = threads.clone();
    let transport = PciTransport::new(Setup {
        id: "_rng0".into(),
        device: Box::new(Rng::new(File::open("/dev/urandom").unwrap())),
        bar0: BAR0,
        shared_memory: None,
        mem: GuestMemoryAtomic::new(mem.clone()),
        msi: sink.clone(),
        doorbells: bells.clone(),
        thread_setup: Arc::new(move || {
            made.fetch_add(1, Ordering::SeqCst);
            Ok(())
        }),
        wanting: Arc::new(move || asked.store(true, Ordering::SeqCst)),
        saved,
    })?;
    if saved.is_none() {
        transport.resume()?;
    }
    Ok(Guest { transport, mem, sink, bells, wanting, threads })
}

impl Guest {
    fn read(&self, offset: u64, len: usize) -> u64 {
        let mut data = [0; 8];
        self.transport.read(offset, &mut data[..len]);
        u64::from_le_bytes(data)
    }

    fn write(&self, offset: u64, len: usize, value: u64) {
        self.transport.write(offset, &value.to_le_bytes()[..len]);
        if self.wanting.swap(false, Ordering::SeqCst) {
            self.transport.resume().unwrap();
        }
    }

    fn status(&self) -> u64 {
        self.read(0x14, 1)
    }

    fn enable_msix(&self) {
        for vector in 0..2 {
            self.write(0x6000 + vector * 16, 4, 0xfee0_0000);
            self.write(0x6000 + vector * 16 + 8, 4, 0x40 + vector);
            self.write(0x6000 + vector * 16 + 12, 4, 0);
        }
        let cap = self.capability(0x11, None);
        self.transport.config_write(u16::from(cap) + 2, &0x8000u16.to_le_bytes());
    }

    fn capability(&self, id: u8, kind: Option<u8>) -> u8 {
        let mut next = [0; 1];
        self.transport.config_read(0x34, &mut next);
        while next[0] != 0 {
            let mut header = [0; 4];
            self.transport.config_read(u16::from(next[0]), &mut header);
            if header[0] == id && kind.is_none_or(|k| header[3] == k) {
                return next[0];
            }
            next[0] = header[1];
        }
        panic!("no capability {id:#x}");
    }

    fn negotiate(&self) {
        self.write(0x14, 1, 1);
        self.write(0x14, 1, 3);
        self.write(0x08, 4, 1);
        self.write(0x0c, 4, 1); // VERSION_1
        self.write(0x14, 1, 11);
        assert_eq!(self.status(), 11, "FEATURES_OK sticks");
    }

    fn set_up_queue(&self) {
        self.write(0x16, 2, 0);
        self.write(0x18, 2, 16);
        self.write(0x1a, 2, 1);
        self.write(0x20, 8, 0x1000);
        self.write(0x28, 4, 0x2000);
        self.write(0x2c, 4, 0);
        self.write(0x30, 8, 0x3000);
        self.write(0x1c, 2, 1);
    }

    fn offer(&self, n: u16) {
        let mem = &self.mem;
        mem.write_obj(0x8000u64, GuestAddress(0x1000)).unwrap();
        mem.write_obj(32u32, GuestAddress(0x1008)).unwrap();
        mem.write_obj(2u16, GuestAddress(0x100c)).unwrap();
        mem.write_obj(0u16, GuestAddress(0x2004 + 2 * u64::from(n))).unwrap();
        mem.write_obj(n + 1, GuestAddress(0x2002)).unwrap();
    }

    fn boot(&self) {
        self.enable_msix();
        self.negotiate();
        self.set_up_queue();
        self.write(0x14, 1, 15);
    }
}

#[test]
fn a_driver_brings_the_device_up_and_gets_its_buffer_back() {
    let g = guest();
    g.boot();
    assert_eq!(*g.bells.0.lock().unwrap(), [BAR0 + 0x3000]);
    g.offer(0);
    g.write(0x3000, 2, 0);
    g.sink.wait(1);
    assert_eq!(g.sink.seen.lock().unwrap()[0], Msi { address: 0xfee0_0000, data: 0x41 });
    assert_eq!(g.mem.read_obj::<u16>(GuestAddress(0x3002)).unwrap(), 1);
    assert_eq!(g.read(0x1000, 1), 1, "ISR");
    assert_eq!(g.read(0x1000, 1), 0, "reading cleared it");
}

#[test]
fn pausing_keeps_the_queue_where_it_was() {
    let g = guest();
    g.boot();
    g.offer(0);
    g.write(0x3000, 2, 0);
    g.sink.wait(1);
    assert!(g.transport.save().is_err(), "it runs");
    g.transport.pause();
    g.offer(1);
    g.write(0x3000, 2, 0);
    g.transport.resume().unwrap();
    g.sink.wait(2);
    assert_eq!(g.mem.read_obj::<u16>(GuestAddress(0x3002)).unwrap(), 2);
}

#[test]
fn a_device_costs_a_thread_once_it_is_started() {
    let g = guest();
    g.transport.pause();
    g.transport.resume().unwrap();
    // Its setup would be the first thing a thread does, and dropping a transport does not wait for it.
    drop(g.transport);
    assert_eq!(Arc::strong_count(&g.threads), 1, "somebody is there to run it");
    assert_eq!(g.threads.load(Ordering::SeqCst), 0);
}

#[test]
fn a_device_that_is_started_during_a_pause_waits() {
    let g = guest();
    // It has a thread, which could run it.
    g.boot();
    g.write(0x14, 1, 0);
    g.transport.pause();
    g.boot();
    assert!(!g.wanting.load(Ordering::SeqCst), "whoever paused it will resume it");
    g.offer(0);
    g.write(0x3000, 2, 0);
    let state = saved(&g);
    assert_eq!(g.mem.read_obj::<u16>(GuestAddress(0x3002)).unwrap(), 0);
    // A snapshot of it is one of a running device.
    let r = guest_with(g.mem.clone(), Some(&state)).unwrap();
    r.transport.resume().unwrap();
    r.sink.wait(1);
    assert_eq!(g.mem.read_obj::<u16>(GuestAddress(0x3002)).unwrap(), 1);
}

/// What a snapshot keeps of a transport, through its form in a file.
fn saved(g: &Guest) -> TransportState {
    let (state, _) = g.transport.save().unwrap();
    let bytes = postcard::to_allocvec(&state).unwrap();
    postcard::from_bytes(&bytes).unwrap()
}

#[test]
fn a_restored_transport_goes_on_where_it_was() {
    let g = guest();
    g.boot();
    g.offer(0);
    g.write(0x3000, 2, 0);
    g.sink.wait(1);
    g.transport.pause();
    let state = saved(&g);
    drop(g.transport);

    let r = guest_with(g.mem, Some(&state)).unwrap();
    assert_eq!(saved(&r), state);
    assert!(r.bells.0.lock().unwrap().is_empty(), "doorbells cost time and can wait");
    // Rung before the device goes on: heard when it does.
    r.offer(1);
    r.write(0x3000, 2, 0);
    r.transport.resume().unwrap();
    r.sink.wait(1);
    assert_eq!(r.sink.seen.lock().unwrap()[0], Msi { address: 0xfee0_0000, data: 0x41 });
    assert_eq!(r.mem.read_obj::<u16>(GuestAddress(0x3002)).unwrap(), 2);
    assert_eq!(*r.bells.0.lock().unwrap(), [BAR0 + 0x3000]);
    // The driver can still reset it and begin anew.
    r.write(0x14, 1, 0);
    assert_eq!(r.read(0x14, 1), 0);
    assert!(r.bells.0.lock().unwrap().is_empty());
}

#[test]
fn an_idle_transport_is_restored_idle() {
    let g = guest();
    let state = saved(&g);
    let r = guest_with(g.mem, Some(&state)).unwrap();
    r.transport.resume().unwrap();
    r.boot();
    r.offer(0);
    r.write(0x3000, 2, 0);
    r.sink.wait(1);
}

#[test]
fn every_damaged_state_is_refused_or_harmless() {
    let g = guest();
    g.boot();
    g.transport.pause();
    let bytes = postcard::to_allocvec(&g.transport.save().unwrap().0).unwrap();
    let mut refused = 0;
    for bit in 0..bytes.len() * 8 {
        let mut damaged = bytes.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        let state = postcard::from_bytes::<TransportState>(&damaged).ok();
        match state.map(|state| guest_with(g.mem.clone(), Some(&state))) {
            Some(Ok(r)) => r.transport.shut_down(),
            _ => refused += 1,
        }
    }
    assert!(refused > bytes.len(), "{refused} of {} bits", bytes.len() * 8);
}

#[test]
fn a_reset_undoes_everything_and_the_driver_can_start_over() {
    let g = guest();
    for round in 1..=3 {
        g.boot();
        g.offer(0);
        g.write(0x3000, 2, 0);
        g.sink.wait(round);
        g.write(0x14, 1, 0);
        assert_eq!(g.status(), 0);
        assert!(g.bells.0.lock().unwrap().is_empty());
        assert_eq!(g.read(0x1c, 2), 0, "the queue is off");
        assert_eq!(g.read(0x18, 2), 64, "the queue has its largest size again");
        g.mem.write_obj(0u16, GuestAddress(0x3002)).unwrap();
    }
    assert_eq!(g.threads.load(Ordering::SeqCst), 1, "its thread stays");
}

#[test]
fn features_that_were_not_offered_are_not_agreed_to() {
    let g = guest();
    g.write(0x14, 1, 3);
    g.write(0x08, 4, 0);
    g.write(0x0c, 4, 0xffff_ffff);
    g.write(0x08, 4, 1);
    g.write(0x0c, 4, 1);
    g.write(0x14, 1, 11);
    assert_eq!(g.status(), 3);
    g.set_up_queue();
    g.write(0x14, 1, 15);
    assert!(g.bells.0.lock().unwrap().is_empty(), "the device did not start");
}

#[test]
fn queue_registers_are_frozen_while_the_device_runs() {
    let g = guest();
    g.boot();
    g.write(0x18, 2, 64);
    g.write(0x20, 8, 0xdead_0000);
    g.write(0x1c, 2, 0);
    assert_eq!((g.read(0x18, 2), g.read(0x20, 8), g.read(0x1c, 2)), (16, 0x1000, 1));
}

#[test]
fn a_queue_outside_memory_needs_a_reset() {
    let g = guest();
    g.enable_msix();
    g.negotiate();
    g.write(0x10, 2, 0);
    g.write(0x20, 8, 0xffff_ffff_ffff_0000);
    g.write(0x28, 8, 0x2000);
    g.write(0x30, 8, 0x3000);
    g.write(0x1c, 2, 1);
    g.write(0x14, 1, 15);
    assert!(g.transport.failed());
    assert_eq!(g.status() & 0x40, 0x40);
    g.write(0x14, 1, 0);
    assert_eq!(g.status(), 0);
}

#[test]
fn a_broken_ring_needs_a_reset_and_says_so() {
    let g = guest();
    g.enable_msix();
    g.negotiate();
    g.write(0x10, 2, 0);
    g.set_up_queue();
    g.write(0x14, 1, 15);
    g.mem.write_obj(5000u16, GuestAddress(0x2002)).unwrap();
    g.write(0x3000, 2, 0);
    g.sink.wait(1);
    assert_eq!(g.status() & 0x40, 0x40);
    // Neither a pause nor a snapshot makes it work again, whatever the ring looks like by now.
    g.offer(0);
    for _ in 0..20 {
        g.transport.pause();
        g.write(0x3000, 2, 0);
        g.transport.resume().unwrap();
    }
    g.transport.pause();
    let restored = guest_with(g.mem.clone(), Some(&saved(&g))).unwrap();
    assert_eq!(restored.status() & 0x40, 0x40);
    g.transport.resume().unwrap();
    assert_eq!(g.mem.read_obj::<u16>(GuestAddress(0x3002)).unwrap(), 0, "a buffer was used");
    g.write(0x14, 1, 0);
    g.mem.write_obj(0u16, GuestAddress(0x2002)).unwrap();
    g.mem.write_obj(0u16, GuestAddress(0x3002)).unwrap();
    g.boot();
    g.offer(0);
    g.write(0x3000, 2, 0);
    g.sink.wait(2);
}

#[test]
fn the_pci_configuration_window_reaches_bar_0() {
    let g = guest();
    let cap = u16::from(g.capability(9, Some(5)));
    g.transport.config_write(cap + 8, &0x12u32.to_le_bytes());
    g.transport.config_write(cap + 12, &2u32.to_le_bytes());
    let mut data = [0; 2];
    g.transport.config_read(cap + 16, &mut data);
    assert_eq!(u16::from_le_bytes(data), 1, "the number of queues");
    g.transport.config_write(cap + 8, &0x14u32.to_le_bytes());
    g.transport.config_write(cap + 12, &1u32.to_le_bytes());
    g.transport.config_write(cap + 16, &[1, 0, 0, 0]);
    assert_eq!(g.status(), 1);
}

#[test]
fn garbage_in_every_register_is_survived() {
    let g = guest();
    let mut x = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x
    };
    for _ in 0..20_000 {
        let (offset, value) = (next() % 0x8100, next());
        let len = 1 << (next() % 4);
        match next() % 4 {
            0 => drop(g.read(offset, len)),
            1 => g.transport.config_write(u16::try_from(offset % 0x1000).unwrap(), &value.to_le_bytes()[..len.min(4)]),
            2 => g.transport.config_read(u16::try_from(offset % 0x1000).unwrap(), &mut [0; 4]),
            _ => g.write(if value % 2 == 0 { offset } else { offset % 0x40 }, len, value),
        }
    }
    g.write(0x14, 1, 0);
    assert_eq!(g.status(), 0);
}
