//! The engine: contexts on rutabaga, with everything checked that rutabaga does not check.
//!
//! Rings: rutabaga writes into the guest's ring pages whenever the host sends something. It is lent pages of our own
//! instead, whose contents are copied into guest memory when the fence that announces them is reported, on the device's
//! thread. So no thread holds pointers into guest memory, a paused machine's memory does not change, and a guest that
//! takes its ring away harms nobody.
//!
//! Fences: at most one fence of a context's channel is with rutabaga. The event it brings goes to the oldest waiting
//! fence of the guest; when none waits (the machine was paused meanwhile), to the next that comes.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::OwnedFd;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::SealFlags;
use rutabaga_gfx::{
    RUTABAGA_BLOB_FLAG_USE_MAPPABLE, RUTABAGA_BLOB_FLAG_USE_SHAREABLE, RUTABAGA_BLOB_MEM_GUEST,
    RUTABAGA_BLOB_MEM_HOST3D, RUTABAGA_CAPSET_CROSS_DOMAIN, RUTABAGA_FLAG_INFO_RING_IDX, RUTABAGA_PATH_TYPE_WAYLAND,
    ResourceCreateBlob, Rutabaga, RutabagaBuilder, RutabagaFence, RutabagaFenceHandler, RutabagaHandle,
    RutabagaIntoRawDescriptor, RutabagaIovec, RutabagaPath, RutabagaResult,
};
use virtio_devices::device::Memory;
use virtio_devices::gpu::protocol::MemEntry;
use virtio_devices::gpu::{
    Blob, BlobSource, Capset, Channel, Fence, Renderer, RendererArgs, RendererError, Timeline, Wake,
};
use vm_memory::{GuestAddress, MmapRegion};
use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, IntoBytes};

use crate::context::{Context, RING, Requirements, Ring, end_event, publish};
use crate::relay::{Bounds, Relay};
use crate::validate::{CHANNEL_NONE, Command, Header, Image, Init, cmd, validate};

/// Ring on which contexts get answers.
const QUERY_RING: u8 = 0;
/// Ring on which contexts get events.
const CHANNEL_RING: u8 = 1;
/// rutabaga numbers the pipes of a context from the one after this.
const PIPES_START: u32 = 0x8000_0000;
/// From here on resources are our rings; guests count from 1.
const FIRST_RING: u32 = 0xff00_0000;

/// What one machine may have.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Different image requirements of one context; rutabaga keeps each for the context's life.
    pub images: usize,
    /// Those of all contexts together.
    pub total_images: usize,
    /// Files from the host that a context has been told of and not used.
    pub unused_files: usize,
    /// Pipes a context reads at a time.
    pub read_pipes: usize,
    /// The relay's.
    pub bounds: Bounds,
}

impl Default for Limits {
    fn default() -> Self {
        Self { images: 4096, total_images: 1 << 16, unused_files: 256, read_pipes: 64, bounds: Bounds::default() }
    }
}

enum Resource {
    /// Guest memory. Only its first entry matters, as a ring.
    Guest { first: MemEntry },
    /// Memory of the host, with the same number in rutabaga.
    Host,
}

/// rutabaga, which can be sent to another thread.
struct Shared(Rutabaga);

#[expect(unsafe_code, reason = "rutabaga's traits do not demand Send")]
// SAFETY: with only the cross-domain component built and enabled, everything inside is Send: paths, sockets, eventfds,
// thread handles, and maps of them behind Arc<Mutex>; there is no library with state of a thread. The pointers among it
// are the rings, pages owned by `Engine` and sent along with it. The engine is used by one thread at a time (`&mut`).
unsafe impl Send for Shared {}

