//! The command line of `spectrum-vmm`: Cloud Hypervisor's flags, read into a [`VmConfig`].

use std::ffi::OsString;
use std::num::ParseIntError;
use std::os::fd::RawFd;
use std::path::PathBuf;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Arg, ArgAction, CommandFactory, FromArgMatches, Parser, ValueEnum};
use thiserror::Error;
use vmm_config::{
    ConsoleConfig, ConsoleMode, CpusConfig, DiskConfig, FsConfig, GpuConfig, LandlockRule, MemoryConfig, NetConfig,
    PayloadConfig, PlatformConfig, PmemConfig, RestoreConfig, RngConfig, SerialConfig, VmConfig, VsockConfig,
    ZygoteConfig,
};

/// Flags of Cloud Hypervisor's with a meaning we do not carry out yet: refused by name instead of as unknown.
const NOT_SUPPORTED: &[&str] = &[
    "balloon",
    "debug-console",
    "device",
    "generic-vhost-user",
    "host-data",
    "igvm",
    "ivshmem",
    "log-format",
    "memory-zone",
    "no-shutdown",
    "numa",
    "pci-segment",
    "pvmemcontrol",
    "pvpanic",
    "rate-limit-group",
    "rtc",
    "tpm",
    "user-device",
    "vdpa",
    "watchdog",
];

/// The flags that describe the machine, and so need something to boot.
const MACHINE: &[&str] = &[
    "cmdline",
    "console",
    "cpus",
    "disk",
    "fs",
    "gpu",
    "initramfs",
    "landlock",
    "landlock_rules",
    "memory",
    "net",
    "platform",
    "pmem",
    "rng",
    "serial",
    "vsock",
];

