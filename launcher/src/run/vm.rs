//! The VMM as a child process: started, watched, and ended whatever happens.

use std::{
    ffi::OsString,
    fs::{File, OpenOptions},
    io::{self, Read, Write},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::{
            fs::OpenOptionsExt,
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use guest_proto::{AGENT_PORT, FromAgent, Hello, Link, READY_PORT, ToAgent, VERSION};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{CWD, FileType, Mode, OFlags, mknodat},
    io::{Errno, ioctl_fionbio},
    process::Signal,
};

use vmm_api::{Client, ClientError};
use vmm_config::{CloneConfig, keyvalue::parse_size};

use super::{
    RunError,
    cgroup::Group,
    folder::{API, CONSOLE, MESSAGES, RunFolder, VSOCK},
    foreign, io_error,
    journal::Journal,
    network::{self, Passt},
    options::Settings,
    process::{ProcessId, Running},
    relay::Waits,
    signals::Signals,
    state::Origin,
    tail::{Tail, printable},
    working_set::WorkingSet,
};
use crate::{
    apps::Network,
    portal,
    template::{INITRAMFS, ROOT, VMLINUZ},
};

/// The launcher's end of a connection to the agent.
pub type AgentLink = Link<FromAgent, ToAgent>;

/// Every VM has the same: they share nothing that would need different ones.
pub const GUEST_CID: u32 = 3;

/// The name by which the guest mounts the file system with what it was granted.
pub const GRANTS_TAG: &str = "host";

/// The identifier that the VMM gives a vsock device.
const VSOCK_DEVICE: &str = "_vsock0";

/// How long a VM may take to power off, and a VMM to end when told to.
const PATIENCE: Duration = Duration::from_secs(10);

/// Lines of messages shown with an error.
const SHOWN: usize = 15;

/// What can go wrong with the VM.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    #[error("cannot start the VMM {vmm}: {source}")]
    Start { vmm: String, source: io::Error },
    #[error("the VMM ended ({how}) before the application did{messages}")]
    Ended { how: String, messages: String },
    #[error("the VM needed more memory than its cgroup has, and was ended: give it more with --memory")]
    OutOfMemory,
    #[error("the VM was not ready after {} s{messages}", after.as_secs())]
    NotReady { after: Duration, messages: String },
    #[error("the zygote makes no clone: {0}")]
    Clone(ClientError),
    #[error("the VM has no connection for the launcher: {0}")]
    NoConnection(String),
    #[error(
        "the template's agent speaks version {0} of the protocol instead of {VERSION}: use `spectrum template refresh`"
    )]
    Version(u32),
}

/// The VMM's process, whoever's child it is.
enum Process {
    Child(Child),
    /// A zygote's.
    Clone {
        pid: u32,
        /// Where the zygote and its clones write.
        log: PathBuf,
    },
}

impl Process {
    fn id(&self) -> u32 {
        match self {
            Self::Child(child) => child.id(),
            Self::Clone { pid, .. } => *pid,
        }
    }
}

/// A running VMM. Dropping it ends it.
pub struct Vm {
    process: Process,
    running: Running,
    /// Its limits. Given up after the process, before the folder which says where they are.
    group: Option<Group>,
    folder: RunFolder,
    ready: UnixListener,
    /// Open for as long as the agent lives.
    agent: Option<AgentLink>,
    /// Of a child.
    messages: Option<Tail>,
    console: Tail,
    boot_timeout: Duration,
    /// What its interface is connected to.
    passt: Option<Passt>,
    /// A clone ends when this is closed, however this process ends.
    owner: Option<UnixStream>,
    /// What is to be kept of what a clone touches, once its application has started.
    working_set: Option<WorkingSet>,
}

