//! The user's terminal: a shell in a VM has it and gives it back, and long work shows a bar on it.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize};
use tests::place::Place;
use tests::programs;

/// A terminal, and what was printed on it.
struct Screen {
    master: File,
    terminal: OwnedFd,
    text: Vec<u8>,
}

impl Screen {
    fn new() -> Self {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = openpt(flags).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let terminal = ioctl_tiocgptpeer(&master, flags).unwrap();
        Self { master: master.into(), terminal, text: Vec::new() }
    }

    fn resize(&self, rows: u16, columns: u16) {
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&self.terminal, size).unwrap();
    }

    fn give_to(&self, mut command: Command) -> Child {
        let stream = || self.terminal.try_clone().unwrap();
        command.stdin(stream()).stdout(stream()).stderr(stream()).env("TERM", "xterm").spawn().unwrap()
    }

    fn say(&mut self, keys: &str) {
        self.master.write_all(keys.as_bytes()).unwrap();
    }

    /// Waits until it shows `text`, after what it has shown before.
    fn hear(&mut self, text: &str) {
        let deadline = Instant::now() + Duration::from_secs(120);
        let seen = |all: &[u8]| String::from_utf8_lossy(all).find(text).map(|at| at + text.len());
        while seen(&self.text).is_none() {
            let left = deadline.saturating_duration_since(Instant::now());
            let left = Timespec::try_from(left).unwrap();
            let count = poll(&mut [PollFd::new(&self.master, PollFlags::IN)], Some(&left)).unwrap();
            assert!(count > 0, "no {text:?} in {:?}", String::from_utf8_lossy(&self.text));
            let mut buffer = [0; 4096];
            let count = self.master.read(&mut buffer).unwrap();
            self.text.extend(&buffer[..count]);
            assert!(!String::from_utf8_lossy(&self.text).contains("\x1b]"), "the guest sets the title");
        }
        let end = seen(&self.text).unwrap();
        self.text.drain(..end.min(self.text.len()));
    }

    /// Whether it edits lines and shows what is typed, as it did in the beginning.
    fn is_cooked(&self) -> bool {
        tcgetattr(&self.terminal)
            .unwrap()
            .local_modes
            .contains(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG)
    }
}

#[test]
fn a_shell_has_a_terminal_and_gives_it_back() {
    let place = Place::new();
    let command = ["sh", "-c", "echo up; exec sleep 1000"];
    let mut application = place.start(None, &["--boot", "--name", "vm"], &command);
    application.hear("up");
    let refused = place.output(&["exec", "--tty", "vm", "--", "true"]);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("--tty needs a terminal"), "{refused:?}");

    let mut screen = Screen::new();
    screen.resize(30, 100);
    assert!(screen.is_cooked());
    let mut shell = screen.give_to(place.command(&["shell", "vm"]));
    screen.say("stty size; echo $TERM; tty\r");
    screen.hear("30 100\r\n");
    screen.hear("xterm\r\n");
    screen.hear("/dev/pts/");
    assert!(!screen.is_cooked(), "keys are the guest's");
    // This is not the terminal of the launcher's session, so nobody else tells it.
    screen.resize(41, 122);
    let tell = |signal: &str, child: &Child| {
        assert!(Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap().success());
    };
    tell("-WINCH", &shell);
    screen.say("trap 'stty size' WINCH; until stty size | grep '41 122'; do sleep 0.1; done\r");
    screen.hear("41 122\r\n");
    screen.say("sh -c 'echo here; exec sleep 1000'\r");
    screen.hear("\rhere\r\n");
    screen.say("\x03");
    screen.say("echo status $?.\r");
    screen.hear("status 130.");
    screen.say("printf '\\033]0;title\\007A\\033[1mB\\n'\r");
    screen.hear("A\x1b[1mB");
    screen.say("exit 7\r");
    assert_eq!(shell.wait().unwrap().code(), Some(7));
    assert!(screen.is_cooked(), "it was given back");

    // Whatever ends it.
    let mut program =
        screen.give_to(place.command(&["exec", "-t", "vm", "--", "sh", "-c", "echo there; exec sleep 1000"]));
    screen.hear("there\r\n");
    assert!(!screen.is_cooked());
    tell("-TERM", &program);
    assert_eq!(program.wait().unwrap().code(), Some(143));
    assert!(screen.is_cooked(), "it was given back");
}

#[test]
fn a_template_is_warmed_beside_a_spinner() {
    let place = Place::new();
    let mut screen = Screen::new();
    screen.resize(24, 100);
    let mut command = Command::new("sh");
    command.args(["-c", "\"$0\" template warm default; echo status $?."]).arg(programs::program("spectrum"));
    command.envs(place.settings());
    let mut warming = screen.give_to(command);
    let what = "booting and saving it, once";
    screen.hear(&format!("spectrum: this template is not warm yet: {what}\r\n"));
    for _ in 0..2 {
        screen.hear(&format!("s {what}"));
    }
    screen.hear("\r\x1b[2Kstatus 0.");
    assert!(warming.wait().unwrap().success());
    // The zygote ends with it.
    place.spectrum(&["template", "rm", "default"]);
}
