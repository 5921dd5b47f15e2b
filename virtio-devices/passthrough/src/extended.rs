//! Extended attributes of the class `user`: xattr(7). There are no others for a guest: `security` and `system` mean
//! something to the host, `trusted` is for its administrator.

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{OFlags, XattrFlags, fgetxattr, flistxattr, fremovexattr, fsetxattr};
use rustix::io::Errno;

use crate::attributes::Kind;
use crate::host;
use crate::nodes::Node;
use crate::tree::{ROOT, Tree};

/// Bytes of the longest name (XATTR_NAME_MAX).
const NAME_MAX: usize = 255;
/// Bytes of the longest value (XATTR_SIZE_MAX), and of the longest list of names (XATTR_LIST_MAX).
pub const MAX_EXTENDED: usize = 64 << 10;
const CLASS: &[u8] = b"user.";

/// The name of an extended attribute.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExtendedName(CString);

impl ExtendedName {
    /// Checks `bytes`.
    ///
    /// # Errors
    /// `ERANGE` for a name that is empty or longer than 255 bytes, `EOPNOTSUPP` for one of another class than `user`.
    pub fn new(bytes: &[u8]) -> Result<Self, Errno> {
        if bytes.is_empty() || bytes.len() > NAME_MAX {
            return Err(Errno::RANGE);
        }
        if !is_for_guests(bytes) {
            return Err(Errno::OPNOTSUPP);
        }
        CString::new(bytes).map(Self).map_err(|_| Errno::INVAL)
    }

    fn as_c_str(&self) -> &CStr {
        &self.0
    }
}

fn is_for_guests(name: &[u8]) -> bool {
    name.len() > CLASS.len() && name.starts_with(CLASS)
}

impl Tree {
    /// The value of an attribute.
    ///
    /// # Errors
    /// As getxattr(2): `ENODATA` where there is none.
    pub fn extended(&self, id: u64, name: &ExtendedName) -> Result<Vec<u8>, Errno> {
        let node = self.attributed(id)?;
        if node.kind == Kind::Link {
            return Err(Errno::NODATA);
        }
        let fd = self.opened_for_attributes(node)?;
        let mut value = vec![0; MAX_EXTENDED];
        let len = fgetxattr(&*fd, name.as_c_str(), value.as_mut_slice())?;
        value.truncate(len);
        Ok(value)
    }

    /// Sets an attribute.
    ///
    /// # Errors
    /// As setxattr(2), `EROFS` in a read-only grant, `EPERM` for a symbolic link.
    pub fn set_extended(&self, id: u64, name: &ExtendedName, value: &[u8], flags: u32) -> Result<(), Errno> {
        let flags = XattrFlags::from_bits(flags).filter(|flags| XattrFlags::all().contains(*flags));
        let flags = flags.ok_or(Errno::INVAL)?;
        if value.len() > MAX_EXTENDED {
            return Err(Errno::TOOBIG);
        }
        fsetxattr(&*self.changeable(id)?, name.as_c_str(), value, flags)
    }

    /// Removes an attribute.
    ///
    /// # Errors
    /// As removexattr(2), and those of [`Tree::set_extended`].
    pub fn remove_extended(&self, id: u64, name: &ExtendedName) -> Result<(), Errno> {
        fremovexattr(&*self.changeable(id)?, name.as_c_str())
    }

    /// The names of all attributes that a guest may know of, each with a zero byte behind it.
    ///
    /// # Errors
    /// As listxattr(2).
    pub fn list_extended(&self, id: u64) -> Result<Vec<u8>, Errno> {
        let node = self.attributed(id)?;
        if node.kind == Kind::Link {
            return Ok(Vec::new());
        }
        let fd = self.opened_for_attributes(node)?;
        let mut names = vec![0; MAX_EXTENDED];
        let len = flistxattr(&*fd, names.as_mut_slice())?;
        names.truncate(len);
        let ours = names.split_inclusive(|byte| *byte == 0).filter(|name| is_for_guests(name));
        Ok(ours.flatten().copied().collect())
    }

    fn attributed(&self, id: u64) -> Result<&Node, Errno> {
        if id == ROOT { Err(Errno::OPNOTSUPP) } else { self.node(id) }
    }

    fn changeable(&self, id: u64) -> Result<Arc<OwnedFd>, Errno> {
        let node = self.attributed(id)?;
        node.grant.check_writable()?;
        if node.kind == Kind::Link {
            return Err(Errno::PERM);
        }
        self.opened_for_attributes(node)
    }

    /// A reference (O_PATH) has no attributes. What a file is opened for does not matter: permissions are looked at when an
    /// attribute is used.
    fn opened_for_attributes(&self, node: &Node) -> Result<Arc<OwnedFd>, Errno> {
        if node.kind == Kind::Directory {
            return host::open_directory(node.fd.as_fd()).map(Arc::new);
        }
        if node.is_grant() && node.grant.opened != (false, false) {
            return Ok(node.fd.clone());
        }
        let open = |flags| self.proc.open(node.fd.as_fd(), flags).map(Arc::new);
        match open(OFlags::RDONLY) {
            Err(Errno::ACCESS) => open(OFlags::WRONLY),
            opened => opened,
        }
    }
}
