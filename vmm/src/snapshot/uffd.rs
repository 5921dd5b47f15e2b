//! Memory that is missing until this process fills it: `userfaultfd(2)` behind a safe type. Structures and commands are
//! those of `linux/userfaultfd.h`.
#![expect(unsafe_code, reason = "userfaultfd's system call and commands")]

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use rustix::io::Errno;
use virtio_devices::device::Memory;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

/// Why page faults cannot be served: one sentence for the user.
#[derive(Debug, thiserror::Error)]
pub enum UffdError {
    /// The host does not let this user.
    #[error(
        "memory_restore_mode=ondemand needs userfaultfd, which this user may not use: run as root, set \
         vm.unprivileged_userfaultfd=1, give access to /dev/userfaultfd, or use memory_restore_mode=copyonwrite"
    )]
    Forbidden,
    /// The kernel refuses.
    #[error("cannot {what} by userfaultfd: {source}; memory_restore_mode=copyonwrite does without")]
    Refused {
        /// What was tried.
        what: &'static str,
        /// The cause.
        source: io::Error,
    },
}

/// A page on the only architecture there is; also the least that is filled at once.
const PAGE: u64 = 4096;
const FLAGS: i32 = libc::O_CLOEXEC | libc::O_NONBLOCK;
const UFFD_API: u64 = 0xaa;
const MODE_MISSING: u64 = 1;
const EVENT_PAGEFAULT: u8 = 0x12;
/// `USERFAULTFD_IOC_NEW`: `_IO(0xaa, 0)`.
const IOC_NEW: u64 = 0xaa00;

/// `struct uffdio_api`.
#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct uffdio_register`.
#[repr(C)]
struct Register {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

/// `struct uffdio_copy`.
#[repr(C)]
struct Copy {
    to: u64,
    from: u64,
    len: u64,
    mode: u64,
    done: i64,
}

/// `struct uffdio_zeropage`.
#[repr(C)]
struct ZeroPage {
    start: u64,
    len: u64,
    mode: u64,
    done: i64,
}

/// The argument of one command.
trait Argument: Sized {
    /// The command's number in the group 0xaa.
    const NUMBER: u64;

    /// `_IOWR(0xaa, NUMBER, Self)`.
    fn command() -> u64 {
        3 << 30 | (size_of::<Self>() as u64) << 16 | 0xaa << 8 | Self::NUMBER
    }
}

impl Argument for Api {
    const NUMBER: u64 = 0x3f;
}
impl Argument for Register {
    const NUMBER: u64 = 0x00;
}
impl Argument for Copy {
    const NUMBER: u64 = 0x03;
}
impl Argument for ZeroPage {
    const NUMBER: u64 = 0x04;
}

/// A descriptor that serves no memory yet.
pub(super) struct Uffd(OwnedFd);

impl Uffd {
    /// Opens one that is told of faults in the kernel too: KVM's, when a guest touches memory, are such.
    pub fn open() -> Result<Self, UffdError> {
        // SAFETY: the call takes flags, and returns a descriptor that nobody else has.
        let number = unsafe { libc::syscall(libc::SYS_userfaultfd, FLAGS) };
        let fd = match owned(number) {
            Ok(fd) => fd,
            // Who may open the device may do the same, whatever the rights of the process.
            Err(Errno::PERM) => from_device().map_err(|_| UffdError::Forbidden)?,
            Err(e) => return Err(refused("serve page faults")(e)),
        };
        let uffd = Self(fd);
        uffd.command(&mut Api { api: UFFD_API, features: 0, ioctls: 0 }).map_err(refused("serve page faults"))?;
        Ok(uffd)
    }

    fn command<A: Argument>(&self, argument: &mut A) -> Result<(), Errno> {
        // SAFETY: the command says the argument's size, which is all that the kernel reads and writes of it. Only `Missing`
        // names other memory in it: ranges of guest memory that it holds, of which the kernel fills pages that are not
        // there, and slices that it borrows, which the kernel reads.
        match unsafe { libc::ioctl(self.0.as_raw_fd(), A::command(), std::ptr::from_mut(argument)) } {
            0.. => Ok(()),
            _ => Err(last()),
        }
    }
}

/// The descriptor that a system call returned.
fn owned(number: i64) -> Result<OwnedFd, Errno> {
    match i32::try_from(number) {
        // SAFETY: the kernel has just made it, for this call alone.
        Ok(fd @ 0..) => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(last()),
    }
}

fn last() -> Errno {
    Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)
}

