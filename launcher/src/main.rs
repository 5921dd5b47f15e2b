//! Templates and applications: runs each application in its own virtual machine.

#![forbid(unsafe_code)]

mod apps;
mod cli;
mod home;
mod places;
mod progress;
mod run;
mod template;
mod text;

use std::{
    io::{self, Write},
    process::ExitCode,
};

use clap::Parser;
use cli::{AppCommand, Cli, Command, TemplateCommand};
use places::Places;

/// Exit status for failures of the launcher itself, so that they differ from the application's.
const FAILURE: u8 = 125;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let level = if cli.quiet { "error" } else { "warn" };
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or(level)).init();
    if cli.quiet {
        progress::be_quiet();
    }
    match dispatch(cli) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("spectrum: {error}");
            ExitCode::from(FAILURE)
        }
    }
}

fn dispatch(cli: Cli) -> Result<ExitCode, Box<dyn std::error::Error>> {
    match cli.command {
        Command::Run(mut options) => {
            let home = home::Home::find()?;
            apps::fill_in(&Places::find()?, &mut options)?;
            return Ok(run::run(&home, &options)?);
        }
        Command::Template(command) => template(command)?,
        Command::Apps { json } => print(&apps::list(&Places::find()?, json)?)?,
        Command::App(AppCommand::Add { file }) => print_paths(&apps::menu::add(&Places::find()?, &file)?)?,
        Command::App(AppCommand::Rm { name }) => print_paths(&apps::menu::remove(&Places::find()?, &name)?)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Prints a result. A reader that has read enough is no mistake.
fn print(text: &str) -> io::Result<()> {
    match io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => result,
    }
}

/// Prints the files that a command made or removed.
fn print_paths(paths: &[std::path::PathBuf]) -> io::Result<()> {
    print(&paths.iter().map(|path| format!("{}\n", path.display())).collect::<String>())
}

fn template(command: TemplateCommand) -> Result<(), Box<dyn std::error::Error>> {
    let home = home::Home::find()?;
    match command {
        TemplateCommand::Build(options) => template::build(&home, &options)?,
        TemplateCommand::Refresh(options) => template::refresh(&home, &options)?,
        TemplateCommand::Warm(options) => run::warm(&home, &options)?,
        TemplateCommand::Gc { vmm } => run::sweep(&home, vmm.as_deref())?,
        TemplateCommand::List => template::list(&home)?,
        TemplateCommand::Rm { name } => {
            template::remove(&home, &name)?;
            run::cool(&home, &name)?;
        }
    }
    Ok(())
}
