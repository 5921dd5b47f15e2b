//! `platform`: properties of the machine as a whole.

use serde::{Deserialize, Serialize};

use crate::keyvalue::{ParseError, Syntax};
use crate::unsupported::{Section, Unsupported};

/// Properties of the machine. Only the defaults are supported yet.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct PlatformConfig {
    /// PCI segments; 1 is the only number supported yet.
    pub num_pci_segments: u16,
    /// Options that are not supported yet.
    #[serde(flatten)]
    pub unsupported: Unsupported<PlatformConfig>,
}

impl Default for PlatformConfig {
    fn default() -> Self {
        Self { num_pci_segments: 1, unsupported: Unsupported::default() }
    }
}

impl Section for PlatformConfig {
    // `iommu_address_width` says nothing without an IOMMU.
    const UNSUPPORTED: &'static [&'static str] =
        &["iommu_segments", "oem_strings", "serial_number", "sev_snp", "tdx", "uuid"];
}

impl PlatformConfig {
    /// The flag's syntax.
    pub const SYNTAX: Syntax = Syntax {
        flag: "--platform",
        words: &[],
        keys: &["num_pci_segments", "iommu_address_width"],
        unsupported: Self::UNSUPPORTED,
    };

    /// Reads `num_pci_segments=1`.
    ///
    /// # Errors
    /// An unknown key or a value that is no number.
    pub fn parse(text: &str) -> Result<Self, ParseError> {
        let options = Self::SYNTAX.parse(text)?;
        Ok(Self { num_pci_segments: options.number("num_pci_segments")?.unwrap_or(1), ..Self::default() })
    }
}
