//! The device itself: serves the control queue within bounds, and keeps requests until their fence is reached.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};

use rustix::event::EventfdFlags;
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_GPU;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryBackend};
use zerocopy::{FromBytes, IntoBytes};

use super::decode::{MAX_REQUEST, Request, decode};
use super::fences::{Fence, FenceTable, Timeline};
use super::protocol::{
    BLOB_MEM_GUEST, BLOB_MEM_HOST3D, CONTEXT_INIT_CAPSET_MASK, CapsetInfo, Config, CreateBlobBody, F_CONTEXT_INIT,
    F_RESOURCE_BLOB, F_VIRGL, FLAG_FENCE, FLAG_INFO_RING_IDX, Header, MAP_CACHE_CACHED, MapInfo, MemEntry,
    SHM_HOST_VISIBLE, resp,
};
use super::renderer::{Blob, BlobSource, Capset, Renderer, RendererError, Wake};
use super::window::{Backing, Window, WindowError};
use crate::device::{Active, Broken, Chain, ConfigSpace, Device, Memory, SavedState, SharedMemory, Traits};
use crate::mapping::Mapping;

const CONTROL: u16 = 0;
/// Every context that waits for the host keeps one descriptor of the control queue.
const CONTROL_SIZE: u16 = 1024;
const CURSOR_SIZE: u16 = 16;
/// [`Device::sources`]: the engine has something to report.
const WAKE: usize = 0;
/// The ring on which cross-domain contexts hear from the host.
const CHANNEL_RING: u8 = 1;
/// Version of the saved state.
const STATE_VERSION: u32 = 1;

/// What one guest may have at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Contexts. Each costs two threads' worth of descriptors, up to ten files, and a slot of the control queue.
    pub contexts: usize,
    /// Resources.
    pub resources: usize,
    /// Bytes of all host blobs together.
    pub blob_bytes: u64,
}

impl Limits {
    /// What goes with a window of `len` bytes.
    #[must_use]
    pub fn for_window(len: u64) -> Self {
        Self { contexts: 128, resources: 16384, blob_bytes: len.min(2 << 30) }
    }
}

/// An eventfd for the engine to wake the device with.
pub(super) fn wakeup() -> std::io::Result<OwnedFd> {
    Ok(rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)
}

/// The engine's end of a [`wakeup`].
pub(super) fn waker(wakeup: &OwnedFd) -> std::io::Result<Wake> {
    let wakeup = wakeup.try_clone()?;
    Ok(Arc::new(move || {
        // A full counter means that the device knows already.
        let _ = rustix::io::write(&wakeup, &1u64.to_ne_bytes());
    }))
}

/// An answer that has not been given yet.
struct Pending {
    chain: Chain,
    header: Header,
    body: Vec<u8>,
}

struct Resource {
    size: u64,
    host: bool,
}

/// The device's own state in a snapshot. Contexts are connections to a compositor and cannot be saved: after a restore
/// they are gone. What is saved lets the guest find that out.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Body {
    /// Connected contexts: their number, and where they expect what the host sends.
    channels: Vec<(u32, u64)>,
    /// Parts of the window that programs of the guest may have mapped: offset and length.
    mapped: Vec<(u64, u64)>,
}

/// The graphics device.
pub struct Gpu {
    config: Arc<ConfigSpace>,
    renderer: Box<dyn Renderer>,
    capsets: Vec<Capset>,
    window: Window,
    wake: OwnedFd,
    waiting: FenceTable<Pending>,
    contexts: BTreeSet<u32>,
    /// Contexts that did not survive a restore, and their rings.
    lost: BTreeMap<u32, GuestAddress>,
    resources: HashMap<u32, Resource>,
    blob_bytes: u64,
    limits: Limits,
    /// A context was destroyed, and requests may wait for it.
    orphans: bool,
    /// The request being read.
    request: Vec<u8>,
}

type Reply = Result<(u32, Vec<u8>), u32>;

