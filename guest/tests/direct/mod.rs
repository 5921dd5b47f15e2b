//! A stand-in for guest kernel and virtio-gpu device: calls the host's renderer (rutabaga) in this process.
//!
//! The renderer lives in a thread of its own, as it does behind a virtqueue: commands are queued, and the answers are the
//! ring pages and the fences.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Mutex};

use rutabaga_gfx::{
    RUTABAGA_CAPSET_CROSS_DOMAIN, RUTABAGA_FLAG_FENCE, RUTABAGA_FLAG_INFO_RING_IDX, RUTABAGA_PATH_TYPE_WAYLAND,
    ResourceCreateBlob, Rutabaga, RutabagaBuilder, RutabagaFence, RutabagaFenceHandler, RutabagaIovec,
    RutabagaMagmaHandle, RutabagaPath,
};
use spectrum_guest::wayland::gpu::{Gpu, HostBlob, Mapping, RING_SIZE, Ring};

const BLOB_MEM_GUEST: u32 = 1;
const BLOB_MEM_HOST3D: u32 = 2;
const MAPPABLE_SHAREABLE: u32 = 3;

type Job = Box<dyn FnOnce(&mut Rutabaga) + Send>;
type Fences = Arc<Mutex<HashMap<u32, Arc<OwnedFd>>>>;

/// The host: one renderer, any number of contexts.
#[derive(Clone)]
pub struct Host {
    jobs: mpsc::Sender<Job>,
    fences: Fences,
    ids: Arc<AtomicU32>,
}

impl Host {
    /// A renderer whose contexts connect to the compositor at `socket`.
    pub fn new(socket: &Path) -> Self {
        let (jobs, queue) = mpsc::channel::<Job>();
        let fences = Fences::default();
        let path = RutabagaPath { path: socket.to_owned(), path_type: RUTABAGA_PATH_TYPE_WAYLAND };
        let signal = Arc::clone(&fences);
        std::thread::spawn(move || {
            let handler = RutabagaFenceHandler::new(move |fence: RutabagaFence| {
                if fence.ring_idx == Ring::Channel as u8
                    && let Some(event) = signal.lock().unwrap().get(&fence.ctx_id)
                {
                    rustix::io::write(&**event, &1u64.to_ne_bytes()).unwrap();
                }
            });
            let mut rutabaga = RutabagaBuilder::new(1 << RUTABAGA_CAPSET_CROSS_DOMAIN, handler)
                .set_rutabaga_paths(Some(vec![path]))
                .build()
                .unwrap();
            for job in queue {
                job(&mut rutabaga);
            }
        });
        Self { jobs, fences, ids: Arc::new(AtomicU32::new(1)) }
    }

    fn id(&self) -> u32 {
        self.ids.fetch_add(1, Ordering::Relaxed)
    }

    fn post(&self, job: impl FnOnce(&mut Rutabaga) + Send + 'static) {
        self.jobs.send(Box::new(job)).unwrap();
    }

    fn call<T: Send + 'static>(&self, job: impl FnOnce(&mut Rutabaga) -> T + Send + 'static) -> T {
        let (answer, result) = mpsc::channel();
        self.post(move |rutabaga| answer.send(job(rutabaga)).unwrap());
        result.recv().unwrap()
    }

    /// Opens a context, as opening the render node does.
    pub fn open(&self) -> io::Result<Direct> {
        let context = self.id();
        let flags = rustix::event::EventfdFlags::CLOEXEC | rustix::event::EventfdFlags::NONBLOCK;
        let event = Arc::new(rustix::event::eventfd(0, flags)?);
        self.fences.lock().unwrap().insert(context, Arc::clone(&event));
        self.call(move |r| r.create_context(context, RUTABAGA_CAPSET_CROSS_DOMAIN, None)).map_err(io::Error::other)?;
        let query = RingPage::new(self, context)?;
        let channel = RingPage::new(self, context)?;
        Ok(Direct { host: self.clone(), context, event, query, channel, live: Vec::new() })
    }
}

struct RingPage {
    resource: u32,
    memory: Mapping,
    // The host's view: its own mapping, alive until the context is gone.
    _host: Arc<HostPage>,
}

struct HostPage(*mut libc::c_void);

// SAFETY: only its address is passed on; the memory is shared by design.
#[expect(unsafe_code, reason = "the renderer takes raw guest addresses")]
unsafe impl Send for HostPage {}
// SAFETY: as above.
#[expect(unsafe_code, reason = "the renderer takes raw guest addresses")]
unsafe impl Sync for HostPage {}

impl HostPage {
    #[expect(unsafe_code, reason = "the renderer takes raw guest addresses")]
    fn new(fd: BorrowedFd<'_>) -> Self {
        use rustix::mm::{MapFlags, ProtFlags, mmap};
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        Self(unsafe { mmap(std::ptr::null_mut(), RING_SIZE, prot, MapFlags::SHARED, fd, 0) }.unwrap())
    }
}