/// An engine.
pub struct Engine {
    /// Nothing once it panicked: its state cannot be trusted.
    rutabaga: Option<Shared>,
    relay: Relay,
    limits: Limits,
    contexts: BTreeMap<u32, Context>,
    resources: HashMap<u32, Resource>,
    /// Contexts whose fence rutabaga has reached, by its threads.
    reached: Arc<Mutex<Vec<u32>>>,
    /// Fences reached at once.
    done: Vec<Fence>,
    images: usize,
    rings: u32,
    fences: u64,
}

type Result<T, E = RendererError> = std::result::Result<T, E>;

fn invalid<T>(what: &str) -> Result<T> {
    Err(RendererError::Invalid(what.into()))
}

impl Engine {
    /// An engine whose contexts connect to `args.wayland`.
    pub fn new(args: RendererArgs<'_>, limits: Limits) -> Result<Self> {
        let relay = Relay::new(args.wayland.to_owned(), limits.bounds)
            .map_err(|e| RendererError::Failed(format!("cannot make a socket for the Wayland relay: {e}")))?;
        let reached = Arc::new(Mutex::new(Vec::new()));
        let handler = fence_handler(reached.clone(), args.wake);
        let path = RutabagaPath { path: relay.path(), path_type: RUTABAGA_PATH_TYPE_WAYLAND };
        let rutabaga = RutabagaBuilder::new(1 << RUTABAGA_CAPSET_CROSS_DOMAIN, handler)
            .set_rutabaga_paths(Some(vec![path]))
            .build()
            .map_err(|e| RendererError::Failed(format!("cannot start rutabaga: {e}")))?;
        Ok(Self {
            rutabaga: Some(Shared(rutabaga)),
            relay,
            limits,
            contexts: BTreeMap::new(),
            resources: HashMap::new(),
            reached,
            done: Vec::new(),
            images: 0,
            rings: 0,
            fences: 0,
        })
    }

    fn rutabaga<T>(&mut self, call: impl FnOnce(&mut Rutabaga) -> RutabagaResult<T>) -> Result<T> {
        let gone = || RendererError::Failed("rutabaga has panicked".into());
        let Shared(rutabaga) = self.rutabaga.as_mut().ok_or_else(gone)?;
        match std::panic::catch_unwind(AssertUnwindSafe(|| call(rutabaga))) {
            Ok(result) => result.map_err(|e| RendererError::Failed(e.to_string())),
            Err(_) => {
                log::error!("rutabaga panicked: this machine has no graphics any more");
                // Not dropped: its locks may be poisoned, its threads stuck.
                std::mem::forget(self.rutabaga.take());
                Err(gone())
            }
        }
    }

    fn context(&mut self, id: u32) -> Result<&mut Context> {
        self.contexts.get_mut(&id).ok_or(RendererError::Context(id))
    }

    /// Lends rutabaga a page for the guest's ring in `resource`.
    fn ring(&mut self, context: u32, resource: u32) -> Result<Ring> {
        if !self.context(context)?.attached.contains(&resource) {
            return Err(RendererError::Resource(resource));
        }
        let Some(Resource::Guest { first }) = self.resources.get(&resource) else {
            return Err(RendererError::Resource(resource));
        };
        if first.length.get() < u32::try_from(RING).unwrap_or(u32::MAX) {
            return invalid("a ring needs 4096 contiguous bytes");
        }
        let guest = GuestAddress(first.addr.get());
        let page = MmapRegion::new(RING).map_err(|e| RendererError::Failed(e.to_string()))?;
        let iovecs = vec![RutabagaIovec { base: page.as_ptr().cast(), len: RING }];
        let id = FIRST_RING | (self.rings & !FIRST_RING);
        self.rings = self.rings.wrapping_add(1);
        let blob = ResourceCreateBlob {
            blob_mem: RUTABAGA_BLOB_MEM_GUEST,
            blob_flags: RUTABAGA_BLOB_FLAG_USE_MAPPABLE,
            blob_id: 0,
            size: RING as u64,
        };
        self.rutabaga(|r| r.resource_create_blob(0, id, blob, Some(iovecs), None))?;
        let ring = Ring { page, guest, id };
        if let Err(e) = self.rutabaga(|r| r.context_attach_resource(context, id)) {
            let _ = self.rutabaga(|r| r.unref_resource(id));
            return Err(e);
        }
        Ok(ring)
    }

