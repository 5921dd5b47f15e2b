//! The server: a listening socket and its connections behind one file descriptor.

use std::collections::BTreeMap;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::io::{Errno, fcntl_dupfd_cloexec};

use crate::connection::Connection;
use crate::listener::{ListenError, Listener};
use crate::request::Request;
use crate::response::{Response, encode, encode_error};

/// Connections at a time. Another one takes the place of the one that has been silent longest.
const MAX_CONNECTIONS: usize = 16;
/// Connections accepted, and events handled, in one turn.
const TURN: usize = 16;
/// The listening socket's number among the events; connections count from 1.
const LISTENER: u64 = 0;

/// Serves requests on a Unix socket, without threads and without blocking.
///
/// Its owner waits for the server's file descriptor ([`AsFd`]) to be readable, together with whatever else it waits
/// for, and then calls [`Server::dispatch`]. What has not been dealt with by then makes the descriptor readable again.
#[derive(Debug)]
pub struct Server {
    epoll: OwnedFd,
    listener: Listener,
    connections: BTreeMap<u64, Client>,
    /// The number of the next connection.
    next: u64,
    /// Counts the turns, to tell who has been silent longest.
    turn: u64,
    /// Given up for a moment when the process is out of descriptors, so that a client can be turned away.
    reserve: Option<OwnedFd>,
}

#[derive(Debug)]
struct Client {
    connection: Connection,
    /// The turn in which it was last heard of.
    heard: u64,
    /// What the epoll descriptor is told to wait for.
    interest: EventFlags,
}

impl Server {
    /// Makes the socket `path` and listens there. A stale socket file is replaced; the file is removed at the end. Only
    /// its owner can connect.
    ///
    /// # Errors
    /// See [`ListenError`].
    pub fn bind(path: &Path) -> Result<Self, ListenError> {
        Self::new(Listener::bind(path)?, path)
    }

    /// Serves a listening socket that was handed down. Its file stays.
    ///
    /// # Errors
    /// It is not a listening Unix stream socket.
    pub fn from_listener(socket: OwnedFd) -> Result<Self, ListenError> {
        Self::new(Listener::inherit(socket)?, Path::new("that was inherited"))
    }

    fn new(listener: Listener, path: &Path) -> Result<Self, ListenError> {
        let at =
            |error: Errno| ListenError::System { step: "wait for", path: path.into(), source: io::Error::from(error) };
        let epoll = epoll::create(CreateFlags::CLOEXEC).map_err(at)?;
        epoll::add(&epoll, &listener, EventData::new_u64(LISTENER), EventFlags::IN).map_err(at)?;
        let reserve = fcntl_dupfd_cloexec(&epoll, 0).ok();
        Ok(Self { epoll, listener, connections: BTreeMap::new(), next: LISTENER + 1, turn: 0, reserve })
    }

    /// Deals with what has happened on the sockets: accepts, reads, calls `handle` for each whole request with the
    /// descriptors that came along, sends. Returns soon, whatever the clients do.
    ///
    /// # Errors
    /// The system refuses to say what happened. A client's misbehaviour is not an error.
    pub fn dispatch(&mut self, handle: &mut dyn FnMut(Request, Vec<OwnedFd>) -> Response) -> io::Result<()> {
        let mut space = [MaybeUninit::<Event>::uninit(); TURN];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let events = match epoll::wait(&self.epoll, &mut space, Some(&now)) {
            Ok((events, _)) => events,
            Err(Errno::INTR) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        self.turn = self.turn.wrapping_add(1);
        for event in events {
            match event.data.u64() {
                LISTENER => self.accept(),
                number => self.serve(number, event.flags, handle),
            }
        }
        Ok(())
    }

    /// How many clients are connected.
    pub fn connections(&self) -> usize {
        self.connections.len()
    }

    fn accept(&mut self) {
        for _ in 0..TURN {
            match self.listener.accept() {
                Ok(stream) => {
                    // A client that cannot be taken on is hung up on; it sees that at once.
                    let _ = Connection::new(stream).and_then(|connection| self.add(connection));
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    let out_of_descriptors =
                        [Errno::MFILE, Errno::NFILE].map(Errno::raw_os_error).map(Some).contains(&error.raw_os_error());
                    if out_of_descriptors && self.reserve.take().is_some() {
                        // Left waiting, the client would make the socket readable for ever.
                        drop(self.listener.accept());
                        self.reserve = fcntl_dupfd_cloexec(&self.epoll, 0).ok();
                    }
                    return;
                }
            }
        }
    }

    fn add(&mut self, connection: Connection) -> io::Result<()> {
        if self.connections.len() >= MAX_CONNECTIONS {
            let silent = self.connections.iter().min_by_key(|(_, client)| client.heard).map(|(number, _)| *number);
            // Dropping it closes it, and that takes it out of the epoll descriptor.
            silent.and_then(|number| self.connections.remove(&number));
        }
        let number = self.next;
        self.next = self.next.wrapping_add(1).max(LISTENER + 1);
        epoll::add(&self.epoll, &connection, EventData::new_u64(number), EventFlags::IN)?;
        self.connections.insert(number, Client { connection, heard: self.turn, interest: EventFlags::IN });
        Ok(())
    }

    fn serve(&mut self, number: u64, flags: EventFlags, handle: &mut dyn FnMut(Request, Vec<OwnedFd>) -> Response) {
        // It may have lost its place in this turn.
        let Some(client) = self.connections.get_mut(&number) else { return };
        client.heard = self.turn;
        let connection = &mut client.connection;
        if flags.contains(EventFlags::OUT) {
            connection.writable();
        }
        if flags.intersects(EventFlags::IN | EventFlags::HUP | EventFlags::ERR) {
            connection.readable();
        }
        while let Some(request) = connection.next_request() {
            let answer = match Request::parse(&request.method, &request.path, &request.body) {
                Ok(parsed) => encode(parsed.action(), &handle(parsed, request.fds)),
                Err(error) => encode_error(&error),
            };
            connection.respond(&answer);
        }
        connection.writable();
        let mut interest = EventFlags::empty();
        interest.set(EventFlags::IN, connection.wants_read());
        interest.set(EventFlags::OUT, connection.wants_write());
        // Nobody is left to read an answer after a hang-up in both directions.
        let mut over = connection.is_over() || flags.intersects(EventFlags::HUP | EventFlags::ERR);
        if !over && interest != client.interest {
            client.interest = interest;
            over = epoll::modify(&self.epoll, connection, EventData::new_u64(number), interest).is_err();
        }
        if over {
            self.connections.remove(&number);
        }
    }
}

impl AsFd for Server {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}
