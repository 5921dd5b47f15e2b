//! Machines that are saved, and go on in another process.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use tests::{Vmm, VmmCommand, tiny};
use vmm_api::{Client, Reply, Request, VmState};
use vmm_config::{MemoryRestoreMode, RestoreConfig, SnapshotConfig};

const MODES: [(&str, MemoryRestoreMode); 3] = [
    ("copyonwrite", MemoryRestoreMode::CopyOnWrite),
    ("copy", MemoryRestoreMode::Copy),
    ("ondemand", MemoryRestoreMode::OnDemand),
];

fn url(directory: &Path) -> String {
    format!("file://{}", directory.display())
}

/// Pauses the machine and saves it to `directory`.
fn save(client: &mut Client, directory: &Path) {
    client.send(&Request::VmPause).unwrap();
    client.send(&Request::VmSnapshot(SnapshotConfig { destination_url: url(directory) })).unwrap();
}

/// Saves a counting machine to `directory`; it is gone then.
fn save_counter(directory: &Path) {
    let mut vmm = VmmCommand::tiny().api().spawn();
    vmm.wait_for("tick 00000001");
    save(&mut vmm.client(), directory);
}

/// A VMM with an API socket that goes on with what is in `directory`.
fn restored(directory: &Path, mode: &str) -> Vmm {
    let from = format!("source_url={},memory_restore_mode={mode},resume=true", url(directory));
    VmmCommand::new().api().arg("--restore", from).spawn()
}

/// Kills the VMM, as the loss of power would; the last number that was printed.
fn kill(vmm: Vmm) -> u32 {
    vmm.signal(Signal::KILL);
    let all = vmm.wait().stdout;
    // The line it was in the middle of does not count.
    let (whole, _) = all.rsplit_once('\n').unwrap();
    whole.lines().rev().find_map(tiny::tick).unwrap()
}

/// The first line that is printed is the rest of the one that was begun; the number after it.
fn first_tick(vmm: &mut Vmm) -> u32 {
    loop {
        let line = vmm.wait_for("");
        if let Some(tick) = tiny::tick(&line) {
            return tick;
        }
    }
}

#[test]
fn a_counter_goes_on_in_another_process_generation_after_generation() {
    let keep = tempfile::tempdir().unwrap();
    let mut vmm = VmmCommand::tiny().api().spawn();
    vmm.wait_for("tick 00000010");
    let mut last = 0;
    for generation in 0..20 {
        let (name, _) = MODES[generation % MODES.len()];
        let directory = keep.path().join(generation.to_string());
        save(&mut vmm.client(), &directory);
        let at = kill(vmm);
        assert!(at >= last, "{at} after {last}");
        vmm = restored(&directory, name);
        let next = first_tick(&mut vmm);
        assert!(next == at + 1 || next == at + 2, "generation {generation} ({name}): {next} after {at}");
        last = next;
    }
    vmm.client().send(&Request::VmmShutdown).unwrap();
    vmm.wait().assert_success();
}

/// The same machine in the same process, by the API alone.
#[test]
fn a_snapshot_is_restored_by_the_api() {
    let keep = tempfile::tempdir().unwrap();
    let mut vmm = VmmCommand::tiny().api().spawn();
    vmm.wait_for("tick 00000010");
    let mut client = vmm.client();
    let directory = keep.path().join("snapshot");
    let running = client.send(&Request::VmSnapshot(SnapshotConfig { destination_url: url(&directory) }));
    assert!(running.unwrap_err().to_string().contains("pause it before"));
    save(&mut client, &directory);
    let again = client.send(&Request::VmSnapshot(SnapshotConfig { destination_url: url(&directory) }));
    assert!(again.unwrap_err().to_string().contains("holds a snapshot already"));
    for (_, mode) in MODES {
        let from = RestoreConfig {
            source_url: url(&directory),
            prefault: false,
            memory_restore_mode: mode,
            resume: false,
            no_share: false,
        };
        assert!(client.send(&Request::VmRestore(from.clone())).is_err(), "there is a machine");
        client.send(&Request::VmDelete).unwrap();
        client.send(&Request::VmRestore(from)).unwrap();
        assert_eq!(client.info().unwrap().state, VmState::Paused);
        // A machine that has not run yet can be saved like any other.
        let unrun = keep.path().join(format!("unrun-{mode:?}"));
        client.send(&Request::VmSnapshot(SnapshotConfig { destination_url: url(&unrun) })).unwrap();
        client.send(&Request::VmResume).unwrap();
        first_tick(&mut vmm);
        // It is the same as any: it pauses, and reboots from its kernel.
        client.send(&Request::VmPause).unwrap();
        client.send(&Request::VmReboot).unwrap();
        vmm.wait_for("tick 00000000");
        client.send(&Request::VmPause).unwrap();
    }
    client.send(&Request::VmmShutdown).unwrap();
    vmm.wait().assert_success();
}

