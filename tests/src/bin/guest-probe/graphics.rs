//! The graphics device: requests that are nearly right, and what a program can ask Debian's driver.

use std::fs::{self, File, OpenOptions};
use std::os::fd::AsRawFd;

use crate::Outcome;
use crate::hostile::{Random, text};
use crate::region::Region;

/// The graphics device, as a PCI device number.
pub const DEVICE: u16 = 0x1050;
/// Bytes in which a [`request`] fits.
pub const SLOT: usize = 512;

/// Requests of virtio-gpu (virtio 1.3 section 5.7.6.7) that the device knows, and some that it does not.
const KINDS: [u64; 14] = [
    0x100,
    0x101,
    0x102,
    0x108,
    0x109,
    RESOURCE_CREATE_BLOB,
    CTX_CREATE,
    0x201,
    0x202,
    0x203,
    SUBMIT_3D,
    0x208,
    0x209,
    0x300,
];
const RESOURCE_CREATE_BLOB: u64 = 0x10c;
const CTX_CREATE: u64 = 0x200;
const SUBMIT_3D: u64 = 0x207;
/// Number of the cross-domain capability set.
const CROSS_DOMAIN: u64 = 5;
const HEADER: usize = 24;

/// Writes words from an offset on.
struct Writer<'a> {
    memory: &'a Region,
    at: usize,
}

impl Writer<'_> {
    fn word(&mut self, value: u64) {
        self.memory.write(self.at, 4, value);
        self.at += 4;
    }

    fn long(&mut self, value: u64) {
        self.word(value & 0xffff_ffff);
        self.word(value >> 32);
    }
}

/// A number that names something often enough, and now and then anything.
fn small(random: &mut Random) -> u64 {
    if random.one_in(16) { random.next() & 0xffff_ffff } else { random.below(5) as u64 }
}

/// Writes a request at `at`, and returns its length; `page` is where the device may put something. Their order is left
/// to chance: what names nothing yet is worth a try, too.
pub fn request(random: &mut Random, memory: &Region, at: usize, page: u64) -> u64 {
    for offset in (0..SLOT).step_by(8) {
        memory.write(at + offset, 8, 0);
    }
    let mut to = Writer { memory, at };
    // Half of them are those by which a context comes to do something.
    let kind = match random.below(8) {
        0 => CTX_CREATE,
        1 => RESOURCE_CREATE_BLOB,
        2 | 3 => SUBMIT_3D,
        _ => KINDS.get(random.below(KINDS.len())).copied().unwrap_or(0),
    };
    to.word(kind);
    to.word(random.next() & if random.one_in(2) { 0 } else { 3 });
    to.long(random.next());
    to.word(small(random));
    to.word(random.next() & 0xffff_ff01);
    match kind {
        CTX_CREATE => {
            to.word(random.next() & 0x7f);
            to.word(if random.one_in(8) { random.next() } else { CROSS_DOMAIN });
        }
        RESOURCE_CREATE_BLOB => blob(random, &mut to, page),
        SUBMIT_3D => {
            let size = if random.one_in(8) { random.next() } else { (SLOT - HEADER - 8) as u64 };
            to.word(size);
            to.word(small(random));
            commands(random, &mut to, at + SLOT);
        }
        _ => (0..4).for_each(|_| to.word(small(random))),
    }
    if random.one_in(8) { random.below(SLOT) as u64 } else { SLOT as u64 }
}

/// The body of RESOURCE_CREATE_BLOB: never with memory that is not `page`.
fn blob(random: &mut Random, to: &mut Writer<'_>, page: u64) {
    to.word(small(random));
    to.word(small(random));
    to.word(random.next());
    to.word(if random.one_in(8) { 1 << 20 | random.next() } else { random.below(3) as u64 });
    to.long(small(random));
    to.long(if random.one_in(4) { random.next() } else { 4096 });
    for _ in 0..3 {
        to.long(page);
        to.word(4096);
        to.word(random.next());
    }
}

/// Commands of a cross-domain context, up to `end`.
fn commands(random: &mut Random, to: &mut Writer<'_>, end: usize) {
    while to.at + 64 <= end {
        let start = to.at;
        // INIT has two sizes, SEND is as long as what is left.
        let (command, size) = match random.below(8) {
            0 | 1 => (1, if random.one_in(2) { 16 } else { 20 }),
            2 => (2, 24),
            3 => (3, 8),
            4 => (4, end - start),
            5 => (7, 32),
            _ => (random.below(12), 8 + 4 * random.below(8)),
        };
        let said = if random.one_in(8) { random.below(1 << 16) } else { size };
        to.word((command | said << 16) as u64 | (random.next() & 1) << 8);
        to.word(0);
        while to.at < (start + size).min(end) {
            to.word(small(random));
        }
    }
}

/// DRM_IOCTL_VIRTGPU_GET_CAPS (`include/uapi/drm/virtgpu_drm.h`).
const GET_CAPS: libc::Ioctl = 0xc018_6449_u32 as libc::Ioctl;

#[repr(C)]
struct GetCaps {
    set: u32,
    version: u32,
    address: u64,
    size: u32,
    padding: u32,
}

/// What the device says of its cross-domain contexts, asked through the driver: a request on the control queue and its
/// answer.
pub fn capabilities() -> Outcome {
    let entries = fs::read_dir("/dev/dri").map_err(text)?.flatten().map(|entry| entry.path());
    let mut nodes = entries.filter(|path| path.to_string_lossy().contains("/renderD"));
    let node = nodes.next().ok_or("no render node")?;
    let device: File = OpenOptions::new().read(true).write(true).open(node).map_err(text)?;
    let mut answer = [0_u32; 4];
    let mut caps = GetCaps { set: 5, version: 0, address: answer.as_mut_ptr().addr() as u64, size: 16, padding: 0 };
    #[expect(unsafe_code, reason = "an ioctl takes a structure with an address in it")]
    // SAFETY: number and structure go together, and the kernel writes at most the 16 bytes of `answer`.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), GET_CAPS, &raw mut caps) };
    if result != 0 {
        return Err(format!("GET_CAPS: {}", std::io::Error::last_os_error()));
    }
    // Version, channels, and two flags.
    let [version, channels, ..] = answer;
    Ok(format!("cross-domain version {version}, channels {channels:#x}"))
}
