//! Templates and applications: runs each application in its own virtual machine.

#![forbid(unsafe_code)]

mod apps;
mod cli;
mod doctor;
mod home;
mod lock;
mod places;
mod policy;
mod portal;
mod progress;
mod run;
mod template;
mod text;

use std::{
    io::{self, Write},
    process::ExitCode,
};

use clap::{CommandFactory, Parser};
use cli::{AppCommand, Cli, Command, PolicyCommand, TemplateCommand};
use places::Places;

/// Exit status for failures of the launcher itself, so that they differ from the application's.
const FAILURE: u8 = 125;

/// Exit status of a command that found something to mend, and of a decision that denies.
const NOT_READY: u8 = 1;

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
            let (home, places) = (home::Home::find()?, Places::find()?);
            apps::fill_in(&places, &mut options)?;
            return Ok(run::run(&home, &places, &options)?);
        }
        Command::Open(options) => {
            let (home, places) = (home::Home::find()?, Places::find()?);
            let run = apps::open::to_run(&places, &options)?;
            return Ok(run::run(&home, &places, &run)?);
        }
        Command::Home(command) => print(&run::homes::dispatch(&home::Home::find()?, command)?)?,
        Command::Vm(command) => return Ok(run::vms::dispatch(command)?),
        Command::Template(command) => template(command)?,
        Command::Apps { json } => print(&apps::list(&Places::find()?, json)?)?,
        Command::Import { folder, name } => {
            let (home, places) = (home::Home::find()?, Places::find()?);
            print_paths(&template::import::import(&home, &places, &folder, name.as_deref())?)?;
        }
        Command::App(AppCommand::Add { file }) => print_paths(&apps::menu::add(&Places::find()?, &file)?)?,
        Command::App(AppCommand::Rm { name }) => print_paths(&apps::menu::remove(&Places::find()?, &name)?)?,
        Command::Policy(command) => return policy(command),
        Command::Doctor { json } => {
            let (report, ready) = doctor::examine(&home::Home::find()?, json);
            print(&report)?;
            return Ok(if ready { ExitCode::SUCCESS } else { ExitCode::from(NOT_READY) });
        }
        Command::Lock { file } => lock::lock(&home::Home::find()?, &Places::find()?, &file)?,
        Command::Apply { check, file } => {
            let differs = lock::apply(&home::Home::find()?, &Places::find()?, &file, check)?;
            print(&differs.iter().map(|line| format!("{line}\n")).collect::<String>())?;
            return Ok(if differs.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(NOT_READY) });
        }
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "spectrum", &mut script);
            print_bytes(&script)?;
        }
        Command::Man => print_bytes(&manual()?)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Prints a result. A reader that has read enough is no mistake.
fn print(text: &str) -> io::Result<()> {
    print_bytes(text.as_bytes())
}

fn print_bytes(bytes: &[u8]) -> io::Result<()> {
    match io::stdout().write_all(bytes) {
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

fn policy(command: PolicyCommand) -> Result<ExitCode, Box<dyn std::error::Error>> {
    let places = Places::find()?;
    match command {
        PolicyCommand::Check { file } => {
            let policy = match file {
                Some(file) => policy::Policy::load_file(&file)?,
                None => policy::Policy::load(&places)?,
            };
            print(&policy.summary())?;
        }
        PolicyCommand::Eval { service, app, target } => {
            let decision = policy::Policy::load(&places)?.decide(service.parse()?, &app, &target);
            print(&format!("{}\t{}\n", decision.action, decision.because))?;
        }
        PolicyCommand::Decide { service, app, target, timeout } => {
            if !home::is_name(&app) {
                return Err(format!("{app:?} cannot be the name of an app").into());
            }
            let time = std::time::Duration::from_secs(timeout);
            let verdict = policy::DecisionPoint::with_time(places, &app, time).decide(service.parse()?, &target);
            let action = if verdict.allowed { policy::Action::Allow } else { policy::Action::Deny };
            print(&format!("{action}\t{}\n", verdict.because))?;
            return Ok(if verdict.allowed { ExitCode::SUCCESS } else { ExitCode::from(NOT_READY) });
        }
        PolicyCommand::Log => print(&policy::read_log(&places)?)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// One page: the program, then the options of each command in a section of its own.
fn manual() -> io::Result<Vec<u8>> {
    let mut command = Cli::command();
    command.build();
    let mut page = Vec::new();
    let man = clap_mangen::Man::new(command.clone());
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_options_section(&mut page)?;
    commands(&command, &mut page)?;
    Ok(page)
}

fn commands(command: &clap::Command, page: &mut Vec<u8>) -> io::Result<()> {
    for command in command.get_subcommands().filter(|command| command.get_name() != "help") {
        let name = command.get_bin_name().unwrap_or(command.get_name());
        writeln!(page, ".SH \"{}\"", name.to_uppercase().replace('-', "\\-"))?;
        let man = clap_mangen::Man::new(command.clone());
        let mut text = Vec::new();
        man.render_description_section(&mut text)?;
        man.render_options_section(&mut text)?;
        // The sections become parts of this command's.
        page.extend(String::from_utf8_lossy(&text).replace(".SH ", ".SS ").into_bytes());
        commands(command, page)?;
    }
    Ok(())
}
