//! The file system device as a file system: what a suite says of it, what it keeps, what it refuses.

use std::fs::{self, File};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::{CWD, FileType, Mode, OFlags, mknodat, open};
use rustix::process::{Pid, Signal, kill_process};
use tests::agent::{self, Host};
use tests::journal::{self, whole_blocks};
use tests::shell::{self, ask};
use tests::{Vmm, VmmCommand, programs, zygote};
use vmm_api::{Client, Request};
use vmm_config::{CloneConfig, GrantConfig, SnapshotConfig};

fn grant(client: &mut Client, name: &str, path: &Path, writable: bool) {
    let grant = GrantConfig { id: "_fs0".into(), name: name.into(), path: Some(path.into()), writable };
    client.send(&Request::VmAddGrant(grant)).unwrap();
}

/// A folder with `shared` in it.
fn host() -> (tempfile::TempDir, PathBuf) {
    let keep = tempfile::tempdir().unwrap();
    let shared = keep.path().join("shared");
    fs::create_dir(&shared).unwrap();
    (keep, shared)
}

/// pjdfstest on a grant for writing. What is expected to fail, and why, is in the suite's configuration beside this file; a test
/// that passes against expectation is a failure, too.
#[test]
fn a_file_system_suite_finds_what_is_known_and_nothing_else() {
    let (keep, shared) = host();
    let tools = PathBuf::from(std::env::var_os("SPECTRUM_TOOLS").expect("scripts/test names the tools"));
    let socket = keep.path().join("vsock");
    let agent = Host::at(&socket);
    let mut vmm = agent::command(&socket).arg("--fs", "tag=host,uid=0,gid=0").api().spawn();
    let _link = agent.greeting();
    assert_eq!(agent.ask(guest_proto::Request::Wake(zygote::identity())).1, guest_proto::Reply::Done);
    let mut client = vmm.client();
    grant(&mut client, "shared", &shared, true);
    grant(&mut client, "suite", &programs::existing(tools.join("pjdfstest")), false);
    grant(&mut client, "expected", &programs::root().join("tests/tests/filesystem.toml"), false);
    let said = agent.shell("/host/suite -c /host/expected -p /host/shared 2>&1").unwrap();
    println!("{said}");
    let summary = said.lines().find(|line| line.starts_with("Summary")).expect("it ran to its end");
    assert!(summary.starts_with("Summary: 0 failed"), "{summary}");
    client.send(&Request::VmmShutdown).unwrap();
    vmm.wait().assert_success();
}

/// MiB that are written: few enough for every day, or as many as this variable says.
fn blocks() -> u32 {
    std::env::var("SPECTRUM_TEST_FILE_MIB").map_or(40, |text| text.parse().expect("a number of MiB"))
}

/// The number of blocks of which the guest has said that they are on the disk.
fn synced(vmm: &Vmm) -> u32 {
    let text = vmm.text();
    let last =
        text.lines().rev().find_map(|line| line.split_once("journal: synced ")?.1.strip_suffix('.')?.parse().ok());
    last.map_or(0, |number: u32| number + 1)
}

