//! Structures and numbers of virtio-gpu (virtio 1.3 section 5.7.6), as far as cross-domain contexts need them.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// VIRTIO_GPU_F_VIRGL: Linux asks for it before it creates any context, whatever its kind.
pub const F_VIRGL: u32 = 0;
/// VIRTIO_GPU_F_RESOURCE_BLOB.
pub const F_RESOURCE_BLOB: u32 = 3;
/// VIRTIO_GPU_F_CONTEXT_INIT.
pub const F_CONTEXT_INIT: u32 = 4;

/// The shared memory region in which host blobs are shown (VIRTIO_GPU_SHM_ID_HOST_VISIBLE).
pub const SHM_HOST_VISIBLE: u8 = 1;

/// The request is fenced: its answer waits until the fence is reached.
pub const FLAG_FENCE: u32 = 1;
/// The fence is on the timeline of a context's ring.
pub const FLAG_INFO_RING_IDX: u32 = 2;

/// Bits of `context_init` that hold the capability set.
pub const CONTEXT_INIT_CAPSET_MASK: u32 = 0xff;

/// Blob in guest memory.
pub const BLOB_MEM_GUEST: u32 = 1;
/// Blob in memory of the host.
pub const BLOB_MEM_HOST3D: u32 = 2;

/// The guest's mapping of a blob is to be cached.
pub const MAP_CACHE_CACHED: u32 = 1;

/// Request types.
pub mod cmd {
    #![allow(missing_docs)]
    pub const RESOURCE_UNREF: u32 = 0x102;
    pub const GET_CAPSET_INFO: u32 = 0x108;
    pub const GET_CAPSET: u32 = 0x109;
    pub const RESOURCE_CREATE_BLOB: u32 = 0x10c;
    pub const CTX_CREATE: u32 = 0x200;
    pub const CTX_DESTROY: u32 = 0x201;
    pub const CTX_ATTACH_RESOURCE: u32 = 0x202;
    pub const CTX_DETACH_RESOURCE: u32 = 0x203;
    pub const SUBMIT_3D: u32 = 0x207;
    pub const RESOURCE_MAP_BLOB: u32 = 0x208;
    pub const RESOURCE_UNMAP_BLOB: u32 = 0x209;
}

/// Answer types.
pub mod resp {
    #![allow(missing_docs)]
    pub const OK_NODATA: u32 = 0x1100;
    pub const OK_CAPSET_INFO: u32 = 0x1102;
    pub const OK_CAPSET: u32 = 0x1103;
    pub const OK_MAP_INFO: u32 = 0x1106;
    pub const ERR_UNSPEC: u32 = 0x1200;
    pub const ERR_OUT_OF_MEMORY: u32 = 0x1201;
    pub const ERR_INVALID_RESOURCE_ID: u32 = 0x1203;
    pub const ERR_INVALID_CONTEXT_ID: u32 = 0x1204;
    pub const ERR_INVALID_PARAMETER: u32 = 0x1205;
}

/// Begins every request and every answer.
#[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Header {
    /// Request or answer type.
    pub kind: U32,
    /// FLAG_*.
    pub flags: U32,
    /// The fence.
    pub fence_id: U64,
    /// The context the request is for, 0 if none.
    pub ctx_id: U32,
    /// The ring of the fence.
    pub ring_idx: u8,
    /// Nothing.
    pub padding: [u8; 3],
}

/// The device's configuration space.
#[derive(Debug, Clone, Copy, Default, IntoBytes, Immutable, Unaligned)]
#[repr(C)]
pub struct Config {
    /// Pending events for the driver.
    pub events_read: U32,
    /// Events the driver has seen.
    pub events_clear: U32,
    /// Number of scanouts.
    pub num_scanouts: U32,
    /// Number of capability sets; Linux waits 5 s for each that does not exist.
    pub num_capsets: U32,
}

/// Body of requests that are a resource and one more word: UNREF, CTX_ATTACH, CTX_DETACH, UNMAP_BLOB.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct ResourceBody {
    /// The resource.
    pub resource_id: U32,
    /// Nothing.
    pub padding: U32,
}

/// Body of GET_CAPSET_INFO (index, padding) and GET_CAPSET (id, version).
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct CapsetBody {
    /// Index or id.
    pub which: U32,
    /// Version, or nothing.
    pub version: U32,
}

/// Body of the answer to GET_CAPSET_INFO.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct CapsetInfo {
    /// The capability set.
    pub id: U32,
    /// Its highest version.
    pub max_version: U32,
    /// Its size in bytes.
    pub max_size: U32,
    /// Nothing.
    pub padding: U32,
}

/// Body of RESOURCE_CREATE_BLOB; memory entries follow.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct CreateBlobBody {
    /// The new resource.
    pub resource_id: U32,
    /// BLOB_MEM_*.
    pub blob_mem: U32,
    /// What the guest means to do with it.
    pub blob_flags: U32,
    /// How many [`MemEntry`] follow.
    pub nr_entries: U32,
    /// The context's name for the memory.
    pub blob_id: U64,
    /// Bytes.
    pub size: U64,
}

/// A part of guest memory behind a resource.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct MemEntry {
    /// Guest physical address.
    pub addr: U64,
    /// Bytes.
    pub length: U32,
    /// Nothing.
    pub padding: U32,
}

/// Body of CTX_CREATE.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct CreateContextBody {
    /// Bytes of the name that count.
    pub nlen: U32,
    /// The kind of context.
    pub context_init: U32,
    /// For people who debug.
    pub debug_name: [u8; 64],
}

/// Body of SUBMIT_3D; `size` bytes of commands follow.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct SubmitBody {
    /// Bytes of commands.
    pub size: U32,
    /// Nothing we use.
    pub num_in_fences: U32,
}

/// Body of RESOURCE_MAP_BLOB.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct MapBlobBody {
    /// The resource.
    pub resource_id: U32,
    /// Nothing.
    pub padding: U32,
    /// Where in the shared memory region.
    pub offset: U64,
}

/// Body of the answer to RESOURCE_MAP_BLOB.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct MapInfo {
    /// MAP_CACHE_*.
    pub map_info: U32,
    /// Nothing.
    pub padding: U32,
}
