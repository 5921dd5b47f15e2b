//! The cross-domain protocol over one [`Gpu`] context: bytes and descriptors to and from the host's Wayland socket.
//!
//! Little-endian structures that `rutabaga_gfx` defines (`cross_domain_protocol.rs`): every command starts with
//! `u8 cmd, u8 ring, u16 size, u32 pad`. The host puts one event at a time into the channel ring; a POLL asks for the next.

use std::collections::HashMap;
use std::io;
use std::os::fd::BorrowedFd;

use super::error::SessionError;
use super::gpu::{Gpu, HostBlob, RING_SIZE, Ring};

const CMD_INIT: u8 = 1;
const CMD_GET_IMAGE_REQUIREMENTS: u8 = 2;
const CMD_POLL: u8 = 3;
const CMD_SEND: u8 = 4;
const CMD_RECEIVE: u8 = 5;
const CMD_READ: u8 = 6;
const CMD_WRITE: u8 = 7;

const CHANNEL_TYPE_WAYLAND: u32 = 1;
const RING_NONE: u8 = 0xff;
const MAX_IDENTIFIERS: usize = 28;
const SEND_HEADER: usize = 16 + 3 * 4 * MAX_IDENTIFIERS;
const READ_WRITE_HEADER: usize = 24;
/// Bytes of Wayland data that go with one SEND, the same as the host puts into one RECEIVE.
const MAX_DATA: usize = RING_SIZE - SEND_HEADER;
/// Bytes of pipe data in one WRITE.
pub const MAX_WRITE: usize = RING_SIZE - READ_WRITE_HEADER;
/// The largest image the proxy asks for.
pub const MAX_IMAGE: usize = 1 << 29;

const FORMAT_R8: u32 = u32::from_le_bytes(*b"R8  ");
const USE_LINEAR: u32 = 1 << 4;
const PAGE: usize = 4096;
/// Ids of pipes the guest reads from count up from here; the guest must guess the next one.
const FIRST_READ_PIPE: u32 = 0x8000_0001;
/// Distinct image sizes remembered; the sizes asked for come in about 150 steps.
const MAX_REQUIREMENTS: usize = 512;

/// A descriptor as the protocol names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostFd {
    /// One of the `KIND_` numbers.
    pub kind: u32,
    /// What the host calls it.
    pub id: u32,
    /// Bytes, for memory.
    pub size: u32,
}

/// Identifier type: memory.
pub const KIND_BLOB: u32 = 1;
/// Identifier type: a pipe the guest reads, whose write end the host gets.
pub const KIND_READ_PIPE: u32 = 3;
/// Identifier type: a pipe the guest writes.
pub const KIND_WRITE_PIPE: u32 = 4;

/// What the host has to say.
#[derive(Debug, PartialEq, Eq)]
pub enum Event {
    /// Bytes from the compositor, with descriptors.
    Data {
        /// Part of the Wayland stream.
        bytes: Vec<u8>,
        /// Descriptors that came with it.
        fds: Vec<HostFd>,
    },
    /// The compositor closed the connection.
    Closed,
    /// Data from a pipe the guest reads.
    Pipe {
        /// The pipe.
        id: u32,
        /// What was in it.
        bytes: Vec<u8>,
        /// Whether it has ended.
        hang_up: bool,
    },
}

/// One application's connection to the host's compositor.
#[derive(Debug)]
pub struct Channel<G> {
    gpu: G,
    armed: bool,
    next_read_pipe: u32,
    /// Image size asked for, to the host's answer (blob id and true size). Each question costs the host memory it never
    /// frees, so none is asked twice.
    requirements: HashMap<usize, (u32, usize)>,
}

fn le32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

/// A command under construction.
struct Command(Vec<u8>);

impl Command {
    fn new(cmd: u8, ring: u8) -> Self {
        Self(vec![cmd, ring, 0, 0, 0, 0, 0, 0])
    }

    fn words(mut self, words: &[u32]) -> Self {
        self.0.extend(words.iter().flat_map(|word| word.to_le_bytes()));
        self
    }

    fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    /// Fills in the size; every command here is at most a ring's size long.
    fn finish(mut self) -> Vec<u8> {
        let size = u16::try_from(self.0.len()).unwrap_or(0);
        if let Some(field) = self.0.get_mut(2..4) {
            field.copy_from_slice(&size.to_le_bytes());
        }
        self.0
    }
}

impl<G: Gpu> Channel<G> {
    /// Connects `gpu`'s context to the host's Wayland socket and asks for its first event.
    ///
    /// # Errors
    ///
    /// The device refused a command.
    pub fn open(gpu: G) -> Result<Self, SessionError> {
        let mut channel = Self { gpu, armed: false, next_read_pipe: FIRST_READ_PIPE, requirements: HashMap::new() };
        let [query, events] = [Ring::Query, Ring::Channel].map(|ring| channel.gpu.ring_id(ring));
        let init = Command::new(CMD_INIT, RING_NONE).words(&[query, events, CHANNEL_TYPE_WAYLAND]).finish();
        channel.gpu.submit(&init).map_err(SessionError::io("connecting to the host's compositor"))?;
        channel.arm()?;
        Ok(channel)
    }

