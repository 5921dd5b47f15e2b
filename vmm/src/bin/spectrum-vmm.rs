//! `spectrum-vmm`: one virtual machine, with Cloud Hypervisor's flags and API.

use std::error::Error;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use hypervisor::kvm::Kvm;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rutabaga_glue::RutabagaFactory;
use virtio_devices::registry::KINDS;
use vmm::build::Confinement;
use vmm::cli::{Cli, Endpoint, Seccomp};
use vmm::events::EventMonitor;
use vmm::inherited::{self, InheritedError};
use vmm::sandbox::{Filters, Mode, SeccompError, Unconfined};
use vmm::zygote::Zygote;
use vmm::{Outcome, Vmm, panics};
use vmm_api::Server;
use vmm_config::ZygoteConfig;

/// The exit status of a wrong command line.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    let cli = match Cli::from_args(std::env::args_os()) {
        Ok(cli) => cli,
        Err(e) => match Cli::sentence(&e) {
            None => e.exit(),
            Some(sentence) => {
                eprintln!("spectrum-vmm: {sentence}");
                return ExitCode::from(USAGE);
            }
        },
    };
    match run(&cli) {
        Ok(Outcome::Ended) => ExitCode::SUCCESS,
        Ok(Outcome::Failed(why)) => {
            eprintln!("spectrum-vmm: {why}");
            ExitCode::FAILURE
        }
        Err(e) => {
            eprintln!("spectrum-vmm: {e}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<Outcome, Box<dyn Error>> {
    // First of all: what is opened here must not be taken for what the parent handed down.
    let (api, events) = (take(cli.api_socket.as_ref())?, take(cli.event_monitor.as_ref())?);
    let named = cli.net.iter().enumerate().filter_map(|(index, net)| Some((net.name(index), net.fd?)));
    let handed = named.map(|(name, fd)| Ok((name, inherited::take(fd)?))).collect::<Result<_, InheritedError>>()?;
    let log = start_logging(cli)?;
    raise_descriptor_limit();
    vmm::survive_file_size_limit()?;
    let server = match (&cli.api_socket, api) {
        (Some(Endpoint::Path(path)), _) => Some(Server::bind(path)?),
        (_, Some(fd)) => Some(Server::from_listener(fd)?),
        _ => None,
    };
    let monitor = match (&cli.event_monitor, events) {
        (Some(Endpoint::Path(path)), _) => {
            let monitor = EventMonitor::open(path);
            Some(monitor.map_err(|e| format!("cannot write events to {}: {e}", path.display()))?)
        }
        (_, Some(fd)) => Some(EventMonitor::from_fd(fd)?),
        _ => None,
    };
    if let Some(zygote) = &cli.zygote {
        return be_zygote(cli, zygote, log);
    }
    let (kvm, signals) = (Arc::new(Kvm::open()?), signals()?);
    let mut vmm = Vmm::new(kvm, Box::new(RutabagaFactory), confine(cli.seccomp)?)?;
    vmm.end_on(signals);
    panics::end_with(vmm.fail_with());
    if let Some(monitor) = monitor {
        vmm.tell(monitor);
    }
    if let Some(Endpoint::Path(path)) = &cli.api_socket {
        vmm.own_socket(path.clone());
    }
    if let Some(server) = server {
        vmm.serve(server);
    }
    if let Some(config) = cli.config() {
        vmm.create_with(config, handed)?;
        vmm.boot()?;
    }
    if let Some(from) = cli.restored() {
        vmm.restore(&from)?;
    }
    Ok(vmm.run()?)
}

/// Makes clones until told to end; each of them is a VMM of its own.
fn be_zygote(cli: &Cli, config: &ZygoteConfig, log: Option<&'static File>) -> Result<Outcome, Box<dyn Error>> {
    // Compiled once, for all clones.
    let filters = match mode(cli.seccomp) {
        Some(mode) => {
            let filters = Filters::new(mode)?;
            filters.prepare(KINDS.iter().copied())?;
            Some(Arc::new(filters))
        }
        None => None,
    };
    let prepare = |vmm: &mut Vmm| -> Result<(), Box<dyn Error>> {
        vmm.end_on(signals()?);
        panics::end_with(vmm.fail_with());
        Ok(())
    };
    let zygote = Zygote::new(
        config,
        Arc::new(Kvm::open()?),
        || Box::new(RutabagaFactory),
        Box::new(move || match &filters {
            Some(filters) => {
                filters.confine_control()?;
                Ok(Box::new(filters.clone()))
            }
            None => Ok(Box::new(Unconfined)),
        }),
        prepare,
        log,
    )?;
    // Who can connect finds a zygote that has its template.
    zygote.run(Server::bind(&config.socket)?)?;
    Ok(Outcome::Ended)
}

fn take(endpoint: Option<&Endpoint>) -> Result<Option<OwnedFd>, InheritedError> {
    match endpoint {
        Some(Endpoint::Fd(fd)) => inherited::take(*fd).map(Some),
        _ => Ok(None),
    }
}

/// What becomes of forbidden calls; nothing if all are allowed.
fn mode(seccomp: Seccomp) -> Option<Mode> {
    match seccomp {
        Seccomp::False => None,
        Seccomp::True => Some(Mode::Enforce),
        Seccomp::Log => Some(Mode::Log),
    }
}

/// Confines this thread, and says how the others are to be.
fn confine(seccomp: Seccomp) -> Result<Box<dyn Confinement>, SeccompError> {
    let Some(mode) = mode(seccomp) else { return Ok(Box::new(Unconfined)) };
    let filters = Filters::new(mode)?;
    filters.confine_control()?;
    Ok(Box::new(filters))
}

/// Lets the process open as many descriptors as it may: each connection through the vsock device takes one.
fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    if let Err(e) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }) {
        log::warn!("the limit of open files stays at {:?}: {e}", limit.current);
    }
}

