//! The bus, offered to the launcher: it is told where to connect, and what it sends there reaches the bus.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::{Path, PathBuf},
    thread,
};

use guest_proto::portal::{Offer, PORT, VERSION};
use rustix::net::{Shutdown, shutdown};

use crate::{agent, console::say, init::GRANTS, sys};

/// The port of the VM by which the bus can be reached. Any will do: it is told to the launcher.
const BUS_PORT: u32 = 5002;

/// Why the host has no portals for this VM.
#[derive(Debug, thiserror::Error)]
pub enum BridgeError {
    /// Nobody listens there, or the connection broke.
    #[error("the launcher cannot be reached: {0}")]
    Io(#[from] io::Error),
    /// It speaks another protocol.
    #[error("the launcher chose version {0} of the protocol, which was not offered")]
    Version(u8),
    /// It does not want the bus.
    #[error("the launcher refuses (status {0})")]
    Refused(u8),
}

/// Offers the bus to the launcher.
pub fn offer() -> Result<(), BridgeError> {
    let mut launcher = File::from(sys::vsock_connect(sys::CID_HOST, PORT)?);
    launcher.write_all(&Offer::versions())?;
    match byte(&mut launcher)? {
        VERSION => {}
        other => return Err(BridgeError::Version(other)),
    }
    launcher.write_all(&Offer { port: BUS_PORT, root: GRANTS.into() }.encode())?;
    match byte(&mut launcher)? {
        0 => Ok(()),
        status => Err(BridgeError::Refused(status)),
    }
}

/// Carries the launcher's connections to the bus with the socket `bus`, from here on and by threads.
pub fn listen(bus: PathBuf) -> io::Result<()> {
    let listener = sys::vsock_listen(BUS_PORT)?;
    thread::Builder::new().name("bridge".into()).spawn(move || {
        loop {
            match agent::accept(&listener) {
                Ok(None) => {}
                Ok(Some(host)) => {
                    carry(host, &bus).unwrap_or_else(|error| say!("portal: cannot reach the session bus: {error}"));
                }
                Err(error) => return say!("portal: cannot accept the launcher's connection: {error}"),
            }
        }
    })?;
    Ok(())
}

fn byte(stream: &mut File) -> io::Result<u8> {
    let mut byte = [0];
    stream.read_exact(&mut byte)?;
    Ok(u8::from_be_bytes(byte))
}

/// Copies both ways until either side has ended.
fn carry(host: OwnedFd, bus: &Path) -> io::Result<()> {
    let bus = OwnedFd::from(UnixStream::connect(bus)?);
    let (other_host, other_bus) = (host.try_clone()?, bus.try_clone()?);
    thread::Builder::new().name("to the bus".into()).spawn(move || copy(other_host, other_bus))?;
    thread::Builder::new().name("from the bus".into()).spawn(move || copy(bus, host))?;
    Ok(())
}

fn copy(from: OwnedFd, to: OwnedFd) {
    let (mut from, mut to) = (File::from(from), File::from(to));
    // Whatever the end is, the other side learns of it.
    let _ = io::copy(&mut from, &mut to);
    for end in [from.as_fd(), to.as_fd()] {
        let _ = shutdown(end, Shutdown::Both);
    }
}
