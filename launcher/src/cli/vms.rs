//! What the commands about running VMs take.

use std::{ffi::OsString, path::PathBuf};

use clap::{Args, Subcommand};

use crate::run::grants::Grant;

/// The commands about running VMs.
#[derive(Debug, Subcommand)]
pub enum VmCommand {
    /// List the VMs that run
    Ps {
        /// As JSON: an array of objects
        #[arg(long)]
        json: bool,
    },
    /// Let a VM power off; end it if it does not
    Stop {
        /// Which one
        name: String,
        /// Seconds it may take to power off
        #[arg(long, default_value_t = 10, value_name = "SECONDS")]
        timeout: u32,
    },
    /// End a VM at once
    Kill {
        /// Which one
        name: String,
    },
    /// Show what the VMM and a VM's console said last
    Logs {
        /// Which VM
        name: String,
    },
    /// Run a further command in a VM, and pass its exit status on
    Exec(ExecOptions),
    /// Run a shell in a VM
    ///
    /// It has a terminal if this command has one.
    Shell {
        /// Which VM
        name: String,
        /// Account in the VM that runs it
        #[arg(long, default_value = "user", value_name = "NAME")]
        user: String,
    },
    /// Let a VM use a file or folder of this machine; prints where it is in the VM
    Grant(GrantOptions),
    /// Take back what a VM was granted
    Revoke {
        /// Which VM
        name: String,
        /// What it is called in the VM, without /host/
        grant: String,
    },
}

/// What `exec` takes.
#[derive(Debug, Args)]
pub struct ExecOptions {
    /// Which VM
    pub name: String,
    /// Account in the VM that runs it
    #[arg(long, default_value = "user", value_name = "NAME")]
    pub user: String,
    /// Folder in the VM it starts in [default: the account's home]
    #[arg(long, value_name = "FOLDER")]
    pub cwd: Option<String>,
    /// Environment variable for it; may be repeated
    #[arg(long, value_name = "NAME=VALUE")]
    pub env: Vec<String>,
    /// Give it a terminal: this command's
    #[arg(long, short)]
    pub tty: bool,
    /// The command and its arguments
    #[arg(required = true, trailing_var_arg = true, value_name = "COMMAND")]
    pub command: Vec<String>,
}

/// What `grant` takes.
#[derive(Debug, Args)]
pub struct GrantOptions {
    /// Which VM
    pub name: String,
    /// The file or folder
    pub path: PathBuf,
    /// The VM may also change it
    #[arg(long)]
    pub write: bool,
    /// What it is called in the VM [default: its own name]
    #[arg(long = "as", value_name = "NAME")]
    pub called: Option<String>,
}

/// What `run` is told about the VM as one that others can find.
#[derive(Debug, Default, Args)]
pub struct PlaceOptions {
    /// What the VM shall be called [default: the application's name and a number]
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// Run it in this VM, which runs already, instead of one of its own
    #[arg(
        long,
        value_name = "NAME",
        conflicts_with_all = ["name", "vmm_arg", "wayland", "no_wayland", "debug"]
    )]
    pub vm: Option<String>,
    /// File or folder that the VM may read, or with :rw also change; it is in /host there. May be repeated
    #[arg(long, value_name = "PATH[:rw]")]
    pub grant: Vec<OsString>,
    /// Keep its home directory under this name, for the next time [default: the app's, else it is gone with the VM]
    #[arg(long, value_name = "NAME")]
    pub persist: Option<String>,
    /// What the app's file shares.
    #[arg(skip)]
    pub shares: Vec<Grant>,
}
