//! `pmem`: files the guest sees as persistent memory.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::keyvalue::{ParseError, Syntax};
use crate::unsupported::{Section, Unsupported};

/// One persistent-memory device.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PmemConfig {
    /// The file, mapped into the guest.
    pub file: PathBuf,
    /// Bytes. Not given: the file's size. Either is padded to a multiple of 2 MiB with pages that have no file behind.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
    /// Open the file read-only: what the guest writes is seen by it alone and lost at the end, and machines share the
    /// clean pages.
    #[serde(default)]
    pub discard_writes: bool,
    /// Read the file into memory of the machine's own at its start, so that it has no page in common with others. Only
    /// with `discard_writes`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub copy: bool,
    /// Name of the device, unique in the machine. Not given: one is made up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Options that are not supported yet.
    #[serde(flatten)]
    pub unsupported: Unsupported<PmemConfig>,
}

impl Section for PmemConfig {
    const UNSUPPORTED: &'static [&'static str] = &["iommu", "pci_segment"];
}

impl PmemConfig {
    /// The flag's syntax.
    pub const SYNTAX: Syntax = Syntax {
        flag: "--pmem",
        words: &[],
        keys: &["file", "size", "discard_writes", "copy", "id"],
        unsupported: Self::UNSUPPORTED,
    };

    /// Reads `file=/images/root.erofs,discard_writes=on`.
    ///
    /// # Errors
    /// No `file`, an unknown key or a value that cannot be read.
    pub fn parse(text: &str) -> Result<Self, ParseError> {
        let options = Self::SYNTAX.parse(text)?;
        Ok(Self {
            file: options.required("file", "FILE")?,
            size: options.size("size")?,
            discard_writes: options.toggle("discard_writes", false)?,
            copy: options.toggle("copy", false)?,
            id: options.owned("id"),
            unsupported: Unsupported::default(),
        })
    }
}
