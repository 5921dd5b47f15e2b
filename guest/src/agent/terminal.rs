//! A pseudo-terminal for a process: pty(7).

use std::{fs::File, io, os::fd::AsFd, process::Command};

use guest_proto::Window;
use rustix::{
    fs::{Gid, Mode, Uid, fchmod, fchown},
    pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt},
    termios::{Winsize, tcsetwinsize},
};

use super::accounts::Account;
use crate::sys;

/// Makes a terminal of this size `command`'s: its streams, and that of its session. Gives the other end, which does not block.
pub fn give(command: &mut Command, account: &Account, window: Window) -> io::Result<File> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = openpt(flags)?;
    grantpt(&master)?;
    unlockpt(&master)?;
    // By its descriptor: /dev/pts may be another one's.
    let terminal = ioctl_tiocgptpeer(&master, flags)?;
    // Programs open it once more by its name.
    fchown(&terminal, Some(Uid::from_raw(account.uid)), Some(Gid::from_raw(account.gid)))?;
    fchmod(&terminal, Mode::RUSR | Mode::WUSR)?;
    resize(&master, window)?;
    command.stdin(terminal.try_clone()?).stdout(terminal.try_clone()?).stderr(terminal);
    sys::with_own_terminal(command);
    rustix::io::ioctl_fionbio(&master, true)?;
    Ok(master.into())
}

/// Changes its size. The kernel tells whoever runs in it: ioctl_tty(2), TIOCSWINSZ.
pub fn resize(master: &impl AsFd, window: Window) -> io::Result<()> {
    let size = Winsize { ws_row: window.rows, ws_col: window.columns, ws_xpixel: 0, ws_ypixel: 0 };
    Ok(tcsetwinsize(master, size)?)
}
