//! The relay between rutabaga and the compositor.
//!
//! rutabaga writes to its Wayland socket and to clipboard pipes with blocking calls on the device's thread, and its
//! own thread for a context ends at a file descriptor it does not know, or at more than 28 of them. So it is never
//! connected to the compositor itself, but to a thread of ours that
//!
//! * always reads what rutabaga writes, into memory, and closes the connection or the pipe whose other end does not
//!   keep up ([`Bounds`]);
//! * stops reading from the compositor while the guest does not keep up;
//! * passes on only files rutabaga knows: memory as it is, pipes as pipes of our own, and in place of anything else a
//!   page of zeros, so that the guest's count of files stays right;
//! * passes on at most 28 files at a time: the first with one byte of their message each, which to a Wayland client is
//!   the same.
//!
//! rutabaga connects by path. The path is `/proc/self/fd/N` of a socket that has no other name, so nobody else can.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::thread::JoinHandle;

use rustix::event::EventfdFlags;
use rustix::fs::{FileType, MemfdFlags, Mode, OFlags, SealFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, Shutdown, SocketAddrUnix, SocketFlags, SocketType};
use rustix::pipe::PipeFlags;
use virtio_devices::worker::{EventSet, Interest};

use crate::flow::{Flow, Received, receive};

/// Bytes read at a time.
const CHUNK: usize = 64 << 10;
/// Reads of one descriptor before others get their turn.
const TURNS: usize = 16;

/// How much the relay keeps.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Bytes for a compositor that does not read, before its connection is closed.
    pub to_host: usize,
    /// Bytes for a guest that does not read, before the compositor is not read any more.
    pub to_guest: usize,
    /// Bytes of one clipboard transfer whose receiver does not read, before it is cut off.
    pub transfer: usize,
    /// All of that together, before whoever adds to it is closed.
    pub total: usize,
    /// Clipboard transfers at a time.
    pub transfers: usize,
    /// Connections whose guest is gone while the compositor has not read the last of it.
    pub lingering: usize,
}

impl Default for Bounds {
    fn default() -> Self {
        Self { to_host: 4 << 20, to_guest: 1 << 20, transfer: 16 << 20, total: 64 << 20, transfers: 256, lingering: 64 }
    }
}

/// The relay of one machine.
pub struct Relay {
    path: PathBuf,
    compositor: PathBuf,
    bounds: Bounds,
    /// Keeps the name in /proc.
    _socket: OwnedFd,
    listener: Option<OwnedFd>,
    stop: OwnedFd,
    thread: Option<JoinHandle<()>>,
}

impl Relay {
    /// Makes the socket; nobody listens yet, but connections queue up.
    ///
    /// # Errors
    /// If there is no room for a socket in the directory for temporary files.
    pub fn new(compositor: PathBuf, bounds: Bounds) -> io::Result<Self> {
        let listener = rustix::net::socket_with(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            None,
        )?;
        let name = std::env::temp_dir().join(format!("wl-relay-{:016x}", random()?));
        rustix::net::bind(&listener, &SocketAddrUnix::new(&name)?)?;
        let socket = rustix::fs::open(&name, OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
        // Nobody can connect before it listens, nor by this name then, nor without the right to.
        let private = rustix::fs::chmod(&name, Mode::RUSR | Mode::WUSR);
        rustix::fs::unlink(&name)?;
        private?;
        let socket = socket?;
        rustix::net::listen(&listener, 128)?;
        let path = format!("/proc/self/fd/{}", socket.as_raw_fd()).into();
        let stop = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { path, compositor, bounds, _socket: socket, listener: Some(listener), stop, thread: None })
    }

    /// What to connect to.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        self.path.clone()
    }

    /// Starts the thread if it does not run: with the first context, on the device's thread, whose confinement it
    /// inherits. A clone that never opens a window never pays for it.
    ///
    /// # Errors
    /// If the host has no thread left.
    pub fn ensure_running(&mut self) -> io::Result<()> {
        let Some(listener) = self.listener.take() else { return Ok(()) };
        let stop = self.stop.try_clone()?;
        let state = State::new(listener, stop, self.compositor.clone(), self.bounds)?;
        self.thread = Some(std::thread::Builder::new().name("wl-relay".into()).spawn(move || state.run())?);
        Ok(())
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        let _ = rustix::io::write(&self.stop, &1u64.to_ne_bytes());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the Wayland relay's thread panicked");
        }
    }
}

fn random() -> io::Result<u64> {
    let mut bytes = [0; 8];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    Ok(u64::from_ne_bytes(bytes))
}

/// One descriptor in the event set.
struct Watched {
    fd: OwnedFd,
    token: u64,
    interest: Interest,
}

impl Watched {
    fn new(fd: OwnedFd, token: u64) -> Self {
        Self { fd, token, interest: Interest::default() }
    }

