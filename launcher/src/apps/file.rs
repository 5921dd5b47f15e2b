//! An app file: what one application may use, in TOML.

use std::{
    collections::BTreeMap,
    fmt,
    num::NonZeroU8,
    path::{Path, PathBuf},
    str::FromStr,
};

use serde::{Deserialize, Serialize};
use toml::de::DeTable;
use vmm_config::keyvalue::{nearest, parse_size};

use crate::{home::is_name, policy::Service, text::Mistake};

/// Every key of an app file.
const KEYS: [&str; 13] = [
    "template",
    "command",
    "mime",
    "memory",
    "cpus",
    "persist",
    "shares",
    "network",
    "clipboard",
    "sound",
    "gpu",
    "wayland",
    "services",
];

/// An application. A file that says nothing describes one that has nothing but its windows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct App {
    /// Template it runs from; else what `run` chooses.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub template: Option<Name>,
    /// Program in the VM and its arguments; else the program that is called like the app.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub command: Vec<String>,
    /// MIME types of files that it opens, and x-scheme-handler/SCHEME of URLs.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub mime: Vec<Mime>,
    /// Memory of the VM.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<Size>,
    /// Virtual CPUs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpus: Option<NonZeroU8>,
    /// Name of a home directory that is kept; else it is gone with the VM.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub persist: Option<Name>,
    /// Files and directories of the host that are there from the start.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub shares: Vec<Share>,
    /// What it can connect to.
    pub network: Network,
    /// Whether it shares the clipboard with the desktop.
    pub clipboard: Clipboard,
    /// Whether it can be heard.
    pub sound: bool,
    /// How it draws.
    pub gpu: Gpu,
    /// Whether it has windows.
    pub wayland: bool,
    /// What it offers to other apps: the command in its VM of each service.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub services: BTreeMap<Name, ServiceCommand>,
}

impl Default for App {
    fn default() -> Self {
        Self {
            template: None,
            command: Vec::new(),
            mime: Vec::new(),
            memory: None,
            cpus: None,
            persist: None,
            shares: Vec::new(),
            network: Network::None,
            clipboard: Clipboard::Allow,
            sound: false,
            gpu: Gpu::CrossDomain,
            wayland: true,
            services: BTreeMap::new(),
        }
    }
}

/// A program in the VM and its arguments.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<String>", into = "Vec<String>")]
pub struct ServiceCommand(Vec<String>);

impl TryFrom<Vec<String>> for ServiceCommand {
    type Error = String;

    fn try_from(command: Vec<String>) -> Result<Self, String> {
        match command.first() {
            Some(program) if !program.is_empty() => Ok(Self(command)),
            _ => Err("a service is a program and its arguments, such as [\"cat\"]".into()),
        }
    }
}

impl From<ServiceCommand> for Vec<String> {
    fn from(command: ServiceCommand) -> Self {
        command.0
    }
}

/// A name that is also a file's.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Name(String);

impl TryFrom<String> for Name {
    type Error = String;

    fn try_from(name: String) -> Result<Self, String> {
        let wrong = || format!("{name:?} is no name: use letters, digits, '-', '_' and '.', at most 64, not '.' first");
        if is_name(&name) { Ok(Self(name)) } else { Err(wrong()) }
    }
}

impl From<Name> for String {
    fn from(name: Name) -> Self {
        name.0
    }
}

/// A MIME type, without parameters.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mime(String);

impl TryFrom<String> for Mime {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        // RFC 6838 section 4.2.
        let is_part = |part: &str| {
            part.starts_with(|c: char| c.is_ascii_alphanumeric())
                && part.chars().all(|c| c.is_ascii_alphanumeric() || "!#$&-^_.+".contains(c))
        };
        match text.split_once('/') {
            Some((one, other)) if is_part(one) && is_part(other) => Ok(Self(text)),
            _ => {
                Err(format!("{text:?} is no MIME type: write one such as \"text/plain\" or \"x-scheme-handler/https\""))
            }
        }
    }
}

impl From<Mime> for String {
    fn from(mime: Mime) -> Self {
        mime.0
    }
}

impl std::ops::Deref for Mime {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

/// A number of bytes as the VMM takes it, such as `512M`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Size(String);

impl TryFrom<String> for Size {
    type Error = String;

    fn try_from(size: String) -> Result<Self, String> {
        match parse_size(&size) {
            Some(1..) => Ok(Self(size.trim().to_owned())),
            _ => Err(format!("{size:?} is no size: write one such as \"512M\" or \"2G\"")),
        }
    }
}

impl From<Size> for String {
    fn from(size: Size) -> Self {
        size.0
    }
}

/// A file or directory of the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Share {
    /// Absolute, or below the user's home with `~/`.
    pub path: SharePath,
    /// Whether the application may change it.
    #[serde(default)]
    pub write: bool,
}

/// Where something shared is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SharePath(String);

impl TryFrom<String> for SharePath {
    type Error = String;