    fn init(&mut self, id: u32, init: Init) -> Result<()> {
        if std::mem::replace(&mut self.context(id)?.initialised, true) {
            return invalid("a context connects once");
        }
        self.relay
            .ensure_running()
            .map_err(|e| RendererError::Failed(format!("cannot start the Wayland relay: {e}")))?;
        // The rings stay until the context is destroyed, whatever becomes of the connection.
        let query = self.ring(id, init.query_ring)?;
        let query_id = query.id;
        self.context(id)?.query = Some(query);
        let mut channel_id = 0;
        let mut channel = None;
        if init.channel != CHANNEL_NONE {
            let ring = self.ring(id, init.channel_ring)?;
            channel_id = ring.id;
            channel = Some(ring);
        }
        let header = Header { cmd: cmd::INIT, cmd_size: 20.into(), ..Header::default() };
        let words: [U32; 3] = [query_id.into(), channel_id.into(), init.channel.into()];
        let mut command = [header.as_bytes(), words.as_bytes()].concat();
        let result = self.rutabaga(|r| r.submit_command(id, &mut command, &[]));
        let context = self.context(id)?;
        context.last_pipe = Some(PIPES_START);
        match (result, channel) {
            (Ok(()), channel) => context.channel = channel,
            // rutabaga may have kept it: keep the page.
            (Err(e), channel) => {
                context.ended = true;
                context.channel = channel;
                return Err(e);
            }
        }
        Ok(())
    }

    fn image(&mut self, id: u32, image: Image, bytes: &[u8], mem: &Memory) -> Result<()> {
        let (images, total, limits) = (self.context(id)?.images.len(), self.images, self.limits);
        let context = self.context(id)?;
        let Some(query) = &context.query else { return invalid("not connected") };
        let guest = query.guest;
        if let Some(known) = context.images.get(&image) {
            // rutabaga would keep a second one; the first can be used any number of times.
            publish(mem, guest, known.as_bytes());
            return Ok(());
        }
        if images >= limits.images || total >= limits.total_images {
            return Err(RendererError::Limit("the guest asked for too many different images".into()));
        }
        let mut command = bytes.to_vec();
        self.rutabaga(|r| r.submit_command(id, &mut command, &[]))?;
        self.images = self.images.saturating_add(1);
        let context = self.context(id)?;
        let Some(query) = &context.query else { return invalid("not connected") };
        let page = query.read()?;
        let (answer, _) = Requirements::read_from_prefix(&page)
            .map_err(|_| RendererError::Failed("rutabaga gave no answer".into()))?;
        publish(mem, guest, answer.as_bytes());
        context.image_ids.insert(answer.blob_id.get());
        context.images.insert(image, answer);
        Ok(())
    }

    fn send(&mut self, id: u32, blobs: &[u32], read_pipe: Option<u32>, bytes: &[u8]) -> Result<()> {
        let limit = self.limits.read_pipes;
        for blob in blobs {
            let attached = self.context(id)?.attached.contains(blob);
            if !attached || !matches!(self.resources.get(blob), Some(Resource::Host)) {
                return Err(RendererError::Resource(*blob));
            }
        }
        let context = self.context(id)?;
        if context.channel.is_none() || context.ended {
            return invalid("not connected");
        }
        if let Some(guess) = read_pipe {
            // A wrong guess would leave the pipe behind in rutabaga.
            let Some(next) = context.last_pipe.and_then(|last| last.checked_add(1)).filter(|next| *next == guess)
            else {
                return invalid("that is not the next pipe's number");
            };
            if context.read_pipes >= limit {
                return Err(RendererError::Limit("the guest reads from too many pipes".into()));
            }
            context.last_pipe = Some(next);
            context.read_pipes = context.read_pipes.saturating_add(1);
        }
        let mut command = bytes.to_vec();
        let result = self.rutabaga(|r| r.submit_command(id, &mut command, &[]));
        if result.is_err() && read_pipe.is_some() {
            self.context(id)?.last_pipe = None;
        }
        result
    }

