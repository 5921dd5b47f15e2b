//! The `key=value,key=value` text that follows a flag on the command line.
//!
//! Syntax as in Cloud Hypervisor: pairs are separated by commas; a comma inside double quotes or square brackets does
//! not separate; the quotes themselves are dropped, and a doubled quote stands for one. Some flags also take single
//! words (`--serial tty`). Booleans are `on/off`, `true/false`, `yes/no`; sizes are bytes or have a suffix K, M, G or T
//! (`512M`, `1GiB`).

use std::str::FromStr;

use thiserror::Error;

/// Why the text after a flag was not understood. Each message is one sentence that says what would be.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ParseError {
    /// Nothing after the flag.
    #[error("{flag}: the value is empty; accepted: {accepted}")]
    Empty {
        /// The flag, with its dashes.
        flag: &'static str,
        /// What the flag takes.
        accepted: String,
    },
    /// A key (or single word) this flag does not have.
    #[error("{flag}: unknown key \"{key}\"{}; accepted: {accepted}", suggestion(.nearest))]
    UnknownKey {
        /// The flag, with its dashes.
        flag: &'static str,
        /// The key as given.
        key: String,
        /// The accepted key that looks most like it.
        nearest: Option<&'static str>,
        /// What the flag takes.
        accepted: String,
    },
    /// A key without `=value`.
    #[error("{flag}: {key} needs a value: write {key}=VALUE")]
    NoValue {
        /// The flag, with its dashes.
        flag: &'static str,
        /// The key.
        key: &'static str,
    },
    /// One key twice.
    #[error("{flag}: {key} is given twice; keep one of them")]
    Duplicate {
        /// The flag, with its dashes.
        flag: &'static str,
        /// The key.
        key: &'static str,
    },
    /// A key that must be there is not.
    #[error("{flag}: {key} is missing; give {key}={example}")]
    Missing {
        /// The flag, with its dashes.
        flag: &'static str,
        /// The key.
        key: &'static str,
        /// What its value looks like.
        example: &'static str,
    },
    /// A value that cannot be read.
    #[error("{flag}: {key}={value} is not {expected}")]
    BadValue {
        /// The flag, with its dashes.
        flag: &'static str,
        /// The key.
        key: &'static str,
        /// The value as given.
        value: String,
        /// What is accepted.
        expected: String,
    },
    /// Two keys that exclude each other, or a key that its companion does not allow.
    #[error("{flag}: {reason}")]
    Combination {
        /// The flag, with its dashes.
        flag: &'static str,
        /// What does not go together, and what to do.
        reason: &'static str,
    },
    /// Quotes or brackets that are not closed.
    #[error("{flag}: a quote or bracket is not closed in \"{text}\"")]
    Unbalanced {
        /// The flag, with its dashes.
        flag: &'static str,
        /// The whole text.
        text: String,
    },
    /// A key of Cloud Hypervisor's that this VMM does not have yet.
    #[error("{flag}: {key} is not supported yet; leave it out")]
    NotSupported {
        /// The flag, with its dashes.
        flag: &'static str,
        /// The key.
        key: &'static str,
    },
}

fn suggestion(nearest: &Option<&'static str>) -> String {
    nearest.map_or_else(String::new, |name| format!(" (did you mean \"{name}\"?)"))
}

/// What one flag takes.
#[derive(Clone, Copy, Debug)]
pub struct Syntax {
    /// The flag, with its dashes, for messages.
    pub flag: &'static str,
    /// Words that stand alone.
    pub words: &'static [&'static str],
    /// Keys that take a value.
    pub keys: &'static [&'static str],
    /// Keys that are known but refused, unless their value asks for nothing (`off`, `0`).
    pub unsupported: &'static [&'static str],
}

/// The largest number of characters two words may differ by for one to be suggested in place of the other.
const SUGGESTION_DISTANCE: usize = 3;

