//! The cross-domain command stream, checked before rutabaga sees it. Pure: bytes in, commands out.
//!
//! rutabaga 0.1.85 trusts what is checked here: a command of size 0 makes it spin, a wrong ring panics, a wrong guess
//! of a pipe's number leaks the pipe.

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Commands of the protocol that a Wayland context needs. Others (events, sockets, virtio-fs handles, memory
/// sentinels) are refused: nothing on a Wayland connection can have made what they name.
pub mod cmd {
    #![allow(missing_docs)]
    pub const INIT: u8 = 1;
    pub const GET_IMAGE_REQUIREMENTS: u8 = 2;
    pub const POLL: u8 = 3;
    pub const SEND: u8 = 4;
    pub const RECEIVE: u8 = 5;
    pub const READ: u8 = 6;
    pub const WRITE: u8 = 7;
}

/// No channel: the context only asks for image requirements.
pub const CHANNEL_NONE: u32 = 0;
/// A connection to the Wayland compositor.
pub const CHANNEL_WAYLAND: u32 = 1;

/// Kind of identifier: a blob.
pub const ID_BLOB: u32 = 1;
/// Kind of identifier: a pipe the guest reads.
pub const ID_READ_PIPE: u32 = 3;
/// Kind of identifier: a pipe the guest writes.
pub const ID_WRITE_PIPE: u32 = 4;

/// The most identifiers, hence file descriptors, of one message.
pub const MAX_IDENTIFIERS: usize = 28;

/// The most commands of one submission.
const MAX_COMMANDS: usize = 1024;

/// Begins every command and every event.
#[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Header {
    /// What it is.
    pub cmd: u8,
    /// The ring it concerns.
    pub ring_idx: u8,
    /// Bytes, this header included.
    pub cmd_size: U16,
    /// Nothing.
    pub pad: U32,
}

/// SEND and RECEIVE; data follows.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Message {
    /// The header.
    pub header: Header,
    /// How many identifiers count.
    pub num_identifiers: U32,
    /// Bytes of data.
    pub opaque_data_size: U32,
    /// What stands for the file descriptors.
    pub identifiers: [U32; MAX_IDENTIFIERS],
    /// What each is.
    pub types: [U32; MAX_IDENTIFIERS],
    /// How large each is.
    pub sizes: [U32; MAX_IDENTIFIERS],
}

/// READ and WRITE; data follows.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct PipeData {
    /// The header.
    pub header: Header,
    /// The pipe.
    pub identifier: U32,
    /// Whether this is the end.
    pub hang_up: U32,
    /// Bytes of data.
    pub opaque_data_size: U32,
    /// Nothing.
    pub pad: U32,
}

/// What image memory is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Image {
    /// Pixels.
    pub width: U32,
    /// Pixels.
    pub height: U32,
    /// The DRM fourcc.
    pub format: U32,
    /// What for.
    pub flags: U32,
}

/// One checked command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command<'a> {
    /// Connect.
    Init(Init),
    /// What would this image need?
    Image(Image, &'a [u8]),
    /// Nothing by itself; the fence that comes with it waits.
    Poll,
    /// Send a message to the compositor.
    Send {
        /// Blobs that go with it.
        blobs: Vec<u32>,
        /// The number guessed for a new pipe whose write end goes with it.
        read_pipe: Option<u32>,
        /// The whole command.
        bytes: &'a [u8],
    },
    /// Write into a pipe.
    Write {
        /// Which.
        pipe: u32,
        /// Close it.
        hang_up: bool,
        /// The whole command.
        bytes: &'a [u8],
    },
}

/// Connection of a context.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Init {
    /// The resource in which answers are expected.
    pub query_ring: u32,
    /// The resource in which events are expected.
    pub channel_ring: u32,
    /// What to connect to.
    pub channel: u32,
}

/// Why a command stream is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Invalid {
    /// A command is shorter than its kind, or longer than what is left.
    #[error("cross-domain command {cmd} of {size} bytes with {left} bytes left")]
    Size {
        /// The command.
        cmd: u8,
        /// What it says.
        size: usize,
        /// What there is.
        left: usize,
    },
    /// The rest is no command.
    #[error("{0} bytes are too few for a cross-domain command")]
    Trailing(usize),
    /// Not for Wayland contexts.
    #[error("cross-domain command {0} is not supported")]
    Command(u8),
    /// More than [`MAX_COMMANDS`].
    #[error("too many cross-domain commands at once")]
    Count,
    /// Not for a guest of ours.
    #[error("cross-domain channel {0:#x} is not supported")]
    Channel(u32),
    /// Too many, of a kind that cannot be sent, or with no data to go with.
    #[error("the identifiers of a cross-domain message make no sense")]
    Identifiers,
    /// The data is not inside the command.
    #[error("{0} bytes of data are not in the cross-domain command")]
    Data(usize),
}

