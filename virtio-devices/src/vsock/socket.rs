//! The host's end: the listening Unix socket, and connections to the programs that listen for the guest.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, connect, socket_with};

/// Why the listening socket could not be made.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// A program listens there.
    #[error("the socket {} is in use by a running program; stop it or give another path", .0.display())]
    InUse(PathBuf),
    /// There is something that is no socket.
    #[error("{} exists and is no socket; remove it or give another path", .0.display())]
    NotASocket(PathBuf),
    /// The kernel refused.
    #[error("cannot listen on the socket {}: {source}", path.display())]
    Listen {
        /// The path.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
}

/// A listening socket whose file goes with it.
#[derive(Debug)]
pub(super) struct Listener {
    socket: UnixListener,
    path: PathBuf,
    /// Device and inode of the socket file: only our own is removed at the end.
    file: Option<(u64, u64)>,
}

impl Listener {
    /// Listens at `path`. A socket file left over by a program that is gone is replaced.
    pub(super) fn bind(path: &Path) -> Result<Self, SocketError> {
        let fail = |source| SocketError::Listen { path: path.to_owned(), source };
        let socket = match UnixListener::bind(path) {
            Err(e) if e.kind() == io::ErrorKind::AddrInUse => {
                remove_stale(path)?;
                UnixListener::bind(path)
            }
            other => other,
        }
        .map_err(fail)?;
        socket.set_nonblocking(true).map_err(fail)?;
        let file = fs::symlink_metadata(path).ok().map(|m| (m.dev(), m.ino()));
        Ok(Self { socket, path: path.to_owned(), file })
    }

    /// Listens on a socket that was handed down, whose file is somebody else's; the guest's connections go to the
    /// sockets whose names begin with `path`.
    pub(super) fn inherited(socket: OwnedFd, path: &Path) -> Result<Self, SocketError> {
        let socket = UnixListener::from(socket);
        let fail = |source| SocketError::Listen { path: path.to_owned(), source };
        socket.set_nonblocking(true).map_err(fail)?;
        Ok(Self { socket, path: path.to_owned(), file: None })
    }

    /// The next program that connected; non-blocking, as its socket is.
    pub(super) fn accept(&self) -> Result<OwnedFd, Errno> {
        accept_with(&self.socket, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC)
    }

    /// Connects to the program that listens for the guest's connections to `port`.
    pub(super) fn connect(&self, port: u32) -> Result<OwnedFd, Errno> {
        let mut path = OsString::from(&self.path);
        path.push(format!("_{port}"));
        dial(Path::new(&path))
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let now = fs::symlink_metadata(&self.path).ok().map(|m| (m.dev(), m.ino()));
        if now.is_some()
            && now == self.file
            && let Err(e) = fs::remove_file(&self.path)
        {
            log::warn!("cannot remove the socket {}: {e}", self.path.display());
        }
    }
}

/// Connects without waiting: a Unix socket connects at once or not at all (a full backlog is EAGAIN).
fn dial(path: &Path) -> Result<OwnedFd, Errno> {
    let address = SocketAddrUnix::new(path)?;
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&socket, &address)?;
    Ok(socket)
}

fn remove_stale(path: &Path) -> Result<(), SocketError> {
    let fail = |source| SocketError::Listen { path: path.to_owned(), source };
    if !fs::symlink_metadata(path).map_err(fail)?.file_type().is_socket() {
        return Err(SocketError::NotASocket(path.to_owned()));
    }
    match dial(path) {
        Err(Errno::CONNREFUSED) => {
            log::info!("replacing the socket {}, on which nobody listens", path.display());
            fs::remove_file(path).map_err(fail)
        }
        Err(e @ (Errno::ACCESS | Errno::PERM)) => Err(fail(e.into())),
        _ => Err(SocketError::InUse(path.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_socket_file_is_ours_or_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "a stale socket");
        let device = Listener::bind(&path).unwrap();
        let second = Listener::bind(&path).err().unwrap();
        assert!(matches!(&second, SocketError::InUse(p) if *p == path), "{second}");
        drop(device);
        assert!(!path.exists());
        let device = Listener::bind(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "something else").unwrap();
        drop(device);
        assert!(path.exists());
        let third = Listener::bind(&path).err().unwrap();
        assert!(matches!(third, SocketError::NotASocket(_)), "{third}");
        assert!(Listener::bind(&dir.path().join("no/such/dir")).is_err());
        assert!(Listener::bind(&dir.path().join("x".repeat(200))).is_err());
    }
}