    /// A descriptor that waits for nothing is not in the set: a hangup would be reported for ever.
    fn want(&mut self, set: &EventSet, read: bool, write: bool) -> io::Result<()> {
        let (old, new) = (self.interest, Interest { read, write });
        let none = Interest::default();
        self.interest = new;
        match (old == none, new == none) {
            _ if old == new => Ok(()),
            (true, _) => set.add(self.fd.as_fd(), new, self.token),
            (_, true) => set.remove(self.fd.as_fd()),
            _ => set.modify(self.fd.as_fd(), new, self.token),
        }
    }
}

/// rutabaga and the compositor.
struct Connection {
    guest: Option<Watched>,
    host: Option<Watched>,
    to_guest: Flow,
    to_host: Flow,
}

/// A clipboard transfer from the guest to a program of the host.
struct Transfer {
    from: Option<Watched>,
    to: Watched,
    data: VecDeque<Vec<u8>>,
    start: usize,
    bytes: usize,
}

const LISTENER: u64 = 0;
const STOP: u64 = 1;
/// Tokens of connection or transfer `id` are `ROLES * id` and one more.
const ROLES: u64 = 2;

struct State {
    set: EventSet,
    listener: OwnedFd,
    _stop: OwnedFd,
    compositor: PathBuf,
    bounds: Bounds,
    connections: HashMap<u64, Connection>,
    transfers: HashMap<u64, Transfer>,
    next: u64,
    buffer: Vec<u8>,
    /// What stands for files the guest cannot have.
    nothing: OwnedFd,
    /// Makes room for one more descriptor, so that a connection can be refused when there is no other.
    spare: Option<OwnedFd>,
    warned: bool,
}

impl State {
    fn new(listener: OwnedFd, stop: OwnedFd, compositor: PathBuf, bounds: Bounds) -> io::Result<Self> {
        let set = EventSet::new()?;
        let read = Interest { read: true, write: false };
        set.add(listener.as_fd(), read, LISTENER)?;
        set.add(stop.as_fd(), read, STOP)?;
        let nothing = rustix::fs::memfd_create("nothing", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        rustix::fs::ftruncate(&nothing, 4096)?;
        let seals = SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE;
        rustix::fs::fcntl_add_seals(&nothing, seals)?;
        Ok(Self {
            set,
            listener,
            _stop: stop,
            compositor,
            bounds,
            connections: HashMap::new(),
            transfers: HashMap::new(),
            next: 1,
            buffer: vec![0; CHUNK],
            spare: nothing.try_clone().ok(),
            nothing,
            warned: false,
        })
    }

    fn run(mut self) {
        let mut ready = Vec::new();
        loop {
            if let Err(e) = self.set.wait(-1, &mut ready) {
                log::error!("the Wayland relay cannot wait for events: {e}");
                return;
            }
            for event in &ready {
                match event.token {
                    STOP => return,
                    LISTENER => self.accept(),
                    token => self.dispatch(token / ROLES),
                }
            }
        }
    }

    fn accept(&mut self) {
        loop {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let guest = match rustix::net::accept_with(&self.listener, flags) {
                Ok(guest) => guest,
                Err(Errno::MFILE | Errno::NFILE) if self.spare.take().is_some() => {
                    log::error!("refusing a Wayland connection: this process has too many files open");
                    if let Ok(guest) = rustix::net::accept_with(&self.listener, flags) {
                        close_quietly(&guest, &mut self.buffer);
                    }
                    self.spare = self.nothing.try_clone().ok();
                    continue;
                }
                Err(Errno::AGAIN) => return,
                Err(e) => {
                    log::error!("the Wayland relay takes no more connections: {e}");
                    let _ = self.set.remove(self.listener.as_fd());
                    return;
                }
            };
            match self.connect() {
                Ok(host) => {
                    let id = self.next;
                    self.next = self.next.saturating_add(1);
                    let connection = Connection {
                        guest: Some(Watched::new(guest, id.saturating_mul(ROLES))),
                        host: Some(Watched::new(host, id.saturating_mul(ROLES).saturating_add(1))),
                        to_guest: Flow::default(),
                        to_host: Flow::default(),
                    };
                    self.connections.insert(id, connection);
                    self.dispatch(id);
                }
                Err(e) => {
                    if !self.warned {
                        log::warn!("cannot connect to the Wayland compositor at {}: {e}", self.compositor.display());
                    }
                    self.warned = true;
                    close_quietly(&guest, &mut self.buffer);
                }
            }
        }
    }

    fn connect(&self) -> io::Result<OwnedFd> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let host = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        rustix::net::connect(&host, &SocketAddrUnix::new(&self.compositor)?)?;
        Ok(host)
    }

