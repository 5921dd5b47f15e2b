//! The desktop's own file dialog for applications in VMs: sway, a session bus, xdg-desktop-portal with its GTK back-end, and somebody
//! who types.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use tempfile::TempDir;
use tests::desktop::{Application, Desktop};
use tests::dialog::Dialog;
use tests::programs;
use tests::session::Session;

/// A user with a desktop, and files of which some are picked.
struct User {
    folder: TempDir,
    desktop: Desktop,
    session: Session,
}

impl User {
    fn new() -> Self {
        let folder = tempfile::Builder::new().prefix("user").tempdir().unwrap();
        fs::create_dir_all(folder.path().join(".config/spectrum")).unwrap();
        fs::write(folder.path().join(".config/spectrum/policy"), "files * * ask\n").unwrap();
        fs::create_dir_all(folder.path().join("files/folder")).unwrap();
        let mut desktop = Desktop::new();
        desktop.plug_keyboard();
        // Of a full screen its dialog's buttons would be no part.
        for effect in ["floating enable", "resize set width 790 px height 550 px", "move position 5 30"] {
            desktop.command(&format!("for_window [app_id=\"xdg-desktop-portal-gtk\"] {effect}"));
        }
        let session = Session::new(&desktop);
        let user = Self { folder, desktop, session };
        for (name, text) in [("one", "first\n"), ("two", "second\n"), ("zero", "nobody's business\n")] {
            fs::write(user.file(name), text).unwrap();
        }
        user
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join("files").join(name)
    }

    fn start(&self, command: &[&str]) -> Application {
        let place = self.folder.path();
        let settings: &[(&str, &Path)] =
            &[("HOME", place), ("XDG_RUNTIME_DIR", place), ("DBUS_SESSION_BUS_ADDRESS", self.session.address())];
        Application::start_with(Some(&self.desktop), &["--boot", "--name", "vm"], settings, command)
    }

