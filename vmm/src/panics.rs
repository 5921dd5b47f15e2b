//! A panic, on whatever thread, is a defect after which the VMM ends; it leaves the terminal usable.

use crate::stream::restore_terminal;

/// From now on a panic restores the terminal, prints its message, and calls `fail` on the thread that panicked.
pub fn end_with(fail: impl Fn(String) + Send + Sync + 'static) {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        restore_terminal();
        print(panic);
        let thread = std::thread::current();
        fail(format!("its thread {} panicked; this is a defect of the VMM", thread.name().unwrap_or("without a name")));
    }));
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::process::{Command, Stdio};

    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    use rustix::termios::{LocalModes, tcgetattr};
    use vmm_config::{ConsoleConfig, ConsoleMode};

    use super::*;
    use crate::stream::Stream;

    const ROLE: &str = "SPECTRUM_TEST_PANIC";

    /// Not a test by itself: a process with the terminal in raw mode, one thread of which panics.
    #[test]
    fn child() {
        if std::env::var_os(ROLE).is_none() {
            return;
        }
        let (sender, receiver) = std::sync::mpsc::channel();
        end_with(move |why| sender.send(why).unwrap());
        let stream = Stream::open(&ConsoleConfig::of(ConsoleMode::Tty)).unwrap();
        assert!(!tcgetattr(std::io::stdin()).unwrap().local_modes.contains(LocalModes::ICANON), "it is raw");
        let worker = std::thread::Builder::new().name("_disk0".into()).spawn(|| panic!("as planned")).unwrap();
        assert!(worker.join().is_err());
        println!("fail: {}", receiver.recv().unwrap());
        // The stream is never closed: the terminal is as it was all the same.
        std::mem::forget(stream);
    }

    #[test]
    fn a_panic_on_any_thread_restores_the_terminal() {
        let main = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&main).unwrap();
        unlockpt(&main).unwrap();
        let name = ptsname(&main, Vec::new()).unwrap();
        let terminal = std::fs::File::options().read(true).write(true).open(name.to_str().unwrap()).unwrap();
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "--nocapture", "panics::tests::child"])
            .env(ROLE, "1")
            .stdin(Stdio::from(terminal.try_clone().unwrap()))
            .output()
            .unwrap();
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(out.contains("fail: its thread _disk0 panicked") && err.contains("as planned"), "{out}{err}");
        assert!(tcgetattr(terminal.as_fd()).unwrap().local_modes.contains(LocalModes::ICANON), "not raw any more");
    }
}
