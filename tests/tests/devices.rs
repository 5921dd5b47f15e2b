//! The devices, used by Debian's drivers.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread;

use tests::{Output, TIMEOUT, VmmCommand};

const MODULES: &[&str] = &["virtio-rng", "virtio_pmem", "nd_pmem", "virtio_blk", "vmw_vsock_virtio_transport"];

/// `words` numbers that count up from 0.
fn write_words(path: &Path, words: u64) {
    let bytes: Vec<u8> = (0..words).flat_map(u64::to_le_bytes).collect();
    fs::write(path, bytes).unwrap();
}

/// Says a line to whoever comes and returns the one that is said.
fn answer(stream: UnixStream, line: &str) -> String {
    let mut heard = String::new();
    let mut reader = BufReader::new(&stream);
    reader.read_line(&mut heard).unwrap();
    (&stream).write_all(format!("{line}\n").as_bytes()).unwrap();
    heard
}

/// Connects to port 5001 of the guest and talks.
fn call(socket: &Path) -> String {
    let stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(TIMEOUT)).unwrap();
    (&stream).write_all(b"CONNECT 5001\n").unwrap();
    let (mut ok, mut heard) = (String::new(), String::new());
    let mut reader = BufReader::new(&stream);
    reader.read_line(&mut ok).unwrap();
    assert!(ok.starts_with("OK ") && ok.trim_end()[3..].parse::<u32>().is_ok(), "{ok:?}");
    reader.read_line(&mut heard).unwrap();
    (&stream).write_all(b"hello from outside\n").unwrap();
    heard
}

/// One guest uses them all, one after another.
#[test]
fn every_device_works() {
    let command = VmmCommand::probe(
        MODULES,
        &[
            "echo",
            "entropy",
            "image=/dev/pmem0",
            "overwrite=/dev/pmem0",
            "overwrite=/dev/pmem1",
            "image=/dev/vda",
            "refused=/dev/vda",
            "image=/dev/vdb",
            "overwrite=/dev/vdb",
            "write=/dev/hvc0",
            "vsock-connect=5000",
            "vsock-listen=5001",
        ],
    );
    let [shared, own, disk, data, random, console, socket] =
        ["shared", "own", "disk", "data", "random", "console", "socket"].map(|name| command.path(name));
    // 2 MiB and 40000 bytes: neither pages nor 2 MiB.
    let words = ((2 << 20) + 40_000) / 8;
    write_words(&shared, words);
    write_words(&own, 1000);
    write_words(&disk, 4096);
    write_words(&data, 4096);
    fs::write(&random, (0..1 << 20).map(|i: u32| 0x80 | i.to_le_bytes()[0]).collect::<Vec<u8>>()).unwrap();
    let host = UnixListener::bind(command.path("socket_5000")).unwrap();
    let peer = thread::spawn(move || answer(host.accept().unwrap().0, "hello from the host"));
    let mut vmm = command
        .arg("--pmem", format!("file={},discard_writes=on", shared.display()))
        .args(&[format!("file={}", own.display())])
        .arg("--disk", format!("path={},readonly=on", disk.display()))
        .args(&[format!("path={}", data.display())])
        .arg("--rng", format!("src={}", random.display()))
        .arg("--console", format!("file={}", console.display()))
        .arg("--vsock", format!("cid=3,socket={}", socket.display()))
        .spawn();
    vmm.wait_for("probe: echo: type");
    vmm.type_text("Hello, guest!\n");
    vmm.wait_for("probe: vsock-listen: ready");
    assert_eq!(call(&socket), "hello from the guest\n");
    let ended = vmm.wait_here();
    ended.assert_success();
    let said = |job: &str| {
        let start = format!("probe: {job}: ");
        let lines: Vec<&str> = ended.stdout.lines().filter_map(|line| line.strip_prefix(&start)).collect();
        (*lines.last().unwrap_or_else(|| panic!("no {job} in\n{}", ended.stdout))).to_owned()
    };
    assert_eq!(said("echo"), "Hello, guest!");
    let entropy = said("entropy");
    let bytes: Vec<u8> =
        (0..entropy.len() / 2).map(|i| u8::from_str_radix(&entropy[2 * i..][..2], 16).unwrap()).collect();
    assert_eq!(bytes.len(), 32);
    assert!(bytes.iter().all(|byte| byte & 0x80 != 0), "these are not the host's: {entropy}");
    assert_eq!(said("image=/dev/pmem0"), format!("{} bytes, {words} words, {} zeros", 4 << 20, (4 << 20) - 8 * words));
    assert_eq!(said("overwrite=/dev/pmem0"), "written by guest");
    assert_eq!(said("overwrite=/dev/pmem1"), "written by guest");
    assert_eq!(said("image=/dev/vda"), "32768 bytes, 4096 words, 0 zeros");
    assert!(said("refused=/dev/vda").contains("os error"));
    assert_eq!(said("overwrite=/dev/vdb"), "written by guest");
    assert_eq!(said("vsock-connect=5000"), "hello from the host");
    assert_eq!(said("vsock-listen=5001"), "hello from outside");
    assert!(!ended.stdout.contains("FAILED"), "{}", ended.stdout);

    assert_eq!(peer.join().unwrap(), "hello from the guest\n");
    assert!(fs::read_to_string(&console).unwrap().contains("hello from the guest"));
    let begins = |path: &Path| fs::read(path).unwrap()[..16].to_vec();
    assert_eq!((begins(&own), begins(&data)), (b"written by guest".to_vec(), b"written by guest".to_vec()));
    assert_eq!(fs::metadata(&own).unwrap().len(), 8000, "the padding is not the file's");
    let unchanged: Vec<u8> = (0..words).flat_map(u64::to_le_bytes).collect();
    assert!(fs::read(&shared).unwrap() == unchanged, "what is discarded does not reach the file");
    assert!(!socket.exists(), "the socket goes with its VMM");
}

/// The first process has its standard streams on the virtio console.
fn on_console() -> VmmCommand {
    VmmCommand::probe(&[], &["echo"]).arg("--cmdline", "console=hvc0 quiet panic=-1 -- echo")
}

#[test]
fn the_virtio_console_on_standard_input_and_output() {
    let mut vmm = on_console().arg("--serial", "off").arg("--console", "tty").spawn();
    vmm.wait_for("probe: echo: type");
    vmm.type_text("Hello, guest!\n");
    vmm.wait_for("probe: echo: Hello, guest!");
    vmm.wait_for("probe: done");
    vmm.wait().assert_success();
}

#[test]
fn the_virtio_console_on_a_pseudo_terminal() {
    let mut vmm = on_console().arg("--serial", "null").arg("--console", "pty").api().spawn();
    let path = vmm.client().info().unwrap().config.console.file.unwrap();
    let terminal = fs::File::options().read(true).write(true).open(path).unwrap();
    let mut guest = Output::collect(terminal.try_clone().unwrap());
    guest.wait_for("probe: echo: type", TIMEOUT).unwrap();
    (&terminal).write_all(b"Hello, guest!\n").unwrap();
    guest.wait_for("probe: echo: Hello, guest!", TIMEOUT).unwrap();
    vmm.wait_here().assert_success();
}