    /// Runs a command in the VM.
    fn exec(&self, command: &[&str]) -> String {
        let mut exec = Command::new(programs::program("spectrum"));
        exec.args(["exec", "vm"]).args(command).env("XDG_RUNTIME_DIR", self.folder.path());
        let output = exec.output().unwrap();
        assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// What the VM has of the user's files, as far as a command in it can see.
    fn seen(&self) -> String {
        let text = self.exec(&["find", "/host", "-mindepth", "1", "-printf", "%P "]);
        let mut names: Vec<_> = text.split_whitespace().collect();
        names.sort_unstable();
        names.join(" ")
    }
}

/// The window of the application.
fn of_application(window: &Value) -> bool {
    window["app_id"] != "xdg-desktop-portal-gtk" && window["focused"] == true
}

/// An application as Debian ships it opens a file: the desktop's dialog asks which, the application shows what is in it, and that is all
/// it can see.
#[test]
fn an_unmodified_application_opens_what_is_picked() {
    let mut user = User::new();
    // Much ink, to be seen in a picture.
    fs::write(user.file("one"), ("\u{2588}".repeat(200) + "\n").repeat(200)).unwrap();
    let mut application = user.start(&["gtk3-demo-application"]);
    user.desktop.wait_for_window(&mut application, of_application);
    // As its button does.
    let open = |user: &User| {
        let call =
            "call --session --dest org.gtk.Demo2 --object-path /org/gtk/Demo2 --method org.gtk.Actions.Activate open";
        let call: Vec<_> = ["gdbus"].into_iter().chain(call.split(' ')).chain(["[]", "{}"]).collect();
        assert_eq!(user.exec(&call), "()\n");
    };

    // Nothing is picked.
    open(&user);
    let dialog = Dialog::wait(&mut user.desktop, &mut application);
    assert_eq!(dialog.title(), "[gtk3-demo-application] Open File");
    dialog.end(&["-k", "Escape"]);
    user.desktop.wait_for_window(&mut application, of_application);
    assert_eq!(user.seen(), "");

    // The desktop's portal ends in the middle of it, and the next dialog is shown by another.
    open(&user);
    let dialog = Dialog::wait(&mut user.desktop, &mut application);
    user.session.kill("xdg-desktop-portal-gtk");
    dialog.wait_end();
    user.desktop.wait_for_window(&mut application, of_application);
    assert_eq!(user.seen(), "");

    open(&user);
    let path = user.file("one");
    let dialog = Dialog::wait(&mut user.desktop, &mut application);
    dialog.type_path(&path);
    dialog.end(&["-k", "Return"]);
    let windows =
        |windows: &[Value]| (windows.len() == 2).then(|| windows.iter().find(|w| of_application(w)).cloned())?;
    let shown = user.desktop.wait_for(&mut application, windows);
    user.desktop.wait_for_picture("opened", |picture| picture.share_of(&shown, [0, 0, 0]) > 0.2);
    assert_eq!(user.seen(), "one");

    drop(application);
    let left = fs::read_dir(user.folder.path().join("spectrum")).unwrap().count();
    assert_eq!(left, 0, "the VM is gone, and what it was granted with it");
}

/// A program with GTK's dialogs: it asks for files, reads them, or writes what it saves.
const PICK: &str = r#"
local Gtk = require("lgi").require("Gtk", "3.0")
local mode = arg[1]
local action = ({ save = "SAVE", folder = "SELECT_FOLDER" })[mode] or "OPEN"
local dialog = Gtk.FileChooserNative.new(mode, nil, Gtk.FileChooserAction[action], nil, nil)
dialog.select_multiple = mode == "many"
if mode == "save" then dialog:set_current_name("name") end
function dialog.on_response()
    local names = dialog:get_filenames()
    table.sort(names)
    for _, name in ipairs(names) do
        if mode == "save" then io.open(name, "w"):write("saved\n"):close() end
        local inside = io.open(mode == "folder" and name .. "/inside" or name):read()
        io.open("picked", "a"):write(name .. ": " .. inside .. "\n"):close()
    end
    Gtk.main_quit()
end
dialog:show()
Gtk.main()
"#;

#[test]
fn many_files_folders_and_files_to_be_saved_are_picked() {
    let mut user = User::new();
    fs::write(user.file("folder/inside"), "third\n").unwrap();
    let mut application = user.start(&["sh"]);
    application.say(&format!("cat >pick.lua <<'END'\n{PICK}\nEND"));
    let mut ask = |user: &mut User, mode: &str, answer: &dyn Fn(Dialog<'_>)| {
        application.say(&format!("rm -f picked; lua5.3 pick.lua {mode}"));
        let dialog = Dialog::wait(&mut user.desktop, &mut application);
        assert_eq!(dialog.title(), format!("[sh] {mode}"));
        answer(dialog);
        application.shell("cat picked")
    };

    let folder = user.file("");
    let picked = ask(&mut user, "many", &|dialog| {
        dialog.type_path(&folder);
        // Shows the folder, of which the first thing is chosen.
        dialog.press(&["-k", "Return"]);
        dialog.press(&["-k", "Down"]);
        dialog.press(&["-M", "shift", "-k", "Down", "-m", "shift"]);
        dialog.end(&["-k", "Return"]);
    });
    assert_eq!(picked, "/host/one: first\n/host/two: second");
    assert_eq!(user.seen(), "one two");

    let new = user.file("new");
    let picked = ask(&mut user, "save", &|dialog| {
        // In the place of the name, which is chosen.
        dialog.type_text(&new.display().to_string());
        dialog.end(&["-k", "Return"]);
    });
    assert_eq!(picked, "/host/new: saved");
    assert_eq!(fs::read_to_string(&new).unwrap(), "saved\n");

    let folder = user.file("folder");
    let picked = ask(&mut user, "folder", &|dialog| {
        // The dialog takes no folder while it shows the files of late.
        dialog.press(&["-M", "alt", "-k", "Home", "-m", "alt"]);
        dialog.type_path(&folder);
        dialog.end(&["-k", "Return"]);
    });
    assert_eq!(picked, "/host/folder: third");
    assert_eq!(user.seen(), "folder folder/inside new one two");

    let picked = ask(&mut user, "many", &|dialog| dialog.end(&["-k", "Escape"]));
    assert_eq!(picked, "");
    assert_eq!(user.seen(), "folder folder/inside new one two");
}
