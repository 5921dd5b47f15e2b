//! What is seen of long work: bars on a terminal, lines elsewhere.

use std::{
    fs::{self, File},
    io::{Read, Write},
    os::unix::fs::PermissionsExt,
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{CWD, FileType, Mode, mknodat},
    io::Errno,
    pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt},
    termios::{Winsize, tcsetwinsize},
};

/// A user with a machine to import and a template to refresh. What its kernel's modules are is known when somebody has written to
/// the pipe `go`.
struct Desk {
    folder: tempfile::TempDir,
}

impl Desk {
    fn new() -> Self {
        let desk = Self { folder: tempfile::tempdir().unwrap() };
        desk.write("appvm/vmlinux", b"\x7fELF...");
        desk.write("appvm/blk/root.img", &vec![7; 3 << 20]);
        desk.write("home/templates/web/root.erofs", b"root");
        let manifest = r#"{"version":1,"suite":"trixie","kernel":"6.1","packages":{},"files":{"root.erofs":{"bytes":4,"sha256":""}}}"#;
        desk.write("home/templates/web/template.json", manifest.as_bytes());
        desk.write("kernel/lib/modules/6.12/modules.dep.bin", b"");
        desk.write("kernel/vmlinuz", &kernel());
        desk.write("guest", &guest());
        let pipe = desk.path("go");
        mknodat(CWD, &pipe, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
        let tool = desk.write("bin/modprobe", format!("#!/bin/sh\nread line <{}\n", pipe.display()).as_bytes());
        fs::set_permissions(tool, fs::Permissions::from_mode(0o755)).unwrap();
        desk
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, bytes).unwrap();
        path
    }

    fn spectrum(&self, arguments: &[&str], terminal: &str) -> Command {
        let path = format!("{}:{}", self.path("bin").display(), std::env::var("PATH").unwrap());
        let mut command = Command::new(env!("CARGO_BIN_EXE_spectrum"));
        command.args(arguments).current_dir(self.folder.path()).env_clear().env("PATH", path).env("TERM", terminal);
        command.env("HOME", self.folder.path()).env("SPECTRUM_HOME", self.path("home")).stdin(Stdio::null());
        command.stdout(Stdio::piped());
        command
    }

    /// Lets all modules be known, as long as the pipe is open.
    fn go(&self) -> File {
        let mut pipe = File::options().read(true).write(true).open(self.path("go")).unwrap();
        pipe.write_all(&[b'\n'; 100]).unwrap();
        pipe
    }
}

/// A terminal of a program's messages.
struct Screen {
    master: File,
    text: String,
}

impl Screen {
    /// Starts it with one.
    fn of(command: &mut Command) -> (Self, Child) {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = openpt(flags).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let terminal = ioctl_tiocgptpeer(&master, flags).unwrap();
        tcsetwinsize(&terminal, Winsize { ws_row: 24, ws_col: 100, ws_xpixel: 0, ws_ypixel: 0 }).unwrap();
        let child = command.stderr(terminal).spawn().unwrap();
        // The program's end shall be the terminal's.
        command.stderr(Stdio::null());
        (Self { master: master.into(), text: String::new() }, child)
    }

    /// Reads until it shows `text`, or, without one, to its end.
    fn read(&mut self, text: Option<&str>) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while text.is_none_or(|text| !self.text.contains(text)) {
            let left = Timespec::try_from(deadline.saturating_duration_since(Instant::now())).unwrap();
            let count = poll(&mut [PollFd::new(&self.master, PollFlags::IN)], Some(&left)).unwrap();
            assert!(count > 0, "no {text:?} in {:?}", self.text);
            let mut buffer = [0; 4096];
            match self.master.read(&mut buffer) {
                Ok(count) => self.text.push_str(&String::from_utf8_lossy(&buffer[..count])),
                // Nobody has it any more.
                Err(error) if error.raw_os_error() == Some(Errno::IO.raw_os_error()) && text.is_none() => break,
                Err(error) => panic!("no {text:?} in {:?}: {error}", self.text),
            }
        }
    }

    /// The lines that stay.
    fn lines(&self) -> Vec<String> {
        let last =
            |line: &str| without_times(line.rsplit("\x1b[2K").next().unwrap_or_default().trim_start_matches('\r'));
        self.text.split("\r\n").map(last).filter(|line| !line.is_empty()).collect()
    }
}

