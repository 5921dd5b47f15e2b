//! `spectrum policy`, `doctor`, `completions` and `man`, as they are used.

use std::{
    fs,
    os::unix::net::UnixListener,
    path::Path,
    process::{Command, Output},
};

fn spectrum(home: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_spectrum"));
    command.args(arguments).env_clear().env("HOME", home);
    // Nobody is to be asked on the desktop of who runs this test.
    command.env("DBUS_SESSION_BUS_ADDRESS", "unix:path=/no/bus");
    command
}

fn texts(command: &mut Command) -> (Option<i32>, String, String) {
    let Output { status, stdout, stderr } = command.output().unwrap();
    (status.code(), String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap())
}

#[test]
fn a_policy_is_checked_asked_and_logged() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join(".config/spectrum/policy");
    let run = |arguments: &[&str]| texts(&mut spectrum(folder.path(), arguments));
    fs::create_dir_all(file.parent().unwrap()).unwrap();
    fs::write(&file, "# mine\nopen-url mail https://x.org/* ask\n* * * deny\n").unwrap();
    let path = file.display();
    assert_eq!(run(&["policy", "check"]), (Some(0), format!("{path}: 2 rules, no mistake\n"), String::new()));
    let eval = ["policy", "eval", "open-url", "mail", "https://x.org/a"];
    let rule = format!("{path}:2: open-url mail https://x.org/* ask");
    assert_eq!(run(&eval), (Some(0), format!("ask\t{rule}\n"), String::new()));
    let denied = run(&["policy", "eval", "camera", "mail", "-"]);
    assert_eq!(denied.1, format!("deny\t{path}:3: * * * deny\n"));
    assert_eq!(run(&["policy", "log"]), (Some(0), String::new(), String::new()), "nothing was decided");
    // Nobody can be asked here.
    let decided = run(&["policy", "decide", "open-url", "mail", "https://x.org/a"]);
    assert!(decided.0 == Some(1) && decided.1.starts_with(&format!("deny\t{rule}; not asked: ")), "{decided:?}");
    assert!(decided.1.contains("neither zenity nor kdialog"), "{decided:?}");
    let decided = run(&["policy", "decide", "camera", "mail", "-"]);
    assert_eq!(decided, (Some(1), format!("deny\t{path}:3: * * * deny\n"), String::new()));
    let (_, log, _) = run(&["policy", "log"]);
    let lines: Vec<&str> = log.lines().filter_map(|line| line.split_once(' ')).map(|(_, rest)| rest).collect();
    assert!(lines[0].starts_with(&format!("deny open-url \"mail\" \"https://x.org/a\" ({rule}; not asked")), "{log}");
    assert_eq!(lines[1..], [format!("deny camera \"mail\" \"-\" ({path}:3: * * * deny)")]);
    let unknown = run(&["policy", "eval", "files!", "mail", "-"]);
    assert_eq!((unknown.0, unknown.2.contains("did you mean \"files\"?")), (Some(125), true), "{unknown:?}");

    fs::write(&file, "* * * allow\nopen-url mail * alow\n").unwrap();
    for arguments in [&["policy", "check"][..], &["policy", "check", file.to_str().unwrap()], &eval] {
        let (status, out, error) = run(arguments);
        let expected = format!("spectrum: {path}:2:17: unknown action \"alow\": did you mean \"allow\"?\n");
        assert_eq!((status, out.as_str(), error), (Some(125), "", expected));
    }
    assert!(run(&["policy", "check", "/no/file"]).2.contains("cannot use /no/file"));
}

#[test]
fn the_doctor_says_what_is_missing_and_then_that_it_is_there() {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path();
    let (status, report, _) = texts(&mut spectrum(place, &["doctor"]));
    assert_eq!(status, Some(1), "{report}");
    let line = |report: &str, name: &str| {
        report.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("{name}: {report}")).to_owned()
    };
    assert!(line(&report, "template").contains("MISSING"), "{report}");
    assert!(line(&report, "template").ends_with(" spectrum template build default"), "{report}");
    assert!(line(&report, "compositor").contains("MISSING  no Wayland compositor"), "{report}");
    assert!(line(&report, "runtime folder").contains("warning"), "{report}");

    let template = place.join("templates/default");
    fs::create_dir_all(&template).unwrap();
    let manifest = r#"{"version":1,"suite":"x","kernel":"6.12","packages":{},"files":{}}"#;
    fs::write(template.join("template.json"), manifest).unwrap();
    fs::write(place.join("vmm"), "").unwrap();
    let _compositor = UnixListener::bind(place.join("wayland-1")).unwrap();
    let mut command = spectrum(place, &["doctor", "--json"]);
    command.env("SPECTRUM_HOME", place).env("SPECTRUM_VMM", place.join("vmm"));
    command.env("XDG_RUNTIME_DIR", place).env("WAYLAND_DISPLAY", "wayland-1");
    let (status, report, _) = texts(&mut command);
    let report: serde_json::Value = serde_json::from_str(&report).unwrap();
    let checks = report.as_array().unwrap();
    for name in ["VMM", "compositor", "template", "runtime folder"] {
        let check = checks.iter().find(|check| check["name"] == name).unwrap();
        assert_eq!(check["status"], "ok", "{check}");
    }
    // What is left is up to this machine.
    let missing = checks.iter().any(|check| check["status"] == "missing");
    assert_eq!(status, Some(i32::from(missing)), "{report}");
}

#[test]
fn completions_are_for_every_shell_and_the_manual_has_every_command() {
    let place = Path::new("/");
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let (status, script, error) = texts(&mut spectrum(place, &["completions", shell]));
        assert_eq!((status, error.as_str()), (Some(0), ""));
        assert!(script.contains("doctor") && script.contains("boot-timeout"), "{shell}");
    }
    let (_, script, _) = texts(&mut spectrum(place, &["completions", "bash"]));
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("completions");
    fs::write(&file, script).unwrap();
    let complete = format!(
        ". {}; COMP_WORDS=(spectrum doc) COMP_CWORD=1; _spectrum spectrum doc spectrum; echo ${{COMPREPLY[*]}}",
        file.display()
    );
    let (status, completed, error) = texts(Command::new("bash").args(["--norc", "-c", &complete]));
    assert_eq!((status, completed.as_str(), error.as_str()), (Some(0), "doctor\n", ""));
    let (status, page, _) = texts(&mut spectrum(place, &["man"]));
    assert_eq!(status, Some(0));
    for text in [".TH spectrum 1", "SPECTRUM RUN", "SPECTRUM TEMPLATE BUILD", "boot\\-timeout"] {
        assert!(page.contains(text), "{text}");
    }
}