    /// Whether the host has been asked for an event.
    pub fn armed(&self) -> bool {
        self.armed
    }

    /// Readable when an event may be there.
    pub fn event_fd(&self) -> BorrowedFd<'_> {
        self.gpu.event_fd()
    }

    /// Asks the host for its next event, unless that has been done already.
    ///
    /// # Errors
    ///
    /// The device refused the command.
    pub fn arm(&mut self) -> Result<(), SessionError> {
        if !self.armed {
            // If the host fails the command its fence completes all the same: the blank page then tells that no event was
            // written, where a leftover one would be read twice.
            let what = "asking the host for its next event";
            self.gpu.ring(Ring::Channel).write(0, &[0; 16]).map_err(SessionError::io(what))?;
            let poll = Command::new(CMD_POLL, Ring::Channel as u8).words(&[0, 0]).finish();
            self.gpu.submit_poll(&poll).map_err(SessionError::io(what))?;
            self.armed = true;
        }
        Ok(())
    }

    /// Takes the event the host has written, if it has.
    ///
    /// # Errors
    ///
    /// The device failed, or the event makes no sense.
    pub fn event(&mut self) -> Result<Option<Event>, SessionError> {
        let what = "reading an event from the GPU";
        if !self.armed || !self.gpu.take_event().map_err(SessionError::io(what))? {
            return Ok(None);
        }
        self.armed = false;
        let mut page = [0; RING_SIZE];
        self.gpu.ring(Ring::Channel).read(0, &mut page).map_err(SessionError::io(what))?;
        if page.first() == Some(&CMD_POLL) {
            // The machine was paused, and the host let go of what waited: ask again.
            return Ok(None);
        }
        decode(&page).map(Some).ok_or_else(|| SessionError::host("a malformed event in the channel ring"))
    }

    /// Sends bytes of the Wayland stream, the descriptors with the first of them.
    ///
    /// # Errors
    ///
    /// The device refused a command, or there are too many descriptors.
    pub fn send(&mut self, bytes: &[u8], fds: &[HostFd]) -> Result<(), SessionError> {
        let mut fds = fds;
        if fds.len() > MAX_IDENTIFIERS {
            return Err(SessionError::host("too many descriptors in one message"));
        }
        for chunk in bytes.chunks(MAX_DATA) {
            let count = u32::try_from(fds.len()).unwrap_or(0);
            let len = u32::try_from(chunk.len()).unwrap_or(0);
            let mut fields = [0u32; 3 * MAX_IDENTIFIERS];
            for (at, fd) in fds.iter().enumerate() {
                for (column, value) in [fd.id, fd.kind, fd.size].into_iter().enumerate() {
                    if let Some(field) = fields.get_mut(column * MAX_IDENTIFIERS + at) {
                        *field = value;
                    }
                }
            }
            let send = Command::new(CMD_SEND, RING_NONE).words(&[count, len]).words(&fields).bytes(chunk).finish();
            self.gpu.submit(&send).map_err(SessionError::io("sending to the host"))?;
            fds = &[];
        }
        Ok(())
    }

    /// The descriptor to send along for a pipe that the guest wants to read: the host makes the pipe.
    pub fn new_read_pipe(&mut self) -> HostFd {
        let id = self.next_read_pipe;
        self.next_read_pipe = id.wrapping_add(1);
        HostFd { kind: KIND_READ_PIPE, id, size: 0 }
    }

    /// Writes to a pipe of the host; `hang_up` closes it after that. At most [`MAX_WRITE`] bytes.
    ///
    /// # Errors
    ///
    /// The device refused the command.
    pub fn write_pipe(&mut self, id: u32, bytes: &[u8], hang_up: bool) -> Result<(), SessionError> {
        let len = u32::try_from(bytes.len()).unwrap_or(0);
        let words = [id, u32::from(hang_up), len, 0];
        let write = Command::new(CMD_WRITE, RING_NONE).words(&words).bytes(bytes).finish();
        self.gpu.submit(&write).map_err(SessionError::io("writing to a pipe of the host"))
    }

    /// Host memory of at least `size` bytes which the compositor can use as a shared-memory pool.
    ///
    /// # Errors
    ///
    /// Too large, or the host has no room.
    pub fn image(&mut self, size: usize) -> io::Result<HostBlob> {
        let size = size.next_multiple_of(PAGE).max(PAGE);
        if size > MAX_IMAGE {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        let (blob_id, size) = match self.requirements.get(&size) {
            Some(&known) => known,
            None => self.image_requirements(size)?,
        };
        self.gpu.create_blob(blob_id, size, true)
    }

    fn image_requirements(&mut self, size: usize) -> io::Result<(u32, usize)> {
        if self.requirements.len() >= MAX_REQUIREMENTS {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        let width = u32::try_from(size).map_err(|_| io::ErrorKind::OutOfMemory)?;
        let words = [width, 1, FORMAT_R8, USE_LINEAR];
        let command = Command::new(CMD_GET_IMAGE_REQUIREMENTS, Ring::Query as u8).words(&words).finish();
        self.gpu.ring(Ring::Query).write(0, &[0; 64])?;
        self.gpu.query(&command)?;
        let mut answer = [0; 64];
        self.gpu.ring(Ring::Query).read(0, &mut answer)?;
        // strides[4], offsets[4], u64 modifier, u64 size, blob_id, map_info, memory_idx, physical_device_idx
        let bad = || io::Error::new(io::ErrorKind::InvalidData, "the host did not answer an image query");
        let low = le32(&answer, 40).ok_or_else(bad)?;
        let high = le32(&answer, 44).ok_or_else(bad)?;
        let blob_id = le32(&answer, 48).ok_or_else(bad)?;
        let granted = usize::try_from(u64::from(high) << 32 | u64::from(low)).map_err(|_| bad())?;
        if blob_id == 0 || granted < size || granted > 2 * MAX_IMAGE || !granted.is_multiple_of(PAGE) {
            return Err(bad());
        }
        self.requirements.insert(size, (blob_id, granted));
        Ok((blob_id, granted))
    }

    /// Maps memory the host sent, for reading.
    ///
    /// # Errors
    ///
    /// The host has no room, or the id is unknown.
    pub fn import(&mut self, fd: HostFd) -> io::Result<HostBlob> {
        let size = usize::try_from(fd.size).map_err(|_| io::ErrorKind::InvalidInput)?;
        self.gpu.create_blob(fd.id, size.next_multiple_of(PAGE).max(PAGE), false)
    }

    /// Frees memory from [`Channel::image`] or [`Channel::import`].
    pub fn destroy(&mut self, blob: HostBlob) {
        self.gpu.destroy_blob(blob);
    }
}

/// Reads an event out of the channel ring.
fn decode(page: &[u8]) -> Option<Event> {
    match *page.first()? {
        CMD_RECEIVE => {
            let count = usize::try_from(le32(page, 8)?).ok()?;
            let len = usize::try_from(le32(page, 12)?).ok()?;
            // A host that received more descriptors than fit has lost some: the stream cannot be trusted any more.
            if count > MAX_IDENTIFIERS {
                return None;
            }
            let column = |column: usize, at: usize| le32(page, 16 + 4 * (column * MAX_IDENTIFIERS + at));
            let fds = (0..count)
                .map(|at| Some(HostFd { id: column(0, at)?, kind: column(1, at)?, size: column(2, at)? }))
                .collect::<Option<Vec<_>>>()?;
            let bytes = page.get(SEND_HEADER..SEND_HEADER.checked_add(len)?)?.to_vec();
            if bytes.is_empty() && fds.is_empty() { Some(Event::Closed) } else { Some(Event::Data { bytes, fds }) }
        }
        CMD_READ => {
            let id = le32(page, 8)?;
            let hang_up = le32(page, 12)? != 0;
            let len = usize::try_from(le32(page, 16)?).ok()?;
            let bytes = page.get(READ_WRITE_HEADER..READ_WRITE_HEADER.checked_add(len)?)?.to_vec();
            Some(Event::Pipe { id, bytes, hang_up })
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn receive(count: u32, len: u32) -> Vec<u8> {
        let mut page = Command::new(CMD_RECEIVE, 1).words(&[count, len]).finish();
        page.resize(RING_SIZE, 0xab);
        page
    }

    #[test]
    fn an_empty_receive_is_the_end() {
        assert_eq!(decode(&receive(0, 0)), Some(Event::Closed));
    }

    #[test]
    fn counts_beyond_the_page_are_refused() {
        assert!(decode(&receive(29, 8)).is_none(), "more identifiers than the arrays hold");
        assert!(decode(&receive(u32::MAX, 8)).is_none());
        assert!(decode(&receive(0, 3745)).is_none(), "more data than the page holds");
        assert!(decode(&receive(0, u32::MAX)).is_none());
        let Some(Event::Data { bytes, fds }) = decode(&receive(28, 3744)) else { panic!("the largest event") };
        assert_eq!((bytes.len(), fds.len()), (3744, 28));
    }

    #[test]
    fn a_page_nobody_wrote_is_no_event() {
        assert_eq!(decode(&[0; RING_SIZE]), None);
    }

    #[test]
    fn pipe_data_is_bounded_by_the_page() {
        let mut page = Command::new(CMD_READ, 1).words(&[0x8000_0001, 1, 3, 0]).bytes(b"abc").finish();
        page.resize(RING_SIZE, 0);
        let expected = Event::Pipe { id: 0x8000_0001, bytes: b"abc".to_vec(), hang_up: true };
        assert_eq!(decode(&page), Some(expected));
        page[16..20].copy_from_slice(&4073u32.to_le_bytes());
        assert_eq!(decode(&page), None);
    }
}
