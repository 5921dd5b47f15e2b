//! Files: with Landlock the VMM reaches only those its machine's configuration names.
//!
//! The rules are made from the configuration, and cover all that is opened again when the machine reboots. They bind
//! the control thread and every thread it makes from then on; nothing takes them back.

use std::io;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetError, RulesetStatus, Scope, make_bitflags,
};
use vmm_config::{ConsoleMode, LandlockAccess, VmConfig};

/// What is restricted where the kernel can; Linux 6.12 knows all of it.
const WANTED: ABI = ABI::V6;

/// Why the VMM is not confined to files.
#[derive(Debug, thiserror::Error)]
pub enum LandlockError {
    /// The kernel has none.
    #[error(
        "this kernel has no Landlock, which --landlock (landlock_enable) asks for; boot a kernel with it (5.13 or newer, \
         \"landlock\" in lsm=), or leave it out: {0}"
    )]
    Missing(RulesetError),
    /// A rule names something that is not there.
    #[error("{what}: cannot confine the VMM to {}: {source}", path.display())]
    Path {
        /// Which part of the configuration.
        what: &'static str,
        /// The path.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The kernel refuses a rule.
    #[error("cannot confine the VMM to its files: {0}")]
    Rule(#[from] RulesetError),
    /// It is bound by other rules already.
    #[error(
        "{what}: this VMM is confined to the files of an earlier machine, {} is not among them; start another VMM for \
         this machine", path.display()
    )]
    Bound {
        /// Which part of the configuration.
        what: &'static str,
        /// The path.
        path: PathBuf,
    },
}

/// What may be done below a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Need {
    Read,
    /// Read and write; commands if it is a device.
    Write,
    WriteOnly,
    /// Sockets are made and removed there.
    Sockets,
}

impl Need {
    fn access(self) -> BitFlags<AccessFs> {
        let read = make_bitflags!(AccessFs::{ReadFile | ReadDir});
        let write = AccessFs::from_write(WANTED);
        match self {
            Self::Read => read,
            Self::Write => read | write,
            Self::WriteOnly => write,
            Self::Sockets => make_bitflags!(AccessFs::{MakeSock | RemoveFile | WriteFile}),
        }
    }
}

/// One path the VMM needs, and the part of the configuration that says so.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Rule {
    path: PathBuf,
    need: Need,
    what: &'static str,
}

/// Whether, and to what, this process is confined.
#[derive(Debug, Default)]
pub struct Files {
    rules: Option<Vec<Rule>>,
}

impl Files {
    /// Confines the calling thread, and the threads it makes from now on, to the files `config` names, if `config` asks
    /// for it. `own_sockets` are removed when the process ends. A second call checks that nothing else is wanted.
    ///
    /// # Errors
    /// If Landlock is missing, a file is not there, or other rules bind the process already.
    pub fn confine(&mut self, config: &VmConfig, own_sockets: &[PathBuf]) -> Result<(), LandlockError> {
        let wanted = rules(config, own_sockets);
        if let Some(bound) = &self.rules {
            let other = wanted.into_iter().find(|w| !bound.iter().any(|b| (&b.path, b.need) == (&w.path, w.need)));
            return other.map_or(Ok(()), |Rule { path, what, .. }| Err(LandlockError::Bound { what, path }));
        }
        if config.landlock_enable {
            restrict(&wanted)?;
            self.rules = Some(wanted);
        }
        Ok(())
    }
}

fn restrict(rules: &[Rule]) -> Result<(), LandlockError> {
    let mut ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::HardRequirement)
        .handle_access(AccessFs::from_all(ABI::V1))
        .map_err(LandlockError::Missing)?
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(WANTED))?
        .handle_access(AccessNet::from_all(WANTED))?
        .scope(Scope::from_all(WANTED))?
        .create()
        .map_err(LandlockError::Missing)?;
    for Rule { path, need, what } in rules {
        let fail = |source| LandlockError::Path { what, path: path.clone(), source };
        let directory = std::fs::metadata(path).map_err(fail)?.is_dir();
        let fd = PathFd::new(path).map_err(|e| fail(io::Error::other(e)))?;
        // The crate would take the rest away itself, and call that enforced in part.
        let access = if directory { need.access() } else { need.access() & AccessFs::from_file(WANTED) };
        ruleset = ruleset.add_rule(PathBeneath::new(fd, access))?;
    }
    let status = ruleset.restrict_self()?;
    log::info!("confined to {} paths with Landlock ({:?})", rules.len(), status.ruleset);
    debug_assert_ne!(status.ruleset, RulesetStatus::NotEnforced, "version 1 is required");
    Ok(())
}

