//! What tells the VM's xdg-desktop-portal, and its bus, of the back-end that the launcher is.

use std::{
    fs, io,
    os::unix::fs::{DirBuilderExt, chown},
    path::Path,
};

use crate::agent::accounts::Account;

/// The name of the back-end on the bus.
const NAME: &str = "org.freedesktop.impl.portal.desktop.spectrum";

/// What the back-end does: portals.conf(5), and the file format in xdg-desktop-portal's documentation.
const BACKEND: &str = "[portal]
DBusName=org.freedesktop.impl.portal.desktop.spectrum
Interfaces=org.freedesktop.impl.portal.FileChooser;org.freedesktop.impl.portal.Notification;org.freedesktop.impl.portal.Settings
";

/// Which back-end is to be asked.
const CHOICE: &str = "[preferred]\ndefault=spectrum\n";

/// The launcher is no process of this VM, so it joins without an account.
const ANONYMOUS: &str = "<busconfig>
  <auth>EXTERNAL</auth>
  <auth>ANONYMOUS</auth>
  <allow_anonymous/>
</busconfig>
";

/// Lets the bus wait for the back-end where it is asked for before the launcher has joined. Starting it is all the same a
/// program's business, which is one that waits.
const WAIT: &str = "[D-BUS Service]
Name=org.freedesktop.impl.portal.desktop.spectrum
Exec=/usr/bin/gdbus wait --session --timeout 30 org.freedesktop.impl.portal.desktop.spectrum
";

/// What opens addresses in this VM: the launcher, which asks the desktop to.
const OPENER: &str = "[Desktop Entry]
Type=Application
Name=Open on the desktop
NoDisplay=true
Exec=/usr/bin/gdbus call --session --timeout 600 --dest org.freedesktop.impl.portal.desktop.spectrum --object-path /org/freedesktop/portal/desktop --method org.freedesktop.impl.portal.desktop.spectrum.OpenURI %u
MimeType=x-scheme-handler/http;x-scheme-handler/https;x-scheme-handler/mailto;
";

/// Which program opens what.
const DEFAULTS: &str = "[Default Applications]
x-scheme-handler/http=spectrum-open.desktop
x-scheme-handler/https=spectrum-open.desktop
x-scheme-handler/mailto=spectrum-open.desktop
";

/// Puts in place what is the same in every VM. By PID 1, in its own copy of the root.
pub fn put_in_place() -> io::Result<()> {
    for (path, text) in [
        ("/usr/share/xdg-desktop-portal/portals/spectrum.portal", BACKEND),
        ("/etc/xdg-desktop-portal/portals.conf", CHOICE),
        ("/etc/dbus-1/session.d/spectrum.conf", ANONYMOUS),
        ("/usr/share/applications/spectrum-open.desktop", OPENER),
        ("/etc/xdg/mimeapps.list", DEFAULTS),
    ] {
        write(Path::new(path), text)?;
    }
    Ok(())
}

fn write(path: &Path, text: &str) -> io::Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    fs::write(path, text)
}

/// Tells the bus that is about to start that the launcher will come.
pub fn announce(account: &Account) -> io::Result<()> {
    let mut folder = account.runtime_folder();
    for name in ["dbus-1", "services"] {
        folder.push(name);
        match fs::DirBuilder::new().mode(0o700).create(&folder) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => chown(&folder, Some(account.uid), Some(account.gid))?,
        }
    }
    let path = folder.join(format!("{NAME}.service"));
    fs::write(&path, WAIT)?;
    chown(&path, Some(account.uid), Some(account.gid))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_of_them_mean_the_same_name() {
        for text in [BACKEND, WAIT] {
            assert!(text.lines().any(|line| line.split_once('=').is_some_and(|(_, name)| name == NAME)), "{text}");
        }
        assert!(
            OPENER.contains(&format!(" --dest {NAME} ")) && OPENER.contains(&format!(" --method {NAME}.OpenURI %u"))
        );
        assert!(WAIT.lines().any(|line| line.starts_with("Exec=") && line.ends_with(NAME)));
    }
}
