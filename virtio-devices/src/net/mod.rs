//! Network interface (virtio 1.3 section 5.1), one pair of queues, no offloads.
//!
//! Frames go to a Unix stream socket, as passt and QEMU's `-netdev stream` speak it, or to a tap of the host. When the other side
//! is gone the link is down; nothing else is affected. An interface without another side is there with its link down: a clone of
//! such a machine can be handed a socket.
//!
//! `stream.rs` and `tap.rs` are the other sides, `filter.rs` says which frames the guest may send, `device.rs` the queues.

mod device;
mod filter;
mod stream;
mod tap;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::OwnedFd;

use rustix::fs::{FileType, fstat};
use serde::{Deserialize, Serialize};
use vmm_config::{HostFacts, MacAddr, NetConfig, VmConfig};

pub use device::Net;

use crate::registry::{BuildContext, BuildError, Built, Kind, Request, Syscall, no_window};
use device::Peer;
use filter::Filter;
use stream::Stream;
use tap::Tap;

/// The kind's entry in the registry.
pub const KIND: Kind = Kind { name: "net", requests, map: no_window, build, syscalls: SYSCALLS };

const STATE_VERSION: u32 = 1;

/// The shortest and the longest frame that is passed on, in bytes: a header of 14, at most a tag of 4 and 65535 of payload.
const MIN_FRAME: usize = 14;
const MAX_FRAME: usize = 14 + 4 + 65535;

/// What a snapshot says of the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    /// The guest has read it already.
    mac: [u8; 6],
    /// What the guest was told of the link.
    up: bool,
}

fn requests(config: &VmConfig, _facts: &HostFacts) -> Vec<Request> {
    let request = |(index, net): (usize, &NetConfig)| Request { id: net.name(index), index, window: None };
    config.net.iter().enumerate().map(request).collect()
}

fn build(ctx: BuildContext<'_>) -> Result<Built, BuildError> {
    let fail = |reason: String| BuildError::Other { device: ctx.request.id.clone(), reason };
    let missing = || fail("the configuration has no such interface".into());
    let config = ctx.config.net.get(ctx.request.index).ok_or_else(missing)?;
    let saved = ctx.saved.map(|saved| saved.read::<State>(KIND.name, STATE_VERSION)).transpose();
    let saved = saved.map_err(|e| fail(e.to_string()))?;
    let peer = match (ctx.handed, &config.socket, &config.tap, config.fd) {
        (Some(fd), ..) => Some(handed(fd).map_err(|e| fail(format!("the descriptor that was handed down: {e}")))?),
        (None, Some(path), ..) => {
            let cannot = |e| fail(format!("cannot connect to {}: {e}; is passt running there?", path.display()));
            Some(Peer::Stream(Stream::connect(path).map_err(cannot)?))
        }
        (None, None, Some(name), _) => {
            let cannot =
                |e| fail(format!("cannot use the tap {name}: {e}; make it with `ip tuntap add mode tap name {name}`"));
            Some(Peer::Tap(Tap::open(name).map_err(cannot)?))
        }
        // The number was another process'.
        (None, None, None, Some(_)) if saved.is_some() => None,
        (None, None, None, Some(fd)) => {
            return Err(fail(format!(
                "fd={fd} was not handed down: it can be used with --net on the command line only"
            )));
        }
        (None, None, None, None) => None,
    };
    let mac = match saved.map(|saved| MacAddr(saved.mac)).or(config.mac) {
        Some(mac) if mac.is_unicast() => mac,
        Some(mac) => return Err(fail(format!("{mac} cannot be the address of an interface"))),
        None => random_mac().map_err(|e| fail(format!("cannot make up an address: {e}")))?,
    };
    let net = Net::new(mac, config.mtu, peer, Filter::new(&config.deny), saved.map(|saved| saved.up));
    Ok(Built::new(net.map_err(|e| fail(format!("cannot watch what it is connected to: {e}")))?))
}

/// What a descriptor is connected to.
fn handed(fd: OwnedFd) -> io::Result<Peer> {
    match FileType::from_raw_mode(fstat(&fd)?.st_mode) {
        FileType::Socket => Ok(Peer::Stream(Stream::shared(fd)?)),
        FileType::CharacterDevice => Ok(Peer::Tap(Tap::adopt(fd)?)),
        _ => Err(io::Error::other("it is neither a Unix stream socket nor a tap")),
    }
}

/// A locally administered one.
fn random_mac() -> rustix::io::Result<MacAddr> {
    let mut bytes = [0; 6];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    bytes[0] = bytes[0] & 0xfc | 2;
    Ok(MacAddr(bytes))
}

const SYSCALLS: &[Syscall] = &[
    Syscall { number: libc::SYS_recvfrom, why: "frames for the guest" },
    Syscall { number: libc::SYS_sendto, why: "frames of the guest" },
    Syscall { number: libc::SYS_shutdown, why: "end a connection that cannot be used any more" },
];
