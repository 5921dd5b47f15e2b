//! The user's terminal, while a program in a VM has it.

use std::{
    io::{self, IsTerminal, Read},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixStream,
    },
};

use guest_proto::Window;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use signal_hook::{consts::SIGWINCH, low_level::pipe};

/// Whether this process's input and output are one.
pub fn is_there() -> bool {
    io::stdin().is_terminal() && io::stdout().is_terminal()
}

/// Its size, as far as it tells.
pub fn window() -> Window {
    let size = tcgetwinsize(rustix::stdio::stdout()).ok().filter(|size| size.ws_row > 0 && size.ws_col > 0);
    size.map_or(Window { rows: 24, columns: 80 }, |size| Window { rows: size.ws_row, columns: size.ws_col })
}

/// A terminal that passes every key on. It is again as it was when this goes out of scope.
#[derive(Debug)]
pub struct Raw {
    before: Termios,
    resized: UnixStream,
}

impl Raw {
    /// From now on.
    pub fn new() -> io::Result<Self> {
        let before = tcgetattr(rustix::stdio::stdin())?;
        let (resized, write) = UnixStream::pair()?;
        resized.set_nonblocking(true)?;
        pipe::register(SIGWINCH, write)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(rustix::stdio::stdin(), OptionalActions::Drain, &raw)?;
        Ok(Self { before, resized })
    }

    /// What becomes readable when its size has changed.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.resized.as_fd()
    }

    /// Its new size.
    pub fn resized(&self) -> Window {
        let mut pipe = &self.resized;
        while pipe.read(&mut [0; 64]).is_ok_and(|count| count > 0) {}
        window()
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // What the guest made the terminal answer must not become input of the user's shell.
        let _ = tcsetattr(rustix::stdio::stdin(), OptionalActions::Flush, &self.before);
    }
}
