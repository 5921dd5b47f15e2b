//! Files that the user picks: org.freedesktop.impl.portal.FileChooser, answered with the desktop's org.freedesktop.portal.FileChooser.

use zbus::zvariant::{DeserializeDict, SerializeDict, Type};

use super::{
    Portals,
    desktop::{self, Answer, Desktop, DesktopError, TOKEN},
    files::{self, Access, FilesError, Place},
    text::{shown, title},
};
use crate::policy::Service;

/// The interface of the back-end.
pub const INTERFACE: &str = "org.freedesktop.impl.portal.FileChooser";

/// The desktop's.
const DESKTOP: &str = "org.freedesktop.portal.FileChooser";

/// How many of each a dialog can have; what is more is left out.
const MOST_FILTERS: usize = 64;
const MOST_PATTERNS: usize = 256;
const MOST_CHOICES: usize = 16;
const MOST_OPTIONS: usize = 64;
const MOST_FILES: usize = 256;

/// Longest name of a file, in bytes: NAME_MAX of Linux.
const LONGEST_NAME: usize = 255;

/// Our own question in the dialog: whether the application may change what is picked. No guest can ask it.
const WRITE: &str = "spectrum-write";
const WRITE_LABEL: &str = "The application may change it";

/// A name and patterns: of names (0) or MIME types (1).
type Filter = (String, Vec<(u32, String)>);
/// Identifier, label, options with label, and which is chosen. No options: yes or no.
type Choice = (String, String, Vec<(String, String)>, String);

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    OpenFile,
    SaveFile,
    SaveFiles,
}

impl Method {
    /// By the member's name.
    pub fn named(member: &str) -> Option<Self> {
        [Self::OpenFile, Self::SaveFile, Self::SaveFiles].into_iter().find(|method| method.name() == member)
    }

    fn name(self) -> &'static str {
        match self {
            Self::OpenFile => "OpenFile",
            Self::SaveFile => "SaveFile",
            Self::SaveFiles => "SaveFiles",
        }
    }
}

/// The options that are known. They are the same for the back-end and for the desktop, but for the paths, which are the guest's and are
/// not passed on.
#[derive(Debug, Default, PartialEq, DeserializeDict, SerializeDict, Type)]
#[zvariant(signature = "dict")]
pub struct Options {
    handle_token: Option<String>,
    accept_label: Option<String>,
    modal: Option<bool>,
    multiple: Option<bool>,
    directory: Option<bool>,
    filters: Option<Vec<Filter>>,
    current_filter: Option<Filter>,
    choices: Option<Vec<Choice>>,
    current_name: Option<String>,
    files: Option<Vec<Vec<u8>>>,
}

/// What the desktop answers, and the guest is answered.
#[derive(Debug, Default, PartialEq, DeserializeDict, SerializeDict, Type)]
#[zvariant(signature = "dict")]
pub struct Results {
    uris: Option<Vec<String>>,
    choices: Option<Vec<(String, String)>>,
    current_filter: Option<Filter>,
    writable: Option<bool>,
}

