//! `gpu`: the graphics device, ours alone.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::keyvalue::{ParseError, Syntax};
use crate::unsupported::{Section, Unsupported};

/// Bytes of guest address space in which host buffers are shown, if nothing else is said.
pub const DEFAULT_GPU_WINDOW: u64 = 8 << 30;

/// What the graphics device can do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GpuMode {
    /// Wayland messages and buffers cross to the host's compositor; no rendering on the host.
    #[default]
    CrossDomain,
}

/// One graphics device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct GpuConfig {
    /// What it can do.
    pub mode: GpuMode,
    /// Socket of the Wayland compositor.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub wayland: Option<PathBuf>,
    /// Bytes of the shared-memory window; a power of two. It costs address space, not memory.
    pub window: u64,
    /// Name of the device, unique in the machine. Not given: one is made up.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Socket of a vhost-user graphics process, as Spectrum uses it. Not supported yet.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
    /// Options that are not supported yet.
    #[serde(flatten)]
    pub unsupported: Unsupported<GpuConfig>,
}

impl Default for GpuConfig {
    fn default() -> Self {
        Self {
            mode: GpuMode::default(),
            wayland: None,
            window: DEFAULT_GPU_WINDOW,
            id: None,
            socket: None,
            unsupported: Unsupported::default(),
        }
    }
}

impl Section for GpuConfig {
    const UNSUPPORTED: &'static [&'static str] = &["pci_segment"];
}

impl GpuConfig {
    /// The flag's syntax.
    pub const SYNTAX: Syntax = Syntax {
        flag: "--gpu",
        words: &["cross-domain"],
        keys: &["wayland", "window", "id", "socket"],
        unsupported: Self::UNSUPPORTED,
    };

    /// Reads `cross-domain,wayland=/run/user/1000/wayland-0`.
    ///
    /// # Errors
    /// Neither `cross-domain` with `wayland` nor `socket`, an unknown key or a value that cannot be read.
    pub fn parse(text: &str) -> Result<Self, ParseError> {
        let options = Self::SYNTAX.parse(text)?;
        let flag = Self::SYNTAX.flag;
        let socket = options.owned("socket");
        if socket.is_none() && options.words().is_empty() {
            let reason = "say what kind of device it is: cross-domain,wayland=SOCKET";
            return Err(ParseError::Combination { flag, reason });
        }
        if socket.is_some() && (!options.words().is_empty() || options.text("wayland").is_some()) {
            let reason = "socket= (a vhost-user device) does not go with cross-domain or wayland=; keep one of them";
            return Err(ParseError::Combination { flag, reason });
        }
        let wayland = match socket {
            Some(_) => None,
            None => Some(options.required("wayland", "SOCKET")?),
        };
        Ok(Self {
            mode: GpuMode::CrossDomain,
            wayland,
            window: options.size("window")?.unwrap_or(DEFAULT_GPU_WINDOW),
            id: options.owned("id"),
            socket,
            unsupported: Unsupported::default(),
        })
    }
}
