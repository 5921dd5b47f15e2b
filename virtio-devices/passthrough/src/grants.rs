//! The table of grants.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::OFlags;
use rustix::io::Errno;

use crate::attributes::Kind;
use crate::host::{self, Name, Proc};

/// Grants at a time.
pub const MAX_GRANTS: usize = 1024;

/// Why a grant cannot be given or taken back.
#[derive(Debug, thiserror::Error)]
pub enum GrantError {
    /// The name is no name of a file.
    #[error(
        "a grant cannot be called {0:?}: a name has 1 to 255 bytes, no / and no zero byte, and is neither . nor .."
    )]
    Name(String),
    /// There is one of that name.
    #[error("there is a grant called {0} already; take it back first, or choose another name")]
    Taken(String),
    /// There is none of that name.
    #[error("there is no grant called {0}")]
    Missing(String),
    /// There are too many.
    #[error("there are {MAX_GRANTS} grants already; take one back first")]
    Full,
    /// It is a device, a pipe, a socket or a symbolic link.
    #[error("the grant {0} is neither a regular file nor a directory")]
    Kind(String),
    /// What a guest wrote would go to another place than it says.
    #[error("the descriptor for the grant {0} was opened for appending; open it without O_APPEND, or with O_PATH")]
    Append(String),
    /// It would be of no use to a guest.
    #[error(
        "the grant {name} cannot be opened for {purpose}: {source} (with --landlock, a directory has to be beneath one \
         of the landlock_rules, and a file be handed in as a descriptor that is open for this)"
    )]
    Open {
        /// The grant.
        name: String,
        /// Reading or writing.
        purpose: &'static str,
        /// The cause.
        source: Errno,
    },
    /// The host cannot say what it is.
    #[error("the grant {name} cannot be examined: {source}")]
    Examine {
        /// The grant.
        name: String,
        /// The cause.
        source: Errno,
    },
}

/// One file or directory of the host. A guest may use it until it is revoked.
#[derive(Debug)]
pub(crate) struct Grant {
    /// Never used twice in one table.
    pub number: u64,
    pub name: Name,
    pub writable: bool,
    pub kind: Kind,
    pub root: Arc<OwnedFd>,
    /// What `root` is open for: (reading, writing). Nothing: it is a mere reference (O_PATH), or a directory.
    pub opened: (bool, bool),
    revoked: AtomicBool,
}

impl Grant {
    /// Whether it was taken back.
    pub fn is_revoked(&self) -> bool {
        self.revoked.load(Ordering::Acquire)
    }

    /// Refuses what a revoked grant is asked for.
    pub fn check(&self) -> Result<(), Errno> {
        if self.is_revoked() { Err(Errno::STALE) } else { Ok(()) }
    }

    /// Refuses changes to a read-only grant.
    pub fn check_writable(&self) -> Result<(), Errno> {
        self.check()?;
        if self.writable { Ok(()) } else { Err(Errno::ROFS) }
    }
}

#[derive(Debug, Default)]
struct Table {
    by_number: BTreeMap<u64, Arc<Grant>>,
    last: u64,
}

#[derive(Debug)]
struct Shared {
    table: Mutex<Table>,
    revocations: OwnedFd,
}

/// The grants of one guest. Copies are the same table: its owner has one, and [`crate::tree::Tree`] another, perhaps on
/// another thread.
#[derive(Debug, Clone)]
pub struct Grants {
    shared: Arc<Shared>,
}

