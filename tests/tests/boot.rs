//! Debian's kernel boots, starts again and ends.

use std::os::unix::net::UnixListener;

use rustix::process::Signal;
use tests::{Initramfs, Terminal, VmmCommand};

fn boots(kernel: &str, cpus: u32, expected: &str) {
    let vmm = VmmCommand::linux(kernel, Initramfs::probe(&[]), "cpus").arg("--cpus", format!("boot={cpus}")).spawn();
    let ended = vmm.wait();
    ended.assert_success();
    assert!(ended.stdout.contains(&format!("probe: cpus: {expected}\r\n")), "{}", ended.stdout);
    assert!(ended.stdout.contains("probe: done\r\n"), "{}", ended.stdout);
}

#[test]
fn a_bzimage_boots_with_1_cpu() {
    boots("vmlinuz", 1, "0 online, 1 usable");
}

#[test]
fn a_bzimage_boots_with_4_cpus() {
    boots("vmlinuz", 4, "0-3 online, 4 usable");
}

#[test]
fn a_pvh_kernel_boots_with_1_cpu() {
    boots("vmlinux", 1, "0 online, 1 usable");
}

#[test]
fn a_pvh_kernel_boots_with_4_cpus() {
    boots("vmlinux", 4, "0-3 online, 4 usable");
}

/// The second boot happens in the same process, and finds what the first wrote on the persistent memory.
#[test]
fn a_reboot_starts_the_machine_again_in_the_same_process() {
    let command = VmmCommand::probe(&["virtio_pmem", "nd_pmem"], &["reboot-once=/dev/pmem0", "echo"]);
    let image = command.path("image");
    std::fs::write(&image, vec![0; 2 << 20]).unwrap();
    let mut vmm = command.arg("--pmem", format!("file={}", image.display())).spawn();
    vmm.wait_for("probe: reboot-once: restarting");
    vmm.wait_for("probe: reboot-once=/dev/pmem0: boot 2");
    // More than the serial port takes at once: the second machine, too, says when it has room again.
    vmm.wait_for("probe: echo: type");
    let line = "again and again ".repeat(20);
    vmm.type_text(&format!("{}\n", line.trim()));
    vmm.wait_for(&format!("probe: echo: {}", line.trim()));
    vmm.wait_for("probe: done");
    let ended = vmm.wait_here();
    ended.assert_success();
    assert_eq!(ended.stdout.matches("probe: started").count(), 2);
    assert_eq!(std::fs::read(&image).unwrap()[..8], [2, 0, 0, 0, 0, 0, 0, 0]);
}

/// Linux' own driver finds the ID, and each boot has another one.
#[test]
fn a_generation_id_has_its_driver_and_is_new_with_each_boot() {
    let command = VmmCommand::probe(&["virtio_pmem", "nd_pmem"], &["generation", "reboot-once=/dev/pmem0"]);
    let image = command.path("image");
    std::fs::write(&image, vec![0; 2 << 20]).unwrap();
    let mut vmm = command.arg("--pmem", format!("file={}", image.display())).spawn();
    vmm.wait_for("probe: reboot-once=/dev/pmem0: boot 2");
    let ended = vmm.wait_here();
    ended.assert_success();
    let found: Vec<&str> = ended.stdout.lines().filter_map(|line| line.strip_prefix("probe: generation: ")).collect();
    let ids: Vec<&str> =
        found.iter().filter_map(|line| line.strip_prefix("vmgenid reserved ")).map(str::trim).collect();
    assert_eq!(ids.len(), 2, "{found:?}");
    assert!(ids.iter().all(|id| *id != "0".repeat(32)) && ids[0] != ids[1], "{ids:?}");
}

/// The rules bind before the first boot, and nothing takes them back: all that the second one opens must be among them.
#[test]
fn a_machine_confined_by_landlock_reboots() {
    let modules = ["virtio_blk", "virtio-gpu", "virtio_pmem", "nd_pmem"];
    let command = VmmCommand::probe(&modules, &["reboot-once=/dev/vda", "image=/dev/pmem0", "graphics"]).api();
    let [disk, image, console, vsock, wayland] =
        ["disk", "image", "console", "vsock", "wayland"].map(|name| command.path(name));
    std::fs::write(&disk, vec![0; 1 << 20]).unwrap();
    std::fs::write(&image, [0, 1, 2].map(u64::to_le_bytes).concat()).unwrap();
    let _compositor = UnixListener::bind(&wayland).unwrap();
    let vmm = command
        .arg("--disk", format!("path={}", disk.display()))
        .arg("--pmem", format!("file={},discard_writes=on", image.display()))
        .arg("--console", format!("file={}", console.display()))
        .arg("--vsock", format!("cid=3,socket={}", vsock.display()))
        .arg("--gpu", format!("cross-domain,wayland={}", wayland.display()))
        .args(&["--landlock", "-v"])
        .spawn();
    let ended = vmm.wait();
    ended.assert_success();
    for line in ["reboot-once=/dev/vda: boot 2", "image=/dev/pmem0: 2097152 bytes, 3 words", "graphics: cross-domain"] {
        assert!(ended.stdout.contains(&format!("probe: {line}")), "no {line} in\n{}", ended.stdout);
    }
    assert!(ended.stderr.contains("with Landlock (FullyEnforced)"), "{}", ended.stderr);
}

#[test]
fn the_power_button_reaches_the_guest() {
    let mut vmm = VmmCommand::probe(&["button", "evdev"], &["power-button"]).api().spawn();
    let mut client = vmm.client();
    vmm.wait_for("probe: power-button: waiting");
    client.send(&vmm_api::Request::VmPowerButton).unwrap();
    vmm.wait_for("probe: power-button: pressed");
    vmm.wait().assert_success();
}

/// What `end` does to a VMM on a terminal ends it: status 0, and the terminal as it was.
fn ends(command: VmmCommand, raw: bool, end: impl FnOnce(&mut tests::Vmm)) {
    let terminal = Terminal::new();
    let before = terminal.settings();
    let mut vmm = command.spawn_on(&terminal);
    vmm.wait_for("tick 00000010");
    assert_eq!(terminal.settings() != before, raw, "the terminal is in raw mode while the guest has it");
    end(&mut vmm);
    let ended = vmm.wait();
    ended.assert_success();
    assert_eq!(terminal.settings(), before);
}

#[test]
fn sigterm_ends_the_vmm_and_restores_the_terminal() {
    ends(VmmCommand::tiny(), true, |vmm| vmm.signal(Signal::TERM));
}

#[test]
fn sigint_ends_the_vmm_and_restores_the_terminal() {
    ends(VmmCommand::tiny(), true, |vmm| vmm.signal(Signal::INT));
}

#[test]
fn ctrl_c_ends_the_vmm_and_restores_the_terminal() {
    ends(VmmCommand::tiny(), true, |vmm| vmm.type_text("\x03"));
}

#[test]
fn ctrl_c_ends_a_vmm_that_does_not_use_the_terminal() {
    ends(VmmCommand::tiny().arg("--serial", "file=/dev/stdout"), false, |vmm| vmm.type_text("\x03"));
}
