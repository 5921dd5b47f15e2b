//! Files and directories of the host that are granted to a guest, used by Debian's virtiofs driver.

use std::fs::{self, File};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::symlink;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{CWD, FileType, Mode, OFlags, RenameFlags, mknodat, open, renameat_with};
use rustix::process::{Pid, Signal, kill_process};
use tests::agent::{self, Host};
use tests::shell::{self, ask, ask_on};
use tests::{VmmCommand, zygote};
use vmm_api::{Client, Request};
use vmm_config::{CloneConfig, GrantConfig, GrantName, SnapshotConfig};

fn grant(name: &str, path: Option<&Path>, writable: bool) -> Request {
    let path = path.map(Path::to_owned);
    Request::VmAddGrant(GrantConfig { id: "_fs0".into(), name: name.into(), path, writable })
}

fn revoke(name: &str) -> Request {
    Request::VmRemoveGrant(GrantName { id: "_fs0".into(), name: name.into() })
}

fn reference(path: &Path) -> OwnedFd {
    open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap()
}

fn add_fd(client: &mut Client, name: &str, fd: BorrowedFd<'_>, writable: bool) {
    client.send_with_fds(&grant(name, None, writable), &[fd]).unwrap();
}

/// A directory with `secret`, `report` and the directory `shared`.
fn host() -> (tempfile::TempDir, PathBuf) {
    let keep = tempfile::tempdir().unwrap();
    let path = keep.path().to_owned();
    fs::write(path.join("secret"), "secret\n").unwrap();
    fs::write(path.join("report"), "a report\n").unwrap();
    fs::create_dir(path.join("shared")).unwrap();
    (keep, path)
}

/// Descriptors of a process that refer to something below `path`.
fn descriptors(pid: u32, path: &Path) -> usize {
    let links = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
    links.filter(|link| fs::read_link(link.path()).is_ok_and(|to| to.starts_with(path))).count()
}

#[test]
fn a_guest_uses_what_it_was_granted_while_it_was() {
    let (_keep, path) = host();
    let mut vmm = shell::command().spawn();
    shell::wait(&mut vmm);
    let mut client = vmm.client();
    assert_eq!(ask(&mut vmm, "ls -a /host"), ". ..");
    assert_eq!(ask(&mut vmm, "cat /host/report"), "cat: can't open '/host/report': No such file or directory");
    client.send(&grant("report", Some(&path.join("report")), false)).unwrap();
    add_fd(&mut client, "shared", reference(&path.join("shared")).as_fd(), true);
    assert_eq!(ask(&mut vmm, "ls /host; cat /host/report"), "report shared a report");
    assert_eq!(ask(&mut vmm, "stat -c %u:%g:%a /host/shared"), "1000:1000:755");

    // What is written is the host's, and what the host writes is seen.
    let write =
        "dd if=/dev/urandom of=/host/shared/data bs=64k count=64 conv=fsync 2>/dev/null; md5sum </host/shared/data";
    let sum = ask(&mut vmm, write);
    let data = fs::read(path.join("shared/data")).unwrap();
    assert_eq!(data.len(), 4 << 20);
    fs::write(path.join("shared/copy"), &data).unwrap();
    assert_eq!(ask(&mut vmm, "echo 3 >/proc/sys/vm/drop_caches; md5sum </host/shared/copy"), sum);
    assert_eq!(ask(&mut vmm, "cd /host/shared; mkdir d; mv data d/moved; ln d/moved d/again; ls d"), "again moved");
    assert_eq!(ask(&mut vmm, "rm -r d; cp /bin/busybox .; ./busybox echo it runs"), "it runs");
    let many = "mkdir m; i=0; while [ $i -lt 500 ]; do echo $i >m/$i; i=$((i+1)); done; cat m/* | sort -n | tail -n 1; ls m | wc -l";
    assert_eq!(ask(&mut vmm, many), "499 500");
    assert_eq!(ask(&mut vmm, "echo one >log; echo two >>log; cat log; truncate -s 2 log; cat log; cd /"), "one two on");
    assert_eq!(fs::read(path.join("shared/log")).unwrap(), b"on");
    fs::write(path.join("report"), "another\n").unwrap();
    assert_eq!(ask(&mut vmm, "until grep another /host/report; do :; done"), "another");

    // A grant for reading is that, and the root is nobody's.
    for refused in
        ["echo x >>/host/report", "rm /host/report", "chmod 777 /host/report", "mkdir /host/x", "rmdir /host/shared"]
    {
        let said = ask(&mut vmm, refused);
        assert!(said.contains("Read-only file system"), "{refused}: {said}");
    }

    // It goes on after a reboot of the guest.
    vmm.type_text("reboot -f\n");
    shell::wait(&mut vmm);
    assert_eq!(ask(&mut vmm, "ls /host; cat /host/shared/log"), "report shared on");

    // Until it is taken back: by its name, and what is open.
    assert_eq!(ask(&mut vmm, "exec 3</host/shared/copy; dd bs=1 count=1 <&3 2>/dev/null | wc -c"), "1");
    let shared = path.join("shared");
    assert!(descriptors(vmm.pid(), &shared) > 0);
    client.send(&revoke("shared")).unwrap();
    let said = ask(&mut vmm, "cat /host/shared/copy; ls /host");
    assert_eq!(said, "cat: can't open '/host/shared/copy': No such file or directory report");
    // The guest may have some of it in its own memory, but asks within a second.
    let said = ask(&mut vmm, "while dd bs=1 count=1 <&3 >/dev/null 2>/tmp/e; do :; done; cat /tmp/e");
    assert!(said.contains("Stale file handle"), "{said}");
    let deadline = Instant::now() + Duration::from_secs(60);
    while descriptors(vmm.pid(), &shared) > 0 && Instant::now() < deadline {
        thread::yield_now();
    }
    assert_eq!(descriptors(vmm.pid(), &shared), 0);
    assert_eq!(ask(&mut vmm, "cat /host/report"), "another");
    client.send(&Request::VmmShutdown).unwrap();
    vmm.wait().assert_success();
}

