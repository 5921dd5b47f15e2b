//! Physical memory: ranges of device registers, and pages whose physical addresses are known; and I/O ports.
#![expect(unsafe_code, reason = "device registers are reached through mappings and by instructions of their own")]

use std::arch::asm;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::ptr::{self, NonNull};

use rustix::mm::{MapFlags, MlockAllFlags, ProtFlags, mlockall, mmap, mmap_anonymous};

/// Bytes of a page.
pub const PAGE: usize = 4096;

/// A mapping for the rest of the program's life.
pub struct Region {
    start: NonNull<u8>,
    len: usize,
}

impl Region {
    /// Maps `len` bytes of `file` from `offset` on.
    pub fn map(file: impl AsFd, offset: u64, len: usize) -> Result<Self, String> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at a place of the kernel's choice touches no other memory of this process.
        let start = unsafe { mmap(ptr::null_mut(), len, protection, MapFlags::SHARED, file, offset) };
        let start = start.map_err(|e| format!("mapping {len:#x} bytes at {offset:#x}: {e}"))?;
        NonNull::new(start.cast()).map(|start| Self { start, len }).ok_or_else(|| "mapped at 0".into())
    }

    /// Maps registers at a physical address. The kernel lets only `iomem=relaxed` have those that a driver of its own uses.
    pub fn physical(address: u64, len: usize) -> Result<Self, String> {
        let memory = OpenOptions::new().read(true).write(true).open("/dev/mem").map_err(|e| e.to_string())?;
        Self::map(&memory, address, len)
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    fn at(&self, offset: usize, width: usize) -> Option<NonNull<u8>> {
        let inside = offset.checked_add(width).is_some_and(|end| end <= self.len) && offset.is_multiple_of(width);
        // SAFETY: the offset lies inside the mapping.
        inside.then(|| unsafe { self.start.add(offset) })
    }

    /// Reads `width` (1, 2, 4 or 8) bytes in one access; 0 outside or where that is not aligned.
    pub fn read(&self, offset: usize, width: usize) -> u64 {
        let Some(place) = self.at(offset, width) else { return 0 };
        // SAFETY: inside the mapping, which is never undone, and aligned.
        unsafe {
            match width {
                1 => place.read_volatile().into(),
                2 => place.cast::<u16>().read_volatile().into(),
                4 => place.cast::<u32>().read_volatile().into(),
                _ => place.cast::<u64>().read_volatile(),
            }
        }
    }

    /// Writes the low `width` (1, 2, 4 or 8) bytes of `value` in one access; nothing where [`Region::read`] is 0.
    #[expect(clippy::cast_possible_truncation, reason = "the low bytes are meant")]
    pub fn write(&self, offset: usize, width: usize, value: u64) {
        let Some(place) = self.at(offset, width) else { return };
        // SAFETY: as in `read`. What the write does is the device's business.
        unsafe {
            match width {
                1 => place.write_volatile(value as u8),
                2 => place.cast::<u16>().write_volatile(value as u16),
                4 => place.cast::<u32>().write_volatile(value as u32),
                _ => place.cast::<u64>().write_volatile(value),
            }
        }
    }
}

/// Pages of RAM that devices may be given.
pub struct Arena {
    region: Region,
    frames: Vec<u64>,
}

impl Arena {
    /// `pages` pages that stay where they are.
    pub fn new(pages: usize) -> Result<Self, String> {
        let len = pages * PAGE;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: as in `Region::map`.
        let start = unsafe { mmap_anonymous(ptr::null_mut(), len, protection, MapFlags::PRIVATE) };
        let start = NonNull::new(start.map_err(|e| e.to_string())?.cast::<u8>()).ok_or("mapped at 0")?;
        let region = Region { start, len };
        (0..pages).for_each(|page| region.write(page * PAGE, 8, 0));
        mlockall(MlockAllFlags::CURRENT).map_err(|e| e.to_string())?;
        let pagemap = File::open("/proc/self/pagemap").map_err(|e| e.to_string())?;
        let frame = |page: usize| {
            let mut entry = [0; 8];
            let place = (region.start.as_ptr().addr() + page * PAGE) / PAGE * 8;
            pagemap.read_exact_at(&mut entry, place as u64).map_err(|e| e.to_string())?;
            // Documentation/admin-guide/mm/pagemap.rst: bits 0 to 54 are the frame's number, bit 63 says it is there.
            let entry = u64::from_le_bytes(entry);
            if entry >> 63 == 1 { Ok(entry & ((1 << 55) - 1)) } else { Err("a page is not there".to_owned()) }
        };
        let frames = (0..pages).map(frame).collect::<Result<_, _>>()?;
        Ok(Self { region, frames })
    }

    /// The bytes, as one range.
    pub fn bytes(&self) -> &Region {
        &self.region
    }

    /// Number of pages.
    pub fn pages(&self) -> usize {
        self.frames.len()
    }

    /// Physical address of page `page`.
    pub fn physical(&self, page: usize) -> u64 {
        self.frames.get(page % self.frames.len()).map_or(0, |frame| frame * PAGE as u64)
    }
}

/// The right to use all I/O ports. Beside `/dev/port` because that has accesses of one byte only.
pub struct Ports(());

impl Ports {
    /// Takes the right, for this thread.
    pub fn take() -> Result<Self, String> {
        // SAFETY: changes what this thread may do, not what it does.
        let result = unsafe { libc::iopl(3) };
        if result == 0 { Ok(Self(())) } else { Err(format!("iopl: {}", io::Error::last_os_error())) }
    }

    /// Reads `width` (1, 2 or 4) bytes in one access.
    pub fn read(&self, port: u16, width: usize) -> u32 {
        let value: u32;
        // SAFETY: the thread may do this, and no memory of it is concerned.
        unsafe {
            match width {
                1 => asm!("in al, dx", in("dx") port, inlateout("eax") 0 => value, options(nomem, nostack)),
                2 => asm!("in ax, dx", in("dx") port, inlateout("eax") 0 => value, options(nomem, nostack)),
                _ => asm!("in eax, dx", in("dx") port, lateout("eax") value, options(nomem, nostack)),
            }
        }
        value
    }

    /// Writes the low `width` (1, 2 or 4) bytes of `value` in one access.
    pub fn write(&self, port: u16, width: usize, value: u32) {
        // SAFETY: as in `read`. What the write does is the device's business; no device here has DMA by ports.
        unsafe {
            match width {
                1 => asm!("out dx, al", in("dx") port, in("eax") value, options(nomem, nostack)),
                2 => asm!("out dx, ax", in("dx") port, in("eax") value, options(nomem, nostack)),
                _ => asm!("out dx, eax", in("dx") port, in("eax") value, options(nomem, nostack)),
            }
        }
    }
}
