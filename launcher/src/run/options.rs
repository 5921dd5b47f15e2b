//! From the command line and the environment to everything a VM needs, checked before anything is started.

use std::{
    collections::BTreeMap,
    env,
    ffi::{OsStr, OsString},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::Duration,
};

use super::{
    grants::{self, Grant, GrantError},
    state::About,
};
use crate::{
    apps::Network,
    cli::{RunOptions, WarmOptions},
    home::{Home, is_name},
    template::{self, Template, TemplateError},
};

/// The template used when none is named.
const DEFAULT_TEMPLATE: &str = "default";

/// Memory and virtual CPUs where neither the command line nor an app file says how much.
const DEFAULT_MEMORY: &str = "512M";
const DEFAULT_CPUS: u8 = 1;

/// What Spectrum OS gives each of its machines.
const FOREIGN_MEMORY: &str = "1G";
/// The app of a program whose name cannot be one.
const UNNAMED: &str = "unnamed";

/// What is wrong with the command line or the environment.
#[derive(Debug, thiserror::Error)]
pub enum OptionsError {
    #[error(transparent)]
    Template(#[from] TemplateError),
    #[error(transparent)]
    Grant(#[from] GrantError),
    #[error("there is no template yet: make one with `{0}`")]
    NoTemplate(&'static str),
    #[error("there are several templates ({0}): name one with --template")]
    WhichTemplate(String),
    #[error("spectrum-vmm was not found next to this program or in PATH: name it with --vmm or SPECTRUM_VMM")]
    NoVmm,
    #[error("there is no VMM at {0}")]
    VmmMissing(PathBuf),
    #[error("no Wayland compositor: WAYLAND_DISPLAY is not set; use --no-wayland for an application without windows")]
    NoWayland,
    #[error("the Wayland compositor at {path} does not answer ({source}): use --no-wayland without one")]
    WaylandDead { path: PathBuf, source: std::io::Error },
    #[error("{0} cannot be part of the VMM's options because it contains {1:?}")]
    Character(PathBuf, char),
    #[error("the template {0} runs its own application: it takes no arguments, --env and --cwd")]
    Foreign(String),
    #[error("--env {0:?} is not NAME=VALUE")]
    Environment(String),
}

/// What a VM is started with.
#[derive(Clone, Debug)]
pub struct Settings {
    /// What is written down about it.
    pub about: About,
    /// Files and folders it may use from the start.
    pub grants: Vec<Grant>,
    /// The template.
    pub template: Template,
    /// The VMM's program.
    pub vmm: PathBuf,
    /// The compositor's socket.
    pub wayland: Option<PathBuf>,
    /// Value of the VMM's --memory.
    pub memory: String,
    /// Value of the VMM's --cpus.
    pub cpus: u8,
    /// Host name of the guest.
    pub hostname: String,
    /// Environment of the application, beside what the agent sets.
    pub environment: BTreeMap<String, String>,
    /// What it can connect to.
    pub network: Network,
    /// Further arguments of the VMM.
    pub vmm_arguments: Vec<OsString>,
    /// Show the VMM's and the guest's messages.
    pub debug: bool,
    /// How long the guest may take until its agent is ready.
    pub boot_timeout: Duration,
}

impl Settings {
    /// Checks everything that can be checked beforehand.
    pub fn new(home: &Home, options: &RunOptions) -> Result<Self, OptionsError> {
        let template = template::open(home, &template_name(home, options.template.as_deref())?)?;
        check_key_value(&template.folder)?;
        if template.is_foreign() && (options.command.len() > 1 || !options.env.is_empty() || options.cwd.is_some()) {
            return Err(OptionsError::Foreign(name_of(&template)));
        }
        let wayland = if options.no_wayland { None } else { Some(wayland_socket(options.wayland.as_deref())?) };
        let program = options.command.first().map(Path::new).and_then(Path::file_name).unwrap_or_default();
        let hostname = hostname(program);
        let memory = if template.is_foreign() { FOREIGN_MEMORY } else { DEFAULT_MEMORY };
        let grants = grants_of(options);
        grants::check(&grants)?;
        Ok(Self {
            about: About {
                name: options.place.name.clone(),
                app: options.app.clone().unwrap_or_else(|| app_of(program)),
                services: options.services.clone(),
                program: hostname.clone(),
                template: name_of(&template),
                command: options.command.clone(),
                persist: options.place.persist.clone(),
            },
            grants,
            template,
            vmm: find_vmm(options.vmm.as_deref())?,
            wayland,
            memory: options.memory.clone().unwrap_or_else(|| memory.to_owned()),
            cpus: options.cpus.unwrap_or(DEFAULT_CPUS),
            hostname,
            environment: environment(&options.env)?,
            network: options.network.unwrap_or(Network::None),
            vmm_arguments: options.vmm_arg.clone(),
            debug: options.debug,
            boot_timeout: Duration::from_secs(options.boot_timeout),
        })
    }
}

impl Settings {
    /// What a template is warmed with. No compositor is needed for that.
    pub fn to_warm(home: &Home, options: &WarmOptions) -> Result<Self, OptionsError> {
        let template = template::open(home, &options.name)?;
        check_key_value(&template.folder)?;
        if template.is_foreign() {
            return Err(TemplateError::Foreign(options.name.clone()).into());
        }
        Ok(Self {
            about: About {
                name: None,
                app: UNNAMED.into(),
                services: BTreeMap::new(),
                program: "template".into(),
                template: name_of(&template),
                command: Vec::new(),
                persist: None,
            },
            grants: Vec::new(),
            template,
            vmm: find_vmm(options.vmm.as_deref())?,
            wayland: (!options.no_wayland).then(|| "/run/no-compositor".into()),
            memory: options.memory.clone(),
            cpus: options.cpus,
            hostname: "template".into(),
            environment: BTreeMap::new(),
            network: Network::None,
            vmm_arguments: Vec::new(),
            debug: false,
            boot_timeout: Duration::from_secs(options.boot_timeout),
        })
    }

    /// Why this VM cannot be a clone; nothing if it can.
    pub fn boots_because(&self) -> Option<&'static str> {
        if self.debug {
            return Some("--debug shows how it boots");
        }
        (!self.vmm_arguments.is_empty()).then_some("a clone's VMM takes no --vmm-arg")
    }
}

/// What the command line and the app's file grant.
pub fn grants_of(options: &RunOptions) -> Vec<Grant> {
    let named = options.place.grant.iter().map(|text| Grant::parse(text));
    options.place.shares.iter().cloned().chain(named).collect()
}

fn name_of(template: &Template) -> String {
    template.folder.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn template_name(home: &Home, named: Option<&str>) -> Result<String, OptionsError> {
    if let Some(name) = named {
        return Ok(name.to_owned());
    }
    let mut names = template::names(home)?;
    match names.as_mut_slice() {
        [] => Err(OptionsError::NoTemplate(template::HOW_TO_BUILD)),
        [only] => Ok(std::mem::take(only)),
        several if several.iter().any(|name| name == DEFAULT_TEMPLATE) => Ok(DEFAULT_TEMPLATE.to_owned()),
        several => Err(OptionsError::WhichTemplate(several.join(", "))),
    }
}

pub fn find_vmm(named: Option<&Path>) -> Result<PathBuf, OptionsError> {
    const NAME: &str = "spectrum-vmm";
    if let Some(path) = named {
        let missing = || OptionsError::VmmMissing(path.to_owned());
        // A zygote is started in another folder.
        return std::path::absolute(path).ok().filter(|path| path.is_file()).ok_or_else(missing);
    }
    let beside = env::current_exe().ok().and_then(|program| Some(program.parent()?.join(NAME)));
    let path = env::var_os("PATH").unwrap_or_default();
    let candidates = beside.into_iter().chain(env::split_paths(&path).map(|folder| folder.join(NAME)));
    let mut candidates = candidates.into_iter().filter_map(|path| std::path::absolute(path).ok());
    candidates.find(|path| path.is_file()).ok_or(OptionsError::NoVmm)
}

/// The socket as libwayland finds it: an absolute name, or one below the runtime folder.
pub fn wayland_socket(named: Option<&Path>) -> Result<PathBuf, OptionsError> {
    let variable = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let path = match (named, variable("WAYLAND_DISPLAY"), variable("XDG_RUNTIME_DIR")) {
        (Some(path), _, _) => path.to_owned(),
        (None, Some(display), _) if display.is_absolute() => display,
        (None, Some(display), Some(folder)) => folder.join(display),
        _ => return Err(OptionsError::NoWayland),
    };
    check_key_value(&path)?;
    match UnixStream::connect(&path) {
        Ok(_) => Ok(path),
        Err(source) => Err(OptionsError::WaylandDead { path, source }),
    }
}

/// The VMM's options separate their keys with commas and quote with quotes.
fn check_key_value(path: &Path) -> Result<(), OptionsError> {
    match path.to_string_lossy().chars().find(|c| ",\"[]".contains(*c)) {
        Some(character) => Err(OptionsError::Character(path.to_owned(), character)),
        None => Ok(()),
    }
}

pub fn environment(pairs: &[String]) -> Result<BTreeMap<String, String>, OptionsError> {
    let pair = |text: &String| match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err(OptionsError::Environment(text.clone())),
    };
    pairs.iter().map(pair).collect()
}

/// What the policy knows a program by that no app file is for.
fn app_of(program: &OsStr) -> String {
    program.to_str().filter(|name| is_name(name)).unwrap_or(UNNAMED).to_owned()
}

/// What the program is called, as far as a host name can say it.
fn hostname(program: &OsStr) -> String {
    let allowed = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' };
    let name: String = program.to_string_lossy().chars().map(allowed).take(63).collect();
    let name = name.trim_matches('-');
    if name.is_empty() { "app".into() } else { name.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_names() {
        assert_eq!(hostname(OsStr::new("gtk3-demo")), "gtk3-demo");
        assert_eq!(hostname(OsStr::new("My App_1.0")), "my-app-1-0");
        assert_eq!(hostname(OsStr::new("..")), "app");
        assert_eq!(hostname(OsStr::new(&"a".repeat(99))).len(), 63);
        for program in ["-a-", "..", "a.b", "\u{e9}", &format!("{}-", "a".repeat(62)), &"-".repeat(99)] {
            assert!(hostname(OsStr::new(program)).parse::<guest_proto::Hostname>().is_ok(), "{program}");
        }
    }

    #[test]
    fn environment_pairs() {
        let parsed = environment(&["A=1".into(), "B=x=y".into(), "C=".into()]).unwrap();
        assert_eq!(parsed, [("A", "1"), ("B", "x=y"), ("C", "")].map(|(k, v)| (k.into(), v.into())).into());
        assert!(matches!(environment(&["A".into()]), Err(OptionsError::Environment(_))));
        assert!(matches!(environment(&["=1".into()]), Err(OptionsError::Environment(_))));
    }

    #[test]
    fn paths_that_would_be_read_as_keys_are_refused() {
        assert!(check_key_value(Path::new("/run/wayland-1")).is_ok());
        assert!(matches!(check_key_value(Path::new("/a,b")), Err(OptionsError::Character(_, ','))));
    }

    #[test]
    fn which_template() {
        let folder = tempfile::tempdir().unwrap();
        let home = Home::at(folder.path());
        assert!(matches!(template_name(&home, None), Err(OptionsError::NoTemplate(_))));
        assert_eq!(template_name(&home, Some("x")).unwrap(), "x");
        std::fs::create_dir_all(home.template("web").unwrap()).unwrap();
        assert_eq!(template_name(&home, None).unwrap(), "web");
        std::fs::create_dir_all(home.template("mail").unwrap()).unwrap();
        let error = template_name(&home, None).unwrap_err().to_string();
        assert!(error.contains("(mail, web)"), "{error}");
        std::fs::create_dir_all(home.template("default").unwrap()).unwrap();
        assert_eq!(template_name(&home, None).unwrap(), "default");
    }

    #[test]
    fn a_dead_compositor_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("wayland-1");
        assert!(matches!(wayland_socket(Some(&path)), Err(OptionsError::WaylandDead { .. })));
        let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        assert_eq!(wayland_socket(Some(&path)).unwrap(), path);
    }
}
