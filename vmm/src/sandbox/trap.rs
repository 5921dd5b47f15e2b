//! What happens on a forbidden system call: one line on standard error, the terminal as it was, and the end.
#![expect(unsafe_code, reason = "a signal handler reads what the kernel says of the signal")]

use std::io;

use vmm_sys_util::signal::register_signal_handler;

use crate::stream;

/// What a shell makes of a process that `SIGSYS` ended.
const EXIT_STATUS: i32 = 128 + libc::SIGSYS;

/// Handles the signal by which the kernel reports a forbidden call, for the whole process.
///
/// # Errors
/// If the signal cannot be handled.
pub(super) fn install() -> io::Result<()> {
    register_signal_handler(libc::SIGSYS, on_trap).map_err(|e| io::Error::from_raw_os_error(e.errno()))
}

/// `siginfo_t` of a `SIGSYS` (`_sigsys` in `asm-generic/siginfo.h`).
#[repr(C)]
struct TrapInfo {
    signal: i32,
    errno: i32,
    code: i32,
    _padding: i32,
    address: usize,
    number: i32,
    architecture: u32,
}

extern "C" fn on_trap(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel hands the handler a siginfo_t, which is larger than TrapInfo and aligned alike; for SIGSYS it has
    // these fields, and another sender of the signal has filled the same bytes with something.
    let number = unsafe { (*info.cast::<TrapInfo>()).number };
    let mut name = [0_u8; 16];
    // SAFETY: the name of a thread has at most 16 bytes with its zero.
    unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
    let mut line = Line { bytes: [0; 256], len: 0 };
    stream::restore_terminal();
    line.text(b"spectrum-vmm: system call ");
    line.number(number);
    line.text(b" is not allowed on thread ");
    line.text(name.split(|b| *b == 0).next().unwrap_or_default());
    line.text(b". The VMM ends. Please report this line; --seccomp log lets such calls through.\n");
    let message = line.bytes.get(..line.len).unwrap_or_default();
    // SAFETY: the bytes are there; a failure has nobody to be told to.
    unsafe { libc::write(libc::STDERR_FILENO, message.as_ptr().cast(), message.len()) };
    // SAFETY: ends the process at once; nothing of it runs on.
    unsafe { libc::_exit(EXIT_STATUS) };
}

/// A line put together without allocation: the thread may have been anywhere.
struct Line {
    bytes: [u8; 256],
    len: usize,
}

impl Line {
    fn text(&mut self, text: &[u8]) {
        for byte in text {
            if let Some(place) = self.bytes.get_mut(self.len) {
                *place = *byte;
                self.len += 1;
            }
        }
    }

    fn number(&mut self, number: i32) {
        let mut digits = [0_u8; 10];
        let mut rest = number.unsigned_abs();
        let mut first = digits.len();
        for (place, digit) in digits.iter_mut().enumerate().rev() {
            *digit = b'0' + u8::try_from(rest % 10).unwrap_or_default();
            (rest, first) = (rest / 10, place);
            if rest == 0 {
                break;
            }
        }
        self.text(digits.get(first..).unwrap_or_default());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_in_full() {
        for number in [0, 7, 41, 1_000, i32::MAX] {
            let mut line = Line { bytes: [0; 256], len: 0 };
            line.number(number);
            assert_eq!(line.bytes[..line.len], *number.to_string().as_bytes());
        }
    }

    #[test]
    fn a_line_too_long_is_cut() {
        let mut line = Line { bytes: [0; 256], len: 0 };
        line.text(&[b'x'; 300]);
        assert_eq!(line.len, 256);
    }
}
