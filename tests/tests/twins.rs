//! Clones of one VM are as different from each other as VMs that booted on their own.
//!
//! Two things see to that, the VM generation ID and Wake. In the first test both are there. In the second neither is at
//! first: the guest's kernel is kept from looking at the ID, and a program runs that did not wait to be woken. There the
//! comparison of the first test finds that everything is the same, so that it can fail; and it finds nothing once the
//! same clones were woken, so that Wake suffices by itself. That the ID does, when it was served, is in `identity.rs`.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use guest_proto::{BootId, Identity, MachineId, Reply, Request, Seed};
use rustix::process::{Pid, Signal};
use tempfile::TempDir;
use tests::agent::{self, AgentLink, Host};
use tests::{Vmm, zygote};
use vmm_api::Client;
use vmm_config::{CloneConfig, SnapshotConfig};

/// A line of output each.
const KINDS: [&str; 4] = ["uuid", "boot_id", "machine-id", "first 32 random bytes"];
const LOOK: &str = "cd /proc/sys/kernel/random; cat uuid boot_id /etc/machine-id; \
                    head -c 32 /dev/urandom | od -An -tx1 -w32";

/// What one clone saw.
type Seen = [String; KINDS.len()];

fn seen(text: &str) -> Seen {
    let lines: Vec<String> = text.lines().map(|line| line.trim().to_owned()).collect();
    let lengths: Vec<usize> = lines.iter().map(String::len).collect();
    assert_eq!(lengths, [36, 36, 32, 32 * 3 - 1], "{text}");
    lines.try_into().unwrap()
}

/// In what at least two of them are the same.
fn shared(all: &[Seen]) -> BTreeSet<&'static str> {
    let different = |kind: usize| all.iter().map(|seen| seen[kind].as_str()).collect::<BTreeSet<_>>().len();
    KINDS.into_iter().enumerate().filter(|(kind, _)| different(*kind) < all.len()).map(|(_, name)| name).collect()
}

fn identity() -> Identity {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    Identity {
        seed: Seed::new(zygote::random()),
        realtime: u64::try_from(now.as_nanos()).unwrap(),
        machine_id: MachineId::from_random(zygote::random()),
        boot_id: BootId::from_random(zygote::random()),
        hostname: None,
    }
}

/// Boots a VM with more words on the kernel's command line, wakes it, has it run `script` until it says on the serial port
/// that it waits, and saves it into `directory` while its agent's announcement is open.
fn template(directory: &Path, words: &str, script: &str) {
    let keep = tempfile::tempdir().unwrap();
    let socket = keep.path().join("vsock");
    let host = Host::at(&socket);
    let line = format!("console=ttyS0 quiet panic=-1 spectrum.root=/dev/pmem0 {words}");
    let mut vmm = agent::command(&socket).arg("--cmdline", line).api().spawn();
    let _link = host.greeting();
    assert_eq!(host.ask(Request::Wake(identity())).1, Reply::Done);
    assert_eq!(host.shell(script).unwrap(), "");
    vmm.wait_for("waits");
    let mut client = vmm.client();
    client.send(&vmm_api::Request::VmPause).unwrap();
    let to = SnapshotConfig { destination_url: format!("file://{}", directory.display()) };
    client.send(&vmm_api::Request::VmSnapshot(to)).unwrap();
    vmm.signal(Signal::KILL);
    let _ = vmm.wait();
}

/// A clone, the files it was given and its serial port.
struct Clone {
    pid: Pid,
    host: Host,
    serial: BufReader<UnixStream>,
    directory: TempDir,
}

impl Clone {
    fn new(client: &mut Client) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("vsock");
        let host = Host::at(&socket);
        let listener = OwnedFd::from(UnixListener::bind(&socket).unwrap());
        let (ours, theirs) = UnixStream::pair().unwrap();
        let fds = ["serial", "_vsock0"].map(String::from).into();
        let config = CloneConfig { fds, vsock_socket: Some(socket), ..CloneConfig::default() };
        let info = client.clone_vm(config, &[theirs.as_fd(), listener.as_fd()]).unwrap();
        let pid = Pid::from_raw(i32::try_from(info.pid).unwrap()).unwrap();
        Self { pid, host, serial: BufReader::new(ours), directory }
    }

    /// What the first program sees that its agent runs once it is woken, and the agent's announcement.
    fn woken(&self) -> (Seen, AgentLink) {
        let link = self.host.greeting();
        let identity = identity();
        let (machine_id, boot_id) = (identity.machine_id, identity.boot_id);
        assert_eq!(self.host.ask(Request::Wake(identity)).1, Reply::Done);
        let seen = seen(&self.host.shell(LOOK).unwrap());
        assert_eq!(seen[1..3], [boot_id.to_string(), machine_id.to_string()]);
        (seen, link)
    }

    /// Kills it. Nobody serves its socket any more, and there are no files but those it was given.
    fn end(self) {
        zygote::end(self.pid);
        let path = |name: &str| self.directory.path().join(name);
        let refused = UnixStream::connect(path("vsock")).unwrap_err().kind();
        assert_eq!(refused, std::io::ErrorKind::ConnectionRefused);
        let files: BTreeSet<PathBuf> = self.directory.path().read_dir().unwrap().map(|f| f.unwrap().path()).collect();
        assert_eq!(files, ["vsock", "vsock_5001"].map(path).into());
    }
}

fn assert_all_gone(zygote: &Vmm) {
    assert_eq!(zygote::children(zygote), "", "processes are left");
}

#[test]
fn a_hundred_clones_have_nothing_in_common() {
    let keep = tempfile::tempdir().unwrap();
    let directory = keep.path().join("snapshot");
    template(&directory, "", "echo waits > /dev/ttyS0");
    let (zygote, mut client) = zygote::start(&directory);
    let mut all = Vec::new();
    for _ in 0..100 {
        let clone = Clone::new(&mut client);
        all.push(clone.woken().0);
        clone.end();
    }
    assert_eq!(shared(&all), BTreeSet::new(), "{all:#?}");
    assert_all_gone(&zygote);
}

/// In the template runs a program that looks when a line is typed on the serial port, however the VM got there.
#[test]
fn clones_that_nobody_makes_different_are_the_same() {
    let keep = tempfile::tempdir().unwrap();
    let directory = keep.path().join("snapshot");
    // The driver's name is misspelt in the kernels that have it as a platform driver.
    let no_generation_id = "initcall_blacklist=vmgenid_plaform_driver_init,vmgenid_platform_driver_init";
    let looks = format!("exec < /dev/ttyS0 > /dev/ttyS0; stty raw -echo; echo waits; read line; {LOOK}");
    template(&directory, no_generation_id, &format!("setsid sh -c '{looks}' > /dev/null 2>&1 < /dev/null &"));
    let (zygote, mut client) = zygote::start(&directory);
    let (mut asleep, mut woken) = (Vec::new(), Vec::new());
    for _ in 0..3 {
        let mut clone = Clone::new(&mut client);
        clone.serial.get_mut().write_all(b"look\n").unwrap();
        let lines = clone.serial.by_ref().lines().map(Result::unwrap);
        asleep.push(seen(&lines.take(KINDS.len()).collect::<Vec<_>>().join("\n")));
        woken.push(clone.woken().0);
        clone.end();
    }
    assert_eq!(shared(&asleep), KINDS.into(), "{asleep:#?}");
    assert_eq!(shared(&woken), BTreeSet::new(), "{woken:#?}");
    assert_all_gone(&zygote);
}
