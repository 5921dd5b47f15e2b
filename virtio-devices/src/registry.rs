//! The table of device kinds: the only file to touch when adding a device.
//!
//! The VMM iterates [`KINDS`] and knows no device by name. A kind says which devices a configuration asks for, what
//! each needs of the machine, how one is built, and which system calls its thread makes.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use block::image::Image;
use passthrough::Grants;
use vmm_config::{HostFacts, VmConfig};

use crate::device::{Device, SavedState, WindowAddress};
use crate::mapping::Mapping;

/// A system call a device's worker thread makes beside those of the worker itself.
#[derive(Debug, Clone, Copy)]
pub struct Syscall {
    /// The number on this architecture (`libc::SYS_*`).
    pub number: i64,
    /// What it is needed for.
    pub why: &'static str,
}

/// Guest address space a device needs beside its registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WindowRequest {
    /// A shared memory region: its own 64-bit prefetchable BAR of this many bytes (a power of two).
    SharedMemory {
        /// Bytes.
        len: u64,
    },
    /// A range outside every BAR, 2 MiB aligned: a pmem image.
    Range {
        /// Bytes, a multiple of 2 MiB.
        len: u64,
    },
}

/// One device a configuration asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// The identifier the user gave, or the kind's name and number (`_disk0`).
    pub id: String,
    /// Which of the kind's devices in the configuration.
    pub index: usize,
    /// Address space it needs.
    pub window: Option<WindowRequest>,
}

/// What the VMM hands to a kind for the host memory of a window.
pub struct WindowContext<'a> {
    /// The whole configuration; the kind reads its own section.
    pub config: &'a VmConfig,
    /// The request being fulfilled.
    pub request: &'a Request,
    /// Bytes of the window.
    pub len: u64,
}

/// What the VMM hands to the constructor of a device.
pub struct BuildContext<'a> {
    /// The whole configuration; the device reads its own section.
    pub config: &'a VmConfig,
    /// The request being fulfilled.
    pub request: &'a Request,
    /// Where the window is and what is behind it, if one was asked for.
    pub window: Option<(WindowAddress, WindowMemory)>,
    /// Ends of the virtio-console, opened by the VMM (they exist before the machine does).
    pub console: Option<ConsoleEnds>,
    /// A descriptor that was handed down for the device: a socket that listens, instead of one that it makes, or what an
    /// interface is connected to.
    pub handed: Option<OwnedFd>,
    /// The engine behind virtio-gpu.
    pub renderer: &'a dyn crate::gpu::RendererFactory,
    /// What was granted to the device's guest before it was started anew; nothing: the device makes a table, if it has one.
    pub grants: Option<Grants>,
    /// The device's state in a snapshot, if this is a restore.
    pub saved: Option<&'a SavedState>,
}

/// File descriptors of the virtio-console.
#[derive(Debug)]
pub struct ConsoleEnds {
    /// Where the guest's output goes; nothing: it is thrown away.
    pub output: Option<OwnedFd>,
    /// Where the guest's input comes from; nothing: there is none.
    pub input: Option<OwnedFd>,
    /// Whether `output` is a terminal whose size the guest wants to know.
    pub terminal: bool,
}

/// A device that was built.
pub struct Built {
    /// The device.
    pub device: Box<dyn Device>,
    /// Where files and directories can be granted to the guest and taken back, while the device is on its thread or not.
    pub grants: Option<Grants>,
}

impl Built {
    /// A device with nothing beside it.
    #[must_use]
    pub fn new(device: impl Device + 'static) -> Self {
        Self { device: Box::new(device), grants: None }
    }
}

/// Host memory behind a window. The VMM makes it one memory slot and keeps it until the VM is gone.
pub struct WindowMemory {
    /// The mapping. The device may hold it too and change what is mapped inside.
    pub mapping: Arc<Mutex<Mapping>>,
    /// The image that it shows, if it shows one.
    pub image: Option<Image>,
}

/// Why a device could not be built: one sentence for the user.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// A file the configuration names cannot be used.
    #[error("{device}: cannot open {}: {source}", path.display())]
    Open {
        /// The device's identifier.
        device: String,
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// Something else, said in full.
    #[error("{device}: {reason}")]
    Other {
        /// The device's identifier.
        device: String,
        /// What and what to do.
        reason: String,
    },
}

/// A kind of device.
pub struct Kind {
    /// Its name, which begins the identifiers of its devices and names its saved state.
    pub name: &'static str,
    /// The devices a configuration asks for. Pure: file sizes come from the facts.
    pub requests: fn(&VmConfig, &HostFacts) -> Vec<Request>,
    /// The memory behind the window of a device that asked for one. It is made before the machine has its interrupt
    /// controller and its vCPUs, and so before it is known what the device will be connected to.
    pub map: fn(WindowContext<'_>) -> Result<WindowMemory, BuildError>,
    /// Builds one, for boot, restore and clone alike.
    pub build: fn(BuildContext<'_>) -> Result<Built, BuildError>,
    /// What its worker may call.
    pub syscalls: &'static [Syscall],
}

/// [`Kind::map`] of kinds whose devices have no window.
///
/// # Errors
/// Always: a window was planned for a device that wants none.
pub fn no_window(ctx: WindowContext<'_>) -> Result<WindowMemory, BuildError> {
    Err(BuildError::Other { device: ctx.request.id.clone(), reason: "this kind of device has no window".into() })
}

/// Every kind of device, in the order of their PCI slots.
#[rustfmt::skip]
pub const KINDS: &[&Kind] = &[
    &crate::rng::KIND,
    &crate::blk::KIND,
    &crate::pmem::KIND,
    &crate::console::KIND,
    &crate::vsock::KIND,
    &crate::gpu::KIND,
    &crate::fs::KIND,
    &crate::net::KIND,
];