impl Grants {
    /// An empty table.
    ///
    /// # Errors
    /// If the process has no file descriptor left.
    pub fn new() -> Result<Self, Errno> {
        let revocations = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { shared: Arc::new(Shared { table: Mutex::default(), revocations }) })
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.shared.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives the guest `target`, a regular file or a directory, under the name `name`. The descriptor may be a mere
    /// reference (O_PATH); one of a regular file that is open for reading (and writing, if `writable`) is used as it is.
    ///
    /// # Errors
    /// See [`GrantError`]; the table is as it was.
    pub fn add(&self, name: &str, target: OwnedFd, writable: bool) -> Result<(), GrantError> {
        let valid = Name::new(name.as_bytes()).map_err(|_| GrantError::Name(name.to_owned()))?;
        let text = || name.to_owned();
        let examine = |source| GrantError::Examine { name: text(), source };
        let (_, kind) = host::examine(target.as_fd()).map_err(examine)?;
        if !matches!(kind, Kind::File | Kind::Directory) {
            return Err(GrantError::Kind(text()));
        }
        let flags = rustix::fs::fcntl_getfl(&target).map_err(examine)?;
        let opened = match kind {
            Kind::File if !flags.contains(OFlags::PATH) => {
                if flags.contains(OFlags::APPEND) {
                    return Err(GrantError::Append(text()));
                }
                let access = flags & OFlags::RWMODE;
                (access != OFlags::WRONLY, access != OFlags::RDONLY)
            }
            _ => (false, false),
        };
        try_access(&target, kind, writable, opened).map_err(|(purpose, source)| GrantError::Open {
            name: text(),
            purpose,
            source,
        })?;
        let mut table = self.table();
        if table.by_number.values().any(|grant| grant.name == valid) {
            return Err(GrantError::Taken(text()));
        }
        if table.by_number.len() >= MAX_GRANTS {
            return Err(GrantError::Full);
        }
        table.last += 1;
        let number = table.last;
        let (root, revoked) = (Arc::new(target), AtomicBool::new(false));
        let grant = Grant { number, name: valid, writable, kind, root, opened, revoked };
        table.by_number.insert(number, Arc::new(grant));
        Ok(())
    }

    /// Takes a grant back. What a guest asks of it from now on is refused, and its descriptors are closed as soon as the
    /// thread that serves the guest hears of it.
    ///
    /// # Errors
    /// If there is none of that name.
    pub fn remove(&self, name: &str) -> Result<(), GrantError> {
        let mut table = self.table();
        let missing = || GrantError::Missing(name.to_owned());
        let found = table.by_number.iter().find(|(_, grant)| grant.name.as_bytes() == name.as_bytes());
        let number = *found.ok_or_else(missing)?.0;
        if let Some(grant) = table.by_number.remove(&number) {
            grant.revoked.store(true, Ordering::Release);
        }
        // It fails only if the counter is full, and then it is readable anyway.
        let _ = rustix::io::write(&self.shared.revocations, &1u64.to_ne_bytes());
        Ok(())
    }

    pub(crate) fn find(&self, name: &Name) -> Option<Arc<Grant>> {
        self.table().by_number.values().find(|grant| grant.name == *name).cloned()
    }

    /// The first grant whose number is higher than `number`.
    pub(crate) fn after(&self, number: u64) -> Option<Arc<Grant>> {
        self.table().by_number.range(number.checked_add(1)?..).next().map(|(_, grant)| grant.clone())
    }

    /// Makes [`Grants::as_fd`] unreadable until the next revocation.
    pub(crate) fn hear_revocations(&self) {
        let _ = rustix::io::read(&self.shared.revocations, &mut [0u8; 8]);
    }
}

impl AsFd for Grants {
    /// Readable when a grant was revoked and [`crate::tree::Tree::forget_revoked`] is to be called.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.shared.revocations.as_fd()
    }
}

/// Opens the file or directory once, to say now what would be a riddle in the guest later.
fn try_access(target: &OwnedFd, kind: Kind, writable: bool, opened: (bool, bool)) -> Result<(), (&'static str, Errno)> {
    let proc = Proc::new().map_err(|e| ("reading", e))?;
    match kind {
        Kind::Directory => host::open_directory(target.as_fd()).map(drop).map_err(|e| ("reading", e)),
        _ => {
            if !opened.0 {
                proc.open(target.as_fd(), OFlags::RDONLY).map_err(|e| ("reading", e))?;
            }
            if writable && !opened.1 {
                proc.open(target.as_fd(), OFlags::WRONLY).map_err(|e| ("writing", e))?;
            }
            Ok(())
        }
    }
}