fn from_device() -> Result<OwnedFd, Errno> {
    let device = OpenOptions::new().read(true).write(true).custom_flags(libc::O_CLOEXEC).open("/dev/userfaultfd");
    let device = device.map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::IO))?;
    // SAFETY: the command takes flags, and returns a descriptor that nobody else has.
    owned(unsafe { libc::ioctl(device.as_raw_fd(), IOC_NEW, FLAGS) }.into())
}

fn refused(what: &'static str) -> impl Fn(Errno) -> UffdError {
    move |e| UffdError::Refused { what, source: e.into() }
}

/// Guest memory of which every page is missing until it is filled. Who touches a page before waits. When this is
/// dropped, what is still missing is zeroes.
pub(super) struct Missing {
    uffd: Uffd,
    /// Held, so that the addresses stay this memory's.
    memory: Memory,
}

impl Missing {
    /// All of `memory`, which nobody has touched, is missing from now on.
    pub fn new(uffd: Uffd, memory: Memory) -> Result<Self, UffdError> {
        for region in memory.iter() {
            let (start, len) = (region.as_ptr() as u64, region.len());
            let mut range = Register { start, len, mode: MODE_MISSING, ioctls: 0 };
            uffd.command(&mut range).map_err(refused("take over guest memory"))?;
        }
        Ok(Self { uffd, memory })
    }

    /// The page that somebody waits for, if there is one that was not asked for yet.
    pub fn fault(&self) -> io::Result<Option<GuestAddress>> {
        // `struct uffd_msg`: the event's kind is in the first byte, a fault's address in the third word.
        let mut message = [0u8; 32];
        loop {
            match rustix::io::read(&self.uffd.0, &mut message) {
                Ok(32) => {}
                Err(Errno::AGAIN) => return Ok(None),
                Err(Errno::INTR) => continue,
                Err(e) => return Err(e.into()),
                Ok(_) => return Err(io::ErrorKind::UnexpectedEof.into()),
            }
            let [EVENT_PAGEFAULT, _, _, _, _, _, _, _, _, _, _, _, _, _, _, _, address @ .., _, _, _, _, _, _, _, _] =
                message
            else {
                continue;
            };
            if let Some(guest) = self.guest(u64::from_ne_bytes(address)) {
                return Ok(Some(guest));
            }
        }
    }

    fn guest(&self, host: u64) -> Option<GuestAddress> {
        self.memory.iter().find_map(|region| {
            let at = host.checked_sub(region.as_ptr() as u64).filter(|at| *at < region.len())?;
            Some(GuestAddress(region.start_addr().0 + at / PAGE * PAGE))
        })
    }

    /// Fills the pages from `guest` on that are still missing with what `bytes` has for them, and wakes who waits.
    pub fn fill(&self, guest: GuestAddress, bytes: &[u8]) -> io::Result<()> {
        self.place(guest, bytes.len() as u64, |to, at, len| {
            // `place` keeps `at` below the length, and `len` what is left of it.
            let from = bytes.as_ptr() as u64 + at;
            let mut copy = Copy { to, from, len, mode: 0, done: 0 };
            (self.uffd.command(&mut copy), copy.done)
        })
    }

    /// As [`Missing::fill`], with zeroes.
    pub fn fill_zeroes(&self, guest: GuestAddress, len: u64) -> io::Result<()> {
        self.place(guest, len, |start, _, len| {
            let mut zero = ZeroPage { start, len, mode: 0, done: 0 };
            (self.uffd.command(&mut zero), zero.done)
        })
    }

