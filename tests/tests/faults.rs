//! What goes wrong while a machine is saved or restored: there is a sentence about it, nothing that could be taken for a snapshot,
//! and the machine that was to be saved goes on.

use std::collections::BTreeSet;
use std::fs;
use std::mem::MaybeUninit;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::inotify;
use rustix::process::Signal;
use tests::{Vmm, VmmCommand, programs, tiny};
use vmm_api::{Client, Request};
use vmm_config::{MemoryRestoreMode, RestoreConfig, SnapshotConfig};

const FILES: [&str; 5] = ["snapshot.json", "config.json", "state.bin", "memory.sums", "memory"];

fn url(directory: &Path) -> String {
    format!("file://{}", directory.display())
}

fn snapshot(url: String) -> Request {
    Request::VmSnapshot(SnapshotConfig { destination_url: url })
}

/// What a snapshot that cannot be taken says.
fn refused(client: &mut Client, url: String) -> String {
    client.send(&snapshot(url)).unwrap_err().to_string()
}

/// A guest that counts, and a connection to its VMM.
fn counting() -> (Vmm, Client) {
    started(VmmCommand::tiny().api().spawn())
}

fn started(mut vmm: Vmm) -> (Vmm, Client) {
    vmm.wait_for("tick 00000010");
    let client = vmm.client();
    (vmm, client)
}

/// The paused machine goes on, and is paused again.
fn goes_on(vmm: &mut Vmm, client: &mut Client) {
    let text = vmm.text();
    // The line it is in the middle of has not all of its number.
    let (whole, _) = text.rsplit_once('\n').unwrap();
    let last = whole.lines().rev().find_map(tiny::tick).unwrap();
    client.send(&Request::VmResume).unwrap();
    vmm.wait_for(&format!("tick {:08x}", last + 5));
    client.send(&Request::VmPause).unwrap();
}