/// Run a virtual machine. With a kernel it is booted at once; without one, the VMM waits for requests on its API socket.
#[derive(Clone, Debug, Parser)]
#[command(name = "spectrum-vmm", version, max_term_width = 120)]
pub struct Cli {
    /// Answer requests on this Unix socket; fd=N is a listening socket that is already open
    #[arg(long, value_name = "PATH|path=PATH|fd=N", value_parser = Endpoint::parse_or_path)]
    pub api_socket: Option<Endpoint>,
    /// Write a line of JSON here for each event in the machine's life
    #[arg(long, value_name = "path=PATH|fd=N", value_parser = Endpoint::parse)]
    pub event_monitor: Option<Endpoint>,
    /// Kernel to boot: a bzImage or an ELF file with a PVH note
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// Firmware to boot (not supported yet)
    #[arg(long, value_name = "FILE", hide = true)]
    pub firmware: Option<PathBuf>,
    /// Initial RAM disk
    #[arg(long, value_name = "FILE")]
    pub initramfs: Option<PathBuf>,
    /// Kernel command line
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub cmdline: Option<String>,
    /// Virtual CPUs: boot=N,max=N [default: boot=1]
    #[arg(long, value_name = "KEYS", value_parser = CpusConfig::parse)]
    pub cpus: Option<CpusConfig>,
    /// Guest memory: size=256M,shared=on|off [default: size=512M]
    #[arg(long, value_name = "KEYS", value_parser = MemoryConfig::parse)]
    pub memory: Option<MemoryConfig>,
    /// Disks: path=FILE,readonly=on|off,direct=on|off,id=NAME,serial=TEXT,num_queues=N,queue_size=N
    #[arg(long, value_name = "KEYS", num_args = 1.., value_parser = DiskConfig::parse)]
    pub disk: Vec<DiskConfig>,
    /// Files shown to the guest as persistent memory: file=FILE,size=SIZE,discard_writes=on|off,copy=on|off,id=NAME
    #[arg(long, value_name = "KEYS", num_args = 1.., value_parser = PmemConfig::parse)]
    pub pmem: Vec<PmemConfig>,
    /// Serial port: tty, file=FILE, pty, null or off [default: null]
    #[arg(long, value_name = "KIND", value_parser = SerialConfig::parse)]
    pub serial: Option<SerialConfig>,
    /// Virtio console: tty, file=FILE, pty, null or off [default: tty, or off if the serial port is on tty]
    #[arg(long, value_name = "KIND", value_parser = ConsoleConfig::parse)]
    pub console: Option<ConsoleConfig>,
    /// Sockets between host and guest: cid=N,socket=PATH
    #[arg(long, value_name = "KEYS", value_parser = VsockConfig::parse)]
    pub vsock: Option<VsockConfig>,
    /// Source of entropy: src=FILE [default: src=/dev/urandom]
    #[arg(long, value_name = "KEYS", value_parser = RngConfig::parse)]
    pub rng: Option<RngConfig>,
    /// Graphics: cross-domain,wayland=SOCKET shows the guest's windows on the Wayland compositor at SOCKET
    #[arg(long, value_name = "KEYS", num_args = 1.., value_parser = GpuConfig::parse)]
    pub gpu: Vec<GpuConfig>,
    /// File systems for what the guest is granted by vm.add-grant: tag=NAME,uid=N,gid=N,id=NAME
    #[arg(long, value_name = "KEYS", num_args = 1.., value_parser = FsConfig::parse)]
    pub fs: Vec<FsConfig>,
    /// Network interfaces: tap=NAME, socket=PATH (of passt) or fd=N, mac=ADDRESS, mtu=N, deny=[NETWORK,...], id=NAME
    #[arg(long, value_name = "KEYS", num_args = 1.., value_parser = NetConfig::parse)]
    pub net: Vec<NetConfig>,
    /// Go on with a machine from a snapshot: source_url=file:///DIR,memory_restore_mode=copy|ondemand|copyonwrite,resume=true
    #[arg(long, value_name = "KEYS", value_parser = RestoreConfig::parse, conflicts_with_all = ["kernel", "firmware"])]
    pub restore: Option<RestoreConfig>,
    /// Make clones of a snapshot for whoever asks on a socket: source_url=file:///DIR,socket=PATH,pool=N,prefault=on|off
    #[arg(long, value_name = "KEYS", value_parser = ZygoteConfig::parse,
          conflicts_with_all = ["kernel", "firmware", "restore", "api_socket", "event_monitor"])]
    pub zygote: Option<ZygoteConfig>,
    /// Let the machine have copies of its own of the memory it is restored with and of images it only reads as memory
    #[arg(long, conflicts_with = "zygote")]
    pub no_share: bool,
    /// Properties of the machine: num_pci_segments=1
    #[arg(long, value_name = "KEYS", value_parser = PlatformConfig::parse)]
    pub platform: Option<PlatformConfig>,
    /// Confine the VMM to the files it needs with Landlock
    #[arg(long)]
    pub landlock: bool,
    /// Paths the VMM may use besides: path=PATH,access=r|w|rw
    #[arg(long, value_name = "KEYS", num_args = 1.., value_parser = LandlockRule::parse)]
    pub landlock_rules: Vec<LandlockRule>,
    /// What happens on a system call that is not allowed: true ends the VMM, log only logs it, false allows all
    #[arg(long, value_enum, value_name = "MODE", default_value_t = Seccomp::True)]
    pub seccomp: Seccomp,
    /// Write the log to this file instead of standard error
    #[arg(long, value_name = "FILE")]
    pub log_file: Option<PathBuf>,
    /// Log more; twice for even more
    #[arg(short = 'v', action = ArgAction::Count)]
    pub verbosity: u8,
}

/// The system-call filter's mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Seccomp {
    /// A forbidden call ends the process.
    True,
    /// No filter.
    False,
    /// A forbidden call is written to the kernel's log and allowed.
    Log,
}

/// A file or socket, by path or as an open file descriptor handed down by the parent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// A path to open or to make.
    Path(PathBuf),
    /// The number of an open file descriptor.
    Fd(RawFd),
}

