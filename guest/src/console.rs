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

/// Prints what the parts that use the `log` crate have to say.
struct ConsoleLog;

impl log::Log for ConsoleLog {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &log::Record<'_>) {
        if self.enabled(record.metadata()) {
            print(format_args!("{}: {}", record.target(), record.args()));
        }
    }

    fn flush(&self) {}
}

/// From now on the log goes to the console: warnings, or everything.
pub fn show_log(everything: bool) {
    static LOG: ConsoleLog = ConsoleLog;
    if log::set_logger(&LOG).is_ok() {
        log::set_max_level(if everything { log::LevelFilter::Debug } else { log::LevelFilter::Warn });
    }
}
