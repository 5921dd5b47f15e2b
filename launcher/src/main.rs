//! Templates and applications: runs each application in its own virtual machine.

#![forbid(unsafe_code)]

mod cli;
mod home;
mod progress;
mod run;
mod template;

use std::process::ExitCode;

use clap::Parser;
use cli::{Cli, Command, TemplateCommand};

/// Exit status for failures of the launcher itself, so that they differ from the application's.
const FAILURE: u8 = 125;

fn main() -> ExitCode {
    let cli = Cli::parse();
    match dispatch(cli) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("spectrum: {error}");
            ExitCode::from(FAILURE)
        }
    }
}

fn dispatch(cli: Cli) -> Result<ExitCode, Box<dyn std::error::Error>> {
    let home = home::Home::find()?;
    match cli.command {
        Command::Run(options) => return Ok(run::run(&home, &options)?),
        Command::Vm(command) => return Ok(run::vms::dispatch(command)?),
        Command::Template(TemplateCommand::Build(options)) => template::build(&home, &options)?,
        Command::Template(TemplateCommand::Refresh(options)) => template::refresh(&home, &options)?,
        Command::Template(TemplateCommand::Warm(options)) => run::warm(&home, &options)?,
        Command::Template(TemplateCommand::Gc { vmm }) => run::sweep(&home, vmm.as_deref())?,
        Command::Template(TemplateCommand::List) => template::list(&home)?,
        Command::Template(TemplateCommand::Rm { name }) => {
            template::remove(&home, &name)?;
            run::cool(&home, &name)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}