/// What a restore that cannot be says.
fn refusal(directory: &Path, mode: &str) -> String {
    let from = format!("source_url={},memory_restore_mode={mode}", url(directory));
    let ended = VmmCommand::new().arg("--restore", from).run();
    assert_eq!(ended.status.code(), Some(1), "{ended:?}");
    ended.stderr
}

/// What is said of the tiny guest's program after a bit of it was flipped.
const DAMAGED: &str = "memory is damaged: the bytes at 0x100000 are not what was written";

#[test]
fn what_is_no_snapshot_is_refused_in_a_sentence() {
    let keep = tempfile::tempdir().unwrap();
    let directory = keep.path().join("snapshot");
    save_counter(&directory);
    let file = |name: &str| directory.join(name);
    let tamper_for =
        |modes: &[(&str, MemoryRestoreMode)], name: &str, change: &dyn Fn(&mut Vec<u8>), sentence: &str| {
            let whole = fs::read(file(name)).unwrap();
            let mut changed = whole.clone();
            change(&mut changed);
            fs::write(file(name), changed).unwrap();
            for (mode, _) in modes {
                let said = refusal(&directory, mode);
                assert!(said.contains(sentence) && said.lines().count() == 1, "{name}: {said}");
            }
            fs::write(file(name), whole).unwrap();
        };
    let tamper = |name: &str, change: &dyn Fn(&mut Vec<u8>), sentence: &str| tamper_for(&MODES, name, change, sentence);
    let path = |name: &str| file(name).display().to_string();
    let changed = |name: &str| format!("{} is damaged: its contents are not what was written", path(name));
    tamper("config.json", &|bytes| bytes[20] ^= 1, &changed("config.json"));
    tamper("state.bin", &|bytes| bytes.truncate(100), &changed("state.bin"));
    tamper("memory.sums", &|bytes| bytes.clear(), &changed("memory.sums"));
    // On demand it is seen later.
    let at_once = &MODES[..2];
    tamper_for(at_once, "memory", &|bytes| bytes[0x10_0001] ^= 4, DAMAGED);
    tamper("memory", &|bytes| bytes.truncate(4096), "memory is damaged: it has 4096 bytes instead of 16777216");
    tamper("snapshot.json", &|bytes| bytes.truncate(9), "snapshot.json is damaged");
    let newer = |bytes: &mut Vec<u8>| *bytes = String::from_utf8_lossy(bytes).replacen(": 1,", ": 2,", 1).into_bytes();
    tamper("snapshot.json", &newer, "has format version 2, and this program reads version 1");
    fs::remove_file(file("memory")).unwrap();
    assert!(refusal(&directory, "copy").contains(&format!("cannot open {}: No such file", path("memory"))));
    assert!(refusal(keep.path(), "copy").contains("holds no snapshot"));
    let no_url = VmmCommand::new().arg("--restore", "source_url=/somewhere").run();
    assert!(no_url.stderr.contains("write file:// and the absolute path of a directory"), "{}", no_url.stderr);
}

/// A guest whose memory others see cannot have it copy-on-write or on demand, and hears so.
#[test]
fn shared_memory_is_only_copied() {
    let keep = tempfile::tempdir().unwrap();
    let mut vmm = VmmCommand::tiny().arg("--memory", "size=16M,shared=on").api().spawn();
    vmm.wait_for("tick 00000001");
    let directory: PathBuf = keep.path().join("snapshot");
    save(&mut vmm.client(), &directory);
    drop(vmm);
    for mode in ["copyonwrite", "ondemand"] {
        let said = refusal(&directory, mode);
        assert!(said.contains("memory.shared=on") && said.contains("memory_restore_mode=copy"), "{said}");
    }
    first_tick(&mut restored(&directory, "copy"));
}

