//! A guest that means harm.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;

use tests::VmmCommand;

/// A minute of garbage in every virtqueue, BAR and configuration register: the VMM lives, answers, and every device works
/// again once its driver has reset it.
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
        "echo",
    ];
    let modules = ["virtio-rng", "virtio_pmem", "nd_pmem", "virtio_blk", "vmw_vsock_virtio_transport"];
    let command = VmmCommand::probe(&modules, &jobs).api();
    let [image, disk, console, socket] = ["image", "disk", "console", "socket"].map(|name| command.path(name));
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
    let mut vmm = command
        .arg("--pmem", format!("file={},discard_writes=on", image.display()))
        .arg("--disk", format!("path={}", disk.display()))
        .arg("--console", format!("file={}", console.display()))
        .arg("--vsock", format!("cid=3,socket={}", socket.display()))
        .spawn();
    let mut client = vmm.client();
    vmm.wait_for("probe: garbage: begins with 0x");
    client.ping().unwrap();
    vmm.wait_for("probe: garbage: the entropy device");
    client.ping().unwrap();
    let done = vmm.wait_for("probe: garbage=60: ");
    assert!(done.ends_with(" accesses"), "{done}");
    vmm.wait_for("probe: entropy: ");
    assert_eq!(vmm.wait_for("probe: image"), "probe: image=/dev/pmem0: 2097152 bytes, 1000 words, 2089152 zeros");
    assert_eq!(vmm.wait_for("probe: overwrite"), "probe: overwrite=/dev/vda: written by guest");
    assert_eq!(vmm.wait_for("probe: write"), "probe: write=/dev/hvc0: done");
    assert_eq!(vmm.wait_for("probe: vsock"), "probe: vsock-connect=5000: hello from the host");
    assert_eq!(peer.join().unwrap(), "hello from the guest\n");
    vmm.wait_for("probe: echo: type");
    vmm.type_text("still there?\n");
    vmm.wait_for("probe: echo: still there?");
    let ended = vmm.wait_here();
    ended.assert_success();
    assert!(!ended.stdout.contains("FAILED"), "{}", ended.stdout);
    assert!(!ended.stderr.contains("panicked"), "{}", ended.stderr);
}
