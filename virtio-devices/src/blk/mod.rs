//! Block device (virtio 1.3 section 5.2): a raw image, or a block device of the host.
//!
//! [`parse`] understands what the driver wants without doing anything, `device` does it with an engine of the `block`
//! crate. The format of an image is never guessed from its content: a file that looks like another format than raw
//! is refused unless the configuration says `image_type=raw`.

mod device;
pub mod parse;
#[cfg(test)]
mod tests;

use block::engine::{Engine, SyncFile};
use block::image::{Access, Error as ImageError, Image};
use serde::{Deserialize, Serialize};
use vmm_config::{DiskConfig, HostFacts, ImageType, VmConfig};

pub use device::Blk;
use device::{Form, ID_BYTES};

use crate::device::SavedState;
use crate::registry::{BuildContext, BuildError, Built, Kind, Request, Syscall, no_window};

/// The kind's entry in the registry.
pub const KIND: Kind = Kind { name: "disk", requests, map: no_window, build, syscalls: SYSCALLS };

const STATE_VERSION: u32 = 1;

/// Block size where the page cache is gone around: what every disk of today takes.
const DIRECT_BLOCK: u32 = 4096;
const BLOCK: u32 = 512;

/// Entries of a queue, and queues, are not more than this, whatever the configuration asks for.
const MAX_QUEUE_SIZE: u16 = 1024;
const MAX_QUEUES: u16 = 16;

/// What a snapshot says of the device: what the driver was told. The image is not part of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    /// Size in sectors of 512 bytes.
    sectors: u64,
    /// The driver cannot write.
    read_only: bool,
    /// Discards were offered.
    discard: bool,
    /// Writing zeroes was offered.
    write_zeroes: bool,
}

fn requests(config: &VmConfig, _facts: &HostFacts) -> Vec<Request> {
    let request = |(index, disk): (usize, &DiskConfig)| Request {
        id: disk.id.clone().unwrap_or_else(|| format!("_disk{index}")),
        index,
        window: None,
    };
    config.disks.iter().enumerate().map(request).collect()
}

fn build(ctx: BuildContext<'_>) -> Result<Built, BuildError> {
    create(&ctx.request.id, ctx.config.disks.get(ctx.request.index), ctx.saved)
}

fn create(id: &str, config: Option<&DiskConfig>, saved: Option<&SavedState>) -> Result<Built, BuildError> {
    let other = |reason: String| BuildError::Other { device: id.to_owned(), reason };
    let config = config.ok_or_else(|| other("it has no configuration".into()))?;
    let name = config.path.display();
    let image = open(id, config)?;
    check_format(config, &image).map_err(|e| other(format!("{name} {e}")))?;
    let block_size = if config.direct { DIRECT_BLOCK } else { BLOCK };
    let whole = image.size() - image.size() % u64::from(block_size);
    if whole == 0 {
        return Err(other(format!("{name} has less than the {block_size} bytes of one block")));
    }
    if whole != image.size() {
        log::warn!(
            "{id}: the last {} bytes of {name} are no whole block; the guest does not see them",
            image.size() - whole
        );
    }
    let engine = SyncFile::new(image, config.sparse, !config.readonly);
    let abilities = engine.abilities();
    let mut state = State {
        sectors: whole / parse::SECTOR,
        read_only: config.readonly,
        discard: abilities.discard,
        write_zeroes: abilities.write_zeroes,
    };
    if let Some(saved) = saved {
        state = check_saved(saved, &state).map_err(|e| other(format!("{name}: {e}")))?;
    }
    let form = Form {
        serial: serial(config.serial.as_deref().unwrap_or(id)),
        block_size,
        queue_size: config.queue_size.clamp(4, MAX_QUEUE_SIZE),
        queues: config.num_queues.clamp(1, MAX_QUEUES),
    };
    if (form.queue_size, form.queues) != (config.queue_size, config.num_queues) {
        log::warn!(
            "{id}: has {} queues of {} entries instead of {} of {}",
            form.queues,
            form.queue_size,
            config.num_queues,
            config.queue_size
        );
    }
    Ok(Built::new(Blk::new(Box::new(engine), form, state)))
}

fn open(id: &str, config: &DiskConfig) -> Result<Image, BuildError> {
    let access = if config.readonly { Access::ReadOnly } else { Access::ReadWrite };
    Image::open(&config.path, access, config.direct).map_err(|e| match e {
        ImageError::Open(source) => BuildError::Open { device: id.to_owned(), path: config.path.clone(), source },
        e => BuildError::Other { device: id.to_owned(), reason: format!("cannot use {}: {e}", config.path.display()) },
    })
}

/// Refuses what is not raw, or does not look raw and is not said to be.
fn check_format(config: &DiskConfig, image: &Image) -> Result<(), String> {
    match config.image_type {
        Some(ImageType::Raw) => return Ok(()),
        None | Some(ImageType::Unknown) => {}
        Some(other) => {
            return Err(format!(
                "cannot be used as {other:?}: only raw images are supported; convert it with qemu-img"
            ));
        }
    }
    match block::format::detect(image.file(), image.size()) {
        Ok(None) => Ok(()),
        Ok(Some(format)) => Err(format!(
            "looks like a {format} image, and only raw images are supported; convert it with qemu-img convert -O raw, \
             or say image_type=raw if its bytes are the disk's"
        )),
        Err(e) => Err(format!("cannot be read: {e}")),
    }
}

/// At most [`ID_BYTES`] bytes, the rest zeroes.
fn serial(text: &str) -> [u8; ID_BYTES] {
    let mut serial = [0; ID_BYTES];
    for (to, from) in serial.iter_mut().zip(text.bytes()) {
        *to = from;
    }
    serial
}

/// What the driver of a snapshot was told, if this image can keep it.
fn check_saved(saved: &SavedState, now: &State) -> Result<State, String> {
    let then: State = saved.read(KIND.name, STATE_VERSION).map_err(|e| e.to_string())?;
    if then.sectors != now.sectors {
        return Err(format!(
            "the image has {} sectors, but had {} when the snapshot was taken; use the same image",
            now.sectors, then.sectors
        ));
    }
    if then.read_only != now.read_only {
        return Err("readonly was different when the snapshot was taken".into());
    }
    // What this file system cannot do any more is answered with an error when it is asked for.
    Ok(then)
}

const SYSCALLS: &[Syscall] = &[
    Syscall { number: libc::SYS_preadv, why: "read the image into guest memory" },
    Syscall { number: libc::SYS_pwritev, why: "write guest memory to the image" },
    Syscall { number: libc::SYS_fdatasync, why: "flush the image" },
    Syscall { number: libc::SYS_fallocate, why: "discard and zero blocks" },
];
