//! The process that writes a live snapshot: a fork of this one, with the machine's memory as it was.

use std::io::{self, PipeReader, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};

use rustix::process::{Pid, WaitOptions, waitpid};

use crate::process;
use crate::snapshot::{Destination, SnapshotError};

/// The most bytes of what it says.
const MAX_SENTENCE: usize = 4096;

/// The writer, which says how it went and ends.
pub(super) struct Writer {
    pid: Option<Pid>,
    says: PipeReader,
    said: Vec<u8>,
}

impl Writer {
    /// Forks this process; the child does `write` and nothing else. All other threads that hold locks must rest: `write`
    /// takes none but the allocator's. It has no descriptors but the destination's and `keep`.
    pub fn start(
        to: Destination,
        keep: Option<BorrowedFd<'_>>,
        write: impl FnOnce(Destination) -> Result<(), SnapshotError>,
    ) -> io::Result<Self> {
        let (says, mut tell) = io::pipe()?;
        let pid = process::fork(|| {
            let kept: Vec<_> = [tell.as_fd(), to.as_fd()].into_iter().chain(keep).collect();
            if process::forget_signals().and_then(|()| process::close_all_but(&kept)).is_err() {
                return 1;
            }
            let sentence = write(to).err().map_or_else(String::new, |e| e.to_string());
            u8::from(tell.write_all(format!("{sentence}\n").as_bytes()).is_err())
        })?;
        Ok(Self { pid: i32::try_from(pid).ok().and_then(Pid::from_raw), says, said: Vec::new() })
    }

    /// To be called when there is something to hear: how it went, when it has ended.
    pub fn hear(&mut self) -> Option<Result<(), String>> {
        let mut buffer = [0; 256];
        match self.says.read(&mut buffer) {
            Ok(0) => {}
            Ok(n) => {
                let room = MAX_SENTENCE.saturating_sub(self.said.len()).min(n);
                self.said.extend_from_slice(buffer.get(..room).unwrap_or_default());
                return None;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => return None,
            Err(e) => return Some(Err(format!("its writer cannot be heard: {e}"))),
        }
        // Its descriptors were closed after its memory was gone: this does not wait. In a clone nobody has to.
        let _ = self.pid.map(|pid| waitpid(Some(pid), WaitOptions::empty()));
        Some(match self.said.as_slice() {
            b"\n" => Ok(()),
            [why @ .., b'\n'] => Err(String::from_utf8_lossy(why).into_owned()),
            _ => Err("its writer ended early".into()),
        })
    }
}

impl AsFd for Writer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.says.as_fd()
    }
}
