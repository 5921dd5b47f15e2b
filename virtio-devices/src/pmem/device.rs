//! The device itself: configuration space and the flush queue.

use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use block::image::Image;
use virtio_bindings::virtio_ids::VIRTIO_ID_PMEM;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::{Bytes, GuestAddressSpace};

use super::{KIND, STATE_VERSION, State};
use crate::device::{Active, Broken, Chain, ConfigSpace, Device, Memory, SavedState, Traits, WindowAddress};
use crate::mapping::Mapping;

const QUEUE_SIZE: u16 = 64;

/// The only request (virtio 1.3 section 5.19.6), a little-endian u32; so is the answer, 0 or -1.
const VIRTIO_PMEM_REQ_TYPE_FLUSH: u32 = 0;
const DONE: u32 = 0;
const FAILED: u32 = u32::MAX;

/// Persistent memory device.
pub struct Pmem {
    pub(super) image: Image,
    pub(super) path: PathBuf,
    pub(super) window: WindowAddress,
    /// Host memory of the window.
    pub(super) mapping: Arc<Mutex<Mapping>>,
    pub(super) state: State,
}

impl Pmem {
    /// What the window shows at `offset` to a guest that has written nothing: the image, and zeroes behind its end.
    fn original(&self, offset: u64, page: &mut [u8]) -> io::Result<()> {
        page.fill(0);
        let len = self.image.size().saturating_sub(offset).min(page.len() as u64);
        let part = usize::try_from(len).ok().and_then(|len| page.get_mut(..len));
        self.image.file().read_exact_at(part.unwrap_or_default(), offset)
    }

    /// Everything the guest has written up to now is on disk after this.
    fn flush(&self) -> bool {
        if self.state.discard_writes {
            return true;
        }
        match self.image.file().sync_data() {
            Ok(()) => true,
            Err(e) => {
                log::error!("pmem: cannot write the image to disk: {e}");
                false
            }
        }
    }
}

/// The request's type, from the first readable buffer.
fn request_type(chain: &Chain, mem: &Memory) -> Option<u32> {
    let descriptor = chain.clone().readable().next()?;
    if descriptor.len() < 4 {
        return None;
    }
    let mut bytes = [0; 4];
    mem.read_slice(&mut bytes, descriptor.addr()).ok()?;
    Some(u32::from_le_bytes(bytes))
}

/// Writes the answer into the first writable buffer and says how many bytes that were.
fn answer(chain: Chain, mem: &Memory, value: u32) -> u32 {
    match chain.writable().next() {
        Some(descriptor) if descriptor.len() >= 4 => {
            mem.write_slice(&value.to_le_bytes(), descriptor.addr()).map_or(0, |()| 4)
        }
        _ => 0,
    }
}

impl Device for Pmem {
    fn traits(&self) -> Traits {
        let config = [self.window.guest.0.to_le_bytes(), self.window.len.to_le_bytes()].concat();
        Traits {
            device_type: VIRTIO_ID_PMEM,
            features: 1 << VIRTIO_RING_F_EVENT_IDX,
            queue_sizes: vec![QUEUE_SIZE],
            config: ConfigSpace::read_only(config),
            shared_memory: None,
        }
    }

    fn queue(&mut self, active: &mut Active, index: u16) -> Result<(), Broken> {
        let mem = active.mem.memory();
        let queue = active.queue(index)?;
        // What is in the queue now needs one flush together: each request covers only writes that came before it.
        let mut requests = Vec::new();
        while let Some(chain) = queue.pop()? {
            let known = request_type(&chain, &mem) == Some(VIRTIO_PMEM_REQ_TYPE_FLUSH);
            requests.push((chain, known));
        }
        let flushed = requests.iter().any(|(_, known)| *known) && self.flush();
        for (chain, known) in requests {
            let head = chain.head_index();
            let len = answer(chain, &mem, if known && flushed { DONE } else { FAILED });
            queue.push(head, len)?;
        }
        queue.notify()
    }

    /// What the guest has written with `discard_writes`, and to the padding, is neither in its RAM nor in the image, and so in
    /// no snapshot. A guest that found other bytes there afterwards would take its file system for damaged, so it is not
    /// saved.
    fn can_save(&self) -> Result<(), String> {
        let path = self.path.display();
        // With the end of a file go the guest's copies of it, too.
        let found = self.image.file().metadata().map_err(|e| format!("cannot look at {path}: {e}"))?;
        if found.is_file() && found.len() < self.image.size() {
            return Err(format!("{path} has become shorter than it was when the machine was started"));
        }
        let mapping = self.mapping.lock().unwrap_or_else(PoisonError::into_inner);
        let (start, what) = match self.state.discard_writes {
            true => (0, "with discard_writes=on"),
            false => (super::image_pages(&self.image, mapping.len()), "behind its end"),
        };
        let Some(len) = mapping.len().checked_sub(start).filter(|len| *len > 0) else { return Ok(()) };
        match mapping.first_changed_page(start, len, |offset, page| self.original(offset, page)) {
            Ok(None) => Ok(()),
            Ok(Some(offset)) => Err(format!(
                "the guest has written to {path} (at {offset:#x}, {what}), and that would be lost; save the machine \
                 before it does, or use an image that it only reads"
            )),
            Err(e) => Err(format!("it cannot be found out whether the guest has written to {path}: {e}")),
        }
    }

    fn save(&self) -> SavedState {
        SavedState::new(KIND.name, STATE_VERSION, &self.state)
    }
}
