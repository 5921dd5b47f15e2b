//! What a VM can connect to.
//!
//! *The internet:* a passt for each VM, a child of the launcher at the other end of a socket of the VM's interface. It ends when
//! that socket does, and so with the VMM, whatever became of the launcher. It connects as a process of the host would, to the host's own
//! services too: what the guest must not reach is withheld by the interface, in the VMM.
//!
//! *One port of the host:* no interface. The agent listens on that port of the VM's loopback, its connections come by vsock, and
//! here they go on to that port of the host's loopback, and nowhere else.

use std::{
    env, fs,
    io::{self, Read},
    net::{Ipv4Addr, Shutdown, TcpStream},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::{
            net::{UnixListener, UnixStream},
            process::CommandExt,
        },
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use guest_proto::{
    Request,
    network::{GATEWAY, GUEST_ADDRESS, NETWORK_BITS, RESOLVER},
};
use rustix::io::{FdFlags, fcntl_setfd};
use vmm_config::Ipv4Network;

use super::{RunError, relay, vm::AgentLink};

/// The program.
const PASST: &str = "passt";

/// Its own address on the guest's network; else it would be that of an interface of the host's.
const PASST_MAC: &str = "02:00:00:00:00:02";

/// Addresses that are the host itself, whatever it is called, or no single machine: RFC 6890.
const NEVER: [(Ipv4Addr, u8); 4] = [
    (Ipv4Addr::new(0, 0, 0, 0), 8),
    (Ipv4Addr::new(127, 0, 0, 0), 8),
    (Ipv4Addr::new(169, 254, 0, 0), 16),
    // Groups, and all at once.
    (Ipv4Addr::new(224, 0, 0, 0), 3),
];

/// Where the kernel lists the addresses that are its own.
const ROUTES: &str = "/proc/net/fib_trie";

/// Where passt looks for a resolver.
const RESOLVERS: &str = "/etc/resolv.conf";

/// More connections than this at once are closed unheard.
const CONNECTIONS: usize = 64;

/// Why a VM has no network.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    #[error("{PASST} was not found in PATH, and the network needs it: sudo apt-get install passt")]
    Missing,
    #[error("cannot start {PASST}: {0}")]
    Start(#[source] io::Error),
    #[error("cannot read {ROUTES}, which says what the VM must not reach: {0}")]
    Addresses(#[source] io::Error),
}

/// The program, if it is there.
pub fn find_passt() -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path).map(|folder| folder.join(PASST)).find(|path| path.is_file())
}

/// A running passt. Dropping it ends it, as the end of the VMM does.
pub struct Passt(Child);

impl Passt {
    /// Starts one, and gives the VMM's end of its socket.
    pub fn start() -> Result<(Self, OwnedFd), NetworkError> {
        let (ours, theirs) = UnixStream::pair().map_err(NetworkError::Start)?;
        let has_resolver = names_resolver(&fs::read_to_string(RESOLVERS).unwrap_or_default());
        if !has_resolver {
            log::warn!("{RESOLVERS} names no resolver with an IPv4 address: the VM will know no names");
        }
        let mut command = Command::new(find_passt().ok_or(NetworkError::Missing)?);
        command.args(arguments(&theirs, has_resolver)).process_group(0).current_dir("/");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let child = spawn_with(command, &theirs).map_err(NetworkError::Start)?;
        Ok((Self(child), ours.into()))
    }

    /// Why it has ended, if it has.
    pub fn reason_for_end(&mut self) -> Option<String> {
        self.0.try_wait().ok().flatten()?;
        let mut text = String::new();
        let _ = self.0.stderr.take()?.read_to_string(&mut text);
        Some(text.lines().rfind(|line| !line.starts_with("Failed to send")).unwrap_or("it said nothing").to_owned())
    }
}