/// Why an [`Endpoint`] was not understood.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum EndpointError {
    /// Neither of the two forms.
    #[error("write path=PATH or fd=N")]
    Form,
    /// The descriptor is not a number.
    #[error("fd={0} is not the number of a file descriptor: {1}")]
    Fd(String, ParseIntError),
    /// 0, 1 and 2 have another use.
    #[error("fd={0} cannot be used; 3 is the first that can")]
    Standard(RawFd),
}

impl Endpoint {
    /// Reads `path=PATH` or `fd=N`.
    ///
    /// # Errors
    /// Neither form, an empty path, or a number that cannot be such a descriptor.
    pub fn parse(text: &str) -> Result<Self, EndpointError> {
        match text.split_once('=') {
            Some(("path", path)) if !path.is_empty() => Ok(Self::Path(path.into())),
            Some(("fd", number)) => {
                let fd: RawFd = number.parse().map_err(|error| EndpointError::Fd(number.to_owned(), error))?;
                if fd > 2 { Ok(Self::Fd(fd)) } else { Err(EndpointError::Standard(fd)) }
            }
            _ => Err(EndpointError::Form),
        }
    }

    /// Reads `path=PATH`, `fd=N`, or a path by itself.
    ///
    /// # Errors
    /// As [`Endpoint::parse`].
    pub fn parse_or_path(text: &str) -> Result<Self, EndpointError> {
        let has_key = text.starts_with("path=") || text.starts_with("fd=");
        if has_key || text.is_empty() { Self::parse(text) } else { Ok(Self::Path(text.into())) }
    }
}

impl Cli {
    /// Reads the command line; the first argument is the program's name.
    ///
    /// # Errors
    /// A mistake of the user's, or a request for help or the version: [`clap::Error::exit`] does what is right.
    pub fn from_args<I, T>(arguments: I) -> Result<Self, clap::Error>
    where
        I: IntoIterator<Item = T>,
        T: Into<OsString> + Clone,
    {
        let refused = NOT_SUPPORTED.iter().map(|name| {
            Arg::new(*name).long(*name).hide(true).num_args(0..).action(ArgAction::Append).allow_hyphen_values(true)
        });
        let mut command = Self::command().args(refused);
        let matches = command.try_get_matches_from_mut(arguments)?;
        let mut fail = |kind, text: String| Err(command.error(kind, text));
        let given = |name: &&&str| matches.value_source(name) == Some(clap::parser::ValueSource::CommandLine);
        if let Some(name) = NOT_SUPPORTED.iter().find(given) {
            return fail(ErrorKind::UnknownArgument, format!("--{name} is not supported yet; leave it out"));
        }
        let cli = Self::from_arg_matches(&matches)?;
        let boots = cli.kernel.is_some() || cli.firmware.is_some();
        if let Some(name) = MACHINE.iter().find(given).filter(|_| !boots) {
            let flag = name.replace('_', "-");
            return fail(
                ErrorKind::MissingRequiredArgument,
                format!("--{flag} describes a machine, but there is nothing to boot: give --kernel FILE too"),
            );
        }
        if !boots && cli.restore.is_none() && cli.zygote.is_none() && cli.api_socket.is_none() {
            return fail(
                ErrorKind::MissingRequiredArgument,
                "nothing to do: give --kernel FILE to boot a machine, --restore to go on with one, or --api-socket PATH to wait \
                 for requests"
                    .into(),
            );
        }
        if cli.no_share && !boots && cli.restore.is_none() {
            return fail(
                ErrorKind::ArgumentConflict,
                "--no-share is for the machine of --kernel or --restore; a request says it itself: copy in its pmem sections, \
                 no_share in vm.restore"
                    .into(),
            );
        }
        if let (Some(Endpoint::Path(api)), Some(vsock)) = (&cli.api_socket, &cli.vsock)
            && *api == vsock.socket
        {
            return fail(
                ErrorKind::ArgumentConflict,
                format!("--api-socket and --vsock cannot both use {}; give each a path of its own", api.display()),
            );
        }
        Ok(cli)
    }

