//! Kernel modules of the initramfs.

use std::{
    fs::{self, File},
    io,
    path::Path,
};

use rustix::io::Errno;

use crate::console::say;

/// Name of the list in the module folder: one file name a line, dependencies first.
pub const LIST: &str = "modules.list";

/// Loads what the list in `folder` names, in its order. A module that cannot be loaded is reported and skipped: the
/// device may be absent, and what really is missing fails later with a clear message.
pub fn load(folder: &Path) {
    let list = match fs::read_to_string(folder.join(LIST)) {
        Ok(list) => list,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return,
        Err(error) => return say!("init: cannot read the module list: {error}"),
    };
    for name in list.lines().filter(|name| !name.is_empty()) {
        if let Err(error) = load_one(&folder.join(name)) {
            say!("init: module {name} was not loaded: {error}");
        }
    }
}

fn load_one(path: &Path) -> io::Result<()> {
    let file = File::open(path)?;
    match rustix::system::finit_module(&file, c"", 0) {
        // There already, or (crc32c-intel) made for a processor this is not.
        Ok(()) | Err(Errno::EXIST | Errno::NODEV) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}
