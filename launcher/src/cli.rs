//! The command line.

use std::{collections::BTreeMap, ffi::OsString, path::PathBuf};

use clap::{Args, FromArgMatches, Parser, Subcommand};

use crate::apps::Network;
pub use vms::{GrantOptions, PlaceOptions, VmCommand};

use crate::policy::Service;

mod vms;

/// Runs each application in its own virtual machine.
#[derive(Debug, Parser)]
#[command(name = "spectrum", version, max_term_width = 110)]
pub struct Cli {
    /// Say only what went wrong
    #[arg(long, short, global = true)]
    pub quiet: bool,
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
    Run(Box<RunOptions>),
    /// Open files and URLs in a new VM, by the app for their MIME type
    ///
    /// The VM and what is in it are gone afterwards; of this machine it has these files, and nothing of what the app keeps and shares.
    Open(OpenOptions),
    /// Commands about VMs that run
    #[command(flatten)]
    Vm(VmCommand),
    /// List and remove home directories that apps keep, and forget files that were picked
    #[command(subcommand)]
    Home(HomeCommand),
    /// Make, list and remove templates
    #[command(subcommand)]
    Template(TemplateCommand),
    /// List the apps
    Apps {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Make a template and an app from a VM's folder of Spectrum OS
    Import {
        /// The folder: vmlinux, blk/*.img, providers/net/*, fs/
        folder: PathBuf,
        /// What both are called [default: like the folder]
        name: Option<String>,
    },
    /// Add and remove apps
    #[command(subcommand)]
    App(AppCommand),
    /// Check the policy, and ask it
    #[command(subcommand)]
    Policy(PolicyCommand),
    /// Say what is missing on this machine and what mends it
    ///
    /// The exit status is 1 if applications cannot run.
    Doctor {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Record the templates and apps there are
    Lock {
        /// The file that is written
        #[arg(default_value = "spectrum.lock")]
        file: PathBuf,
    },
    /// Make the apps that were recorded, and say what else differs
    ///
    /// The exit status is 1 if something does.
    Apply {
        /// Change nothing
        #[arg(long)]
        check: bool,
        /// The file that `spectrum lock` wrote
        #[arg(default_value = "spectrum.lock")]
        file: PathBuf,
    },
    /// Print what makes a shell complete the command line
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
    /// Print the manual page
    Man,
}

/// Commands about home directories that apps keep.
#[derive(Debug, Subcommand)]
pub enum HomeCommand {
    /// List the home directories that are kept
    List {
        /// As JSON: an array of objects, with the files that are remembered
        #[arg(long)]
        json: bool,
    },
    /// Remove a home directory that no VM has, with all that is in it
    Rm {
        /// Which one
        name: String,
    },
    /// Forget files that were picked: the next VM with the home directory is not granted them
    ///
    /// While a VM has it, `spectrum revoke` does that too.
    Forget {
        /// Of which home directory
        name: String,
        /// What the file is called in the VM, without /host/ [default: all of them]
        grant: Option<String>,
    },
}

/// Commands about the policy.
#[derive(Debug, Subcommand)]
pub enum PolicyCommand {
    /// Read a policy and say whether it can be used
    Check {
        /// The file [default: the one that counts]
        file: Option<PathBuf>,
    },
    /// Print what the policy says to a request, and the line that says so
    Eval {
        /// What is asked for: files, clipboard, open-url, notify, network, sound, microphone, camera, exec
        service: String,
        /// The app that asks
        app: String,
        /// What for: a path, a URL, a host and port, an app and its service
        target: String,
    },
    /// Decide a request as it is decided for a VM: the user is asked where the policy says so, and it is logged
    ///
    /// The exit status is 1 if it is denied.
    Decide {
        /// What is asked for: files, clipboard, open-url, notify, network, sound, microphone, camera, exec
        service: String,
        /// The app that asks
        app: String,
        /// What for: a path, a URL, a host and port, an app and its service
        target: String,
        /// Seconds the user has to answer
        #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=3600), value_name = "SECONDS")]
        timeout: u64,
    },
    /// Print what was decided, the oldest first
    Log,
}

/// Commands about one app.
#[derive(Debug, Subcommand)]
pub enum AppCommand {
    /// Make an app and an entry in the desktop's menu from a .desktop file
    Add {
        /// The .desktop file
        file: PathBuf,
    },
    /// Remove an app and its entry in the desktop's menu
    Rm {
        /// Which one
        name: String,
    },
}

/// Commands about templates.
#[derive(Debug, Subcommand)]
pub enum TemplateCommand {
    /// Make a template from Debian packages
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

/// What `open` takes.
#[derive(Debug, Args)]
pub struct OpenOptions {
    /// The app [default: the one for the MIME type]
    #[arg(long, value_name = "NAME")]
    pub app: Option<String>,
    /// The app may also change the files
    #[arg(long)]
    pub write: bool,
    /// Files and URLs
    #[arg(required_unless_present = "app", value_name = "FILE|URL")]
    pub targets: Vec<String>,
}

impl RunOptions {
    /// For this app, without anything else but what the environment says.
    pub fn of(app: &str) -> Self {
        let command = Self::augment_args(clap::Command::new("spectrum").no_binary_name(true));
        let matches = command.get_matches_from(["--", app]);
        // What clap has parsed for these arguments is them.
        Self::from_arg_matches(&matches).unwrap_or_else(|error| error.exit())
    }
}

/// What `run` takes.
#[derive(Debug, Args)]
pub struct RunOptions {
    /// Template to run it from [default: the app's, else "default", or the only one there is]
    #[arg(long, env = "SPECTRUM_TEMPLATE", value_name = "NAME")]
    pub template: Option<String>,
    /// The VMM [default: spectrum-vmm next to this program or in PATH]
    #[arg(long, env = "SPECTRUM_VMM", value_name = "FILE")]
    pub vmm: Option<PathBuf>,
    /// A further argument for the VMM; may be repeated
    #[arg(long, value_name = "ARGUMENT", allow_hyphen_values = true)]
    pub vmm_arg: Vec<OsString>,
    /// Memory of the VM [default: the app's, else 512M]
    #[arg(long, value_name = "SIZE")]
    pub memory: Option<String>,
    /// Virtual CPUs [default: the app's, else 1]
    #[arg(long, value_parser = clap::value_parser!(u8).range(1..), value_name = "NUMBER")]
    pub cpus: Option<u8>,
    /// Socket of the Wayland compositor [default: the session's]
    #[arg(long, value_name = "SOCKET", conflicts_with = "no_wayland")]
    pub wayland: Option<PathBuf>,
    /// The application has no windows
    #[arg(long)]
    pub no_wayland: bool,
    /// What it can connect to: none, internet, or host:PORT for a port of the host [default: the app's, else none]
    #[arg(long, value_name = "NETWORK")]
    pub network: Option<Network>,
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
    /// Show the VMM's messages and the VM's console on standard error
    #[arg(long)]
    pub debug: bool,
    /// The app whose file was found.
    #[arg(skip)]
    pub app: Option<String>,
    /// What of that file the policy has to allow: its key, service and target.
    #[arg(skip)]
    pub asks: Vec<(&'static str, Service, String)>,
    /// What that app offers to others.
    #[arg(skip)]
    pub services: BTreeMap<String, Vec<String>>,
    /// An app or a program in the VM, and its arguments
    #[arg(required = true, trailing_var_arg = true, value_name = "APP")]
    pub command: Vec<String>,
}
