//! Shared-memory pools and the host memory that stands in for them.
//!
//! The host never sees an application's pool. Each `wl_buffer` gets a piece of host memory of its own, and the damaged
//! part of the application's file is copied there when it commits. So a pool may be of any size and may grow: only what is
//! shown occupies host memory. Pieces are kept for reuse, in few sizes, because an application that is resized asks for
//! hundreds of sizes.

use std::cell::Cell;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;

use super::channel::MAX_IMAGE;
use super::damage::{Rect, Region};
use super::error::{SessionError, code};
use super::gpu::HostBlob;

/// Host memory one application may hold, in bytes.
pub const MAX_BYTES: usize = 1 << 29;
/// Host memory kept for reuse.
const MAX_SPARE_BYTES: usize = 64 << 20;
/// Pieces of host memory kept for reuse.
const MAX_SPARES: usize = 8;
/// Pools one application may have; each holds a descriptor.
const MAX_POOLS: usize = 256;

/// An application's pool: a file, read when a buffer in it is committed.
#[derive(Debug)]
pub struct Pool {
    file: OwnedFd,
    size: Cell<u32>,
    /// The host's id of the `wl_shm` it was created from.
    pub shm: u32,
}

impl Pool {
    /// A pool of `size` bytes, counted against the limit of the pools in `alive`.
    ///
    /// # Errors
    ///
    /// The application's fault: a size that is not positive, or too many pools.
    pub fn new(
        file: OwnedFd,
        size: u32,
        shm: u32,
        alive: &mut Vec<std::rc::Weak<Self>>,
    ) -> Result<Rc<Self>, SessionError> {
        if i32::try_from(size).is_ok_and(|size| size <= 0) || i32::try_from(size).is_err() {
            let text = format!("invalid size of a pool ({size})");
            return Err(SessionError::application(1, code::INVALID_METHOD, text));
        }
        alive.retain(|pool| pool.strong_count() > 0);
        if alive.len() >= MAX_POOLS {
            return Err(SessionError::application(1, code::NO_MEMORY, "too many shared-memory pools"));
        }
        let pool = Rc::new(Self { file, size: Cell::new(size), shm });
        alive.push(Rc::downgrade(&pool));
        Ok(pool)
    }

    /// Grows the pool.
    ///
    /// # Errors
    ///
    /// The application's fault if it would shrink.
    pub fn resize(&self, id: u32, size: u32) -> Result<(), SessionError> {
        if i32::try_from(size).is_err() || size < self.size.get() {
            return Err(SessionError::application(id, code::INVALID_METHOD, "shrinking pool invalid"));
        }
        self.size.set(size);
        Ok(())
    }
}

/// A piece of host memory, and the host's `wl_shm_pool` made of it.
#[derive(Debug)]
pub struct Blob {
    /// The memory.
    pub host: HostBlob,
    /// The host's id of the pool.
    pub pool: u32,
}

impl Blob {
    fn size(&self) -> usize {
        self.host.memory.len()
    }
}

/// Where a buffer lies in its pool, in bytes and pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    offset: u64,
    /// Pixels.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// Bytes from row to row.
    pub stride: u32,
    /// Bytes of a pixel; 0 if not known.
    pixel: u32,
}

impl Layout {
    /// Checks the arguments of `wl_shm_pool.create_buffer` (offset, width, height, stride, format) against the pool.
    ///
    /// # Errors
    ///
    /// The application's fault if the buffer is empty, too large or not inside the pool.
    pub fn new(pool: &Pool, id: u32, [offset, width, height, stride, format]: [u32; 5]) -> Result<Self, SessionError> {
        let invalid = || {
            let text = format!("invalid buffer: {width}x{height}, stride {stride}, offset {offset}");
            SessionError::application(id, code::SHM_INVALID_STRIDE, text)
        };
        let pixel = bytes_per_pixel(format);
        let signed = |value: u32| i32::try_from(value).is_ok();
        if ![offset, width, height, stride].into_iter().all(signed) || width == 0 || height == 0 || stride == 0 {
            return Err(invalid());
        }
        let end = u64::from(stride) * u64::from(height) + u64::from(offset);
        if end > u64::from(pool.size.get()) || u64::from(stride) < u64::from(width) * u64::from(pixel) {
            return Err(invalid());
        }
        Ok(Self { offset: u64::from(offset), width, height, stride, pixel })
    }

    /// Bytes of the whole buffer.
    pub fn bytes(&self) -> usize {
        usize::try_from(u64::from(self.stride) * u64::from(self.height)).unwrap_or(usize::MAX)
    }

