//! The desktop's own dialogs: org.freedesktop.impl.portal.Access, as a portal back-end shows them.

use std::{
    collections::HashMap,
    env, io,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use zbus::{
    blocking::{Connection, Proxy, connection::Builder, fdo::DBusProxy},
    zvariant::{ObjectPath, OwnedValue, Value},
};

use super::{Answer, Question};

/// What the bus names of back-ends begin with.
const PREFIX: &str = "org.freedesktop.impl.portal.desktop.";

/// Where back-ends have their objects.
const OBJECT: &str = "/org/freedesktop/portal/desktop";

/// The dialog's interface, and that of what closes it.
const ACCESS: &str = "org.freedesktop.impl.portal.Access";
const REQUEST: &str = "org.freedesktop.impl.portal.Request";

/// Response of a dialog in which "grant" was chosen.
const GRANTED: u32 = 0;

/// Identifier of the check box.
const REMEMBER: &str = "remember";

/// Why the desktop did not ask.
#[derive(Debug, thiserror::Error)]
pub enum PortalError {
    /// No session, or not one with a bus.
    #[error("no session bus: {0}")]
    Bus(#[source] zbus::Error),
    /// No back-end has such dialogs.
    #[error("no portal back-end has access dialogs")]
    NoBackend,
    /// One has, but it did not work.
    #[error("{name}: {source}")]
    Backend {
        /// Its name on the bus.
        name: String,
        /// What went wrong.
        source: Box<zbus::Error>,
    },
}

/// Asks with the first back-end that can.
pub fn ask(question: &Question, time: Duration) -> Result<Answer, PortalError> {
    let connect = || Builder::session()?.method_timeout(time).build();
    let connection = connect().map_err(PortalError::Bus)?;
    let mut last = PortalError::NoBackend;
    for name in backends(&connection).map_err(PortalError::Bus)? {
        match ask_backend(&connection, &name, question) {
            Ok(answer) => return Ok(answer),
            Err(error) if is_timeout(&error) => return Ok(Answer::None),
            // Not every back-end has this interface.
            Err(error) => last = PortalError::Backend { name, source: Box::new(error) },
        }
    }
    Err(last)
}

fn is_timeout(error: &zbus::Error) -> bool {
    matches!(error, zbus::Error::InputOutput(error) if error.kind() == io::ErrorKind::TimedOut)
}

/// The back-ends that run or can be started: first those of this desktop, then GTK's, which suits any.
fn backends(connection: &Connection) -> zbus::Result<Vec<String>> {
    let bus = DBusProxy::new(connection)?;
    let names = bus.list_names()?.into_iter().chain(bus.list_activatable_names()?);
    let mut names: Vec<String> = names.map(|name| name.to_string()).filter(|name| name.starts_with(PREFIX)).collect();
    let desktops = env::var("XDG_CURRENT_DESKTOP").unwrap_or_default().to_ascii_lowercase();
    names.sort_by_cached_key(|name| (rank(name, &desktops), name.clone()));
    names.dedup();
    Ok(names)
}

fn rank(name: &str, desktops: &str) -> usize {
    let own = name.strip_prefix(PREFIX).unwrap_or(name);
    match desktops.split(':').position(|desktop| desktop == own) {
        Some(position) => position,
        None if own == "gtk" => usize::MAX - 1,
        None => usize::MAX,
    }
}

fn ask_backend(connection: &Connection, name: &str, question: &Question) -> zbus::Result<Answer> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    let handle = ObjectPath::try_from(format!("{OBJECT}/request/spectrum/{}_{number}", std::process::id()))?;
    let backend = Proxy::new(connection, name.to_owned(), OBJECT, ACCESS)?;
    let choices = vec![(REMEMBER, "Allow it until the VM ends", Vec::<(&str, &str)>::new(), "false")];
    let options: HashMap<&str, Value<'_>> = HashMap::from([
        ("modal", true.into()),
        ("deny_label", "Deny".into()),
        ("grant_label", "Allow".into()),
        ("choices", choices.into()),
    ]);
    let (id, window) = ("", "");
    let answer = backend.call::<_, _, (u32, HashMap<String, OwnedValue>)>(
        "AccessDialog",
        &(&handle, id, window, question.title.as_str(), question.details.as_str(), question.end.as_str(), options),
    );
    match answer {
        Ok((GRANTED, results)) if is_remembered(&results) => Ok(Answer::UntilItEnds),
        Ok((GRANTED, _)) => Ok(Answer::Once),
        Ok(_) => Ok(Answer::No),
        Err(error) => {
            if is_timeout(&error) {
                // Not to be answered any more.
                Proxy::new(connection, name.to_owned(), handle, REQUEST)?.call_noreply("Close", &())?;
            }
            Err(error)
        }
    }
}

fn is_remembered(results: &HashMap<String, OwnedValue>) -> bool {
    let choices = results.get("choices").and_then(|value| value.try_clone().ok());
    let choices = choices.and_then(|value| Vec::<(String, String)>::try_from(value).ok());
    choices.unwrap_or_default().iter().any(|(id, value)| id == REMEMBER && value == "true")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_desktops_own_back_end_comes_first() {
        let mut names = ["gnome", "gtk", "kde", "wlr"].map(|name| format!("{PREFIX}{name}"));
        names.sort_by_cached_key(|name| rank(name, "sway:kde"));
        assert_eq!(names.map(|name| name.rsplit('.').next().unwrap().to_owned()), ["kde", "gtk", "gnome", "wlr"]);
    }

    #[test]
    fn only_the_check_box_is_remembered() {
        let results = |choices: Vec<(&str, &str)>| {
            let value = OwnedValue::try_from(Value::from(choices)).unwrap();
            HashMap::from([("choices".to_owned(), value)])
        };
        assert!(is_remembered(&results(vec![("remember", "true")])));
        assert!(!is_remembered(&results(vec![("remember", "false"), ("other", "true")])));
        assert!(!is_remembered(&HashMap::new()));
        let wrong = OwnedValue::from(7_u32);
        assert!(!is_remembered(&HashMap::from([("choices".to_owned(), wrong)])));
    }
}
