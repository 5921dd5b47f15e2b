//! A user who is not root, and may open /dev/kvm, has what root has.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Output};

use tests::desktop::Desktop;
use tests::{agent, programs};

/// `spectrum`, as that user.
fn spectrum(home: &Path, desktop: &Desktop, arguments: &[&str]) -> Output {
    let mut command = Command::new(programs::root().join("scripts/ordinary-user"));
    command.arg(home).arg("spectrum").args(arguments).env("XDG_RUNTIME_DIR", home.join("run"));
    command.env("WAYLAND_DISPLAY", desktop.wayland()).output().unwrap()
}

#[test]
fn an_ordinary_user_needs_nothing_but_kvm() {
    let desktop = Desktop::new();
    let home = tempfile::Builder::new().prefix("user").tempdir().unwrap();
    let run = |arguments: &[&str]| {
        let output = spectrum(home.path(), &desktop, arguments);
        let [text, said] = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap());
        assert!(output.status.success(), "{arguments:?}: {text}\n{said}");
        (text, said)
    };
    let template = Path::new("/mnt/templates").join(agent::template().file_name().unwrap());
    fs::create_dir_all(home.path().join("kept/templates")).unwrap();
    symlink(template, home.path().join("kept/templates/default")).unwrap();
    fs::write(home.path().join("letter"), "dear\n").unwrap();
    fs::create_dir(home.path().join("run")).unwrap();

    let letter = format!("{}:rw", home.path().join("letter").display());
    let script = "id -un; cat /host/letter; echo answer >/host/letter; ls -A ~ | grep -x kept; touch ~/kept; foot true";
    let application = ["run", "--persist", "mine", "--grant", &letter, "sh", "-c", script];
    let (text, said) = run(&application);
    assert_eq!(text, "user\ndear\n");
    assert!(said.contains("this template is not warm yet"), "{said}");
    let (text, said) = run(&application);
    assert_eq!(text, "user\nanswer\nkept\n", "the home directory is kept");
    assert!(!said.contains("booting"), "it is a clone: {said}");
    assert_eq!(run(&["ps", "--json"]).0, "[]\n");
    run(&["home", "rm", "mine"]);
    run(&["template", "rm", "default"]);
    assert_eq!(fs::read_dir(home.path().join("run/spectrum")).unwrap().count(), 0);
}
