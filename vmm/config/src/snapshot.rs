//! Where snapshots go and come from: what `vm.snapshot`, `vm.restore` and `--restore` are told.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::json::{self, JsonError};
use crate::keyvalue::{ParseError, Syntax};
use crate::net::Ipv4Network;

/// The directory a `file://` URL names; nothing if it is no such URL.
fn directory(url: &str) -> Option<&Path> {
    let path = Path::new(url.strip_prefix("file://")?);
    path.is_absolute().then_some(path)
}

/// What `vm.snapshot` is told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotConfig {
    /// `file://` and the absolute path of a directory.
    pub destination_url: String,
}

impl SnapshotConfig {
    /// The directory the URL names; nothing if it names none.
    pub fn directory(&self) -> Option<&Path> {
        directory(&self.destination_url)
    }

    /// Reads the body of a request.
    ///
    /// # Errors
    /// As [`crate::VmConfig::from_json`].
    pub fn from_json(text: &[u8]) -> Result<Self, JsonError> {
        json::read(text)
    }
}

/// How guest memory comes out of a snapshot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MemoryRestoreMode {
    /// All of it is read before the guest runs.
    Copy,
    /// Each part is read when the guest first touches it.
    OnDemand,
    /// The file is mapped; the guest's changes are its own.
    #[default]
    CopyOnWrite,
}

/// What `vm.restore` and `--restore` are told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreConfig {
    /// `file://` and the absolute path of a snapshot's directory.
    pub source_url: String,
    /// Read memory in: all of it on demand, while the guest runs; copy-on-write the recorded working set, or all if none
    /// was recorded, before it runs.
    #[serde(default)]
    pub prefault: bool,
    /// How memory is restored.
    #[serde(default)]
    pub memory_restore_mode: MemoryRestoreMode,
    /// Let the guest run at once; otherwise the machine is paused.
    #[serde(default)]
    pub resume: bool,
    /// Let the machine have copies of its own of memory and images, whatever `memory_restore_mode` says.
    #[serde(default)]
    pub no_share: bool,
}

impl RestoreConfig {
    /// The flag's syntax.
    pub const SYNTAX: Syntax = Syntax {
        flag: "--restore",
        words: &[],
        keys: &["source_url", "prefault", "memory_restore_mode", "resume", "no_share"],
        unsupported: &["net_fds"],
    };

    /// Reads `source_url=file:///DIR,memory_restore_mode=copy|ondemand|copyonwrite,prefault=on|off,resume=true|false`.
    ///
    /// # Errors
    /// An unknown key or a value that cannot be read.
    pub fn parse(text: &str) -> Result<Self, ParseError> {
        let options = Self::SYNTAX.parse(text)?;
        let mode = match options.text("memory_restore_mode") {
            None => MemoryRestoreMode::default(),
            Some("copy") => MemoryRestoreMode::Copy,
            Some("ondemand") => MemoryRestoreMode::OnDemand,
            Some("copyonwrite") => MemoryRestoreMode::CopyOnWrite,
            Some(other) => return Err(options.bad("memory_restore_mode", other, "copy, ondemand or copyonwrite")),
        };
        Ok(Self {
            source_url: options.required("source_url", "the snapshot's directory, as file:///DIR")?,
            prefault: options.toggle("prefault", false)?,
            memory_restore_mode: mode,
            resume: options.toggle("resume", false)?,
            no_share: options.toggle("no_share", false)?,
        })
    }

    /// The directory the URL names; nothing if it names none.
    pub fn directory(&self) -> Option<&Path> {
        directory(&self.source_url)
    }

    /// Reads the body of a request.
    ///
    /// # Errors
    /// As [`crate::VmConfig::from_json`].
    pub fn from_json(text: &[u8]) -> Result<Self, JsonError> {
        json::read(text)
    }
}

/// What `--zygote` is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ZygoteConfig {
    /// `file://` and the absolute path of a snapshot's directory.
    pub source_url: String,
    /// Where requests for clones are answered.
    pub socket: PathBuf,
    /// How many clones wait for requests, stopped just before their first instruction.
    pub pool: u8,
    /// Let clones have the recorded working set, or all memory if none was recorded, before they run.
    pub prefault: bool,
}

impl ZygoteConfig {
    /// The flag's syntax.
    pub const SYNTAX: Syntax =
        Syntax { flag: "--zygote", words: &[], keys: &["source_url", "socket", "pool", "prefault"], unsupported: &[] };

    /// Reads `source_url=file:///DIR,socket=PATH,pool=N,prefault=on|off`.
    ///
    /// # Errors
    /// An unknown or missing key, or a value that cannot be read.
    pub fn parse(text: &str) -> Result<Self, ParseError> {
        let options = Self::SYNTAX.parse(text)?;
        Ok(Self {
            source_url: options.required("source_url", "the snapshot's directory, as file:///DIR")?,
            socket: options.required("socket", "a path, such as /run/zygote.sock")?,
            pool: options.number("pool")?.unwrap_or(0),
            prefault: options.toggle("prefault", false)?,
        })
    }

    /// The directory the URL names; nothing if it names none.
    pub fn directory(&self) -> Option<&Path> {
        directory(&self.source_url)
    }
}

/// In what a clone differs from the machine it is made of: what `vm.clone` is told.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CloneConfig {
    /// What the descriptors are that come along with the request, in their order: `api`, a listening socket for the
    /// clone's API; `working-set`, a file with what it is to have before it runs, as `vm.working-set` wrote it; `owner`, a socket or pipe with whose other end the clone ends; `serial` and `console`, where text goes and input comes from; or the identifier of a device (such as
    /// `_vsock0`), a listening socket for it. What an interface (`_net0`) gets is connected, a socket or a tap; the link of one
    /// that gets nothing is down, whatever the template's was connected to.
    pub fds: Vec<String>,
    /// Begins the paths of the sockets that the guest's connections go to, instead of the template's.
    pub vsock_socket: Option<PathBuf>,
    /// The compositor's socket, instead of the template's.
    pub wayland: Option<PathBuf>,
    /// Where the guest's packets may not go, instead of the template's `deny`: for each interface.
    pub net_deny: Option<Vec<Ipv4Network>>,
    /// Leave the clone paused, for its API to resume.
    pub paused: bool,
    /// Let the clone have copies of its own of memory and images. It is made for the occasion and takes as long as
    /// copying them does.
    pub no_share: bool,
}

impl CloneConfig {
    /// Reads the body of a request.
    ///
    /// # Errors
    /// As [`crate::VmConfig::from_json`], and for a field that is not known.
    pub fn from_json(text: &[u8]) -> Result<Self, JsonError> {
        json::read(text)
    }
}
