//! `snapshot.json`.

use std::io::ErrorKind;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{MANIFEST, MAX_MANIFEST, SnapshotError, VERSION, damaged, read_file};

/// Size and hash of a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FileSum {
    /// Bytes.
    pub size: u64,
    /// BLAKE3, in lower-case hexadecimal digits.
    pub blake3: String,
}

impl FileSum {
    pub fn of(bytes: &[u8]) -> Self {
        Self { size: bytes.len() as u64, blake3: blake3::hash(bytes).to_hex().to_string() }
    }
}

/// What a snapshot consists of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Manifest {
    pub version: u32,
    pub config: FileSum,
    pub state: FileSum,
    /// The hashes of the memory, which is verified by them.
    pub memory_sums: FileSum,
}

impl Manifest {
    pub fn to_text(&self) -> Vec<u8> {
        // Numbers and strings always have a form.
        serde_json::to_vec_pretty(self).unwrap_or_default()
    }

    pub fn read(directory: &Path) -> Result<Self, SnapshotError> {
        let path = directory.join(MANIFEST);
        let text = read_file(&path, MAX_MANIFEST).map_err(|e| match e {
            SnapshotError::File { source, .. } if source.kind() == ErrorKind::NotFound => {
                SnapshotError::Missing(directory.to_owned())
            }
            e => e,
        })?;
        let value: serde_json::Value = serde_json::from_slice(&text).map_err(|e| damaged(&path, e.to_string()))?;
        // First of all, since everything else may be different in another version.
        match value.get("version").and_then(serde_json::Value::as_u64) {
            Some(found) if found != u64::from(VERSION) => Err(SnapshotError::Version { path, found }),
            _ => serde_json::from_value(value).map_err(|e| damaged(&path, e.to_string())),
        }
    }
}
