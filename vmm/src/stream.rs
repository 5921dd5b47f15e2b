//! Where the serial port's and the console's text goes: terminal, pseudo-terminal, file.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError, TryLockError};

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::fcntl_dupfd_cloexec;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, OptionalActions, SpecialCodeIndex, Termios, isatty, tcgetattr, tcsetattr};
use virtio_devices::registry::ConsoleEnds;
use vmm_config::{ConsoleConfig, ConsoleMode};

/// Why a stream cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The file cannot be written.
    #[error("cannot write to {}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// No pseudo-terminal to be had, or the terminal cannot be used.
    #[error("cannot {what}: {source}")]
    Terminal {
        /// What was tried.
        what: &'static str,
        /// The cause.
        source: io::Error,
    },
}

/// How the terminal was before it was put into raw mode, while it is.
static BEFORE_RAW: Mutex<Option<Termios>> = Mutex::new(None);

/// Gives the terminal back as it was, if it is in raw mode: when the machine's streams are closed, and by who ends the
/// process in another way. It takes no lock that could be held for long and allocates nothing.
pub fn restore_terminal() {
    let saved = match BEFORE_RAW.try_lock() {
        Ok(mut saved) => saved.take(),
        Err(TryLockError::Poisoned(saved)) => saved.into_inner().take(),
        // Somebody is just about to do it.
        Err(TryLockError::WouldBlock) => None,
    };
    if let Some(saved) = saved {
        // Nobody is left to be told if it fails.
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &saved);
    }
}

/// The terminal the VMM was started from, in raw mode until this is dropped.
struct RawMode;

impl RawMode {
    /// Puts standard input into raw mode, if it is a terminal. All keys go to the guest but Ctrl-C, which ends the VMM.
    fn enter() -> io::Result<Option<Self>> {
        let stdin = io::stdin();
        if !isatty(&stdin) {
            return Ok(None);
        }
        let saved = tcgetattr(&stdin)?;
        let mut raw = saved.clone();
        raw.make_raw();
        raw.local_modes |= LocalModes::ISIG;
        // Zero is no character (_POSIX_VDISABLE).
        raw.special_codes[SpecialCodeIndex::VQUIT] = 0;
        raw.special_codes[SpecialCodeIndex::VSUSP] = 0;
        // Remembered first: there is no moment in which it is raw and nobody knows how it was.
        *BEFORE_RAW.lock().unwrap_or_else(PoisonError::into_inner) = Some(saved);
        tcsetattr(&stdin, OptionalActions::Now, &raw)?;
        Ok(Some(Self))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore_terminal();
    }
}

/// An open stream. It outlives the machine, so that a reboot goes on with it.
pub struct Stream {
    output: Option<OwnedFd>,
    input: Option<OwnedFd>,
    /// Path of the pseudo-terminal.
    path: Option<PathBuf>,
    terminal: bool,
    /// The other end of the pseudo-terminal: kept open so that it survives its users.
    _other_end: Option<OwnedFd>,
    _raw: Option<RawMode>,
}

impl Stream {
    /// Opens what `config` names; nothing if the device is off.
    ///
    /// # Errors
    /// If it cannot be opened.
    pub fn open(config: &ConsoleConfig) -> Result<Option<Self>, StreamError> {
        let mut stream = Self { output: None, input: None, path: None, terminal: false, _other_end: None, _raw: None };
        match config.mode {
            ConsoleMode::Off => return Ok(None),
            // Sockets are refused by the configuration's check.
            ConsoleMode::Null | ConsoleMode::Socket => {}
            ConsoleMode::File => {
                let path = config.file.clone().unwrap_or_default();
                let file = OpenOptions::new().create(true).append(true).open(&path);
                let file: File = file.map_err(|source| StreamError::File { path: path.clone(), source })?;
                stream.output = Some(file.into());
            }
            ConsoleMode::Tty => {
                let fail = |source| StreamError::Terminal { what: "use the terminal", source };
                stream.terminal = isatty(io::stdout());
                stream.output = Some(duplicate(io::stdout().as_fd()).map_err(fail)?);
                stream.input = Some(duplicate(io::stdin().as_fd()).map_err(fail)?);
                stream._raw = RawMode::enter().map_err(fail)?;
            }
            ConsoleMode::Pty => {
                let fail = |source| StreamError::Terminal { what: "open a pseudo-terminal", source };
                stream.open_pty().map_err(fail)?;
            }
        }
        Ok(Some(stream))
    }

