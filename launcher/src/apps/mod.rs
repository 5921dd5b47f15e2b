//! Applications: small TOML files that say what each may use, and their entries in the desktop's menu.

pub mod file;
pub mod menu;
pub mod open;

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

pub use file::Network;
use file::{App, Share};
use serde::Serialize;

use crate::{
    cli::RunOptions,
    home::{HomeError, is_name},
    places::Places,
    run::grants::Grant,
    text::{self, TextError},
};

/// What an app file's name ends with.
const SUFFIX: &str = ".toml";

/// Why an application is not known.
#[derive(Debug, thiserror::Error)]
pub enum AppError {
    /// Its file.
    #[error(transparent)]
    Text(#[from] TextError),
    /// There is no place for it.
    #[error(transparent)]
    Home(#[from] HomeError),
    /// It wants what there is not.
    #[error("{path} asks for {key}, but {why}: remove the line to run {name} without it", path = .path.display())]
    NotYet {
        /// The application.
        name: String,
        /// Its file.
        path: PathBuf,
        /// The key.
        key: &'static str,
        /// What is not there.
        why: &'static str,
    },
    /// Nothing says what `~` stands for.
    #[error("{path} shares {share}, but HOME is not set", path = .path.display())]
    NoHome {
        /// Its file.
        path: PathBuf,
        /// What it shares.
        share: String,
    },
    /// What it shares is not there.
    #[error("{path} shares {share}, which cannot be used ({source}): make it, or take it out of the file", path = .path.display(), share = .share.display())]
    NoShare {
        /// Its file.
        path: PathBuf,
        /// What it shares.
        share: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The list cannot be shown.
    #[error("cannot write the list: {0}")]
    Json(#[from] serde_json::Error),
}

/// An app file that was found.
#[derive(Debug)]
pub struct Entry {
    /// Where.
    pub path: PathBuf,
    /// What it says.
    pub app: App,
}

/// The file of an app in one of the folders.
pub fn file_in(folder: &Path, name: &str) -> PathBuf {
    folder.join(format!("{name}{SUFFIX}"))
}

/// Finds an app: the user's file wins over the system's, as a whole.
pub fn find(places: &Places, name: &str) -> Result<Option<Entry>, TextError> {
    for path in places.apps().map(|folder| file_in(&folder, name)) {
        if let Some(text) = text::read(&path)? {
            let app = App::parse(&path, &text)?;
            return Ok(Some(Entry { path, app }));
        }
    }
    Ok(None)
}

/// The apps' names, each with the file that wins.
pub fn files(places: &Places) -> Result<BTreeMap<String, PathBuf>, TextError> {
    let mut files = BTreeMap::new();
    for folder in places.apps() {
        for (name, path) in files_in(&folder)? {
            files.entry(name).or_insert(path);
        }
    }
    Ok(files)
}

/// The apps' names of one folder, each with its file.
pub fn files_in(folder: &Path) -> Result<BTreeMap<String, PathBuf>, TextError> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BTreeMap::new()),
        Err(error) => return Err(TextError::file(folder)(error)),
    };
    let mut files = BTreeMap::new();
    for entry in entries {
        let path = entry.map_err(TextError::file(folder))?.path();
        let name = path.file_name().and_then(|name| name.to_str()).and_then(|name| name.strip_suffix(SUFFIX));
        match name {
            Some(name) if is_name(name) => files.insert(name.to_owned(), path.clone()),
            // Hidden files are those of editors.
            Some(name) if name.starts_with('.') => None,
            Some(_) => {
                log::warn!("{} is not used: it is not the name of an app", path.display());
                None
            }
            None => None,
        };
    }
    Ok(files)
}

/// Fills in what the command line leaves open, if what it runs is an app.
pub fn fill_in(places: &Places, options: &mut RunOptions) -> Result<(), AppError> {
    // A path is always a program.
    let Some(name) = options.command.first().filter(|name| is_name(name)).cloned() else { return Ok(()) };
    let Some(Entry { path, app }) = find(places, &name)? else { return Ok(()) };
    options.place.persist = options.place.persist.take().or(app.persist.clone().map(String::from));
    options.place.shares = shares(places, &path, &app.shares)?;
    start_with(&name, path, app, options)
}

/// The same without what an app keeps and shares.
fn start_with(name: &str, path: PathBuf, app: App, options: &mut RunOptions) -> Result<(), AppError> {
    if let Some((key, why)) = app.not_yet() {
        return Err(AppError::NotYet { name: name.into(), path, key, why });
    }
    options.asks = app.asks();
    if !app.command.is_empty() {
        options.command.splice(..1, app.command);
    }
    options.template = options.template.take().or(app.template.map(String::from));
    options.memory = options.memory.take().or(app.memory.map(String::from));
    options.cpus = options.cpus.or(app.cpus.map(u8::from));
    if options.network.is_some() {
        // What the command line says is its user's own wish.
        options.asks.retain(|(key, ..)| *key != "network");
    }
    options.network = options.network.or(Some(app.network));
    options.no_wayland |= !app.wayland && options.wayland.is_none();
    options.app = Some(name.into());
    options.services = app.services.into_iter().map(|(name, command)| (name.into(), command.into())).collect();
    Ok(())
}

/// What an app is granted from the start.
fn shares(places: &Places, path: &Path, shares: &[Share]) -> Result<Vec<Grant>, AppError> {
    let grant = |share: &Share| {
        let no_home = || AppError::NoHome { path: path.into(), share: share.path.clone().into() };
        let place = share.path.below(places.home()).ok_or_else(no_home)?;
        match fs::metadata(&place) {
            Ok(_) => Ok(Grant { path: place, writable: share.write, called: None }),
            Err(source) => Err(AppError::NoShare { path: path.into(), share: place, source }),
        }
    };
    shares.iter().map(grant).collect()
}

/// One line of the list.
#[derive(Debug, Serialize)]
struct Line {
    name: String,
    file: PathBuf,
    #[serde(skip_serializing_if = "Option::is_none")]
    app: Option<App>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

/// The list of all apps, as a table or as JSON.
pub fn list(places: &Places, json: bool) -> Result<String, AppError> {
    let mut lines = Vec::new();
    for (name, file) in files(places)? {
        let read = || match text::read(&file)? {
            Some(text) => Ok(App::parse(&file, &text)?),
            // A link to nothing, or removed just now.
            None => Err(TextError::file(&file)(io::ErrorKind::NotFound.into())),
        };
        let (app, error) = match read() {
            Ok(app) => (Some(app), None),
            Err(error) => (None, Some(error.to_string())),
        };
        lines.push(Line { name, file, app, error });
    }
    if json {
        return Ok(serde_json::to_string_pretty(&lines)? + "\n");
    }
    let mut rows = vec![["APP", "TEMPLATE", "COMMAND", "FILE"].map(str::to_owned)];
    rows.extend(lines.into_iter().map(|line| {
        let (template, command) = match line.app {
            Some(app) => (app.template.map_or_else(|| "-".into(), String::from), app.command.join(" ")),
            None => ("-".into(), format!("damaged: {}", line.error.unwrap_or_default())),
        };
        let command = if command.is_empty() { line.name.clone() } else { command };
        [line.name, template, command, line.file.display().to_string()]
    }));
    Ok(text::table(&rows))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(places: &Places, at: usize, name: &str, text: &str) -> PathBuf {
        let path = places.apps().nth(at).unwrap().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        path
    }

    #[test]
    fn what_is_shared_must_be_there() {
        let folder = tempfile::tempdir().unwrap();
        let places = Places::at(folder.path());
        let text = "shares = [{ path = \"~/notes\", write = true }, { path = \"/\" }]\npersist = \"web\"\n";
        let path = write(&places, 0, "foot.toml", text);
        let fill_in = |places: &Places| {
            let cli = <crate::cli::Cli as clap::Parser>::parse_from(["spectrum", "run", "foot"]);
            let crate::cli::Command::Run(mut options) = cli.command else { panic!() };
            super::fill_in(places, &mut options).map(|()| (options.place.shares, options.place.persist))
        };
        let error = fill_in(&places).unwrap_err().to_string();
        let notes = folder.path().join("home/notes");
        assert!(error.starts_with(&format!("{} shares {}, which", path.display(), notes.display())), "{error}");
        fs::create_dir_all(&notes).unwrap();
        let (shares, persist) = fill_in(&places).unwrap();
        let expected = [(notes, true), ("/".into(), false)];
        let expected = expected.map(|(path, writable)| Grant { path, writable, called: None });
        assert_eq!((shares, persist.as_deref()), (expected.to_vec(), Some("web")));
    }

    #[test]
    fn the_users_file_wins_as_a_whole() {
        let folder = tempfile::tempdir().unwrap();
        let places = Places::at(folder.path());
        assert!(find(&places, "foot").unwrap().is_none());
        let system = write(&places, 1, "foot.toml", "memory = \"1G\"\ncpus = 2\n");
        let other = write(&places, 1, "gimp.toml", "");
        assert_eq!(find(&places, "foot").unwrap().unwrap().path, system);
        let user = write(&places, 0, "foot.toml", "memory = \"2G\"\n");
        let found = find(&places, "foot").unwrap().unwrap();
        assert_eq!((found.path, found.app.cpus), (user.clone(), None));
        write(&places, 0, ".foot.toml", "");
        write(&places, 0, "a b.toml", "");
        write(&places, 0, "notes.txt", "");
        let files: Vec<_> = files(&places).unwrap().into_iter().collect();
        assert_eq!(files, [("foot".to_owned(), user.clone()), ("gimp".to_owned(), other)]);
        fs::write(&user, "cpus = 0").unwrap();
        assert!(find(&places, "foot").is_err(), "a damaged file does not fall back to the system's");
    }
}