/// A socket on which something arrives when the process is asked to end.
fn signals() -> io::Result<UnixStream> {
    let (read, write) = UnixStream::pair()?;
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM, signal_hook::consts::SIGHUP] {
        signal_hook::low_level::pipe::register(signal, write.try_clone()?)?;
    }
    Ok(read)
}

/// The most lines that one process writes unless it is asked for more: a guest can provoke any number of warnings, and the
/// file they go to may be in memory.
const MAX_LINES: u32 = 1000;

fn limited(to: &mut env_logger::fmt::Formatter, record: &log::Record<'_>) -> io::Result<()> {
    static LINES: AtomicU32 = AtomicU32::new(0);
    let count = LINES.load(Ordering::Relaxed);
    if count > MAX_LINES {
        return Ok(());
    }
    LINES.store(count + 1, Ordering::Relaxed);
    let (time, level, target) = (to.timestamp_micros(), record.level(), record.target());
    if count == MAX_LINES {
        return writeln!(to, "[{time} {level} {target}] {MAX_LINES} lines were written; -v shows what comes now, too");
    }
    writeln!(to, "[{time} {level} {target}] {}", record.args())
}

/// Starts the log; the file it goes to, if it goes to one.
fn start_logging(cli: &Cli) -> io::Result<Option<&'static File>> {
    let mut builder = env_logger::Builder::new();
    builder.filter_level(cli.log_level()).format_timestamp_micros();
    if cli.log_level() == log::LevelFilter::Warn {
        builder.format(limited);
    }
    let mut log = None;
    if let Some(path) = &cli.log_file {
        let file = std::fs::OpenOptions::new().create(true).append(true).open(path);
        let file =
            file.map_err(|e| io::Error::new(e.kind(), format!("cannot write the log {}: {e}", path.display())))?;
        // It is there for as long as the process.
        let file: &'static File = Box::leak(Box::new(file));
        builder.target(env_logger::Target::Pipe(Box::new(file)));
        log = Some(file);
    }
    builder.init();
    Ok(log)
}