    /// The runs of bytes `(start, length)` that hold `rect`, relative to the buffer's start.
    ///
    /// Whole rows in one run where that copies at most twice of what is needed: a system call costs as much as some
    /// kilobytes.
    fn runs(&self, rect: Rect) -> impl Iterator<Item = (usize, usize)> + use<> {
        let to_usize = |value: u64| usize::try_from(value).unwrap_or(usize::MAX);
        let [stride, pixel] = [u64::from(self.stride), u64::from(self.pixel)];
        let rows = u64::from(rect.y1 - rect.y0);
        let narrow = u64::from(rect.x1 - rect.x0) * pixel;
        let whole = pixel == 0 || narrow * 2 > stride;
        let (count, start, len) =
            if whole { (1, 0, rows * stride) } else { (rows, u64::from(rect.x0) * pixel, narrow) };
        let first = u64::from(rect.y0) * stride + start;
        (0..count).map(move |row| (to_usize(first + row * stride), to_usize(len)))
    }
}

/// Bytes of a pixel of a `wl_shm` format, 0 if the proxy does not know it (then whole rows are copied).
fn bytes_per_pixel(format: u32) -> u32 {
    let fourcc = format.to_le_bytes();
    match &fourcc {
        // argb8888 and xrgb8888 have numbers of their own
        [0 | 1, 0, 0, 0] => 4,
        [b'A' | b'X', b'R' | b'B', b'2' | b'3', b'4' | b'0'] | [b'R' | b'B', b'A' | b'X', b'2' | b'3', b'4' | b'0'] => {
            4
        }
        _ => 0,
    }
}

/// A `wl_buffer` out of a pool.
#[derive(Debug)]
pub struct Buffer {
    pool: Rc<Pool>,
    /// Its place in the pool.
    pub layout: Layout,
    /// Its host memory.
    pub blob: Blob,
    /// Tells buffers apart that had the same id.
    pub serial: u64,
    /// The surface it was last committed to; its contents are what that surface showed then.
    pub surface: u32,
    /// What the application may have changed since the last copy.
    pub stale: Region,
    /// Committed, and not released by the host since.
    pub busy: bool,
}

impl Buffer {
    /// A buffer of which nothing has been copied yet.
    pub fn new(pool: Rc<Pool>, layout: Layout, blob: Blob, serial: u64) -> Self {
        Self { pool, layout, blob, serial, surface: 0, stale: Region::everything(), busy: false }
    }

    /// Copies what is stale from the application's file to the host.
    ///
    /// # Errors
    ///
    /// The application's fault if its file is shorter than it said or cannot be read.
    pub fn copy(&mut self, id: u32) -> Result<(), SessionError> {
        let stale = std::mem::take(&mut self.stale);
        let layout = self.layout;
        for rect in stale.rects().iter().filter_map(|rect| rect.clip(layout.width, layout.height)) {
            for (start, len) in layout.runs(rect) {
                self.copy_run(start, len).map_err(|error| {
                    let text = format!("the memory of a buffer cannot be read: {error}");
                    SessionError::application(id, code::SHM_INVALID_FD, text)
                })?;
            }
        }
        Ok(())
    }

    fn copy_run(&mut self, start: usize, len: usize) -> io::Result<()> {
        let from = u64::try_from(start).ok().and_then(|start| self.layout.offset.checked_add(start));
        let from = from.ok_or(io::ErrorKind::InvalidInput)?;
        self.blob.host.memory.read_file(start, self.pool.file.as_fd(), from, len)
    }
}

/// The size a piece of host memory gets for `bytes`: whole pages, in steps of at most an eighth, so that few sizes occur.
pub fn size_class(bytes: usize) -> Option<usize> {
    if bytes > MAX_IMAGE {
        return None;
    }
    let step = (bytes.next_power_of_two() / 16).max(4096);
    Some(bytes.max(1).next_multiple_of(step))
}

/// The host memory of one application: what is in use is counted, what is not is kept for reuse.
#[derive(Debug, Default)]
pub struct Store {
    spare: Vec<Blob>,
    used: usize,
}

impl Store {
    /// Counts a piece of `size` bytes as in use.
    ///
    /// # Errors
    ///
    /// The application's fault if that is too much.
    pub fn reserve(&mut self, size: usize) -> Result<(), SessionError> {
        let used = self.used.saturating_add(size);
        if used > MAX_BYTES {
            return Err(SessionError::application(1, code::NO_MEMORY, "too much memory in buffers"));
        }
        self.used = used;
        Ok(())
    }

    /// A spare piece of exactly `size` bytes.
    pub fn take(&mut self, size: usize) -> Option<Blob> {
        let at = self.spare.iter().rposition(|blob| blob.size() == size)?;
        Some(self.spare.remove(at))
    }

    /// A piece is no longer in use. `reusable` unless the host may still read it. Returns what must be destroyed.
    pub fn give_back(&mut self, blob: Blob, reusable: bool) -> Vec<Blob> {
        self.used = self.used.saturating_sub(blob.size());
        if !reusable {
            return vec![blob];
        }
        self.spare.push(blob);
        let mut surplus = Vec::new();
        while self.spare.len() > MAX_SPARES || self.spare.iter().map(Blob::size).sum::<usize>() > MAX_SPARE_BYTES {
            surplus.push(self.spare.remove(0));
        }
        surplus
    }

    /// Gives up everything that is spare.
    pub fn drain(&mut self) -> Vec<Blob> {
        std::mem::take(&mut self.spare)
    }
}

#[cfg(test)]
mod tests;
