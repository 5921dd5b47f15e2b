//! From a .desktop file of the host to an app and an entry in the desktop's menu that runs it in a VM.
//!
//! Format: Desktop Entry Specification 1.5.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use freedesktop_desktop_entry::{DecodeError, DesktopEntry, ExecError};

use super::{App, file::Mime, file_in};
use crate::{
    home::{HomeError, is_name},
    places::Places,
    text::{self, TextError},
};

/// Marks entries that are ours.
const MARK: &str = "X-Spectrum-App";

/// What of an entry is also true of the application in a VM, beside its name.
const COPIED: [&str; 7] =
    ["GenericName", "Comment", "Icon", "Categories", "Keywords", "StartupNotify", "StartupWMClass"];

/// Why an application was not added or removed.
#[derive(Debug, thiserror::Error)]
pub enum MenuError {
    /// There is no such file.
    #[error("there is no file {0}")]
    NoFile(PathBuf),
    /// Its name would be the app's.
    #[error("{0} cannot become an app: it must be called NAME.desktop, with letters, digits, '-', '_' and '.' in NAME")]
    FileName(PathBuf),
    /// It is not what it should be.
    #[error("{0} is no .desktop file: {1}")]
    Format(PathBuf, DecodeError),
    /// It is not for us.
    #[error("{0} cannot become an app: {1}")]
    Kind(PathBuf, &'static str),
    /// It has no command that can be run.
    #[error("{0} cannot become an app: its Exec is not usable: {1}")]
    Exec(PathBuf, ExecError),
    /// It would replace something.
    #[error("{0} is there already: nothing was changed; use `spectrum app rm {1}` first")]
    Exists(PathBuf, String),
    /// It is not there.
    #[error("there is no app {0:?} of this user's: see `spectrum apps`")]
    Unknown(String),
    /// Files.
    #[error(transparent)]
    Text(#[from] TextError),
    /// There is no place for it.
    #[error(transparent)]
    Home(#[from] HomeError),
    /// The app cannot be written down.
    #[error("cannot write the app file: {0}")]
    Toml(#[from] toml::ser::Error),
}

/// The file that puts an app in the menu.
pub fn entry_of(places: &Places, name: &str) -> Result<PathBuf, HomeError> {
    Ok(places.menu()?.join(format!("spectrum-{name}.desktop")))
}

/// Makes an app and its menu entry from a .desktop file. Gives their paths.
pub fn add(places: &Places, file: &Path) -> Result<[PathBuf; 2], MenuError> {
    let text = text::read(file)?.ok_or_else(|| MenuError::NoFile(file.to_owned()))?;
    let (name, app, entry) = convert(file, &text)?;
    let (app_path, entry_path) = (file_in(&places.user_apps()?, &name), entry_of(places, &name)?);
    for path in [&app_path, &entry_path] {
        if fs::symlink_metadata(path).is_ok() {
            return Err(MenuError::Exists(path.clone(), name));
        }
    }
    text::write_new(&app_path, &app.to_toml()?)?;
    if let Err(error) = text::write_new(&entry_path, &entry) {
        // Just made by us: an app without its entry would be in the way of the next attempt.
        let _ = fs::remove_file(&app_path);
        return Err(error.into());
    }
    Ok([app_path, entry_path])
}

/// Removes an app of the user's and its menu entry. Gives the paths of what was there.
pub fn remove(places: &Places, name: &str) -> Result<Vec<PathBuf>, MenuError> {
    let mut removed = Vec::new();
    if is_name(name) {
        for path in [entry_of(places, name)?, file_in(&places.user_apps()?, name)] {
            match fs::remove_file(&path) {
                Ok(()) => removed.push(path),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(TextError::file(&path)(error).into()),
            }
        }
    }
    if removed.is_empty() { Err(MenuError::Unknown(name.to_owned())) } else { Ok(removed) }
}

/// The name of the app, the app, and the text of the entry.
fn convert(file: &Path, text: &str) -> Result<(String, App, String), MenuError> {
    let stem = file.extension().filter(|suffix| *suffix == "desktop").and_then(|_| file.file_stem());
    let name = stem.and_then(|stem| stem.to_str()).filter(|name| is_name(name));
    let name = name.ok_or_else(|| MenuError::FileName(file.to_owned()))?;
    let all_languages: Option<&[&str]> = None;
    let mut entry =
        DesktopEntry::from_str(file, text, all_languages).map_err(|error| MenuError::Format(file.to_owned(), error))?;
    let refused = |why| Err(MenuError::Kind(file.to_owned(), why));
    if entry.desktop_entry(MARK).is_some() {
        return refused("it is the menu entry of one");
    }
    if entry.desktop_entry("Type") != Some("Application") {
        return refused("its Type is not Application");
    }
    if entry.terminal() {
        return refused("it needs a terminal to run in; run a terminal in a VM, and the program in that");
    }
    let Some(exec) = entry.exec().map(without_field_codes) else {
        return refused("it has no Exec, so it is started through D-Bus");
    };
    entry.add_desktop_entry("Exec".into(), exec);
    let command = entry.parse_exec().map_err(|error| MenuError::Exec(file.to_owned(), error))?;
    let mime = mime_types(&entry);
    let menu = menu_entry(&entry, name, &mime);
    Ok((name.to_owned(), App { command, mime, ..App::default() }, menu))
}

/// What it opens. What is no type is left out, as desktops do.
fn mime_types(entry: &DesktopEntry) -> Vec<Mime> {
    let text = entry.desktop_entry("MimeType").unwrap_or_default();
    text.split(';').filter_map(|kind| Mime::try_from(kind.trim().to_owned()).ok()).collect()
}

/// An Exec without what stands for files, the icon and the like: nothing of the host is known in a VM.
fn without_field_codes(exec: &str) -> String {
    let mut result = String::with_capacity(exec.len());
    let mut characters = exec.chars();
    while let Some(character) = characters.next() {
        match character {
            '%' => result.extend(characters.next().filter(|code| *code == '%')),
            other => result.push(other),
        }
    }
    result
}

fn menu_entry(entry: &DesktopEntry, name: &str, mime: &[Mime]) -> String {
    let mut lines = vec!["[Desktop Entry]".to_owned(), "Type=Application".to_owned()];
    let mut copy = |key: &str, suffix: &str| {
        let Some((value, languages)) = entry.groups.desktop_entry().and_then(|group| group.0.get(key)) else { return };
        lines.push(format!("{key}={}{suffix}", escaped(value)));
        lines.extend(languages.iter().map(|(language, value)| format!("{key}[{language}]={}{suffix}", escaped(value))));
    };
    // The application of the host may be in the menu too, and must not look the same.
    copy("Name", " (VM)");
    COPIED.iter().for_each(|key| copy(key, ""));
    let exec = if mime.is_empty() {
        format!("Exec=spectrum run {name}")
    } else {
        lines.push(format!("MimeType={}", mime.iter().map(|kind| format!("{};", &**kind)).collect::<String>()));
        format!("Exec=spectrum open --app {name} %U")
    };
    lines.extend([exec, "TryExec=spectrum".to_owned(), format!("{MARK}={name}")]);
    lines.join("\n") + "\n"
}

/// A value as it is written: section 4 of the specification.
fn escaped(value: &str) -> String {
    let value = value.replace('\\', "\\\\").replace('\n', "\\n").replace('\t', "\\t").replace('\r', "\\r");
    match value.strip_prefix(' ') {
        Some(rest) => format!("\\s{rest}"),
        None => value,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn converted(text: &str) -> Result<(String, App, String), MenuError> {
        convert(Path::new("/usr/share/applications/org.x.Edit.desktop"), text)
    }

    fn command(exec: &str) -> Result<Vec<String>, MenuError> {
        Ok(converted(&format!("[Desktop Entry]\nType=Application\nName=x\nExec={exec}\n"))?.1.command)
    }

    #[test]
    fn commands() {
        let table: &[(&str, &[&str])] = &[
            ("foot", &["foot"]),
            ("gedit %U", &["gedit"]),
            ("/usr/bin/a --icon %i -n %c %k %f", &["/usr/bin/a", "--icon", "-n"]),
            ("a --file=%f b", &["a", "--file=", "b"]),
            (r#"sh -c "echo \\"a b\\" \\$HOME" %F"#, &["sh", "-c", "echo \"a b\" $HOME"]),
            (r#""/opt/My App/run" -x"#, &["/opt/My App/run", "-x"]),
            ("a 100%%", &["a", "100%"]),
            ("env A=b prog", &["env", "A=b", "prog"]),
        ];
        for (exec, expected) in table {
            assert_eq!(command(exec).unwrap(), *expected, "{exec}");
        }
        for exec in ["", "%U", "\"open", "A=b c"] {
            assert!(matches!(command(exec), Err(MenuError::Exec(..))), "{exec}");
        }
    }

    #[test]
    fn the_entry_in_the_menu() {
        let text = "[Desktop Entry]\nType=Application\nVersion=1.0\nName=Edit\nName[de]=Ändern\nComment=a\\\\b\\nc\n\
                    Exec=edit %U\nTryExec=edit\nIcon=org.x.Edit\nMimeType=text/plain;\nDBusActivatable=true\n\
                    Categories=Utility;X;\nActions=new;\nStartupWMClass=edit\n\n\
                    [Desktop Action new]\nName=New\nExec=edit --new\n";
        let (name, app, entry) = converted(text).unwrap();
        assert_eq!((name.as_str(), app.command), ("org.x.Edit", vec!["edit".to_owned()]));
        assert_eq!(app.mime, [Mime::try_from("text/plain".to_owned()).unwrap()]);
        let expected = "[Desktop Entry]\nType=Application\nName=Edit (VM)\nName[de]=Ändern (VM)\nComment=a\\\\b\\nc\n\
                        Icon=org.x.Edit\nCategories=Utility;X;\nStartupWMClass=edit\nMimeType=text/plain;\n\
                        Exec=spectrum open --app org.x.Edit %U\n\
                        TryExec=spectrum\nX-Spectrum-App=org.x.Edit\n";
        assert_eq!(entry, expected);
        let own = converted(&entry).unwrap_err().to_string();
        assert!(own.contains("it is the menu entry of one"), "{own}");
    }

    #[test]
    fn what_cannot_become_an_app() {
        let table = [
            ("[Desktop Entry]\nType=Link\nName=x\nURL=x\n", "its Type is not Application"),
            ("[Desktop Entry]\nType=Application\nName=x\n", "it has no Exec"),
            ("[Desktop Entry]\nType=Application\nTerminal=true\nExec=vim\n", "it needs a terminal"),
            ("", "its Type is not Application"),
            ("Type=Application\n", "is no .desktop file"),
            ("garbage", "is no .desktop file"),
        ];
        for (text, expected) in table {
            let error = converted(text).unwrap_err().to_string();
            assert!(error.contains(expected), "{text:?}: {error}");
        }
        for path in ["a b.desktop", "a.txt", ".desktop", "/"] {
            assert!(matches!(convert(Path::new(path), ""), Err(MenuError::FileName(_))), "{path}");
        }
    }

    #[test]
    fn nothing_is_replaced_and_both_files_go() {
        let folder = tempfile::tempdir().unwrap();
        let places = Places::at(folder.path());
        let source = folder.path().join("x.desktop");
        fs::write(&source, "[Desktop Entry]\nType=Application\nName=x\nExec=x\n").unwrap();
        let [app, entry] = add(&places, &source).unwrap();
        assert!(app.is_file() && entry.is_file());
        assert!(matches!(add(&places, &source), Err(MenuError::Exists(..))));
        // Also with only one of them there.
        fs::remove_file(&app).unwrap();
        assert!(matches!(add(&places, &source), Err(MenuError::Exists(..))));
        assert!(!app.exists());
        assert_eq!(remove(&places, "x").unwrap(), std::slice::from_ref(&entry));
        assert!(matches!(remove(&places, "x"), Err(MenuError::Unknown(_))));
        assert!(matches!(remove(&places, "../x"), Err(MenuError::Unknown(_))));
        // An app is not left without an entry.
        fs::remove_dir(places.menu().unwrap()).unwrap();
        fs::write(places.menu().unwrap(), "in the way").unwrap();
        assert!(matches!(add(&places, &source), Err(MenuError::Text(_))));
        assert!(!app.exists());
    }
}
