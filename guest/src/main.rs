//! PID 1, agent and Wayland proxy of an application VM: one static multi-call binary.
//!
//! The kernel starts it as `/init` of the initramfs. As PID 1 it mounts the template's root, then starts itself again for
//! the other parts, which are chosen by the first argument.

mod agent;
mod console;
mod init;
mod sys;

use std::{convert::Infallible, os::fd::AsFd, os::unix::net::UnixListener, process::ExitCode};

use console::say;
use spectrum_guest::wayland;

const USAGE: &str = "usage: spectrum-guest init | agent | wayland";

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
        Some("wayland") => run_wayland(),
        _ => {
            say!("{USAGE}");
            ExitCode::from(2)
        }
    }
}

/// The Wayland proxy. Its listening socket is standard input, made by PID 1 so that it exists before any application.
fn run_wayland() -> ExitCode {
    console::show_log(init::debug_wanted());
    let error = match serve_wayland() {
        Ok(never) => match never {},
        Err(error) => error,
    };
    say!("wayland: {error}");
    ExitCode::FAILURE
}

fn serve_wayland() -> Result<Infallible, wayland::Error> {
    let listen = |source| wayland::Error::Listen { path: "standard input".into(), source };
    let listener = UnixListener::from(std::io::stdin().as_fd().try_clone_to_owned().map_err(listen)?);
    let device = wayland::find_device().map_err(wayland::Error::Device)?;
    let limit = wayland::Options::new("").max_clients;
    wayland::serve(&listener, limit, move || wayland::VirtGpu::open(&device))
}
