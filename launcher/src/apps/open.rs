//! Which app opens a file or URL, by its MIME type.
//!
//! Types: the desktop's shared MIME-info database. Choice: what apps declare, and the user's defaults, as in the MIME Applications
//! specification 1.0.

use std::{
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
};

use xdg_mime::SharedMimeInfo;

use super::{AppError, Entry, file::App, files, find, start_with};
use crate::{
    cli::{OpenOptions, RunOptions},
    home::HomeError,
    places::Places,
    run::grants::{Grant, GrantError, place_of},
    text::{self, TextError},
};

/// Bytes of a file that its type is guessed from.
const LOOKED_AT: u64 = 16 * 1024;

/// What nothing is known about.
const UNKNOWN: &str = "application/octet-stream";

/// Type levels above a file's own, from special to general, that are tried at most.
const LEVELS: usize = 8;

/// Why something is not opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// An app, or its file.
    #[error(transparent)]
    App(#[from] AppError),
    /// A file of ours.
    #[error(transparent)]
    Text(#[from] TextError),
    /// The user has no place for settings.
    #[error(transparent)]
    Home(#[from] HomeError),
    /// It has no name.
    #[error(transparent)]
    Grant(#[from] GrantError),
    /// There is no such file.
    #[error("cannot open {path}: {source}")]
    File {
        /// Which.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A URL of a file of another machine, or one that is no URL.
    #[error("{0} is no URL of a file of this machine")]
    FileUrl(String),
    /// Nothing declares it.
    #[error(
        "no app opens {what}, which is {kind}: name one with --app, or add {kind:?} to `mime` in an app's file (see `spectrum apps`)"
    )]
    NoApp {
        /// The file or URL.
        what: String,
        /// Its type.
        kind: String,
    },
    /// More than one does.
    #[error("{apps} open {kind}: name one with --app, or choose one with `xdg-mime default {first}.desktop {kind}`")]
    WhichApp {
        /// Their names.
        apps: String,
        /// The menu entry of the first.
        first: String,
        /// The type.
        kind: String,
    },
    /// One VM is one app.
    #[error(
        "{one} and {other} are opened by different apps, {app} and {other_app}: open them one by one, or name an app with --app"
    )]
    DifferentApps {
        /// The first file or URL.
        one: String,
        /// Its app.
        app: String,
        /// Another.
        other: String,
        /// Its app.
        other_app: String,
    },
    /// It does not exist.
    #[error("there is no app {0:?}: see `spectrum apps`")]
    Unknown(String),
}

/// A file or URL to be opened.
#[derive(Debug, PartialEq, Eq)]
enum Target {
    File(PathBuf),
    Url(String),
}

/// What `run` is told for opening these files and URLs: the app in a VM that is gone afterwards, and of the host it has those files and
/// nothing else.
pub fn to_run(places: &Places, options: &OpenOptions) -> Result<RunOptions, OpenError> {
    let targets: Vec<Target> = options.targets.iter().map(|text| target(text)).collect::<Result<_, _>>()?;
    let name = match &options.app {
        Some(name) => name.clone(),
        None => app_for_all(places, &options.targets, &targets)?,
    };
    let Entry { path, app } = find(places, &name)?.ok_or_else(|| OpenError::Unknown(name.clone()))?;
    let mut run = RunOptions::of(&name);
    start_with(&name, path, app, &mut run)?;
    for target in targets {
        match target {
            Target::Url(url) => run.command.push(url),
            Target::File(path) => {
                let grant = Grant { path, writable: options.write, called: None };
                run.command.push(place_of(&grant.name()?));
                run.place.shares.push(grant);
            }
        }
    }
    Ok(run)
}

/// What is there is a file, whatever it looks like.
fn target(text: &str) -> Result<Target, OpenError> {
    let path = Path::new(text);
    let missing = match fs::metadata(path) {
        Ok(_) => return Ok(Target::File(path.into())),
        Err(source) => source,
    };
    match scheme(text) {
        Some("file") => {
            let path = file_url(text).ok_or_else(|| OpenError::FileUrl(text.into()))?;
            match fs::metadata(&path) {
                Ok(_) => Ok(Target::File(path)),
                Err(source) => Err(OpenError::File { path, source }),
            }
        }
        Some(_) => Ok(Target::Url(text.into())),
        None => Err(OpenError::File { path: path.into(), source: missing }),
    }
}

