//! Every mistake of a user's gets one sentence that says what to do, and a status that is not 0.

use std::fs;
use std::path::Path;
use std::process::Command;

use tests::{Ended, VmmCommand, programs, tiny};

/// The process says exactly `sentence`, and nothing else.
fn says(ended: &Ended, sentence: &str) {
    assert_eq!((ended.stderr.as_str(), ended.stdout.as_str()), (format!("spectrum-vmm: {sentence}\n").as_str(), ""));
    assert!(matches!(ended.status.code(), Some(1 | 2)), "{}", ended.status);
}

/// A command line that boots, but for what a test changes.
fn command() -> VmmCommand {
    VmmCommand::tiny().arg("--serial", "null")
}

fn path(path: &Path) -> String {
    path.display().to_string()
}

/// The program, started by a shell that prepares something first.
fn shell(preparation: &str) -> Command {
    let mut shell = Command::new("unshare");
    let program = programs::program("spectrum-vmm");
    shell.args(["--mount", "sh", "-ec", &format!("{preparation}\nexec \"$@\""), "sh"]).arg(program);
    shell
}

#[test]
fn no_kvm_device() {
    let ended = command().run_as(shell("mount -t tmpfs none /dev; mknod -m 666 /dev/null c 1 3"));
    let sentence =
        "/dev/kvm does not exist: load the KVM module (kvm_intel or kvm_amd) or enable virtualisation in the firmware";
    says(&ended, sentence);
}

#[test]
fn no_permission_for_kvm() {
    let mut launcher = shell(
        "chmod 600 /dev/kvm; cp \"$1\" /tmp/spectrum-vmm-of-nobody; shift; set -- \
         setpriv --reuid=65534 --regid=65534 --clear-groups /tmp/spectrum-vmm-of-nobody \"$@\"",
    );
    launcher.current_dir("/");
    let ended = command().run_as(launcher);
    says(&ended, "no permission to open /dev/kvm: add your user to the group that owns it (usually kvm)");
}

/// What KVM cannot do without the CPU's help ends a guest; the VMM then says what is the matter.
/// Where there is no virtualisation, a machine that fails fails for that reason.
#[test]
fn kvm_without_hardware_virtualisation() {
    let fake = "sed 's/ svm\\b//; s/ vmx\\b//' /proc/cpuinfo >/tmp/cpuinfo; mount --bind /tmp/cpuinfo /proc/cpuinfo";
    let lost = || {
        let command = command();
        let kernel = command.path("kernel");
        tiny::write_lost(&kernel);
        command.arg("--kernel", kernel)
    };
    let sentence = "the machine stopped: this host's KVM works without hardware virtualisation (the CPU has neither vmx nor \
                    svm), and unmodified kernels do not run on that; use a host with virtualisation enabled";
    says(&lost().run_as(shell(fake)), sentence);
    says(&lost().run(), "the machine stopped: KVM could not emulate an instruction of the guest");
}

#[test]
fn kernels_that_are_none() {
    let missing = command().arg("--kernel", "/nowhere/vmlinuz").run();
    says(&missing, "cannot open the kernel /nowhere/vmlinuz: No such file or directory (os error 2)");

    let directory = command().arg("--kernel", "/etc").run();
    says(&directory, "cannot open the kernel /etc: is a directory");

    let text = command();
    let file = text.path("text");
    fs::write(&file, "not a kernel at all\n".repeat(1000)).unwrap();
    let reason = "this is not a kernel: it is neither a bzImage nor an ELF file";
    says(&text.arg("--kernel", &file).run(), &format!("cannot boot {}: {reason}", path(&file)));

    let empty = command();
    let file = empty.path("empty");
    fs::write(&file, "").unwrap();
    says(&empty.arg("--kernel", &file).run(), &format!("cannot boot {}: the kernel is empty", path(&file)));

    // Any program will do.
    let program = programs::program("guest-probe");
    let reason = "the kernel is an ELF file without a PVH note; use a kernel built with CONFIG_PVH=y, or its bzImage";
    says(&command().arg("--kernel", &program).run(), &format!("cannot boot {}: {reason}", path(&program)));
}

#[test]
fn truncated_kernels() {
    for name in ["vmlinuz", "vmlinux"] {
        let command = command();
        let file = command.path(name);
        let mut bytes = fs::read(programs::kernel(name)).unwrap();
        bytes.truncate(1 << 20);
        fs::write(&file, bytes).unwrap();
        let ended = command.arg("--kernel", &file).arg("--memory", "size=256M").run();
        let begin = format!(
            "spectrum-vmm: cannot boot {}: the kernel is truncated: it has 1048576 bytes, its header announces ",
            path(&file)
        );
        let number = ended.stderr.strip_prefix(&begin).unwrap_or_else(|| panic!("{}", ended.stderr));
        let announced: u64 = number.strip_suffix('\n').unwrap().parse().unwrap();
        assert!(announced > 1 << 20, "{announced}");
        assert_eq!(ended.status.code(), Some(1));
    }
}

