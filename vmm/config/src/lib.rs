//! The one configuration value of a virtual machine.
//!
//! [`VmConfig`] is at the same time the JSON body of `vm.create`, what the command line is turned into, and what a
//! plan is made from. It is plain data: every section is a struct with public fields and a file of its own, and has a
//! `parse` for the `key=value` text after its flag. Field names, defaults and value syntax are Cloud Hypervisor's, so
//! that a configuration written for it is understood here.
//!
//! Three questions are kept apart. *Is it readable?* is answered by [`VmConfig::from_json`] and the `parse` functions.
//! *Does it make sense?* is answered by [`VmConfig::check`], which looks at values only and changes nothing. Whether
//! files exist and sockets answer is found out when the machine is built.

#![forbid(unsafe_code)]

mod check;
mod console;
mod cpus;
mod disk;
mod fs;
mod gpu;
mod json;
pub mod keyvalue;
mod landlock;
mod memory;
mod net;
mod payload;
mod platform;
mod pmem;
mod problem;
mod rng;
mod snapshot;
mod unsupported;
mod vsock;

#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};

pub use console::{ConsoleConfig, ConsoleMode, SerialConfig};
pub use cpus::CpusConfig;
pub use disk::{DiskConfig, ImageType};
pub use fs::{FsConfig, GrantConfig, GrantName};
pub use gpu::{DEFAULT_GPU_WINDOW, GpuConfig, GpuMode};
pub use json::JsonError;
pub use keyvalue::{ParseError, parse_size};
pub use landlock::{LandlockAccess, LandlockRule};
pub use memory::{DEFAULT_MEMORY_SIZE, MemoryConfig};
pub use net::{Ipv4Network, MacAddr, NetConfig};
pub use payload::PayloadConfig;
pub use platform::PlatformConfig;
pub use pmem::PmemConfig;
pub use problem::{HostFacts, Problem, ProblemKind};
pub use rng::RngConfig;
pub use snapshot::{CloneConfig, MemoryRestoreMode, RestoreConfig, SnapshotConfig, ZygoteConfig};
pub use unsupported::{Section, Unsupported};
pub use vsock::VsockConfig;

/// The lowest context id a guest may have: 0 is the hypervisor, 1 local loopback, 2 the host (virtio 1.3, 5.10.4).
pub const FIRST_GUEST_CID: u32 = 3;

/// Everything that makes one virtual machine. Sections and fields that are absent, or `null` in JSON, take Cloud
/// Hypervisor's defaults; an unknown field is ignored, as it does.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct VmConfig {
    /// Virtual CPUs.
    pub cpus: CpusConfig,
    /// Guest memory.
    pub memory: MemoryConfig,
    /// What is booted. Absent means nothing yet: such a machine can be created but not booted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub payload: Option<PayloadConfig>,
    /// Block devices, in the order in which the guest sees them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<DiskConfig>,
    /// Persistent-memory devices, in the order in which the guest sees them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub pmem: Vec<PmemConfig>,
    /// Network interfaces, in the order in which the guest sees them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub net: Vec<NetConfig>,
    /// The serial port (16550, or PL011 on Arm): off unless asked for.
    pub serial: SerialConfig,
    /// The virtio console: the terminal unless told otherwise.
    pub console: ConsoleConfig,
    /// Socket device between host and guest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vsock: Option<VsockConfig>,
    /// Entropy device.
    pub rng: RngConfig,
    /// Graphics devices.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub gpu: Vec<GpuConfig>,
    /// File systems in which the guest sees what it was granted.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub fs: Vec<FsConfig>,
    /// Properties of the machine as a whole.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub platform: Option<PlatformConfig>,
    /// Confine the VMM to the paths it needs with Landlock.
    pub landlock_enable: bool,
    /// Further paths the VMM may use under Landlock.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub landlock_rules: Vec<LandlockRule>,
    /// Sections of Cloud Hypervisor's that are not supported yet. [`VmConfig::check`] reports each.
    #[serde(flatten)]
    pub unsupported: Unsupported<VmConfig>,
}

impl Section for VmConfig {
    const UNSUPPORTED: &'static [&'static str] = &[
        "balloon",
        "debug_console",
        "devices",
        "gdb",
        "generic_vhost_user",
        "iommu",
        "ivshmem",
        "numa",
        "pci_segments",
        "pvmemcontrol",
        "pvpanic",
        "rate_limit_groups",
        "rtc",
        "sgx_epc",
        "tpm",
        "user_devices",
        "vdpa",
        "watchdog",
    ];
}

impl VmConfig {
    /// Lets the machine have copies of its own of all images that it only reads as memory.
    pub fn own_copies(&mut self) {
        self.pmem.iter_mut().filter(|pmem| pmem.discard_writes).for_each(|pmem| pmem.copy = true);
    }

    /// Reads the JSON of `vm.create`. `null` means "not given" everywhere, and unknown fields are ignored.
    ///
    /// # Errors
    /// Text that is not JSON, or a value of the wrong type; the message names the field.
    pub fn from_json(text: &[u8]) -> Result<Self, JsonError> {
        json::read(text)
    }
}
