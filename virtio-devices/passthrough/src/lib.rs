//! Grants: files and directories of the host that a guest may use, and the operations on them. No virtio and no FUSE.
//!
//! ```text
//!   /            the root, which exists only here: its entries are the grants
//!   ├── report   a grant of one file: that file and nothing else
//!   └── photos   a grant of one directory: what is beneath it, on the same mount
//! ```
//! * [`grants`] is the table of grants, which its owner changes while a guest uses it.
//! * [`tree`] is what one guest sees: nodes, open files and directories, each bounded in number.
//! * `host` has the system calls that name files. Each takes the descriptor of a directory and one name in it, and
//!   follows no symbolic link, so what a guest or anybody else renames meanwhile cannot lead out of a grant.
//!
//! All that a guest says is hostile here: identifiers, names, offsets, flags, and the order of its requests.

#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::unreachable)
)]

mod attributes;
mod entries;
mod extended;
mod files;
pub mod grants;
mod host;
mod nodes;
mod transfer;
pub mod tree;

#[cfg(test)]
mod tests;

pub use attributes::{Attributes, Change, Kind, Time};
pub use entries::Entry;
pub use extended::{ExtendedName, MAX_EXTENDED};
pub use files::OpenFlags;
pub use grants::{GrantError, Grants};
pub use host::Name;
pub use rustix::fs::{FallocateFlags, StatVfs};
pub use rustix::io::Errno;
pub use tree::{ROOT, Tree, TreeError};
