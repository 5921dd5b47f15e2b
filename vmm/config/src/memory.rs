//! `memory`: guest RAM.

use serde::{Deserialize, Serialize};

use crate::keyvalue::{ParseError, Syntax};
use crate::unsupported::{Section, Unsupported};

/// Bytes of guest memory if nothing else is said.
pub const DEFAULT_MEMORY_SIZE: u64 = 512 << 20;

/// How much memory the guest has, and of what kind.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct MemoryConfig {
    /// Bytes.
    pub size: u64,
    /// Shareable with other processes (a memfd mapped shared), as vhost-user devices need it. Off is private memory.
    pub shared: bool,
    /// Huge pages. Not supported yet.
    pub hugepages: bool,
    /// Let the kernel use transparent huge pages. A hint.
    pub thp: bool,
    /// Options that are not supported yet.
    #[serde(flatten)]
    pub unsupported: Unsupported<MemoryConfig>,
}

impl Default for MemoryConfig {
    fn default() -> Self {
        Self {
            size: DEFAULT_MEMORY_SIZE,
            shared: false,
            hugepages: false,
            thp: true,
            unsupported: Unsupported::default(),
        }
    }
}

impl Section for MemoryConfig {
    // `hotplug_method` says nothing without a `hotplug_size`.
    const UNSUPPORTED: &'static [&'static str] =
        &["hotplug_size", "hotplugged_size", "hugepage_size", "mergeable", "prefault", "zones"];
}

impl MemoryConfig {
    /// The flag's syntax.
    pub const SYNTAX: Syntax = Syntax {
        flag: "--memory",
        words: &[],
        keys: &["size", "shared", "hugepages", "thp", "hotplug_method"],
        unsupported: Self::UNSUPPORTED,
    };

    /// Reads `size=512M,shared=on`.
    ///
    /// # Errors
    /// An unknown key or a value that cannot be read.
    pub fn parse(text: &str) -> Result<Self, ParseError> {
        let options = Self::SYNTAX.parse(text)?;
        Ok(Self {
            size: options.size("size")?.unwrap_or(DEFAULT_MEMORY_SIZE),
            shared: options.toggle("shared", false)?,
            hugepages: options.toggle("hugepages", false)?,
            thp: options.toggle("thp", true)?,
            unsupported: Unsupported::default(),
        })
    }
}
