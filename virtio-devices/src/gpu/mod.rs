//! virtio-gpu (virtio 1.3 section 5.7, with blob resources and context types), for cross-domain contexts: a guest's
//! Wayland messages and buffers reach the host's compositor. There is no scanout and no rendering.
//!
//! `decode` turns requests into values, `device` serves them within bounds, `fences` keeps those that wait,
//! `window` is the shared memory region, and `renderer` is what the engine must do.

mod decode;
mod device;
mod fences;
pub mod protocol;
mod renderer;
#[cfg(test)]
mod tests;
mod window;

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use vmm_config::{GpuConfig, HostFacts, VmConfig};

pub use device::{Gpu, Limits};
pub use fences::{Fence, Timeline};
pub use renderer::{
    Blob, BlobSource, Capset, Channel, NoRenderer, Renderer, RendererArgs, RendererError, RendererFactory, Wake,
};
pub use window::{Backing, WindowError};

use window::Window;

use crate::mapping::Mapping;
use crate::registry::{
    BuildContext, BuildError, Built, Kind, Request, Syscall, WindowContext, WindowMemory, WindowRequest,
};

/// The kind's entry in the registry.
pub const KIND: Kind = Kind { name: "gpu", requests, map, build, syscalls: SYSCALLS };

fn requests(config: &VmConfig, _facts: &HostFacts) -> Vec<Request> {
    let request = |(index, gpu): (usize, &GpuConfig)| Request {
        id: gpu.id.clone().unwrap_or_else(|| format!("_gpu{index}")),
        index,
        window: Some(WindowRequest::SharedMemory { len: gpu.window }),
    };
    config.gpu.iter().enumerate().map(request).collect()
}

fn map(ctx: WindowContext<'_>) -> Result<WindowMemory, BuildError> {
    let mapping = Mapping::reserve(ctx.len).map_err(|e| BuildError::Other {
        device: ctx.request.id.clone(),
        reason: format!("cannot reserve {:#x} bytes of addresses for window=: {e}; choose a smaller one", ctx.len),
    })?;
    Ok(WindowMemory { mapping: Arc::new(Mutex::new(mapping)), image: None })
}

fn build(ctx: BuildContext<'_>) -> Result<Built, BuildError> {
    let fail = |reason: String| BuildError::Other { device: ctx.request.id.clone(), reason };
    let gpu = ctx.config.gpu.get(ctx.request.index).ok_or_else(|| fail("not in the configuration".into()))?;
    let wayland = gpu.wayland.as_deref().ok_or_else(|| fail("wayland= (the compositor's socket) is missing".into()))?;
    let wake = device::wakeup().map_err(|e| fail(format!("cannot make an eventfd: {e}")))?;
    let args = RendererArgs { wayland, wake: device::waker(&wake).map_err(|e| fail(e.to_string()))? };
    let renderer = ctx.renderer.create(args).map_err(|e| fail(e.to_string()))?;
    let (window, memory) = ctx.window.ok_or_else(|| fail("it was given no guest addresses".into()))?;
    let mut device = Gpu::new(renderer, wake, Window::new(memory.mapping, window.len), Limits::for_window(window.len));
    if let Some(saved) = ctx.saved {
        device.restore(saved).map_err(fail)?;
    }
    Ok(Built::new(device))
}

/// A device for tests and fuzzers, with an eventfd of its own.
///
/// # Errors
/// If the host has no eventfd or addresses left.
pub fn with_factory(
    factory: &dyn RendererFactory,
    wayland: &std::path::Path,
    window: u64,
    limits: Limits,
) -> Result<Gpu, RendererError> {
    let failed = |e: String| RendererError::Failed(e);
    let wake: OwnedFd = device::wakeup().map_err(|e| failed(e.to_string()))?;
    let args = RendererArgs { wayland, wake: device::waker(&wake).map_err(|e| failed(e.to_string()))? };
    let renderer = factory.create(args)?;
    let mapping = Mapping::reserve(window).map_err(|e| failed(e.to_string()))?;
    Ok(Gpu::new(renderer, wake, Window::new(Arc::new(Mutex::new(mapping)), window), limits))
}

/// Of the device's thread, rutabaga's for each context, and the relay's, which all inherit its filter.
const SYSCALLS: &[Syscall] = &[
    Syscall { number: libc::SYS_fstat, why: "size and kind of files from the compositor" },
    Syscall { number: libc::SYS_lseek, why: "size of files from the compositor" },
    Syscall { number: libc::SYS_fcntl, why: "seals, access modes, duplicates" },
    Syscall { number: libc::SYS_readlinkat, why: "tell kinds of files apart (/proc/self/fd)" },
    #[cfg(target_arch = "x86_64")]
    Syscall { number: libc::SYS_readlink, why: "tell kinds of files apart (/proc/self/fd)" },
    Syscall { number: libc::SYS_memfd_create, why: "buffers for the guest's windows" },
    Syscall { number: libc::SYS_ftruncate, why: "buffers for the guest's windows" },
    Syscall { number: libc::SYS_pread64, why: "copy keymaps" },
    Syscall { number: libc::SYS_pwrite64, why: "copy keymaps" },
    Syscall { number: libc::SYS_socket, why: "connect to the relay, and it to the compositor" },
    Syscall { number: libc::SYS_connect, why: "connect to the relay, and it to the compositor" },
    Syscall { number: libc::SYS_accept4, why: "the relay takes a context's connection" },
    Syscall { number: libc::SYS_shutdown, why: "the relay ends a context's connection" },
    Syscall { number: libc::SYS_sendmsg, why: "Wayland messages" },
    Syscall { number: libc::SYS_recvmsg, why: "Wayland messages" },
    Syscall { number: libc::SYS_pipe2, why: "clipboard transfers" },
    #[cfg(target_arch = "x86_64")]
    Syscall { number: libc::SYS_pipe, why: "clipboard transfers" },
    Syscall { number: libc::SYS_eventfd2, why: "a context's thread" },
    Syscall { number: libc::SYS_clone, why: "a thread for each context, one for the relay" },
];

/// For fuzzers: a request of the control queue, header first. Any bytes are an answer or a request, never a panic.
pub fn fuzz(bytes: &[u8]) {
    use zerocopy::FromBytes;
    if let Ok((header, rest)) = protocol::Header::ref_from_prefix(bytes) {
        let _ = decode::decode(header, rest);
    }
}
