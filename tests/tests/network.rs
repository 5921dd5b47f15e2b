//! What applications can connect to: nothing, the internet but not the host, or one port of the host.

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, UdpSocket};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use tests::desktop::{Application, Owner};
use tests::place::Place;
use tests::shell::{self, ask};
use tests::{Initramfs, VmmCommand, programs};

/// The host's address, and that of the machine beyond it.
const HOST: &str = "198.51.100.1";
const OUTSIDE: &str = "198.51.100.2";
/// A port at which the host has a service, at all of its addresses.
const HOST_PORT: u16 = 9999;

/// Lets the kernel of the host have what its networks here are made of.
fn load(module: &str) {
    assert!(Command::new("modprobe").arg(module).status().unwrap().success(), "{module}");
}

fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split_whitespace()).status().unwrap();
    assert!(status.success(), "ip {arguments}: {status}");
}

/// What a program of a VM finds when it connects to `address` and `port`: an answer, or nothing.
fn fetch(address: &str, port: u16) -> String {
    format!(
        "timeout 20 bash -c 'exec 3<>/dev/tcp/{address}/{port} && printf \"GET / HTTP/1.0\\r\\n\\r\\n\" >&3 && cat <&3' 2>&1 | tail -n 1"
    )
}

/// A network beyond the host with a web server and a resolver, and services of the host that count who comes.
struct World {
    visitors: Arc<AtomicUsize>,
    /// What was in the host's resolv.conf before.
    resolvers: Option<String>,
}

impl Drop for World {
    fn drop(&mut self) {
        ip("link del toward");
        ip("netns del outside");
        if let Some(resolvers) = &self.resolvers {
            fs::write("/etc/resolv.conf", resolvers).unwrap();
        }
    }
}

impl World {
    fn new() -> Self {
        load("veth");
        let resolvers = fs::read_to_string("/etc/resolv.conf").ok();
        ip("netns add outside");
        ip("link set lo up");
        ip("link add toward type veth peer name home netns outside");
        ip(&format!("addr add {HOST}/24 dev toward"));
        ip("link set toward up");
        ip(&format!("-n outside addr add {OUTSIDE}/24 dev home"));
        ip("-n outside link set home up");
        ip(&format!("route add default via {OUTSIDE}"));
        fs::write("/etc/resolv.conf", format!("nameserver {OUTSIDE}\n")).unwrap();
        let (web, resolver) = thread::spawn(|| {
            let outside = File::open("/run/netns/outside").unwrap();
            move_into_link_name_space(std::os::fd::AsFd::as_fd(&outside), Some(LinkNameSpaceType::Network)).unwrap();
            (TcpListener::bind((OUTSIDE, 80)).unwrap(), UdpSocket::bind((OUTSIDE, 53)).unwrap())
        })
        .join()
        .unwrap();
        serve(web, "HTTP/1.0 200 OK\r\n\r\nhello from outside\n", Arc::default());
        thread::spawn(move || resolve(&resolver));
        let visitors = Arc::new(AtomicUsize::new(0));
        serve(TcpListener::bind(("0.0.0.0", HOST_PORT)).unwrap(), "secret of the host\n", visitors.clone());
        let (datagrams, count) = (UdpSocket::bind(("0.0.0.0", HOST_PORT)).unwrap(), visitors.clone());
        thread::spawn(move || {
            while datagrams.recv(&mut [0; 100]).is_ok() {
                count.fetch_add(1, Ordering::SeqCst);
            }
        });
        Self { visitors, resolvers }
    }

    fn visitors(&self) -> usize {
        self.visitors.load(Ordering::SeqCst)
    }
}

/// Answers whoever comes, and counts.
fn serve(listener: TcpListener, answer: &'static str, visitors: Arc<AtomicUsize>) {
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            visitors.fetch_add(1, Ordering::SeqCst);
            // What is not read before the end would end the connection sooner.
            let (mut request, mut byte) = (Vec::new(), [0]);
            while !request.ends_with(b"\r\n\r\n") && stream.read(&mut byte).is_ok_and(|n| n == 1) {
                request.extend(byte);
            }
            let _ = stream.write_all(answer.as_bytes());
        }
    });
}

/// Every name is that of the machine outside; RFC 1035.
fn resolve(socket: &UdpSocket) {
    let mut query = [0; 512];
    while let Ok((n, from)) = socket.recv_from(&mut query) {
        // The question ends behind its name, type and class; what follows is an extension's.
        let Some(end) = query[12..n].iter().position(|byte| *byte == 0).map(|zero| 12 + zero + 5) else { continue };
        let is_a = query[end - 4..end - 2] == [0, 1];
        let counts = [0, 1, 0, u8::from(is_a), 0, 0, 0, 0];
        let mut answer = [&query[..2], &[0x81, 0x80], &counts, &query[12..end]].concat();
        if is_a {
            answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 198, 51, 100, 2]);
        }
        socket.send_to(&answer, from).unwrap();
    }
}

/// Processes with this name.
fn processes(name: &str) -> Vec<i32> {
    let pids = fs::read_dir("/proc").unwrap().flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let is_named = |pid: &i32| match fs::read_to_string(format!("/proc/{pid}/comm")) {
        Ok(found) => found.trim().starts_with(name),
        Err(e) => {
            assert!(e.kind() == ErrorKind::NotFound || e.raw_os_error() == Some(libc::ESRCH));
            false
        }
    };
    pids.filter(is_named).collect()
}