/// A guest writes a file and has each block synced, while it is paused, saved, cloned, and at last killed. Whenever one looks,
/// what it was told to be on the disk is there. Those that go on from a snapshot have the file no more, and do not touch it.
#[test]
fn nothing_that_was_synced_is_lost() {
    let (keep, shared) = host();
    let (file, blocks) = (shared.join("journal"), blocks());
    let job = format!("journal=host/shared/journal:{blocks}");
    let mut vmm = VmmCommand::probe(&["virtiofs"], &[&job]).arg("--fs", "tag=host").api().spawn();
    vmm.wait_for("files: mounted");
    let mut client = vmm.client();
    grant(&mut client, "shared", &shared, true);
    vmm.type_text("go\n");
    let snapshot = keep.path().join("snapshot");
    for part in 1..=4 {
        vmm.wait_for(&format!("journal: synced {}.", blocks * part / 8));
        client.send(&Request::VmPause).unwrap();
        let (told, whole) = (synced(&vmm), whole_blocks(&file).unwrap());
        assert!(told <= whole, "{told} blocks were synced, and {whole} are there");
        if part == 2 {
            let to = SnapshotConfig { destination_url: format!("file://{}", snapshot.display()) };
            client.send(&Request::VmSnapshot(to)).unwrap();
        }
        client.send(&Request::VmResume).unwrap();
    }
    // A clone of the one that writes, while it does.
    let (_zygote, mut clones) = zygote::start(&snapshot);
    let (serial, theirs) = UnixStream::pair().unwrap();
    let api = UnixListener::bind(keep.path().join("clone")).unwrap();
    let config = CloneConfig { fds: ["api", "serial"].map(String::from).into(), ..CloneConfig::default() };
    let info = clones.clone_vm(config, &[api.as_fd(), theirs.as_fd()]).unwrap();
    drop(theirs);
    let said = tests::Output::collect(serial).wait_for("probe: journal=", tests::TIMEOUT).unwrap();
    assert!(said.contains("FAILED: Stale file handle"), "{said}");
    // It powers off by itself.
    let _ = kill_process(Pid::from_raw(i32::try_from(info.pid).unwrap()).unwrap(), Signal::KILL);

    vmm.wait_for(&format!("journal: synced {}.", blocks * 5 / 8));
    vmm.signal(Signal::KILL);
    let _ = vmm.wait_here();
    let (told, whole) = (synced(&vmm), whole_blocks(&file).unwrap());
    assert!(told > blocks / 2 && told <= whole, "{told} blocks were synced, and {whole} are there");
    let length = fs::metadata(&file).unwrap().len();
    assert!(length <= u64::from(whole + 1) << 20, "{length} bytes, {whole} blocks");

    // Restored, it has lost the file, and is told so.
    let from = format!("source_url=file://{},resume=true", snapshot.display());
    let mut vmm = VmmCommand::new().api().arg("--restore", from).spawn();
    grant(&mut vmm.client(), "shared", &shared, true);
    let said = vmm.wait_for("probe: journal=");
    assert!(said.contains("FAILED: Stale file handle"), "{said}");
    vmm.wait().assert_success();
    assert_eq!((whole_blocks(&file).unwrap(), fs::metadata(&file).unwrap().len()), (whole, length));

    // Another guest reads what there is.
    let mut vmm =
        VmmCommand::probe(&["virtiofs"], &["read-journal=host/shared/journal"]).arg("--fs", "tag=host").api().spawn();
    vmm.wait_for("files: mounted");
    grant(&mut vmm.client(), "shared", &shared, false);
    vmm.type_text("go\n");
    assert_eq!(
        vmm.wait_for("probe: read-journal"),
        format!("probe: read-journal=host/shared/journal: {whole} whole blocks")
    );
    vmm.wait().assert_success();
    println!("{told} of {blocks} MiB were synced when it was killed, {whole} were there");
}

/// A file system of the host's, in a file.
struct Mounted(PathBuf);

