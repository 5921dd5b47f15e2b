//! Entropy device (virtio 1.3 section 5.4): fills the driver's buffers from a file of the host.

mod device;
#[cfg(test)]
mod tests;

use std::fs::File;

use vmm_config::{HostFacts, VmConfig};

pub use device::Rng;

use crate::registry::{BuildContext, BuildError, Built, Kind, Request, no_window};

/// The kind's entry in the registry.
pub const KIND: Kind = Kind { name: "rng", requests, map: no_window, build, syscalls: &[] };

/// Version of the saved state, which is empty.
const STATE_VERSION: u32 = 1;

fn requests(_config: &VmConfig, _facts: &HostFacts) -> Vec<Request> {
    vec![Request { id: "_rng".into(), index: 0, window: None }]
}

fn build(ctx: BuildContext<'_>) -> Result<Built, BuildError> {
    if let Some(saved) = ctx.saved {
        let other = |reason| BuildError::Other { device: ctx.request.id.clone(), reason };
        saved.read::<()>(KIND.name, STATE_VERSION).map_err(|e| other(e.to_string()))?;
    }
    let path = &ctx.config.rng.src;
    let source = File::open(path).map_err(|source| BuildError::Open {
        device: ctx.request.id.clone(),
        path: path.clone(),
        source,
    })?;
    Ok(Built::new(Rng::new(source)))
}
