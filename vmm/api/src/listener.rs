//! The listening socket: made without a moment in which a client could find it and be refused, and removed at the end.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::{fs, process};

use rustix::fs::{Mode, fchmod};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with, sockopt};
use thiserror::Error;

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 16;

/// Why there is no socket to listen on.
#[derive(Debug, Error)]
pub enum ListenError {
    /// Another process answers there.
    #[error("the socket {} is in use by another process; stop that one or choose another path", .0.display())]
    InUse(PathBuf),
    /// Something else has the name.
    #[error("{} exists and is not a socket; choose another path or remove it", .0.display())]
    NotASocket(PathBuf),
    /// The path does not fit the address of a Unix socket.
    #[error("the socket's path {} is too long; Unix sockets allow {MAX_PATH} bytes", .0.display())]
    TooLong(PathBuf),
    /// The system refused.
    #[error("cannot {step} the socket {}: {source}", .path.display())]
    System {
        /// What was tried.
        step: &'static str,
        /// Where.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The inherited descriptor is something else.
    #[error("the inherited file descriptor is not a listening Unix stream socket")]
    NotListening,
}

/// The longest path of a Unix socket: `sun_path` without the zero at its end.
const MAX_PATH: usize = 107;

/// A listening Unix socket. If it made the file, dropping it removes the file.
#[derive(Debug)]
pub(crate) struct Listener {
    socket: UnixListener,
    made: Option<Made>,
}

/// The file of a socket, known by more than its name: by then it could be another's.
#[derive(Debug)]
struct Made {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl Listener {
    /// Makes the socket `path`, readable and writable for its owner alone. A socket file that nobody answers at is
    /// replaced.
    pub(crate) fn bind(path: &Path) -> Result<Self, ListenError> {
        if path.as_os_str().len() > MAX_PATH {
            return Err(ListenError::TooLong(path.into()));
        }
        remove_stale(path)?;
        let at = |step| move |source: io::Error| ListenError::System { step, path: path.into(), source };
        let socket =
            socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None)
                .map_err(|error| at("make")(error.into()))?;
        // The file takes the mode that its socket has when it is bound.
        fchmod(&socket, Mode::RUSR | Mode::WUSR).map_err(|error| at("protect")(error.into()))?;
        // Under its own name a client could find the socket before it listens, so it gets that name last.
        let temporary = temporary_name(path);
        let first = if temporary.as_os_str().len() > MAX_PATH { path } else { &temporary };
        let address = SocketAddrUnix::new(first).map_err(|error| at("name")(error.into()))?;
        bind(&socket, &address).map_err(|error| at("bind")(error.into()))?;
        let finish = || -> Result<Made, ListenError> {
            listen(&socket, BACKLOG).map_err(|error| at("listen on")(error.into()))?;
            let metadata = fs::symlink_metadata(first).map_err(at("examine"))?;
            if first != path {
                fs::rename(first, path).map_err(at("name"))?;
            }
            Ok(Made { path: path.into(), device: metadata.dev(), inode: metadata.ino() })
        };
        let made = finish().inspect_err(|_| drop(fs::remove_file(first)))?;
        Ok(Self { socket: socket.into(), made: Some(made) })
    }

    /// Takes over a socket that listens already. Its file is another's to remove.
    pub(crate) fn inherit(socket: OwnedFd) -> Result<Self, ListenError> {
        let listening = sockopt::socket_domain(&socket) == Ok(AddressFamily::UNIX)
            && sockopt::socket_type(&socket) == Ok(SocketType::STREAM)
            && sockopt::socket_acceptconn(&socket) == Ok(true);
        let socket = UnixListener::from(socket);
        if !listening || socket.set_nonblocking(true).is_err() {
            return Err(ListenError::NotListening);
        }
        Ok(Self { socket, made: None })
    }

    /// The next connection that waits.
    pub(crate) fn accept(&self) -> io::Result<UnixStream> {
        self.socket.accept().map(|(stream, _)| stream)
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let Some(made) = &self.made else { return };
        if let Ok(metadata) = fs::symlink_metadata(&made.path)
            && (metadata.dev(), metadata.ino()) == (made.device, made.inode)
        {
            // Nothing is lost if it stays: the next one replaces it.
            let _ = fs::remove_file(&made.path);
        }
    }
}

/// Removes a socket file nobody listens at, and complains of anything else at `path`.
fn remove_stale(path: &Path) -> Result<(), ListenError> {
    let at = |step, source| ListenError::System { step, path: path.into(), source };
    match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.file_type().is_socket() => {}
        Ok(_) => return Err(ListenError::NotASocket(path.into())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(at("examine", error)),
    }
    match UnixStream::connect(path) {
        Ok(_) => Err(ListenError::InUse(path.into())),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(at("replace", error)),
            _ => Ok(()),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(at("examine", error)),
    }
}

/// A name next to `path` that no other socket of this or another process has.
fn temporary_name(path: &Path) -> PathBuf {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    path.with_file_name(format!(".{:x}-{count:x}", process::id()))
}
