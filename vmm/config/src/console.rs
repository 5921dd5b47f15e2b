//! `serial` and `console`: where the guest's text goes.

use std::ops::{Deref, DerefMut};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::keyvalue::{ParseError, Syntax};
use crate::unsupported::{Section, Unsupported};

/// What stands behind a console device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ConsoleMode {
    /// No device at all.
    Off,
    /// A new pseudo-terminal; its path is in `vm.info` once the machine is created.
    Pty,
    /// Standard input and output of the VMM.
    Tty,
    /// Output goes to a file; there is no input.
    File,
    /// A Unix socket. Not supported yet.
    Socket,
    /// The device is there; output is thrown away and there is no input.
    Null,
}

/// A console device: the virtio console, or inside [`SerialConfig`] the serial port.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ConsoleConfig {
    /// The output file of mode `File`; of mode `Pty`, the terminal that was made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// What stands behind the device.
    pub mode: ConsoleMode,
    /// The socket of mode `Socket`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
    /// Options that are not supported yet.
    #[serde(flatten)]
    pub unsupported: Unsupported<ConsoleConfig>,
}

impl Default for ConsoleConfig {
    fn default() -> Self {
        Self::of(ConsoleMode::Tty)
    }
}

impl Section for ConsoleConfig {
    const UNSUPPORTED: &'static [&'static str] = &["iommu", "pci_segment"];
}

impl ConsoleConfig {
    /// The flag's syntax.
    pub const SYNTAX: Syntax = syntax("--console");

    /// A console of `mode`, without a file.
    pub fn of(mode: ConsoleMode) -> Self {
        Self { file: None, mode, socket: None, unsupported: Unsupported::default() }
    }

    /// Reads `tty`, `file=/path`, `pty`, `null` or `off`.
    ///
    /// # Errors
    /// Anything else, or more than one of them.
    pub fn parse(text: &str) -> Result<Self, ParseError> {
        parse(Self::SYNTAX, text)
    }
}

/// The serial port: the same settings as a console's, and another default.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SerialConfig(pub ConsoleConfig);

impl Default for SerialConfig {
    fn default() -> Self {
        Self(ConsoleConfig::of(ConsoleMode::Null))
    }
}

impl Deref for SerialConfig {
    type Target = ConsoleConfig;

    fn deref(&self) -> &ConsoleConfig {
        &self.0
    }
}

impl DerefMut for SerialConfig {
    fn deref_mut(&mut self) -> &mut ConsoleConfig {
        &mut self.0
    }
}

impl SerialConfig {
    /// The flag's syntax.
    pub const SYNTAX: Syntax = syntax("--serial");

    /// Reads `tty`, `file=/path`, `pty`, `null` or `off`.
    ///
    /// # Errors
    /// Anything else, or more than one of them.
    pub fn parse(text: &str) -> Result<Self, ParseError> {
        parse(Self::SYNTAX, text).map(Self)
    }
}

const fn syntax(flag: &'static str) -> Syntax {
    Syntax {
        flag,
        words: &["tty", "pty", "null", "off"],
        keys: &["file", "socket"],
        unsupported: ConsoleConfig::UNSUPPORTED,
    }
}

fn parse(syntax: Syntax, text: &str) -> Result<ConsoleConfig, ParseError> {
    let flag = syntax.flag;
    let options = syntax.parse(text)?;
    let one = || ParseError::Combination { flag, reason: "give exactly one of tty, pty, file=PATH, null and off" };
    let missing = |key| ParseError::Missing { flag, key, example: "PATH" };
    match (options.words(), options.owned::<PathBuf>("file"), options.owned::<PathBuf>("socket")) {
        ([word], None, None) => Ok(ConsoleConfig::of(match *word {
            "tty" => ConsoleMode::Tty,
            "pty" => ConsoleMode::Pty,
            "null" => ConsoleMode::Null,
            _ => ConsoleMode::Off,
        })),
        ([], Some(file), None) if file.as_os_str().is_empty() => Err(missing("file")),
        ([], None, Some(socket)) if socket.as_os_str().is_empty() => Err(missing("socket")),
        ([], Some(file), None) => Ok(ConsoleConfig { file: Some(file), ..ConsoleConfig::of(ConsoleMode::File) }),
        ([], None, Some(socket)) => {
            Ok(ConsoleConfig { socket: Some(socket), ..ConsoleConfig::of(ConsoleMode::Socket) })
        }
        _ => Err(one()),
    }
}