/// Ends the other thread, also when this one fails.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// What a guest in league with a program on the host could try.
#[test]
fn a_guest_does_not_get_out_of_what_it_was_granted() {
    let (_keep, path) = host();
    let shared = path.join("shared");
    let secret = path.join("secret");
    symlink("../secret", shared.join("up")).unwrap();
    symlink(&secret, shared.join("there")).unwrap();
    symlink("/proc/self/root/etc/hostname", shared.join("magic")).unwrap();
    mknodat(CWD, shared.join("pipe"), FileType::Fifo, Mode::from_raw_mode(0o666), 0).unwrap();
    let mut vmm = shell::command().spawn();
    shell::wait(&mut vmm);
    let mut client = vmm.client();
    add_fd(&mut client, "shared", reference(&shared).as_fd(), true);
    add_fd(&mut client, "report", reference(&path.join("report")).as_fd(), true);
    fs::create_dir(path.join("second")).unwrap();
    add_fd(&mut client, "second", reference(&path.join("second")).as_fd(), true);
    for (attempt, answer) in [
        ("cat /host/shared/up", "No such file"),
        ("cat /host/shared/there", "No such file"),
        ("cat /host/shared/magic", "No such file"),
        ("cat /host/shared/../secret", "No such file"),
        ("cat /host/shared/pipe", "Permission denied"),
        ("cat /host/report/../secret", "Not a directory"),
        ("mknod /host/shared/dev c 1 3", "Operation not permitted"),
        ("mkfifo /host/shared/fifo", "Operation not permitted"),
        ("ln /host/report /host/shared/r", "Invalid cross-device link"),
        ("rm /host/report", "Read-only file system"),
        ("ln -s /x /host/x", "Read-only file system"),
        ("chown 0 /host/shared", "Operation not permitted"),
    ] {
        let said = ask(&mut vmm, attempt);
        assert!(said.contains(answer), "{attempt}: {said}");
    }
    // From one grant to the other it copies, as between file systems.
    assert_eq!(ask(&mut vmm, "echo x >/host/shared/x; mv /host/shared/x /host/second/; ls /host/second"), "x");
    assert_eq!(
        ask(&mut vmm, "cp /bin/busybox /host/shared/su; chmod 6755 /host/shared/su; stat -c %a /host/shared/su"),
        "755"
    );

    // A directory and a link to outside change places all the time.
    fs::create_dir(shared.join("swap")).unwrap();
    fs::write(shared.join("swap/secret"), "inside\n").unwrap();
    symlink(&path, shared.join("link")).unwrap();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let dir = reference(&shared);
            while !done.load(Ordering::Relaxed) {
                renameat_with(&dir, "swap", &dir, "link", RenameFlags::EXCHANGE).unwrap();
                thread::yield_now();
            }
        });
        let _ends = Ends(&done);
        let race = "i=0; while [ $i -lt 300 ]; do cat /host/shared/swap/secret 2>/dev/null; i=$((i+1)); done | sort -u";
        assert_eq!(ask(&mut vmm, race), "inside");
    });
    assert_eq!(fs::read_to_string(&secret).unwrap(), "secret\n");
    client.send(&Request::VmmShutdown).unwrap();
    vmm.wait().assert_success();
}