const OK: Reply = Ok((resp::OK_NODATA, Vec::new()));

impl Gpu {
    /// A device with a window in front of `renderer`, which wakes it through `wake`.
    pub(super) fn new(renderer: Box<dyn Renderer>, wake: OwnedFd, window: Window, limits: Limits) -> Self {
        let capsets = renderer.capsets();
        let num_capsets = u32::try_from(capsets.len()).unwrap_or(0).into();
        let config = Config { num_capsets, ..Config::default() };
        Self {
            config: ConfigSpace::read_only(config.as_bytes().to_vec()),
            renderer,
            capsets,
            window,
            wake,
            waiting: FenceTable::default(),
            contexts: BTreeSet::new(),
            lost: BTreeMap::new(),
            resources: HashMap::new(),
            blob_bytes: 0,
            limits,
            orphans: false,
            request: Vec::new(),
        }
    }

    /// The addresses behind the window.
    #[must_use]
    pub fn window(&self) -> Arc<Mutex<Mapping>> {
        self.window.mapping()
    }

    /// Takes over what a snapshot says: which contexts there were, so that they hear that they are gone.
    pub(super) fn restore(&mut self, saved: &SavedState) -> Result<(), String> {
        let body: Body = saved.read(super::KIND.name, STATE_VERSION).map_err(|e| e.to_string())?;
        self.window.haunt(&body.mapped).map_err(|e| format!("the saved state is damaged: {e}"))?;
        let channels = body.channels.into_iter().take(self.limits.contexts);
        self.lost = channels.map(|(context, ring)| (context, GuestAddress(ring))).collect();
        Ok(())
    }

    /// Serves one chain: its answer, or nothing if there is nobody to answer to.
    fn serve(&mut self, chain: Chain, mem: &Memory) -> Result<(Pending, Option<Fence>), Chain> {
        let mut request = std::mem::take(&mut self.request);
        let result = self.serve_bytes(&chain, mem, &mut request);
        self.request = request;
        match result {
            Some((header, body, fence)) => Ok((Pending { chain, header, body }, fence)),
            None => Err(chain),
        }
    }

    fn serve_bytes(
        &mut self,
        chain: &Chain,
        mem: &Memory,
        request: &mut Vec<u8>,
    ) -> Option<(Header, Vec<u8>, Option<Fence>)> {
        let complete = read_chain(chain, mem, request);
        let (header, bytes) = Header::read_from_prefix(request).ok()?;
        let reply = match decode(&header, bytes) {
            _ if !complete => Err(resp::ERR_INVALID_PARAMETER),
            Ok(request) => self.execute(&header, &request, mem),
            Err(code) => Err(code),
        };
        let (reply, fence) = self.fenced(&header, reply);
        let (kind, body) = reply.unwrap_or_else(|code| (code, Vec::new()));
        let mut answer = Header { kind: kind.into(), ..Header::default() };
        if header.flags.get() & FLAG_FENCE != 0 {
            answer.flags = (header.flags.get() & (FLAG_FENCE | FLAG_INFO_RING_IDX)).into();
            answer.fence_id = header.fence_id;
            answer.ctx_id = header.ctx_id;
            answer.ring_idx = header.ring_idx;
        }
        Some((answer, body, fence))
    }

    /// Creates the fence a successful request asks for. A failed request is answered at once: Linux takes the fence
    /// for reached by any answer.
    fn fenced(&mut self, header: &Header, reply: Reply) -> (Reply, Option<Fence>) {
        let flags = header.flags.get();
        let context = header.ctx_id.get();
        if reply.is_err() || flags & FLAG_FENCE == 0 || self.lost.contains_key(&context) {
            return (reply, None);
        }
        let on_ring = flags & FLAG_INFO_RING_IDX != 0;
        let timeline = if on_ring { Timeline::Ring { context, ring: header.ring_idx } } else { Timeline::Device };
        let fence = Fence { timeline, id: header.fence_id.get() };
        if on_ring && !self.contexts.contains(&context) {
            return (Err(resp::ERR_INVALID_CONTEXT_ID), None);
        }
        match self.renderer.fence(fence) {
            Ok(()) => (reply, Some(fence)),
            Err(e) => (Err(code(&e)), None),
        }
    }

