//! A Wayland client that says exactly what it is told to, right or wrong.

use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

const REGISTRY: u32 = 2;
const CALLBACK: u32 = 3;
const SHM: u32 = 4;
const COMPOSITOR: u32 = 5;
const POOL: u32 = 6;
/// The buffer of [`Client::shrinking_pool`].
pub const BUFFER: u32 = 7;
const SURFACE: u32 = 8;

/// A connection.
pub struct Client {
    stream: UnixStream,
    globals: Vec<(u32, String, u32)>,
}

fn message(object: u32, opcode: u32, words: &[u32]) -> Vec<u8> {
    let size = u32::try_from(8 + words.len() * 4).unwrap();
    [object, size << 16 | opcode].iter().chain(words).flat_map(|word| word.to_ne_bytes()).collect()
}

fn words(bytes: &[u8]) -> Vec<u32> {
    bytes.chunks_exact(4).map(|word| u32::from_ne_bytes(word.try_into().unwrap())).collect()
}

impl Client {
    /// Connects, and says nothing.
    pub fn new(path: &Path) -> Self {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        Self { stream, globals: Vec::new() }
    }

    /// Connects, and reads the list of globals.
    pub fn connect(path: &Path) -> Self {
        let mut client = Self::new(path).send(1, 1, &[REGISTRY]).send(1, 0, &[CALLBACK]);
        loop {
            let (object, opcode, body) = client.event().expect("the globals");
            match (object, opcode) {
                (REGISTRY, 0) => {
                    let fields = words(&body);
                    let len = fields[1] as usize;
                    let name = String::from_utf8(body[8..8 + len - 1].to_vec()).unwrap();
                    client.globals.push((fields[0], name, *fields.last().unwrap()));
                }
                (CALLBACK, 0) => return client,
                _ => {}
            }
        }
    }

    /// Sends bytes as they are.
    pub fn raw(mut self, bytes: &[u8]) -> Self {
        self.stream.write_all(bytes).unwrap();
        self
    }

    /// Whether the proxy has neither said anything nor closed the connection.
    pub fn hears_nothing(&self) -> bool {
        self.stream.set_nonblocking(true).unwrap();
        let read = (&self.stream).read(&mut [0]);
        self.stream.set_nonblocking(false).unwrap();
        read.is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock)
    }

    /// Sends a request whose arguments are plain words.
    pub fn send(self, object: u32, opcode: u32, words: &[u32]) -> Self {
        self.raw(&message(object, opcode, words))
    }

    fn send_fd(self, bytes: &[u8], fd: &OwnedFd) -> Self {
        let fds = [fd.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        rustix::net::sendmsg(&self.stream, &[IoSlice::new(bytes)], &mut control, SendFlags::empty()).unwrap();
        self
    }

    /// The next event, or `None` at the end.
    fn event(&mut self) -> Option<(u32, u32, Vec<u8>)> {
        let mut header = [0; 8];
        self.stream.read_exact(&mut header).ok()?;
        let [object, second] = words(&header)[..] else { unreachable!() };
        let mut body = vec![0; (second >> 16) as usize - 8];
        self.stream.read_exact(&mut body).ok()?;
        Some((object, second & 0xffff, body))
    }

    /// Waits for `wl_display.error` and the end of the connection. Returns object, code and text.
    pub fn error(mut self) -> (u32, u32, String) {
        let mut found = None;
        while let Some((object, opcode, body)) = self.event() {
            if (object, opcode) == (1, 0) {
                let fields = words(&body);
                let text = String::from_utf8(body[12..12 + fields[2] as usize - 1].to_vec()).unwrap();
                found = Some((fields[0], fields[1], text));
            }
        }
        found.expect("an error before the end")
    }

    fn bind_request(&self, interface: &str, version: u32, id: u32) -> Vec<u8> {
        let (name, ..) = self.globals.iter().find(|(_, known, _)| known == interface).unwrap();
        let mut text = interface.as_bytes().to_vec();
        text.resize((interface.len() + 1).next_multiple_of(4), 0);
        let mut arguments = vec![*name, u32::try_from(interface.len()).unwrap() + 1];
        arguments.extend(words(&text));
        arguments.extend([version, id]);
        message(REGISTRY, 0, &arguments)
    }

    /// Binds a global. Returns the version, or `None` if that was refused.
    pub fn bind(&mut self, interface: &str, version: u32) -> Option<u32> {
        let request = self.bind_request(interface, version, SHM);
        self.stream.write_all(&request).unwrap();
        self.stream.write_all(&message(1, 0, &[SHM + 1])).unwrap();
        while let Some((object, opcode, _)) = self.event() {
            match (object, opcode) {
                (1, 0) => return None,
                (5, 0) => return Some(version),
                _ => {}
            }
        }
        None
    }

    /// Shows a buffer whose file has become too short.
    pub fn shrinking_pool(self) -> Self {
        let file = OwnedFd::from(tempfile::tempfile().unwrap());
        rustix::fs::ftruncate(&file, 64 * 64 * 4).unwrap();
        let binds = [self.bind_request("wl_shm", 1, SHM), self.bind_request("wl_compositor", 4, COMPOSITOR)].concat();
        let client = self
            .raw(&binds)
            .send_fd(&message(SHM, 0, &[POOL, 64 * 64 * 4]), &file)
            .send(POOL, 0, &[BUFFER, 0, 64, 64, 256, 0])
            .send(COMPOSITOR, 0, &[SURFACE]);
        rustix::fs::ftruncate(&file, 100).unwrap();
        client.send(SURFACE, 1, &[BUFFER, 0, 0]).send(SURFACE, 6, &[])
    }

    /// Creates a pool, but forgets the descriptor.
    pub fn pool_without_descriptor(self) -> Self {
        let bind = self.bind_request("wl_shm", 1, SHM);
        self.raw(&bind).send(SHM, 0, &[POOL, 4096])
    }
}
