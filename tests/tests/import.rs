//! Machines that bring their own system, from a folder of Spectrum OS to one that runs.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tests::desktop::Application;
use tests::{programs, tiny};

/// The guest is none of Spectrum OS: it counts on its serial port, which is all that a test of the way there needs.
#[test]
fn a_machine_is_imported_and_runs() {
    let place = tempfile::Builder::new().prefix("im").tempdir().unwrap();
    let path = |name: &str| place.path().join(name);
    for folder in ["machine/blk", "machine/fs", "machine/providers/net", "home", "rt"] {
        fs::create_dir_all(path(folder)).unwrap();
    }
    fs::set_permissions(path("rt"), PermissionsExt::from_mode(0o700)).unwrap();
    tiny::write_counter(&path("machine/vmlinux"));
    fs::write(path("machine/blk/root.img"), vec![0; 1 << 20]).unwrap();
    fs::write(path("machine/fs/type"), "nix\n").unwrap();
    let settings = [
        ("HOME", path("home")),
        ("XDG_RUNTIME_DIR", path("rt")),
        ("SPECTRUM_HOME", path("kept")),
        ("XDG_CONFIG_HOME", path("config")),
        ("SPECTRUM_TEMPLATE", "counter".into()),
    ];
    let output = |arguments: &[&str]| -> Output {
        let mut command = Command::new(programs::program("spectrum"));
        command.args(arguments).envs(settings.clone()).stdin(Stdio::null()).output().unwrap()
    };
    let machine = path("machine").display().to_string();
    let imported = output(&["import", &machine, "counter"]);
    let made = format!(
        "{}\n{}\n",
        path("kept/templates/counter").display(),
        path("config/spectrum/apps/counter.toml").display()
    );
    assert_eq!(String::from_utf8_lossy(&imported.stdout), made, "{imported:?}");
    let refused = output(&["run", "--no-wayland", "counter", "argument"]);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("takes no arguments"), "{refused:?}");
    let refused = output(&["template", "warm", "counter"]);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("brings its own kernel"), "{refused:?}");

    let variables = settings.clone();
    let variables: Vec<(&str, &Path)> = variables.iter().map(|(name, path)| (*name, path.as_path())).collect();
    let application = Application::start_with(None, &["--memory", "64M"], &variables, &["counter"]);
    let deadline = Instant::now() + Duration::from_secs(60);
    let ps = || -> Vec<Value> { serde_json::from_slice(&output(&["ps", "--json"]).stdout).unwrap() };
    while !ps().iter().any(|vm| vm["state"] == "running") {
        assert!(Instant::now() < deadline, "it does not run");
        std::thread::sleep(Duration::from_millis(20));
    }
    let vm = ps().remove(0);
    assert_eq!((&vm["name"], &vm["template"], &vm["origin"]), (&"counter-1".into(), &"counter".into(), &"boot".into()));
    let grants: Vec<_> =
        vm["grants"].as_array().unwrap().iter().map(|grant| (grant["name"].as_str(), &grant["writable"])).collect();
    assert_eq!(grants, [(Some("config"), &Value::Bool(false)), (Some("disk"), &Value::Bool(true))]);
    while !String::from_utf8_lossy(&output(&["logs", "counter-1"]).stdout).contains("tick ") {
        assert!(Instant::now() < deadline, "its console says nothing");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(output(&["kill", "counter-1"]).status.success());
    assert_eq!(application.wait().0.code(), Some(125));
}
