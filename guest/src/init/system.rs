//! The little configuration a system with one purpose needs. Nothing here is worth dying for.

use std::{
    fmt::Display,
    fs,
    os::unix::fs::{DirBuilderExt, chown},
};

use super::{cmdline::Parameters, network};
use crate::{agent::accounts, console::say, sys};

/// The account applications run as.
pub const USER: &str = "user";

/// Host name, network, machine id, and the user's runtime folder.
pub fn configure(parameters: &Parameters) {
    let hostname = parameters.hostname.as_deref().unwrap_or("app");
    report("the host name", rustix::system::sethostname(hostname.as_bytes()));
    report("the loopback interface", sys::loopback_up());
    report("the network interface", network::configure());
    // Ctrl-Alt-Del becomes SIGINT for PID 1 instead of an immediate reset.
    report("Ctrl-Alt-Del", rustix::system::reboot(rustix::system::RebootCommand::CadOff));
    report("/etc/machine-id", machine_id());
    report("the user's runtime folder", runtime_folder());
}

fn report<E: Display>(what: &str, result: Result<(), E>) {
    if let Err(error) = result {
        say!("init: cannot set up {what}: {error}");
    }
}

/// An identity until the launcher hands one in: templates have none, and programs that are started before want one.
fn machine_id() -> std::io::Result<()> {
    let mut bytes = [0; 16];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::INSECURE)?;
    let mut text = bytes.iter().fold(String::new(), |text, byte| format!("{text}{byte:02x}"));
    text.push('\n');
    fs::write("/etc/machine-id", text)
}

fn runtime_folder() -> std::io::Result<()> {
    let account = accounts::find(USER)?;
    let path = account.runtime_folder();
    fs::DirBuilder::new().recursive(true).mode(0o755).create("/run/user")?;
    fs::DirBuilder::new().mode(0o700).create(&path)?;
    chown(&path, Some(account.uid), Some(account.gid))
}
