//! Persistent memory (virtio 1.3 section 5.19): a file the guest reads and writes as memory, with DAX.
//!
//! The file is mapped once, into the window the VMM chose, and the guest's accesses never reach the device. The device
//! only answers the driver's wish to have everything on disk.
//!
//! With `discard_writes` the mapping is private and writable, and the memory slot too. Pages the guest only reads stay
//! the host's page cache, shared by all machines with the same image: on a read fault KVM asks for the page without
//! write intent and makes it writable only if the host's page table entry already is, which it is not for a clean page
//! of a private mapping. The first write to a page gets a copy. Such copies are part of no snapshot, so a machine that has
//! some is not saved. With `copy` it is the mapping of a copy in memory.

mod device;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};

use block::image::{Access, Error as ImageError, Image};
use rustix::fs::{MemfdFlags, memfd_create};
use serde::{Deserialize, Serialize};
use vmm_config::{HostFacts, PmemConfig, VmConfig};

pub use device::Pmem;

use crate::device::{SavedState, WindowAddress};
use crate::mapping::{self, Mapping, PAGE_SIZE};
use crate::registry::{
    BuildContext, BuildError, Built, Kind, Request, Syscall, WindowContext, WindowMemory, WindowRequest,
};

/// The kind's entry in the registry.
pub const KIND: Kind = Kind { name: "pmem", requests, map, build, syscalls: SYSCALLS };

/// The window's length is a multiple of this, in bytes: what Linux asks of persistent memory regions.
const ALIGNMENT: u64 = 2 << 20;

/// Bytes of an image that are copied at once.
const COPIED_AT_ONCE: usize = 64 << 10;

const STATE_VERSION: u32 = 1;

/// What a snapshot says of the device. The image itself is not part of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    /// Size of the image in bytes.
    image_size: u64,
    /// Whether the guest's writes were thrown away.
    discard_writes: bool,
}

fn requests(config: &VmConfig, facts: &HostFacts) -> Vec<Request> {
    let request = |(index, pmem): (usize, &PmemConfig)| Request {
        id: pmem.id.clone().unwrap_or_else(|| format!("_pmem{index}")),
        index,
        // A file that is not there gets the smallest window; building the device then says what is wrong.
        window: Some(WindowRequest::Range {
            len: window_len(pmem.size.or_else(|| facts.file_size(&pmem.file)).unwrap_or(0)),
        }),
    };
    config.pmem.iter().enumerate().map(request).collect()
}

/// `size` rounded up to what a window can be.
fn window_len(size: u64) -> u64 {
    size.max(1).checked_next_multiple_of(ALIGNMENT).unwrap_or(u64::MAX - (ALIGNMENT - 1))
}

fn map(ctx: WindowContext<'_>) -> Result<WindowMemory, BuildError> {
    show(&ctx.request.id, ctx.config.pmem.get(ctx.request.index), ctx.len)
}

fn build(ctx: BuildContext<'_>) -> Result<Built, BuildError> {
    create(&ctx.request.id, ctx.config.pmem.get(ctx.request.index), ctx.window, ctx.saved)
}

/// Maps the image into a window of `len` bytes.
fn show(id: &str, config: Option<&PmemConfig>, len: u64) -> Result<WindowMemory, BuildError> {
    let other = |reason: String| BuildError::Other { device: id.to_owned(), reason };
    let config = config.ok_or_else(|| other("it has no configuration".into()))?;
    let image = open(id, config)?;
    let name = config.file.display();
    if image.size() == 0 {
        return Err(other(format!("{name} is empty; a persistent memory image needs at least one byte")));
    }
    if config.size.is_none() && image.size() > len {
        let size = image.size();
        return Err(other(format!("{name} has grown to {size} bytes, the guest has {len} for it; start it again")));
    }
    let mapping = map_image(&image, len, config).map_err(|e| other(format!("{name}: {e}")))?;
    Ok(WindowMemory { mapping: Arc::new(Mutex::new(mapping)), image: Some(image) })
}

