//! The engine of cross-domain virtio-gpu, on rutabaga_gfx.
//!
//! ```text
//!   virtio-gpu device ── engine.rs ── rutabaga ═══ relay.rs ═══ the compositor's socket
//!                          │  ▲          │
//!               validate.rs ┘  └ fences ──┘ (a thread of rutabaga for each context)
//! ```
//!
//! rutabaga 0.1.85 trusts the guest and the host more than we do. What it does wrong is kept from it on both sides:
//! the engine checks every command before rutabaga sees it and lends it pages of our own as rings, and the relay reads
//! whatever rutabaga sends at once, and passes on only what rutabaga understands.
#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::unreachable)
)]

mod context;
mod engine;
mod flow;
mod relay;
#[cfg(test)]
mod tests;
pub mod validate;

use std::os::fd::{AsFd, AsRawFd};

use rustix::event::EventfdFlags;
use virtio_devices::gpu::{Renderer, RendererArgs, RendererError, RendererFactory};

pub use engine::Limits;

/// Makes engines on rutabaga.
#[derive(Debug, Clone, Copy, Default)]
pub struct RutabagaFactory;

impl RendererFactory for RutabagaFactory {
    fn create(&self, args: RendererArgs<'_>) -> Result<Box<dyn Renderer>, RendererError> {
        check_process().map_err(RendererError::Failed)?;
        Ok(Box::new(engine::Engine::new(args, Limits::default())?))
    }
}

/// rutabaga tells kinds of files apart by their names in /proc, and writes to sockets and pipes that may be closed.
fn check_process() -> Result<(), String> {
    let probe = rustix::event::eventfd(0, EventfdFlags::CLOEXEC).map_err(|e| format!("cannot make an eventfd: {e}"))?;
    check_proc(&format!("/proc/self/fd/{}", probe.as_fd().as_raw_fd()))?;
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = ignored.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    if ignored & (1 << (libc::SIGPIPE - 1)) == 0 {
        return Err("cross-domain graphics needs SIGPIPE to be ignored in this process".into());
    }
    Ok(())
}

fn check_proc(eventfd: &str) -> Result<(), String> {
    match std::fs::read_link(eventfd) {
        Ok(name) if name.to_string_lossy().starts_with("anon_inode:[eventfd]") => Ok(()),
        Ok(_) | Err(_) => {
            Err("cross-domain graphics needs /proc (a procfs of the process's own pid namespace): files \
                               from the compositor cannot be told apart without; mount it in the sandbox"
                .into())
        }
    }
}

/// For fuzzers: `bytes` as a request of the control queue, and as a command stream of a context.
pub fn fuzz(bytes: &[u8]) {
    virtio_devices::gpu::fuzz(bytes);
    let _ = validate::validate(bytes);
}