    /// Uses a descriptor that was handed down, for whichever directions it was opened.
    ///
    /// # Errors
    /// If the process has no descriptor left.
    pub fn inherited(fd: OwnedFd) -> Result<Self, StreamError> {
        let fail = |source: io::Error| StreamError::Terminal { what: "use the descriptor handed down for it", source };
        let flags = fcntl_getfl(&fd).map_err(|e| fail(e.into()))? & OFlags::ACCMODE;
        let input = if flags == OFlags::WRONLY { None } else { Some(duplicate(fd.as_fd()).map_err(fail)?) };
        let terminal = isatty(&fd);
        let output = (flags != OFlags::RDONLY).then_some(fd);
        Ok(Self { output, input, path: None, terminal, _other_end: None, _raw: None })
    }

    fn open_pty(&mut self) -> io::Result<()> {
        let main = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        grantpt(&main)?;
        unlockpt(&main)?;
        let name = ptsname(&main, Vec::new())?;
        let path = PathBuf::from(name.to_string_lossy().into_owned());
        let other: OwnedFd = File::options().read(true).write(true).open(&path)?.into();
        let mut settings = tcgetattr(&other)?;
        settings.make_raw();
        tcsetattr(&other, OptionalActions::Now, &settings)?;
        // What nobody reads is dropped instead of blocking a vCPU.
        fcntl_setfl(&main, fcntl_getfl(&main)? | OFlags::NONBLOCK)?;
        self.input = Some(duplicate(main.as_fd())?);
        self.output = Some(main);
        (self.path, self.terminal, self._other_end) = (Some(path), true, Some(other));
        Ok(())
    }

    /// Path of the pseudo-terminal, if it is one.
    #[must_use]
    pub fn path(&self) -> Option<&PathBuf> {
        self.path.as_ref()
    }

    /// Duplicates of both ends, for the virtio console.
    ///
    /// # Errors
    /// If the process has no file descriptor left.
    pub fn ends(&self) -> io::Result<ConsoleEnds> {
        let copy = |fd: &Option<OwnedFd>| fd.as_ref().map(|fd| duplicate(fd.as_fd())).transpose();
        Ok(ConsoleEnds { output: copy(&self.output)?, input: copy(&self.input)?, terminal: self.terminal })
    }

    /// A writer for the serial port; it throws away what cannot be written.
    ///
    /// # Errors
    /// If the process has no file descriptor left.
    pub fn writer(&self) -> io::Result<Box<dyn io::Write + Send>> {
        Ok(match &self.output {
            Some(fd) => Box::new(File::from(duplicate(fd.as_fd())?)),
            None => Box::new(io::sink()),
        })
    }

    /// Where input comes from.
    #[must_use]
    pub fn input(&self) -> Option<BorrowedFd<'_>> {
        self.input.as_ref().map(AsFd::as_fd)
    }
}

fn duplicate(fd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    Ok(fcntl_dupfd_cloexec(fd, 3)?)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    #[test]
    fn a_pseudo_terminal_carries_bytes_both_ways() {
        let stream = Stream::open(&ConsoleConfig::of(ConsoleMode::Pty)).unwrap().unwrap();
        let mut user = File::options().read(true).write(true).open(stream.path().unwrap()).unwrap();
        stream.writer().unwrap().write_all(b"guest\n").unwrap();
        let mut line = [0; 6];
        user.read_exact(&mut line).unwrap();
        assert_eq!(&line, b"guest\n", "not changed on the way");
        user.write_all(b"user").unwrap();
        let mut input = File::from(stream.ends().unwrap().input.unwrap());
        let mut word = [0; 4];
        input.read_exact(&mut word).unwrap();
        assert_eq!(&word, b"user");
    }

    #[test]
    fn a_pseudo_terminal_nobody_reads_does_not_block() {
        let stream = Stream::open(&ConsoleConfig::of(ConsoleMode::Pty)).unwrap().unwrap();
        let mut writer = stream.writer().unwrap();
        while writer.write(&[b'x'; 4096]).is_ok() {}
    }

    #[test]
    fn off_is_nothing_and_a_file_that_cannot_be_written_is_named() {
        assert!(Stream::open(&ConsoleConfig::of(ConsoleMode::Off)).unwrap().is_none());
        let config = ConsoleConfig { file: Some("/nowhere/log".into()), ..ConsoleConfig::of(ConsoleMode::File) };
        let error = Stream::open(&config).err().unwrap().to_string();
        assert!(error.contains("/nowhere/log"), "{error}");
    }
}
