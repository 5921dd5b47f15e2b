//! `disks`: virtio block devices.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::keyvalue::{ParseError, Syntax};
use crate::unsupported::{Section, Unsupported};

/// Format of a disk image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ImageType {
    /// The disk's bytes, nothing else.
    #[serde(alias = "raw")]
    Raw,
    /// QEMU's copy-on-write format. Not supported yet.
    #[serde(alias = "qcow2")]
    Qcow2,
    /// Microsoft's fixed-size format. Not supported yet.
    #[serde(alias = "vhd", alias = "fixed-vhd")]
    FixedVhd,
    /// Microsoft's growing format. Not supported yet.
    #[serde(alias = "vhdx")]
    Vhdx,
    /// To be found out from the file.
    #[serde(alias = "unknown")]
    Unknown,
}

/// One block device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DiskConfig {
    /// The image.
    pub path: PathBuf,
    /// The guest cannot write.
    #[serde(default)]
    pub readonly: bool,
    /// Go around the host's page cache (`O_DIRECT`).
    #[serde(default)]
    pub direct: bool,
    /// Name of the device, unique in the machine. Not given: one is made up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Serial number the guest reads; at most 20 bytes (virtio 1.3, 5.2.6).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// Never use `io_uring`.
    #[serde(default)]
    pub disable_io_uring: bool,
    /// Never use Linux AIO.
    #[serde(default)]
    pub disable_aio: bool,
    /// Request queues.
    #[serde(default = "one_queue")]
    pub num_queues: u16,
    /// Entries of each queue; a power of two.
    #[serde(default = "default_queue_size")]
    pub queue_size: u16,
    /// Format of the image. Not given: raw.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_type: Option<ImageType>,
    /// Leave holes in the image for blocks the guest discards. A hint.
    #[serde(default = "yes")]
    pub sparse: bool,
    /// Options that are not supported yet.
    #[serde(flatten)]
    pub unsupported: Unsupported<DiskConfig>,
}

const fn one_queue() -> u16 {
    1
}

const fn default_queue_size() -> u16 {
    128
}

const fn yes() -> bool {
    true
}

impl Default for DiskConfig {
    fn default() -> Self {
        Self {
            path: PathBuf::new(),
            readonly: false,
            direct: false,
            id: None,
            serial: None,
            disable_io_uring: false,
            disable_aio: false,
            num_queues: one_queue(),
            queue_size: default_queue_size(),
            image_type: None,
            sparse: yes(),
            unsupported: Unsupported::default(),
        }
    }
}

impl Section for DiskConfig {
    const UNSUPPORTED: &'static [&'static str] = &[
        "backing_files",
        "bw_burst",
        "bw_one_time_burst",
        "bw_refill_time",
        "bw_size",
        "iommu",
        "lock_granularity",
        "ops_one_time_burst",
        "ops_refill_time",
        "ops_size",
        "pci_segment",
        "queue_affinity",
        "rate_limit_group",
        "rate_limiter_config",
        "vhost_socket",
        "vhost_user",
    ];
}

impl DiskConfig {
    /// The flag's syntax.
    pub const SYNTAX: Syntax = Syntax {
        flag: "--disk",
        words: &[],
        keys: &[
            "path",
            "readonly",
            "direct",
            "id",
            "serial",
            "image_type",
            "num_queues",
            "queue_size",
            "disable_io_uring",
            "disable_aio",
            "sparse",
            // Cloud Hypervisor spells these two with an underscore in front on its command line.
            "_disable_io_uring",
            "_disable_aio",
        ],
        unsupported: Self::UNSUPPORTED,
    };

    /// Reads `path=/images/root.img,readonly=on`.
    ///
    /// # Errors
    /// No `path`, an unknown key or a value that cannot be read.
    pub fn parse(text: &str) -> Result<Self, ParseError> {
        let options = Self::SYNTAX.parse(text)?;
        let image_type = match options.text("image_type") {
            None => None,
            Some("raw") => Some(ImageType::Raw),
            Some("qcow2") => Some(ImageType::Qcow2),
            Some("vhd" | "fixed-vhd") => Some(ImageType::FixedVhd),
            Some("vhdx") => Some(ImageType::Vhdx),
            Some("unknown") => Some(ImageType::Unknown),
            Some(other) => return Err(options.bad("image_type", other, "raw (the only format supported yet)")),
        };
        Ok(Self {
            path: options.required("path", "FILE")?,
            readonly: options.toggle("readonly", false)?,
            direct: options.toggle("direct", false)?,
            id: options.owned("id"),
            serial: options.owned("serial"),
            disable_io_uring: options.toggle("disable_io_uring", false)?
                || options.toggle("_disable_io_uring", false)?,
            disable_aio: options.toggle("disable_aio", false)? || options.toggle("_disable_aio", false)?,
            num_queues: options.number("num_queues")?.unwrap_or(one_queue()),
            queue_size: options.number("queue_size")?.unwrap_or(default_queue_size()),
            image_type,
            sparse: options.toggle("sparse", yes())?,
            unsupported: Unsupported::default(),
        })
    }
}
