//! `vsock`: sockets between host and guest.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::keyvalue::{ParseError, Syntax};
use crate::unsupported::{Section, Unsupported};

/// The vsock device: a Unix socket on the host's side, a context id on the guest's.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct VsockConfig {
    /// The guest's context id, from [`crate::FIRST_GUEST_CID`] on. Machines may have the same one.
    pub cid: u32,
    /// Path of the Unix socket the host connects to; the guest's connections go to `PATH_PORT`.
    pub socket: PathBuf,
    /// Name of the device, unique in the machine. Not given: one is made up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Options that are not supported yet.
    #[serde(flatten)]
    pub unsupported: Unsupported<VsockConfig>,
}

impl Section for VsockConfig {
    const UNSUPPORTED: &'static [&'static str] = &["iommu", "pci_segment"];
}

impl VsockConfig {
    /// The flag's syntax.
    pub const SYNTAX: Syntax =
        Syntax { flag: "--vsock", words: &[], keys: &["cid", "socket", "id"], unsupported: Self::UNSUPPORTED };

    /// Reads `cid=3,socket=/run/vm/vsock`.
    ///
    /// # Errors
    /// No `cid` or `socket`, an unknown key or a value that cannot be read.
    pub fn parse(text: &str) -> Result<Self, ParseError> {
        let options = Self::SYNTAX.parse(text)?;
        let cid =
            options.number("cid")?.ok_or(ParseError::Missing { flag: Self::SYNTAX.flag, key: "cid", example: "3" })?;
        Ok(Self {
            cid,
            socket: options.required("socket", "PATH")?,
            id: options.owned("id"),
            unsupported: Unsupported::default(),
        })
    }
}