impl Vm {
    /// Starts a VMM that boots.
    pub fn boot(settings: &Settings) -> Result<Self, RunError> {
        let folder = RunFolder::create(&settings.about, Origin::Boot)?;
        // Both must be there before the VM: the agent connects as soon as it can, the console is open from the first line.
        let ready = UnixListener::bind(folder.path(&format!("vsock.sock_{READY_PORT}")))
            .map_err(io_error("listen for the VM"))?;
        let console = console_pipe(&folder.path("console")).map_err(io_error("make a pipe for the VM's console"))?;
        let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
            .map_err(io_error("make a pipe for the VMM's messages"))?;
        ioctl_fionbio(&read, true).map_err(io_error("read the VMM's messages"))?;
        let errors = write.try_clone().map_err(io_error("make a pipe for the VMM's messages"))?;
        let journal = |name: &str| Journal::new(folder.path(name)).map_err(io_error("keep the VM's messages"));
        let messages = Some(Tail::new(read, settings.debug).kept_in(journal(MESSAGES)?));
        let console = Tail::new(console.into(), settings.debug).kept_in(journal(CONSOLE)?);
        let fail = |source| VmError::Start { vmm: settings.vmm.display().to_string(), source };
        let (passt, socket) = (settings.network == Network::Internet).then(Passt::start).transpose()?.unzip();
        let mut command = Command::new(&settings.vmm);
        command.args(arguments(settings, &folder)).stdin(Stdio::null()).stdout(write).stderr(errors);
        // The write ends must be the child's alone, or its end would not be seen; so must the socket, or passt would not end.
        let child = match socket {
            Some(socket) => {
                command.arg("--net").arg(network::interface(&socket, &network::denied()?));
                network::spawn_with(command, socket).map_err(fail)?
            }
            None => {
                let child = command.spawn().map_err(fail)?;
                drop(command);
                child
            }
        };
        let running = watch(child.id())?;
        let mut vm = Self::noted(Process::Child(child), running, folder, (ready, console), passt, settings)?;
        vm.messages = messages;
        Ok(vm)
    }

