//! The same set-up on another machine: digests of templates and the app files, in one file.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{
    apps::{self, file::App},
    home::{Home, HomeError, is_name},
    places::Places,
    template::{self, Manifest, TemplateError},
    text::{self, Mistake, TextError},
};

/// The version of this format.
const VERSION: u32 = 1;

/// Why a set-up was not recorded or applied.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// A file.
    #[error(transparent)]
    Text(#[from] TextError),
    /// There is no place for it.
    #[error(transparent)]
    Home(#[from] HomeError),
    /// The templates.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// It is of another version of this program.
    #[error("{0} has version {1} of its format, known is {VERSION}: make it anew with `spectrum lock`")]
    Version(PathBuf, u32),
    /// It was changed by hand, or damaged.
    #[error("{0}: {1} is not what `spectrum lock` wrote: make the file anew with it")]
    Damaged(PathBuf, String),
    /// It cannot be written down.
    #[error("cannot write {0}: {1}")]
    Toml(PathBuf, toml::ser::Error),
}

/// The file.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Lock {
    version: u32,
    templates: BTreeMap<String, LockedTemplate>,
    apps: BTreeMap<String, LockedApp>,
}

/// A template as it was.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct LockedTemplate {
    /// SHA-256 of its manifest as JSON, which has the digests of all its files.
    sha256: String,
    /// The Debian release it was made from.
    suite: String,
}

/// An app as it was.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct LockedApp {
    /// SHA-256 of the text.
    sha256: String,
    /// The app file.
    text: String,
}

/// Writes down the templates and apps there are. A damaged one is refused: it could not be had again.
pub fn lock(home: &Home, places: &Places, path: &Path) -> Result<(), LockError> {
    let mut lock = Lock { version: VERSION, templates: BTreeMap::new(), apps: BTreeMap::new() };
    for name in template::names(home)? {
        let suite = template::open(home, &name)?.manifest.suite;
        let sha256 = digest_of_template(home, &name)?.unwrap_or_default();
        lock.templates.insert(name, LockedTemplate { sha256, suite });
    }
    for (name, file) in apps::files(places)? {
        let text = text::read(&file)?.ok_or_else(|| TextError::file(&file)(io::ErrorKind::NotFound.into()))?;
        App::parse(&file, &text).map_err(TextError::Mistake)?;
        lock.apps.insert(name, LockedApp { sha256: digest(text.as_bytes()), text });
    }
    let text = toml::to_string(&lock).map_err(|error| LockError::Toml(path.to_owned(), error))?;
    Ok(text::replace(path, &text)?)
}

/// Compares with what there is and, unless it is only to be checked, makes app files that are missing. Gives what differs then,
/// a line each.
pub fn apply(home: &Home, places: &Places, path: &Path, check: bool) -> Result<Vec<String>, LockError> {
    let lock = read(path)?;
    let mut differs = Vec::new();
    for (name, locked) in &lock.templates {
        let suite = &locked.suite;
        match digest_of_template(home, name)? {
            None => differs.push(format!(
                "template {name} is missing: make it with `spectrum template build {name} --suite {suite}` and the packages it had"
            )),
            Some(digest) if digest != locked.sha256 => {
                differs.push(format!("template {name} is another one: its manifest has another digest"));
            }
            Some(_) => {}
        }
    }
    let present = apps::files(places)?;
    for (name, locked) in &lock.apps {
        let file = apps::file_in(&places.user_apps()?, name);
        match present.get(name) {
            Some(found) if digest(&fs::read(found).map_err(TextError::file(found))?) == locked.sha256 => {}
            Some(found) if *found == file || check => {
                differs.push(format!("app {name} is another one: {} has other contents", found.display()));
            }
            None if check => differs.push(format!("app {name} is missing")),
            // One of the system's that differs is overruled by the user's.
            _ => text::write_new(&file, &locked.text)?,
        }
    }
    let further = present.iter().filter(|(name, _)| !lock.apps.contains_key(*name));
    differs.extend(further.map(|(name, file)| format!("app {name} is not in the lock: {}", file.display())));
    Ok(differs)
}

fn read(path: &Path) -> Result<Lock, LockError> {
    let text = text::read(path)?.ok_or_else(|| TextError::file(path)(io::ErrorKind::NotFound.into()))?;
    let lock: Lock = toml::from_str(&text).map_err(|error| TextError::Mistake(Mistake::toml(path, &text, &error)))?;
    if lock.version != VERSION {
        return Err(LockError::Version(path.to_owned(), lock.version));
    }
    for (name, app) in &lock.apps {
        // The name becomes that of a file.
        if !is_name(name) || digest(app.text.as_bytes()) != app.sha256 || App::parse(path, &app.text).is_err() {
            return Err(LockError::Damaged(path.to_owned(), format!("app {name:?}")));
        }
    }
    // Both are part of a command that is shown.
    match lock.templates.iter().find(|(name, template)| !is_name(name) || !is_name(&template.suite)) {
        Some((name, _)) => Err(LockError::Damaged(path.to_owned(), format!("template {name:?}"))),
        None => Ok(lock),
    }
}

/// The digest of a template's manifest; none if there is no such template.
fn digest_of_template(home: &Home, name: &str) -> Result<Option<String>, LockError> {
    let folder = home.template(name)?;
    // Written anew, so that only what it says counts.
    match Manifest::read(&folder).and_then(|manifest| Ok(serde_json::to_vec(&manifest)?)) {
        Ok(bytes) => Ok(Some(digest(&bytes))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(TextError::file(&folder)(error).into()),
    }
}

fn digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}
