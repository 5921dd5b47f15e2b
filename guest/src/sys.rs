//! The few system calls that neither the standard library nor rustix has in a safe form.

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, OwnedFd},
};

use rustix::net::{
    AddressFamily, SocketAddrAny, SocketFlags, SocketType,
    addr::{SocketAddrArg, SocketAddrLen, SocketAddrOpaque},
    socket_with,
};
use zeroize::Zeroize;

/// CID of the host, as a guest sees it.
pub const CID_HOST: u32 = libc::VMADDR_CID_HOST;

/// A vsock address: `sockaddr_vm` of vsock(7).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VsockAddr {
    /// Which machine.
    pub cid: u32,
    /// Which service on it.
    pub port: u32,
}

#[expect(unsafe_code, reason = "rustix knows no vsock addresses and lets callers bring their own")]
mod vsock_address {
    use super::{SocketAddrAny, SocketAddrArg, SocketAddrLen, SocketAddrOpaque, VsockAddr};

    #[expect(clippy::cast_possible_truncation, reason = "16 bytes, and an address family below 50")]
    const LENGTH: SocketAddrLen = size_of::<libc::sockaddr_vm>() as SocketAddrLen;

    // SAFETY: the pointer given to `f` points to a whole, initialised sockaddr_vm that lives during the call, and the
    // length is its size.
    unsafe impl SocketAddrArg for VsockAddr {
        unsafe fn with_sockaddr<R>(&self, f: impl FnOnce(*const SocketAddrOpaque, SocketAddrLen) -> R) -> R {
            // SAFETY: all bytes zero is a valid value of this plain C structure.
            let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
            #[expect(clippy::cast_possible_truncation, reason = "AF_VSOCK is 40")]
            {
                address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
            }
            address.svm_cid = self.cid;
            address.svm_port = self.port;
            f((&raw const address).cast(), LENGTH)
        }
    }

    impl VsockAddr {
        /// The address the kernel reported, if it is a vsock address.
        pub fn from_any(any: &SocketAddrAny) -> Option<Self> {
            if i32::from(any.address_family().as_raw()) != libc::AF_VSOCK || any.addr_len() < LENGTH {
                return None;
            }
            // SAFETY: the storage holds at least `addr_len` initialised bytes, which is enough for a sockaddr_vm, and
            // read_unaligned asks for no alignment.
            let address = unsafe { any.as_ptr().cast::<libc::sockaddr_vm>().read_unaligned() };
            Some(Self { cid: address.svm_cid, port: address.svm_port })
        }
    }
}

fn vsock_socket() -> io::Result<OwnedFd> {
    Ok(socket_with(AddressFamily::VSOCK, SocketType::STREAM, SocketFlags::CLOEXEC, None)?)
}

/// A socket that listens on `port` of this machine.
pub fn vsock_listen(port: u32) -> io::Result<OwnedFd> {
    let fd = vsock_socket()?;
    rustix::net::bind(&fd, &VsockAddr { cid: libc::VMADDR_CID_ANY, port })?;
    rustix::net::listen(&fd, 64)?;
    Ok(fd)
}

/// A connection to `port` of the machine `cid`.
pub fn vsock_connect(cid: u32, port: u32) -> io::Result<OwnedFd> {
    let fd = vsock_socket()?;
    rustix::net::connect(&fd, &VsockAddr { cid, port })?;
    Ok(fd)
}

/// Lets a command begin in a session of its own, whose terminal is its standard input: setsid(2), ioctl_tty(2).
#[expect(unsafe_code, reason = "the standard library has no way to make a session")]
pub fn with_own_terminal(command: &mut std::process::Command) {
    use std::os::unix::process::CommandExt;
    let begin = || {
        // Who ignores the keys' signals, as a shell has its background jobs do, would hand that down.
        for signal in [libc::SIGINT, libc::SIGQUIT, libc::SIGTSTP] {
            // SAFETY: the default is no handler, and the process is about to become another program.
            if unsafe { libc::signal(signal, libc::SIG_DFL) } == libc::SIG_ERR {
                return Err(io::Error::last_os_error());
            }
        }
        rustix::process::setsid()?;
        rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
        Ok(())
    };
    // SAFETY: between fork and exec the closure makes system calls, and none allocates or locks: rustix enters the kernel directly,
    // signal(3) is async-signal-safe, and an errno becomes an error without memory.
    unsafe { command.pre_exec(begin) };
}

/// Brings the loopback interface up, see netdevice(7).
#[expect(unsafe_code, reason = "rustix has no SIOCSIFFLAGS")]
pub fn loopback_up() -> io::Result<()> {
    let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    // SAFETY: all bytes zero is a valid value of this plain C structure.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (slot, byte) in request.ifr_name.iter_mut().zip(b"lo\0") {
        *slot = byte.cast_signed();
    }
    #[expect(clippy::cast_possible_truncation, reason = "IFF_UP is 1")]
    {
        request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
    }
    // SAFETY: the request reads a whole ifreq, which `request` is, and the descriptor is open.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Mixes bytes into the kernel's random numbers, vouches that all their bits are random, and makes every generator start anew
/// from them, those of the vDSO too: RNDADDENTROPY and RNDRESEEDCRNG of random(4).
#[expect(unsafe_code, reason = "rustix has no ioctls of /dev/random")]
pub fn seed_random<const N: usize>(bytes: &[u8; N]) -> io::Result<()> {
    /// `struct rand_pool_info` of linux/random.h with its bytes.
    #[repr(C)]
    struct Entropy<const N: usize> {
        bits: libc::c_int,
        bytes: libc::c_int,
        buffer: [u8; N],
    }
    const RNDADDENTROPY: libc::Ioctl = 0x4008_5203;
    const RNDRESEEDCRNG: libc::Ioctl = 0x5207;
    let count = libc::c_int::try_from(N).map_err(io::Error::other)?;
    let random = File::options().read(true).write(true).open("/dev/random")?;
    let mut entropy = Entropy { bits: count.saturating_mul(8), bytes: count, buffer: *bytes };
    // SAFETY: the request reads the two numbers and as many bytes after them as the second one says, which `entropy` has.
    let added = unsafe { libc::ioctl(random.as_raw_fd(), RNDADDENTROPY, &raw const entropy) };
    let result = if added < 0 { Err(io::Error::last_os_error()) } else { Ok(()) };
    entropy.buffer.zeroize();
    result?;
    // SAFETY: the request has no argument.
    let reseeded = unsafe { libc::ioctl(random.as_raw_fd(), RNDRESEEDCRNG) };
    if reseeded < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Sends a signal to every process but the caller and the kernel's own, see kill(2).
#[expect(unsafe_code, reason = "rustix does not address all processes")]
pub fn signal_everybody(signal: libc::c_int) {
    // SAFETY: kill() touches no memory of this process. "Nobody is left" is the only error and wanted.
    let _ = unsafe { libc::kill(-1, signal) };
}