    fn total(&self) -> usize {
        let flows = self.connections.values().map(|c| c.to_guest.bytes.saturating_add(c.to_host.bytes));
        flows.chain(self.transfers.values().map(|t| t.bytes)).fold(0, usize::saturating_add)
    }

    fn dispatch(&mut self, id: u64) {
        if let Some(mut connection) = self.connections.remove(&id) {
            match self.serve(&mut connection) {
                Ok(true) => drop(self.connections.insert(id, connection)),
                Ok(false) => self.close(connection),
                Err(e) => {
                    log::warn!("closing a Wayland connection of the guest: {e}");
                    self.close(connection);
                }
            }
        } else if let Some(mut transfer) = self.transfers.remove(&id) {
            match self.serve_transfer(&mut transfer) {
                Ok(true) => drop(self.transfers.insert(id, transfer)),
                Ok(false) => self.close_transfer(transfer),
                Err(e) => {
                    log::warn!("cutting off a clipboard transfer of the guest: {e}");
                    self.close_transfer(transfer);
                }
            }
        }
    }

    fn close(&mut self, connection: Connection) {
        if let Some(mut host) = connection.host {
            let _ = host.want(&self.set, false, false);
        }
        if let Some(mut guest) = connection.guest {
            let _ = guest.want(&self.set, false, false);
            close_quietly(&guest.fd, &mut self.buffer);
        }
    }

    fn close_transfer(&mut self, mut transfer: Transfer) {
        let _ = transfer.to.want(&self.set, false, false);
        if let Some(from) = &mut transfer.from {
            let _ = from.want(&self.set, false, false);
        }
    }

    /// Moves what can be moved. False: the connection is at its end.
    fn serve(&mut self, c: &mut Connection) -> io::Result<bool> {
        self.read_guest(c)?;
        if let Some(host) = &c.host {
            match c.to_host.send(host.fd.as_fd()) {
                // The compositor is gone; what it said last may still be there to read.
                Err(e) if is_gone(&e) => c.to_host.clear(),
                other => other?,
            }
        }
        if c.to_host.bytes > self.bounds.to_host {
            return Err(io::Error::other("the compositor does not read"));
        }
        if c.to_host.bytes > 0 && self.total().saturating_add(c.to_host.bytes) > self.bounds.total {
            return Err(io::Error::other("too much waits for the compositor"));
        }
        self.read_host(c)?;
        if let Some(guest) = &c.guest
            && c.to_guest.send(guest.fd.as_fd()).is_err()
        {
            return Ok(false);
        }
        let nothing_left_for_guest = c.guest.is_none() || c.to_guest.is_empty();
        if c.host.is_none() && nothing_left_for_guest {
            return Ok(false);
        }
        if c.guest.is_none() {
            c.to_guest.clear();
            let lingering = self.connections.values().filter(|c| c.guest.is_none()).count();
            if c.to_host.is_empty() || lingering >= self.bounds.lingering {
                return Ok(false);
            }
        }
        let room = c.to_guest.bytes < self.bounds.to_guest && c.guest.is_some();
        if let Some(host) = &mut c.host {
            host.want(&self.set, room, !c.to_host.is_empty())?;
        }
        if let Some(guest) = &mut c.guest {
            guest.want(&self.set, true, !c.to_guest.is_empty())?;
        }
        Ok(true)
    }

    fn read_guest(&mut self, c: &mut Connection) -> io::Result<()> {
        for _ in 0..TURNS {
            let Some(guest) = &mut c.guest else { return Ok(()) };
            let to_host = &mut c.to_host;
            let received = receive(guest.fd.as_fd(), &mut self.buffer, |data, fds| {
                to_host.push(data, fds);
                Ok(())
            })?;
            match received {
                Received::Data => {}
                Received::Nothing => return Ok(()),
                Received::End => {
                    guest.want(&self.set, false, false)?;
                    c.guest = None;
                }
            }
        }
        Ok(())
    }

    fn read_host(&mut self, c: &mut Connection) -> io::Result<()> {
        for _ in 0..TURNS {
            if c.to_guest.bytes >= self.bounds.to_guest || c.guest.is_none() {
                return Ok(());
            }
            let Some(host) = &mut c.host else { return Ok(()) };
            let mut came = None;
            let received = receive(host.fd.as_fd(), &mut self.buffer, |data, fds| {
                came = Some((data, fds));
                Ok(())
            })?;
            match (received, came) {
                (Received::Data, Some((data, fds))) => {
                    let fds = fds.into_iter().map(|fd| self.admit(fd)).collect::<io::Result<_>>()?;
                    c.to_guest.push(data, fds);
                }
                (Received::End, _) => {
                    host.want(&self.set, false, false)?;
                    c.host = None;
                    c.to_host.clear();
                }
                _ => return Ok(()),
            }
        }
        Ok(())
    }