    fn try_from(path: String) -> Result<Self, String> {
        if path.starts_with('/') || path.starts_with("~/") {
            Ok(Self(path))
        } else {
            Err(format!("{path:?} must be an absolute path or begin with ~/"))
        }
    }
}

impl SharePath {
    /// Where it is, if `~` is `home`. Nothing if that is needed and not known.
    pub fn below(&self, home: Option<&Path>) -> Option<PathBuf> {
        match self.0.strip_prefix("~/") {
            Some(rest) => home.map(|home| home.join(rest)),
            None => Some(self.0.clone().into()),
        }
    }
}

impl From<SharePath> for String {
    fn from(path: SharePath) -> Self {
        path.0
    }
}

/// What an application can connect to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Network {
    /// Nothing; the VM has no interface.
    None,
    /// The internet, not the host and not other VMs.
    Internet,
    /// One TCP port of the host.
    Host(u16),
}

impl TryFrom<String> for Network {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let port = |text: &str| text.strip_prefix("host:")?.parse().ok().filter(|port| *port > 0);
        match text.as_str() {
            "none" => Ok(Self::None),
            "internet" => Ok(Self::Internet),
            text => port(text).map(Self::Host).ok_or_else(|| {
                format!("{text:?} is no network: write \"none\", \"internet\" or \"host:PORT\" with a number for PORT")
            }),
        }
    }
}

impl FromStr for Network {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        text.to_owned().try_into()
    }
}

impl From<Network> for String {
    fn from(network: Network) -> Self {
        network.to_string()
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::Internet => f.write_str("internet"),
            Self::Host(port) => write!(f, "host:{port}"),
        }
    }
}

/// Whether the clipboard is shared with the desktop.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Clipboard {
    /// As for any window of the desktop: the one that has the focus.
    Allow,
    /// After a question.
    Ask,
    /// Not at all.
    Deny,
}

/// How an application draws.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Gpu {
    /// By the VM's processors, into buffers that the desktop shows.
    CrossDomain,
}

impl App {
    /// Reads an app file.
    pub fn parse(path: &Path, text: &str) -> Result<Self, Mistake> {
        let wrong = |error: toml::de::Error| Mistake::toml(path, text, &error);
        let table = DeTable::parse(text).map_err(wrong)?;
        // The first one in the file, whatever the order of the table is.
        let unknown = table.get_ref().keys().filter(|key| !KEYS.contains(&key.get_ref().as_ref()));
        if let Some(key) = unknown.min_by_key(|key| key.span().start) {
            let name = key.get_ref().as_ref();
            let message = match nearest(name, KEYS) {
                Some(right) => format!("unknown key {name:?}: did you mean {right:?}?"),
                None => format!("unknown key {name:?}; known are {}", KEYS.join(", ")),
            };
            return Err(Mistake::at(path, text, key.span().start, message));
        }
        toml::from_str(text).map_err(wrong)
    }

    /// What this file asks for that does not exist yet: the key, and what is not there. Nothing of it may be left out
    /// silently: an application would lose what it should keep, or a limit that its user relies on would not hold.
    pub fn not_yet(&self) -> Option<(&'static str, &'static str)> {
        let asked = [
            (
                self.clipboard != Clipboard::Allow,
                "clipboard",
                "the clipboard cannot be withheld from windows of a VM yet",
            ),
            (self.sound, "sound", "VMs have no sound yet"),
        ];
        asked.into_iter().find_map(|(asked, key, why)| asked.then_some((key, why)))
    }

    /// What of this file the policy has to allow: the key, and what is asked of it.
    pub fn asks(&self) -> Vec<(&'static str, Service, String)> {
        let network = (self.network != Network::None).then(|| ("network", Service::Network, self.network.to_string()));
        let sound = self.sound.then(|| ("sound", Service::Sound, "-".to_owned()));
        network.into_iter().chain(sound).collect()
    }

