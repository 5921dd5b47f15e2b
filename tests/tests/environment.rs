//! What every whole-VM test relies on: real KVM, a shared directory, a desktop. When one of these fails, look here first.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

fn script(name: &str) -> Command {
    Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts").join(name))
}

fn variable(name: &str) -> PathBuf {
    PathBuf::from(
        env::var_os(name).unwrap_or_else(|| panic!("{name} is not set: run whole-VM tests with scripts/test")),
    )
}

#[test]
fn kvm_uses_the_cpus_virtualisation() {
    let cpu = fs::read_to_string("/proc/cpuinfo").unwrap();
    assert!(cpu.split_whitespace().any(|flag| flag == "svm" || flag == "vmx"), "no svm or vmx among the CPU's flags");
    fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").expect("/dev/kvm opens");
}

#[test]
fn files_reach_the_machine_outside() {
    let share = variable("SANDBOX_SHARE");
    let file = share.join("environment");
    fs::write(&file, "from inside").unwrap();
    assert_eq!(fs::read_to_string(&file).unwrap(), "from inside");
}

#[test]
fn programs_and_kernel_are_there() {
    assert!(variable("SPECTRUM_BIN").is_dir());
    assert!(variable("SPECTRUM_GUEST").is_file());
    for part in ["vmlinuz", "vmlinux", "modules/erofs.ko"] {
        assert!(variable("SPECTRUM_KERNEL").join(part).is_file(), "no {part}");
    }
}

#[test]
fn a_desktop_starts_and_stops() {
    let dir = tempfile::tempdir().unwrap();
    let started = script("compositor").arg("start").arg(dir.path()).output().unwrap();
    assert!(started.status.success(), "{}", String::from_utf8_lossy(&started.stderr));
    let outputs =
        script("compositor").arg("run").arg(dir.path()).args(["swaymsg", "-t", "get_outputs"]).output().unwrap();
    let outputs: serde_json::Value = serde_json::from_slice(&outputs.stdout).unwrap();
    assert_eq!(outputs[0]["name"], "HEADLESS-1");
    assert_eq!(outputs[0]["rect"]["width"], 800);
    assert!(script("compositor").arg("stop").arg(dir.path()).status().unwrap().success());
    assert!(fs::read_dir(dir.path().join("run")).unwrap().next().is_none(), "sockets are left");
}