    /// Calls `place` with a host address, an offset from the first one and the length that is left, until all is there.
    fn place(
        &self,
        guest: GuestAddress,
        len: u64,
        place: impl Fn(u64, u64, u64) -> (Result<(), Errno>, i64),
    ) -> io::Result<()> {
        let region = self.memory.find_region(guest).ok_or(io::ErrorKind::InvalidInput)?;
        let inside = guest.0 - region.start_addr().0;
        if len > region.len() - inside {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let (host, mut at) = (region.as_ptr() as u64 + inside, 0);
        while at < len {
            match place(host + at, at, len - at) {
                (Ok(()), _) => break,
                // That page is there, and whoever placed it has woken who waited.
                (Err(Errno::EXIST), _) => at += PAGE,
                // In part, or not at all while the process' memory is changing.
                (Err(Errno::AGAIN), done) => at += u64::try_from(done).unwrap_or(0),
                (Err(e), _) => return Err(e.into()),
            }
        }
        Ok(())
    }
}

impl AsFd for Missing {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.uffd.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::thread;
    use std::time::Duration;

    use rustix::event::{PollFd, PollFlags, poll};
    use vm_memory::Bytes;

    use super::*;

    const LEN: usize = 16 * 4096;

    fn missing() -> (Memory, Missing) {
        let memory = Memory::from_ranges(&[(GuestAddress(0), LEN), (GuestAddress(1 << 32), LEN)]).unwrap();
        let missing = Missing::new(Uffd::open().unwrap(), memory.clone()).unwrap();
        (memory, missing)
    }

    fn next(missing: &Missing) -> GuestAddress {
        poll(&mut [PollFd::new(missing, PollFlags::IN)], None).unwrap();
        missing.fault().unwrap().unwrap()
    }

    #[test]
    fn who_touches_a_page_waits_for_it() {
        let (memory, missing) = missing();
        assert_eq!(missing.fault().unwrap(), None);
        let (sender, receiver) = channel();
        let toucher = thread::spawn(move || {
            for at in [0x1234, (1 << 32) + 0x3001, 0x5000] {
                sender.send(memory.read_obj::<u8>(GuestAddress(at)).unwrap()).unwrap();
            }
        });
        assert_eq!(next(&missing), GuestAddress(0x1000));
        assert!(receiver.try_recv().is_err());
        missing.fill(GuestAddress(0x1000), &[7; 4096]).unwrap();
        assert_eq!(receiver.recv().unwrap(), 7);
        assert_eq!(next(&missing), GuestAddress((1 << 32) + 0x3000));
        missing.fill_zeroes(GuestAddress(1 << 32), LEN as u64).unwrap();
        assert_eq!(receiver.recv().unwrap(), 0);
        assert_eq!(next(&missing), GuestAddress(0x5000));
        // Nobody is left to fill it.
        drop(missing);
        assert_eq!(receiver.recv().unwrap(), 0);
        toucher.join().unwrap();
    }

    #[test]
    fn what_is_there_is_never_overwritten() {
        let (memory, missing) = missing();
        missing.fill(GuestAddress(0x3000), &[1; 4096]).unwrap();
        missing.fill(GuestAddress(0xe000), &[2; 0x2000]).unwrap();
        missing.fill_zeroes(GuestAddress(0x5000), 4096).unwrap();
        missing.fill(GuestAddress(0), &[3; LEN]).unwrap();
        missing.fill(GuestAddress(0), &[4; LEN]).unwrap();
        missing.fill_zeroes(GuestAddress(0), LEN as u64).unwrap();
        // Who reads what is missing after all would wait for ever.
        let (sender, receiver) = channel();
        let read = move || (0..16).map(|page| memory.read_obj(GuestAddress(page * 4096)).unwrap()).collect::<Vec<u8>>();
        thread::spawn(move || sender.send(read()));
        let bytes = receiver.recv_timeout(Duration::from_secs(60)).unwrap();
        assert_eq!(bytes, [3, 3, 3, 1, 3, 0, 3, 3, 3, 3, 3, 3, 3, 3, 2, 2]);
    }

    #[test]
    fn nothing_outside_is_filled() {
        let (_memory, missing) = missing();
        for (at, len) in [(LEN as u64, 1), (0xf000, 2), ((1 << 32) - 4096, 1), ((1 << 32) + 0xf000, 2), (u64::MAX, 1)] {
            let error = missing.fill(GuestAddress(at), &vec![0; len * 4096]).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{at:#x}");
        }
    }
}
