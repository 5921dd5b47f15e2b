//! What makes a VM another one than its twins: handed in by the host, checked wherever it is parsed.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use zeroize::Zeroize;

/// Longest host name Linux takes, in bytes: sethostname(2).
const HOSTNAME_MAX: usize = 64;

/// Longest part between dots, in bytes: RFC 1035 section 2.3.4.
const LABEL_MAX: usize = 63;

/// What an identity cannot be made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// Not [`Seed::LEN`] bytes in hexadecimal.
    #[error("a seed has {digits} hexadecimal digits", digits = 2 * Seed::LEN)]
    Seed,
    /// machine-id(5)
    #[error("a machine-id has 32 hexadecimal digits in lower case that are not all zero")]
    MachineId,
    /// random(4), RFC 9562 section 4
    #[error("a boot_id is a UUID: groups of 8, 4, 4, 4 and 12 hexadecimal digits in lower case that are not all zero")]
    BootId,
    /// hostname(7)
    #[error(
        "a host name has at most {HOSTNAME_MAX} letters, digits, hyphens and dots, and no part of it between dots is empty, \
         longer than {LABEL_MAX} or begins or ends with a hyphen"
    )]
    Hostname,
}

/// An identity of a VM. None of it may be used for two VMs, or twice for one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    /// For the kernel's random number generator.
    pub seed: Seed,
    /// The time, in nanoseconds since 1970-01-01 00:00 UTC, leap seconds not counted.
    pub realtime: u64,
    /// Becomes `/etc/machine-id`.
    pub machine_id: MachineId,
    /// Becomes `/proc/sys/kernel/random/boot_id`.
    pub boot_id: BootId,
    /// Becomes the host name; it stays as it is without one.
    #[serde(default)]
    pub hostname: Option<Hostname>,
}

/// Random bytes of the host that nobody else knows. Never printed, and wiped when dropped; in a box, because a value that is
/// moved leaves a copy where it was.
#[derive(Clone, PartialEq, Eq)]
pub struct Seed(Box<[u8; Self::LEN]>);

impl Seed {
    /// Bytes: as many as the kernel's generator has in its key.
    pub const LEN: usize = 32;

    /// Takes bytes that must be random.
    #[must_use]
    pub fn new(bytes: [u8; Self::LEN]) -> Self {
        Self(Box::new(bytes))
    }

    /// The bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; Self::LEN] {
        &self.0
    }
}

impl Drop for Seed {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl fmt::Debug for Seed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Seed(..)")
    }
}

impl Serialize for Seed {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut text = hex(self.as_bytes());
        let result = serializer.serialize_str(&text);
        text.zeroize();
        result
    }
}

impl<'de> Deserialize<'de> for Seed {
    /// Straight from the received bytes: the digits are copied nowhere on the way.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Digits;
        impl de::Visitor<'_> for Digits {
            type Value = Seed;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a seed")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Seed, E> {
                // The error must not show the digits.
                let mut seed = Seed::new([0; Seed::LEN]);
                unhex(text.as_bytes(), seed.0.as_mut_slice()).ok_or_else(|| E::custom(IdentityError::Seed))?;
                Ok(seed)
            }
        }
        deserializer.deserialize_str(Digits)
    }
}

fn hex(bytes: &[u8]) -> String {
    let digit = |value: u8| char::from_digit(value.into(), 16).unwrap_or_default();
    let mut text = String::with_capacity(2 * bytes.len());
    bytes.iter().for_each(|byte| text.extend([digit(byte >> 4), digit(byte & 15)]));
    text
}

/// Exactly as many lower-case digits as fill `bytes`.
fn unhex(digits: &[u8], bytes: &mut [u8]) -> Option<()> {
    let value = |digit: u8| match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    };
    let (pairs, rest) = digits.as_chunks::<2>();
    if pairs.len() != bytes.len() || !rest.is_empty() {
        return None;
    }
    for (byte, &[high, low]) in bytes.iter_mut().zip(pairs) {
        *byte = value(high)? << 4 | value(low)?;
    }
    Some(())
}