    fn write(&mut self, id: u32, pipe: u32, hang_up: bool, bytes: &[u8]) -> Result<()> {
        if !self.context(id)?.write_pipes.contains(&pipe) {
            return invalid("no such pipe");
        }
        let mut command = bytes.to_vec();
        let result = self.rutabaga(|r| r.submit_command(id, &mut command, &[]));
        if hang_up || result.is_err() {
            // rutabaga has closed it.
            self.context(id)?.write_pipes.remove(&pipe);
        }
        result
    }

    /// Asks rutabaga to report the next event of a context.
    fn arm(&mut self, id: u32) -> Result<()> {
        self.fences = self.fences.wrapping_add(1);
        let fence = RutabagaFence {
            flags: RUTABAGA_FLAG_INFO_RING_IDX,
            fence_id: self.fences,
            ctx_id: id,
            ring_idx: CHANNEL_RING,
        };
        self.rutabaga(|r| r.create_fence(fence))?;
        self.context(id)?.armed = true;
        Ok(())
    }

    /// Hands the event of a context to the fence that has waited longest.
    fn deliver(&mut self, id: u32, mem: &Memory, reached: &mut Vec<Fence>) -> Result<()> {
        let unused = self.limits.unused_files;
        let context = self.context(id)?;
        let (true, Some(ring)) = (context.ripe, &context.channel) else { return Ok(()) };
        if !context.ended {
            let Some(fence) = context.waiting.pop_front() else { return Ok(()) };
            let event = ring.read()?;
            publish(mem, ring.guest, &event);
            reached.push(channel_fence(id, fence));
            context.ripe = false;
            context.learn(&event);
            if context.blobs.len().saturating_add(context.write_pipes.len()) <= unused {
                return if context.waiting.is_empty() { Ok(()) } else { self.arm(id) };
            }
            log::warn!("a context of the guest takes files and does not use them: it gets no more");
            context.ended = true;
        } else if !context.waiting.is_empty() {
            publish(mem, ring.guest, &end_event());
            reached.extend(context.waiting.drain(..).map(|fence| channel_fence(id, fence)));
        }
        Ok(())
    }
}

fn channel_fence(context: u32, id: u64) -> Fence {
    Fence { timeline: Timeline::Ring { context, ring: CHANNEL_RING }, id }
}

/// What rutabaga calls on its threads, and on ours inside `create_fence` and when a context is destroyed.
fn fence_handler(reached: Arc<Mutex<Vec<u32>>>, wake: Wake) -> RutabagaFenceHandler {
    RutabagaFenceHandler::new(move |fence: RutabagaFence| {
        reached.lock().unwrap_or_else(PoisonError::into_inner).push(fence.ctx_id);
        wake();
    })
}

impl Renderer for Engine {
    fn capsets(&self) -> Vec<Capset> {
        let Some(Shared(rutabaga)) = &self.rutabaga else { return Vec::new() };
        let infos = (0..rutabaga.get_num_capsets()).filter_map(|index| rutabaga.get_capset_info(index).ok());
        infos
            .filter_map(|(id, version, _)| {
                let data = rutabaga.get_capset(id, version).ok()?;
                Some(Capset { id, version, data })
            })
            .collect()
    }

    fn create_context(&mut self, context: u32, init: u32, name: &str) -> Result<()> {
        if self.contexts.contains_key(&context) {
            return Err(RendererError::Context(context));
        }
        self.rutabaga(|r| r.create_context(context, init, Some(name)))?;
        self.contexts.insert(context, Context::default());
        Ok(())
    }