    /// Asks a zygote, whose messages are in `log`, for a clone that has the app's working set beforehand.
    pub fn clone_of(
        zygote: &mut Client,
        log: PathBuf,
        settings: &Settings,
        working_set: WorkingSet,
    ) -> Result<Self, RunError> {
        let mut folder = RunFolder::create(&settings.about, Origin::Clone)?;
        folder.update(|state| state.zygote_log = Some(log.clone()))?;
        let listen = |name: &str| UnixListener::bind(folder.path(name)).map_err(io_error("listen for the VM"));
        let ready = listen(&format!("vsock.sock_{READY_PORT}"))?;
        let (api, vsock) = (listen(API)?, listen(VSOCK)?);
        let (console, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
            .map_err(io_error("make a pipe for the VM's console"))?;
        ioctl_fionbio(&console, true).map_err(io_error("read the VM's console"))?;
        let journal = Journal::new(folder.path(CONSOLE)).map_err(io_error("keep the VM's messages"))?;
        let console = Tail::new(console, settings.debug).kept_in(journal);
        let (passt, socket) = (settings.network == Network::Internet).then(Passt::start).transpose()?.unzip();
        let (owner, owned) = UnixStream::pair().map_err(io_error("make a socket for the VM"))?;
        let known = working_set.open();
        let interface = socket.iter().map(|_| network::DEVICE);
        let names = ["api", "owner", "console", VSOCK_DEVICE].into_iter().chain(interface);
        let config = CloneConfig {
            fds: names.chain(known.iter().map(|_| "working-set")).map(String::from).collect(),
            net_deny: socket.iter().map(|_| network::denied()).next().transpose()?,
            vsock_socket: Some(folder.path(VSOCK)),
            wayland: settings.wayland.clone(),
            ..CloneConfig::default()
        };
        let fds = [api.as_fd(), owned.as_fd(), write.as_fd(), vsock.as_fd()];
        let fds: Vec<_> =
            fds.into_iter().chain(socket.iter().map(AsFd::as_fd)).chain(known.iter().map(AsFd::as_fd)).collect();
        let info = zygote.clone_vm(config, &fds).map_err(VmError::Clone)?;
        let pid = u32::try_from(info.pid).unwrap_or_default();
        let (process, running) = (Process::Clone { pid, log }, watch(pid)?);
        // From here on it alone listens. Were it gone already, the number could be another process' by now.
        drop((api, owned, vsock, socket));
        let mut own = Client::connect(&folder.path(API)).map_err(VmError::Clone)?;
        own.set_timeout(Some(PATIENCE)).map_err(VmError::Clone)?;
        if own.ping().map_err(VmError::Clone)?.pid != info.pid {
            return Err(VmError::NoConnection("the clone is not the process that it was said to be".into()).into());
        }
        let mut vm = Self::noted(process, running, folder, (ready, console), passt, settings)?;
        vm.owner = Some(owner);
        vm.working_set = known.is_none().then_some(working_set);
        Ok(vm)
    }

    /// A VMM that runs, which is written down. From here on it is ended whatever happens.
    fn noted(
        process: Process,
        running: Running,
        mut folder: RunFolder,
        (ready, console): (UnixListener, Tail),
        passt: Option<Passt>,
        settings: &Settings,
    ) -> Result<Self, RunError> {
        let pid = process.id();
        let written = folder.update(|state| state.vmm = ProcessId::of(pid));
        let group = limit(&mut folder, settings, pid);
        let vm = Self {
            process,
            running,
            group,
            folder,
            ready,
            agent: None,
            messages: None,
            console,
            boot_timeout: settings.boot_timeout,
            passt,
            owner: None,
            working_set: None,
        };
        written?;
        Ok(vm)
    }

    /// The VM's private folder.
    pub fn folder(&self) -> &RunFolder {
        &self.folder
    }

    /// Where the VM's portals find it.
    pub fn portal_places(&self) -> portal::Vm {
        let port = guest_proto::portal::PORT;
        portal::Vm {
            offers: self.folder.path(&format!("{VSOCK}_{port}")),
            vsock: self.folder.path(VSOCK),
            api: self.folder.path(API),
            folder: self.folder.folder().to_owned(),
        }
    }

    /// A connection to the VMM's API.
    pub fn api(&self) -> Result<Client, ClientError> {
        Client::connect(&self.folder.path(API))
    }

    /// Waits until the agent says hello.
    pub fn wait_for_agent(&mut self, signals: &Signals) -> Result<(), RunError> {
        let end = Instant::now() + self.boot_timeout;
        let ready = self.ready.try_clone().map_err(io_error("listen for the VM"))?;
        loop {
            match self.wait(signals, &[(ready.as_fd(), PollFlags::IN)], Some(end))? {
                None => {
                    let messages = self.last_messages();
                    return Err(VmError::NotReady { after: self.boot_timeout, messages }.into());
                }
                Some(flags) if flags.iter().all(|flags| flags.is_empty()) => {}
                Some(_) => break,
            }
        }
        let (stream, _) = ready.accept().map_err(io_error("accept the VM's connection"))?;
        let mut link = AgentLink::new(stream.into())?;
        let seconds = u32::try_from(PATIENCE.as_secs()).unwrap_or(u32::MAX);
        match link.exchange(seconds)? {
            FromAgent::Hello(Hello { version: VERSION }) => self.agent = Some(link),
            FromAgent::Hello(Hello { version }) => return Err(VmError::Version(version).into()),
            _ => return Err(VmError::NoConnection("its first message is no greeting".into()).into()),
        }
        Ok(())
    }

    /// A new connection to the agent, through the VMM's socket.
    pub fn connect(&self) -> Result<AgentLink, RunError> {
        connect(&self.folder.path(VSOCK))
    }

    /// Listens for connections of the guest to this port of the host.
    pub fn listen(&self, port: u32) -> Result<UnixListener, RunError> {
        UnixListener::bind(self.folder.path(&format!("vsock.sock_{port}"))).map_err(io_error("listen for the VM"))
    }

    /// Says where the home directory is that it keeps.
    pub fn keeps(&mut self, folder: &Path) -> Result<(), RunError> {
        Ok(self.folder.update(|state| state.kept = Some(folder.into()))?)
    }

    /// Its application has been started.
    pub fn has_application(&mut self) {
        if let Some(working_set) = self.working_set.take() {
            working_set.record_later(self.folder.path(API));
        }
    }

    /// Says that the application can run, and other commands in the VM.
    pub fn is_ready(&mut self) -> Result<(), RunError> {
        Ok(self.folder.update(|state| state.ready = true)?)
    }

    /// Where the VMM looks for somebody when a process of the VM connects to a port of the host.
    pub fn path_of(&self, port: u32) -> PathBuf {
        self.folder.path(&format!("{VSOCK}_{port}"))
    }

    /// Why it has no network, if it was to have one.
    pub fn network_lost(&mut self) -> Option<String> {
        self.passt.as_mut().and_then(Passt::reason_for_end)
    }

    /// Why the VM is gone, if its VMM has ended or does so at once.
    pub fn reason_for_loss(&mut self) -> Option<VmError> {
        if !self.running.wait(Duration::from_secs(1)) {
            return None;
        }
        let how = match &mut self.process {
            Process::Child(child) => child.try_wait().ok().flatten()?.to_string(),
            Process::Clone { pid, .. } => format!("process {pid}"),
        };
        self.drain();
        if self.group.as_ref().is_some_and(Group::out_of_memory) {
            return Some(VmError::OutOfMemory);
        }
        Some(VmError::Ended { how, messages: self.last_messages() })
    }

    /// Whether the VMM ended by itself because the VM was powered off.
    pub fn ended_well(&mut self) -> bool {
        match &mut self.process {
            Process::Child(child) => child.try_wait().is_ok_and(|status| status.is_some_and(|status| status.success())),
            Process::Clone { .. } => false,
        }
    }

    fn drain(&mut self) {
        self.messages.iter_mut().for_each(Tail::drain);
        self.console.drain();
    }

    /// Lets the VM power off by itself; a signal, or too long a time, ends it anyway.
    pub fn wait_for_end(&mut self, signals: &Signals) {
        let end = Instant::now() + PATIENCE;
        while let Ok(Some(_)) = self.wait(signals, &[], Some(end)) {}
    }

    fn last_messages(&self) -> String {
        let part = |what: &str, lines: String| match lines {
            lines if lines.is_empty() => String::new(),
            lines => format!("\n{what}:\n{lines}"),
        };
        let vmm = match &self.process {
            Process::Child(_) => self.messages.as_ref().map(|tail| tail.lines(SHOWN)).unwrap_or_default(),
            Process::Clone { pid, log } => {
                let lines = said_by(*pid, log);
                lines.get(lines.len().saturating_sub(SHOWN)..).unwrap_or_default().join("\n")
            }
        };
        let messages = part("the VMM's last messages", vmm) + &part("the VM's console", self.console.lines(SHOWN));
        if messages.is_empty() { "; it said nothing".into() } else { messages }
    }
}

impl Waits for Vm {
    /// Meanwhile messages are read.
    fn wait(
        &mut self,
        signals: &Signals,
        wanted: &[(BorrowedFd<'_>, PollFlags)],
        end: Option<Instant>,
    ) -> Result<Option<Vec<PollFlags>>, RunError> {
        let count = {
            let mut set: Vec<PollFd<'_>> =
                wanted.iter().map(|(fd, flags)| PollFd::from_borrowed_fd(*fd, *flags)).collect();
            set.push(PollFd::new(self.running.fd(), PollFlags::IN));
            let messages = self.messages.as_ref().and_then(Tail::fd);
            let others = signals.fds().chain(messages).chain(self.console.fd());
            set.extend(others.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
            let left = end.map(|end| end.saturating_duration_since(Instant::now()));
            let left = left.and_then(|left| Timespec::try_from(left).ok());
            match poll(&mut set, left.as_ref()) {
                Ok(count) => (count, set.iter().map(PollFd::revents).collect::<Vec<_>>()),
                Err(Errno::INTR) => (1, vec![PollFlags::empty(); set.len()]),
                Err(errno) => return Err(io_error("wait for the VM")(errno)),
            }
        };
        let (count, mut happened) = count;
        self.drain();
        if let Some(signal) = signals.received() {
            return Err(RunError::Interrupted(signal));
        }
        let vmm_ended = happened.get(wanted.len()).is_some_and(|flags| !flags.is_empty());
        happened.truncate(wanted.len());
        // What the guest still said before its end comes first.
        if vmm_ended
            && happened.iter().all(|flags| flags.is_empty())
            && let Some(error) = self.reason_for_loss()
        {
            return Err(error.into());
        }
        Ok((count > 0).then_some(happened))
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        if !self.running.wait(Duration::ZERO) {
            self.running.signal(Signal::TERM);
            if !self.running.wait(PATIENCE) {
                self.running.signal(Signal::KILL);
                self.running.wait(PATIENCE);
            }
        }
        if let Process::Child(child) = &mut self.process {
            let _ = child.wait();
        }
    }
}

/// A new connection to the agent through `socket`, the VMM's.
pub fn connect(socket: &Path) -> Result<AgentLink, RunError> {
    connect_within(socket, PATIENCE)
}

/// The same with a limit for each of the VMM's answers.
pub fn connect_within(socket: &Path, time: Duration) -> Result<AgentLink, RunError> {
    Ok(AgentLink::new(dial(socket, AGENT_PORT, time)?.into())?)
}

/// A new connection to a port of the guest, with a limit for each of the VMM's answers until it is there.
pub fn dial(socket: &Path, port: u32, time: Duration) -> Result<UnixStream, VmError> {
    let fail = |error: io::Error| VmError::NoConnection(error.to_string());
    let mut stream = UnixStream::connect(socket).map_err(fail)?;
    stream.set_read_timeout(Some(time.max(Duration::from_millis(1)))).map_err(fail)?;
    stream.write_all(format!("CONNECT {port}\n").as_bytes()).map_err(fail)?;
    let mut answer = Vec::new();
    let mut byte = [0];
    // By single bytes: what follows the line belongs to the agent.
    while answer.last() != Some(&b'\n') && answer.len() < 32 {
        stream.read_exact(&mut byte).map_err(fail)?;
        answer.extend(byte);
    }
    if !answer.starts_with(b"OK ") || answer.last() != Some(&b'\n') {
        return Err(VmError::NoConnection("the VMM refused it".into()));
    }
    stream.set_read_timeout(None).map_err(fail)?;
    Ok(stream)
}

/// Puts the VMM into a group with limits, where that can be done. A VM without them is no worse than one on most machines.
fn limit(folder: &mut RunFolder, settings: &Settings, pid: u32) -> Option<Group> {
    let memory = parse_size(&settings.memory)?;
    let made = Group::path_for(folder.folder()).and_then(|path| {
        // Written down first: whoever finds this VM dead removes it.
        folder.update(|state| state.cgroup = Some(path.clone())).map_err(io::Error::other)?;
        let group = Group::new(path, memory, settings.cpus)?;
        group.take(pid)?;
        Ok(group)
    });
    made.inspect_err(|error| log::info!("the VM has no limits: {error}")).ok()
}

fn watch(pid: u32) -> Result<Running, RunError> {
    Running::open(pid).map_err(io_error("watch the VMM"))
}

/// What the clone `pid` has written into the log that it shares with its siblings.
pub fn said_by(pid: u32, log: &Path) -> Vec<String> {
    let text = std::fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&printable(&text)).into_owned();
    let mark = format!("clone {pid}: ");
    text.lines().filter(|line| line.contains(&mark)).map(str::to_owned).collect()
}

/// A named pipe the VMM writes the console to. Read here, so that a guest cannot fill the disk; open for writing too, so
/// that it never ends.
fn console_pipe(path: &Path) -> io::Result<File> {
    mknodat(CWD, path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)?;
    let flags = i32::try_from(OFlags::NONBLOCK.bits()).unwrap_or_default();
    OpenOptions::new().read(true).write(true).custom_flags(flags).open(path)
}

/// A path in a value of the VMM's.
pub fn with(prefix: &str, path: &Path, suffix: &str) -> OsString {
    let mut text = OsString::from(prefix);
    text.push(path);
    text.push(suffix);
    text
}

fn arguments(settings: &Settings, folder: &RunFolder) -> Vec<OsString> {
    if settings.template.is_foreign() {
        return foreign::arguments(settings, folder);
    }
    let template = |name: &str| settings.template.folder.join(name);
    // "quiet" keeps what the kernel prints for itself off the console; what fails is still said. Who debugs wants all of
    // it, and the serial port has it from the first line on.
    let console = if settings.debug { "console=ttyS0" } else { "console=hvc0 quiet" };
    let cmdline = format!("{console} panic=-1 spectrum.root=/dev/pmem0 spectrum.hostname={}", settings.hostname);
    let on = with("file=", &folder.path("console"), "");
    let (serial, virtio) = if settings.debug { (on, "off".into()) } else { ("off".into(), on) };
    let mut arguments: Vec<OsString> = vec![
        "--api-socket".into(),
        folder.path(API).into(),
        "--kernel".into(),
        template(VMLINUZ).into(),
        "--initramfs".into(),
        template(INITRAMFS).into(),
        "--cmdline".into(),
        cmdline.into(),
        "--cpus".into(),
        format!("boot={}", settings.cpus).into(),
        "--memory".into(),
        format!("size={}", settings.memory).into(),
        "--pmem".into(),
        with("file=", &template(ROOT), ",discard_writes=on"),
        "--vsock".into(),
        with(&format!("cid={GUEST_CID},socket="), &folder.path(VSOCK), ""),
        "--serial".into(),
        serial,
        "--console".into(),
        virtio,
        "--rng".into(),
        "src=/dev/urandom".into(),
        "--fs".into(),
        format!("tag={GRANTS_TAG}").into(),
    ];
    if let Some(socket) = &settings.wayland {
        arguments.push("--gpu".into());
        arguments.push(with("cross-domain,wayland=", socket, ""));
    }
    arguments.extend(settings.vmm_arguments.iter().cloned());
    arguments
}