/// Makes random bytes a UUID of version 4: RFC 9562 section 5.4. Never all zero.
fn version_4(mut bytes: [u8; 16]) -> [u8; 16] {
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    bytes
}

fn parse_128(digits: &[u8]) -> Option<[u8; 16]> {
    let mut bytes = [0; 16];
    unhex(digits, &mut bytes)?;
    (bytes != [0; 16]).then_some(bytes)
}

/// machine-id(5): what programs take for the installation they run on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct MachineId([u8; 16]);

impl MachineId {
    /// From bytes that must be random.
    #[must_use]
    pub fn from_random(bytes: [u8; 16]) -> Self {
        Self(version_4(bytes))
    }
}

impl fmt::Display for MachineId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

impl FromStr for MachineId {
    type Err = IdentityError;
    fn from_str(text: &str) -> Result<Self, IdentityError> {
        parse_128(text.as_bytes()).map(Self).ok_or(IdentityError::MachineId)
    }
}

/// random(4): what programs take for the time since the last boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct BootId([u8; 16]);

/// Digits in each group of a UUID.
const GROUPS: [usize; 5] = [8, 4, 4, 4, 12];

impl BootId {
    /// From bytes that must be random.
    #[must_use]
    pub fn from_random(bytes: [u8; 16]) -> Self {
        Self(version_4(bytes))
    }
}

impl fmt::Display for BootId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = hex(&self.0);
        let mut rest = digits.as_str();
        for (index, count) in GROUPS.into_iter().enumerate() {
            let (group, after) = rest.split_at_checked(count).unwrap_or((rest, ""));
            write!(f, "{}{group}", if index == 0 { "" } else { "-" })?;
            rest = after;
        }
        Ok(())
    }
}

impl FromStr for BootId {
    type Err = IdentityError;
    fn from_str(text: &str) -> Result<Self, IdentityError> {
        if !text.split('-').map(str::len).eq(GROUPS) {
            return Err(IdentityError::BootId);
        }
        parse_128(text.replace('-', "").as_bytes()).map(Self).ok_or(IdentityError::BootId)
    }
}

/// hostname(7), as RFC 1123 section 2.1 allows them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Hostname(String);