    /// A mistake of the user's in one sentence; `None` for help and version, which are no mistakes.
    pub fn sentence(error: &clap::Error) -> Option<String> {
        let get = |kind| match error.get(kind) {
            Some(ContextValue::String(text)) => Some(text.clone()),
            Some(ContextValue::Strings(all)) => all.first().cloned(),
            _ => None,
        };
        match error.kind() {
            ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => return None,
            ErrorKind::UnknownArgument => {
                if let Some(flag) = get(ContextKind::InvalidArg) {
                    return Some(match get(ContextKind::SuggestedArg) {
                        Some(near) => format!("unknown flag {flag} (did you mean {near}?)"),
                        None => format!("unknown flag {flag}; --help lists those there are"),
                    });
                }
            }
            ErrorKind::ValueValidation => {
                // The messages of keys name their flag themselves.
                let cause = std::error::Error::source(error).map(ToString::to_string);
                let flag = get(ContextKind::InvalidArg).unwrap_or_default();
                let flag = flag.split_whitespace().next().unwrap_or_default();
                match cause {
                    Some(cause) if cause.starts_with("--") => return Some(cause),
                    Some(cause) => return Some(format!("{flag}: {cause}")),
                    None => {}
                }
            }
            _ => {}
        }
        let text = error.to_string();
        let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
        let first = lines.next().unwrap_or_default();
        let sentence = first.strip_prefix("error: ").unwrap_or(first).to_owned();
        Some(match lines.next() {
            // The values that are possible.
            Some(more) if more.starts_with('[') => format!("{sentence} {more}"),
            _ => sentence,
        })
    }

    /// The machine the flags describe; `None` if there is nothing to boot and the API is to be waited for.
    pub fn config(&self) -> Option<VmConfig> {
        if self.kernel.is_none() && self.firmware.is_none() {
            return None;
        }
        let serial = self.serial.clone().unwrap_or_default();
        let console = self.console.clone().unwrap_or_else(|| match serial.mode {
            // The terminal can be had once; who asks for the serial port there means that one.
            ConsoleMode::Tty => ConsoleConfig::of(ConsoleMode::Off),
            _ => ConsoleConfig::default(),
        });
        let mut config = VmConfig {
            cpus: self.cpus.clone().unwrap_or_default(),
            memory: self.memory.clone().unwrap_or_default(),
            payload: Some(PayloadConfig {
                kernel: self.kernel.clone(),
                cmdline: self.cmdline.clone(),
                initramfs: self.initramfs.clone(),
                firmware: self.firmware.clone(),
                ..PayloadConfig::default()
            }),
            disks: self.disk.clone(),
            pmem: self.pmem.clone(),
            serial,
            console,
            vsock: self.vsock.clone(),
            rng: self.rng.clone().unwrap_or_default(),
            gpu: self.gpu.clone(),
            fs: self.fs.clone(),
            net: self.net.clone(),
            platform: self.platform.clone(),
            landlock_enable: self.landlock,
            landlock_rules: self.landlock_rules.clone(),
            ..VmConfig::default()
        };
        if self.no_share {
            config.own_copies();
        }
        Some(config)
    }

    /// The snapshot to go on with, if one is given.
    #[must_use]
    pub fn restored(&self) -> Option<RestoreConfig> {
        let restore = self.restore.as_ref()?;
        Some(RestoreConfig { no_share: restore.no_share || self.no_share, ..restore.clone() })
    }