impl Drop for Passt {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts a process that has `fd` beside its streams. It must be the only one that is started meanwhile, and this process has one
/// thread while it starts some.
pub fn spawn_with(mut command: Command, fd: impl AsFd) -> io::Result<Child> {
    fcntl_setfd(&fd, FdFlags::empty())?;
    let child = command.spawn();
    fcntl_setfd(&fd, FdFlags::CLOEXEC)?;
    child
}

/// passt(1). Nothing of the host's is told to the guest, and no port of the host leads to it.
fn arguments(socket: &impl AsRawFd, has_resolver: bool) -> Vec<String> {
    let mut arguments = vec!["--foreground".into(), "--quiet".into(), "--ipv4-only".into()];
    let mut add = |flag: &str, value: String| arguments.extend([flag.to_owned(), value]);
    add("--fd", socket.as_raw_fd().to_string());
    add("--tcp-ports", "none".into());
    add("--udp-ports", "none".into());
    add("--address", GUEST_ADDRESS.to_string());
    add("--netmask", NETWORK_BITS.to_string());
    add("--gateway", GATEWAY.to_string());
    add("--mac-addr", PASST_MAC.into());
    add("--search", "none".into());
    // The resolver it forwards to must be found by itself: one given by --dns is not used for that, and where none is
    // found queries go to 0.0.0.0, the host (2023-03-09).
    if has_resolver {
        add("--dns-forward", RESOLVER.to_string());
    }
    arguments.extend(["--no-map-gw".to_owned(), "--no-dhcp".to_owned()]);
    arguments
}

/// Whether there is one that passt can forward to. See resolv.conf(5).
fn names_resolver(text: &str) -> bool {
    text.lines().filter_map(|line| line.strip_prefix("nameserver ")).any(|rest| {
        let word = rest.split_whitespace().next().unwrap_or_default();
        word.parse::<Ipv4Addr>().is_ok()
    })
}

/// What the guest of an interface to the internet may not send to: the host, by all of its addresses.
pub fn denied() -> Result<Vec<Ipv4Network>, NetworkError> {
    let text = fs::read_to_string(ROUTES).map_err(NetworkError::Addresses)?;
    let never = NEVER.map(|(address, bits)| Ipv4Network::new(address, bits));
    let own = own_addresses(&text).into_iter().map(|address| Ipv4Network::new(address, 32));
    Ok(never.into_iter().chain(own).collect())
}

/// A line names an address, and one of those below it says that it is local.
fn own_addresses(text: &str) -> Vec<Ipv4Addr> {
    let mut last = None;
    let mut own = Vec::new();
    for line in text.lines().map(str::trim_start) {
        if let Some(address) = line.strip_prefix("|-- ") {
            last = address.trim().parse().ok();
        } else if line.starts_with("/32 host LOCAL") {
            own.extend(last.filter(|address: &Ipv4Addr| !address.is_loopback()));
        }
    }
    own.sort();
    own.dedup();
    own
}

/// Value of the VMM's --net for an interface that is connected to nothing. Every VM has a network of its own, so all can have the
/// same address. A larger packet would need memory in large pieces in the guest; smaller ones are more.
pub const UNCONNECTED: &str = "mac=02:00:00:00:00:0f,mtu=9000";

/// The identifier that the VMM gives an interface.
pub const DEVICE: &str = "_net0";

/// Value of the VMM's --net for a socket that it inherits.
pub fn interface(socket: &impl AsRawFd, denied: &[Ipv4Network]) -> String {
    let denied: Vec<String> = denied.iter().map(ToString::to_string).collect();
    format!("{UNCONNECTED},fd={},deny=[{}]", socket.as_raw_fd(), denied.join(","))
}

/// Accepts the connections of a VM's processes to `port`, for as long as this process lives.
pub fn relay_port(socket: &Path, port: u16) -> io::Result<()> {
    let listener = UnixListener::bind(socket)?;
    thread::Builder::new().name("network".into()).spawn(move || {
        let active = Arc::new(AtomicUsize::new(0));
        for stream in listener.incoming().flatten() {
            if active.fetch_add(1, Ordering::SeqCst) < CONNECTIONS {
                let counter = active.clone();
                let relayed = move || {
                    if let Err(error) = relay_one(stream, port) {
                        log::info!("no connection to port {port}: {error}");
                    }
                    counter.fetch_sub(1, Ordering::SeqCst);
                };
                if thread::Builder::new().name("network".into()).spawn(relayed).is_ok() {
                    continue;
                }
            }
            active.fetch_sub(1, Ordering::SeqCst);
        }
    })?;
    Ok(())
}

/// Copies in both directions until both have ended.
fn relay_one(guest: UnixStream, port: u16) -> io::Result<()> {
    let host = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
    let (mut from, mut to) = (guest.try_clone()?, host.try_clone()?);
    let forth = thread::Builder::new().name("network".into()).spawn(move || {
        let _ = io::copy(&mut from, &mut to);
        let _ = to.shutdown(Shutdown::Write);
    })?;
    let (mut from, mut to) = (host, guest);
    let _ = io::copy(&mut from, &mut to);
    let _ = to.shutdown(Shutdown::Write);
    let _ = forth.join();
    Ok(())
}

/// Lets the agent listen on `port` of the VM.
pub fn forward(link: AgentLink, port: u16) -> Result<(), RunError> {
    relay::carry_out(link, Request::Forward { port })
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn addresses_of_the_host() {
        let text = "\
Main:
  +-- 0.0.0.0/0 3 0 5
     |-- 0.0.0.0
        /0 universe UNICAST
     +-- 127.0.0.0/8 2 0 2
           |-- 127.0.0.0
              /8 host LOCAL
           |-- 127.0.0.1
              /32 host LOCAL
     |-- 192.0.2.0
        /24 link UNICAST
     |-- 192.0.2.2
        /32 host LOCAL
     |-- 192.0.2.255
        /32 link BROADCAST
Local:
     |-- 192.0.2.2
        /32 link UNICAST
        /32 host LOCAL
";
        assert_eq!(own_addresses(text), ["192.0.2.2".parse::<Ipv4Addr>().unwrap()]);
        let denied = denied().unwrap();
        for address in ["127.0.0.1", "127.8.8.8", "0.0.0.0", "169.254.169.254", "239.1.1.1", "255.255.255.255"] {
            assert!(denied.iter().any(|network| network.contains(address.parse().unwrap())), "{address}");
        }
        for address in [RESOLVER, GATEWAY, Ipv4Addr::new(1, 1, 1, 1)] {
            assert!(!denied.iter().any(|network| network.contains(address)), "{address}");
        }
    }

    #[test]
    fn queries_are_forwarded_where_there_is_somebody() {
        assert!(names_resolver("# x\nsearch a b\nnameserver ::1\nnameserver 127.0.0.53 # y\n"));
        assert!(!names_resolver("nameserver ::1\n#nameserver 1.1.1.1\nnameserver\nnameserver\t1.1.1.1\n"));
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let forwards = |has| arguments(&ours, has).contains(&"--dns-forward".to_owned());
        assert!(forwards(true) && !forwards(false));
    }

    #[test]
    fn a_port_leads_to_the_hosts_and_nowhere_else() {
        let folder = tempfile::tempdir().unwrap();
        let host = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let socket = folder.path().join("s");
        relay_port(&socket, host.local_addr().unwrap().port()).unwrap();
        let mut guest = UnixStream::connect(&socket).unwrap();
        let (mut service, _) = host.accept().unwrap();
        guest.write_all(b"question").unwrap();
        guest.shutdown(Shutdown::Write).unwrap();
        let mut text = String::new();
        service.read_to_string(&mut text).unwrap();
        assert_eq!(text, "question");
        service.write_all(b"answer").unwrap();
        drop(service);
        text.clear();
        guest.read_to_string(&mut text).unwrap();
        assert_eq!(text, "answer");
        // Nobody listens any more.
        drop(host);
        assert_eq!(UnixStream::connect(&socket).unwrap().read(&mut [0]).unwrap(), 0);
    }

    #[test]
    fn the_vmm_understands_its_interface() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let net = vmm_config::NetConfig::parse(&interface(&ours, &denied().unwrap())).unwrap();
        assert_eq!((net.fd, net.mtu), (Some(ours.as_raw_fd()), Some(9000)));
        assert!(net.mac.unwrap().is_unicast() && net.deny.len() >= NEVER.len());
    }
}
