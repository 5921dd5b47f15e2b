//! Snapshots written, read and damaged.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;

use proptest::prelude::*;
use tempfile::TempDir;
use virtio_devices::device::Memory;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::memory as ram;
use crate::plan::{Plan, PlanFacts};

const FILES: [&str; 5] = [MANIFEST, CONFIG, STATE, SUMS, MEMORY];

fn config() -> VmConfig {
    VmConfig::from_json(br#"{"memory":{"size":1048576},"serial":{"mode":"Null"},"console":{"mode":"Off"}}"#).unwrap()
}

/// A machine without devices that are worth mentioning, and a little in its memory.
fn saved() -> (VmConfig, MachineState, Memory) {
    let config = config();
    let host = vmm_config::HostFacts { memory: 1 << 30, page_size: 4096, max_vcpus: 1, ..Default::default() };
    let mut plan = Plan::new(&config, &PlanFacts { host, physical_bits: 40 }).unwrap();
    plan.devices.clear();
    let memory = ram::allocate(&plan.ram, false).unwrap();
    memory.write_slice(b"at the start", GuestAddress(0)).unwrap();
    memory.write_slice(b"in the middle", GuestAddress(0x4_5678)).unwrap();
    memory.write_slice(b"at the end", GuestAddress((1 << 20) - 10)).unwrap();
    let state = MachineState {
        plan,
        clock: 77,
        ioapic: devices::legacy::IoApicState::default(),
        serial: None,
        events: 0,
        pci_address: 5,
        devices: Vec::new(),
        vcpus: vec![hypervisor::VcpuState::default()],
    };
    (config, state, memory)
}

fn write(directory: &Path, config: &VmConfig, state: &MachineState, memory: &Memory) -> Result<(), SnapshotError> {
    Destination::open(directory)?.write(config, state, memory)
}

/// A snapshot in a directory of its own, of a machine whose plan says what `open` is to accept.
fn written() -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    let (config, state, memory) = saved();
    write(directory.path(), &config, &state, &memory).unwrap();
    directory
}

/// Reads everything, as a restore does, but for what the plan says of devices.
fn read(directory: &Path) -> Result<(MachineState, Memory), SnapshotError> {
    let manifest = Manifest::read(directory)?;
    let text = read_verified(&directory.join(CONFIG), &manifest.config, MAX_CONFIG)?;
    VmConfig::from_json(&text).map_err(|source| SnapshotError::Config { path: CONFIG.into(), source })?;
    let path = directory.join(STATE);
    let state = MachineState::from_bytes(&read_verified(&path, &manifest.state, MAX_STATE)?);
    let state = state.map_err(|what| damaged(&path, what))?;
    let sums = read_verified(&directory.join(SUMS), &manifest.memory_sums, memory::sums_size(&state.plan.ram))?;
    let file = MemoryFile::open(directory.join(MEMORY), &sums, &state.plan.ram)?;
    let memory = ram::allocate(&state.plan.ram, false).unwrap();
    file.copy_to(&memory)?;
    file.verify()?;
    Ok((state, memory))
}

#[test]
fn what_was_written_is_read() {
    let directory = written();
    let (state, memory) = read(directory.path()).unwrap();
    assert_eq!((state.clock, state.pci_address), (77, 5));
    let (_, _, before) = saved();
    let all = |memory: &Memory| {
        let mut bytes = vec![0; 1 << 20];
        memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
        bytes
    };
    assert!(all(&memory) == all(&before));
    let names = fs::read_dir(directory.path()).unwrap().count();
    assert_eq!(names, FILES.len(), "nothing else is left there");
    // Mapped instead of read: the same, and what is written does not reach the file.
    let file = std::sync::Arc::new(File::open(directory.path().join(MEMORY)).unwrap());
    let mapped = ram::map_private(&state.plan.ram, &file).unwrap();
    assert!(all(&mapped) == all(&before));
    mapped.write_slice(b"mine", GuestAddress(0)).unwrap();
    read(directory.path()).unwrap();
}

#[test]
fn memory_is_sparse() {
    use std::os::unix::fs::MetadataExt;
    let directory = written();
    let metadata = fs::metadata(directory.path().join(MEMORY)).unwrap();
    assert_eq!(metadata.len(), 1 << 20);
    assert!(metadata.blocks() * 512 <= 3 * memory::CHUNK, "{} blocks", metadata.blocks());
}

