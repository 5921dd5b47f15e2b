//! The Wayland wire format: one message in, its arguments out, driven by the interface's table.
//!
//! Both ends are hostile: every length is checked before it is used, and a message must be exactly as long as its
//! signature says. Layout: `u32 object, u16 opcode, u16 size`, then the arguments in 32-bit words, in host byte order
//! (Wayland protocol, "Wire Format").

use wayland_backend::protocol::{AllowNull, ArgumentType, MessageDesc};

/// Bytes of the fixed header in front of every message.
pub const HEADER: usize = 8;
/// The longest message the 16-bit length can express, rounded down to a whole word.
pub const MAX_MESSAGE: usize = 0xfffc;
/// Object ids from here on are given out by the server, those below by the client.
pub const SERVER_IDS: u32 = 0xff00_0000;

/// What can be wrong with a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The header's length is below 8, above the limit, or no multiple of 4.
    #[error("a message claims the impossible size of {0} bytes")]
    Size(u16),
    /// An argument runs past the end of its message.
    #[error("a message is too short for its arguments")]
    Short,
    /// Bytes are left over after the last argument.
    #[error("a message is longer than its arguments")]
    Long,
    /// A string without its terminating NUL, or null where null is not allowed.
    #[error("a message has a malformed string")]
    Text,
    /// A null object or a null new id where none is allowed.
    #[error("a message has a null object where none is allowed")]
    Null,
}

/// The header of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// The object the message is for (request) or from (event).
    pub object: u32,
    /// Index into the interface's requests or events.
    pub opcode: u16,
    /// Length of the whole message in bytes, header included.
    pub size: usize,
}

/// The word at `at`, if it lies within `bytes`.
pub fn word(bytes: &[u8], at: usize) -> Option<u32> {
    let raw = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_ne_bytes(raw.try_into().ok()?))
}

/// Overwrites the word at `at`; does nothing if it lies outside (callers use positions [`parse`] returned).
pub fn set_word(bytes: &mut [u8], at: usize, value: u32) {
    if let Some(raw) = at.checked_add(4).and_then(|end| bytes.get_mut(at..end)) {
        raw.copy_from_slice(&value.to_ne_bytes());
    }
}

/// Reads the header of the first message in `bytes`. `None` if the message is not complete yet.
///
/// # Errors
///
/// [`WireError::Size`] if the length can never be right.
pub fn header(bytes: &[u8]) -> Result<Option<Header>, WireError> {
    let (Some(object), Some(second)) = (word(bytes, 0), word(bytes, 4)) else { return Ok(None) };
    let [opcode, size] = [second & 0xffff, second >> 16].map(|half| u16::try_from(half).unwrap_or(u16::MAX));
    let length = usize::from(size);
    if !(HEADER..=MAX_MESSAGE).contains(&length) || !length.is_multiple_of(4) {
        return Err(WireError::Size(size));
    }
    Ok((bytes.len() >= length).then_some(Header { object, opcode, size: length }))
}

/// One argument of a message and where it lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arg {
    /// Any of the plain 32-bit kinds (int, uint, fixed).
    Word {
        /// The bits; reinterpret as `i32` for signed kinds.
        value: u32,
    },
    /// A reference to an object; 0 is null.
    Object {
        /// Byte position in the message.
        at: usize,
        /// The id.
        id: u32,
    },
    /// An object this message creates.
    NewId {
        /// Byte position in the message.
        at: usize,
        /// The id.
        id: u32,
    },
    /// A string, without its NUL. Null strings are empty.
    Text {
        /// Byte position of the first character.
        at: usize,
        /// Length in bytes without the NUL.
        len: usize,
    },
    /// An array of bytes; the proxy never looks into one.
    Array,
    /// A file descriptor, which travels beside the bytes.
    Fd,
}

impl Arg {
    /// The plain word of an int or uint argument.
    pub fn word(&self) -> Option<u32> {
        match *self {
            Arg::Word { value } => Some(value),
            _ => None,
        }
    }
}