    /// The text of a file that describes this application.
    pub fn to_toml(&self) -> Result<String, toml::ser::Error> {
        toml::to_string(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<App, Mistake> {
        App::parse(Path::new("foot.toml"), text)
    }

    /// An app that uses every key.
    fn full() -> App {
        App {
            template: Some(Name("web".into())),
            command: vec!["firefox".into(), "--new".into()],
            mime: vec![Mime("text/html".into()), Mime("x-scheme-handler/https".into())],
            memory: Some(Size("2G".into())),
            cpus: NonZeroU8::new(2),
            persist: Some(Name("work".into())),
            shares: vec![Share { path: SharePath("~/Downloads".into()), write: true }],
            network: Network::Host(8080),
            clipboard: Clipboard::Ask,
            sound: true,
            gpu: Gpu::CrossDomain,
            wayland: false,
            services: [(Name("ssh-agent".into()), ServiceCommand(vec!["cat".into()]))].into(),
        }
    }

    #[test]
    fn nothing_said_is_the_safe_default() {
        let app = parse("# nothing\n").unwrap();
        assert_eq!(app, App::default());
        assert!(app.shares.is_empty() && app.network == Network::None && !app.sound && app.persist.is_none());
        assert_eq!(app.not_yet(), None);
    }

    #[test]
    fn every_key_is_read_and_written() {
        let text = full().to_toml().unwrap();
        assert_eq!(parse(&text).unwrap(), full());
        let table: toml::Table = text.parse().unwrap();
        let mut keys: Vec<&str> = table.keys().map(String::as_str).collect();
        let mut known = KEYS.to_vec();
        keys.sort_unstable();
        known.sort_unstable();
        assert_eq!(keys, known);
    }

    #[test]
    fn mistakes_have_a_place_and_a_remedy() {
        let table: &[(&str, &str)] = &[
            ("memry = \"1G\"", "1:1: unknown key \"memry\": did you mean \"memory\"?"),
            ("cpus = 1\n  comand = [\"a\"]", "2:3: unknown key \"comand\": did you mean \"command\"?"),
            ("xyzxyz = 1", "1:1: unknown key \"xyzxyz\"; known are template, command"),
            ("cpus = 0", "1:8: "),
            ("cpus = 256", "1:8: "),
            ("cpus = \"two\"", "1:8: invalid type: string \"two\""),
            ("memory = \"lots\"", "1:10: \"lots\" is no size: write one such as \"512M\""),
            ("mime = [\"text\"]", "\"text\" is no MIME type: write one such as"),
            ("mime = [\"text/*\"]", "\"text/*\" is no MIME type"),
            ("memory = \"0\"", "1:10: \"0\" is no size"),
            ("memory = 512", "1:10: invalid type: integer"),
            ("\ntemplate = \"../x\"", "2:12: \"../x\" is no name"),
            ("persist = \"a/b\"", "1:11: \"a/b\" is no name"),
            ("network = \"lan\"", "1:11: \"lan\" is no network: write \"none\""),
            ("network = \"host:0\"", "1:11: \"host:0\" is no network"),
            ("network = \"host:65536\"", "1:11: "),
            ("clipboard = \"maybe\"", "1:13: unknown variant `maybe`"),
            ("gpu = \"fast\"", "1:7: unknown variant `fast`"),
            ("sound = \"yes\"", "1:9: invalid type"),
            ("command = \"foot\"", "1:11: invalid type: string \"foot\""),
            ("shares = [{ path = \"x\" }]", "\"x\" must be an absolute path"),
            ("shares = [{ path = \"/x\", writ = true }]", "unknown field `writ`"),
            ("cpus = 1\ncpus = 2", "2:1: duplicate key"),
            ("cpus = ", "1:8: "),
            ("[[command]]", "1:"),
            ("[services]\nssh-agent = []", "2:13: a service is a program"),
            ("[services]\nssh-agent = [\"\"]", "2:13: a service is a program"),
            ("[services]\n\"a:b\" = [\"cat\"]", "\"a:b\" is no name"),
        ];
        for (text, expected) in table {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.starts_with("foot.toml:") && error.contains(expected), "{text:?}: {error}");
            assert!(!error.contains('\n'), "{error:?}");
        }
    }

    #[test]
    fn what_reaches_beyond_the_vm_is_asked_for() {
        assert_eq!(App::default().asks(), []);
        let asked = [("network", Service::Network, "host:8080".to_owned()), ("sound", Service::Sound, "-".to_owned())];
        assert_eq!(full().asks(), asked);
    }

    #[test]
    fn what_does_not_exist_yet_is_named() {
        let table =
            [("clipboard = \"ask\"", "clipboard"), ("clipboard = \"deny\"", "clipboard"), ("sound = true", "sound")];
        for (text, key) in table {
            assert_eq!(parse(text).unwrap().not_yet().unwrap().0, key, "{text}");
        }
        let harmless = "network = \"none\"\nclipboard = \"allow\"\nsound = false\npersist = \"web\"\nshares = [{ path = \"~/x\" }]\ngpu = \"cross-domain\"";
        assert_eq!(parse(harmless).unwrap().not_yet(), None);
    }

    #[test]
    fn the_documentation_shows_every_key_and_can_be_used() {
        let text = include_str!("../../../docs/launcher.md");
        let example = text.split("```toml\n").nth(1).and_then(|rest| rest.split("```").next()).unwrap();
        let app = parse(example).unwrap();
        assert_eq!((app.command.len(), &app.memory, app.not_yet()), (2, &Some(Size("2G".into())), None));
        let said = |key: &&str| {
            let shown = |line: &str| line.starts_with(&format!("{key} =")) || line.starts_with(&format!("[{key}]"));
            example.lines().any(|line| shown(line.trim_start_matches("# ")))
        };
        assert!(KEYS.iter().all(said), "{example}");
        // What it shows in comments is right, too.
        assert!(parse("shares = [{ path = \"~/Documents\", write = false }]\npersist = \"web\"").is_ok());
    }
}
