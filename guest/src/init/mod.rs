//! PID 1 of an application VM.
//!
//! From the initramfs to a system with one purpose: mount, load modules, enter the template's root, configure the little
//! there is, then keep the agent and the Wayland proxy running and reap what they leave until the VM ends. Whatever goes
//! wrong is printed on the console, and then the VM powers off: a kernel panic would say less.

mod cmdline;
mod grants;
mod modules;
mod network;
mod power;
mod root;
mod supervise;
mod system;

use std::{fs, io, path::Path, process::ExitCode};

pub use cmdline::Ending;
use cmdline::Parameters;
pub use grants::MOUNT_POINT as GRANTS;
pub use power::request as request_end;
pub use system::USER;

use crate::console::say;

/// Why PID 1 gives up.
#[derive(Debug, thiserror::Error)]
enum InitError {
    #[error(transparent)]
    Root(#[from] root::RootError),
    #[error(transparent)]
    Supervise(#[from] supervise::SuperviseError),
    #[error("cannot read the kernel command line: {0}")]
    CommandLine(#[source] io::Error),
}

/// Runs the VM to its end. Never returns when this is PID 1.
pub fn main() -> ExitCode {
    if !rustix::process::getpid().is_init() {
        say!("init: this part runs as the first process of a virtual machine only");
        return ExitCode::from(2);
    }
    let ending = match std::panic::catch_unwind(run) {
        Ok(Ok(ending)) => ending,
        Ok(Err(error)) => {
            say!("init: FAILED: {error}");
            Ending::PowerOff
        }
        Err(_) => {
            say!("init: FAILED: internal error");
            Ending::PowerOff
        }
    };
    power::end(ending)
}

fn run() -> Result<Ending, InitError> {
    say!("init: started");
    root::early_mounts()?;
    let line = fs::read_to_string("/proc/cmdline").map_err(InitError::CommandLine)?;
    let (parameters, unknown) = Parameters::parse(&line);
    for parameter in unknown {
        say!("init: ignoring the unknown parameter {parameter}");
    }
    if let Some(ending) = parameters.end {
        return Ok(ending);
    }
    modules::load(Path::new("/modules"));
    root::enter(&parameters)?;
    say!("init: root is mounted");
    grants::mount_host();
    system::configure(&parameters);
    power::watch_button();
    Ok(supervise::run(&parameters)?)
}
