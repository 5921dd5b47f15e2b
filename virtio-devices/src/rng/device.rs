//! The entropy device itself.

use std::fs::File;
use std::io::Read;

use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::{Bytes, GuestAddressSpace};

use crate::device::{Active, Broken, ConfigSpace, Device, SavedState, Traits};

const QUEUE_SIZE: u16 = 64;

/// The most bytes one request gets; a driver asks again for more (virtio 1.3 section 5.4.6.1 allows any length > 0).
const MAX_REQUEST: usize = 4096;

/// Entropy device.
pub struct Rng {
    source: File,
}

impl Rng {
    /// A device that reads from `source`, which must not block for long (`/dev/urandom`).
    #[must_use]
    pub fn new(source: File) -> Self {
        Self { source }
    }
}

impl Device for Rng {
    fn traits(&self) -> Traits {
        Traits {
            device_type: VIRTIO_ID_RNG,
            features: 1 << VIRTIO_RING_F_EVENT_IDX,
            queue_sizes: vec![QUEUE_SIZE],
            config: ConfigSpace::read_only(Vec::new()),
            shared_memory: None,
        }
    }

    fn queue(&mut self, active: &mut Active, index: u16) -> Result<(), Broken> {
        let mem = active.mem.memory();
        let queue = active.queue(index)?;
        let mut buffer = [0; MAX_REQUEST];
        while let Some(chain) = queue.pop()? {
            let head = chain.head_index();
            let mut written = 0;
            for descriptor in chain.writable() {
                let len = usize::try_from(descriptor.len()).unwrap_or(MAX_REQUEST).min(MAX_REQUEST - written);
                let Some(part) = buffer.get_mut(..len) else { break };
                if self.source.read_exact(part).is_err() || mem.write_slice(part, descriptor.addr()).is_err() {
                    break;
                }
                written += len;
            }
            queue.push(head, u32::try_from(written).unwrap_or(0))?;
        }
        queue.notify()
    }

    fn save(&self) -> SavedState {
        SavedState::new(super::KIND.name, super::STATE_VERSION, &())
    }
}