fn names(directory: &Path) -> BTreeSet<String> {
    fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// What a restore that cannot be says.
fn refusal(directory: &Path) -> String {
    let ended = VmmCommand::new().arg("--restore", format!("source_url={}", url(directory))).run();
    assert_eq!((ended.status.code(), ended.stderr.lines().count()), (Some(1), 1), "{ended:?}");
    ended.stderr
}

/// The machine in `directory` goes on in a process of its own.
fn restores(directory: &Path) {
    let from = format!("source_url={},resume=true", url(directory));
    let mut vmm = VmmCommand::new().api().arg("--restore", from).spawn();
    // The first line may be the rest of one.
    while tiny::tick(&vmm.wait_for("")).is_none() {}
}

/// The program, in a mount namespace of its own in which `mount` was called with these arguments.
fn with_mount(arguments: &str) -> Command {
    let mut shell = Command::new("unshare");
    shell.args(["--mount", "sh", "-ec", &format!("mount {arguments}\nexec \"$@\""), "sh"]);
    shell.arg(programs::program("spectrum-vmm"));
    shell
}

/// What the process sees at `path`.
fn seen_by(vmm: &Vmm, path: &Path) -> PathBuf {
    PathBuf::from(format!("/proc/{}/root{}", vmm.pid(), path.display()))
}

const PAGE: usize = 4096;

/// The disk is full at each page of a snapshot, until it fits.
#[test]
fn a_full_disk_is_named_and_the_machine_goes_on() {
    let keep = tempfile::tempdir().unwrap();
    let disk = keep.path().join("disk");
    fs::create_dir(&disk).unwrap();
    let size = 2 << 20;
    let launcher = with_mount(&format!("-t tmpfs -o size={size} none {}", disk.display()));
    let (mut vmm, mut client) = started(VmmCommand::tiny().api().spawn_as(launcher));
    client.send(&Request::VmPause).unwrap();
    let seen = seen_by(&vmm, &disk);
    let mut incomplete = BTreeSet::new();
    let mut free = 0;
    loop {
        fs::write(seen.join("ballast"), vec![1; size - free * PAGE]).unwrap();
        let directory = disk.join("snapshot");
        let Err(error) = client.send(&snapshot(url(&directory))) else { break };
        let error = error.to_string();
        let file = FILES.into_iter().find(|name| error.contains(&format!("snapshot/{name}.partial: No space left")));
        incomplete.insert(file.unwrap_or_else(|| panic!("{free} pages: {error}")));
        assert_eq!(names(&seen.join("snapshot")), BTreeSet::new(), "{free} pages");
        goes_on(&mut vmm, &mut client);
        // Where the file is made in which most of it goes, larger steps do.
        free += if incomplete.len() == 1 { 3 } else { 1 };
        fs::remove_file(seen.join("ballast")).unwrap();
    }
    // The last one that did not fit was all but whole.
    assert!(["snapshot.json", "memory"].iter().all(|name| incomplete.contains(name)), "{incomplete:?}");
    let out = keep.path().join("out");
    fs::create_dir(&out).unwrap();
    for name in FILES {
        fs::copy(seen.join("snapshot").join(name), out.join(name)).unwrap();
    }
    goes_on(&mut vmm, &mut client);
    restores(&out);
}

/// A limit of the process is an error like another.
#[test]
fn a_file_that_may_not_be_so_long_is_named_and_the_machine_goes_on() {
    let keep = tempfile::tempdir().unwrap();
    let mut launcher = Command::new("prlimit");
    launcher.arg("--fsize=8192").arg(programs::program("spectrum-vmm"));
    let (mut vmm, mut client) = started(VmmCommand::tiny().api().spawn_as(launcher));
    client.send(&Request::VmPause).unwrap();
    let directory = keep.path().join("snapshot");
    let error = refused(&mut client, url(&directory));
    assert!(error.contains(".partial: File too large"), "{error}");
    assert_eq!(names(&directory), BTreeSet::new());
    goes_on(&mut vmm, &mut client);
}

/// Kills a VMM that saves its machine to `directory` when so many things have happened there; whether that was the last.
fn killed_at(directory: &Path, moment: usize) -> bool {
    use inotify::{CreateFlags, ReadFlags, WatchFlags};
    fs::create_dir(directory).unwrap();
    let (vmm, mut client) = counting();
    client.send(&Request::VmPause).unwrap();
    let watch = inotify::init(CreateFlags::CLOEXEC).unwrap();
    let happens = WatchFlags::CREATE | WatchFlags::MODIFY | WatchFlags::MOVED_TO;
    inotify::add_watch(&watch, directory, happens).unwrap();
    let request = snapshot(url(directory));
    let sender = std::thread::spawn(move || client.send(&request).map(drop));
    let mut buffer = [MaybeUninit::uninit(); 4096];
    let mut events = inotify::Reader::new(&watch, &mut buffer);
    let mut seen = 0;
    let last = loop {
        let event = events.next().unwrap();
        seen += 1;
        let last = event.events().contains(ReadFlags::MOVED_TO)
            && event.file_name().is_some_and(|name| name.to_bytes() == b"snapshot.json");
        if last || seen == moment {
            break last;
        }
    };
    vmm.signal(Signal::KILL);
    // It has been answered, or its connection was cut.
    let _ = sender.join().unwrap();
    let _ = vmm.wait();
    last
}

/// Whenever the VMM is killed, there is a whole snapshot or none.
#[test]
fn a_vmm_that_is_killed_while_it_saves_leaves_a_whole_snapshot_or_none() {
    let keep = tempfile::tempdir().unwrap();
    let mut none = Vec::new();
    for moment in 1.. {
        let directory = keep.path().join(moment.to_string());
        let last = killed_at(&directory, moment);
        if names(&directory).contains("snapshot.json") {
            assert_eq!(names(&directory), FILES.map(String::from).into(), "moment {moment}");
            restores(&directory);
        } else {
            let said = refusal(&directory);
            assert!(said.contains("holds no snapshot: there is no snapshot.json in it"), "moment {moment}: {said}");
            none.push(directory);
        }
        if last {
            break;
        }
    }
    // What is left of an attempt is in nobody's way.
    let left = none.last().expect("one was killed in time");
    assert!(!names(left).is_empty());
    let (_vmm, mut client) = counting();
    client.send(&Request::VmPause).unwrap();
    client.send(&snapshot(url(left))).unwrap();
    assert_eq!(names(left), FILES.map(String::from).into());
    restores(left);
}

/// Destinations that cannot be, one after the other, for one machine.
#[test]
fn a_destination_that_cannot_be_is_named_and_the_machine_goes_on() {
    let keep = tempfile::tempdir().unwrap();
    let [file, fixed, taken] = ["file", "fixed", "taken"].map(|name| keep.path().join(name));
    fs::write(&file, "something").unwrap();
    fs::create_dir(&fixed).unwrap();
    let launcher = with_mount(&format!("-t tmpfs -o ro none {}", fixed.display()));
    let (mut vmm, mut client) = started(VmmCommand::tiny().api().spawn_as(launcher));
    let said = refused(&mut client, url(&taken));
    assert!(said.contains("VM is running; pause it before taking a snapshot"), "{said}");
    client.send(&Request::VmPause).unwrap();
    goes_on(&mut vmm, &mut client);
    for wrong in ["", "/tmp", "file://", "file://relative", "https://example.org/x", "file:/x"] {
        let said = refused(&mut client, wrong.into());
        let sentence = format!("{wrong:?} names no snapshot: write file:// and the absolute path of a directory");
        assert!(said.contains(&sentence), "{said}");
        goes_on(&mut vmm, &mut client);
    }
    client.send(&snapshot(url(&taken))).unwrap();
    let before = fs::read(taken.join("state.bin")).unwrap();
    goes_on(&mut vmm, &mut client);
    let path = |path: &Path| path.display().to_string();
    let below = file.join("below");
    let cases = [
        (&file, format!("cannot look into {}: Not a directory", path(&file))),
        (&below, format!("cannot look into {}: Not a directory", path(&below))),
        (&fixed, format!("cannot make {}/memory.partial: Read-only file system", path(&fixed))),
        (&fixed.join("below"), format!("cannot make the directory {}/below: Read-only file system", path(&fixed))),
        (&taken, format!("{} holds a snapshot already; choose another directory or remove it", path(&taken))),
    ];
    for (directory, sentence) in cases {
        let said = refused(&mut client, url(directory));
        assert!(said.contains(&sentence), "{said}");
        goes_on(&mut vmm, &mut client);
    }
    assert_eq!(fs::read_to_string(&file).unwrap(), "something");
    assert_eq!(fs::read(taken.join("state.bin")).unwrap(), before, "the first one is as it was");
    // Nor does a machine that is there become another one.
    let memory_restore_mode = MemoryRestoreMode::CopyOnWrite;
    let from =
        RestoreConfig { source_url: url(&taken), prefault: false, memory_restore_mode, resume: true, no_share: false };
    let said = client.send(&Request::VmRestore(from)).unwrap_err().to_string();
    assert!(said.contains("VM is already created"), "{said}");
    goes_on(&mut vmm, &mut client);
    restores(&taken);
}

/// Each file is needed, and each version but one is refused; a VMM whose restore failed can be asked for another.
#[test]
fn a_snapshot_that_is_not_whole_or_of_another_version_is_refused_by_name() {
    let keep = tempfile::tempdir().unwrap();
    let directory = keep.path().join("snapshot");
    let (vmm, mut client) = counting();
    client.send(&Request::VmPause).unwrap();
    client.send(&snapshot(url(&directory))).unwrap();
    drop(vmm);
    for name in FILES {
        let (file, away) = (directory.join(name), keep.path().join(name));
        fs::rename(&file, &away).unwrap();
        let said = refusal(&directory);
        let sentence = match name {
            "snapshot.json" => format!("{} holds no snapshot: there is no snapshot.json in it", directory.display()),
            _ => format!("cannot open {}: No such file or directory", file.display()),
        };
        assert!(said.contains(&sentence), "{said}");
        fs::rename(&away, &file).unwrap();
    }
    let manifest = directory.join("snapshot.json");
    let text = fs::read_to_string(&manifest).unwrap();
    assert!(text.contains("\"version\": 1,"), "{text}");
    for (version, sentence) in [
        ("0", "has format version 0, and this program reads version 1; take the snapshot again"),
        ("2", "has format version 2, and this program reads version 1; take the snapshot again"),
        ("-1", "is damaged: "),
        ("\"1\"", "is damaged: "),
        ("1.0", "is damaged: "),
    ] {
        fs::write(&manifest, text.replace("\"version\": 1,", &format!("\"version\": {version},"))).unwrap();
        let said = refusal(&directory);
        assert!(said.contains(&format!("{} {sentence}", manifest.display())), "{said}");
    }
    let mut vmm = VmmCommand::new().api().spawn();
    let mut client = vmm.client();
    let memory_restore_mode = MemoryRestoreMode::Copy;
    let from = RestoreConfig {
        source_url: url(&directory),
        prefault: false,
        memory_restore_mode,
        resume: true,
        no_share: false,
    };
    let said = client.send(&Request::VmRestore(from.clone())).unwrap_err().to_string();
    assert!(said.contains("is damaged"), "{said}");
    fs::write(&manifest, text).unwrap();
    client.send(&Request::VmRestore(from)).unwrap();
    while tiny::tick(&vmm.wait_for("")).is_none() {}
}

/// An image of numbers that count up, with writes that are thrown away, and an odd end.
fn image(path: &Path) -> String {
    fs::write(path, (0..625u64).flat_map(u64::to_le_bytes).collect::<Vec<u8>>()).unwrap();
    format!("file={},discard_writes=on", path.display())
}

/// What it takes to find out whether a guest has written to an image is there behind the filters.
#[test]
fn a_machine_that_wrote_to_no_image_is_saved() {
    let keep = tempfile::tempdir().unwrap();
    let directory = keep.path().join("snapshot");
    let command = VmmCommand::tiny().arg("--pmem", image(&keep.path().join("image")));
    let (mut vmm, mut client) = started(command.api().spawn());
    client.send(&Request::VmPause).unwrap();
    client.send(&snapshot(url(&directory))).unwrap();
    goes_on(&mut vmm, &mut client);
    restores(&directory);
}

/// Debian is saved after it read an image, and is not after it wrote to it: what it wrote would be lost.
#[test]
fn a_guest_that_wrote_to_an_image_is_not_saved_and_goes_on() {
    let keep = tempfile::tempdir().unwrap();
    let file = keep.path().join("image");
    let jobs = ["image=/dev/pmem0", "echo", "overwrite=/dev/pmem0", "echo"];
    let mut vmm = VmmCommand::probe(&["virtio_pmem", "nd_pmem"], &jobs)
        .api()
        .arg("--pmem", image(&file))
        .args(&["--landlock", "--landlock-rules", &format!("path={},access=rw", keep.path().display())])
        .spawn();
    vmm.wait_for("probe: image=/dev/pmem0: 2097152 bytes");
    vmm.wait_for("probe: echo: type");
    let mut client = vmm.client();
    client.send(&Request::VmPause).unwrap();
    client.send(&snapshot(url(&keep.path().join("before")))).unwrap();
    client.send(&Request::VmResume).unwrap();
    vmm.type_text("go on\n");
    vmm.wait_for("probe: overwrite=/dev/pmem0: written by guest");
    vmm.wait_for("probe: echo: type");
    client.send(&Request::VmPause).unwrap();
    let after = keep.path().join("after");
    let said = refused(&mut client, url(&after));
    let sentence = format!("the device _pmem0 cannot be saved: the guest has written to {} (at 0x0,", file.display());
    assert!(said.contains(&sentence) && !after.exists(), "{said}");
    client.send(&Request::VmResume).unwrap();
    vmm.type_text("still there?\n");
    vmm.wait_for("probe: echo: still there?");
    vmm.wait().assert_success();
}
