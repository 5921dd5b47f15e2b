//! Nodes: the files a guest has a number for.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::Statx;
use rustix::io::Errno;

use crate::attributes::Kind;
use crate::grants::Grant;

/// A file of the host that the guest knows. The descriptor keeps it from being another one.
#[derive(Debug)]
pub(crate) struct Node {
    pub grant: Arc<Grant>,
    pub kind: Kind,
    pub fd: Arc<OwnedFd>,
    identity: Identity,
    /// How often the guest was told of it and has not forgotten.
    lookups: u64,
}

impl Node {
    /// The descriptor of a directory.
    pub fn directory(&self) -> Result<BorrowedFd<'_>, Errno> {
        if self.kind == Kind::Directory { Ok(self.fd.as_fd()) } else { Err(Errno::NOTDIR) }
    }

    /// Whether it is what the grant was given for, and not something beneath.
    pub fn is_grant(&self) -> bool {
        Arc::ptr_eq(&self.fd, &self.grant.root)
    }
}

/// Grant, device and inode: the same file in two grants is two nodes, since one grant may be read-only.
type Identity = (u64, u64, u64);

#[derive(Debug, Default)]
pub(crate) struct Nodes {
    by_id: BTreeMap<u64, Node>,
    by_identity: BTreeMap<Identity, u64>,
}

impl Nodes {
    /// Number of nodes.
    pub fn len(&self) -> usize {
        self.by_id.len()
    }

    /// The node with this number, if it can be used.
    pub fn get(&self, id: u64) -> Result<&Node, Errno> {
        let node = self.by_id.get(&id).ok_or(Errno::STALE)?;
        node.grant.check()?;
        Ok(node)
    }

    /// The guest is told of the file `fd`: returns its number, which is `id` if it has none yet.
    pub fn tell(&mut self, grant: &Arc<Grant>, fd: Arc<OwnedFd>, stat: &Statx, kind: Kind, id: u64) -> u64 {
        let device = u64::from(stat.stx_dev_major) << 32 | u64::from(stat.stx_dev_minor);
        let identity = (grant.number, device, stat.stx_ino);
        let id = *self.by_identity.entry(identity).or_insert(id);
        let new = || Node { grant: grant.clone(), kind, fd, identity, lookups: 0 };
        let node = self.by_id.entry(id).or_insert_with(new);
        node.lookups = node.lookups.saturating_add(1);
        id
    }

    /// The guest forgets `count` of the times it was told.
    pub fn forget(&mut self, id: u64, count: u64) {
        let Some(node) = self.by_id.get_mut(&id) else { return };
        node.lookups = node.lookups.saturating_sub(count);
        if node.lookups == 0 {
            self.by_identity.remove(&node.identity);
            self.by_id.remove(&id);
        }
    }

    /// Drops what belongs to revoked grants.
    pub fn forget_revoked(&mut self) {
        self.by_id.retain(|_, node| !node.grant.is_revoked());
        let by_id = &self.by_id;
        self.by_identity.retain(|_, id| by_id.contains_key(id));
    }

    /// Drops all.
    pub fn clear(&mut self) {
        self.by_id.clear();
        self.by_identity.clear();
    }
}
