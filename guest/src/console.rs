//! Messages for whoever reads the VM's console.

use std::{fmt, io::Write};

/// Prints one line on the console, with the time since boot. A console that is gone is no reason to stop.
macro_rules! say {
    ($($argument:tt)*) => { $crate::console::print(format_args!($($argument)*)) };
}
pub(crate) use say;

/// The function behind [`say!`].
pub fn print(message: fmt::Arguments<'_>) {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    // One write a line, so that the lines of several processes do not mix.
    let line = format!("[{:5}.{:03}] spectrum-guest: {message}\n", now.tv_sec, now.tv_nsec / 1_000_000);
    let _ = std::io::stderr().write_all(line.as_bytes());
}

/// Sends what libraries and shared modules log, from information upwards, the same way.
pub fn log_to_console() {
    struct Console;
    impl log::Log for Console {
        fn enabled(&self, _: &log::Metadata<'_>) -> bool {
            true
        }
        fn log(&self, record: &log::Record<'_>) {
            say!("{}", record.args());
        }
        fn flush(&self) {}
    }
    if log::set_logger(&Console).is_ok() {
        log::set_max_level(log::LevelFilter::Info);
    }
}