/// RFC 3986 section 3.1.
fn scheme(text: &str) -> Option<&str> {
    let (scheme, _) = text.split_once(':')?;
    let allowed = |c: char| c.is_ascii_alphanumeric() || "+-.".contains(c);
    let is_one = scheme.starts_with(|c: char| c.is_ascii_alphabetic()) && scheme.chars().all(allowed);
    is_one.then_some(scheme)
}

/// The path of a file URL: RFC 8089.
fn file_url(url: &str) -> Option<PathBuf> {
    let rest = url.get("file:".len()..)?;
    let path = match rest.strip_prefix("//") {
        Some(rest) => rest.strip_prefix("localhost").unwrap_or(rest),
        None => rest,
    };
    if !path.starts_with('/') {
        return None;
    }
    let mut bytes = Vec::new();
    let mut rest = path.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => {
                let mut digit = || char::from(rest.next()?).to_digit(16);
                u8::try_from(digit()? * 16 + digit()?).ok()?
            }
            byte => byte,
        });
    }
    Some(<std::ffi::OsString as std::os::unix::ffi::OsStringExt>::from_vec(bytes).into())
}

fn app_for_all(places: &Places, texts: &[String], targets: &[Target]) -> Result<String, OpenError> {
    let types = Types::new(places)?;
    let mut all = texts.iter().zip(targets).map(|(text, target)| Ok((text, types.app_for(text, target)?)));
    // The command line has at least one.
    let (one, app) = all.next().unwrap_or_else(|| Err(OpenError::Unknown(String::new())))?;
    for next in all {
        let (other, other_app): (&String, String) = next?;
        if other_app != app {
            return Err(OpenError::DifferentApps { one: one.clone(), app, other: other.clone(), other_app });
        }
    }
    Ok(app)
}

/// Everything that a choice depends on.
struct Types {
    database: SharedMimeInfo,
    /// By name, without those whose files are damaged.
    apps: Vec<(String, App)>,
    /// The user's lists of defaults, the one that wins first.
    defaults: Vec<String>,
}

impl Types {
    fn new(places: &Places) -> Result<Self, OpenError> {
        let mut apps = Vec::new();
        for (name, path) in files(places)? {
            match text::read(&path).and_then(|text| Ok(App::parse(&path, &text.unwrap_or_default())?)) {
                Ok(app) => apps.push((name, app)),
                Err(error) => log::warn!("{name} opens nothing: {error}"),
            }
        }
        let lists = places.mime_lists()?.into_iter().map(|path| text::read(&path));
        let defaults = lists.filter_map(Result::transpose).collect::<Result<_, _>>()?;
        Ok(Self { database: SharedMimeInfo::new(), apps, defaults })
    }

    fn app_for(&self, text: &str, target: &Target) -> Result<String, OpenError> {
        let kind = match target {
            Target::Url(url) => format!("x-scheme-handler/{}", scheme(url).unwrap_or_default().to_ascii_lowercase()),
            Target::File(path) => self.kind_of(path)?,
        };
        let mut level = vec![kind.clone()];
        for _ in 0..LEVELS {
            for kind in &level {
                if let Some(app) = self.app_of(kind)? {
                    return Ok(app);
                }
            }
            let above = level.iter().filter_map(|kind| self.database.get_parents(&kind.parse().ok()?));
            level = above.flatten().map(|kind| kind.to_string()).collect();
            // What everything is says nothing.
            level.retain(|kind| kind != UNKNOWN);
        }
        Err(OpenError::NoApp { what: text.into(), kind })
    }