    /// How much is to be logged.
    pub fn log_level(&self) -> log::LevelFilter {
        match self.verbosity {
            0 => log::LevelFilter::Warn,
            1 => log::LevelFilter::Info,
            2 => log::LevelFilter::Debug,
            _ => log::LevelFilter::Trace,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(line: &str) -> Result<Cli, String> {
        Cli::from_args(std::iter::once("spectrum-vmm").chain(line.split_whitespace()))
            .map_err(|error| Cli::sentence(&error).unwrap())
    }

    fn mistake(line: &str) -> String {
        read(line).expect_err(line)
    }

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_flags_of_the_readme_make_a_machine() {
        let cli = read(
            "--api-socket /run/api --kernel /k --initramfs /i --cmdline console=ttyS0 --cpus boot=2,max=4 \
             --memory size=256M,shared=off --disk path=/a path=/b,readonly=on --disk path=/c \
             --pmem file=/p,discard_writes=on --serial tty --vsock cid=3,socket=/v --rng src=/dev/random \
             --gpu cross-domain,wayland=/w --seccomp log -vv",
        )
        .unwrap();
        let config = cli.config().unwrap();
        let paths: Vec<_> = config.disks.iter().map(|disk| disk.path.to_str().unwrap()).collect();
        assert_eq!(paths, ["/a", "/b", "/c"]);
        assert_eq!((config.cpus.boot_vcpus, config.cpus.max_vcpus, config.memory.size), (2, 4, 256 << 20));
        assert_eq!((config.serial.mode, config.console.mode), (ConsoleMode::Tty, ConsoleMode::Off));
        assert_eq!(config.payload.unwrap().cmdline.as_deref(), Some("console=ttyS0"));
        assert_eq!((cli.seccomp, cli.log_level()), (Seccomp::Log, log::LevelFilter::Debug));
        assert_eq!(cli.api_socket, Some(Endpoint::Path("/run/api".into())));
    }

    #[test]
    fn defaults_are_those_of_cloud_hypervisor() {
        let cli = read("--kernel /k").unwrap();
        assert_eq!(cli.seccomp, Seccomp::True);
        let expected = PayloadConfig { kernel: Some("/k".into()), ..PayloadConfig::default() };
        assert_eq!(cli.config().unwrap(), VmConfig { payload: Some(expected), ..VmConfig::default() });
    }

    #[test]
    fn without_a_kernel_the_api_is_waited_for() {
        let cli = read("--api-socket fd=3").unwrap();
        assert_eq!((cli.api_socket.clone(), cli.config()), (Some(Endpoint::Fd(3)), None));
        assert_eq!(read("--api-socket path=/x").unwrap().api_socket, Some(Endpoint::Path("/x".into())));
    }

    #[test]
    fn every_mistake_gets_a_clear_sentence() {
        assert!(mistake("").contains("nothing to do: give --kernel FILE"));
        assert!(mistake("--disk path=/a --api-socket /x").contains("--disk describes a machine"));
        assert!(mistake("--landlock-rules path=/a,access=r --api-socket /x").contains("--landlock-rules describes"));
        assert!(mistake("--kernal /k").contains("unknown flag --kernal (did you mean --kernel?)"));
        assert!(mistake("--kernel /k --tpm socket=/x").contains("--tpm is not supported yet; leave it out"));
        assert!(mistake("--kernel /k --net tap=x,ip=192.0.2.1").contains("--net: ip is not supported yet"));
        assert!(mistake("--kernel /k --disk pth=/a").contains("did you mean \"path\"?"));
        assert!(mistake("--kernel /k --kernel /j").contains("cannot be used multiple times"));
        assert!(mistake("--kernel /k --seccomp maybe").contains("true, false, log"));
        assert!(mistake("--kernel").contains("a value is required for '--kernel <FILE>'"));
        assert!(mistake("--nothing-like-it").contains("unknown flag --nothing-like-it; --help lists"));
        assert!(mistake("--api-socket fd=x").contains("--api-socket: fd=x is not the number"));
        assert!(mistake("--api-socket fd=1").contains("3 is the first"));
        assert!(mistake("--kernel /k --api-socket /s --vsock cid=3,socket=/s").contains("cannot both use /s"));
    }
}
