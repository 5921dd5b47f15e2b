//! PID 1, agent, Wayland proxy and session bus of an application VM: one static multi-call binary.
//!
//! The kernel starts it as `/init` of the initramfs. As PID 1 it mounts the template's root, then starts itself again for
//! the other parts, which are chosen by the first argument. Applications know it as `spectrum-guest`, for calls of other apps.

mod agent;
mod call;
mod console;
mod init;
mod portal;
mod sys;

use std::os::fd::AsFd;
use std::process::ExitCode;

use console::say;
use spectrum_guest::wayland;

const USAGE: &str = "usage: spectrum-guest init | agent | wayland | portal | call APP SERVICE | call --listen SOCKET APP SERVICE COMMAND... | connect SOCKET";

fn main() -> ExitCode {
    let mut arguments = std::env::args_os();
    let name = arguments.next().unwrap_or_default();
    if rustix::process::getpid().is_init() || name.to_string_lossy().ends_with("/init") {
        return init::main();
    }
    let part = arguments.next().unwrap_or_default();
    match part.to_str() {
        Some("init") => init::main(),
        Some("agent") => agent::main(),
        Some("wayland") => wayland_proxy(),
        Some("call") => call::main(arguments),
        Some("connect") => call::connect(arguments),
        Some("portal") => portal::main(),
        _ => {
            say!("{USAGE}");
            ExitCode::from(2)
        }
    }
}

/// The Wayland proxy. Its listening socket is standard input, made by PID 1 so that it exists before any application.
fn wayland_proxy() -> ExitCode {
    console::log_to_console();
    let Err(error) = std::io::stdin()
        .as_fd()
        .try_clone_to_owned()
        .map_err(wayland::Error::Accept)
        .and_then(|socket| wayland::run(&socket.into(), &wayland::Options::default()));
    say!("wayland: {error}");
    ExitCode::FAILURE
}
