//! `fs`: the file system in which a guest sees what it was granted, and the grants.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::json::{self, JsonError};
use crate::keyvalue::{ParseError, Syntax};
use crate::unsupported::{Section, Unsupported};

/// The user and group of the guest to whom all files belong, if nothing else is said: a system's first user.
const FIRST_USER: u32 = 1000;

/// One file system.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct FsConfig {
    /// The name by which the guest mounts it, at most 36 bytes.
    pub tag: String,
    /// The guest's user to whom all files belong.
    pub uid: u32,
    /// The guest's group to which all files belong.
    pub gid: u32,
    /// Name of the device, unique in the machine. Not given: one is made up.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Socket of a vhost-user process, as Cloud Hypervisor has it. Not supported.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
    /// Options that are not supported yet.
    #[serde(flatten)]
    pub unsupported: Unsupported<FsConfig>,
}

impl Default for FsConfig {
    fn default() -> Self {
        Self {
            tag: String::new(),
            uid: FIRST_USER,
            gid: FIRST_USER,
            id: None,
            socket: None,
            unsupported: Unsupported::default(),
        }
    }
}

impl Section for FsConfig {
    const UNSUPPORTED: &'static [&'static str] = &["pci_segment"];
}

impl FsConfig {
    /// The flag's syntax. Numbers and sizes of queues go with a socket, and are refused with it.
    pub const SYNTAX: Syntax = Syntax {
        flag: "--fs",
        words: &[],
        keys: &["tag", "uid", "gid", "id", "socket", "num_queues", "queue_size"],
        unsupported: Self::UNSUPPORTED,
    };

    /// Reads `tag=host,uid=1000,gid=1000`.
    ///
    /// # Errors
    /// No `tag`, an unknown key or a value that cannot be read.
    pub fn parse(text: &str) -> Result<Self, ParseError> {
        let options = Self::SYNTAX.parse(text)?;
        Ok(Self {
            tag: options.required("tag", "NAME")?,
            uid: options.number("uid")?.unwrap_or(FIRST_USER),
            gid: options.number("gid")?.unwrap_or(FIRST_USER),
            id: options.owned("id"),
            socket: options.owned("socket"),
            unsupported: Unsupported::default(),
        })
    }
}

/// What `vm.add-grant` is told: a file or directory that the guest may use from now on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GrantConfig {
    /// The device in which it is to appear.
    pub id: String,
    /// Its name there, in the root.
    pub name: String,
    /// The file or directory. Not given: a descriptor of it comes along with the request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// The guest may change it.
    #[serde(default)]
    pub writable: bool,
}

impl GrantConfig {
    /// Reads the body of a request.
    ///
    /// # Errors
    /// As [`crate::VmConfig::from_json`], and for a field that is not known.
    pub fn from_json(text: &[u8]) -> Result<Self, JsonError> {
        json::read(text)
    }
}

/// What `vm.remove-grant` is told.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GrantName {
    /// The device.
    pub id: String,
    /// The grant's name.
    pub name: String,
}

impl GrantName {
    /// Reads the body of a request.
    ///
    /// # Errors
    /// As [`GrantConfig::from_json`].
    pub fn from_json(text: &[u8]) -> Result<Self, JsonError> {
        json::read(text)
    }
}
