//! `spectrum apps` and `spectrum app`: files of apps and the entries of the desktop's menu.

use std::{
    fs,
    path::PathBuf,
    process::{Command, Output},
};

/// A user with a home, on a system with a folder of shared data.
struct Desk {
    folder: tempfile::TempDir,
}

impl Desk {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        path
    }

    fn spectrum(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_spectrum"));
        command.args(arguments).env_clear().env("HOME", self.path("home")).env("XDG_DATA_DIRS", self.path("share"));
        command.output().unwrap()
    }

    /// What it prints when all is well.
    fn prints(&self, arguments: &[&str]) -> String {
        let output = self.spectrum(arguments);
        assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// What it says when something is wrong.
    fn refuses(&self, arguments: &[&str]) -> String {
        let output = self.spectrum(arguments);
        assert_eq!((output.status.code(), output.stdout.as_slice()), (Some(125), &b""[..]), "{output:?}");
        String::from_utf8(output.stderr).unwrap()
    }
}

#[test]
fn the_list() {
    let desk = Desk::new();
    assert_eq!(desk.prints(&["apps"]), "APP  TEMPLATE  COMMAND  FILE\n");
    let user =
        desk.write("home/.config/spectrum/apps/foot.toml", "template = \"desk\"\ncommand = [\"foot\", \"-m\"]\n");
    desk.write("share/spectrum/apps/foot.toml", "this would be an error");
    let gimp = desk.write("share/spectrum/apps/gimp.toml", "");
    let broken = desk.write("share/spectrum/apps/x.toml", "cpus = 0");
    let table = desk.prints(&["apps"]);
    let lines: Vec<Vec<&str>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines[1], ["foot", "desk", "foot", "-m", user.to_str().unwrap()]);
    assert_eq!(lines[2], ["gimp", "-", "gimp", gimp.to_str().unwrap()]);
    assert_eq!(lines[3][..4], ["x", "-", "damaged:", &format!("{}:1:8:", broken.display())]);
    let json: serde_json::Value = serde_json::from_str(&desk.prints(&["apps", "--json"])).unwrap();
    assert_eq!((json[0]["name"].as_str(), json[0]["app"]["network"].as_str()), (Some("foot"), Some("none")));
    assert!(json[2]["error"].as_str().unwrap().contains(":1:8: "), "{json}");
}

#[test]
fn from_the_desktops_menu_and_back() {
    let desk = Desk::new();
    let text = "[Desktop Entry]\nType=Application\nName=Gedit\nIcon=gedit\nExec=gedit %U\n";
    let source = desk.write("org.gnome.gedit.desktop", text);
    let source = source.to_str().unwrap();
    let (app, entry) = (
        desk.path("home/.config/spectrum/apps/org.gnome.gedit.toml"),
        desk.path("home/.local/share/applications/spectrum-org.gnome.gedit.desktop"),
    );
    let both = format!("{}\n{}\n", app.display(), entry.display());
    assert_eq!(desk.prints(&["app", "add", source]), both);
    let listed = desk.prints(&["apps"]);
    assert!(listed.lines().nth(1).unwrap().starts_with("org.gnome.gedit  -         gedit "), "{listed}");
    let menu = fs::read_to_string(&entry).unwrap();
    assert!(menu.contains("\nExec=spectrum run org.gnome.gedit\n") && menu.contains("\nIcon=gedit\n"), "{menu}");
    let before = (fs::read(&app).unwrap(), menu);
    assert!(desk.refuses(&["app", "add", source]).contains("is there already: nothing was changed"));
    assert_eq!(before, (fs::read(&app).unwrap(), fs::read_to_string(&entry).unwrap()));
    desk.prints(&["app", "rm", "org.gnome.gedit"]);
    assert!(!app.exists() && !entry.exists());
    assert!(desk.refuses(&["app", "rm", "org.gnome.gedit"]).contains("there is no app \"org.gnome.gedit\""));
    assert!(desk.refuses(&["app", "add", "/no/x.desktop"]).contains("there is no file /no/x.desktop"));
}

