//! A context as the engine knows it: its rings, and what the guest may use because the host or rutabaga told it.
#![allow(missing_docs, reason = "private to the engine; the names are the protocol's")]

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};

use virtio_devices::device::Memory;
use virtio_devices::gpu::RendererError;
use vm_memory::{Bytes, GuestAddress, MmapRegion, VolatileMemory};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::validate::{ID_BLOB, ID_WRITE_PIPE, Image, Message, PipeData, cmd};

/// A ring is one page.
pub const RING: usize = 4096;

/// The answer to GET_IMAGE_REQUIREMENTS.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Requirements {
    pub layout: [U32; 8],
    pub modifier: U64,
    pub size: U64,
    pub blob_id: U32,
    pub map_info: U32,
    pub devices: [U32; 2],
}

/// A page lent to rutabaga, and the page of the guest it stands for.
pub struct Ring {
    pub page: MmapRegion<()>,
    pub guest: GuestAddress,
    /// Its number in rutabaga: the guest may forget its resource and use the number again.
    pub id: u32,
}

impl Ring {
    /// What rutabaga wrote.
    pub fn read(&self) -> Result<[u8; RING], RendererError> {
        let mut bytes = [0; RING];
        let slice = self.page.get_slice(0, RING).map_err(|e| RendererError::Failed(e.to_string()))?;
        slice.copy_to(&mut bytes);
        Ok(bytes)
    }
}

/// Writes into a ring of the guest. If it is no memory any more, the guest does not hear of it.
pub fn publish(mem: &Memory, to: GuestAddress, bytes: &[u8]) {
    if let Err(e) = mem.write_slice(bytes, to) {
        log::debug!("a ring of the guest is not in its memory: {e}");
    }
}

/// A context of the guest.
#[derive(Default)]
pub struct Context {
    pub attached: BTreeSet<u32>,
    pub query: Option<Ring>,
    /// The ring for events, of a connected context.
    pub channel: Option<Ring>,
    /// INIT was tried: rutabaga allows it once.
    pub initialised: bool,
    /// A fence is with rutabaga.
    pub armed: bool,
    /// The ring has an event that no fence has announced.
    pub ripe: bool,
    /// Nothing more is read from the host: the guest has left too many files unused.
    pub ended: bool,
    pub waiting: VecDeque<u64>,
    pub images: HashMap<Image, Requirements>,
    pub image_ids: HashSet<u32>,
    /// Blobs received and not made resources of.
    pub blobs: BTreeSet<u32>,
    pub write_pipes: BTreeSet<u32>,
    /// The number of the pipe made last; nothing if it is not known any more.
    pub last_pipe: Option<u32>,
    pub read_pipes: usize,
}

impl Context {
    /// Remembers what an event tells the guest it may use.
    pub fn learn(&mut self, event: &[u8]) {
        match event.first() {
            Some(&cmd::RECEIVE) => {
                let Ok((message, _)) = Message::ref_from_prefix(event) else { return };
                let count = usize::try_from(message.num_identifiers.get()).unwrap_or(usize::MAX);
                for (identifier, kind) in message.identifiers.iter().zip(&message.types).take(count) {
                    match kind.get() {
                        ID_BLOB => drop(self.blobs.insert(identifier.get())),
                        ID_WRITE_PIPE => drop(self.write_pipes.insert(identifier.get())),
                        _ => {}
                    }
                }
            }
            Some(&cmd::READ) => {
                let ended = PipeData::ref_from_prefix(event).is_ok_and(|(data, _)| data.hang_up.get() != 0);
                self.read_pipes = self.read_pipes.saturating_sub(usize::from(ended));
            }
            _ => {}
        }
    }
}

/// A received message of no bytes: the end of the connection.
pub fn end_event() -> [u8; size_of::<Message>()] {
    let mut event = [0; size_of::<Message>()];
    if let Some(first) = event.first_mut() {
        *first = cmd::RECEIVE;
    }
    event
}
