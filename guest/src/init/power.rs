//! The end of the VM, and the button that asks for it.

use std::{fs, io::Read, path::Path, thread, time::Duration};

use rustix::{
    process::{Pid, Signal, WaitOptions, getpid, kill_process, wait},
    system::{RebootCommand, reboot},
};

use super::cmdline::Ending;
use crate::{console::say, sys};

/// How long processes have to end by themselves. Everything they could save is in memory, so there is little to wait for.
const GRACE: Duration = Duration::from_secs(1);
const STEP: Duration = Duration::from_millis(10);

/// Stops every process and ends the VM.
pub fn end(ending: Ending) -> ! {
    sys::signal_everybody(libc::SIGTERM);
    if !all_gone_within(GRACE) {
        sys::signal_everybody(libc::SIGKILL);
        all_gone_within(GRACE);
    }
    rustix::fs::sync();
    let (name, command) = match ending {
        Ending::PowerOff => ("power-off", RebootCommand::PowerOff),
        Ending::Reboot => ("reboot", RebootCommand::Restart),
    };
    say!("init: {name}");
    if let Err(errno) = reboot(command) {
        say!("init: {name} failed: {errno}");
    }
    // Returning would make the kernel panic.
    loop {
        thread::park();
    }
}

/// Reaps until no child is left. False when the time is over first.
fn all_gone_within(time: Duration) -> bool {
    let mut left = time;
    loop {
        match wait(WaitOptions::NOHANG) {
            Ok(Some(_)) => {}
            Ok(None) if left.is_zero() => return false,
            Ok(None) => {
                thread::sleep(STEP);
                left = left.saturating_sub(STEP);
            }
            Err(_) => return true,
        }
    }
}

/// Turns presses of the ACPI power button into SIGTERM for PID 1, one idle thread for each button.
pub fn watch_button() {
    let Ok(entries) = fs::read_dir("/sys/class/input") else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let is_button = fs::read_to_string(entry.path().join("device/name")).is_ok_and(|n| n.trim() == "Power Button");
        if !is_button || !name.to_string_lossy().starts_with("event") {
            continue;
        }
        let Ok(mut device) = fs::File::open(Path::new("/dev/input").join(&name)) else { continue };
        let started = thread::Builder::new().name("button".into()).spawn(move || {
            // struct input_event of a 64-bit machine: two 8-byte times, then type, code and value.
            let mut event = [0; 24];
            while device.read_exact(&mut event).is_ok() {
                if is_power_press(&event) {
                    say!("init: power button");
                    let _ = kill_process(getpid(), Signal::TERM);
                }
            }
        });
        if let Err(error) = started {
            say!("init: cannot watch the power button: {error}");
        }
    }
}

/// True for EV_KEY (1), KEY_POWER (116), pressed (1).
fn is_power_press(event: &[u8; 24]) -> bool {
    event.get(16..) == Some(&[1, 0, 116, 0, 1, 0, 0, 0])
}

/// Asks PID 1 for the end. For the agent.
pub fn request(ending: Ending) -> std::io::Result<()> {
    let signal = match ending {
        Ending::PowerOff => Signal::TERM,
        Ending::Reboot => Signal::INT,
    };
    Ok(kill_process(Pid::INIT, signal)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_press_of_power_counts() {
        let mut event = [0; 24];
        assert!(!is_power_press(&event));
        event[0] = 99;
        event[16] = 1;
        event[18] = 116;
        assert!(!is_power_press(&event), "released");
        event[20] = 1;
        assert!(is_power_press(&event));
        event[18] = 30;
        assert!(!is_power_press(&event), "another key");
    }
}