fn create(
    id: &str,
    config: Option<&PmemConfig>,
    window: Option<(WindowAddress, WindowMemory)>,
    saved: Option<&SavedState>,
) -> Result<Built, BuildError> {
    let other = |reason: String| BuildError::Other { device: id.to_owned(), reason };
    let config = config.ok_or_else(|| other("it has no configuration".into()))?;
    let (window, memory) = window.ok_or_else(|| other("it was given no guest addresses".into()))?;
    let image = memory.image.ok_or_else(|| other("no image was mapped for it".into()))?;
    let state = State { image_size: image.size(), discard_writes: config.discard_writes };
    if let Some(saved) = saved {
        check_saved(saved, &state).map_err(|e| other(format!("{}: {e}", config.file.display())))?;
    }
    Ok(Built::new(Pmem { image, path: config.file.clone(), window, mapping: memory.mapping, state }))
}

fn open(id: &str, config: &PmemConfig) -> Result<Image, BuildError> {
    let access = if config.discard_writes { Access::ReadOnly } else { Access::ReadWrite };
    Image::open(&config.file, access, false).map_err(|e| match e {
        ImageError::Open(e) if !config.discard_writes && is_permission(&e) => BuildError::Other {
            device: id.to_owned(),
            reason: format!(
                "cannot open {} for writing: {e}; use discard_writes=on for an image that is only read",
                config.file.display()
            ),
        },
        ImageError::Open(source) => BuildError::Open { device: id.to_owned(), path: config.file.clone(), source },
        e => BuildError::Other { device: id.to_owned(), reason: format!("cannot use {}: {e}", config.file.display()) },
    })
}

fn is_permission(e: &io::Error) -> bool {
    matches!(e.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem)
}

/// Bytes of a window of `len` bytes that show the image, the partial last page included.
fn image_pages(image: &Image, len: u64) -> u64 {
    image.size().checked_next_multiple_of(PAGE_SIZE).unwrap_or(len).min(len)
}

/// Maps the image at the start of the window, the partial last page included, and zero pages after it.
fn map_image(image: &Image, len: u64, config: &PmemConfig) -> io::Result<Mapping> {
    let mut mapping = Mapping::reserve(len).map_err(io::Error::other)?;
    let pages = image_pages(image, len);
    let access = if config.discard_writes { mapping::Access::Private } else { mapping::Access::Shared };
    let copy = if config.copy { Some(copy_of(image, pages)?) } else { None };
    let file = copy.as_ref().map_or(image.as_fd(), AsFd::as_fd);
    mapping.map_file(0, pages, file, 0, access).map_err(io::Error::other)?;
    if pages < len {
        mapping.map_zero(pages, len - pages, true).map_err(io::Error::other)?;
    }
    Ok(mapping)
}

/// A file in memory with what is in the image, `len` bytes long.
fn copy_of(image: &Image, len: u64) -> io::Result<File> {
    let copy = File::from(memfd_create("image", MemfdFlags::CLOEXEC)?);
    copy.set_len(len)?;
    let end = image.size().min(len);
    let mut part = vec![0; COPIED_AT_ONCE];
    let mut offset = 0;
    while offset < end {
        let n = usize::try_from(end - offset).unwrap_or(usize::MAX).min(COPIED_AT_ONCE);
        let part = part.get_mut(..n).unwrap_or_default();
        image.file().read_exact_at(part, offset)?;
        // Zeroes are there already, and take no room.
        if part.iter().any(|byte| *byte != 0) {
            copy.write_all_at(part, offset)?;
        }
        offset = offset.saturating_add(n as u64);
    }
    Ok(copy)
}

/// Whether a snapshot's device is this one. The guest knows what was on the image, so another image would break it.
fn check_saved(saved: &SavedState, now: &State) -> Result<(), String> {
    let then: State = saved.read(KIND.name, STATE_VERSION).map_err(|e| e.to_string())?;
    if then.image_size != now.image_size {
        return Err(format!(
            "the image has {} bytes, but had {} when the snapshot was taken; use the same image",
            now.image_size, then.image_size
        ));
    }
    if then.discard_writes != now.discard_writes {
        return Err("discard_writes was different when the snapshot was taken".into());
    }
    Ok(())
}

const SYSCALLS: &[Syscall] =
    &[Syscall { number: libc::SYS_fdatasync, why: "write the image to disk when the guest asks for it" }];
