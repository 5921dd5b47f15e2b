//! Clones: many machines of one snapshot, each a process of its own.

use std::collections::{BTreeSet, HashSet};
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use tests::{Vmm, VmmCommand, tiny, zygote};
use vmm_api::{Client, Request};
use vmm_config::{CloneConfig, SnapshotConfig};

/// A snapshot of a counting guest in `directory`.
fn counter(directory: &Path) {
    counter_of(VmmCommand::tiny(), directory);
}

fn counter_of(command: VmmCommand, directory: &Path) {
    let mut vmm = command.api().spawn();
    vmm.wait_for("tick 00000010");
    save(&mut vmm, directory);
}

fn save(vmm: &mut Vmm, directory: &Path) {
    let mut client = vmm.client();
    client.send(&Request::VmPause).unwrap();
    let to = SnapshotConfig { destination_url: format!("file://{}", directory.display()) };
    client.send(&Request::VmSnapshot(to)).unwrap();
}

/// A clone whose serial port is a pipe, and the end to read.
fn clone(client: &mut Client, config: CloneConfig) -> (Pid, BufReader<File>) {
    let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    let mut fds = config.fds;
    fds.push("serial".into());
    let info = client.clone_vm(CloneConfig { fds, ..config }, &[write.as_fd()]).unwrap();
    (Pid::from_raw(i32::try_from(info.pid).unwrap()).unwrap(), BufReader::new(File::from(read)))
}

fn first_tick(output: &mut BufReader<File>) -> u32 {
    let mut rest = String::new();
    // The rest of the line it was saved in the middle of.
    output.read_line(&mut rest).unwrap();
    let mut line = String::new();
    output.read_line(&mut line).unwrap();
    tiny::tick(&line).unwrap_or_else(|| panic!("{rest:?} {line:?}"))
}

#[test]
fn clones_go_on_each_for_itself() {
    let keep = tempfile::tempdir().unwrap();
    let directory = keep.path().join("snapshot");
    counter(&directory);
    let (zygote, mut client) = zygote::start(&directory);
    let (one, mut a) = clone(&mut client, CloneConfig::default());
    let (two, mut b) = clone(&mut client, CloneConfig::default());
    assert_ne!(one, two);
    let from = first_tick(&mut a);
    assert_eq!(first_tick(&mut b), from);
    // One of them dies; the other, and the zygote, do not notice.
    kill_process(one, Signal::KILL).unwrap();
    a.lines().for_each(drop);
    let mut line = String::new();
    b.read_line(&mut line).unwrap();
    assert_eq!(tiny::tick(&line), Some(from + 1));
    client.ping().unwrap();
    // The zygote dies; the clone does not notice.
    drop(zygote);
    for n in 2..200 {
        line.clear();
        b.read_line(&mut line).unwrap();
        assert_eq!(tiny::tick(&line), Some(from + n));
    }
    kill_process(two, Signal::TERM).unwrap();
    b.lines().for_each(drop);
}

/// Whoever has its process id can end it, however early.
#[test]
fn a_new_clone_can_be_ended_at_once() {
    let keep = tempfile::tempdir().unwrap();
    let directory = keep.path().join("snapshot");
    counter(&directory);
    let (_zygote, mut client) = zygote::start(&directory);
    for _ in 0..50 {
        let (pid, output) = clone(&mut client, CloneConfig::default());
        kill_process(pid, Signal::TERM).unwrap();
        output.lines().for_each(drop);
    }
    client.ping().unwrap();
}

/// A clone ends with its owner: one that waited, one made for the occasion, and one whose owner was gone before it was there.
#[test]
fn a_clone_ends_with_its_owner() {
    let keep = tempfile::tempdir().unwrap();
    let directory = keep.path().join("snapshot");
    counter(&directory);
    for pool in [1, 0] {
        let (zygote, mut client) = zygote::start_with_pool(&directory, pool);
        let _ = zygote::children(&zygote, pool.into());
        let owned_by = |client: &mut Client, owned: &UnixStream| {
            let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
            let config = CloneConfig { fds: vec!["serial".into(), "owner".into()], ..CloneConfig::default() };
            client.clone_vm(config, &[write.as_fd(), owned.as_fd()]).unwrap();
            BufReader::new(File::from(read))
        };
        let (owner, owned) = UnixStream::pair().unwrap();
        let mut output = owned_by(&mut client, &owned);
        first_tick(&mut output);
        drop((owner, owned));
        output.lines().for_each(drop);
        let (owner, owned) = UnixStream::pair().unwrap();
        drop(owner);
        owned_by(&mut client, &owned).lines().for_each(drop);
        client.ping().unwrap();
    }
}