    fn execute(&mut self, header: &Header, request: &Request<'_>, mem: &Memory) -> Reply {
        let context = header.ctx_id.get();
        match *request {
            Request::GetCapsetInfo(index) => self.capset_info(index),
            Request::GetCapset { id, version } => {
                let capset = self.capsets.iter().find(|c| c.id == id && version <= c.version);
                capset.map(|c| (resp::OK_CAPSET, c.data.clone())).ok_or(resp::ERR_INVALID_PARAMETER)
            }
            Request::CreateBlob { ref body, entries } => self.create_blob(context, body, entries, mem),
            Request::Unref(resource) => self.unref(resource),
            Request::CreateContext { init, ref name } => self.create_context(context, init, name),
            Request::DestroyContext => self.destroy_context(context),
            Request::Attach(resource) => {
                self.known(context, resource)?;
                self.renderer.attach(context, resource).map_err(|e| code(&e)).and(OK)
            }
            Request::Detach(resource) => {
                self.known(context, resource)?;
                self.renderer.detach(context, resource).map_err(|e| code(&e)).and(OK)
            }
            Request::Submit(commands) => self.submit(header, commands, mem),
            Request::MapBlob { resource, offset } => self.map_blob(resource, offset),
            Request::UnmapBlob(resource) => {
                self.resources.get(&resource).ok_or(resp::ERR_INVALID_RESOURCE_ID)?;
                self.window.remove(resource).map_err(|e| window_code(&e)).and(OK)
            }
        }
    }

    fn capset_info(&self, index: u32) -> Reply {
        let index = usize::try_from(index).unwrap_or(usize::MAX);
        let capset = self.capsets.get(index).ok_or(resp::ERR_INVALID_PARAMETER)?;
        let info = CapsetInfo {
            id: capset.id.into(),
            max_version: capset.version.into(),
            max_size: u32::try_from(capset.data.len()).unwrap_or(0).into(),
            padding: 0.into(),
        };
        Ok((resp::OK_CAPSET_INFO, info.as_bytes().to_vec()))
    }

    fn known(&self, context: u32, resource: u32) -> Result<(), u32> {
        if !self.contexts.contains(&context) {
            return Err(resp::ERR_INVALID_CONTEXT_ID);
        }
        self.resources.get(&resource).map(drop).ok_or(resp::ERR_INVALID_RESOURCE_ID)
    }

    fn create_context(&mut self, context: u32, init: u32, name: &str) -> Reply {
        if context == 0 || self.contexts.contains(&context) {
            return Err(resp::ERR_INVALID_CONTEXT_ID);
        }
        let capset = init & CONTEXT_INIT_CAPSET_MASK;
        if !self.capsets.iter().any(|c| c.id == capset) {
            return Err(resp::ERR_INVALID_PARAMETER);
        }
        if self.contexts.len() >= self.limits.contexts {
            log::warn!("virtio-gpu: the guest has {} contexts and gets no more", self.limits.contexts);
            return Err(resp::ERR_OUT_OF_MEMORY);
        }
        self.renderer.create_context(context, init, name).map_err(|e| code(&e))?;
        self.lost.remove(&context);
        self.contexts.insert(context);
        OK
    }

    fn destroy_context(&mut self, context: u32) -> Reply {
        if self.lost.remove(&context).is_some() {
            return OK;
        }
        if !self.contexts.remove(&context) {
            return Err(resp::ERR_INVALID_CONTEXT_ID);
        }
        self.orphans = true;
        self.renderer.destroy_context(context).map_err(|e| code(&e)).and(OK)
    }