impl Mounted {
    fn new(image: &Path, at: PathBuf) -> Self {
        fs::create_dir(&at).unwrap();
        run("mount", &["-o".as_ref(), "loop".as_ref(), image, &at]);
        Self(at)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

fn run(program: &str, arguments: &[&Path]) {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Pulls the plug on the host's disk: a copy of what has reached it has all that the guest was told to be there.
#[test]
fn what_was_synced_is_on_the_disk_of_the_host() {
    const BLOCKS: u32 = 12;
    let keep = tempfile::tempdir().unwrap();
    let (disk, pulled) = (keep.path().join("disk"), keep.path().join("pulled"));
    File::create(&disk).and_then(|file| file.set_len(128 << 20)).unwrap();
    run("mkfs.ext4", &["-q".as_ref(), &disk]);
    for module in ["loop", "ext4"] {
        run("modprobe", &[module.as_ref()]);
    }
    let mounted = Mounted::new(&disk, keep.path().join("shared"));
    let job = format!("journal=host/shared/journal:{BLOCKS}");
    let mut vmm = VmmCommand::probe(&["virtiofs"], &[&job]).arg("--fs", "tag=host").api().spawn();
    vmm.wait_for("files: mounted");
    grant(&mut vmm.client(), "shared", &mounted.0, true);
    vmm.type_text("go\n");
    vmm.wait_for(&format!("journal: synced {}.", BLOCKS - 1));
    fs::copy(&disk, &pulled).unwrap();
    let after = Mounted::new(&pulled, keep.path().join("after"));
    assert_eq!(whole_blocks(&after.0.join("journal")).unwrap(), BLOCKS);
    vmm.wait().assert_success();
}

/// A guest that would open a file 100,000 times is refused at the bound, and nobody else notices.
#[test]
fn a_guest_that_opens_too_much_is_told_so() {
    let (keep, shared) = host();
    fs::write(shared.join("file"), "content").unwrap();
    let mut vmm =
        VmmCommand::probe(&["virtiofs"], &["hoard=host/shared/file", "echo"]).arg("--fs", "tag=host").api().spawn();
    vmm.wait_for("files: mounted");
    let mut client = vmm.client();
    grant(&mut client, "shared", &shared, true);
    vmm.type_text("go\n");
    let said = vmm.wait_for("probe: hoard=");
    println!("{said}");
    assert!(said.contains("8192 open, then {\"Too many open files (os error 24)\": 1000}"), "{said}");
    client.ping().unwrap();
    vmm.wait_for("probe: echo: type");
    vmm.type_text("still there\n");
    vmm.wait_for("probe: echo: still there");
    vmm.wait().assert_success();
    drop(keep);
}

/// With few descriptors there are few files for the guest to know; when it forgets some, it can know others.
#[test]
fn a_guest_that_knows_too_many_files_is_told_so() {
    let (_keep, shared) = host();
    fs::create_dir(shared.join("many")).unwrap();
    (0..3000).for_each(|i| File::create(shared.join(format!("many/{i}"))).map(drop).unwrap());
    let mut limited = Command::new("prlimit");
    limited.arg("--nofile=20000").arg(programs::program("spectrum-vmm"));
    let mut vmm = shell::command().spawn_as(limited);
    shell::wait(&mut vmm);
    let mut client = vmm.client();
    grant(&mut client, "shared", &shared, true);
    // An eighth of them, and five eighths of that: the rest is for what is open.
    let known = 20000 / 64 * 5;
    let look = "ls -l /host/shared/many >/tmp/list 2>/tmp/errors; grep -c 'open files in system' /tmp/errors; wc -l </tmp/list";
    let said = ask(&mut vmm, look);
    let (refused, listed) = said.split_once(' ').expect("two numbers");
    let (refused, listed): (usize, usize) = (refused.parse().unwrap(), listed.parse().unwrap());
    assert!(refused >= 3000 - known && listed <= known, "{said}");
    let again = "rm /tmp/list; echo 2 >/proc/sys/vm/drop_caches; stat -c %s /host/shared/many/2999 /host/shared/many/0";
    assert_eq!(ask(&mut vmm, again), "0 0");
    client.send(&Request::VmmShutdown).unwrap();
    vmm.wait().assert_success();
}

/// Granted by somebody who did not think, or made by a program on the host in league with the guest: what leads elsewhere or is
/// no file.
#[test]
fn what_is_no_file_leads_nowhere() {
    let (keep, shared) = host();
    fs::write(keep.path().join("secret"), "secret\n").unwrap();
    for (name, kind, device) in [
        ("zero", FileType::CharacterDevice, rustix::fs::makedev(1, 5)),
        ("memory", FileType::CharacterDevice, rustix::fs::makedev(1, 1)),
        ("loop", FileType::BlockDevice, rustix::fs::makedev(7, 0)),
        ("socket", FileType::Socket, 0),
    ] {
        mknodat(CWD, shared.join(name), kind, Mode::from_raw_mode(0o666), device).unwrap();
    }
    let mut vmm = shell::command().spawn();
    shell::wait(&mut vmm);
    let mut client = vmm.client();
    grant(&mut client, "shared", &shared, true);
    // The VMM's own process, which can reach everything that it can.
    let own = open(format!("/proc/{}", vmm.pid()), OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();
    add_fd(&mut client, "own", &own);
    let outside = keep.path().join("secret");
    for (attempt, answer) in [
        ("cat /host/shared/zero", "Permission denied"),
        ("cat /host/shared/memory", "Permission denied"),
        ("cat /host/shared/loop", "Permission denied"),
        ("cat /host/shared/socket", "Permission denied"),
        ("echo >/host/shared/zero", "Permission denied"),
        ("mknod /host/shared/b b 7 0", "Operation not permitted"),
        // Links of /proc are text here, which leads to the guest's own files.
        (&format!("cat /host/own/root{}", outside.display()), "No such file"),
        (&format!("cat /host/own/cwd/../../../../{}", outside.display()), "No such file"),
        ("ls /host/own/root/init", "init"),
        ("cat /host/own/fd/0", "No such file"),
        ("echo x >/host/own/oom_score_adj", "Read-only file system"),
        ("echo x >/host/own/mem", "Read-only file system"),
        ("touch /host/shared/$(head -c 256 /dev/zero | tr '\\0' x)", "File name too long"),
        ("ln -s $(head -c 5000 /dev/zero | tr '\\0' x) /host/shared/long", "File name too long"),
        ("cd /host/shared; i=0; while [ $i -lt 100 ]; do mkdir d || break; cd d; i=$((i+1)); done; pwd | wc -c", "213"),
    ] {
        let said = ask(&mut vmm, attempt);
        assert!(said.contains(answer), "{attempt}: {said}");
    }
    assert_eq!(fs::read_to_string(&outside).unwrap(), "secret\n");
    client.send(&Request::VmmShutdown).unwrap();
    vmm.wait().assert_success();
}

fn add_fd(client: &mut Client, name: &str, fd: &OwnedFd) {
    let grant = GrantConfig { id: "_fs0".into(), name: name.into(), path: None, writable: false };
    client.send_with_fds(&Request::VmAddGrant(grant), &[fd.as_fd()]).unwrap();
}

/// Files without a name, extended attributes, holes, and copies that the host makes.
#[test]
fn what_programs_expect_of_a_file_system_is_there() {
    let (keep, shared) = host();
    let socket = keep.path().join("vsock");
    let agent = Host::at(&socket);
    let mut vmm = agent::command(&socket).arg("--fs", "tag=host").api().spawn();
    let _link = agent.greeting();
    assert_eq!(agent.ask(guest_proto::Request::Wake(zygote::identity())).1, guest_proto::Reply::Done);
    grant(&mut vmm.client(), "shared", &shared, true);
    let script = "cd /host/shared && truncate -s 16M sparse && printf x | dd of=sparse seek=8M oflag=seek_bytes conv=notrunc \
                  2>/dev/null && cp --sparse=auto sparse copy && stat -c '%s %b' copy && fallocate -l 1M full && stat -c %s full && \
                  fallocate -p -l 64K full && (fallocate -l 100G huge 2>&1 || true) && sync -f . && df -P . | wc -l";
    let said = agent.shell(script).unwrap();
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!(lines.len(), 4, "{said}");
    let blocks: u64 = lines[0].split_once("16777216 ").expect("a size").1.parse().unwrap();
    assert!(blocks < 1024, "the copy has no holes: {said}");
    assert_eq!((lines[1], lines[3]), ("1048576", "2"));
    assert!(lines[2].contains("File too large"), "{said}");
    assert_eq!(journal::BLOCK as u64, fs::metadata(shared.join("full")).unwrap().len());
    vmm.client().send(&Request::VmmShutdown).unwrap();
    vmm.wait().assert_success();
}