/// Kilobytes of memory that are the process' own.
fn own_memory(vmm: &Vmm) -> u32 {
    let status = fs::read_to_string(format!("/proc/{}/status", vmm.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// A snapshot in `directory` of a guest that has written to all of its 256 MiB.
fn save_full(directory: &Path) {
    let command = VmmCommand::tiny();
    let kernel = command.path("filler");
    tiny::write_filler(&kernel, 256 << 20);
    let mut vmm = command.arg("--kernel", kernel).arg("--memory", "size=256M").api().spawn();
    vmm.wait_for("tick 00000001");
    save(&mut vmm.client(), directory);
}

#[test]
fn on_demand_only_what_the_guest_touches_is_read() {
    let keep = tempfile::tempdir().unwrap();
    let [directory, again] = ["snapshot", "again"].map(|name| keep.path().join(name));
    save_full(&directory);
    let mut vmm = restored(&directory, "copy");
    first_tick(&mut vmm);
    let all = own_memory(&vmm);
    assert!(all > 254 << 10, "{all} kB: the guest's memory counts");
    drop(vmm);
    let mut vmm = restored(&directory, "ondemand");
    // Long enough for more to be read, if anybody did.
    let first = first_tick(&mut vmm);
    while first_tick(&mut vmm) < first + 1000 {}
    let some = own_memory(&vmm);
    assert!(some < 16 << 10, "{some} kB of {all}");
    // A snapshot needs all of it.
    save(&mut vmm.client(), &again);
    let all = own_memory(&vmm);
    assert!(all > 254 << 10, "{all} kB");
    let sums = |directory: &Path| fs::read(directory.join("memory.sums")).unwrap();
    let (before, after) = (sums(&directory), sums(&again));
    assert_eq!(before.len(), after.len());
    let changed = before.chunks(32).zip(after.chunks(32)).filter(|(before, after)| before != after).count();
    assert_eq!(changed, 1, "the one with the generation ID");
}

/// Flips a bit of the byte at `at` of a snapshot's memory.
fn flip(directory: &Path, at: u64) {
    let file = fs::File::options().read(true).write(true).open(directory.join("memory")).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 4], at).unwrap();
}

#[test]
fn on_demand_damaged_memory_ends_the_machine_when_the_guest_reaches_it() {
    let keep = tempfile::tempdir().unwrap();
    let [directory, again] = ["snapshot", "again"].map(|name| keep.path().join(name));
    save_full(&directory);
    // What the guest does not touch is of no consequence to it, but to a snapshot.
    flip(&directory, 0x80_0000);
    let mut vmm = restored(&directory, "ondemand");
    first_tick(&mut vmm);
    let mut client = vmm.client();
    client.send(&Request::VmPause).unwrap();
    let refused = client.send(&Request::VmSnapshot(SnapshotConfig { destination_url: url(&again) })).unwrap_err();
    let sentence = DAMAGED.replace("0x100000", "0x800000");
    assert!(refused.to_string().contains(&format!("{}/{sentence}", directory.display())), "{refused}");
    assert!(!again.join("snapshot.json").exists());
    let last = vmm.text().lines().rev().find_map(tiny::tick).unwrap();
    client.send(&Request::VmResume).unwrap();
    while first_tick(&mut vmm) <= last {}
    client.send(&Request::VmmShutdown).unwrap();
    vmm.wait().assert_success();
    // The guest's next instruction.
    flip(&directory, 0x10_0001);
    let ended = restored(&directory, "ondemand").wait();
    let sentence = format!("spectrum-vmm: the machine stopped: {}/{DAMAGED}\n", directory.display());
    assert_eq!((ended.status.code(), ended.stderr.as_str()), (Some(1), sentence.as_str()));
    assert!(!ended.stdout.contains("tick"), "{}", ended.stdout);
}

/// A command that runs its arguments without the right to use userfaultfd, after it ran `before`.
fn without_userfaultfd(before: &str) -> Command {
    let mut command = Command::new("unshare");
    let run = format!(r#"{before} && exec setpriv --inh-caps=-sys_ptrace --bounding-set=-sys_ptrace "$@""#);
    command.args(["--mount", "sh", "-c", &run, "sh"]).arg(tests::programs::program("spectrum-vmm"));
    command
}

/// The system call is for the privileged, the device for whoever may open it.
#[test]
fn on_demand_needs_a_right_that_is_named() {
    let keep = tempfile::tempdir().unwrap();
    let directory = keep.path().join("snapshot");
    save_counter(&directory);
    let restore = |launcher| {
        let from = format!("source_url={},memory_restore_mode=ondemand,resume=true", url(&directory));
        VmmCommand::new().arg("--restore", from).spawn_as(launcher)
    };
    first_tick(&mut restore(without_userfaultfd("test -c /dev/userfaultfd")));
    let ended = restore(without_userfaultfd("mount --bind /dev/null /dev/userfaultfd")).wait();
    assert_eq!(ended.status.code(), Some(1));
    let said = ended.stderr;
    assert!(said.contains("vm.unprivileged_userfaultfd=1") && said.contains("=copyonwrite"), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
}

/// Answers the guest's calls on port 5000 of `socket`, again and again, for as long as the test runs.
fn answer_calls(socket: &Path) {
    let listener = UnixListener::bind(format!("{}_5000", socket.display())).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let stream = stream.unwrap();
            let mut heard = String::new();
            BufReader::new(&stream).read_line(&mut heard).unwrap();
            (&stream).write_all(b"hello from the host\n").unwrap();
        }
    });
}

