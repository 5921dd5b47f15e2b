//! Sockets to the host (vsock(7)).
#![expect(unsafe_code, reason = "the standard library knows no such addresses")]

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::mem::size_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::{Outcome, say};

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn socket() -> io::Result<OwnedFd> {
    // SAFETY: no pointers.
    let fd = check(unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM, 0) })?;
    // SAFETY: the descriptor is new, and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// `connect` or `bind`.
type Call = unsafe extern "C" fn(libc::c_int, *const libc::sockaddr, libc::socklen_t) -> libc::c_int;

fn with_address(socket: &OwnedFd, call: Call, cid: u32, port: &str) -> Result<(), String> {
    // SAFETY: a structure of numbers, for which zeros are valid.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::sa_family_t::try_from(libc::AF_VSOCK).map_err(text)?;
    address.svm_cid = cid;
    address.svm_port = port.parse().map_err(text)?;
    let size = libc::socklen_t::try_from(size_of::<libc::sockaddr_vm>()).map_err(text)?;
    // SAFETY: the address lives until the call returns and has the size given.
    check(unsafe { call(socket.as_raw_fd(), (&raw const address).cast(), size) }).map(drop).map_err(text)
}

/// Connects to a port of the host, sends a line and returns the line that comes back.
pub fn connect(port: &str) -> Outcome {
    let socket = socket().map_err(text)?;
    with_address(&socket, libc::connect, libc::VMADDR_CID_HOST, port)?;
    talk(socket)
}

/// Connects to a port of the host, and waits until that connection ends: what ended it.
pub fn hold(port: &str) -> Outcome {
    let socket = socket().map_err(text)?;
    with_address(&socket, libc::connect, libc::VMADDR_CID_HOST, port)?;
    say("vsock-hold: connected");
    match File::from(socket).read(&mut [0]) {
        Ok(0) => Ok("end of file".into()),
        Ok(_) => Err("the host says something".into()),
        // Linux tells who waits already that the connection was reset, and who comes later that there is none.
        Err(e) if matches!(e.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::NotConnected) => {
            Ok("reset".into())
        }
        Err(e) => Err(text(e)),
    }
}

/// Waits for one connection to a port, sends a line and returns the line that comes.
pub fn listen(port: &str) -> Outcome {
    let socket = socket().map_err(text)?;
    with_address(&socket, libc::bind, libc::VMADDR_CID_ANY, port)?;
    // SAFETY: no pointers.
    check(unsafe { libc::listen(socket.as_raw_fd(), 1) }).map_err(text)?;
    say("vsock-listen: ready");
    // SAFETY: the address of the peer is not asked for.
    let peer =
        check(unsafe { libc::accept(socket.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut()) }).map_err(text)?;
    // SAFETY: the descriptor is new, and nobody else's.
    talk(unsafe { OwnedFd::from_raw_fd(peer) })
}

fn talk(socket: OwnedFd) -> Outcome {
    let mut file = File::from(socket);
    file.write_all(b"hello from the guest\n").map_err(text)?;
    let mut line = String::new();
    BufReader::new(file).read_line(&mut line).map_err(text)?;
    Ok(line.trim_end().to_owned())
}
