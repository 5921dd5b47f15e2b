//! Reading JSON written by other programs: `null` is the same as absent, and an error names the field.

use serde::de::DeserializeOwned;
use serde_json::Value;
use thiserror::Error;

/// Why a JSON configuration could not be read.
#[derive(Debug, Error)]
pub enum JsonError {
    /// The text is not JSON.
    #[error("the configuration is not valid JSON: {0}")]
    Syntax(#[source] serde_json::Error),
    /// A value is missing or has the wrong type.
    #[error("in the configuration, {path}: {source}")]
    Value {
        /// The field, such as `disks[0].path`.
        path: String,
        /// What is wrong with it.
        source: serde_json::Error,
    },
}

/// Reads a `T`, with every `null` member of an object taken as absent.
pub(crate) fn read<T: DeserializeOwned>(text: &[u8]) -> Result<T, JsonError> {
    let mut value: Value = serde_json::from_slice(text).map_err(JsonError::Syntax)?;
    drop_nulls(&mut value);
    serde_path_to_error::deserialize(value).map_err(|error| {
        let path = match error.path().to_string() {
            top if top == "." => "top level".to_owned(),
            path => path,
        };
        JsonError::Value { path, source: error.into_inner() }
    })
}

/// The depth is bounded: `serde_json` refuses text nested deeper than 128 levels.
fn drop_nulls(value: &mut Value) {
    match value {
        Value::Object(members) => {
            members.retain(|_, member| !member.is_null());
            members.values_mut().for_each(drop_nulls);
        }
        Value::Array(items) => items.iter_mut().for_each(drop_nulls),
        _ => {}
    }
}