/// The name most like `given`, if any is like it at all.
pub fn nearest(given: &str, names: impl IntoIterator<Item = &'static str>) -> Option<&'static str> {
    // The distance takes time in proportion to both lengths, and no name is nearly this long.
    if given.len() > 64 {
        return None;
    }
    names
        .into_iter()
        .map(|name| (strsim::damerau_levenshtein(given, name), name))
        .filter(|(distance, name)| *distance <= SUGGESTION_DISTANCE && *distance < name.len())
        .min()
        .map(|(_, name)| name)
}

impl Syntax {
    /// Splits `text` and checks every key. The values are read by the methods of [`Options`].
    ///
    /// # Errors
    /// Empty text, an unknown, doubled or unsupported key, a key without value, unbalanced quotes or brackets.
    pub fn parse(&self, text: &str) -> Result<Options, ParseError> {
        let flag = self.flag;
        if text.trim().is_empty() {
            return Err(ParseError::Empty { flag, accepted: self.accepted() });
        }
        let mut options = Options { flag, words: Vec::new(), values: Vec::new() };
        for part in split_outside_quotes(text).ok_or_else(|| ParseError::Unbalanced { flag, text: text.to_owned() })? {
            let (name, value) = match part.split_once('=') {
                Some((name, value)) => (name.trim(), Some(unquote(value))),
                None => (part.trim(), None),
            };
            self.add(&mut options, name, value)?;
        }
        Ok(options)
    }

    fn add(&self, options: &mut Options, name: &str, value: Option<String>) -> Result<(), ParseError> {
        let flag = self.flag;
        if let Some(&word) = self.words.iter().find(|word| **word == name)
            && value.is_none()
        {
            if options.words.contains(&word) {
                return Err(ParseError::Duplicate { flag, key: word });
            }
            options.words.push(word);
            return Ok(());
        }
        if let Some(&key) = self.keys.iter().find(|key| **key == name) {
            let value = value.ok_or(ParseError::NoValue { flag, key })?;
            if options.values.iter().any(|(other, _)| *other == key) {
                return Err(ParseError::Duplicate { flag, key });
            }
            options.values.push((key, value));
            return Ok(());
        }
        if let Some(&key) = self.unsupported.iter().find(|key| **key == name) {
            return match value.as_deref() {
                Some("off" | "false" | "no" | "0" | "" | "[]") => Ok(()),
                _ => Err(ParseError::NotSupported { flag, key }),
            };
        }
        let candidates: Vec<_> = match value {
            Some(_) => self.keys.to_vec(),
            None => self.words.iter().chain(self.keys).copied().collect(),
        };
        Err(ParseError::UnknownKey {
            flag,
            key: name.to_owned(),
            nearest: nearest(name, candidates),
            accepted: self.accepted(),
        })
    }

    fn accepted(&self) -> String {
        let words = self.words.iter().map(|word| (*word).to_owned());
        // A leading underscore marks a key that is taken for the sake of existing scripts.
        let keys = self.keys.iter().filter(|key| !key.starts_with('_')).map(|key| format!("{key}="));
        words.chain(keys).collect::<Vec<_>>().join(", ")
    }
}

/// The checked keys and values after one flag.
#[derive(Clone, Debug)]
pub struct Options {
    flag: &'static str,
    words: Vec<&'static str>,
    values: Vec<(&'static str, String)>,
}

impl Options {
    /// The words that stood alone.
    pub fn words(&self) -> &[&'static str] {
        &self.words
    }

    /// The value of `key` as text.
    pub fn text(&self, key: &str) -> Option<&str> {
        self.values.iter().find(|(name, _)| *name == key).map(|(_, value)| value.as_str())
    }

    /// The value of `key`, if it is there, as an owned text or path.
    pub fn owned<T: for<'a> From<&'a str>>(&self, key: &str) -> Option<T> {
        self.text(key).map(T::from)
    }

    /// The value of a key that must be there and not be empty; `example` shows what it looks like.
    ///
    /// # Errors
    /// The key is missing.
    pub fn required<T: for<'a> From<&'a str>>(
        &self,
        key: &'static str,
        example: &'static str,
    ) -> Result<T, ParseError> {
        self.text(key).filter(|value| !value.is_empty()).map(T::from).ok_or(ParseError::Missing {
            flag: self.flag,
            key,
            example,
        })
    }

    /// A boolean; `default` without the key.
    ///
    /// # Errors
    /// The value is none of the six words.
    pub fn toggle(&self, key: &'static str, default: bool) -> Result<bool, ParseError> {
        match self.text(key) {
            None => Ok(default),
            Some("on" | "true" | "yes") => Ok(true),
            Some("off" | "false" | "no") => Ok(false),
            Some(value) => Err(self.bad(key, value, "on or off (true, false, yes and no are the same)")),
        }
    }

    /// A size in bytes.
    ///
    /// # Errors
    /// The value is no size, or does not fit 64 bits.
    pub fn size(&self, key: &'static str) -> Result<Option<u64>, ParseError> {
        let Some(value) = self.text(key) else { return Ok(None) };
        parse_size(value).map(Some).ok_or_else(|| self.bad(key, value, "a size such as 512M, 2G or a number of bytes"))
    }

    /// A whole number.
    ///
    /// # Errors
    /// The value is no number, or beyond `T`.
    pub fn number<T: FromStr>(&self, key: &'static str) -> Result<Option<T>, ParseError> {
        let Some(value) = self.text(key) else { return Ok(None) };
        value.parse().map(Some).map_err(|_| self.bad(key, value, "a whole number of the accepted range"))
    }

    /// The error for a value that was not understood.
    pub fn bad(&self, key: &'static str, value: &str, expected: &str) -> ParseError {
        ParseError::BadValue { flag: self.flag, key, value: value.to_owned(), expected: expected.to_owned() }
    }
}

/// Reads a number of bytes: digits with an optional suffix K, M, G or T (powers of 1024; `M`, `MB` and `MiB` are the
/// same). `None` if it is not one or exceeds 64 bits.
pub fn parse_size(text: &str) -> Option<u64> {
    let text = text.trim();
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, suffix) = text.split_at_checked(digits)?;
    let shift = match suffix.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(1 << shift)
}

/// Cuts at the commas outside quotes and brackets; `None` if one of those is not closed.
fn split_outside_quotes(text: &str) -> Option<Vec<&str>> {
    let mut parts = Vec::new();
    let (mut start, mut depth, mut quoted) = (0, 0_u32, false);
    for (at, character) in text.char_indices() {
        match character {
            '"' => quoted = !quoted,
            '[' if !quoted => depth = depth.checked_add(1)?,
            ']' if !quoted => depth = depth.checked_sub(1)?,
            ',' if !quoted && depth == 0 => {
                parts.push(text.get(start..at)?);
                start = at + 1;
            }
            _ => {}
        }
    }
    if quoted || depth != 0 {
        return None;
    }
    parts.push(text.get(start..)?);
    Some(parts)
}

/// Drops the quotes; a doubled one stands for itself.
fn unquote(text: &str) -> String {
    let mut result = String::with_capacity(text.len());
    let mut characters = text.chars().peekable();
    let mut quoted = false;
    while let Some(character) = characters.next() {
        if character != '"' {
            result.push(character);
        } else if quoted && characters.peek() == Some(&'"') {
            characters.next();
            result.push('"');
        } else {
            quoted = !quoted;
        }
    }
    result
}
