//! Console (virtio 1.3 section 5.3): one port, its output and input on file descriptors the VMM opened.
//!
//! A Linux guest waits in a busy loop until its output is taken, so output must not wait for ever: nobody may be
//! reading. A full pipe or stopped terminal holds the guest back, as flow control should. A pseudo-terminal whose
//! buffer stays full for [`device::PATIENCE`] has no reader, and output is dropped until someone reads.

mod device;
mod ends;
#[cfg(test)]
mod tests;

use rustix::termios::tcgetwinsize;
use serde::{Deserialize, Serialize};
use vmm_config::{ConsoleMode, HostFacts, VmConfig};

pub use device::Console;

use crate::device::SavedState;
use crate::registry::{BuildContext, BuildError, Built, ConsoleEnds, Kind, Request, Syscall, no_window};

/// The kind's entry in the registry.
pub const KIND: Kind = Kind { name: "console", requests, map: no_window, build, syscalls: SYSCALLS };

const STATE_VERSION: u32 = 1;

/// What a snapshot says of the device.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    /// Bytes of the next chain of the transmit queue that are written already.
    sent: usize,
}

/// Columns and rows of a terminal; zeroes if unknown, as on any terminal without a size.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Size {
    columns: u16,
    rows: u16,
}

fn requests(config: &VmConfig, _facts: &HostFacts) -> Vec<Request> {
    match config.console.mode {
        // A socket is not supported and the configuration's check says so.
        ConsoleMode::Off | ConsoleMode::Socket => Vec::new(),
        ConsoleMode::Pty | ConsoleMode::Tty | ConsoleMode::File | ConsoleMode::Null => {
            vec![Request { id: "_console".into(), index: 0, window: None }]
        }
    }
}

fn build(ctx: BuildContext<'_>) -> Result<Built, BuildError> {
    create(&ctx.request.id, ctx.console, ctx.saved)
}

fn create(id: &str, ends: Option<ConsoleEnds>, saved: Option<&SavedState>) -> Result<Built, BuildError> {
    let other = |reason: String| BuildError::Other { device: id.to_owned(), reason };
    let state = match saved {
        Some(saved) => saved.read(KIND.name, STATE_VERSION).map_err(|e| other(e.to_string()))?,
        None => State::default(),
    };
    let ends = ends.unwrap_or(ConsoleEnds { output: None, input: None, terminal: false });
    let size = match &ends.output {
        Some(output) if ends.terminal => {
            tcgetwinsize(output).map_or(Size::default(), |size| Size { columns: size.ws_col, rows: size.ws_row })
        }
        _ => Size::default(),
    };
    let output = ends.output.map(ends::Output::new).transpose();
    let input = ends.input.map(ends::Input::new).transpose();
    let device = output
        .and_then(|output| Console::new(output, input?, size, state))
        .map_err(|e| other(format!("cannot use the console's files: {e}")))?;
    Ok(Built::new(device))
}

const SYSCALLS: &[Syscall] = &[
    Syscall { number: libc::SYS_ppoll, why: "see whether a pseudo-terminal was opened again" },
    #[cfg(target_arch = "x86_64")]
    Syscall { number: libc::SYS_poll, why: "see whether a pseudo-terminal was opened again" },
    Syscall { number: libc::SYS_timerfd_settime, why: "give up waiting for a reader" },
];
