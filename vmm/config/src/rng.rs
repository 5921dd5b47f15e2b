//! `rng`: the entropy device.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::keyvalue::{ParseError, Syntax};
use crate::unsupported::{Section, Unsupported};

/// Where the guest's entropy comes from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct RngConfig {
    /// A file that yields random bytes.
    pub src: PathBuf,
    /// Options that are not supported yet.
    #[serde(flatten)]
    pub unsupported: Unsupported<RngConfig>,
}

impl Default for RngConfig {
    fn default() -> Self {
        Self { src: PathBuf::from("/dev/urandom"), unsupported: Unsupported::default() }
    }
}

impl Section for RngConfig {
    const UNSUPPORTED: &'static [&'static str] = &["iommu", "pci_segment"];
}

impl RngConfig {
    /// The flag's syntax.
    pub const SYNTAX: Syntax = Syntax { flag: "--rng", words: &[], keys: &["src"], unsupported: Self::UNSUPPORTED };

    /// Reads `src=/dev/urandom`.
    ///
    /// # Errors
    /// No `src`, or an unknown key.
    pub fn parse(text: &str) -> Result<Self, ParseError> {
        let options = Self::SYNTAX.parse(text)?;
        Ok(Self { src: options.required("src", "/dev/urandom")?, unsupported: Unsupported::default() })
    }
}
