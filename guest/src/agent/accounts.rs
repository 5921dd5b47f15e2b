//! User accounts of the guest, read from `/etc/passwd` because a static binary has no name service.

use std::{fs, io, path::PathBuf};

/// One line of `/etc/passwd`, see passwd(5).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Account {
    /// Login name.
    pub name: String,
    /// User id.
    pub uid: u32,
    /// Primary group id.
    pub gid: u32,
    /// Home folder.
    pub home: PathBuf,
    /// Login shell.
    pub shell: String,
}

impl Account {
    /// `XDG_RUNTIME_DIR` of this account.
    pub fn runtime_folder(&self) -> PathBuf {
        PathBuf::from(format!("/run/user/{}", self.uid))
    }
}

/// Looks an account up by its name.
pub fn find(name: &str) -> io::Result<Account> {
    let passwd = fs::read_to_string("/etc/passwd")?;
    find_in(&passwd, name)
        .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("the VM has no user called {name:?}")))
}

fn find_in(passwd: &str, name: &str) -> Option<Account> {
    passwd.lines().filter_map(parse).find(|account| account.name == name)
}

fn parse(line: &str) -> Option<Account> {
    let mut fields = line.split(':');
    let name = fields.next()?.to_owned();
    let uid = fields.nth(1)?.parse().ok()?;
    let gid = fields.next()?.parse().ok()?;
    let home = fields.nth(1)?.into();
    let shell = fields.next().filter(|shell| !shell.is_empty()).unwrap_or("/bin/sh").to_owned();
    Some(Account { name, uid, gid, home, shell })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read_and_broken_ones_skipped() {
        let passwd = "root:x:0:0:root:/root:/bin/bash\nbroken\nuser:x:1000:1001:A,B:/home/user:\nx:y:z:0:::\n";
        let user = find_in(passwd, "user").unwrap();
        assert_eq!((user.uid, user.gid, user.shell.as_str()), (1000, 1001, "/bin/sh"));
        assert_eq!(user.home, PathBuf::from("/home/user"));
        assert_eq!(user.runtime_folder(), PathBuf::from("/run/user/1000"));
        assert_eq!(find_in(passwd, "root").unwrap().shell, "/bin/bash");
        assert_eq!(find_in(passwd, "x"), None);
        assert_eq!(find_in(passwd, ""), None);
    }
}
