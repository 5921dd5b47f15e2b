//! Whatever a guest does to the registers and the configuration space of a virtio-pci function.
#![no_main]

use std::sync::Arc;
use std::sync::atomic::Ordering;

use devices::bus::BusDevice;
use devices::pci::PciDevice;
use libfuzzer_sys::fuzz_target;
use virtio_devices::device::Memory;
use virtio_devices::transport::BAR0_SIZE;
use vm_memory::GuestAddress;

fuzz_target!(|data: &[u8]| {
    let mem = Memory::from_ranges(&[(GuestAddress(0), 1 << 20)]).expect("guest memory");
    let wanting = Arc::default();
    let transport = spectrum_fuzz::transport(mem, None, &wanting).expect("a PCI function");
    transport.resume().expect("a thread");
    for step in data.chunks_exact(12) {
        let offset = u64::from(u16::from_le_bytes([step[1], step[2]]));
        let len = 1 << (step[3] % 4);
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&step[4..]);
        match step[0] % 6 {
            0 => transport.read(offset % BAR0_SIZE, &mut bytes[..len]),
            // Most of what matters is at the beginning: the common configuration.
            1 | 2 => transport.write(offset % 0x40, &bytes[..len]),
            3 => transport.write(offset % BAR0_SIZE, &bytes[..len]),
            4 => transport.config_write((offset % 4096) as u16, &bytes[..len.min(4)]),
            _ => transport.config_read((offset % 4096) as u16, &mut bytes[..len.min(4)]),
        }
        if wanting.swap(false, Ordering::Relaxed) {
            transport.resume().expect("a thread");
        }
    }
});
