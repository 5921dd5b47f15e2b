//! The command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

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
