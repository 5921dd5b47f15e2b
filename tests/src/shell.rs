//! A guest that does what is typed: a shell as its first process, with the machine's file system at /host.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;

use crate::{Initramfs, Vmm, VmmCommand, programs};

/// What a line of its answers begins with.
const SAID: &str = "said:";
/// What it says when it has booted.
const READY: &str = "the shell is ready";

/// Its first process. Without echo, so that what is typed is not taken for an answer. Redirections of `exec` outlive their line.
pub const INIT: &str = "#!/bin/busybox sh
export PATH=/bin
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev 2>/dev/null
for module in /modules/*; do [ ! -e $module ] || insmod $module; done
mkdir /host
mount -t virtiofs -o nosuid,nodev host /host
stty -echo
echo the shell is ready
while read -r line; do
    eval \"$line\" >/tmp/out 2>&1
    echo \"said: $(tr '\\n' ' ' </tmp/out)\"
done
";

/// A machine with such a guest.
#[must_use]
pub fn command() -> VmmCommand {
    let initramfs = Initramfs::new()
        .program("/bin/busybox", &programs::existing("/bin/busybox".into()))
        .modules(&["virtiofs"])
        .file("/init", INIT.as_bytes());
    VmmCommand::linux("vmlinuz", initramfs, "").arg("--fs", "tag=host").api()
}

/// Waits until the guest has booted.
///
/// # Panics
/// If it does not.
pub fn wait(vmm: &mut Vmm) {
    vmm.wait_for(READY);
}

/// Has the guest run a line; all it printed, lines separated by spaces.
///
/// # Panics
/// If there is no answer.
pub fn ask(vmm: &mut Vmm, line: &str) -> String {
    vmm.type_text(&format!("{line}\n"));
    answer(&vmm.wait_for(SAID))
}

fn answer(line: &str) -> String {
    let (_, text) = line.split_once(SAID).expect("an answer");
    text.trim().to_owned()
}

/// As [`ask`], of a guest whose serial port is this socket.
///
/// # Panics
/// If there is no answer.
pub fn ask_on(serial: &UnixStream, line: &str) -> String {
    let mut to = serial;
    to.write_all(format!("{line}\n").as_bytes()).expect("the machine lives");
    let found = BufReader::new(serial).lines().find(|line| line.as_ref().map_or(true, |line| line.contains(SAID)));
    answer(&found.expect("the machine lives").expect("text"))
}