/// A cursor over the arguments.
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Cursor<'_> {
    fn word(&mut self) -> Result<(usize, u32), WireError> {
        let at = self.at;
        let value = word(self.bytes, at).ok_or(WireError::Short)?;
        self.at = at.checked_add(4).ok_or(WireError::Short)?;
        Ok((at, value))
    }

    /// Skips a length-prefixed field and returns its position and length.
    fn block(&mut self) -> Result<(usize, usize), WireError> {
        let (_, len) = self.word()?;
        let len = usize::try_from(len).map_err(|_| WireError::Short)?;
        let padded = len.checked_next_multiple_of(4).ok_or(WireError::Short)?;
        let at = self.at;
        let end = at.checked_add(padded).filter(|&end| end <= self.bytes.len()).ok_or(WireError::Short)?;
        self.at = end;
        Ok((at, len))
    }

    fn text(&mut self, null: AllowNull) -> Result<Arg, WireError> {
        let (at, len) = self.block()?;
        let Some(len) = len.checked_sub(1) else {
            return if null == AllowNull::Yes { Ok(Arg::Text { at, len: 0 }) } else { Err(WireError::Text) };
        };
        let characters = self.bytes.get(at..at + len).ok_or(WireError::Short)?;
        if self.bytes.get(at + len) != Some(&0) || characters.contains(&0) {
            return Err(WireError::Text);
        }
        Ok(Arg::Text { at, len })
    }
}

/// Splits `message` (header included, exactly one message) into `args` according to `desc`.
///
/// # Errors
///
/// Any [`WireError`] if the bytes do not match the signature exactly.
pub fn parse(message: &[u8], desc: &MessageDesc, args: &mut Vec<Arg>) -> Result<(), WireError> {
    args.clear();
    let mut cursor = Cursor { bytes: message, at: HEADER };
    for kind in desc.signature {
        let arg = match *kind {
            ArgumentType::Int | ArgumentType::Uint | ArgumentType::Fixed => Arg::Word { value: cursor.word()?.1 },
            ArgumentType::Str(null) => cursor.text(null)?,
            ArgumentType::Object(null) => {
                let (at, id) = cursor.word()?;
                if id == 0 && null == AllowNull::No {
                    return Err(WireError::Null);
                }
                Arg::Object { at, id }
            }
            ArgumentType::NewId => {
                let (at, id) = cursor.word()?;
                if id == 0 {
                    return Err(WireError::Null);
                }
                Arg::NewId { at, id }
            }
            ArgumentType::Array => {
                cursor.block()?;
                Arg::Array
            }
            ArgumentType::Fd => Arg::Fd,
        };
        args.push(arg);
    }
    if cursor.at == message.len() { Ok(()) } else { Err(WireError::Long) }
}

/// Builds one message; for the few the proxy says on its own account.
pub struct Builder {
    bytes: Vec<u8>,
}

impl Builder {
    /// Starts a message of `object`.
    pub fn new(object: u32, opcode: u16) -> Self {
        let mut bytes = Vec::with_capacity(64);
        bytes.extend_from_slice(&object.to_ne_bytes());
        bytes.extend_from_slice(&u32::from(opcode).to_ne_bytes());
        Self { bytes }
    }

    /// Appends a 32-bit argument.
    #[must_use]
    pub fn word(mut self, value: u32) -> Self {
        self.bytes.extend_from_slice(&value.to_ne_bytes());
        self
    }

    /// Appends a string, cut to what a message can carry.
    #[must_use]
    pub fn text(mut self, text: &str) -> Self {
        let text = text.as_bytes().get(..2048).unwrap_or(text.as_bytes());
        let len = u32::try_from(text.len() + 1).unwrap_or(1);
        self = self.word(len);
        self.bytes.extend_from_slice(text);
        self.bytes.push(0);
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
        self
    }

    /// The finished message, with its length filled in.
    pub fn finish(mut self) -> Vec<u8> {
        let size = u32::try_from(self.bytes.len()).unwrap_or(0) << 16;
        let opcode = word(&self.bytes, 4).unwrap_or(0) & 0xffff;
        set_word(&mut self.bytes, 4, size | opcode);
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::super::table;
    use super::*;

    fn desc(interface: &str, request: &str) -> &'static MessageDesc {
        let table = table::global(interface).unwrap();
        table.requests.iter().find(|m| m.name == request).unwrap()
    }