    fn create_blob(&mut self, context: u32, body: &CreateBlobBody, entries: &[MemEntry], mem: &Memory) -> Reply {
        let (resource, size) = (body.resource_id.get(), body.size.get());
        if resource == 0 || self.resources.contains_key(&resource) {
            return Err(resp::ERR_INVALID_RESOURCE_ID);
        }
        if size == 0 {
            return Err(resp::ERR_INVALID_PARAMETER);
        }
        if self.resources.len() >= self.limits.resources {
            return Err(resp::ERR_OUT_OF_MEMORY);
        }
        let (source, host) = match body.blob_mem.get() {
            BLOB_MEM_GUEST => {
                check_entries(entries, size, mem)?;
                (BlobSource::Guest(entries), false)
            }
            BLOB_MEM_HOST3D if entries.is_empty() => {
                if !self.contexts.contains(&context) {
                    return Err(resp::ERR_INVALID_CONTEXT_ID);
                }
                let total = self.blob_bytes.checked_add(size).ok_or(resp::ERR_OUT_OF_MEMORY)?;
                if total > self.limits.blob_bytes {
                    log::debug!("virtio-gpu: {total} bytes of host blobs are more than the guest may have");
                    return Err(resp::ERR_OUT_OF_MEMORY);
                }
                (BlobSource::Host { context, blob_id: body.blob_id.get() }, true)
            }
            _ => return Err(resp::ERR_INVALID_PARAMETER),
        };
        self.renderer.create_blob(Blob { resource, size, source }).map_err(|e| code(&e))?;
        if host {
            if let Err(code) = self.backing(resource, size) {
                let _ = self.renderer.unref(resource);
                return Err(code);
            }
            self.blob_bytes = self.blob_bytes.saturating_add(size);
        }
        self.resources.insert(resource, Resource { size, host });
        OK
    }

    /// The file behind a host blob, known to be large enough.
    fn backing(&mut self, resource: u32, size: u64) -> Result<Backing, u32> {
        let file = self.renderer.export(resource).map_err(|e| code(&e))?;
        Backing::of(file, size).map_err(|e| window_code(&e))
    }

    fn map_blob(&mut self, resource: u32, offset: u64) -> Reply {
        let found = self.resources.get(&resource).filter(|r| r.host).ok_or(resp::ERR_INVALID_RESOURCE_ID)?;
        let size = found.size;
        // Looked at again: the file may have changed since the blob was made.
        let backing = self.backing(resource, size)?;
        self.window.place(resource, offset, size, &backing).map_err(|e| window_code(&e))?;
        let info = MapInfo { map_info: MAP_CACHE_CACHED.into(), padding: 0.into() };
        Ok((resp::OK_MAP_INFO, info.as_bytes().to_vec()))
    }

    fn unref(&mut self, resource: u32) -> Reply {
        let found = self.resources.get(&resource).ok_or(resp::ERR_INVALID_RESOURCE_ID)?;
        let (size, host) = (found.size, found.host);
        if self.window.shows(resource) {
            self.window.remove(resource).map_err(|e| window_code(&e))?;
        }
        self.resources.remove(&resource);
        if host {
            self.blob_bytes = self.blob_bytes.saturating_sub(size);
        }
        self.renderer.unref(resource).map_err(|e| code(&e)).and(OK)
    }

    fn submit(&mut self, header: &Header, commands: &[u8], mem: &Memory) -> Reply {
        let context = header.ctx_id.get();
        if let Some(ring) = self.lost.get(&context) {
            return tell_lost(header, *ring, mem);
        }
        if !self.contexts.contains(&context) {
            return Err(resp::ERR_INVALID_CONTEXT_ID);
        }
        self.renderer.submit(context, commands, mem).map_err(|e| code(&e)).and(OK)
    }

    /// Gives back what need not wait any more.
    fn collect(&mut self, active: &mut Active, mem: &Memory) -> Result<(), Broken> {
        let mut reached = Vec::new();
        self.renderer.completed(mem, &mut reached);
        for fence in reached {
            self.waiting.reach(fence);
        }
        let done = self.waiting.take_reached();
        give_all(active, mem, done)
    }