#[test]
fn a_machine_of_another_configuration_is_refused() {
    let directory = written();
    let error = Snapshot::open(directory.path()).err().unwrap().to_string();
    assert!(
        error.ends_with("state.bin is damaged: its plan has the devices [] instead of [(\"rng\", \"_rng\", 0)]"),
        "{error}"
    );
}

#[test]
fn a_snapshot_is_never_overwritten() {
    let directory = written();
    let (config, state, memory) = saved();
    let again = write(directory.path(), &config, &state, &memory);
    assert!(matches!(again, Err(SnapshotError::Exists(_))));
    read(directory.path()).unwrap();
}

#[test]
fn a_write_that_fails_leaves_no_snapshot() {
    let directory = tempfile::tempdir().unwrap();
    // Something is in the way of the last but one file.
    fs::create_dir_all(directory.path().join("memory.sums/full")).unwrap();
    let (config, state, memory) = saved();
    let error = write(directory.path(), &config, &state, &memory).unwrap_err().to_string();
    assert!(error.contains("cannot give its name to") && error.contains("memory.sums"), "{error}");
    let left: Vec<_> = fs::read_dir(directory.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["memory.sums"]);
    assert!(matches!(Snapshot::open(directory.path()), Err(SnapshotError::Missing(_))));
}

#[test]
fn other_versions_are_named() {
    let directory = written();
    let path = directory.path().join(MANIFEST);
    for version in [0, 2, u64::MAX] {
        let text = fs::read_to_string(&path).unwrap();
        let at = text.find("\"version\": ").unwrap() + 11;
        let end = at + text[at..].find(',').unwrap();
        fs::write(&path, format!("{}{version}{}", &text[..at], &text[end..])).unwrap();
        let error = read(directory.path()).err().unwrap().to_string();
        assert!(error.contains(&format!("has format version {version}, and this program reads version 1")), "{error}");
    }
}

#[test]
fn every_truncation_and_every_missing_file_is_refused() {
    let directory = written();
    for name in FILES {
        let path = directory.path().join(name);
        let whole = fs::read(&path).unwrap();
        let step = (whole.len() / 400).max(1);
        for len in (0..whole.len()).step_by(step) {
            fs::write(&path, &whole[..len]).unwrap();
            let error = read(directory.path()).err().unwrap_or_else(|| panic!("{name} of {len} bytes")).to_string();
            assert!(error.contains(name), "{error}");
        }
        fs::write(&path, [whole.as_slice(), b"x"].concat()).unwrap();
        assert!(read(directory.path()).is_err(), "{name} with a byte more");
        fs::remove_file(&path).unwrap();
        assert!(read(directory.path()).err().unwrap().to_string().contains(name));
        fs::write(&path, &whole).unwrap();
    }
    read(directory.path()).unwrap();
}

/// What is wrong with a file in which bit `bit` is flipped.
fn flipped(directory: &Path, name: &str, bit: u64) -> Option<SnapshotError> {
    let file = OpenOptions::new().read(true).write(true).open(directory.join(name)).unwrap();
    let flip = || {
        let mut byte = [0];
        file.read_exact_at(&mut byte, bit / 8).unwrap();
        byte[0] ^= 1 << (bit % 8);
        file.write_all_at(&byte, bit / 8).unwrap();
    };
    flip();
    let error = read(directory).err();
    flip();
    error
}

#[test]
fn every_flipped_bit_of_the_small_files_is_noticed() {
    let directory = written();
    for name in [MANIFEST, CONFIG, STATE, SUMS] {
        let bits = fs::metadata(directory.path().join(name)).unwrap().len() * 8;
        // All of the smaller ones, and a few thousand of the state's, most of which are registers' zeroes.
        for bit in (0..bits).step_by(usize::try_from(bits / 5000).unwrap().max(1)) {
            let Some(error) = flipped(directory.path(), name, bit) else {
                panic!("bit {bit} of {name}: not noticed");
            };
            let message = error.to_string();
            assert!(message.contains(name) || matches!(name, MANIFEST), "{message}");
        }
    }
}

