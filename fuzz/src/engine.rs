//! An engine of the graphics device that has nothing and can nothing.

use std::os::fd::OwnedFd;

use virtio_devices::device::Memory;
use virtio_devices::gpu::{Blob, Capset, Channel, Fence, Renderer, RendererArgs, RendererError, RendererFactory};

/// The engine, and who makes it.
pub struct Nothing;

fn refuse<T>() -> Result<T, RendererError> {
    Err(RendererError::Failed("there is nothing".into()))
}

impl RendererFactory for Nothing {
    fn create(&self, _: RendererArgs<'_>) -> Result<Box<dyn Renderer>, RendererError> {
        Ok(Box::new(Self))
    }
}

impl Renderer for Nothing {
    fn capsets(&self) -> Vec<Capset> {
        Vec::new()
    }
    fn create_context(&mut self, _: u32, _: u32, _: &str) -> Result<(), RendererError> {
        refuse()
    }
    fn destroy_context(&mut self, _: u32) -> Result<(), RendererError> {
        refuse()
    }
    fn create_blob(&mut self, _: Blob<'_>) -> Result<(), RendererError> {
        refuse()
    }
    fn unref(&mut self, _: u32) -> Result<(), RendererError> {
        refuse()
    }
    fn attach(&mut self, _: u32, _: u32) -> Result<(), RendererError> {
        refuse()
    }
    fn detach(&mut self, _: u32, _: u32) -> Result<(), RendererError> {
        refuse()
    }
    fn export(&mut self, _: u32) -> Result<OwnedFd, RendererError> {
        refuse()
    }
    fn submit(&mut self, _: u32, _: &[u8], _: &Memory) -> Result<(), RendererError> {
        refuse()
    }
    fn fence(&mut self, _: Fence) -> Result<(), RendererError> {
        refuse()
    }
    fn completed(&mut self, _: &Memory, _: &mut Vec<Fence>) {}
    fn withdraw(&mut self, _: &Memory) {}
    fn channels(&self) -> Vec<Channel> {
        Vec::new()
    }
    fn reset(&mut self) {}
}