    fn control(&mut self, active: &mut Active) -> Result<(), Broken> {
        let mem = active.mem.memory();
        while let Some(chain) = active.queue(CONTROL)?.pop()? {
            match self.serve(chain, &mem) {
                Ok((pending, None)) => {
                    self.release_orphans(active, &mem)?;
                    give(active, &mem, &pending)?;
                }
                Ok((pending, Some(fence))) => {
                    self.release_orphans(active, &mem)?;
                    self.waiting.park(fence, pending);
                    self.collect(active, &mem)?;
                }
                Err(chain) => active.queue(CONTROL)?.push(chain.head_index(), 0)?,
            }
        }
        active.queue(CONTROL)?.notify()
    }

    /// Gives back what waits for contexts that were destroyed: nobody will report their fences.
    fn release_orphans(&mut self, active: &mut Active, mem: &Memory) -> Result<(), Broken> {
        if !std::mem::take(&mut self.orphans) {
            return Ok(());
        }
        let orphans = self.waiting.take_contexts_except(&self.contexts);
        give_all(active, mem, orphans)
    }
}

impl Device for Gpu {
    fn traits(&self) -> Traits {
        Traits {
            device_type: VIRTIO_ID_GPU,
            features: (1 << F_VIRGL)
                | (1 << F_RESOURCE_BLOB)
                | (1 << F_CONTEXT_INIT)
                | (1 << VIRTIO_RING_F_INDIRECT_DESC)
                | (1 << VIRTIO_RING_F_EVENT_IDX),
            queue_sizes: vec![CONTROL_SIZE, CURSOR_SIZE],
            config: self.config.clone(),
            shared_memory: Some(SharedMemory { id: SHM_HOST_VISIBLE, len: self.window.bytes() }),
        }
    }

    fn queue(&mut self, active: &mut Active, index: u16) -> Result<(), Broken> {
        if index == CONTROL {
            return self.control(active);
        }
        // There is no scanout, so there is no cursor.
        let queue = active.queue(index)?;
        while let Some(chain) = queue.pop()? {
            queue.push(chain.head_index(), 0)?;
        }
        queue.notify()
    }

    fn sources(&self) -> Vec<BorrowedFd<'_>> {
        vec![self.wake.as_fd()]
    }

    fn source(&mut self, active: &mut Active, token: usize) -> Result<(), Broken> {
        if token == WAKE {
            let mut counter = [0; 8];
            let _ = rustix::io::read(&self.wake, &mut counter);
            let mem = active.mem.memory();
            self.collect(active, &mem)?;
            active.queue(CONTROL)?.notify()?;
        }
        Ok(())
    }

    fn stop(&mut self, active: &mut Active) {
        let mem = active.mem.memory();
        self.renderer.withdraw(&mem);
        let waiting = self.waiting.take_all();
        let result = give_all(active, &mem, waiting)
            .and_then(|()| active.queue(CONTROL))
            .and_then(crate::device::VirtQueue::notify);
        if let Err(e) = result {
            log::warn!("virtio-gpu: cannot give back what waits: {e}");
        }
    }

    fn reset(&mut self) {
        self.window.clear();
        self.renderer.reset();
        self.waiting = FenceTable::default();
        self.contexts.clear();
        self.lost.clear();
        self.resources.clear();
        self.blob_bytes = 0;
    }

    fn save(&self) -> SavedState {
        let live = self.renderer.channels().into_iter().map(|c| (c.context, c.ring));
        let lost = self.lost.iter().map(|(context, ring)| (*context, *ring));
        let body = Body {
            channels: live.chain(lost).map(|(context, ring)| (context, ring.0)).collect(),
            mapped: self.window.ranges(),
        };
        SavedState::new(super::KIND.name, STATE_VERSION, &body)
    }
}

