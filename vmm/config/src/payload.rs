//! `payload`: what the machine boots.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::unsupported::{Section, Unsupported};

/// The kernel and what it is handed.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct PayloadConfig {
    /// Kernel file: a bzImage, or an ELF file with a PVH note; an Image on Arm.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kernel: Option<PathBuf>,
    /// Kernel command line.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cmdline: Option<String>,
    /// Initial RAM disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initramfs: Option<PathBuf>,
    /// Firmware to boot instead of a kernel. Not supported yet.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub firmware: Option<PathBuf>,
    /// Options that are not supported yet.
    #[serde(flatten)]
    pub unsupported: Unsupported<PayloadConfig>,
}

impl Section for PayloadConfig {
    const UNSUPPORTED: &'static [&'static str] = &["fw_cfg_config", "host_data", "igvm"];
}