    fn destroy_context(&mut self, context: u32) -> Result<()> {
        let gone = self.contexts.remove(&context).ok_or(RendererError::Context(context))?;
        self.images = self.images.saturating_sub(gone.images.len());
        // Its thread has ended when this returns, so nothing is added for it afterwards.
        let result = self.rutabaga(|r| r.destroy_context(context));
        self.reached.lock().unwrap_or_else(PoisonError::into_inner).retain(|id| *id != context);
        if self.rutabaga.is_none() {
            // A thread of rutabaga may still write into its rings.
            std::mem::forget(gone);
            return result;
        }
        for ring in [&gone.query, &gone.channel].into_iter().flatten() {
            let id = ring.id;
            self.rutabaga(|r| r.unref_resource(id))?;
        }
        result
    }

    fn create_blob(&mut self, blob: Blob<'_>) -> Result<()> {
        let id = blob.resource;
        if id >= FIRST_RING || self.resources.contains_key(&id) {
            return Err(RendererError::Resource(id));
        }
        let (context, blob_id) = match blob.source {
            BlobSource::Guest(entries) => {
                let first = *entries.first().ok_or(RendererError::Resource(id))?;
                self.resources.insert(id, Resource::Guest { first });
                return Ok(());
            }
            BlobSource::Host { context, blob_id } => (context, blob_id),
        };
        let owner = self.context(context)?;
        let item = u32::try_from(blob_id).map_err(|_| RendererError::Resource(id))?;
        let image = owner.image_ids.contains(&item);
        if !image && !owner.blobs.remove(&item) {
            return invalid("no such blob");
        }
        let create = ResourceCreateBlob {
            blob_mem: RUTABAGA_BLOB_MEM_HOST3D,
            // Shareable: exporting it does not take it away.
            blob_flags: RUTABAGA_BLOB_FLAG_USE_MAPPABLE | RUTABAGA_BLOB_FLAG_USE_SHAREABLE,
            blob_id,
            size: blob.size,
        };
        self.rutabaga(|r| r.resource_create_blob(context, id, create, None, None))?;
        self.resources.insert(id, Resource::Host);
        if image {
            // Memory of our own, which the compositor gets too: nobody is to make it smaller.
            let file = self.export(id)?;
            if let Err(e) = rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW) {
                log::debug!("cannot seal a buffer: {e}");
            }
        }
        Ok(())
    }

    fn unref(&mut self, resource: u32) -> Result<()> {
        let gone = self.resources.remove(&resource).ok_or(RendererError::Resource(resource))?;
        let users: Vec<u32> =
            self.contexts.iter_mut().filter_map(|(id, c)| c.attached.remove(&resource).then_some(*id)).collect();
        if matches!(gone, Resource::Guest { .. }) {
            return Ok(());
        }
        for context in users {
            self.rutabaga(|r| r.context_detach_resource(context, resource))?;
        }
        self.rutabaga(|r| r.unref_resource(resource))
    }

    fn attach(&mut self, context: u32, resource: u32) -> Result<()> {
        let host = matches!(self.resources.get(&resource).ok_or(RendererError::Resource(resource))?, Resource::Host);
        self.context(context)?.attached.insert(resource);
        if host { self.rutabaga(|r| r.context_attach_resource(context, resource)) } else { Ok(()) }
    }

    fn detach(&mut self, context: u32, resource: u32) -> Result<()> {
        let host = matches!(self.resources.get(&resource).ok_or(RendererError::Resource(resource))?, Resource::Host);
        let was = self.context(context)?.attached.remove(&resource);
        if host && was { self.rutabaga(|r| r.context_detach_resource(context, resource)) } else { Ok(()) }
    }

    fn export(&mut self, resource: u32) -> Result<OwnedFd> {
        if !matches!(self.resources.get(&resource), Some(Resource::Host)) {
            return Err(RendererError::Resource(resource));
        }
        match self.rutabaga(|r| r.export_blob(resource))? {
            RutabagaHandle::MagmaGpuHandle(handle) => Ok(own(handle.os_handle)),
            RutabagaHandle::AhbInfo(_) => Err(RendererError::Resource(resource)),
        }
    }

    fn submit(&mut self, context: u32, commands: &[u8], mem: &Memory) -> Result<()> {
        let commands = validate(commands).map_err(|e| RendererError::Invalid(e.to_string()))?;
        for command in commands {
            match command {
                Command::Init(init) => self.init(context, init)?,
                Command::Image(image, bytes) => self.image(context, image, bytes, mem)?,
                Command::Poll => {}
                Command::Send { blobs, read_pipe, bytes } => self.send(context, &blobs, read_pipe, bytes)?,
                Command::Write { pipe, hang_up, bytes } => self.write(context, pipe, hang_up, bytes)?,
            }
        }
        Ok(())
    }

    fn fence(&mut self, fence: Fence) -> Result<()> {
        let Timeline::Ring { context: id, ring } = fence.timeline else {
            self.done.push(fence);
            return Ok(());
        };
        let context = self.context(id)?;
        match ring {
            QUERY_RING => self.done.push(fence),
            CHANNEL_RING if context.channel.is_some() => {
                context.waiting.push_back(fence.id);
                context.ripe |= context.ended;
                if context.ripe {
                    self.reached.lock().unwrap_or_else(PoisonError::into_inner).push(id);
                } else if !context.armed {
                    self.arm(id)?;
                }
            }
            _ => return invalid("nothing happens on that ring"),
        }
        Ok(())
    }

    fn completed(&mut self, mem: &Memory, reached: &mut Vec<Fence>) {
        reached.append(&mut self.done);
        let ripe = std::mem::take(&mut *self.reached.lock().unwrap_or_else(PoisonError::into_inner));
        for id in ripe {
            if let Ok(context) = self.context(id) {
                context.armed = false;
                context.ripe = true;
            }
            if let Err(e) = self.deliver(id, mem, reached) {
                log::debug!("a context of the guest cannot be told of an event: {e}");
            }
        }
    }

    fn withdraw(&mut self, mem: &Memory) {
        // An event of this kind says nothing: ask again.
        let header = Header { cmd: cmd::POLL, ring_idx: CHANNEL_RING, cmd_size: 16.into(), ..Header::default() };
        let event = [header.as_bytes(), &[0; 8]].concat();
        for context in self.contexts.values_mut() {
            if let Some(ring) = &context.channel
                && !context.waiting.is_empty()
            {
                publish(mem, ring.guest, &event);
                context.waiting.clear();
            }
        }
    }

    fn channels(&self) -> Vec<Channel> {
        let channel = |(id, c): (&u32, &Context)| c.channel.as_ref().map(|r| Channel { context: *id, ring: r.guest });
        self.contexts.iter().filter_map(channel).collect()
    }

    fn reset(&mut self) {
        let contexts: Vec<u32> = self.contexts.keys().copied().collect();
        let resources: Vec<u32> = self.resources.keys().copied().collect();
        for context in contexts {
            let _ = self.destroy_context(context);
        }
        for resource in resources {
            let _ = self.unref(resource);
        }
        self.done.clear();
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // Contexts before their rings.
        self.reset();
    }
}

#[expect(unsafe_code, reason = "rutabaga's descriptors convert to raw ones only")]
fn own(descriptor: rutabaga_gfx::RutabagaDescriptor) -> OwnedFd {
    use std::os::fd::FromRawFd;
    // SAFETY: into_raw_descriptor gives up ownership of an open descriptor, which nobody else has.
    unsafe { OwnedFd::from_raw_fd(descriptor.into_raw_descriptor()) }
}
