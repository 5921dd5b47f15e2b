//! The file dialog of the desktop's portal, GTK's, as its user sees it: through the keyboard.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::TIMEOUT;
use crate::desktop::{Desktop, Owner};

/// How long a key may take until the screen shows what it did; after that it is pressed again: GTK's dialog takes no key while it is
/// looking for files.
const EFFECT: Duration = Duration::from_secs(4);
/// How often to look, since nothing tells.
const POLL: Duration = Duration::from_millis(200);

/// A dialog that is on the screen.
pub struct Dialog<'a> {
    desktop: &'a mut Desktop,
    window: Value,
}

impl<'a> Dialog<'a> {
    /// Waits until there is one and it has something in it.
    ///
    /// # Panics
    /// If `owner`, for whose VM it is, ends first, or there is none in time.
    pub fn wait(desktop: &'a mut Desktop, owner: &mut impl Owner) -> Self {
        let is_dialog = |window: &Value| window["app_id"] == "xdg-desktop-portal-gtk" && window["focused"] == true;
        let window = desktop.wait_for_window(owner, is_dialog);
        // Text has many shades; a window that nothing was drawn into has one.
        desktop.wait_for_picture("dialog", |picture| picture.colours(&window) >= 16);
        Self { desktop, window }
    }

    /// What is written above it.
    #[must_use]
    pub fn title(&self) -> &str {
        self.window["name"].as_str().unwrap_or_default()
    }

    fn pixels(&self) -> Vec<[u8; 3]> {
        self.desktop.screenshot("dialog").inside(&self.window).collect()
    }

    fn is_there(&self) -> bool {
        self.desktop.windows().iter().any(|window| window["id"] == self.window["id"])
    }

    /// Whether `done` comes true while a key should have its effect.
    fn soon(&self, done: impl Fn(&Self) -> bool) -> bool {
        let deadline = Instant::now() + EFFECT;
        while !done(self) {
            if Instant::now() > deadline {
                return false;
            }
            thread::sleep(POLL);
        }
        true
    }

    fn press_until(&self, keys: &[&str], done: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            self.desktop.press(keys);
            if self.soon(&done) {
                return;
            }
            assert!(Instant::now() < deadline, "{keys:?} does nothing: see dialog.ppm");
        }
    }

    /// Presses keys, again if need be, until the dialog looks different.
    pub fn press(&self, keys: &[&str]) {
        let before = self.pixels();
        self.press_until(keys, |dialog| dialog.pixels() != before);
    }

    /// Types a path where one can be typed in a dialog for files that are there.
    pub fn type_path(&self, path: &Path) {
        self.press(&["-M", "ctrl", "l", "-m", "ctrl"]);
        self.type_text(&path.display().to_string());
    }

    /// Types something, and waits until it is there.
    ///
    /// # Panics
    /// If it does not come.
    pub fn type_text(&self, text: &str) {
        let before = self.pixels();
        self.desktop.press(&[text]);
        assert!(self.soon(|dialog| dialog.pixels() != before), "nothing can be typed: see dialog.ppm");
    }

    /// Presses keys until the dialog is gone.
    pub fn end(self, keys: &[&str]) {
        self.press_until(keys, |dialog| !dialog.is_there());
    }

    /// Waits until it has gone by itself.
    ///
    /// # Panics
    /// If it stays.
    pub fn wait_end(self) {
        assert!(self.soon(|dialog| !dialog.is_there()), "the dialog stays");
    }
}