#[test]
fn a_set_up_is_recorded_and_made_again_elsewhere() {
    let (here, there) = (Desk::new(), Desk::new());
    here.write("home/.config/spectrum/apps/web.toml", "# mine\nmemory = \"2G\"\n");
    here.write("share/spectrum/apps/foot.toml", "cpus = 2\n");
    let manifest = r#"{"version":1,"suite":"trixie","kernel":"6.12","packages":{},"files":{}}"#;
    here.write("home/.local/share/spectrum/templates/desk/template.json", manifest);
    let lock = here.path("spectrum.lock");
    let lock = lock.to_str().unwrap();
    here.prints(&["lock", lock]);
    here.prints(&["apply", "--check", lock]);
    let differs = |desk: &Desk, arguments: &[&str]| {
        let output = desk.spectrum(arguments);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let missing = "template desk is missing: make it with `spectrum template build desk --suite trixie` and the packages it had\n";
    let told = differs(&there, &["apply", "--check", lock]);
    assert_eq!(told, format!("{missing}app foot is missing\napp web is missing\n"));
    let web = there.path("home/.config/spectrum/apps/web.toml");
    assert!(!web.exists(), "checking makes nothing");
    assert_eq!(differs(&there, &["apply", lock]), missing);
    assert_eq!(fs::read_to_string(&web).unwrap(), "# mine\nmemory = \"2G\"\n");
    there.write("home/.local/share/spectrum/templates/desk/template.json", manifest);
    there.prints(&["apply", "--check", lock]);
    // What is changed by hand is told and stays.
    there.write("home/.local/share/spectrum/templates/desk/template.json", &manifest.replace("6.12", "6.13"));
    fs::write(&web, "memory = \"3G\"\n").unwrap();
    there.write("share/spectrum/apps/more.toml", "");
    let told = differs(&there, &["apply", lock]);
    for text in ["template desk is another one", "app web is another one", "app more is not in the lock"] {
        assert!(told.contains(text), "{told}");
    }
    assert_eq!((told.lines().count(), fs::read_to_string(&web).unwrap().as_str()), (3, "memory = \"3G\"\n"));
    // A lock that is damaged makes nothing.
    let text = fs::read_to_string(lock).unwrap();
    for (from, to, expected) in [
        ("cpus = 2", "cpus = 3", "app \"foot\" is not what"),
        ("[apps.foot]", "[apps.\"../foot\"]", "app \"../foot\" is not what"),
        ("suite = \"trixie\"", "suite = \"a; b\"", "template \"desk\" is not what"),
        ("version = 1", "version = 2", "has version 2 of its format"),
        ("version = 1", "version = ", ":1:"),
    ] {
        assert!(text.contains(from), "{text}");
        fs::write(lock, text.replace(from, to)).unwrap();
        assert!(there.refuses(&["apply", lock]).contains(expected), "{to}");
    }
}

#[test]
fn what_is_opened_by_which_app() {
    let desk = Desk::new();
    desk.write(
        "home/.config/spectrum/apps/reader.toml",
        "template = \"none\"\nmime = [\"text/plain\", \"x-scheme-handler/gopher\"]\n",
    );
    let letter = desk.write("letter.txt", "dear all\n");
    let letter = letter.to_str().unwrap();
    let page = desk.write("page.xyz", "\0\x01\x02");
    let page = page.to_str().unwrap();
    // The app that was chosen has no template, and that is said next.
    let chosen = "spectrum: there is no template \"none\"";
    let started = |arguments: &[&str]| assert!(desk.refuses(arguments).starts_with(chosen), "{arguments:?}");
    started(&["open", letter]);
    started(&["open", "gopher://x.org/", letter]);
    started(&["open", "--app", "reader", page]);
    let none = desk.refuses(&["open", page]);
    assert!(none.contains("no app opens ") && none.contains("name one with --app"), "{none}");
    assert!(desk.refuses(&["open", "https://x.org"]).contains("which is x-scheme-handler/https: name one with --app"));
    assert!(desk.refuses(&["open", "/no/such"]).contains("cannot open /no/such: No such file"));
    assert!(desk.refuses(&["open", "--app", "x", letter]).contains("there is no app \"x\""));

    // One that asks for what it keeps and shares is given neither.
    desk.write(
        "home/.config/spectrum/apps/writer.toml",
        "template = \"other\"\nmime = [\"text/plain\"]\nshares = [{ path = \"/no/such\" }]\n",
    );
    let both = desk.refuses(&["open", letter]);
    assert!(both.contains("reader, writer open text/plain: name one with --app"), "{both}");
    assert!(desk.refuses(&["open", "gopher:x", letter]).contains("reader, writer open"), "{both}");
    desk.write(
        "home/.config/mimeapps.list",
        "[Default Applications]\ntext/plain=gedit.desktop;spectrum-writer.desktop\n",
    );
    let chosen = desk.refuses(&["open", letter]);
    assert!(chosen.starts_with("spectrum: there is no template \"other\""), "{chosen}");
    let different = desk.refuses(&["open", "gopher:x", letter]);
    assert!(different.contains("are opened by different apps, reader and writer"), "{different}");
}
