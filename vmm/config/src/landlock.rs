//! `landlock_rules`: paths beyond the machine's own that the VMM may use.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::keyvalue::{ParseError, Syntax};

/// What may be done below a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum LandlockAccess {
    /// Read only.
    #[serde(rename = "r")]
    Read,
    /// Write only.
    #[serde(rename = "w")]
    Write,
    /// Read and write.
    #[serde(rename = "rw", alias = "wr")]
    ReadWrite,
}

/// One path and what may be done below it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LandlockRule {
    /// File or directory.
    pub path: PathBuf,
    /// What may be done.
    pub access: LandlockAccess,
}

impl LandlockRule {
    /// The flag's syntax.
    pub const SYNTAX: Syntax =
        Syntax { flag: "--landlock-rules", words: &[], keys: &["path", "access"], unsupported: &[] };

    /// Reads `path=/dev/vfio,access=rw`.
    ///
    /// # Errors
    /// A missing or unknown key, or an access that is not made of `r` and `w`.
    pub fn parse(text: &str) -> Result<Self, ParseError> {
        let options = Self::SYNTAX.parse(text)?;
        let path = options.required("path", "PATH")?;
        let access: String = options.required("access", "rw")?;
        let access = match access.as_str() {
            "r" => LandlockAccess::Read,
            "w" => LandlockAccess::Write,
            "rw" | "wr" => LandlockAccess::ReadWrite,
            other => return Err(options.bad("access", other, "r, w or rw")),
        };
        Ok(Self { path, access })
    }
}
