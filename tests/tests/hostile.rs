//! A guest that means harm.

use std::collections::VecDeque;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;

use tests::{Initramfs, VmmCommand};

/// Takes every connection and never says a word; keeps some, and hangs up on the others.
fn silent_compositor(listener: &UnixListener) {
    let mut held = VecDeque::new();
    for stream in listener.incoming() {
        held.push_back(stream.unwrap());
        if held.len() > 16 {
            held.pop_front();
        }
    }
}

/// A minute of garbage in every virtqueue, BAR and configuration register, and in those of the I/O APIC: the VMM lives,
/// answers, every device works again once its driver has reset it, and interrupts arrive.
#[test]
fn a_minute_of_garbage_harms_nobody_else() {
    let jobs = [
        "entropy",
        "garbage=60",
        "entropy",
        "image=/dev/pmem0",
        "overwrite=/dev/vda",
        "write=/dev/hvc0",
        "vsock-connect=5000",
        "graphics",
        "echo",
    ];
    let modules = ["virtio-rng", "virtio_pmem", "nd_pmem", "virtio_blk", "vmw_vsock_virtio_transport", "virtio-gpu"];
    // Registers that a driver of the kernel's has are kept from /dev/mem otherwise.
    let command = VmmCommand::linux("vmlinuz", Initramfs::probe(&modules), "").api();
    let cmdline = format!("console=ttyS0 quiet panic=-1 iomem=relaxed -- {}", jobs.join(" "));
    let [image, disk, console, socket, wayland] =
        ["image", "disk", "console", "socket", "wayland"].map(|name| command.path(name));
    fs::write(&image, (0..1000u64).flat_map(u64::to_le_bytes).collect::<Vec<u8>>()).unwrap();
    fs::write(&disk, vec![0; 1 << 20]).unwrap();
    let host = UnixListener::bind(command.path("socket_5000")).unwrap();
    let peer = std::thread::spawn(move || {
        let stream = host.accept().unwrap().0;
        let mut heard = String::new();
        BufReader::new(&stream).read_line(&mut heard).unwrap();
        (&stream).write_all(b"hello from the host\n").unwrap();
        heard
    });
    let compositor = UnixListener::bind(&wayland).unwrap();
    std::thread::spawn(move || silent_compositor(&compositor));
    let mut vmm = command
        .arg("--cmdline", cmdline)
        .arg("--pmem", format!("file={},discard_writes=on", image.display()))
        .arg("--disk", format!("path={}", disk.display()))
        .arg("--console", format!("file={}", console.display()))
        .arg("--vsock", format!("cid=3,socket={}", socket.display()))
        .arg("--gpu", format!("cross-domain,wayland={}", wayland.display()))
        .arg("--fs", "tag=host")
        .spawn();
    let mut client = vmm.client();
    let attacked = vmm.wait_for("probe: garbage: begins with 0x");
    for device in ["0x1050", "0x105a"] {
        assert!(attacked.contains(device), "no graphics device or no file system: {attacked}");
    }
    client.ping().unwrap();
    let answered = vmm.wait_for("requests answered by the graphics device");
    println!("{answered}");
    assert!(!answered.contains("garbage: 0 "), "nothing got through to it: {answered}");
    vmm.wait_for("probe: garbage: the entropy device");
    client.ping().unwrap();
    let done = vmm.wait_for("probe: garbage=60: ");
    println!("{done}");
    assert!(done.ends_with(" accesses"), "{done}");
    vmm.wait_for("probe: entropy: ");
    assert_eq!(vmm.wait_for("probe: image"), "probe: image=/dev/pmem0: 2097152 bytes, 1000 words, 2089152 zeros");
    assert_eq!(vmm.wait_for("probe: overwrite"), "probe: overwrite=/dev/vda: written by guest");
    assert_eq!(vmm.wait_for("probe: write"), "probe: write=/dev/hvc0: done");
    assert_eq!(vmm.wait_for("probe: vsock"), "probe: vsock-connect=5000: hello from the host");
    assert_eq!(vmm.wait_for("probe: graphics"), "probe: graphics: cross-domain version 1, channels 0x2");
    assert_eq!(peer.join().unwrap(), "hello from the guest\n");
    vmm.wait_for("probe: echo: type");
    vmm.type_text("still there?\n");
    vmm.wait_for("probe: echo: still there?");
    let ended = vmm.wait_here();
    ended.assert_success();
    assert!(!ended.stdout.contains("FAILED"), "{}", ended.stdout);
    assert!(!ended.stderr.contains("panicked"), "{}", ended.stderr);
}