/// Reads the device-readable part of a chain; says whether all of it.
fn read_chain(chain: &Chain, mem: &Memory, request: &mut Vec<u8>) -> bool {
    request.clear();
    for descriptor in chain.clone().readable() {
        let len = usize::try_from(descriptor.len()).unwrap_or(usize::MAX);
        let start = request.len();
        let Some(end) = start.checked_add(len).filter(|end| *end <= MAX_REQUEST) else { return false };
        request.resize(end, 0);
        let read = request.get_mut(start..).is_some_and(|part| mem.read_slice(part, descriptor.addr()).is_ok());
        if !read {
            request.truncate(start);
            return false;
        }
    }
    true
}

/// Writes an answer and returns its chain. What does not fit the driver's buffers is not written.
fn give(active: &mut Active, mem: &Memory, pending: &Pending) -> Result<(), Broken> {
    let mut bytes = pending.header.as_bytes().to_vec();
    bytes.extend_from_slice(&pending.body);
    let mut rest = bytes.as_slice();
    let mut written: u32 = 0;
    for descriptor in pending.chain.clone().writable() {
        let len = usize::try_from(descriptor.len()).unwrap_or(usize::MAX).min(rest.len());
        let (part, after) = rest.split_at_checked(len).unwrap_or((rest, &[]));
        if part.is_empty() || mem.write_slice(part, descriptor.addr()).is_err() {
            break;
        }
        written = written.saturating_add(u32::try_from(len).unwrap_or(0));
        rest = after;
    }
    active.queue(CONTROL)?.push(pending.chain.head_index(), written)
}

fn give_all(active: &mut Active, mem: &Memory, all: Vec<Pending>) -> Result<(), Broken> {
    all.iter().try_for_each(|pending| give(active, mem, pending))
}

/// A context that did not survive a restore waits for the host: its channel is at its end (a received message of
/// no bytes), so that the guest's proxy connects anew.
fn tell_lost(header: &Header, ring: GuestAddress, mem: &Memory) -> Reply {
    const RECEIVE: u8 = 5;
    const RECEIVE_LEN: usize = 352;
    let flags = header.flags.get();
    if flags & FLAG_INFO_RING_IDX == 0 || header.ring_idx != CHANNEL_RING {
        return Err(resp::ERR_INVALID_CONTEXT_ID);
    }
    let mut event = [0; RECEIVE_LEN];
    if let Some(first) = event.first_mut() {
        *first = RECEIVE;
    }
    mem.write_slice(&event, ring).map_err(|_| resp::ERR_INVALID_CONTEXT_ID).and(OK)
}

fn check_entries(entries: &[MemEntry], size: u64, mem: &Memory) -> Result<(), u32> {
    let mut total: u64 = 0;
    for entry in entries {
        let len = usize::try_from(entry.length.get()).unwrap_or(usize::MAX);
        if len == 0 || !mem.check_range(GuestAddress(entry.addr.get()), len) {
            return Err(resp::ERR_INVALID_PARAMETER);
        }
        total = total.saturating_add(u64::from(entry.length.get()));
    }
    if total < size { Err(resp::ERR_INVALID_PARAMETER) } else { Ok(()) }
}

fn code(error: &RendererError) -> u32 {
    log::debug!("virtio-gpu: {error}");
    match error {
        RendererError::Context(_) => resp::ERR_INVALID_CONTEXT_ID,
        RendererError::Resource(_) => resp::ERR_INVALID_RESOURCE_ID,
        RendererError::Invalid(_) => resp::ERR_INVALID_PARAMETER,
        RendererError::Limit(_) => resp::ERR_OUT_OF_MEMORY,
        RendererError::Failed(_) => resp::ERR_UNSPEC,
    }
}

fn window_code(error: &WindowError) -> u32 {
    log::debug!("virtio-gpu: {error}");
    match error {
        WindowError::File(_) => resp::ERR_UNSPEC,
        _ => resp::ERR_INVALID_PARAMETER,
    }
}
