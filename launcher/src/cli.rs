//! The command line.

use std::{ffi::OsString, path::PathBuf};

use clap::{Args, Parser, Subcommand};
pub use vms::{GrantOptions, PlaceOptions, VmCommand};

mod vms;

/// Runs each application in its own virtual machine.
#[derive(Debug, Parser)]
#[command(name = "spectrum", version, max_term_width = 110)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run an application in a virtual machine of its own
    ///
    /// The application's exit status becomes that of this command; 125 means that the VM failed.
    Run(RunOptions),
    /// Commands about VMs that run
    #[command(flatten)]
    Vm(VmCommand),
    /// Make, list and remove templates
    #[command(subcommand)]
    Template(TemplateCommand),
}

/// Commands about templates.
#[derive(Debug, Subcommand)]
pub enum TemplateCommand {
    /// Make a template from Debian packages (needs root)
    Build(BuildOptions),
    /// Make a template's kernel and initramfs anew and keep its root image
    Refresh(RefreshOptions),
    /// Boot a template once and keep it, so that VMs of it start as clones
    Warm(WarmOptions),
    /// End and remove what was warmed of templates that are gone or have changed
    Gc {
        /// The VMM [default: spectrum-vmm next to this program or in PATH]
        #[arg(long, env = "SPECTRUM_VMM", value_name = "FILE")]
        vmm: Option<PathBuf>,
    },
    /// List the templates
    List,
    /// Remove a template
    Rm {
        /// Which one
        name: String,
    },
}

/// What `template build` takes.
#[derive(Debug, Args)]
pub struct BuildOptions {
    /// Name of the template
    pub name: String,
    /// Debian release it is made from
    #[arg(long, default_value = "trixie")]
    pub suite: String,
    /// Packages beside the usual ones, separated by commas; may be repeated
    #[arg(long, value_delimiter = ',', value_name = "PACKAGE")]
    pub include: Vec<String>,
    /// Only the packages of --include, without the usual applications
    #[arg(long)]
    pub minimal: bool,
    /// Kernel and guest binary
    #[command(flatten)]
    pub boot: BootOptions,
}

/// What `template refresh` takes.
#[derive(Debug, Args)]
pub struct RefreshOptions {
    /// Name of the template
    pub name: String,
    /// Kernel and guest binary
    #[command(flatten)]
    pub boot: BootOptions,
}

/// Where the kernel and PID 1 of a template come from.
#[derive(Debug, Args)]
pub struct BootOptions {
    /// Unpacked Debian kernel package (with boot/ and lib/modules/) instead of fetching one
    #[arg(long, value_name = "FOLDER")]
    pub kernel: Option<PathBuf>,
    /// Release the kernel is fetched from
    #[arg(long, default_value = "bookworm-backports", value_name = "SUITE")]
    pub kernel_suite: String,
    /// The static spectrum-guest binary [default: next to this program]
    #[arg(long, env = "SPECTRUM_GUEST", value_name = "FILE")]
    pub guest: Option<PathBuf>,
}

/// What `template warm` takes. A clone has the memory and the CPUs of what was warmed: these are what `run` looks for.
#[derive(Debug, Args)]
pub struct WarmOptions {
    /// Name of the template
    pub name: String,
    /// The VMM [default: spectrum-vmm next to this program or in PATH]
    #[arg(long, env = "SPECTRUM_VMM", value_name = "FILE")]
    pub vmm: Option<PathBuf>,
    /// Memory of the VMs
    #[arg(long, default_value = "512M", value_name = "SIZE")]
    pub memory: String,
    /// Virtual CPUs
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..), value_name = "NUMBER")]
    pub cpus: u8,
    /// For applications that have no windows
    #[arg(long)]
    pub no_wayland: bool,
    /// Seconds the VM may take until it can be saved
    #[arg(long, env = "SPECTRUM_BOOT_TIMEOUT", default_value_t = 300, value_name = "SECONDS")]
    pub boot_timeout: u64,
}

/// What `run` takes.
#[derive(Debug, Args)]
pub struct RunOptions {
    /// Template to run it from [default: "default", or the only one there is]
    #[arg(long, env = "SPECTRUM_TEMPLATE", value_name = "NAME")]
    pub template: Option<String>,
    /// The VMM [default: spectrum-vmm next to this program or in PATH]
    #[arg(long, env = "SPECTRUM_VMM", value_name = "FILE")]
    pub vmm: Option<PathBuf>,
    /// A further argument for the VMM; may be repeated
    #[arg(long, value_name = "ARGUMENT", allow_hyphen_values = true)]
    pub vmm_arg: Vec<OsString>,
    /// Memory of the VM
    #[arg(long, default_value = "512M", value_name = "SIZE")]
    pub memory: String,
    /// Virtual CPUs
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..), value_name = "NUMBER")]
    pub cpus: u8,
    /// Socket of the Wayland compositor [default: the session's]
    #[arg(long, value_name = "SOCKET", conflicts_with = "no_wayland")]
    pub wayland: Option<PathBuf>,
    /// The application has no windows
    #[arg(long)]
    pub no_wayland: bool,
    /// Account in the VM that runs it
    #[arg(long, default_value = "user", value_name = "NAME")]
    pub user: String,
    /// Folder in the VM it starts in [default: the account's home]
    #[arg(long, value_name = "FOLDER")]
    pub cwd: Option<String>,
    /// Environment variable for it; may be repeated
    #[arg(long, value_name = "NAME=VALUE")]
    pub env: Vec<String>,
    /// Seconds the VM may take until it can run the application
    #[arg(long, env = "SPECTRUM_BOOT_TIMEOUT", default_value_t = 300, value_name = "SECONDS")]
    pub boot_timeout: u64,
    /// Boot the VM instead of cloning the warm template
    #[arg(long, env = "SPECTRUM_BOOT")]
    pub boot: bool,
    /// Which VM, and what it may use
    #[command(flatten)]
    pub place: PlaceOptions,
    /// Say nothing about how the VM is started
    #[arg(long, short)]
    pub quiet: bool,
    /// Show the VMM's messages and the VM's console on standard error
    #[arg(long)]
    pub debug: bool,
    /// The application and its arguments
    #[arg(required = true, trailing_var_arg = true, value_name = "APP")]
    pub command: Vec<String>,
}