#[test]
fn files_that_are_missing() {
    let initramfs = command().arg("--initramfs", "/nowhere/initramfs").run();
    says(&initramfs, "cannot open the initramfs /nowhere/initramfs: No such file or directory (os error 2)");
    let pmem = command().arg("--pmem", "file=/nowhere/image").run();
    says(&pmem, "_pmem0: cannot open /nowhere/image: No such file or directory (os error 2)");
    let disk = command().arg("--disk", "path=/nowhere/image").run();
    says(&disk, "_disk0: cannot open /nowhere/image: No such file or directory (os error 2)");
    let rng = command().arg("--rng", "src=/nowhere/random").run();
    says(&rng, "_rng: cannot open /nowhere/random: No such file or directory (os error 2)");
}

#[test]
fn memory_sizes_that_are_impossible() {
    says(&command().arg("--memory", "size=0").run(), "memory.size: a machine needs memory; give a size such as 512M");
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap();
    let total = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:")?.strip_suffix("kB")).unwrap();
    let host = total.trim().parse::<u64>().unwrap() >> 10;
    let sentence = format!("memory.size: 1048576 MiB is more than the {host} MiB this host has");
    says(&command().arg("--memory", "size=1T").run(), &sentence);
}

#[test]
fn one_socket_for_two_devices() {
    let command = command();
    let socket = path(&command.path("socket"));
    let ended = command
        .arg("--vsock", format!("cid=3,socket={socket}"))
        .arg("--gpu", format!("cross-domain,wayland={socket}"))
        .run();
    let reason = "is already used by vsock.socket; give each device a socket of its own";
    says(&ended, &format!("gpu[0].wayland: the socket {socket} {reason}"));
}

#[test]
fn the_api_socket_is_no_device_s() {
    let command = command();
    let socket = path(&command.path("socket"));
    let ended = command.arg("--vsock", format!("cid=3,socket={socket}")).arg("--api-socket", &socket).run();
    says(&ended, &format!("--api-socket and --vsock cannot both use {socket}; give each a path of its own"));
}

#[test]
fn the_api_socket_of_another_process() {
    let command = command();
    let socket = command.path("api");
    let _other = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let reason = "is in use by another process; stop that one or choose another path";
    says(&command.api().run(), &format!("the socket {} {reason}", path(&socket)));
}

#[test]
fn flags_and_keys_that_do_not_exist() {
    says(&VmmCommand::new().arg("--kernl", "/k").run(), "unknown flag --kernl (did you mean --kernel?)");
    let key = "--memory: unknown key \"sise\" (did you mean \"size\"?); accepted: size=, shared=, hugepages=, thp=, hotplug_method=";
    says(&command().arg("--memory", "sise=1M").run(), key);
    let word = "--serial: unknown key \"tyt\" (did you mean \"tty\"?); accepted: tty, pty, null, off, file=, socket=";
    says(&command().arg("--serial", "tyt").run(), word);
    says(&command().arg("--tpm", "socket=/x").run(), "--tpm is not supported yet; leave it out");
    let nothing = "nothing to do: give --kernel FILE to boot a machine, --restore to go on with one, or --api-socket PATH to wait \
                   for requests";
    says(&VmmCommand::new().run(), nothing);
}

/// `spectrum run` where nothing is prepared: one sentence a step, which says what to do next.
#[test]
fn an_application_on_a_machine_that_is_not_prepared() {
    let place = tempfile::tempdir().unwrap();
    let home = place.path().join("home");
    let run = |mut command: Command, flags: &[&str]| {
        command.env_remove("WAYLAND_DISPLAY").env_remove("SPECTRUM_TEMPLATE").env("SPECTRUM_HOME", &home);
        command.env("XDG_RUNTIME_DIR", place.path()).args(["run"]).args(flags).arg("foot");
        let output = command.output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!((output.status.code(), said.lines().count()), (Some(125), 1), "{said}");
        said
    };
    let spectrum = || Command::new(programs::program("spectrum"));
    let build = "spectrum template build default";
    assert_eq!(run(spectrum(), &[]), format!("spectrum: there is no template yet: make one with `{build}`\n"));

    let template = home.join("templates/default");
    fs::create_dir_all(&template).unwrap();
    let manifest =
        r#"{"version":1,"suite":"x","kernel":"6.12","packages":{},"files":{"vmlinuz":{"bytes":0,"sha256":""}}}"#;
    fs::write(template.join("template.json"), manifest).unwrap();
    let said = run(spectrum(), &[]);
    assert!(said.contains("is damaged: vmlinuz: No such file") && said.contains("spectrum template build"), "{said}");

    fs::write(template.join("vmlinuz"), "").unwrap();
    let said = run(spectrum(), &[]);
    assert!(said.contains("WAYLAND_DISPLAY is not set; use --no-wayland"), "{said}");

    for flags in [&["--no-wayland"][..], &["--no-wayland", "--boot"]] {
        let mut hidden = Command::new("unshare");
        let preparation =
            "mount -t tmpfs none /dev; mknod -m 666 /dev/null c 1 3; mknod -m 666 /dev/urandom c 1 9; exec \"$@\"";
        hidden.args(["--mount", "sh", "-ec", preparation, "sh"]).arg(programs::program("spectrum"));
        let said = run(hidden, flags);
        assert!(said.starts_with("spectrum: there is no /dev/kvm; mend it: sudo modprobe"), "{said}");
    }
}