/// A clone answers on a socket of its own, which it was handed.
#[test]
fn a_clone_has_its_own_api() {
    let keep = tempfile::tempdir().unwrap();
    let directory = keep.path().join("snapshot");
    counter(&directory);
    let (_zygote, mut client) = zygote::start(&directory);
    let (socket, path) = {
        let path = keep.path().join("clone-api");
        (OwnedFd::from(UnixListener::bind(&path).unwrap()), path)
    };
    let config = CloneConfig { fds: vec!["api".into()], paused: true, ..CloneConfig::default() };
    let info = client.clone_vm(config, &[socket.as_fd()]).unwrap();
    let mut own = Client::connect(&path).unwrap();
    assert_eq!(own.ping().unwrap().pid, info.pid);
    assert_eq!(own.info().unwrap().state, vmm_api::VmState::Paused);
    own.send(&Request::VmResume).unwrap();
    // It can be saved like any machine, and what it says of itself goes for no other.
    own.send(&Request::VmPause).unwrap();
    let again = keep.path().join("again");
    let to = SnapshotConfig { destination_url: format!("file://{}", again.display()) };
    own.send(&Request::VmSnapshot(to)).unwrap();
    own.send(&Request::VmmShutdown).unwrap();
    let (_other, mut other) = zygote::start(&again);
    let (pid, mut output) = clone(&mut other, CloneConfig::default());
    first_tick(&mut output);
    kill_process(pid, Signal::KILL).unwrap();
}

#[test]
fn requests_that_make_no_sense_are_refused() {
    let keep = tempfile::tempdir().unwrap();
    let directory = keep.path().join("snapshot");
    counter(&directory);
    let (zygote, mut client) = zygote::start(&directory);
    let null = File::open("/dev/null").unwrap();
    let mut refusal = |names: &[&str], fds: usize| {
        let config = CloneConfig { fds: names.iter().map(ToString::to_string).collect(), ..CloneConfig::default() };
        client.clone_vm(config, &vec![null.as_fd(); fds]).unwrap_err().to_string()
    };
    assert!(refusal(&["serial"], 0).contains("0 descriptors came along, and 1 were announced"));
    assert!(refusal(&["serial", "serial"], 2).contains("the same purpose"));
    assert!(
        refusal(&["_gpu0"], 1)
            .contains("a descriptor is for _gpu0, and a clone has _rng, api, console, owner, serial, working-set")
    );
    assert!(refusal(&["owner"], 1).contains("neither a socket nor a pipe"));
    assert!(refusal(&["working-set"], 1).contains("is no file"));
    let info = client.send(&Request::VmInfo).unwrap_err().to_string();
    assert!(info.contains("a zygote does not answer vm.info"), "{info}");
    client.send(&Request::VmmShutdown).unwrap();
    zygote.wait().assert_success();
}

/// A thousand clones come and go: the zygote is as it was, and nothing of them is left.
#[test]
fn a_thousand_clones_leave_nothing_behind() {
    let keep = tempfile::tempdir().unwrap();
    let directory = keep.path().join("snapshot");
    counter(&directory);
    let (zygote, mut client) = zygote::start(&directory);
    let descriptors = || std::fs::read_dir(format!("/proc/{}/fd", zygote.pid())).unwrap().count();
    let memory = || -> u64 {
        let text = std::fs::read_to_string(format!("/proc/{}/smaps_rollup", zygote.pid())).unwrap();
        let line = text.lines().find_map(|l| l.strip_prefix("Anonymous:")).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    };
    let mut before = None;
    for round in 0..1000 {
        let (pid, mut output) = clone(&mut client, CloneConfig::default());
        first_tick(&mut output);
        zygote::end(pid);
        if round == 20 {
            before = Some((descriptors(), memory()));
        }
    }
    let (fds, kib) = before.unwrap();
    assert_eq!(descriptors(), fds);
    assert!(memory() <= kib + 64, "{} KiB after {kib}", memory());
    assert_eq!(zygote::children(&zygote, 0), []);
}