/// Everything the machine needs, also when it boots again.
fn rules(config: &VmConfig, own_sockets: &[PathBuf]) -> Vec<Rule> {
    let mut rules = Vec::new();
    let mut add = |what, path: &Path, need| rules.push(Rule { path: path.to_owned(), need, what });
    // Descriptors' names for the graphics device, and a panic's backtrace.
    add("/proc/self", Path::new("/proc/self"), Need::Read);
    if let Some(payload) = &config.payload {
        payload.kernel.iter().for_each(|path| add("payload.kernel", path, Need::Read));
        payload.initramfs.iter().for_each(|path| add("payload.initramfs", path, Need::Read));
    }
    for disk in &config.disks {
        add("disks", &disk.path, if disk.readonly { Need::Read } else { Need::Write });
    }
    for pmem in &config.pmem {
        add("pmem", &pmem.file, if pmem.discard_writes { Need::Read } else { Need::Write });
    }
    add("rng.src", &config.rng.src, Need::Read);
    for (what, stream) in [("serial", &*config.serial), ("console", &config.console)] {
        match (stream.mode, &stream.file) {
            // Its file is there by now: the stream has been opened.
            (ConsoleMode::File, Some(file)) => add(what, file, Need::Write),
            (ConsoleMode::Pty, _) => {
                add(what, Path::new("/dev/ptmx"), Need::Write);
                add(what, Path::new("/dev/pts"), Need::Write);
            }
            _ => {}
        }
    }
    config.vsock.iter().for_each(|vsock| add("vsock.socket", parent(&vsock.socket), Need::Sockets));
    config.net.iter().filter_map(|net| net.socket.as_ref()).for_each(|path| add("net.socket", path, Need::Write));
    if config.net.iter().any(|net| net.tap.is_some()) {
        add("net.tap", Path::new("/dev/net/tun"), Need::Write);
    }
    config.gpu.iter().filter_map(|gpu| gpu.wayland.as_ref()).for_each(|path| add("gpu", path, Need::Write));
    if !config.gpu.is_empty() {
        // The socket between the engine and its relay has a name there for a moment.
        add("gpu", &std::env::temp_dir(), Need::Sockets);
    }
    own_sockets.iter().for_each(|socket| add("--api-socket", parent(socket), Need::Sockets));
    for rule in &config.landlock_rules {
        let need = match rule.access {
            LandlockAccess::Read => Need::Read,
            LandlockAccess::Write => Need::WriteOnly,
            LandlockAccess::ReadWrite => Need::Write,
        };
        add("landlock_rules", &rule.path, need);
    }
    rules
}

fn parent(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(dir: &Path, extra: &str) -> VmConfig {
        let d = dir.display();
        let text = format!(
            r#"{{"payload":{{"kernel":"{d}/kernel"}},"landlock_enable":true,"console":{{"mode":"Null"}},
                "disks":[{{"path":"{d}/disk","readonly":true}}],"vsock":{{"cid":3,"socket":"{d}/run/vsock"}}{extra}}}"#
        );
        VmConfig::from_json(text.as_bytes()).unwrap()
    }

    fn files() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for name in ["kernel", "disk", "other"] {
            std::fs::write(dir.path().join(name), name).unwrap();
        }
        std::fs::create_dir(dir.path().join("run")).unwrap();
        dir
    }

    #[test]
    fn each_part_of_the_configuration_has_its_rule() {
        let config = config(Path::new("/d"), r#","landlock_rules":[{"path":"/x","access":"rw"}]"#);
        let rules = rules(&config, &["/a/api".into()]);
        let need = |path: &str| rules.iter().find(|r| r.path == Path::new(path)).map(|r| r.need);
        assert_eq!(need("/d/kernel"), Some(Need::Read));
        assert_eq!(need("/d/disk"), Some(Need::Read));
        assert_eq!(need("/d/run"), Some(Need::Sockets));
        assert_eq!(need("/a"), Some(Need::Sockets));
        assert_eq!(need("/x"), Some(Need::Write));
        assert_eq!(need("/dev/urandom"), Some(Need::Read));
        assert_eq!(parent(Path::new("api")), Path::new("."));
    }

    /// Needs a kernel with Landlock to show more than the error without it.
    #[test]
    fn what_is_not_named_cannot_be_opened_or_the_error_says_that_landlock_is_missing() {
        let dir = files();
        let path = dir.path().to_owned();
        // The rules bind the thread, so it is one of the test's own.
        let run = move || {
            let mut files = Files::default();
            match files.confine(&config(&path, ""), &[]) {
                Ok(()) => {}
                Err(e @ LandlockError::Missing(_)) => {
                    assert!(e.to_string().contains("no Landlock"));
                    return;
                }
                Err(e) => panic!("{e}"),
            }
            let refused = |path: PathBuf| std::fs::File::options().write(true).open(path).unwrap_err().kind();
            assert_eq!(std::fs::read(path.join("kernel")).unwrap(), b"kernel");
            assert_eq!(refused(path.join("kernel")), io::ErrorKind::PermissionDenied);
            assert_eq!(std::fs::read(path.join("other")).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
            let socket = path.join("run/vsock");
            drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
            std::fs::remove_file(&socket).unwrap();
            files.confine(&config(&path, ""), &[]).unwrap();
            let more = config(&path, r#","initramfs":1,"pmem":[{"file":"/other","discard_writes":true}]"#);
            let error = files.confine(&more, &[]).unwrap_err().to_string();
            assert!(error.contains("/other") && error.contains("another VMM"), "{error}");
        };
        std::thread::spawn(run).join().unwrap();
    }

    #[test]
    fn a_file_that_is_not_there_is_named() {
        let dir = files();
        std::fs::remove_file(dir.path().join("disk")).unwrap();
        let path = dir.path().to_owned();
        let error = std::thread::spawn(move || Files::default().confine(&config(&path, ""), &[]).unwrap_err());
        let error = error.join().unwrap().to_string();
        assert!(error.contains("/disk") || error.contains("no Landlock"), "{error}");
    }

    #[test]
    fn nothing_happens_unless_asked_for() {
        Files::default().confine(&VmConfig::default(), &[]).unwrap();
    }
}
