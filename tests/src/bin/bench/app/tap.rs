//! A Wayland socket that passes on everything between its clients and a compositor, and tells when a surface is committed:
//! the first time at all, and the first time with a picture.

use std::collections::HashSet;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};

use crate::Failure;

/// Bytes passed on at a time.
const CHUNK: usize = 1 << 16;
/// Descriptors that come with them: the kernel's limit (SCM_MAX_FD).
const DESCRIPTORS: usize = 253;

/// What was committed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Commit {
    /// A connection's first wl_surface.commit.
    First,
    /// A connection's first one of a surface that has a buffer.
    Picture,
}

/// The socket, and what was seen on it.
pub struct Tap {
    socket: PathBuf,
    seen: Receiver<(Commit, Instant)>,
}

impl Tap {
    /// Listens on `socket` for clients of `compositor`.
    pub fn new(socket: PathBuf, compositor: &Path) -> Result<Self, Failure> {
        let listener = UnixListener::bind(&socket)?;
        let (compositor, (sender, seen)) = (compositor.to_owned(), channel());
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let Ok(server) = UnixStream::connect(&compositor) else { continue };
                let (Ok(to), Ok(from)) = (server.try_clone(), client.try_clone()) else { continue };
                let watcher = Watcher::new(sender.clone());
                thread::spawn(move || pass(&client, &to, Some(watcher)));
                thread::spawn(move || pass(&server, &from, None));
            }
        });
        Ok(Self { socket, seen })
    }

    /// Where it listens.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Waits for such a commit.
    pub fn wait(&self, wanted: Commit) -> Result<Instant, Failure> {
        let deadline = Instant::now() + Duration::from_secs(400);
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let (commit, at) = self.seen.recv_timeout(left).map_err(|e| format!("no client commits a surface: {e}"))?;
            if commit == wanted {
                return Ok(at);
            }
        }
    }

    /// Forgets what was seen.
    pub fn forget(&self) {
        while self.seen.try_recv().is_ok() {}
    }
}

/// Passes on until one side ends; then the other one does, too.
fn pass(from: &UnixStream, to: &UnixStream, mut watcher: Option<Watcher>) {
    while let Ok(true) = pass_some(from, to, watcher.as_mut()) {}
    // Either may be gone already.
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}

fn pass_some(from: &UnixStream, to: &UnixStream, watcher: Option<&mut Watcher>) -> Result<bool, Failure> {
    let mut bytes = vec![0; CHUNK];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
    let mut received = RecvAncillaryBuffer::new(&mut space);
    let len = recvmsg(from, &mut [IoSliceMut::new(&mut bytes)], &mut received, RecvFlags::CMSG_CLOEXEC)?.bytes;
    let fds: Vec<OwnedFd> = received
        .drain()
        .filter_map(|message| if let RecvAncillaryMessage::ScmRights(fds) = message { Some(fds) } else { None })
        .flatten()
        .collect();
    let bytes = bytes.get(..len).unwrap_or_default();
    let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    let mut sent = 0;
    while sent < bytes.len() {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
        let mut with = SendAncillaryBuffer::new(&mut space);
        // They go with the first byte.
        if sent == 0 && !fds.is_empty() && !with.push(SendAncillaryMessage::ScmRights(&fds)) {
            return Err("too many descriptors".into());
        }
        let rest = bytes.get(sent..).unwrap_or_default();
        sent += sendmsg(to, &[IoSlice::new(rest)], &mut with, SendFlags::NOSIGNAL)?;
    }
    if let Some(watcher) = watcher {
        watcher.read(bytes);
    }
    Ok(len > 0)
}

/// wl_display, which has this number in each connection.
const DISPLAY: u32 = 1;
// Requests, by their place in the interface.
const DISPLAY_GET_REGISTRY: u32 = 1;
const REGISTRY_BIND: u32 = 0;
const COMPOSITOR_CREATE_SURFACE: u32 = 0;
const SURFACE_DESTROY: u32 = 0;
const SURFACE_ATTACH: u32 = 1;
const SURFACE_COMMIT: u32 = 6;

/// Reads what one client says, as far as it is needed to know its surfaces.
struct Watcher {
    seen: Sender<(Commit, Instant)>,
    told: HashSet<u8>,
    pending: Vec<u8>,
    registries: HashSet<u32>,
    compositors: HashSet<u32>,
    surfaces: HashSet<u32>,
    attached: HashSet<u32>,
}

impl Watcher {
    fn new(seen: Sender<(Commit, Instant)>) -> Self {
        Self {
            seen,
            told: HashSet::new(),
            pending: Vec::new(),
            registries: HashSet::new(),
            compositors: HashSet::new(),
            surfaces: HashSet::new(),
            attached: HashSet::new(),
        }
    }

    fn read(&mut self, bytes: &[u8]) {
        self.pending.extend_from_slice(bytes);
        // A header: object, then size and number of the request.
        while let (Some(object), Some(word)) = (word(&self.pending, 0), word(&self.pending, 1)) {
            let size = usize::try_from(word >> 16).unwrap_or(usize::MAX).max(8);
            if self.pending.len() < size {
                break;
            }
            let message: Vec<u8> = self.pending.drain(..size).collect();
            self.request(object, word & 0xffff, message.get(8..).unwrap_or_default());
        }
    }

    fn request(&mut self, object: u32, number: u32, arguments: &[u8]) {
        let first = word(arguments, 0).unwrap_or(0);
        if object == DISPLAY && number == DISPLAY_GET_REGISTRY {
            self.registries.insert(first);
        } else if self.registries.contains(&object) && number == REGISTRY_BIND {
            // The name, the interface with its length before it, its version, the new object.
            if arguments.windows(14).any(|name| name == b"wl_compositor\0") {
                self.compositors.extend(word(arguments, arguments.len() / 4 - 1));
            }
        } else if self.compositors.contains(&object) && number == COMPOSITOR_CREATE_SURFACE {
            self.surfaces.insert(first);
        } else if self.surfaces.contains(&object) {
            match number {
                SURFACE_DESTROY => {
                    self.surfaces.remove(&object);
                    self.attached.remove(&object);
                }
                SURFACE_ATTACH if first != 0 => {
                    self.attached.insert(object);
                }
                SURFACE_COMMIT => {
                    self.tell(Commit::First);
                    if self.attached.contains(&object) {
                        self.tell(Commit::Picture);
                    }
                }
                _ => {}
            }
        }
    }

    fn tell(&mut self, commit: Commit) {
        if self.told.insert(commit as u8) {
            // Nobody listens any more when the benchmark ends.
            let _ = self.seen.send((commit, Instant::now()));
        }
    }
}

/// The word at this place.
fn word(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at * 4..at * 4 + 4)?;
    Some(u32::from_ne_bytes(bytes.try_into().ok()?))
}