/// The files in memory that are mapped in a process.
fn mapped(pid: Pid) -> BTreeSet<String> {
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", pid.as_raw_nonzero())).unwrap();
    let names = maps.lines().filter_map(|line| line.splitn(6, ' ').nth(5));
    names.map(|name| name.trim().trim_end_matches(" (deleted)").to_owned()).filter(|name| name.contains('/')).collect()
}

/// A clone that is to share nothing has copies of memory and image, and counts on like the others.
#[test]
fn a_clone_can_have_all_for_itself() {
    let keep = tempfile::tempdir().unwrap();
    let (directory, image) = (keep.path().join("snapshot"), keep.path().join("image"));
    std::fs::write(&image, [7; 10_000]).unwrap();
    counter_of(VmmCommand::tiny().arg("--pmem", format!("file={},discard_writes=on", image.display())), &directory);
    let (_zygote, mut client) = zygote::start_with_pool(&directory, 1);
    let image = image.display().to_string();
    let (pid, mut output) = clone(&mut client, CloneConfig::default());
    let from = first_tick(&mut output);
    let shared = mapped(pid);
    assert!(shared.contains("/memfd:template") && shared.contains(&image), "{shared:?}");
    zygote::end(pid);
    let (pid, mut output) = clone(&mut client, CloneConfig { no_share: true, ..CloneConfig::default() });
    assert_eq!(first_tick(&mut output), from);
    let own = mapped(pid);
    assert!(!own.contains("/memfd:template") && !own.contains(&image), "{own:?}");
    assert!(own.contains("/memfd:image"), "{own:?}");
    zygote::end(pid);
    // The same without a zygote.
    let from = format!("source_url=file://{},resume=true", directory.display());
    let mut restored = VmmCommand::new().args(&["--restore", &from, "--no-share"]).spawn();
    restored.wait_for("tick");
    let own = mapped(Pid::from_raw(i32::try_from(restored.pid()).unwrap()).unwrap());
    let memory = directory.join("memory").display().to_string();
    assert!(!own.contains(&memory) && !own.contains(&image) && own.contains("/memfd:image"), "{own:?}");
}

/// KiB of the template's memory that a process has in its page tables: shared pages, and copies.
fn resident(pid: Pid) -> (u64, u64) {
    let smaps = std::fs::read_to_string(format!("/proc/{}/smaps", pid.as_raw_nonzero())).unwrap();
    let of = |part: &str, name: &str| -> u64 {
        let line = part.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    };
    let mapping = smaps.split("VmFlags:").find(|part| part.contains("memfd:template")).unwrap();
    let own = of(mapping, "Anonymous:");
    (of(mapping, "Rss:") - own, own)
}

