//! The engine behind the device: what makes contexts work. The device decodes, bounds and answers; the engine connects
//! contexts to the host. It is a trait so that the device is tested without one, and so that this crate does not
//! depend on any.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use vm_memory::GuestAddress;

use super::fences::Fence;
use super::protocol::MemEntry;
use crate::device::Memory;

/// Tells the device that [`Renderer::completed`] has something to say. May be called on any thread, at any time, also
/// from inside [`Renderer::fence`]; it does not block.
pub type Wake = Arc<dyn Fn() + Send + Sync>;

/// What an engine is made of.
pub struct RendererArgs<'a> {
    /// The socket of the Wayland compositor.
    pub wayland: &'a Path,
    /// The way back to the device.
    pub wake: Wake,
}

/// Makes the engine behind a virtio-gpu device.
pub trait RendererFactory: Send + Sync {
    /// Makes one engine. Called before the process is confined; the compositor need not be there yet.
    ///
    /// # Errors
    /// What is missing and what to do about it, for the user.
    fn create(&self, args: RendererArgs<'_>) -> Result<Box<dyn Renderer>, RendererError>;
}

/// There is no engine: a machine without a graphics device needs none, one with it is refused.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoRenderer;

impl RendererFactory for NoRenderer {
    fn create(&self, _args: RendererArgs<'_>) -> Result<Box<dyn Renderer>, RendererError> {
        Err(RendererError::Failed("this program was built without cross-domain graphics".into()))
    }
}

/// Why the engine refused.
#[derive(Debug, thiserror::Error)]
pub enum RendererError {
    /// No such context, or there is one already.
    #[error("context {0}: unknown or in use")]
    Context(u32),
    /// No such resource, or there is one already, or it is not what the request needs.
    #[error("resource {0}: unknown, in use or of the wrong kind")]
    Resource(u32),
    /// The request contradicts itself or the protocol.
    #[error("{0}")]
    Invalid(String),
    /// A bound was reached.
    #[error("{0}")]
    Limit(String),
    /// Something on the host failed.
    #[error("{0}")]
    Failed(String),
}

/// A capability set (virtio 1.3 section 5.7.6.8).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Capset {
    /// Its number, 1 to 63.
    pub id: u32,
    /// Highest version.
    pub version: u32,
    /// Its contents.
    pub data: Vec<u8>,
}

/// A blob resource to be made. The device has checked that the resource is new and its memory is the guest's.
#[derive(Debug, Clone, Copy)]
pub struct Blob<'a> {
    /// The resource.
    pub resource: u32,
    /// Bytes.
    pub size: u64,
    /// What is behind it.
    pub source: BlobSource<'a>,
}

/// What is behind a blob.
#[derive(Debug, Clone, Copy)]
pub enum BlobSource<'a> {
    /// Guest memory: at least one entry, none empty, all inside guest memory, together at least the size.
    Guest(&'a [MemEntry]),
    /// Host memory that the context knows by this number.
    Host {
        /// The context.
        context: u32,
        /// The number.
        blob_id: u64,
    },
}

/// A context's way to the host, as a snapshot remembers it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Channel {
    /// The context.
    pub context: u32,
    /// Where in guest memory it expects what the host sends.
    pub ring: GuestAddress,
}

/// An engine. All calls come from one thread at a time; none blocks for long, whatever guest and host do.
pub trait Renderer: Send {
    /// The capability sets.
    fn capsets(&self) -> Vec<Capset>;

    /// Makes a context.
    ///
    /// # Errors
    /// If there is one with this number, or `init` is of no kind the engine has.
    fn create_context(&mut self, context: u32, init: u32, name: &str) -> Result<(), RendererError>;

    /// Destroys a context. Its fences are not reported any more.
    ///
    /// # Errors
    /// If there is none.
    fn destroy_context(&mut self, context: u32) -> Result<(), RendererError>;

    /// Makes a blob resource.
    ///
    /// # Errors
    /// If the context or what it is to be made from does not exist, or the host has no memory.
    fn create_blob(&mut self, blob: Blob<'_>) -> Result<(), RendererError>;

    /// Forgets a resource, and detaches it from all contexts.
    ///
    /// # Errors
    /// If there is none.
    fn unref(&mut self, resource: u32) -> Result<(), RendererError>;

    /// Lets a context use a resource.
    ///
    /// # Errors
    /// If one of them does not exist.
    fn attach(&mut self, context: u32, resource: u32) -> Result<(), RendererError>;

    /// No longer.
    ///
    /// # Errors
    /// If one of them does not exist.
    fn detach(&mut self, context: u32, resource: u32) -> Result<(), RendererError>;

    /// The file behind a host blob, for mapping from its beginning. The device looks at its size itself.
    ///
    /// # Errors
    /// If the resource is no host blob.
    fn export(&mut self, resource: u32) -> Result<OwnedFd, RendererError>;

    /// Executes a context's commands.
    ///
    /// # Errors
    /// If one of them is refused; those before it have been executed.
    fn submit(&mut self, context: u32, commands: &[u8], mem: &Memory) -> Result<(), RendererError>;

    /// Asks for a report when all that was submitted on the fence's timeline is done.
    ///
    /// # Errors
    /// If there is no such timeline.
    fn fence(&mut self, fence: Fence) -> Result<(), RendererError>;

    /// Adds the fences reached since the last call to `reached`. What they announce is in guest memory afterwards,
    /// and only this method and `submit` write there.
    fn completed(&mut self, mem: &Memory, reached: &mut Vec<Fence>);

    /// The device pauses and answers every request that waits for a fence: make sure that the guest finds nothing in
    /// its rings that it has seen already, and that what the host sends meanwhile is reported by later fences.
    fn withdraw(&mut self, mem: &Memory);

    /// The connected contexts, for a snapshot.
    fn channels(&self) -> Vec<Channel>;

    /// Destroys every context and resource.
    fn reset(&mut self);
}