/// A template is saved with its file system mounted. What goes on from it has the grants that it is given, and no others.
#[test]
fn a_mounted_file_system_goes_on_in_a_clone() {
    let (keep, path) = host();
    let mut vmm = shell::command().spawn();
    shell::wait(&mut vmm);
    let mut client = vmm.client();
    let saved = |client: &mut Client, name: &str| {
        let directory = keep.path().join(name);
        client.send(&Request::VmPause).unwrap();
        let to = SnapshotConfig { destination_url: format!("file://{}", directory.display()) };
        client.send(&Request::VmSnapshot(to)).unwrap();
        client.send(&Request::VmResume).unwrap();
        directory
    };
    assert_eq!(ask(&mut vmm, "ls /host"), "");
    let empty = saved(&mut client, "empty");
    add_fd(&mut client, "shared", reference(&path.join("shared")).as_fd(), true);
    let used = "echo kept >/host/shared/file; exec 3</host/shared/file; cd /host/shared; cat file";
    assert_eq!(ask(&mut vmm, used), "kept");
    let granted = saved(&mut client, "granted");
    assert_eq!(ask(&mut vmm, "cat file"), "kept", "a snapshot takes nothing from the machine itself");
    client.send(&Request::VmmShutdown).unwrap();
    vmm.wait().assert_success();

    // Saved with grants: they are gone, and do not come back under the numbers the guest knows.
    let from = format!("source_url=file://{},resume=true", granted.display());
    let mut vmm = VmmCommand::new().api().arg("--restore", from).spawn();
    let mut client = vmm.client();
    assert_eq!(ask(&mut vmm, "ls /host; echo"), "");
    add_fd(&mut client, "shared", reference(&path.join("shared")).as_fd(), false);
    let said = ask(&mut vmm, "while dd bs=1 count=1 <&3 >/dev/null 2>/tmp/e; do :; done; cat /tmp/e");
    assert!(said.contains("Stale file handle"), "{said}");
    assert_eq!(ask(&mut vmm, "cd /; cat /host/shared/file"), "kept");
    client.send(&Request::VmmShutdown).unwrap();
    vmm.wait().assert_success();

    // A clone of the one without grants.
    let (_zygote, mut client) = zygote::start(&empty);
    let mut clones = Vec::new();
    for number in 0..2 {
        let (serial, theirs) = UnixStream::pair().unwrap();
        let socket = keep.path().join(format!("api{number}"));
        let api = UnixListener::bind(&socket).unwrap();
        let config = CloneConfig { fds: ["api", "serial"].map(String::from).into(), ..CloneConfig::default() };
        let info = client.clone_vm(config, &[api.as_fd(), theirs.as_fd()]).unwrap();
        clones.push((Pid::from_raw(i32::try_from(info.pid).unwrap()).unwrap(), serial, socket));
    }
    let (_, one, api) = &clones[0];
    add_fd(&mut Client::connect(api).unwrap(), "mine", reference(&path.join("shared")).as_fd(), true);
    assert_eq!(ask_on(one, "ls /host; cat /host/mine/file; echo clone >/host/mine/file"), "mine kept");
    assert_eq!(fs::read_to_string(path.join("shared/file")).unwrap(), "clone\n");
    assert_eq!(ask_on(&clones[1].1, "ls /host; echo none"), "none", "it is the other clone's");
    for (pid, ..) in clones {
        kill_process(pid, Signal::KILL).unwrap();
    }
}

