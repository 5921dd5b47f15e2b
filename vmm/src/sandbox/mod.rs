//! What the VMM may do on the host: system-call filters by kind of thread, and the files it may reach.

mod landlock;
mod program;
mod seccomp;
mod table;
mod trap;

use std::sync::Arc;

use virtio_devices::registry::Kind;

use crate::build::Confinement;
use crate::vcpu::ThreadSetup;

pub use landlock::{Files, LandlockError};
pub use seccomp::{Filters, Mode, SeccompError};

/// No filters.
pub struct Unconfined;

impl Confinement for Unconfined {
    fn vcpu(&self) -> ThreadSetup {
        Arc::new(|| Ok(()))
    }

    fn device(&self, _: &Kind) -> ThreadSetup {
        Arc::new(|| Ok(()))
    }

    fn ondemand(&self) -> ThreadSetup {
        Arc::new(|| Ok(()))
    }
}