/// Why nothing was picked.
#[derive(Debug, thiserror::Error)]
pub enum ChooserError {
    #[error(transparent)]
    Desktop(#[from] DesktopError),
    #[error(transparent)]
    Files(#[from] FilesError),
    #[error("the desktop's dialog gave {0:?}, which is no file of this machine")]
    Uri(String),
}

impl Options {
    /// What may be passed on to the desktop.
    fn checked(self, method: Method) -> Self {
        let open = method == Method::OpenFile;
        let mut choices: Vec<Choice> = self.choices.unwrap_or_default().into_iter().filter_map(choice).collect();
        choices.truncate(MOST_CHOICES);
        if open {
            choices.push((WRITE.into(), WRITE_LABEL.into(), Vec::new(), "false".into()));
        }
        let filters =
            self.filters.map(|filters| filters.into_iter().take(MOST_FILTERS).map(filter).collect::<Vec<_>>());
        // One that is not offered is refused by the desktop.
        let current = self.current_filter.map(filter);
        let current = current.filter(|one| filters.as_ref().is_none_or(|all| all.contains(one)));
        let names = self.files.map(|names| names.into_iter().filter_map(file_name).take(MOST_FILES).collect());
        Self {
            handle_token: Some(TOKEN.into()),
            accept_label: self.accept_label.map(|label| shown(&label)),
            modal: self.modal,
            multiple: self.multiple.filter(|_| open),
            directory: self.directory.filter(|_| open),
            filters: filters.filter(|all| !all.is_empty()),
            current_filter: current,
            choices: Some(choices).filter(|all| !all.is_empty() && method != Method::SaveFiles),
            current_name: self.current_name.filter(|_| method == Method::SaveFile).map(|name| last_part(&name)),
            files: names.filter(|_| method == Method::SaveFiles),
        }
    }
}

fn filter((name, patterns): Filter) -> Filter {
    let patterns = patterns.into_iter().filter(|(kind, _)| *kind <= 1).take(MOST_PATTERNS);
    (shown(&name), patterns.map(|(kind, pattern)| (kind, shown(&pattern))).collect())
}

fn choice((id, label, options, chosen): Choice) -> Option<Choice> {
    let options = options.into_iter().take(MOST_OPTIONS).map(|(id, label)| (id, shown(&label))).collect();
    (id != WRITE).then(|| (id, shown(&label), options, chosen))
}

/// What a dialog can suggest as a file's name.
fn last_part(name: &str) -> String {
    shown(name).rsplit('/').next().unwrap_or_default().to_owned()
}

/// A name of a file as D-Bus has them: bytes with a zero at the end.
fn file_name(mut name: Vec<u8>) -> Option<Vec<u8>> {
    if name.last() != Some(&0) {
        name.push(0);
    }
    let text = name.get(..name.len().saturating_sub(1)).unwrap_or_default();
    let wrong = text.is_empty() || text.len() > LONGEST_NAME || [&b"."[..], b".."].contains(&text);
    (!wrong && !text.iter().any(|byte| *byte == b'/' || byte.is_ascii_control())).then_some(name)
}

/// Lets the user pick, and grants what was picked. None if the user did not want to. `window` and `asked` are the guest's: what the dialog
/// belongs to, and its title.
pub fn choose(
    portals: &Portals,
    desktop: &Desktop,
    root: &str,
    method: Method,
    (window, asked): (&str, &str),
    options: Options,
) -> Result<Option<Results>, ChooserError> {
    let title = title(portals.app(), asked);
    let window = desktop::parent(window);
    let answer = desktop.request::<Results>(DESKTOP, method.name(), window, &title, &options.checked(method))?;
    let mut results = match answer {
        Answer::Done(results) => results,
        Answer::Cancelled => return Ok(None),
        Answer::Other => return Err(DesktopError::Gone.into()),
    };
    let mut choices = results.choices.take().unwrap_or_default();
    let writable = choices.iter().any(|(id, chosen)| id == WRITE && chosen == "true");
    choices.retain(|(id, _)| id != WRITE);
    let access = match (method, writable) {
        (Method::OpenFile, false) => Access::Read,
        (Method::OpenFile, true) => Access::Write,
        (Method::SaveFile | Method::SaveFiles, _) => Access::Create,
    };
    let mut uris = Vec::new();
    for uri in results.uris.unwrap_or_default() {
        let path = files::path_of_uri(&uri).ok_or(ChooserError::Uri(uri))?;
        let place = Place::find(&path)?;
        let target = place.path().display().to_string();
        if !portals.point.decide_chosen(Service::Files, &target).allowed {
            return Err(FilesError::Denied(target).into());
        }
        uris.push(files::uri_in_guest(root, &portals.files.give(&place, access)?));
    }
    Ok(Some(Results {
        uris: Some(uris),
        choices: Some(choices),
        current_filter: results.current_filter,
        writable: Some(access != Access::Read),
    }))
}