fn wait_until(what: &str, done: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !done() {
        assert!(Instant::now() < deadline, "not within a minute: {what}");
        thread::sleep(Duration::from_millis(100));
    }
}

/// Names are resolved and servers reached, the host is not, by none of its addresses; and passt ends with the VM, also when its
/// launcher was killed.
#[test]
fn the_internet_and_not_the_host() {
    let world = World::new();
    let mut application = Application::start(None, &["--network", "internet", "--user", "root"], &["bash"]);
    uses_the_internet(&mut application, &world);
    assert_eq!(processes("passt").len(), 1);
    let vmm = application.vmm();
    let stat = fs::read_to_string(format!("/proc/{vmm}/status")).unwrap();
    let parent = stat.lines().find_map(|line| line.strip_prefix("PPid:")).unwrap().trim().parse().unwrap();
    kill_process(Pid::from_raw(parent).unwrap(), Signal::KILL).unwrap();
    kill_process(Pid::from_raw(vmm.try_into().unwrap()).unwrap(), Signal::KILL).unwrap();
    wait_until("passt ends", || processes("passt").is_empty());
}

fn uses_the_internet(application: &mut Application, world: &World) {
    let shown = application.shell("ls /sys/class/net; cat /etc/resolv.conf");
    assert!(shown.contains("eth0") && shown.contains("nameserver 10.0.2.3"), "{shown}");
    assert_eq!(application.shell(&fetch("server.test", 80)), "hello from outside", "{}", application.said());
    for address in [HOST, "10.0.2.2", "10.0.2.3", "169.254.1.1"] {
        let found = application.shell(&fetch(address, HOST_PORT));
        assert!(!found.contains("secret"), "{address}: {found}");
        application.shell(&format!("echo x > /dev/udp/{address}/{HOST_PORT}"));
    }
    // What was sent last has arrived by now, if it arrives.
    assert_eq!(application.shell(&fetch(OUTSIDE, 80)), "hello from outside");
    assert_eq!(world.visitors(), 0, "the host was reached");
}

/// A clone of a warm template has a network of its own, and one without the internet no interface.
#[test]
fn clones_are_connected_when_they_are_made() {
    let world = World::new();
    let place = Place::new();
    let [one, two] = [(); 2].map(|()| {
        let mut application = place.start(None, &["--network", "internet"], &["bash"]);
        uses_the_internet(&mut application, &world);
        assert!(!application.said().contains("booting, since"), "{}", application.said());
        application
    });
    assert_eq!(processes("passt").len(), 2);
    // The end of one is its own.
    let (status, _) = one.wait();
    assert!(status.success(), "{status}");
    wait_until("its passt ends", || processes("passt").len() == 1);
    drop(two);
    wait_until("the other ends", || processes("passt").is_empty());
}

/// There is no interface, and only the port that was asked for leads to the host.
#[test]
fn one_port_of_the_host_or_nothing() {
    ip("link set lo up");
    for (port, answer) in [(7001, "the service\n"), (7002, "another service\n")] {
        serve(TcpListener::bind(("127.0.0.1", port)).unwrap(), answer, Arc::default());
    }
    let mut application = Application::start(None, &["--network", "host:7001"], &["bash"]);
    assert_eq!(application.shell("ls /sys/class/net"), "lo");
    assert_eq!(application.shell(&fetch("127.0.0.1", 7001)), "the service");
    let refused = application.shell(&fetch("127.0.0.1", 7002));
    assert!(refused.contains("refused"), "{refused}");
    drop(application);

    let mut application = Application::start(None, &[], &["bash"]);
    assert_eq!(application.shell("ls /sys/class/net"), "lo");
    let refused = application.shell(&fetch("127.0.0.1", 7001));
    assert!(refused.contains("refused"), "{refused}");
}

/// A guest with a tap of the host's talks to the host, and hears of its end.
#[test]
fn a_tap_of_the_host() {
    load("tun");
    ip("tuntap add mode tap name guest0");
    ip("addr add 192.0.2.1/24 dev guest0");
    ip("link set guest0 up");
    serve(
        TcpListener::bind(("192.0.2.1", 80)).unwrap(),
        "HTTP/1.0 200 OK\r\n\r\nhello from the host\n",
        Arc::default(),
    );
    let initramfs = Initramfs::new()
        .program("/bin/busybox", &programs::existing("/bin/busybox".into()))
        .modules(&["virtio_net"])
        .file("/init", shell::INIT.as_bytes());
    let command = VmmCommand::linux("vmlinuz", initramfs, "").arg("--net", "tap=guest0,mac=02:00:00:00:00:07,mtu=1400");
    let mut vmm = command.args(&["--landlock"]).spawn();
    shell::wait(&mut vmm);
    assert_eq!(ask(&mut vmm, "cd /sys/class/net/eth0; cat address mtu"), "02:00:00:00:00:07 1400");
    assert_eq!(ask(&mut vmm, "ip addr add 192.0.2.2/24 dev eth0; ip link set eth0 up; cat carrier"), "1");
    assert_eq!(ask(&mut vmm, "wget -q -O - http://192.0.2.1/"), "hello from the host");
    ip("link del guest0");
    let lost = "while [ $(cat carrier) = 1 ]; do sleep 0.1; done; echo lost";
    assert_eq!(ask(&mut vmm, lost), "lost");
}