/// Checks a whole command stream.
///
/// # Errors
/// What is wrong with the first command that is; nothing has been executed then.
pub fn validate(mut bytes: &[u8]) -> Result<Vec<Command<'_>>, Invalid> {
    let mut commands = Vec::new();
    while !bytes.is_empty() {
        let (header, _) = Header::ref_from_prefix(bytes).map_err(|_| Invalid::Trailing(bytes.len()))?;
        let size = usize::from(header.cmd_size.get());
        let wrong = Invalid::Size { cmd: header.cmd, size, left: bytes.len() };
        if size < size_of::<Header>() {
            return Err(wrong);
        }
        let (command, rest) = bytes.split_at_checked(size).ok_or(wrong)?;
        if commands.len() >= MAX_COMMANDS {
            return Err(Invalid::Count);
        }
        commands.push(one(header, command)?);
        bytes = rest;
    }
    Ok(commands)
}

fn one<'a>(header: &Header, bytes: &'a [u8]) -> Result<Command<'a>, Invalid> {
    match header.cmd {
        cmd::INIT => init(bytes),
        cmd::GET_IMAGE_REQUIREMENTS => Ok(Command::Image(*part::<Image>(bytes, 8)?, bytes)),
        cmd::POLL => part::<[u8; 8]>(bytes, 8).map(|_| Command::Poll),
        cmd::SEND => send(bytes),
        cmd::WRITE => write(bytes),
        other => Err(Invalid::Command(other)),
    }
}

/// The structure at `offset` of a command.
fn part<T: FromBytes + KnownLayout + Immutable + Unaligned>(bytes: &[u8], offset: usize) -> Result<&T, Invalid> {
    let size = Invalid::Size { cmd: bytes.first().copied().unwrap_or(0), size: bytes.len(), left: bytes.len() };
    let rest = bytes.get(offset..).unwrap_or_default();
    T::ref_from_prefix(rest).map(|(value, _)| value).map_err(|_| size)
}

fn init(bytes: &[u8]) -> Result<Command<'_>, Invalid> {
    let word = |offset| part::<U32>(bytes, offset).map(|word| word.get());
    let init = match bytes.len() {
        16 => Init { query_ring: word(8)?, channel_ring: word(8)?, channel: word(12)? },
        20 | 36 => Init { query_ring: word(8)?, channel_ring: word(12)?, channel: word(16)? },
        size => return Err(Invalid::Size { cmd: cmd::INIT, size, left: size }),
    };
    match init.channel {
        CHANNEL_NONE | CHANNEL_WAYLAND => Ok(Command::Init(init)),
        other => Err(Invalid::Channel(other)),
    }
}

fn data(bytes: &[u8], offset: usize, size: U32) -> Result<usize, Invalid> {
    let size = usize::try_from(size.get()).unwrap_or(usize::MAX);
    let inside = offset.checked_add(size).is_some_and(|end| end <= bytes.len());
    if inside { Ok(size) } else { Err(Invalid::Data(size)) }
}

fn send(bytes: &[u8]) -> Result<Command<'_>, Invalid> {
    let message = part::<Message>(bytes, 0)?;
    let size = data(bytes, size_of::<Message>(), message.opaque_data_size)?;
    let count = usize::try_from(message.num_identifiers.get()).unwrap_or(usize::MAX);
    // A stream socket drops file descriptors that go with no data.
    if count > MAX_IDENTIFIERS || size == 0 {
        return Err(Invalid::Identifiers);
    }
    let (mut blobs, mut read_pipe) = (Vec::new(), None);
    for (identifier, kind) in message.identifiers.iter().zip(&message.types).take(count) {
        match kind.get() {
            ID_BLOB => blobs.push(identifier.get()),
            ID_READ_PIPE if read_pipe.is_none() => read_pipe = Some(identifier.get()),
            _ => return Err(Invalid::Identifiers),
        }
    }
    Ok(Command::Send { blobs, read_pipe, bytes })
}