    /// The app for exactly this type.
    fn app_of(&self, kind: &str) -> Result<Option<String>, OpenError> {
        let declares = |(_, app): &&(String, App)| app.mime.iter().any(|one| one.eq_ignore_ascii_case(kind));
        let apps: Vec<&str> = self.apps.iter().filter(declares).map(|(name, _)| name.as_str()).collect();
        let entries = self.defaults.iter().flat_map(|list| defaults_in(list, kind));
        let wanted = entries.filter_map(|entry| entry.strip_prefix("spectrum-")?.strip_suffix(".desktop"));
        let chosen = wanted.into_iter().find_map(|name| apps.iter().find(|app| **app == name));
        match (chosen, apps.as_slice()) {
            (Some(app), _) => Ok(Some((*app).to_owned())),
            (None, []) => Ok(None),
            (None, [only]) => Ok(Some((*only).to_owned())),
            (None, [first, ..]) => {
                let first = format!("spectrum-{first}");
                Err(OpenError::WhichApp { apps: apps.join(", "), first, kind: kind.into() })
            }
        }
    }

    fn kind_of(&self, path: &Path) -> Result<String, OpenError> {
        let fail = |source| OpenError::File { path: path.into(), source };
        let data = fs::metadata(path).map_err(fail)?;
        if data.is_dir() {
            return Ok("inode/directory".into());
        }
        if !data.is_file() {
            return Err(fail(io::Error::new(io::ErrorKind::InvalidInput, "it is neither a file nor a folder")));
        }
        let mut begin = Vec::new();
        File::open(path).and_then(|file| file.take(LOOKED_AT).read_to_end(&mut begin)).map_err(fail)?;
        let mut guess = self.database.guess_mime_type();
        if let Some(name) = path.file_name().and_then(|name| name.to_str()) {
            guess.file_name(name);
        }
        let kind = guess.data(&begin).guess().mime_type().essence_str().to_owned();
        // The guess without a database is that the file is empty.
        let is_unknown = kind == UNKNOWN || kind == "application/x-zerosize";
        let is_text =
            !begin.contains(&0) && String::from_utf8_lossy(&begin).chars().filter(|c| *c == '\u{fffd}').count() < 2;
        Ok(if is_unknown && is_text { "text/plain".into() } else { kind })
    }
}

/// The menu entries that a list of the MIME Applications specification has as defaults for a type.
fn defaults_in<'a>(list: &'a str, kind: &str) -> Vec<&'a str> {
    let mut group = "";
    let mut found = Vec::new();
    for line in list.lines().map(str::trim) {
        if line.starts_with('[') {
            group = line;
        } else if let Some((key, value)) = line.split_once('=')
            && group == "[Default Applications]"
            && key.trim() == kind
        {
            found.extend(value.split(';').map(str::trim).filter(|entry| !entry.is_empty()));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_and_files() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("a b.txt");
        fs::write(&file, "text").unwrap();
        let path = file.display().to_string();
        assert_eq!(target(&path).unwrap(), Target::File(file.clone()));
        for begin in ["file://", "file://localhost", "file:"] {
            assert_eq!(target(&format!("{begin}{}", path.replace(' ', "%20"))).unwrap(), Target::File(file.clone()));
        }
        for url in ["https://x.org/a?b#c", "mailto:a@b", "X-Y.z+1:"] {
            assert_eq!(target(url).unwrap(), Target::Url(url.into()));
        }
        for wrong in ["file://other/etc/passwd", "file://", "file:///a%2", "file:///a%zz"] {
            assert!(matches!(target(wrong), Err(OpenError::FileUrl(_))), "{wrong}");
        }
        for missing in ["/no/such", "1:2", "a b:c", "file:///no/such"] {
            assert!(matches!(target(missing), Err(OpenError::File { .. })), "{missing}");
        }
    }

    #[test]
    fn defaults() {
        let list = "[Added Associations]\ntext/plain=a.desktop;\n[Default Applications]\n# no\ntext/plain=b.desktop;c.desktop\n\
                    text/html = d.desktop;\n[Other]\ntext/plain=e.desktop\n";
        assert_eq!(defaults_in(list, "text/plain"), ["b.desktop", "c.desktop"]);
        assert_eq!(defaults_in(list, "text/html"), ["d.desktop"]);
        assert_eq!(defaults_in(list, "text"), [""; 0]);
    }
}
