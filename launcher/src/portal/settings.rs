//! How the desktop looks: org.freedesktop.impl.portal.Settings, read from the desktop's org.freedesktop.portal.Settings.
//!
//! Only what decides how windows look is passed on: other settings say much about the user, and nothing that an application
//! needs.

use std::collections::HashMap;

use zbus::zvariant::OwnedValue;

use super::desktop::{Desktop, DesktopError};

/// The interface of the back-end.
pub const INTERFACE: &str = "org.freedesktop.impl.portal.Settings";

/// The desktop's.
pub const DESKTOP: &str = "org.freedesktop.portal.Settings";

/// Namespaces, and the keys of each that are passed on.
const KNOWN: [(&str, &[&str]); 2] = [
    ("org.freedesktop.appearance", &["accent-color", "color-scheme", "contrast", "reduced-motion"]),
    (
        "org.gnome.desktop.interface",
        &[
            "color-scheme",
            "cursor-size",
            "cursor-theme",
            "document-font-name",
            "font-antialiasing",
            "font-hinting",
            "font-name",
            "font-rgba-order",
            "gtk-theme",
            "icon-theme",
            "monospace-font-name",
            "text-scaling-factor",
        ],
    ),
];

/// Values by namespace and key.
pub type Settings = HashMap<String, HashMap<String, OwnedValue>>;

/// Whether an application may know it.
pub fn is_known(namespace: &str, key: &str) -> bool {
    KNOWN.iter().any(|(known, keys)| *known == namespace && keys.contains(&key))
}

/// All that applications may know, and that the guest asked for: namespaces, or what they begin with and `*`. None given: all.
pub fn read_all(desktop: &Desktop, wanted: &[String]) -> Result<Settings, DesktopError> {
    let asked: Vec<&str> = KNOWN.iter().map(|(name, _)| *name).filter(|name| is_wanted(wanted, name)).collect();
    if asked.is_empty() {
        return Ok(Settings::new());
    }
    let reply = desktop.call(DESKTOP, "ReadAll", &asked)?;
    let mut all: Settings = reply.body().deserialize()?;
    for (namespace, values) in &mut all {
        values.retain(|key, _| is_known(namespace, key));
    }
    all.retain(|_, values| !values.is_empty());
    Ok(all)
}

fn is_wanted(wanted: &[String], name: &str) -> bool {
    let matches = |pattern: &str| match pattern.strip_suffix('*') {
        Some(beginning) => name.starts_with(beginning),
        None => pattern.is_empty() || pattern == name,
    };
    wanted.is_empty() || wanted.iter().any(|pattern| matches(pattern))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_for_and_may_be_known() {
        let wanted =
            |patterns: &[&str], name| is_wanted(&patterns.iter().map(|p| (*p).to_owned()).collect::<Vec<_>>(), name);
        let name = "org.freedesktop.appearance";
        for patterns in [&[][..], &[""], &["org.freedesktop.*"], &["x", name], &["*"]] {
            assert!(wanted(patterns, name), "{patterns:?}");
        }
        assert!(!wanted(&["org.freedesktop"], name) && !wanted(&["org.gnome.*"], name));
        assert!(is_known(name, "color-scheme") && !is_known(name, "font-name"));
        assert!(!is_known("org.gnome.desktop.privacy", "color-scheme"));
    }
}
