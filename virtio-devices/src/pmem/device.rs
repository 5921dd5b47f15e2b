//! The device itself: configuration space and the flush queue.

use block::image::Image;
use virtio_bindings::virtio_ids::VIRTIO_ID_PMEM;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::{Bytes, GuestAddressSpace};

use super::{KIND, STATE_VERSION, State};
use crate::device::{Active, Broken, Chain, ConfigSpace, Device, Memory, SavedState, Traits, WindowAddress};

const QUEUE_SIZE: u16 = 64;

/// The only request (virtio 1.3 section 5.19.6), a little-endian u32; so is the answer, 0 or -1.
const VIRTIO_PMEM_REQ_TYPE_FLUSH: u32 = 0;
const DONE: u32 = 0;
const FAILED: u32 = u32::MAX;

/// Persistent memory device.
pub struct Pmem {
    image: Image,
    window: WindowAddress,
    state: State,
}

impl Pmem {
    pub(super) fn new(image: Image, window: WindowAddress, state: State) -> Self {
        Self { image, window, state }
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

    fn save(&self) -> SavedState {
        SavedState::new(KIND.name, STATE_VERSION, &self.state)
    }
}