    fn bind(text: &[u8], len: u32) -> Vec<u8> {
        let mut m = Builder::new(2, 0).word(7).word(len).finish();
        m.extend_from_slice(text);
        m.extend_from_slice(&4u32.to_ne_bytes());
        m.extend_from_slice(&9u32.to_ne_bytes());
        m
    }

    fn registry_bind() -> &'static MessageDesc {
        &table::display().requests[1].child_interface.unwrap().requests[0]
    }

    #[test]
    fn header_waits_for_the_whole_message_and_rejects_impossible_sizes() {
        let message = Builder::new(3, 1).word(5).finish();
        for len in 0..message.len() {
            assert_eq!(header(&message[..len]), Ok(None), "{len} bytes");
        }
        assert_eq!(header(&message), Ok(Some(Header { object: 3, opcode: 1, size: 12 })));
        for size in [0u32, 4, 7, 9, 0xffff, 0xfffd] {
            let mut bad = message.clone();
            set_word(&mut bad, 4, size << 16);
            assert_eq!(header(&bad), Err(WireError::Size(u16::try_from(size).unwrap())), "{size}");
        }
    }

    #[test]
    fn bind_is_read_with_its_anonymous_new_id() {
        let mut args = Vec::new();
        let message = bind(b"wl_shm\0\0", 7);
        parse(&message, registry_bind(), &mut args).unwrap();
        assert_eq!(args[0], Arg::Word { value: 7 });
        assert_eq!(args[1], Arg::Text { at: 16, len: 6 });
        assert_eq!(args[2], Arg::Word { value: 4 });
        assert_eq!(args[3], Arg::NewId { at: 28, id: 9 });
    }

    #[test]
    fn hostile_strings_are_refused() {
        let mut args = Vec::new();
        let mut check = |message: &[u8]| parse(message, registry_bind(), &mut args);
        assert_eq!(check(&bind(b"wl_shmX\0", 7)), Err(WireError::Text), "no NUL where the length says");
        assert_eq!(check(&bind(b"wl\0shm\0\0", 7)), Err(WireError::Text), "NUL inside");
        assert_eq!(check(&bind(b"", 0)), Err(WireError::Text), "null");
        assert_eq!(check(&bind(b"wl_shm\0\0", u32::MAX)), Err(WireError::Short), "length overflows");
        assert_eq!(check(&bind(b"wl_shm\0\0", 0x7fff_fffc)), Err(WireError::Short), "length past the end");
    }

    #[test]
    fn messages_must_be_exactly_as_long_as_their_signature() {
        let create = desc("wl_shm", "create_pool");
        let mut args = Vec::new();
        let good = Builder::new(4, 0).word(5).word(4096).finish();
        parse(&good, create, &mut args).unwrap();
        assert_eq!(args, [Arg::NewId { at: 8, id: 5 }, Arg::Fd, Arg::Word { value: 4096 }]);
        assert_eq!(parse(&good[..12], create, &mut args), Err(WireError::Short));
        let long = Builder::new(4, 0).word(5).word(4096).word(0).finish();
        assert_eq!(parse(&long, create, &mut args), Err(WireError::Long));
        let null = Builder::new(4, 0).word(0).word(4096).finish();
        assert_eq!(parse(&null, create, &mut args), Err(WireError::Null));
    }

    #[test]
    fn random_bytes_never_panic() {
        let mut seed = 0x2545_f491_4f6c_dd1du64;
        let mut bytes = [0u8; 96];
        let mut args = Vec::new();
        for round in 0..200_000usize {
            for byte in &mut bytes {
                seed ^= seed << 13;
                seed ^= seed >> 7;
                seed ^= seed << 17;
                *byte = u8::try_from(seed & 0xff).unwrap() & if round % 2 == 0 { 0xff } else { 0x0f };
            }
            let _ = header(&bytes);
            let _ = parse(&bytes, registry_bind(), &mut args);
        }
    }

    #[test]
    fn built_text_is_padded_and_terminated() {
        let message = Builder::new(1, 0).word(2).word(3).text("abcd").finish();
        assert_eq!(message.len(), 8 + 8 + 4 + 8);
        let mut args = Vec::new();
        parse(&message, &table::display().events[0], &mut args).unwrap();
        assert_eq!(args[2], Arg::Text { at: 20, len: 4 });
    }
}
