//! The Wayland proxy: applications in the VM connect to its socket, and their windows appear on the host's compositor.
//!
//! Every application gets a thread and a virtio-gpu cross-domain context of its own, so whatever one of them does ends at
//! most its own connection. The proxy is no security boundary towards the host, which checks everything again; it only
//! has to keep applications of one VM apart and alive.
//!
//! The way of a message: [`socket`] (the application's end) - [`wire`] and [`table`] (parsing) - [`requests`] and
//! [`events`] (translation, with [`objects`], [`shm`], [`surface`], [`pipes`]) - [`channel`] (the cross-domain protocol) -
//! [`gpu`] (the device; [`virtgpu`] is the kernel's driver).

mod channel;
mod damage;
mod error;
mod events;
pub mod gpu;
mod objects;
mod pipes;
mod requests;
mod session;
mod shm;
mod socket;
mod surface;
mod table;
mod virtgpu;
mod wire;

use std::convert::Infallible;
use std::io;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

pub use error::SessionError;
use gpu::Gpu;
pub use virtgpu::{VirtGpu, find_device};

/// How the proxy is set up.
#[derive(Debug, Clone)]
pub struct Options {
    /// The render node; by default the first that offers cross-domain contexts.
    pub device: Option<PathBuf>,
    /// Applications at a time. Each holds a context on the host, which has few (about 64).
    pub max_clients: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self { device: None, max_clients: 60 }
    }
}

/// Why the proxy cannot serve at all.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no usable GPU.
    #[error("no GPU for Wayland: {0}; the VM needs a virtio-gpu device with the cross-domain capability set")]
    Device(#[source] io::Error),
    /// The socket could not be made.
    #[error("cannot listen on {path}: {source}")]
    Listen {
        /// The socket's path.
        path: PathBuf,
        /// What failed.
        source: io::Error,
    },
    /// No more connections can be accepted.
    #[error("cannot accept Wayland connections: {0}")]
    Accept(#[source] io::Error),
}

/// Runs the proxy for those who connect to `listener`. Returns only if it cannot go on.
///
/// # Errors
///
/// See [`Error`].
pub fn run(listener: &UnixListener, options: &Options) -> Result<Infallible, Error> {
    let device = match &options.device {
        Some(path) => path.clone(),
        None => find_device().map_err(Error::Device)?,
    };
    log::debug!("forwarding Wayland clients by {}", device.display());
    serve(listener, options.max_clients, move || VirtGpu::open(&device))
}

/// Binds a socket at `path`, replacing a stale one, for the user and group `owner` if given.
///
/// # Errors
///
/// [`Error::Listen`].
pub fn listen(path: &Path, owner: Option<(u32, u32)>) -> Result<UnixListener, Error> {
    let bind = || -> io::Result<UnixListener> {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(path)?;
        std::fs::set_permissions(path, PermissionsExt::from_mode(0o700))?;
        if let Some((user, group)) = owner {
            chown(path, Some(user), Some(group))?;
        }
        Ok(listener)
    };
    bind().map_err(|source| Error::Listen { path: path.to_owned(), source })
}

/// Counts a client for as long as it lives.
struct Slot(Arc<AtomicUsize>);

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Serves each connection on `listener` in a thread of its own, with a context from `open`.
///
/// # Errors
///
/// [`Error::Accept`] if the listener itself fails; it does not end by what an application does.
pub fn serve<G: Gpu + 'static>(
    listener: &UnixListener,
    max_clients: usize,
    open: impl Fn() -> io::Result<G> + Send + Sync + 'static,
) -> Result<Infallible, Error> {
    raise_fd_limit();
    listener.set_nonblocking(false).map_err(Error::Accept)?;
    let open = Arc::new(open);
    let clients = Arc::new(AtomicUsize::new(0));
    loop {
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) if transient(&error) => {
                log::warn!("a Wayland connection could not be accepted: {error}");
                std::thread::sleep(std::time::Duration::from_millis(50));
                continue;
            }
            Err(error) => return Err(Error::Accept(error)),
        };
        let slot = Slot(Arc::clone(&clients));
        if clients.fetch_add(1, Ordering::AcqRel) >= max_clients {
            log::warn!("refused a Wayland connection: {max_clients} applications are connected already");
            drop(slot);
            continue;
        }
        let open = Arc::clone(&open);
        let client = move || {
            let _slot = slot;
            connection(stream, &*open);
        };
        if let Err(error) = std::thread::Builder::new().name("wayland".into()).stack_size(512 << 10).spawn(client) {
            log::warn!("no thread for a Wayland connection: {error}");
        }
    }
}

/// Errors of `accept` that are about one connection, or pass when others end.
fn transient(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::ECONNABORTED | libc::EINTR | libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::ENOBUFS)
    )
}

fn connection<G: Gpu>(stream: UnixStream, open: &dyn Fn() -> io::Result<G>) {
    let result =
        open().map_err(SessionError::io("opening a context on the GPU")).and_then(|gpu| session::run(stream, gpu));
    match result {
        Ok(()) => log::debug!("a Wayland connection ended"),
        Err(error) => log::warn!("a Wayland connection was ended: {error}"),
    }
}

/// Applications bring descriptors along; the soft limit is made for programs that use `select`.
fn raise_fd_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum }) {
        log::debug!("the limit of open files stays as it is: {error}");
    }
}