impl Hostname {
    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Hostname {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Hostname {
    type Err = IdentityError;
    fn from_str(text: &str) -> Result<Self, IdentityError> {
        let allowed = |label: &str| label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
        let fits = |label: &str| (1..=LABEL_MAX).contains(&label.len());
        let good = |label: &str| fits(label) && allowed(label) && !label.starts_with('-') && !label.ends_with('-');
        if text.len() > HOSTNAME_MAX || !text.split('.').all(good) {
            return Err(IdentityError::Hostname);
        }
        Ok(Self(text.to_owned()))
    }
}

/// What serde wants of types that travel as text.
macro_rules! travels_as_text {
    ($($kind:ty),*) => {$(
        impl From<$kind> for String {
            fn from(value: $kind) -> Self {
                value.to_string()
            }
        }

        impl TryFrom<String> for $kind {
            type Error = IdentityError;
            fn try_from(text: String) -> Result<Self, IdentityError> {
                text.parse()
            }
        }
    )*};
}
travels_as_text!(MachineId, BootId, Hostname);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn refused<T: FromStr<Err = IdentityError> + fmt::Debug>(expected: IdentityError, texts: &[&str]) {
        for text in texts {
            assert_eq!(text.parse::<T>().unwrap_err(), expected, "{text:?}");
        }
    }

    #[test]
    fn a_machine_id_is_32_digits_in_lower_case() {
        let text = "0123456789abcdef0123456789abcdef";
        assert_eq!(text.parse::<MachineId>().unwrap().to_string(), text);
        assert!("00000000000000000000000000000001".parse::<MachineId>().is_ok());
        let wrong = [
            "",
            "0123456789abcdef0123456789abcde",
            "0123456789abcdef0123456789abcdef0",
            "0123456789ABCDEF0123456789abcdef",
            "0123456789abcdef0123456789abcdeg",
            "0123456789abcdef0123456789abcd\n",
            "01234567-89ab-cdef-0123-456789abcdef",
            "00000000000000000000000000000000",
            "0123456789abcdef0123456789abcd\u{e9}",
            "../../../../../../../etc/passwd.",
        ];
        refused::<MachineId>(IdentityError::MachineId, &wrong);
    }

    #[test]
    fn a_boot_id_is_a_uuid() {
        let text = "01234567-89ab-cdef-0123-456789abcdef";
        assert_eq!(text.parse::<BootId>().unwrap().to_string(), text);
        let wrong = [
            "",
            "0123456789abcdef0123456789abcdef",
            "01234567-89ab-cdef-0123-456789abcde",
            "01234567-89ab-cdef-0123-456789abcdef0",
            "01234567-89ab-cdef-0123-456789abcdeF",
            "0123456789ab--cdef-0123-456789abcdef",
            "01234567-89ab-cdef-0123-456789abcdef-",
            "{01234567-89ab-cdef-0123-456789abcdef}",
            "00000000-0000-0000-0000-000000000000",
            "0123456\u{e9}-89ab-cdef-0123-456789abcdef",
        ];
        refused::<BootId>(IdentityError::BootId, &wrong);
    }

    #[test]
    fn host_names_are_those_of_rfc_1123() {
        let longest = "a".repeat(63);
        for text in ["a", "gtk3-demo", "1", "A.b-c.D", &longest, &format!("{}.{}", "a".repeat(32), "b".repeat(31))] {
            assert_eq!(text.parse::<Hostname>().unwrap().as_str(), text);
        }
        let (long, longer) = ("a".repeat(64), format!("{}.{}", "a".repeat(33), "b".repeat(31)));
        let wrong =
            ["", ".", "a.", ".a", "a..b", "-a", "a-", "a.-b", "a_b", "a b", "a\0", "a\n", "\u{e9}", &long, &longer];
        refused::<Hostname>(IdentityError::Hostname, &wrong);
    }

    fn json(seed: &str) -> String {
        format!(
            r#"{{"seed":{seed},"realtime":1,"machine_id":"{}","boot_id":"{}"}}"#,
            MachineId::from_random([1; 16]),
            BootId::from_random([2; 16])
        )
    }

    #[test]
    fn a_seed_is_read_whole_and_never_shown() {
        let digits = "5a".repeat(Seed::LEN);
        let identity: Identity = serde_json::from_str(&json(&format!("{digits:?}"))).unwrap();
        assert_eq!(identity.seed.as_bytes(), &[0x5a; Seed::LEN]);
        assert!(!format!("{identity:?}").contains("5a5a") && !format!("{identity:?}").contains("90, 90"));
        assert!(serde_json::to_string(&identity).unwrap().contains(&digits));
        let wrong =
            ["5a".repeat(Seed::LEN - 1), "5a".repeat(Seed::LEN + 1), digits.to_uppercase(), digits.replace('5', "x")];
        for seed in wrong {
            let error = serde_json::from_str::<Identity>(&json(&format!("{seed:?}"))).unwrap_err().to_string();
            assert!(error.contains("64 hexadecimal digits") && !error.contains(&seed), "{error}");
        }
        for other in ["null", "[90]", "90"] {
            assert!(serde_json::from_str::<Identity>(&json(other)).is_err(), "{other}");
        }
    }

    #[test]
    fn random_bytes_become_ids_of_version_4() {
        assert_eq!(BootId::from_random([0xff; 16]).to_string(), "ffffffff-ffff-4fff-bfff-ffffffffffff");
        assert_eq!(MachineId::from_random([0; 16]).to_string(), "00000000000040008000000000000000");
    }

    proptest! {
        #[test]
        fn ids_survive_being_text(bytes in any::<[u8; 16]>()) {
            let (machine, boot) = (MachineId::from_random(bytes), BootId::from_random(bytes));
            prop_assert_eq!(machine.to_string().parse(), Ok(machine));
            prop_assert_eq!(boot.to_string().parse(), Ok(boot));
        }

        #[test]
        fn hostile_text_is_harmless(text in ".{0,80}") {
            let _ = text.parse::<MachineId>();
            let _ = text.parse::<BootId>();
            let _ = text.parse::<Hostname>();
        }
    }
}