/// Who waits on a connection that was open in the snapshot hears that it is gone, and makes another one.
#[test]
fn a_vsock_connection_ends_with_the_machine_that_had_it() {
    let keep = tempfile::tempdir().unwrap();
    let [socket, directory] = ["socket", "snapshot"].map(|name| keep.path().join(name));
    answer_calls(&socket);
    let listener = UnixListener::bind(format!("{}_5001", socket.display())).unwrap();
    let mut vmm = VmmCommand::probe(&["vmw_vsock_virtio_transport"], &["vsock-hold=5001", "vsock-connect=5000"])
        .api()
        .arg("--vsock", format!("cid=3,socket={}", socket.display()))
        .spawn();
    let (mut held, _) = listener.accept().unwrap();
    vmm.wait_for("probe: vsock-hold: connected");
    save(&mut vmm.client(), &directory);
    vmm.signal(Signal::KILL);
    let before = vmm.wait().stdout;
    assert!(!before.contains("vsock-hold=5001"), "it was over before it was saved: {before}");
    assert_eq!(held.read(&mut [0]).unwrap(), 0, "the host's end is at its end");
    let mut vmm = restored(&directory, "copyonwrite");
    assert_eq!(vmm.wait_for("probe: vsock-hold=5001"), "probe: vsock-hold=5001: reset");
    vmm.wait_for("probe: vsock-connect=5000: hello from the host");
    vmm.wait().assert_success();
}

/// Debian, saved while its disk is busy, goes on with everything it has.
#[test]
fn a_debian_guest_goes_on_with_all_its_devices() {
    let keep = tempfile::tempdir().unwrap();
    let jobs = [
        "vsock-connect=5000",
        "churn=/dev/vda",
        "echo",
        "cpus",
        "entropy",
        "image=/dev/pmem0",
        "overwrite=/dev/vda",
        "write=/dev/hvc0",
        "vsock-connect=5000",
    ];
    let modules = ["virtio-rng", "virtio_pmem", "nd_pmem", "virtio_blk", "vmw_vsock_virtio_transport"];
    let [disk, image, console, socket, directory, then] =
        ["disk", "image", "console", "socket", "snapshot", "disk-then"].map(|name| keep.path().join(name));
    fs::write(&disk, vec![0; 1 << 20]).unwrap();
    fs::write(&image, (0..1000u64).flat_map(u64::to_le_bytes).collect::<Vec<u8>>()).unwrap();
    answer_calls(&socket);
    let mut vmm = VmmCommand::probe(&modules, &jobs)
        .api()
        .arg("--cpus", "boot=2")
        .arg("--disk", format!("path={}", disk.display()))
        .arg("--pmem", format!("file={},discard_writes=on", image.display()))
        .arg("--console", format!("file={}", console.display()))
        .arg("--vsock", format!("cid=3,socket={}", socket.display()))
        .spawn();
    vmm.wait_for("probe: vsock-connect=5000: hello from the host");
    vmm.wait_for("churn: round 20.");
    save(&mut vmm.client(), &directory);
    vmm.signal(Signal::KILL);
    let before = vmm.wait().stdout;
    assert!(!before.contains("all rounds"), "it was over before it was saved");
    fs::copy(&disk, &then).unwrap();
    for (mode, _) in MODES {
        fs::copy(&then, &disk).unwrap();
        let mut vmm = restored(&directory, mode);
        vmm.wait_for("probe: churn=/dev/vda: all rounds");
        vmm.wait_for("probe: echo: type");
        vmm.type_text("still there?\n");
        vmm.wait_for("probe: echo: still there?");
        assert_eq!(vmm.wait_for("probe: cpus"), "probe: cpus: 0-1 online, 2 usable");
        vmm.wait_for("probe: entropy: ");
        assert_eq!(vmm.wait_for("probe: image"), "probe: image=/dev/pmem0: 2097152 bytes, 1000 words, 2089152 zeros");
        assert_eq!(vmm.wait_for("probe: overwrite"), "probe: overwrite=/dev/vda: written by guest");
        assert_eq!(vmm.wait_for("probe: write"), "probe: write=/dev/hvc0: done");
        vmm.wait_for("probe: vsock-connect=5000: hello from the host");
        let ended = vmm.wait_here();
        ended.assert_success();
        assert!(!ended.stdout.contains("FAILED"), "{}", ended.stdout);
        assert!(fs::read_to_string(&console).unwrap().contains("hello from the guest"));
        fs::write(&console, "").unwrap();
    }
}

