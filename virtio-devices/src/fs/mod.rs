//! File system device (virtio 1.3 section 5.11): files and directories of the host that were granted to the guest, and can
//! be taken back while it runs.
//!
//! [`protocol`] has FUSE's structures, [`parse`] understands requests without doing anything, `session.rs` carries them out
//! on a tree of the `passthrough` crate, `device.rs` has the queues and moves data. Requests are carried out one after
//! another on the device's thread, each when it comes; nothing is in flight when the device stops.

mod device;
pub mod parse;
pub mod protocol;
mod session;
#[cfg(test)]
mod tests;

use passthrough::{Grants, Tree};
use serde::{Deserialize, Serialize};
use vmm_config::{FsConfig, HostFacts, VmConfig};

pub use device::Fs;
use device::TAG_BYTES;
use session::Session;

use crate::device::SavedState;
use crate::registry::{BuildContext, BuildError, Built, Kind, Request, Syscall, no_window};

/// The kind's entry in the registry.
pub const KIND: Kind = Kind { name: "fs", requests, map: no_window, build, syscalls: SYSCALLS };

const STATE_VERSION: u32 = 1;

/// What a snapshot says of the device. Grants, nodes and open files are not part of it: what the guest knew of them is
/// stale when it goes on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    /// The driver has begun a session.
    begun: bool,
    /// The lowest number of a node or handle that the driver cannot know.
    next: u64,
}

fn requests(config: &VmConfig, _facts: &HostFacts) -> Vec<Request> {
    let request = |(index, fs): (usize, &FsConfig)| Request {
        id: fs.id.clone().unwrap_or_else(|| format!("_fs{index}")),
        index,
        window: None,
    };
    config.fs.iter().enumerate().map(request).collect()
}

fn build(ctx: BuildContext<'_>) -> Result<Built, BuildError> {
    let id = &ctx.request.id;
    let other = |reason: String| BuildError::Other { device: id.clone(), reason };
    let config = ctx.config.fs.get(ctx.request.index).ok_or_else(|| other("it has no configuration".into()))?;
    let grants = match ctx.grants {
        Some(grants) => grants,
        None => Grants::new().map_err(|e| other(format!("cannot make a table of grants: {e}")))?,
    };
    let device = create(config, grants.clone(), ctx.saved).map_err(other)?;
    Ok(Built { grants: Some(grants), ..Built::new(device) })
}

/// A device that shows `grants`, for the constructor above and for those who have no machine.
///
/// # Errors
/// If there is no /proc, or `saved` is another device's.
pub fn create(config: &FsConfig, grants: Grants, saved: Option<&SavedState>) -> Result<Fs, String> {
    let state = match saved {
        Some(saved) => saved.read(KIND.name, STATE_VERSION).map_err(|e| e.to_string())?,
        None => State { begun: false, next: 0 },
    };
    let tree = Tree::new(grants, state.next).map_err(|e| e.to_string())?;
    let mut tag = [0; TAG_BYTES];
    tag.iter_mut().zip(config.tag.bytes()).for_each(|(to, from)| *to = from);
    Ok(Fs::new(Session::new(tree, state.begun, (config.uid, config.gid)), tag))
}

/// Names are looked up beneath a directory that is open; the arguments that say so are in memory, where no filter sees
/// them.
const SYSCALLS: &[Syscall] = &[
    Syscall { number: libc::SYS_openat2, why: "look up, open and make files beneath a grant" },
    Syscall { number: libc::SYS_statx, why: "kind and attributes of a file" },
    Syscall { number: libc::SYS_preadv2, why: "read a file into guest memory" },
    Syscall { number: libc::SYS_pwritev2, why: "write guest memory to a file" },
    Syscall { number: libc::SYS_fsync, why: "FSYNC, FSYNCDIR" },
    Syscall { number: libc::SYS_fdatasync, why: "FSYNC of data" },
    Syscall { number: libc::SYS_ftruncate, why: "SETATTR of the size" },
    Syscall { number: libc::SYS_fallocate, why: "FALLOCATE" },
    Syscall { number: libc::SYS_lseek, why: "LSEEK; where reading a directory goes on" },
    Syscall { number: libc::SYS_copy_file_range, why: "COPY_FILE_RANGE" },
    Syscall { number: libc::SYS_getdents64, why: "READDIR, READDIRPLUS" },
    Syscall { number: libc::SYS_fchmodat, why: "SETATTR of permissions" },
    Syscall { number: libc::SYS_utimensat, why: "SETATTR of times" },
    Syscall { number: libc::SYS_readlinkat, why: "READLINK" },
    Syscall { number: libc::SYS_symlinkat, why: "SYMLINK" },
    Syscall { number: libc::SYS_linkat, why: "LINK" },
    Syscall { number: libc::SYS_mkdirat, why: "MKDIR" },
    Syscall { number: libc::SYS_mknodat, why: "MKNOD of a regular file" },
    Syscall { number: libc::SYS_unlinkat, why: "UNLINK, RMDIR" },
    Syscall { number: libc::SYS_renameat2, why: "RENAME, RENAME2" },
    Syscall { number: libc::SYS_fstatfs, why: "STATFS" },
    Syscall { number: libc::SYS_syncfs, why: "SYNCFS" },
    Syscall { number: libc::SYS_fgetxattr, why: "GETXATTR" },
    Syscall { number: libc::SYS_fsetxattr, why: "SETXATTR" },
    Syscall { number: libc::SYS_flistxattr, why: "LISTXATTR" },
    Syscall { number: libc::SYS_fremovexattr, why: "REMOVEXATTR" },
];
