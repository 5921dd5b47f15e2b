//! Socket device (virtio 1.3 section 5.10), its host side on Unix sockets.
//!
//! A host program connects to the device's socket, sends `CONNECT <port>\n`, gets `OK <host port>\n` once the guest has
//! accepted, and talks to the guest from then on. When the guest connects to port P of the host (context identifier 2),
//! the device connects to the Unix socket `<socket>_<P>`; where nobody listens the guest gets a reset. Stream sockets
//! only. Firecracker and Cloud Hypervisor work the same way, so their clients do here.
//!
//! `packet.rs` is the format, `connection.rs` one connection, `table.rs` all of them, `socket.rs` the host's end,
//! `device.rs` the queues.

mod connection;
mod device;
#[cfg(test)]
mod guest;
mod packet;
mod socket;
mod table;
#[cfg(test)]
mod tests;

use vmm_config::{HostFacts, VmConfig};

pub use device::{Vsock, VsockError};
pub use socket::SocketError;

use crate::registry::{BuildContext, BuildError, Built, Kind, Request, Syscall, no_window};

/// The kind's entry in the registry.
pub const KIND: Kind = Kind { name: "vsock", requests, map: no_window, build, syscalls: SYSCALLS };

/// Version of the saved state, which is empty.
const STATE_VERSION: u32 = 1;

fn requests(config: &VmConfig, _facts: &HostFacts) -> Vec<Request> {
    let request = |vsock: &vmm_config::VsockConfig| Request {
        id: vsock.id.clone().unwrap_or_else(|| "_vsock0".into()),
        index: 0,
        window: None,
    };
    config.vsock.iter().map(request).collect()
}

fn build(ctx: BuildContext<'_>) -> Result<Built, BuildError> {
    let fail = |reason: String| BuildError::Other { device: ctx.request.id.clone(), reason };
    let config = ctx.config.vsock.as_ref().ok_or_else(|| fail("the configuration has no vsock section".into()))?;
    if let Some(saved) = ctx.saved {
        saved.read::<()>(KIND.name, STATE_VERSION).map_err(|e| fail(e.to_string()))?;
    }
    let device =
        Vsock::new(config.cid, &config.socket, ctx.handed, ctx.saved.is_some()).map_err(|e| fail(e.to_string()))?;
    Ok(Built::new(device))
}

const SYSCALLS: &[Syscall] = &[
    Syscall { number: libc::SYS_accept4, why: "accept host programs that connect to the guest" },
    Syscall { number: libc::SYS_socket, why: "make the socket of a connection the guest asks for" },
    Syscall { number: libc::SYS_connect, why: "connect it to the program that listens for the guest" },
    Syscall { number: libc::SYS_recvfrom, why: "read from host programs" },
    Syscall { number: libc::SYS_sendto, why: "write to host programs" },
    Syscall { number: libc::SYS_shutdown, why: "pass half-closed connections on" },
];
