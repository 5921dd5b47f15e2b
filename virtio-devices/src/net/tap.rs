//! A tap of the host: one frame for each read and write, no header in front of it.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::{Errno, read, write};

use super::MAX_FRAME;
use super::device::{Received, Sent};

const DEVICE: &str = "/dev/net/tun";

/// An attached tap.
pub(super) struct Tap {
    fd: OwnedFd,
    buffer: Box<[u8]>,
    /// Bytes of the frame in the buffer that is not consumed.
    frame: Option<usize>,
}

impl Tap {
    /// Attaches to the interface `name`.
    pub(super) fn open(name: &str) -> io::Result<Self> {
        let fd: OwnedFd = File::options().read(true).write(true).open(DEVICE)?.into();
        let mut request = request();
        for (slot, byte) in request.ifr_name.iter_mut().zip(name.bytes().take(libc::IFNAMSIZ - 1)) {
            *slot = byte.cast_signed();
        }
        request.ifr_ifru.ifru_flags = flags(libc::IFF_TAP | libc::IFF_NO_PI);
        ioctl(&fd, libc::TUNSETIFF, &mut request)?;
        Self::new(fd)
    }

    /// Takes over one that is attached.
    pub(super) fn adopt(fd: OwnedFd) -> io::Result<Self> {
        let mut request = request();
        ioctl(&fd, libc::TUNGETIFF, &mut request).map_err(|_| io::Error::other("it is no tap"))?;
        let has = flags_of(&request);
        if has & flags(libc::IFF_TAP) == 0 || has & flags(libc::IFF_NO_PI) == 0 || has & flags(libc::IFF_VNET_HDR) != 0
        {
            return Err(io::Error::other("a tap must be made with IFF_TAP and IFF_NO_PI, without IFF_VNET_HDR"));
        }
        Self::new(fd)
    }

    fn new(fd: OwnedFd) -> io::Result<Self> {
        fcntl_setfl(&fd, fcntl_getfl(&fd)? | OFlags::NONBLOCK)?;
        Ok(Self { fd, buffer: vec![0; MAX_FRAME].into(), frame: None })
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    pub(super) fn next(&mut self, may_read: bool) -> Received {
        if self.frame.is_none() && may_read {
            match read(&self.fd, &mut *self.buffer) {
                Ok(n) => self.frame = Some(n),
                // EIO: the interface is down.
                Err(Errno::AGAIN | Errno::INTR | Errno::IO) => {}
                Err(_) => return Received::Gone,
            }
        }
        self.frame.map_or(Received::Nothing, |len| Received::Frame(0..len))
    }

    pub(super) fn bytes(&self, frame: Range<usize>) -> &[u8] {
        self.buffer.get(frame).unwrap_or_default()
    }

    pub(super) fn consume(&mut self) {
        self.frame = None;
    }

    pub(super) fn send(&mut self, frame: &[u8]) -> Sent {
        match write(&self.fd, frame) {
            Err(Errno::AGAIN | Errno::INTR) => Sent::Later,
            Err(Errno::BADFD) => Sent::Gone,
            // A frame that the host does not take, or an interface that is down: networks lose frames.
            _ => Sent::Done,
        }
    }
}

#[expect(unsafe_code, reason = "a plain C structure begins as zeroes")]
fn request() -> libc::ifreq {
    // SAFETY: all bytes zero is a valid value of this structure of numbers.
    unsafe { std::mem::zeroed() }
}

#[expect(clippy::cast_possible_truncation, reason = "flags of interfaces have 16 bits")]
fn flags(flags: libc::c_int) -> libc::c_short {
    flags as libc::c_short
}

#[expect(unsafe_code, reason = "the kernel's answer is in a union")]
fn flags_of(request: &libc::ifreq) -> libc::c_short {
    // SAFETY: every member of the union is made of numbers, for which all bytes are valid, and `request` began as zeroes.
    unsafe { request.ifr_ifru.ifru_flags }
}

#[expect(unsafe_code, reason = "rustix has no ioctls of taps")]
fn ioctl(fd: &OwnedFd, number: libc::Ioctl, request: &mut libc::ifreq) -> io::Result<()> {
    // SAFETY: both requests that are made read and write a whole ifreq at most, which `request` is, and the descriptor is open.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), number, std::ptr::from_mut(request)) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
