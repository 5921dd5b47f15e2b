//! Options that Cloud Hypervisor has and this VMM does not have yet.
//!
//! A field nobody knows is ignored, but a field with a meaning that we do not carry out must not be: the user would
//! get another machine than the one described. So each section lists such fields, their values are kept, and
//! [`crate::VmConfig::check`] reports those that ask for something.

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;

/// A configuration section with fields that are known but not supported.
pub trait Section {
    /// The names of those fields.
    const UNSUPPORTED: &'static [&'static str];
}

/// The fields of section `S` that ask for something this VMM cannot do yet, by name.
pub struct Unsupported<S> {
    fields: BTreeMap<String, Value>,
    section: PhantomData<fn() -> S>,
}

impl<S> Unsupported<S> {
    /// The names of the fields, in alphabetical order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.fields.keys().map(String::as_str)
    }
}

/// Whether a value asks for nothing: off, zero, empty, or made of such values only.
fn asks_for_nothing(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(on) => !on,
        Value::Number(number) => number.as_u64() == Some(0),
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        // A console section is always written in full; this is its form for "none".
        Value::Object(members) if members.get("mode").and_then(Value::as_str) == Some("Off") => true,
        Value::Object(members) => members.values().all(asks_for_nothing),
    }
}

impl<'de, S: Section> Deserialize<'de> for Unsupported<S> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut fields = BTreeMap::<String, Value>::deserialize(deserializer)?;
        fields.retain(|name, value| S::UNSUPPORTED.contains(&name.as_str()) && !asks_for_nothing(value));
        Ok(Self { fields, section: PhantomData })
    }
}

impl<S> Serialize for Unsupported<S> {
    fn serialize<T: Serializer>(&self, serializer: T) -> Result<T::Ok, T::Error> {
        self.fields.serialize(serializer)
    }
}

// Written out because a derive would ask the same of `S`.
impl<S> Default for Unsupported<S> {
    fn default() -> Self {
        Self { fields: BTreeMap::new(), section: PhantomData }
    }
}

impl<S> Clone for Unsupported<S> {
    fn clone(&self) -> Self {
        Self { fields: self.fields.clone(), section: PhantomData }
    }
}

impl<S> PartialEq for Unsupported<S> {
    fn eq(&self, other: &Self) -> bool {
        self.fields == other.fields
    }
}

impl<S> fmt::Debug for Unsupported<S> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.fields.fmt(formatter)
    }
}