/// A machine is saved while it runs; both go on, each for itself.
#[test]
fn a_running_machine_is_saved_and_goes_on() {
    let keep = tempfile::tempdir().unwrap();
    let command = VmmCommand::tiny().api();
    let events = command.path("events");
    let mut vmm = command.arg("--event-monitor", format!("path={}", events.display())).spawn();
    vmm.wait_for("tick 00000010");
    let mut client = vmm.client();
    for round in 0..3 {
        let directory = keep.path().join(round.to_string());
        let to = SnapshotConfig { destination_url: url(&directory) };
        let Reply::Forked(fork) = client.send(&Request::VmLiveSnapshot(to.clone())).unwrap() else { panic!() };
        assert!(fork.paused_us > 0);
        let text = vmm.text();
        let last = text.lines().rev().skip(1).find_map(tiny::tick).unwrap();
        vmm.wait_for(&format!("tick {:08x}", last + 200));
        wait_for_events(&events, "snapshotted", round + 1);
        assert!(
            client.send(&Request::VmLiveSnapshot(to)).unwrap_err().to_string().contains("holds a snapshot already")
        );
        let mut other = restored(&directory, "copyonwrite");
        let first = first_tick(&mut other);
        assert!(first > 0x10 && first < last + 200, "{first:#x}, and the other is at {last:#x}");
        assert_eq!(first_tick(&mut other), first + 1);
    }
    client.send(&Request::VmPause).unwrap();
    let to = SnapshotConfig { destination_url: url(keep.path()) };
    assert!(client.send(&Request::VmLiveSnapshot(to)).unwrap_err().to_string().contains("VM is paused"));
    let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", vmm.pid())).unwrap();
    assert_eq!(children.trim(), "", "a writer is left");
    client.send(&Request::VmmShutdown).unwrap();
    vmm.wait().assert_success();
}

/// Waits until the event has been told `count` times.
fn wait_for_events(events: &Path, name: &str, count: usize) {
    let deadline = Instant::now() + tests::TIMEOUT;
    let told = || fs::read_to_string(events).unwrap().matches(&format!("\"event\":\"{name}\"")).count();
    while told() < count {
        // A file says nothing when it grows.
        assert!(Instant::now() < deadline, "{}", fs::read_to_string(events).unwrap());
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Memory that others see cannot be kept as it was by a fork.
#[test]
fn shared_memory_is_not_saved_live() {
    let mut vmm = VmmCommand::tiny().arg("--memory", "size=16M,shared=on").api().spawn();
    vmm.wait_for("tick 00000001");
    let to = SnapshotConfig { destination_url: url(&vmm.path("snapshot")) };
    let refused = vmm.client().send(&Request::VmLiveSnapshot(to)).unwrap_err().to_string();
    assert!(refused.contains("memory.shared=on"), "{refused}");
}

/// A disk that the guest writes to would not fit to its memory.
#[test]
fn a_machine_that_writes_to_a_disk_is_not_saved_live() {
    let command = VmmCommand::tiny().api();
    let disk = command.path("disk");
    fs::write(&disk, vec![0; 1 << 20]).unwrap();
    let mut vmm = command.arg("--disk", format!("path={}", disk.display())).spawn();
    let to = SnapshotConfig { destination_url: url(&vmm.path("snapshot")) };
    let refused = vmm.client().send(&Request::VmLiveSnapshot(to)).unwrap_err().to_string();
    assert!(refused.contains("goes on changing"), "{refused}");
    assert!(!vmm.path("snapshot").exists());
}