fn write(bytes: &[u8]) -> Result<Command<'_>, Invalid> {
    let write = part::<PipeData>(bytes, 0)?;
    data(bytes, size_of::<PipeData>(), write.opaque_data_size)?;
    Ok(Command::Write { pipe: write.identifier.get(), hang_up: write.hang_up.get() != 0, bytes })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn header(cmd: u8, size: u16) -> Vec<u8> {
        Header { cmd, cmd_size: size.into(), ..Header::default() }.as_bytes().to_vec()
    }

    fn command(cmd: u8, size: u16) -> Vec<u8> {
        let mut bytes = header(cmd, size);
        bytes.resize(usize::from(size), 0);
        bytes
    }

    #[test]
    fn a_command_of_no_size_is_refused() {
        // R1: rutabaga would execute it for ever.
        for size in 0..8 {
            let mut bytes = header(cmd::POLL, size);
            bytes.extend([0; 8]);
            assert!(matches!(validate(&bytes), Err(Invalid::Size { cmd: cmd::POLL, .. })), "{size}");
        }
    }

    #[test]
    fn commands_have_at_least_their_structure_and_end_with_the_stream() {
        for (cmd, least) in
            [(cmd::INIT, 16), (cmd::GET_IMAGE_REQUIREMENTS, 24), (cmd::POLL, 16), (cmd::SEND, 353), (cmd::WRITE, 24)]
        {
            let mut good = command(cmd, least);
            if cmd == cmd::SEND {
                good[12] = 1;
            }
            assert!(validate(&good).is_ok(), "{cmd}");
            assert!(validate(&command(cmd, least - 1)).is_err(), "{cmd}");
            good.push(0);
            assert!(validate(&good).is_err(), "trailing byte after {cmd}");
            good.truncate(usize::from(least) - 1);
            assert!(validate(&good).is_err(), "{cmd} cut off");
        }
        assert_eq!(validate(&[]), Ok(Vec::new()));
    }

    #[test]
    fn only_three_lengths_and_two_channels_of_init() {
        for size in 8..64 {
            assert_eq!(validate(&command(cmd::INIT, size)).is_ok(), [16, 20, 36].contains(&size), "{size}");
        }
        let mut internal = command(cmd::INIT, 36);
        internal[16..20].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(validate(&internal), Err(Invalid::Channel(u32::MAX)));
    }

    #[test]
    fn data_and_identifiers_are_inside_the_message() {
        let mut bytes = command(cmd::SEND, 360);
        let message = |count: u32, size: u32, kind: u32, bytes: &mut Vec<u8>| {
            bytes[8..12].copy_from_slice(&count.to_le_bytes());
            bytes[12..16].copy_from_slice(&size.to_le_bytes());
            bytes[128..132].copy_from_slice(&kind.to_le_bytes());
            validate(bytes).is_ok()
        };
        assert!(message(1, 8, ID_BLOB, &mut bytes));
        assert!(message(1, 8, ID_READ_PIPE, &mut bytes));
        assert!(!message(1, 8, ID_WRITE_PIPE, &mut bytes));
        assert!(!message(1, 8, 6, &mut bytes), "virtio-fs files");
        assert!(!message(2, 8, ID_READ_PIPE, &mut bytes), "the second is of no kind");
        assert!(!message(29, 8, ID_BLOB, &mut bytes));
        assert!(!message(u32::MAX, 8, ID_BLOB, &mut bytes));
        assert!(!message(1, 9, ID_BLOB, &mut bytes));
        assert!(!message(1, u32::MAX, ID_BLOB, &mut bytes));
        assert!(!message(1, 0, ID_BLOB, &mut bytes));
        let mut write = command(cmd::WRITE, 32);
        for (size, good) in [(0u32, true), (8, true), (9, false), (u32::MAX, false)] {
            write[16..20].copy_from_slice(&size.to_le_bytes());
            assert_eq!(validate(&write).is_ok(), good, "{size}");
        }
    }

    #[test]
    fn everything_else_is_refused() {
        for cmd in [0, 5, 6].into_iter().chain(8..=255) {
            assert_eq!(validate(&command(cmd, 352)), Err(Invalid::Command(cmd)));
        }
    }

    proptest! {
        #[test]
        fn what_passes_covers_the_stream_exactly(
            parts in prop::collection::vec((0u8..9, 0u16..600, prop::collection::vec(any::<u8>(), 0..600)), 0..6)
        ) {
            let mut stream = Vec::new();
            for (cmd, size, body) in parts {
                stream.extend(header(cmd, size));
                stream.extend(body);
            }
            if let Ok(commands) = validate(&stream) {
                let mut total = 0;
                let mut rest = stream.as_slice();
                for command in &commands {
                    let size = usize::from(u16::from_le_bytes([rest[2], rest[3]]));
                    prop_assert!(size >= 8);
                    if let Command::Send { bytes, blobs, .. } = command {
                        prop_assert!(blobs.len() <= MAX_IDENTIFIERS && bytes.len() == size);
                    }
                    total += size;
                    rest = &rest[size..];
                }
                prop_assert_eq!(total, stream.len());
            }
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
            let _ = validate(&bytes);
        }
    }
}