/// What one clone has touched others have before they run.
#[test]
fn clones_can_have_the_working_set_beforehand() {
    let keep = tempfile::tempdir().unwrap();
    let directory = keep.path().join("snapshot");
    counter(&directory);
    let (_zygote, mut client) = zygote::start(&directory);
    let list = directory.join("working-set.json");
    let api = |client: &mut Client, paused: bool, told: Option<&Path>| {
        let path = keep.path().join("clone-api");
        let socket = OwnedFd::from(UnixListener::bind(&path).unwrap());
        let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        let told = told.map(|list| File::open(list).unwrap());
        let fds = ["api", "serial"].into_iter().chain(told.iter().map(|_| "working-set")).map(String::from).collect();
        let config = CloneConfig { fds, paused, ..CloneConfig::default() };
        let fds: Vec<_> = [socket.as_fd(), write.as_fd()].into_iter().chain(told.iter().map(File::as_fd)).collect();
        let info = client.clone_vm(config, &fds).unwrap();
        drop(write);
        let mut output = BufReader::new(File::from(read));
        if !paused {
            first_tick(&mut output);
        }
        let mut own = Client::connect(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        // Built when it answers.
        own.ping().unwrap();
        (Pid::from_raw(i32::try_from(info.pid).unwrap()).unwrap(), own, output)
    };
    let (fresh, _, _) = api(&mut client, true, None);
    let (few, none) = resident(fresh);
    zygote::end(fresh);
    let (pid, mut own, _output) = api(&mut client, false, None);
    let to = SnapshotConfig { destination_url: format!("file://{}", directory.display()) };
    let record = |own: &mut Client| own.send(&Request::VmWorkingSet(to.clone()));
    own.send(&Request::VmPause).unwrap();
    let (read, written) = resident(pid);
    assert!(read > few && written >= none, "{read} and {written} KiB after {few} and {none}");
    record(&mut own).unwrap();
    zygote::end(pid);
    // One that is told what it will need.
    let (pid, _, _) = api(&mut client, true, Some(&list));
    let (before, copies) = resident(pid);
    assert!(copies >= written && before >= read, "{before} and {copies} KiB, {read} and {written} recorded");
    zygote::end(pid);
    // What cannot be read is no harm.
    let empty = tempfile::NamedTempFile::new().unwrap();
    let (pid, _, mut output) = api(&mut client, false, Some(empty.path()));
    first_tick(&mut output);
    zygote::end(pid);
    let (_zygote, mut client) = zygote::start_with(&directory, ",prefault=on");
    let (pid, _, _) = api(&mut client, true, None);
    let (before, copies) = resident(pid);
    assert!(copies >= written && before >= read, "{before} and {copies} KiB, {read} and {written} recorded");
    zygote::end(pid);
    // A list that is about something else is refused by its name.
    std::fs::write(&list, "{}").unwrap();
    let flag =
        format!("source_url=file://{},socket={},prefault=on", directory.display(), keep.path().join("z").display());
    let refused = VmmCommand::new().arg("--zygote", flag).run();
    assert!(refused.stderr.contains("working-set.json is damaged"), "{}", refused.stderr);
    // Who shares nothing has nothing to tell.
    let mut vmm = VmmCommand::tiny().api().spawn();
    let error = record(&mut vmm.client()).unwrap_err().to_string();
    assert!(error.contains("has its memory for itself"), "{error}");
}

/// A clone whose guest goes on writing is saved as it was at one moment: each of its pages counts the rounds, one page after
/// the other.
#[test]
fn a_clone_is_saved_live_as_it_was_at_one_moment() {
    const MIB: usize = 1 << 20;
    let keep = tempfile::tempdir().unwrap();
    let (directory, kernel) = (keep.path().join("snapshot"), keep.path().join("kernel"));
    tiny::write_toucher(&kernel);
    // Its output has no lines.
    let pipe = keep.path().join("serial");
    mknodat(CWD, &pipe, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    let toucher = VmmCommand::new().arg("--kernel", &kernel).arg("--memory", "size=256M").arg("--console", "off");
    let mut vmm = toucher.arg("--serial", format!("file={}", pipe.display())).api().spawn();
    File::open(&pipe).unwrap().read_exact(&mut [0]).unwrap();
    save(&mut vmm, &directory);
    drop(vmm);
    let (_zygote, mut client) = zygote::start(&directory);
    let api = keep.path().join("clone-api");
    let socket = OwnedFd::from(UnixListener::bind(&api).unwrap());
    let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    let config = CloneConfig { fds: vec!["api".into(), "serial".into()], ..CloneConfig::default() };
    let info = client.clone_vm(config, &[socket.as_fd(), write.as_fd()]).unwrap();
    drop(write);
    let mut output = File::from(read);
    let mut rounds = |count: usize| {
        let mut seen = 0;
        while seen < count {
            let mut byte = [0];
            output.read_exact(&mut byte).unwrap();
            seen += usize::from(byte == *b":");
        }
    };
    // Each is the work of a while where KVM is emulated.
    rounds(1);
    let mut own = Client::connect(&api).unwrap();
    let live = keep.path().join("live");
    let to = SnapshotConfig { destination_url: format!("file://{}", live.display()) };
    own.send(&Request::VmLiveSnapshot(to)).unwrap();
    // It goes on, and what it writes now is not in it.
    rounds(1);
    while !live.join("snapshot.json").exists() {
        rounds(1);
    }
    let memory = std::fs::read(live.join("memory")).unwrap();
    let count = |address: usize| {
        let word: [u8; 4] = memory[address..address + 4].try_into().unwrap();
        u32::from_le_bytes(word).wrapping_sub(u32::try_from(address).unwrap())
    };
    let counts: Vec<u32> = (2 * MIB..10 * MIB).step_by(4096).map(count).collect();
    let steps = counts.windows(2).filter(|pair| pair[0] != pair[1]).count();
    assert!(counts[0] >= 1 && steps <= 1 && counts[0] - counts[counts.len() - 1] <= 1, "{steps} steps: {counts:?}");
    let rest = (10 * MIB..256 * MIB).step_by(4096).map(count);
    assert!(rest.into_iter().all(|count| count == 0), "pages that were only read are as they were");
    // What was saved goes on like any other.
    let (_other, mut other) = zygote::start(&live);
    let (pid, mut output) = clone(&mut other, CloneConfig::default());
    output.read_exact(&mut [0]).unwrap();
    zygote::end(pid);
    zygote::end(Pid::from_raw(i32::try_from(info.pid).unwrap()).unwrap());
}

/// Clones that wait are each somebody's once, and another takes the place of each.
#[test]
fn a_pool_serves_each_clone_once() {
    let keep = tempfile::tempdir().unwrap();
    let directory = keep.path().join("snapshot");
    counter(&directory);
    let (zygote, mut client) = zygote::start_with_pool(&directory, 2);
    let mut served = HashSet::new();
    let mut waiting = zygote::children(&zygote, 2);
    for _ in 0..20 {
        let (pid, mut output) = clone(&mut client, CloneConfig::default());
        assert!(waiting.contains(&pid), "a clone that was ready is used");
        assert!(served.insert(pid), "{pid:?} served twice");
        first_tick(&mut output);
        zygote::end(pid);
        waiting = zygote::children(&zygote, 2);
    }
    // More at once than there are: the others are made for those who ask.
    let clones: Vec<_> = (0..6).map(|_| clone(&mut client, CloneConfig::default())).collect();
    let mut from = BTreeSet::new();
    for (pid, mut output) in clones {
        from.insert(first_tick(&mut output));
        assert!(served.insert(pid), "{pid:?} served twice");
        zygote::end(pid);
    }
    assert_eq!(from.len(), 1, "all go on from the same moment");
    // Who died while it waited is not given to anybody.
    zygote::children(&zygote, 2).into_iter().for_each(zygote::end);
    let (pid, mut output) = clone(&mut client, CloneConfig::default());
    assert!(served.insert(pid), "{pid:?} served twice");
    first_tick(&mut output);
    zygote::end(pid);
    client.ping().unwrap();
}

/// What waits ends with its zygote, however that ends, and by a signal of its own.
#[test]
fn a_pool_ends_with_its_zygote() {
    let keep = tempfile::tempdir().unwrap();
    let directory = keep.path().join("snapshot");
    counter(&directory);
    for signal in [Signal::KILL, Signal::TERM] {
        let (zygote, client) = zygote::start_with_pool(&directory, 3);
        let waiting = zygote::children(&zygote, 3);
        let pidfds: Vec<_> = waiting.iter().map(|pid| pidfd_open(*pid, PidfdFlags::empty()).unwrap()).collect();
        // One of them ends alone.
        kill_process(waiting[0], Signal::TERM).unwrap();
        poll(&mut [PollFd::new(&pidfds[0], PollFlags::IN)], None).unwrap();
        let pid = Pid::from_raw(i32::try_from(zygote.pid()).unwrap()).unwrap();
        kill_process(pid, signal).unwrap();
        for pidfd in &pidfds {
            poll(&mut [PollFd::new(pidfd, PollFlags::IN)], None).unwrap();
        }
        drop((zygote, client));
    }
}

/// A clone that waited is like any other: it has its own API, and can be left paused.
#[test]
fn a_clone_of_a_pool_takes_what_it_is_handed() {
    let keep = tempfile::tempdir().unwrap();
    let directory = keep.path().join("snapshot");
    counter(&directory);
    let (zygote, mut client) = zygote::start_with_pool(&directory, 1);
    let waiting = zygote::children(&zygote, 1);
    let path = keep.path().join("clone-api");
    let socket = OwnedFd::from(UnixListener::bind(&path).unwrap());
    let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    let config = CloneConfig { fds: vec!["api".into(), "serial".into()], paused: true, ..CloneConfig::default() };
    let info = client.clone_vm(config, &[socket.as_fd(), write.as_fd()]).unwrap();
    assert_eq!(Pid::from_raw(i32::try_from(info.pid).unwrap()), Some(waiting[0]));
    drop(write);
    let mut own = Client::connect(&path).unwrap();
    assert_eq!(own.ping().unwrap().pid, info.pid);
    assert_eq!(own.info().unwrap().state, vmm_api::VmState::Paused);
    own.send(&Request::VmResume).unwrap();
    first_tick(&mut BufReader::new(File::from(read)));
    own.send(&Request::VmmShutdown).unwrap();
}
