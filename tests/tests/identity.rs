//! VMs of one template are different from each other, and so is a VM from what it was before it was woken anew.

use guest_proto::{BootId, Identity, MachineId, Reply, Request, Seed};
use rustix::process::Signal;
use tests::VmmCommand;
use tests::agent::{self, Host};
use tests::desktop::Application;
use vmm_config::SnapshotConfig;

/// What programs take for the identity of the machine they run on, a line each: machine-id, D-Bus's copy, boot_id, host name,
/// time in seconds, how often something is mounted over the boot_id.
const LOOK: &str = "cd /proc/sys/kernel/random; cat /etc/machine-id; cat /var/lib/dbus/machine-id 2>/dev/null || \
                    cat /etc/machine-id; cat boot_id; hostname; date +%s; grep -c random/boot_id /proc/mounts";

fn identity(byte: u8, realtime: u64, hostname: Option<&str>) -> Identity {
    Identity {
        seed: Seed::new([byte; Seed::LEN]),
        realtime,
        machine_id: MachineId::from_random([byte; 16]),
        boot_id: BootId::from_random([byte; 16]),
        hostname: hostname.map(|name| name.parse().unwrap()),
    }
}

const SECOND: u64 = 1_000_000_000;
/// May 2033 and later.
const TIMES: [u64; 3] = [2_000_000_000, 3_000_000_000, 2_500_000_000];

/// The agent runs nothing.
fn asleep(host: &Host) {
    let message = host.shell("true").unwrap_err();
    assert!(message.contains("has not been woken"), "{message}");
}

/// The VM takes itself for this one, `seconds` since 1970 or a little later.
fn assert_is(host: &Host, machine_id: MachineId, boot_id: BootId, hostname: &str, seconds: u64) {
    let seen = host.shell(LOOK).unwrap();
    let lines: Vec<&str> = seen.lines().collect();
    let [machine, dbus, boot, name, time, mounts] = lines[..] else { panic!("{seen}") };
    assert_eq!((machine, dbus, boot), (&*machine_id.to_string(), &*machine_id.to_string(), &*boot_id.to_string()));
    assert_eq!(name, hostname);
    let time: u64 = time.parse().unwrap();
    assert!((seconds..seconds + 600).contains(&time), "{seen}");
    assert_eq!(mounts, "1", "one is not mounted over the other");
}

/// The end of the agent's announcement is what a restore does to it.
#[test]
fn a_vm_runs_nothing_until_it_is_woken_and_then_is_what_it_was_told() {
    let keep = tempfile::tempdir().unwrap();
    let socket = keep.path().join("vsock");
    let host = Host::at(&socket);
    let vmm = agent::command(&socket).spawn();
    for (round, seconds) in TIMES.into_iter().enumerate() {
        let link = host.greeting();
        asleep(&host);
        let byte = u8::try_from(round + 1).unwrap();
        // The last time the name stays.
        let identity = identity(byte, seconds * SECOND, ["first", "second.example"].get(round).copied());
        let (machine_id, boot_id) = (identity.machine_id, identity.boot_id);
        assert_eq!(host.ask(Request::Wake(identity)).1, Reply::Done);
        assert_is(&host, machine_id, boot_id, ["first", "second.example", "second.example"][round], seconds);
        assert!(host.shell("echo x > /proc/sys/kernel/random/boot_id").unwrap().contains("Read-only"));
        drop(link);
    }
    let _link = host.greeting();
    let (_, reply) = host.ask(Request::Wake(identity(9, u64::MAX, None)));
    assert!(matches!(&reply, Reply::Failed { message } if message.contains("clock")), "{reply:?}");
    asleep(&host);
    assert_eq!(host.ask(Request::PowerOff).1, Reply::Done);
    vmm.wait().assert_success();
}

/// Each VM that goes on from one snapshot notices it by itself, in its kernel and in its agent.
#[test]
fn a_vm_that_goes_on_from_a_snapshot_sleeps_until_it_is_another() {
    let keep = tempfile::tempdir().unwrap();
    let (socket, url) = (keep.path().join("vsock"), format!("file://{}", keep.path().join("snapshot").display()));
    let host = Host::at(&socket);
    let mut vmm = agent::command(&socket).api().spawn();
    let link = host.greeting();
    assert_eq!(host.ask(Request::Wake(identity(1, TIMES[0] * SECOND, Some("template")))).1, Reply::Done);
    assert_eq!(host.shell("dmesg | grep -c 'virtual machine fork'").unwrap(), "0\n");
    let mut client = vmm.client();
    client.send(&vmm_api::Request::VmPause).unwrap();
    client.send(&vmm_api::Request::VmSnapshot(SnapshotConfig { destination_url: url.clone() })).unwrap();
    vmm.signal(Signal::KILL);
    let _ = vmm.wait();
    drop(link);
    for (byte, name) in [(2, "first"), (3, "second")] {
        let from = format!("source_url={url},memory_restore_mode=copyonwrite,resume=true");
        let vmm = VmmCommand::new().arg("--restore", from).spawn();
        let _link = host.greeting();
        asleep(&host);
        let identity = identity(byte, TIMES[1] * SECOND, Some(name));
        let (machine_id, boot_id) = (identity.machine_id, identity.boot_id);
        assert_eq!(host.ask(Request::Wake(identity)).1, Reply::Done);
        assert_is(&host, machine_id, boot_id, name, TIMES[1]);
        // By the generation ID, and in its own time.
        host.shell("until dmesg | grep 'virtual machine fork'; do sleep 0.1; done").unwrap();
        assert_eq!(host.ask(Request::PowerOff).1, Reply::Done);
        vmm.wait().assert_success();
    }
}

/// As a user runs them.
#[test]
fn two_vms_of_one_template_have_nothing_in_common() {
    let mut vms = [(); 2].map(|()| Application::start(None, &[], &["sh"]));
    let [first, second] = vms.each_mut().map(|vm| {
        let text = vm.shell(&format!("{LOOK}; head -c 32 /dev/urandom | od -An -tx1 -w32"));
        let [machine, dbus, boot, name, time, _, random] = text.lines().collect::<Vec<_>>()[..] else {
            panic!("{text}")
        };
        assert_eq!((machine, name), (dbus, "sh"));
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
        let time: u64 = time.parse().unwrap();
        assert!(time.abs_diff(now) < 60, "it is {now} here and {time} there");
        assert!(machine.parse::<MachineId>().is_ok() && boot.parse::<BootId>().is_ok(), "{text}");
        [machine, boot, random].map(str::to_owned)
    });
    assert!(first.iter().zip(&second).all(|(one, other)| one != other), "{first:?} {second:?}");
    for vm in vms {
        let (status, _) = vm.wait();
        assert!(status.success(), "{status}");
    }
}