/// With T for each number of seconds.
fn without_times(line: &str) -> String {
    let words: Vec<&str> = line.split(' ').collect();
    let time = |at: usize| words.get(at + 1).is_some_and(|next| next.starts_with('s')) && words[at].contains('.');
    let word = |(at, word): (usize, &&str)| match time(at) {
        true => format!("{}T", if word.starts_with('(') { "(" } else { "" }),
        false => (*word).to_owned(),
    };
    words.iter().enumerate().map(word).collect::<Vec<_>>().join(" ")
}

const REFRESH: [&str; 7] = ["template", "refresh", "web", "--kernel", "kernel", "--guest", "guest"];

/// What is told of a refreshed template.
fn lines_of_refresh(desk: &Desk) -> [String; 6] {
    let target = desk.path("home/templates/web");
    [
        "[1/2] kernel".into(),
        "      6.12".into(),
        "      T s".into(),
        "[2/2] kernel image and initramfs".into(),
        "      T s".into(),
        format!("template web is in {} (T s)", target.display()),
    ]
}

#[test]
fn without_a_terminal_there_are_lines() {
    let desk = Desk::new();
    let _open = desk.go();
    let output = desk.spectrum(&REFRESH, "xterm").output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(text.lines().map(without_times).collect::<Vec<_>>(), lines_of_refresh(&desk));
    let output = desk.spectrum(&["import", "appvm"], "xterm").output().unwrap();
    assert_eq!((output.status.code(), String::from_utf8_lossy(&output.stderr).as_ref()), (Some(0), ""));
}

#[test]
fn a_terminal_has_a_bar_while_something_is_done() {
    let desk = Desk::new();
    let (mut screen, mut child) = Screen::of(&mut desk.spectrum(&REFRESH, "xterm"));
    // Seen while it waits for the kernel's modules, and later.
    screen.read(Some("s kernel image and initramfs"));
    let seen = screen.text.len();
    screen.read(Some("1s kernel image and initramfs"));
    assert!(screen.text.len() > seen);
    let _open = desk.go();
    screen.read(None);
    assert!(child.wait().unwrap().success());
    assert!(screen.text.contains("      hashing ["), "{:?}", screen.text);
    assert_eq!(screen.lines(), lines_of_refresh(&desk), "{:?}", screen.text);

    let (mut screen, child) = Screen::of(&mut desk.spectrum(&["import", "appvm"], "xterm"));
    screen.read(None);
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success() && output.stdout.starts_with(desk.path("home").as_os_str().as_encoded_bytes()));
    for bar in ["      writing root.img [", "      hashing [", "/3.00 MiB "] {
        assert!(screen.text.contains(bar), "{bar:?}: {:?}", screen.text);
    }
    assert_eq!(screen.lines(), [""; 0], "{:?}", screen.text);
}

#[test]
fn there_is_no_bar_where_none_is_wanted_or_possible() {
    let desk = Desk::new();
    let _open = desk.go();
    for (quiet, terminal) in [(true, "xterm"), (false, "dumb")] {
        let options = quiet.then_some("--quiet");
        let arguments: Vec<&str> = options.into_iter().chain(REFRESH).collect();
        let (mut screen, mut child) = Screen::of(&mut desk.spectrum(&arguments, terminal));
        screen.read(None);
        assert!(child.wait().unwrap().success());
        assert!(!screen.text.contains('\x1b') && !screen.text.contains("hashing"), "{:?}", screen.text);
        assert_eq!(screen.text.is_empty(), quiet, "{:?}", screen.text);
    }
}

/// A bzImage with an ELF file in it.
fn kernel() -> Vec<u8> {
    let mut gzip = Command::new("gzip").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    gzip.stdin.take().unwrap().write_all(b"\x7fELF").unwrap();
    let payload = gzip.wait_with_output().unwrap().stdout;
    let mut image = vec![0; 1024];
    image[0x1f1] = 1;
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x24c..0x250].copy_from_slice(&u32::try_from(payload.len() + 4).unwrap().to_le_bytes());
    image.extend_from_slice(&payload);
    image.extend_from_slice(&[0; 4]);
    image
}

/// An ELF program for x86-64 without any table.
fn guest() -> Vec<u8> {
    let mut elf = vec![0; 64];
    elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
    elf[18] = 62;
    elf
}