#[test]
fn flipped_bits_of_memory_are_noticed() {
    let directory = written();
    let bits = 8 << 20;
    for bit in (0..bits).step_by(12_347) {
        let error = flipped(directory.path(), MEMORY, bit).unwrap_or_else(|| panic!("bit {bit}: not noticed"));
        assert!(error.to_string().contains("memory is damaged: the bytes at"), "{error}");
    }
}

/// A machine that was saved on a CPU like this one but for what `change` does to what its guest was told, and read again.
fn check_cpu(change: impl FnOnce(&mut Vec<CpuidEntry>), host: &[CpuidEntry]) -> Result<(), SnapshotError> {
    let directory = tempfile::tempdir().unwrap();
    let (config, mut state, memory) = saved();
    let vcpu = state.vcpus.first_mut().unwrap();
    vcpu.cpuid = vcpu_cpuid(host, &CpuidConfig { vcpus: 1, physical_bits: 40, nested: false }, 0);
    change(&mut vcpu.cpuid);
    write(directory.path(), &config, &state, &memory).unwrap();
    let (state, _) = read(directory.path()).unwrap();
    let sums = fs::read(directory.path().join(SUMS)).unwrap();
    let memory = MemoryFile::open(directory.path().join(MEMORY), &sums, &state.plan.ram).unwrap();
    Snapshot { config, state, memory: Arc::new(memory), directory: PathBuf::new() }.check_cpu(host)
}

#[test]
fn a_snapshot_of_another_cpu_is_refused_with_what_is_missing() {
    let entry =
        |function, [eax, ebx, ecx, edx]: [u32; 4]| CpuidEntry { function, eax, ebx, ecx, edx, ..Default::default() };
    let host = [entry(0, [16, 1, 2, 3]), entry(1, [7, 0, 0b10_0011, 0b1]), entry(7, [0, 1 << 5, 0, 0])];
    check_cpu(|_| {}, &host).unwrap();
    // Another model of the same maker with fewer features is as good.
    check_cpu(|cpuid| (cpuid[1].eax, cpuid[2].ebx) = (8, 0), &host).unwrap();
    check_cpu(Vec::clear, &[]).unwrap();
    let said = |change: fn(&mut Vec<CpuidEntry>)| check_cpu(change, &host).unwrap_err().to_string();
    let lacks = "the snapshot was taken on another kind of CPU; this one lacks";
    assert_eq!(said(|cpuid| cpuid[1].ecx |= 1 << 9), format!("{lacks} CPUID 0x1.0 ECX bit 9"));
    assert_eq!(
        said(|cpuid| (cpuid[1].edx, cpuid[2].ebx) = (0b11, 3 << 5)),
        format!("{lacks} CPUID 0x1.0 EDX bit 1, CPUID 0x7.0 EBX bit 6")
    );
    // What the host has and no guest is told, such as virtualisation.
    assert_eq!(said(|cpuid| cpuid[1].ecx |= 1 << 5), format!("{lacks} CPUID 0x1.0 ECX bit 5"));
    assert_eq!(said(|cpuid| cpuid[0].ebx = 9), format!("{lacks} its maker"));
    assert_eq!(said(Vec::clear), format!("{lacks} its maker"), "nobody knows what it was");
}

/// A machine with windows and RAM in two ranges, but for what is saved of its devices.
fn large() -> (VmConfig, MachineState) {
    let json = br#"{"memory":{"size":5368709120},"pmem":[{"file":"/a"},{"file":"/b"}],"vsock":{"cid":3,"socket":"/s"},
        "gpu":[{"wayland":"/w"}],"serial":{"mode":"Null"},"console":{"mode":"Off"}}"#;
    let config = VmConfig::from_json(json).unwrap();
    let file_sizes = [("/a".into(), 1 << 20), ("/b".into(), 5)].into();
    let host = vmm_config::HostFacts { memory: 8 << 30, page_size: 4096, max_vcpus: 1, file_sizes };
    let plan = Plan::new(&config, &PlanFacts { host, physical_bits: 40 }).unwrap();
    (config, MachineState { plan, ..saved().1 })
}

