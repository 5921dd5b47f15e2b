//! The files of a snapshot, each with a hash that fits: whoever writes them can write that too.
#![no_main]

use std::fs;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use devices::bus::BusDevice;
use devices::legacy::IoApic;
use libfuzzer_sys::fuzz_target;
use serde_json::json;
use spectrum_fuzz::Nobody;
use virtio_devices::device::Memory;
use vm_memory::GuestAddress;
use vmm::plan::{Plan, PlanFacts};
use vmm::snapshot::{MachineState, SavedDevice, Snapshot};
use vmm_config::{HostFacts, VmConfig};

const RAM: usize = 1 << 20;
const CONFIG: &str = r#"{"memory":{"size":1048576},"serial":{"mode":"Off"},"console":{"mode":"Off"}}"#;

/// A whole snapshot in a directory of its own, some of whose files are other ones each time.
struct Base {
    directory: PathBuf,
    state: Vec<u8>,
    sums: Vec<u8>,
}

fn ram() -> Memory {
    Memory::from_ranges(&[(GuestAddress(0), RAM)]).expect("guest memory")
}

/// A paused machine with a device whose driver has started it.
fn machine() -> MachineState {
    let config = VmConfig::from_json(CONFIG.as_bytes()).expect("a configuration");
    let host = HostFacts { memory: 1 << 30, page_size: 4096, max_vcpus: 1, ..HostFacts::default() };
    let plan = Plan::new(&config, &PlanFacts { host, physical_bits: 40 }).expect("a plan");
    let transport = spectrum_fuzz::transport(ram(), None, &Arc::default()).expect("a PCI function");
    transport.resume().expect("a thread");
    let write = |at, value: u64, len: usize| transport.write(at, &value.to_le_bytes()[..len]);
    // Acknowledge, driver; VERSION_1; features are fine; the queue's size, rings and enable bit; go.
    for (at, value, len) in [(0x14, 3, 1), (0x08, 1, 4), (0x0c, 1, 4), (0x14, 0xb, 1), (0x18, 16, 2)] {
        write(at, value, len);
    }
    for (at, value, len) in [(0x20, 0x1000, 8), (0x28, 0x2000, 8), (0x30, 0x3000, 8), (0x1c, 1, 2), (0x14, 0xf, 1)] {
        write(at, value, len);
    }
    transport.pause();
    let (state, device) = transport.save().expect("it is paused");
    MachineState {
        plan,
        clock: 1,
        ioapic: devices::legacy::IoApicState::default(),
        serial: None,
        events: 0,
        pci_address: 0,
        devices: vec![SavedDevice { id: "_rng".into(), transport: state, device }],
        vcpus: vec![hypervisor::VcpuState::default()],
    }
}

fn base() -> &'static Base {
    static BASE: OnceLock<Base> = OnceLock::new();
    BASE.get_or_init(|| {
        let directory = std::env::temp_dir().join(format!("spectrum-fuzz-snapshot-{}", std::process::id()));
        fs::create_dir_all(&directory).expect("a directory");
        Base { directory, state: machine().to_bytes().expect("a state"), sums: vec![0; RAM / (64 << 10) * 32] }
    })
}

fn sum(bytes: &[u8]) -> serde_json::Value {
    json!({ "size": bytes.len(), "blake3": blake3::hash(bytes).to_hex().to_string() })
}

fuzz_target!(|data: &[u8]| {
    let Some((which, data)) = data.split_first() else { return };
    let base = base();
    let (mut config, mut state, mut sums, mut memory) =
        (CONFIG.as_bytes().to_vec(), base.state.clone(), base.sums.clone(), Vec::new());
    match which % 6 {
        0 => config = data.to_vec(),
        1 => state = data.to_vec(),
        // Bytes of a state that is right.
        2 => {
            for change in data.as_chunks::<3>().0 {
                let at = usize::from(u16::from_le_bytes([change[0], change[1]])) % state.len();
                state[at] = change[2];
            }
        }
        3 => sums = data.to_vec(),
        4 => memory = data.to_vec(),
        _ => {}
    }
    let manifest = json!({ "version": 1, "config": sum(&config), "state": sum(&state), "memory_sums": sum(&sums) });
    let manifest = if which % 6 == 5 { data.to_vec() } else { manifest.to_string().into_bytes() };
    for (name, bytes) in [("snapshot.json", &manifest), ("config.json", &config), ("state.bin", &state)] {
        fs::write(base.directory.join(name), bytes).expect("room for it");
    }
    fs::write(base.directory.join("memory.sums"), &sums).expect("room for it");
    let file = fs::File::create(base.directory.join("memory")).expect("room for it");
    std::os::unix::fs::FileExt::write_all_at(&file, &memory, 0).expect("room for it");
    file.set_len(RAM as u64).expect("room for it");
    let Ok(snapshot) = Snapshot::open(&base.directory) else { return };
    let _ = snapshot.check_cpu(&[]);
    let _ = snapshot.check_copy_on_write();
    let verified = snapshot.memory.verify().is_ok();
    assert_eq!(verified, memory.iter().all(|byte| *byte == 0) && sums.iter().all(|byte| *byte == 0));
    IoApic::new(Arc::new(Nobody)).restore(&snapshot.state.ioapic);
    for device in &snapshot.state.devices {
        if let Ok(transport) = spectrum_fuzz::transport(ram(), Some(&device.transport), &Arc::default()) {
            transport.resume().expect("a thread");
            transport.pause();
            let _ = transport.save();
        }
    }
});