impl Drop for HostPage {
    #[expect(unsafe_code, reason = "the renderer takes raw guest addresses")]
    fn drop(&mut self) {
        // SAFETY: made by `new`, and the context that used it has been destroyed.
        unsafe { rustix::mm::munmap(self.0, RING_SIZE) }.unwrap();
    }
}

impl RingPage {
    fn new(host: &Host, context: u32) -> io::Result<Self> {
        let file = rustix::fs::memfd_create("ring", rustix::fs::MemfdFlags::CLOEXEC)?;
        rustix::fs::ftruncate(&file, RING_SIZE as u64)?;
        let page = Arc::new(HostPage::new(file.as_fd()));
        let resource = host.id();
        let shared = Arc::clone(&page);
        host.call(move |r| {
            let iovec = RutabagaIovec { base: shared.0, len: RING_SIZE };
            let blob = ResourceCreateBlob {
                blob_mem: BLOB_MEM_GUEST,
                blob_flags: MAPPABLE_SHAREABLE,
                blob_id: 0,
                size: RING_SIZE as u64,
            };
            r.resource_create_blob(0, resource, blob, Some(vec![iovec]), None)
                .and_then(|()| r.context_attach_resource(context, resource))
        })
        .map_err(io::Error::other)?;
        Ok(Self { resource, memory: Mapping::new(file.as_fd(), 0, RING_SIZE, true)?, _host: page })
    }
}

/// One context.
pub struct Direct {
    host: Host,
    context: u32,
    event: Arc<OwnedFd>,
    query: RingPage,
    channel: RingPage,
    live: Vec<u32>,
}

impl Direct {
    fn command(&self, command: &[u8]) -> impl FnOnce(&mut Rutabaga) + Send + 'static {
        let context = self.context;
        let mut command = command.to_vec();
        move |r| {
            if let Err(error) = r.submit_command(context, &mut command, &[]) {
                eprintln!("the renderer refused a command ({}): {error}", command[0]);
            }
        }
    }
}

impl Gpu for Direct {
    fn ring_id(&self, ring: Ring) -> u32 {
        match ring {
            Ring::Query => self.query.resource,
            Ring::Channel => self.channel.resource,
        }
    }

    fn ring(&mut self, ring: Ring) -> &mut Mapping {
        match ring {
            Ring::Query => &mut self.query.memory,
            Ring::Channel => &mut self.channel.memory,
        }
    }

    fn submit(&mut self, command: &[u8]) -> io::Result<()> {
        self.host.post(self.command(command));
        Ok(())
    }

    fn submit_poll(&mut self, command: &[u8]) -> io::Result<()> {
        let (submit, ctx_id) = (self.command(command), self.context);
        self.host.post(move |r| {
            submit(r);
            let flags = RUTABAGA_FLAG_FENCE | RUTABAGA_FLAG_INFO_RING_IDX;
            let fence = RutabagaFence { flags, fence_id: 1, ctx_id, ring_idx: Ring::Channel as u8 };
            r.create_fence(fence).unwrap();
        });
        Ok(())
    }

    fn query(&mut self, command: &[u8]) -> io::Result<()> {
        self.host.call(self.command(command));
        Ok(())
    }

    fn event_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    fn take_event(&mut self) -> io::Result<bool> {
        match rustix::io::read(&*self.event, &mut [0; 8]) {
            Ok(_) => Ok(true),
            Err(rustix::io::Errno::AGAIN) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    fn create_blob(&mut self, blob_id: u32, size: usize, writable: bool) -> io::Result<HostBlob> {
        let (context, resource) = (self.context, self.host.id());
        let handle = self
            .host
            .call(move |r| {
                let blob = ResourceCreateBlob {
                    blob_mem: BLOB_MEM_HOST3D,
                    blob_flags: MAPPABLE_SHAREABLE,
                    blob_id: u64::from(blob_id),
                    size: size as u64,
                };
                r.resource_create_blob(context, resource, blob, None, None)?;
                r.context_attach_resource(context, resource)?;
                let handle = r.export_blob(resource)?;
                Ok::<_, rutabaga_gfx::RutabagaError>(RutabagaMagmaHandle::try_from(handle).unwrap())
            })
            .map_err(io::Error::other)?;
        self.live.push(resource);
        let memory = Mapping::new(handle.os_handle.as_fd(), 0, size, writable)?;
        Ok(HostBlob { handle: resource, resource, memory })
    }

    fn destroy_blob(&mut self, blob: HostBlob) {
        let (context, resource) = (self.context, blob.resource);
        drop(blob);
        self.live.retain(|live| *live != resource);
        self.host.post(move |r| {
            r.context_detach_resource(context, resource).unwrap();
            r.unref_resource(resource).unwrap();
        });
    }
}

impl Drop for Direct {
    fn drop(&mut self) {
        let (context, rings) = (self.context, [self.query.resource, self.channel.resource]);
        let live = std::mem::take(&mut self.live);
        // Closing a render node ends the context and frees every handle.
        self.host.call(move |r| {
            r.destroy_context(context).unwrap();
            for resource in live.into_iter().chain(rings) {
                r.unref_resource(resource).unwrap();
            }
        });
        self.host.fences.lock().unwrap().remove(&self.context);
    }
}
