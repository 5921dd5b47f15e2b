//! `cpus`: virtual processors.

use serde::{Deserialize, Serialize};

use crate::keyvalue::{ParseError, Syntax};
use crate::unsupported::{Section, Unsupported};

/// How many virtual CPUs the machine has.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(from = "Given")]
pub struct CpusConfig {
    /// CPUs present at boot.
    pub boot_vcpus: u32,
    /// CPUs there can ever be. Not given: as many as at boot.
    pub max_vcpus: u32,
    /// Options that are not supported yet.
    #[serde(flatten)]
    pub unsupported: Unsupported<CpusConfig>,
}

/// What the JSON holds: unlike the value made of it, the maximum may be left out.
#[derive(Deserialize)]
struct Given {
    boot_vcpus: Option<u32>,
    max_vcpus: Option<u32>,
    #[serde(flatten)]
    unsupported: Unsupported<CpusConfig>,
}

impl From<Given> for CpusConfig {
    fn from(given: Given) -> Self {
        let boot_vcpus = given.boot_vcpus.unwrap_or(1);
        Self { boot_vcpus, max_vcpus: given.max_vcpus.unwrap_or(boot_vcpus), unsupported: given.unsupported }
    }
}

impl Default for CpusConfig {
    fn default() -> Self {
        Self { boot_vcpus: 1, max_vcpus: 1, unsupported: Unsupported::default() }
    }
}

impl Section for CpusConfig {
    // `max_phys_bits`, `nested` and `core_scheduling` are limits and hints that may be ignored.
    const UNSUPPORTED: &'static [&'static str] = &["affinity", "features", "kvm_hyperv", "topology"];
}

impl CpusConfig {
    /// The flag's syntax.
    pub const SYNTAX: Syntax = Syntax {
        flag: "--cpus",
        words: &[],
        keys: &["boot", "max", "max_phys_bits", "nested", "core_scheduling"],
        unsupported: Self::UNSUPPORTED,
    };

    /// Reads `boot=4,max=8`.
    ///
    /// # Errors
    /// An unknown key or a value that is no number.
    pub fn parse(text: &str) -> Result<Self, ParseError> {
        let options = Self::SYNTAX.parse(text)?;
        let boot_vcpus = options.number("boot")?.unwrap_or(1);
        let max_vcpus = options.number("max")?.unwrap_or(boot_vcpus);
        Ok(Self { boot_vcpus, max_vcpus, ..Self::default() })
    }
}