/// What a plan says of places, sizes and slots.
fn numbers(plan: &mut Plan) -> (Vec<&mut u64>, Vec<&mut u32>) {
    let (mut places, mut slots) = (Vec::new(), Vec::new());
    for ram in &mut plan.ram {
        places.extend([&mut ram.start, &mut ram.len]);
        slots.push(&mut ram.slot);
    }
    for device in &mut plan.devices {
        places.push(&mut device.bar0);
        if let Some(window) = &mut device.window {
            places.extend([&mut window.start, &mut window.len]);
            slots.push(&mut window.slot);
        }
    }
    (places, slots)
}

/// Whether each range is whole pages below 2^64, no two have an address in common and no two slots are the same, found out
/// in another way than the plan's own check does.
fn is_sound(plan: &Plan) -> bool {
    let mut ranges: Vec<(u64, u64, Option<u32>)> = plan.ram.iter().map(|r| (r.start, r.len, Some(r.slot))).collect();
    for device in &plan.devices {
        ranges.push((device.bar0, virtio_devices::transport::BAR0_SIZE, None));
        ranges.extend(device.window.map(|w| (w.start, w.len, Some(w.slot))));
    }
    let end = |start: u64, len: u64| u128::from(start) + u128::from(len);
    let whole = |(start, len, _): &(u64, u64, _)| {
        *len > 0 && start % 4096 == 0 && len % 4096 == 0 && end(*start, *len) <= u128::from(u64::MAX)
    };
    let apart = |at: usize, (start, len, slot): (u64, u64, Option<u32>)| {
        ranges.iter().skip(at + 1).all(|(s, l, other)| {
            let disjoint = end(start, len) <= u128::from(*s) || end(*s, *l) <= u128::from(start);
            disjoint && (slot.is_none() || slot != *other)
        })
    };
    ranges.iter().all(whole) && ranges.iter().enumerate().all(|(at, range)| apart(at, *range))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// A state that is read as one, but says something else of a few places: it is taken if nothing lies over anything.
    #[test]
    fn a_plan_is_refused_exactly_if_it_contradicts_itself(
        changes in prop::collection::vec(
            (any::<prop::sample::Index>(), any::<prop::sample::Index>(), -2i64..=2, prop::bool::weighted(0.2)), 1..4,
        ),
        anywhere in any::<u64>(),
    ) {
        let (config, mut state) = large();
        for (to, from, pages, is_slot) in changes {
            let (mut places, mut slots) = numbers(&mut state.plan);
            if is_slot {
                let (to, slot) = (to.index(slots.len()), from.index(2 * slots.len()));
                *slots[to] = u32::try_from(slot).unwrap();
            } else {
                // Near another one, or to where nothing is.
                let (to, near) = (to.index(places.len()), *places[from.index(places.len())]);
                let value = if pages == 2 { anywhere } else { near.wrapping_add_signed(pages * 4096) };
                *places[to] = value;
            }
        }
        let state = MachineState::from_bytes(&state.to_bytes().unwrap()).unwrap();
        let size = state.plan.ram.iter().map(|r| u128::from(r.len)).sum::<u128>();
        let wanted = is_sound(&state.plan) && size == u128::from(config.memory.size);
        prop_assert_eq!(state.plan.check(&config).is_ok(), wanted, "{:?}", state.plan.check(&config));
        // What is saved of the devices is missing.
        prop_assert!(state.check(&config).is_err());
    }
}

proptest! {
    /// With a hash that is right the parser still meets whatever somebody wrote.
    #[test]
    fn hostile_states_do_not_panic(bytes in prop::collection::vec(any::<u8>(), 0..4096)) {
        if let Ok(state) = MachineState::from_bytes(&bytes) {
            let _ = state.check(&config());
        }
    }

    #[test]
    fn damaged_states_do_not_panic(at in any::<prop::sample::Index>(), byte in any::<u8>()) {
        let mut bytes = saved().1.to_bytes().unwrap();
        let at = at.index(bytes.len());
        bytes[at] = byte;
        if let Ok(state) = MachineState::from_bytes(&bytes) {
            let _ = state.check(&config());
            let _ = MemoryFile::open("/dev/null".into(), &[], &state.plan.ram);
        }
    }
}
