//! Persistent memory (virtio 1.3 section 5.19): a file the guest reads and writes as memory, with DAX.
//!
//! The file is mapped once, into the window the VMM chose, and the guest's accesses never reach the device. The device
//! only answers the driver's wish to have everything on disk.
//!
//! With `discard_writes` the mapping is private and writable, and the memory slot too. Pages the guest only reads stay
//! the host's page cache, shared by all machines with the same image: on a read fault KVM asks for the page without
//! write intent and makes it writable only if the host's page table entry already is, which it is not for a clean page
//! of a private mapping. The first write to a page gets a copy. Such copies are part of no snapshot, so a machine that has
//! some is not saved.

mod device;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex};

use block::image::{Access, Error as ImageError, Image};
use serde::{Deserialize, Serialize};
use vmm_config::{HostFacts, PmemConfig, VmConfig};

pub use device::Pmem;

use crate::device::{SavedState, WindowAddress};
use crate::mapping::{self, Mapping, PAGE_SIZE};
use crate::registry::{BuildContext, BuildError, Built, Kind, Request, Syscall, WindowMemory, WindowRequest};

/// The kind's entry in the registry.
pub const KIND: Kind = Kind { name: "pmem", requests, build, syscalls: SYSCALLS };

/// The window's length is a multiple of this, in bytes: what Linux asks of persistent memory regions.
const ALIGNMENT: u64 = 2 << 20;

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

fn build(ctx: BuildContext<'_>) -> Result<Built, BuildError> {
    create(&ctx.request.id, ctx.config.pmem.get(ctx.request.index), ctx.window, ctx.saved)
}

fn create(
    id: &str,
    config: Option<&PmemConfig>,
    window: Option<WindowAddress>,
    saved: Option<&SavedState>,
) -> Result<Built, BuildError> {
    let other = |reason: String| BuildError::Other { device: id.to_owned(), reason };
    let config = config.ok_or_else(|| other("it has no configuration".into()))?;
    let window = window.ok_or_else(|| other("it was given no guest addresses".into()))?;
    let image = open(id, config)?;
    let name = config.file.display();
    if image.size() == 0 {
        return Err(other(format!("{name} is empty; a persistent memory image needs at least one byte")));
    }
    if config.size.is_none() && image.size() > window.len {
        let (size, len) = (image.size(), window.len);
        return Err(other(format!("{name} has grown to {size} bytes, the guest has {len} for it; start it again")));
    }
    let state = State { image_size: image.size(), discard_writes: config.discard_writes };
    if let Some(saved) = saved {
        check_saved(saved, &state).map_err(|e| other(format!("{name}: {e}")))?;
    }
    let mapping = map(&image, window, config.discard_writes).map_err(|e| other(format!("{name}: {e}")))?;
    let mapping = Arc::new(Mutex::new(mapping));
    let device = Pmem { image, path: config.file.clone(), window, mapping: mapping.clone(), state };
    Ok(Built { device: Box::new(device), memory: Some(WindowMemory { mapping, read_only: false }), grants: None })
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
fn map(image: &Image, window: WindowAddress, discard_writes: bool) -> Result<Mapping, mapping::Error> {
    let mut mapping = Mapping::reserve(window.len)?;
    let pages = image_pages(image, window.len);
    let access = if discard_writes { mapping::Access::Private } else { mapping::Access::Shared };
    mapping.map_file(0, pages, image.as_fd(), 0, access)?;
    if pages < window.len {
        mapping.map_zero(pages, window.len - pages, true)?;
    }
    Ok(mapping)
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
