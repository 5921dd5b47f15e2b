//! Clones of one VM are as different from each other as VMs that booted on their own.
//!
//! Two things see to that, the VM generation ID and Wake. In the first test both are there. In the second neither is at
//! first: the guest's kernel is kept from looking at the ID, and a program runs that did not wait to be woken. There the
//! comparison of the first test finds that everything is the same, so that it can fail; and it finds nothing once the
//! same clones were woken, so that Wake suffices by itself. That the ID does, when it was served, is in `identity.rs`.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use guest_proto::{Reply, Request};
use rustix::process::Signal;
use tests::Vmm;
use tests::agent::{self, AgentLink, Host};
use tests::zygote::{self, Clone};
use vmm_config::SnapshotConfig;

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

/// Boots a VM with more words on the kernel's command line, wakes it and has it run `script`. When that says on the serial
/// port that it is ready, a line is typed there; when it says that it waits, the VM is saved into `directory` while its agent's announcement is open.
fn template(directory: &Path, words: &str, script: &str) {
    let keep = tempfile::tempdir().unwrap();
    let socket = keep.path().join("vsock");
    let host = Host::at(&socket);
    let line = format!("console=ttyS0 quiet panic=-1 spectrum.root=/dev/pmem0 {words}");
    let mut vmm = agent::command(&socket).arg("--cmdline", line).api().spawn();
    let _link = host.greeting();
    assert_eq!(host.ask(Request::Wake(zygote::identity())).1, Reply::Done);
    assert_eq!(host.shell(script).unwrap(), "");
    vmm.wait_for("ready");
    vmm.type_text("go\n");
    vmm.wait_for("waits");
    let mut client = vmm.client();
    client.send(&vmm_api::Request::VmPause).unwrap();
    let to = SnapshotConfig { destination_url: format!("file://{}", directory.display()) };
    client.send(&vmm_api::Request::VmSnapshot(to)).unwrap();
    vmm.signal(Signal::KILL);
    let _ = vmm.wait();
}

/// What the first program sees that its agent runs once it is woken, and the agent's announcement.
fn woken(clone: &Clone) -> (Seen, AgentLink) {
    let link = clone.host.greeting();
    let identity = zygote::identity();
    let (machine_id, boot_id) = (identity.machine_id, identity.boot_id);
    assert_eq!(clone.host.ask(Request::Wake(identity)).1, Reply::Done);
    let seen = seen(&clone.host.shell(LOOK).unwrap());
    assert_eq!(seen[1..3], [boot_id.to_string(), machine_id.to_string()]);
    (seen, link)
}

/// Kills it. Nobody serves its socket any more, and there are no files but those it was given.
fn end(clone: &Clone) {
    zygote::end(clone.pid);
    let path = |name: &str| clone.directory.path().join(name);
    let refused = UnixStream::connect(path("vsock")).unwrap_err().kind();
    assert_eq!(refused, std::io::ErrorKind::ConnectionRefused);
    let files: BTreeSet<PathBuf> = clone.directory.path().read_dir().unwrap().map(|f| f.unwrap().path()).collect();
    assert_eq!(files, ["vsock", "vsock_5001"].map(path).into());
}

fn assert_all_gone(zygote: &Vmm) {
    assert_eq!(zygote::children(zygote, 0), []);
}

#[test]
fn a_hundred_clones_have_nothing_in_common() {
    let keep = tempfile::tempdir().unwrap();
    let directory = keep.path().join("snapshot");
    template(&directory, "", "{ echo ready; read line; echo waits; } < /dev/ttyS0 > /dev/ttyS0 2> /dev/null &");
    let (zygote, mut client) = zygote::start(&directory);
    let mut all = Vec::new();
    for _ in 0..100 {
        let clone = Clone::new(&mut client);
        all.push(woken(&clone).0);
        end(&clone);
    }
    assert_eq!(shared(&all), BTreeSet::new(), "{all:#?}");
    assert_all_gone(&zygote);
}

/// A program that looks as soon as the VM goes on from the snapshot, which it sees by the interrupt that tells of a new
/// generation ID: on its way there it calls nothing that draws random numbers. The kernel's workers would seed those anew
/// after a few seconds. They have the processor when this program leaves it to them, and that it does when it has looked.
const LOOKS_FIRST: &str = r#"
    echo -1 > /proc/sys/kernel/sched_rt_runtime_us
    mount -t debugfs debugfs /mnt
    for server in /mnt/sched/fair_server/cpu*; do echo 0 > $server/runtime; done
    { LOOK; } > /dev/null
    events() { while read -r line; do case $line in *ACPI:Ged*) seen=$line ;; esac; done < /proc/interrupts; }
    exec < /dev/ttyS0 > /dev/ttyS0
    stty raw -echo
    echo ready
    read line
    events
    before=${seen:?no event device}
    echo waits
    while events; [ "$seen" = "$before" ]; do :; done
    LOOK
"#;

/// What the first test relies on: that it would find out.
#[test]
fn clones_that_nobody_makes_different_are_the_same() {
    let keep = tempfile::tempdir().unwrap();
    let directory = keep.path().join("snapshot");
    // The driver's name is misspelt in the kernels that have it as a platform driver.
    let no_generation_id = "initcall_blacklist=vmgenid_plaform_driver_init,vmgenid_platform_driver_init";
    let looks = LOOKS_FIRST.replace("LOOK", LOOK);
    template(&directory, no_generation_id, &format!("setsid chrt -f 1 sh -c '{looks}' > /dev/null 2>&1 < /dev/null &"));
    let (zygote, mut client) = zygote::start(&directory);
    let (mut asleep, mut awake) = (Vec::new(), Vec::new());
    for _ in 0..3 {
        let clone = Clone::new(&mut client);
        let lines = BufReader::new(&clone.serial).lines().map(Result::unwrap);
        asleep.push(seen(&lines.take(KINDS.len()).collect::<Vec<_>>().join("\n")));
        awake.push(woken(&clone).0);
        end(&clone);
    }
    assert_eq!(shared(&asleep), KINDS.into(), "{asleep:#?}");
    assert_eq!(shared(&awake), BTreeSet::new(), "{awake:#?}");
    assert_all_gone(&zygote);
}