    /// What the guest gets for a file from the compositor.
    fn admit(&mut self, fd: OwnedFd) -> io::Result<OwnedFd> {
        match classify(fd.as_fd()) {
            Class::Memory => Ok(fd),
            Class::Pipe => self.transfer(fd),
            Class::Other => {
                log::debug!("the compositor sent a file of a kind that guests cannot have");
                Ok(self.nothing.try_clone()?)
            }
        }
    }

    /// A pipe of our own in place of `to`: rutabaga may block on it only as long as this thread takes to come by.
    fn transfer(&mut self, to: OwnedFd) -> io::Result<OwnedFd> {
        let (from, guest) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
        if self.transfers.len() >= self.bounds.transfers {
            log::warn!("refusing a clipboard transfer: the guest has {} open", self.transfers.len());
            return Ok(guest);
        }
        rustix::fs::fcntl_setfl(&from, OFlags::NONBLOCK)?;
        let flags = rustix::fs::fcntl_getfl(&to)?;
        rustix::fs::fcntl_setfl(&to, flags | OFlags::NONBLOCK)?;
        let id = self.next;
        self.next = self.next.saturating_add(1);
        let mut from = Watched::new(from, id.saturating_mul(ROLES));
        from.want(&self.set, true, false)?;
        let to = Watched::new(to, id.saturating_mul(ROLES).saturating_add(1));
        let transfer = Transfer { from: Some(from), to, data: VecDeque::new(), start: 0, bytes: 0 };
        self.transfers.insert(id, transfer);
        Ok(guest)
    }

    /// Moves what can be moved. False: all of it has arrived.
    fn serve_transfer(&mut self, t: &mut Transfer) -> io::Result<bool> {
        for _ in 0..TURNS {
            let Some(from) = &mut t.from else { break };
            match rustix::io::read(&from.fd, &mut self.buffer) {
                Ok(0) => {
                    from.want(&self.set, false, false)?;
                    t.from = None;
                }
                Ok(n) => {
                    t.data.push_back(self.buffer.get(..n).unwrap_or_default().to_vec());
                    t.bytes = t.bytes.saturating_add(n);
                }
                Err(Errno::AGAIN | Errno::INTR) => break,
                Err(e) => return Err(e.into()),
            }
        }
        while let Some(first) = t.data.front() {
            match rustix::io::write(&t.to.fd, first.get(t.start..).unwrap_or_default()) {
                Ok(n) => {
                    t.bytes = t.bytes.saturating_sub(n);
                    t.start = t.start.saturating_add(n);
                    if t.start >= first.len() {
                        t.data.pop_front();
                        t.start = 0;
                    }
                }
                Err(Errno::AGAIN | Errno::INTR) => break,
                Err(Errno::PIPE) => return Ok(false),
                Err(e) => return Err(e.into()),
            }
        }
        if t.bytes > self.bounds.transfer || self.total().saturating_add(t.bytes) > self.bounds.total {
            return Err(io::Error::other("its receiver does not read"));
        }
        t.to.want(&self.set, false, !t.data.is_empty())?;
        Ok(t.from.is_some() || !t.data.is_empty())
    }
}

fn is_gone(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset)
}

/// Closes a connection to rutabaga so that it finds the end of it there, and not an error, which would end its thread
/// with a fence unreported: nothing may be unread on our side.
fn close_quietly(guest: &OwnedFd, buffer: &mut [u8]) {
    let _ = rustix::net::shutdown(guest, Shutdown::Both);
    while let Ok(Received::Data) = receive(guest.as_fd(), buffer, |_, _| Ok(())) {}
}

/// What a file from the compositor is to rutabaga.
#[derive(Debug, PartialEq, Eq)]
enum Class {
    Memory,
    Pipe,
    Other,
}

fn classify(fd: BorrowedFd<'_>) -> Class {
    let Ok(stat) = rustix::fs::fstat(fd) else { return Class::Other };
    let Ok(flags) = rustix::fs::fcntl_getfl(fd) else { return Class::Other };
    let writes = flags & OFlags::ACCMODE != OFlags::RDONLY;
    let reads = flags & OFlags::ACCMODE != OFlags::WRONLY;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile if reads && u32::try_from(stat.st_size).is_ok() => Class::Memory,
        FileType::Fifo if writes => Class::Pipe,
        FileType::Unknown if reads && is_dmabuf(fd) => Class::Memory,
        _ => Class::Other,
    }
}

fn is_dmabuf(fd: BorrowedFd<'_>) -> bool {
    let name = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    name.is_ok_and(|name| name.to_string_lossy().starts_with("/dmabuf:"))
}

#[cfg(test)]
#[path = "relay_tests.rs"]
mod tests;