/// The first process of a template's VM mounts what there is.
#[test]
fn an_application_vm_has_its_grants_at_host() {
    let (keep, path) = host();
    let socket = keep.path().join("vsock");
    let agent = Host::at(&socket);
    let mut vmm = agent::command(&socket).arg("--fs", "tag=host").api().spawn();
    let _link = agent.greeting();
    assert_eq!(agent.ask(guest_proto::Request::Wake(zygote::identity())).1, guest_proto::Reply::Done);
    add_fd(&mut vmm.client(), "shared", reference(&path.join("shared")).as_fd(), true);
    let script = "su user -s /bin/sh -c 'echo of the user >/host/shared/file'; stat -c %U /host/shared/file; \
                  grep -o 'virtiofs [a-z,]*nosuid,nodev' /proc/mounts";
    let said = agent.shell(script).unwrap();
    assert_eq!(fs::read_to_string(path.join("shared/file")).unwrap_or_default(), "of the user\n", "{said}");
    assert!(said.starts_with("user\n") && said.contains("nosuid,nodev"), "{said}");
    vmm.client().send(&Request::VmmShutdown).unwrap();
    vmm.wait().assert_success();
}

#[test]
fn requests_for_grants_that_make_no_sense_are_refused() {
    let (_keep, path) = host();
    let mut vmm = VmmCommand::tiny().arg("--fs", "tag=host,id=files").api().spawn();
    vmm.wait_for("tick 00000001");
    let mut client = vmm.client();
    let to = |id: &str, path: Option<PathBuf>| {
        Request::VmAddGrant(GrantConfig { id: id.into(), name: "a".into(), path, writable: true })
    };
    let (file, report) = (File::open(path.join("report")).unwrap(), Some(path.join("report")));
    let mut refusal =
        |request: &Request, fds: &[BorrowedFd<'_>]| client.send_with_fds(request, fds).unwrap_err().to_string();
    let said = refusal(&to("_fs0", report.clone()), &[]);
    assert!(said.contains("no device for grants called _fs0, but files"), "{said}");
    for (request, fds) in [
        (to("files", None), vec![]),
        (to("files", report.clone()), vec![file.as_fd()]),
        (to("files", None), vec![file.as_fd(), file.as_fd()]),
    ] {
        let said = refusal(&request, &fds);
        assert!(said.contains("either a path, or one descriptor"), "{said}");
    }
    let said = refusal(&to("files", Some(path.join("nothing"))), &[]);
    assert!(said.contains("cannot find") && said.contains("nothing"), "{said}");
    let said = refusal(&to("files", Some("/dev/null".into())), &[]);
    assert!(said.contains("neither a regular file nor a directory"), "{said}");
    let name = GrantName { id: "files".into(), name: "a".into() };
    let said = refusal(&Request::VmRemoveGrant(name.clone()), &[]);
    assert!(said.contains("no grant called a"), "{said}");
    client.send(&to("files", report)).unwrap();
    client.send(&Request::VmRemoveGrant(name)).unwrap();
    client.send(&Request::VmmShutdown).unwrap();
    vmm.wait().assert_success();

    let ended = VmmCommand::tiny().arg("--fs", "tag=host,socket=/run/virtiofsd.sock").run();
    assert!(
        ended.stderr.contains("fs[0].socket") && ended.stderr.contains("memory that it shares"),
        "{}",
        ended.stderr
    );
}

/// With Landlock the VMM opens nothing that is not in its rules, also beneath a directory that it was handed.
#[test]
fn landlock_holds_for_grants_too() {
    let (_keep, path) = host();
    let allowed = path.join("allowed");
    fs::create_dir(&allowed).unwrap();
    let rule = format!("path={},access=rw", allowed.display());
    let command = VmmCommand::tiny().arg("--fs", "tag=host").arg("--landlock-rules", rule).args(&["--landlock"]);
    let mut vmm = command.api().spawn();
    vmm.wait_for("tick 00000001");
    let mut client = vmm.client();
    let shared = reference(&path.join("shared"));
    let said = client.send_with_fds(&grant("a", None, false), &[shared.as_fd()]).unwrap_err().to_string();
    assert!(said.contains("cannot be opened for reading") && said.contains("landlock_rules"), "{said}");
    let report = reference(&path.join("report"));
    assert!(client.send_with_fds(&grant("a", None, false), &[report.as_fd()]).is_err());
    // One that is open needs no opening.
    let file = File::options().read(true).write(true).open(path.join("report")).unwrap();
    add_fd(&mut client, "open", file.as_fd(), true);
    add_fd(&mut client, "allowed", reference(&allowed).as_fd(), true);
    client.send(&Request::VmmShutdown).unwrap();
    vmm.wait().assert_success();
}
