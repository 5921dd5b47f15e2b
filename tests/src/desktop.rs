//! A headless desktop and applications on it that run in VMs, as `spectrum run` starts them.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

use crate::{Output, TIMEOUT, Vmm, programs};

/// How often to look where there is no event to wait for.
const POLL: Duration = Duration::from_millis(50);
/// How long an event may be missed, which the compositor promises not to happen.
const LOOK_AGAIN: Duration = Duration::from_secs(5);

/// Message types of sway-ipc(7).
const RUN_COMMAND: u32 = 0;
const SUBSCRIBE: u32 = 2;
const GET_TREE: u32 = 4;

/// A headless sway. It ends when this goes out of scope.
pub struct Desktop {
    directory: TempDir,
    socket: PathBuf,
    wayland: PathBuf,
    events: UnixStream,
    /// Keeps the seat's keyboard, which headless sway has only while a virtual one is there.
    keyboard: Option<Child>,
}

impl Default for Desktop {
    fn default() -> Self {
        Self::new()
    }
}

impl Desktop {
    /// Starts one of 800x600 pixels.
    ///
    /// # Panics
    /// If it does not start.
    #[must_use]
    pub fn new() -> Self {
        let directory = tempfile::Builder::new().prefix("desk").tempdir().expect("there is room for files");
        let started = script().arg("start").arg(directory.path()).stdin(Stdio::null()).output().expect("a script");
        assert!(started.status.success(), "{}", String::from_utf8_lossy(&started.stderr));
        let text = String::from_utf8_lossy(&started.stdout).into_owned();
        let variable = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
            line.unwrap_or_else(|| panic!("no {name} in {text}")).to_owned()
        };
        let socket = PathBuf::from(variable("SWAYSOCK"));
        let wayland = Path::new(&variable("XDG_RUNTIME_DIR")).join(variable("WAYLAND_DISPLAY"));
        let mut events = UnixStream::connect(&socket).expect("the compositor listens");
        events.set_read_timeout(Some(LOOK_AGAIN)).expect("not zero");
        request(&mut events, SUBSCRIBE, r#"["window"]"#);
        Self { directory, socket, wayland, events, keyboard: None }
    }

    /// Runs a client on the host's side, as the desktop's user.
    #[must_use]
    pub fn client(&self, program: &str) -> Command {
        let mut command = script();
        command.arg("run").arg(self.directory.path()).arg(program).stdin(Stdio::null());
        command
    }

    /// The output of a client that ends by itself.
    ///
    /// # Panics
    /// If it fails.
    #[must_use]
    pub fn output(&self, program: &str, arguments: &[&str]) -> Vec<u8> {
        let output = self.client(program).args(arguments).output().expect("the script can be run");
        assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        output.stdout
    }

    /// Gives the seat a keyboard from here on: without one no window has the focus that the clipboard wants.
    ///
    /// # Panics
    /// If there is no wtype.
    pub fn plug_keyboard(&mut self) {
        let idle = self.client("wtype").args(["-s", "100000000"]).spawn().expect("the script can be run");
        self.keyboard = Some(idle);
    }

    /// Types a line and Return.
    pub fn type_line(&self, text: &str) {
        let _ = self.output("wtype", &["-d", "20", text, "-k", "Return"]);
    }

    /// Presses keys, as wtype(1) takes them, in the window that has the focus; [`Desktop::plug_keyboard`] first.
    ///
    /// # Panics
    /// If there is no wtype.
    pub fn press(&self, keys: &[&str]) {
        // GTK 3 finds no key that is the last of its keymap (gdk_wayland_keymap_get_entries_for_keyval), and wtype makes a keymap of the
        // keys that it is to press.
        let _ = self.output("wtype", &[&["-d", "20"], keys, &["-k", "Shift_R"]].concat());
    }

    /// Runs a command of sway(5).
    ///
    /// # Panics
    /// If sway refuses it.
    pub fn command(&self, command: &str) {
        let answer = self.ask(RUN_COMMAND, command);
        let done = answer.as_array().is_some_and(|all| all.iter().all(|one| one["success"] == true));
        assert!(done, "{command}: {answer}");
    }

    fn ask(&self, kind: u32, text: &str) -> Value {
        let mut stream = UnixStream::connect(&self.socket).expect("the compositor listens");
        stream.set_read_timeout(Some(TIMEOUT)).expect("not zero");
        request(&mut stream, kind, text)
    }

    /// All windows, as `swaymsg -t get_tree` shows them.
    #[must_use]
    pub fn windows(&self) -> Vec<Value> {
        let mut found = Vec::new();
        collect(&self.ask(GET_TREE, ""), &mut found);
        found
    }

    /// Its Wayland socket.
    #[must_use]
    pub fn wayland(&self) -> &Path {
        &self.wayland
    }

    /// Waits until the windows are as `wanted` says, and returns what it returned.
    ///
    /// # Panics
    /// If `owner` ends first, or nothing of the kind happens.
    pub fn wait_for<T>(&mut self, owner: &mut impl Owner, wanted: impl Fn(&[Value]) -> Option<T>) -> T {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            let windows = self.windows();
            if let Some(found) = wanted(&windows) {
                return found;
            }
            owner.assert_runs();
            assert!(Instant::now() < deadline, "other windows: {windows:#?}\n{}", owner.said());
            // Whatever it is: look again.
            let _ = receive(&mut self.events);
        }
    }

    /// Waits until there is a window for which `wanted` holds, and returns it.
    ///
    /// # Panics
    /// As [`Desktop::wait_for`].
    pub fn wait_for_window(&mut self, owner: &mut impl Owner, wanted: impl Fn(&Value) -> bool) -> Value {
        self.wait_for(owner, |windows| windows.iter().find(|window| wanted(window)).cloned())
    }

    /// The pixels that are on the screen now. A copy goes to `$SANDBOX_SHARE` under this name, for people.
    ///
    /// # Panics
    /// If there is no picture.
    #[must_use]
    pub fn screenshot(&self, name: &str) -> Picture {
        let bytes = self.output("grim", &["-t", "ppm", "-o", "HEADLESS-1", "-"]);
        if let Some(share) = std::env::var_os("SANDBOX_SHARE") {
            std::fs::write(Path::new(&share).join(format!("{name}.ppm")), &bytes).expect("the share is writable");
        }
        Picture::parse(&bytes).expect("grim writes a portable pixmap")
    }

    /// Takes pictures until one is as `wanted` says: what a client drew last may not be on the screen yet.
    ///
    /// # Panics
    /// If there is none.
    pub fn wait_for_picture(&self, name: &str, wanted: impl Fn(&Picture) -> bool) {
        let deadline = Instant::now() + TIMEOUT / 4;
        while !wanted(&self.screenshot(name)) {
            assert!(Instant::now() < deadline, "the screen does not show what it should: see {name}.ppm");
        }
    }
}

impl Drop for Desktop {
    fn drop(&mut self) {
        let _ = script().arg("stop").arg(self.directory.path()).status();
        if let Some(keyboard) = &mut self.keyboard {
            // Its connection is gone.
            let _ = keyboard.kill();
            let _ = keyboard.wait();
        }
    }
}

fn script() -> Command {
    Command::new(programs::root().join("scripts/compositor"))
}

/// Sends a message of sway-ipc(7) and waits for the answer.
fn request(stream: &mut UnixStream, kind: u32, text: &str) -> Value {
    let length = u32::try_from(text.len()).expect("commands are short");
    let mut message = b"i3-ipc".to_vec();
    message.extend(length.to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend(text.as_bytes());
    stream.write_all(&message).expect("the compositor listens");
    receive(stream).expect("the compositor answers")
}

fn receive(stream: &mut UnixStream) -> std::io::Result<Value> {
    let mut header = [0; 14];
    stream.read_exact(&mut header)?;
    let length = u32::from_ne_bytes([header[6], header[7], header[8], header[9]]);
    let mut text = vec![0; usize::try_from(length).expect("64 bits")];
    stream.read_exact(&mut text)?;
    Ok(serde_json::from_slice(&text)?)
}

/// The nodes of a tree that are windows.
fn collect(node: &Value, found: &mut Vec<Value>) {
    if node["pid"].is_u64() && node["shell"].is_string() {
        found.push(node.clone());
    }
    for kind in ["nodes", "floating_nodes"] {
        for child in node[kind].as_array().into_iter().flatten() {
            collect(child, found);
        }
    }
}

/// What was on the screen.
pub struct Picture {
    width: usize,
    height: usize,
    pixels: Vec<[u8; 3]>,
}

impl Picture {
    /// Parses a binary portable pixmap with 8 bits a channel: ppm(5).
    fn parse(bytes: &[u8]) -> Option<Self> {
        let mut words = bytes.splitn(5, |byte| byte.is_ascii_whitespace());
        let mut number = |magic: Option<&[u8]>| {
            let word = words.next()?;
            match magic {
                Some(magic) => (word == magic).then_some(0),
                None => std::str::from_utf8(word).ok()?.parse::<usize>().ok(),
            }
        };
        number(Some(b"P6"))?;
        let (width, height, _) = (number(None)?, number(None)?, number(None)?);
        let pixels: Vec<[u8; 3]> = words.next()?.as_chunks::<3>().0.to_vec();
        (width.checked_mul(height)? == pixels.len()).then_some(Self { width, height, pixels })
    }

    /// Pixels inside a window (a node of the tree), without its decoration.
    pub fn inside(&self, window: &Value) -> impl Iterator<Item = [u8; 3]> {
        let number = |part: &str, key: &str| usize::try_from(window[part][key].as_i64().unwrap_or(0)).unwrap_or(0);
        let (left, top) =
            (number("rect", "x") + number("window_rect", "x"), number("rect", "y") + number("window_rect", "y"));
        let right = (left + number("window_rect", "width")).min(self.width);
        let bottom = (top + number("window_rect", "height")).min(self.height);
        (top..bottom).flat_map(move |y| (left..right).map(move |x| self.pixels[y * self.width + x]))
    }

    /// Which part of a window has this colour, from 0 to 1.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "a screen has few pixels")]
    pub fn share_of(&self, window: &Value, colour: [u8; 3]) -> f64 {
        let (mut all, mut same) = (0_usize, 0_usize);
        for pixel in self.inside(window) {
            all += 1;
            same += usize::from(pixel == colour);
        }
        same as f64 / all.max(1) as f64
    }

    /// How many colours a window shows.
    #[must_use]
    pub fn colours(&self, window: &Value) -> usize {
        self.inside(window).collect::<std::collections::HashSet<_>>().len()
    }
}

/// A process whose VM has windows.
pub trait Owner {
    /// How it ended, if it has.
    fn ended(&mut self) -> Option<ExitStatus>;

    /// Everything it has said, for messages.
    fn said(&self) -> String;

    /// # Panics
    /// If it has ended.
    fn assert_runs(&mut self) {
        if let Some(status) = self.ended() {
            panic!("it ended: {status}\n{}", self.said());
        }
    }
}

impl Owner for Vmm {
    fn ended(&mut self) -> Option<ExitStatus> {
        self.try_wait()
    }

    fn said(&self) -> String {
        format!("standard output:\n{}\nstandard error:\n{}", self.text(), self.log())
    }
}

/// A `spectrum run` process. It is told to end when this goes out of scope, and so its VM ends with it.
pub struct Application {
    child: Child,
    input: Option<std::process::ChildStdin>,
    output: Output,
    errors: Output,
    directory: TempDir,
}

impl Application {
    /// Runs `command` in a VM of its own, which boots; its windows are on `desktop`, if any. `options` are those of
    /// `spectrum run`.
    ///
    /// # Panics
    /// If it cannot be started.
    #[must_use]
    pub fn start(desktop: Option<&Desktop>, options: &[&str], command: &[&str]) -> Self {
        Self::start_with(desktop, &[&["--boot"], options].concat(), &[], command)
    }

    /// The same with `settings` in the environment, perhaps as a clone.
    ///
    /// # Panics
    /// If it cannot be started.
    #[must_use]
    pub fn start_with(
        desktop: Option<&Desktop>,
        options: &[&str],
        settings: &[(&str, &Path)],
        command: &[&str],
    ) -> Self {
        Self::start_at(desktop.map(Desktop::wayland), options, settings, command)
    }

    /// The same on the Wayland compositor of this socket, if any.
    ///
    /// # Panics
    /// If it cannot be started.
    #[must_use]
    pub fn start_at(wayland: Option<&Path>, options: &[&str], settings: &[(&str, &Path)], command: &[&str]) -> Self {
        let directory = tempfile::Builder::new().prefix("app").tempdir().expect("there is room for files");
        let mut run = Command::new(programs::program("spectrum"));
        run.arg("run").args(options).env("XDG_RUNTIME_DIR", directory.path());
        run.envs(settings.iter().copied());
        match wayland {
            Some(socket) => run.arg("--wayland").arg(socket),
            None => run.arg("--no-wayland"),
        };
        run.args(command).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = run.spawn().unwrap_or_else(|e| panic!("cannot start {run:?}: {e}"));
        let input = child.stdin.take();
        let output = Output::collect(child.stdout.take().expect("a pipe"));
        let errors = Output::collect(child.stderr.take().expect("a pipe"));
        Self { child, input, output, errors, directory }
    }

    /// Writes a line to the application's standard input.
    ///
    /// # Panics
    /// If the application is gone.
    pub fn say(&mut self, line: &str) {
        let input = self.input.as_mut().expect("the input is open");
        input.write_all(format!("{line}\n").as_bytes()).unwrap_or_else(|e| panic!("{e}\n{}", self.errors.text()));
    }

    /// Waits for a line of its standard output that contains `text`.
    ///
    /// # Panics
    /// If it does not come.
    pub fn hear(&mut self, text: &str) -> String {
        self.output.wait_for(text, TIMEOUT).unwrap_or_else(|e| panic!("{e}\nstandard error:\n{}", self.errors.text()))
    }

    /// The same of its standard error.
    ///
    /// # Panics
    /// If it does not come.
    pub fn hear_error(&mut self, text: &str) -> String {
        self.errors.wait_for(text, TIMEOUT).unwrap_or_else(|e| panic!("{e}"))
    }

    /// Lets a shell that is the application run `command`, and returns what it printed.
    ///
    /// # Panics
    /// If the shell does not come back.
    pub fn shell(&mut self, command: &str) -> String {
        let before = self.output.text().len();
        self.say(&format!("{command}\necho done-with-it"));
        self.hear("done-with-it");
        let text = self.output.text();
        let text = text.get(before..).unwrap_or_default();
        text.lines().take_while(|line| *line != "done-with-it").collect::<Vec<_>>().join("\n")
    }

    /// The process of its launcher.
    #[must_use]
    pub fn launcher(&self) -> u32 {
        self.child.id()
    }

    /// The process of its VMM.
    ///
    /// # Panics
    /// If there is not exactly one.
    #[must_use]
    pub fn vmm(&self) -> u32 {
        let processes = self.processes();
        let [vmm] = processes[..] else { panic!("processes of a VM: {processes:?}") };
        vmm
    }

    /// Processes that belong to its VM: they have paths of its private folder on their command lines.
    fn processes(&self) -> Vec<u32> {
        programs::processes_of(self.directory.path()).into_keys().collect()
    }

    /// Waits until it ends by itself. Then nothing may be left: no process, no file.
    ///
    /// # Panics
    /// If it does not end, or leaves something.
    #[must_use]
    pub fn wait(mut self) -> (ExitStatus, String) {
        self.input = None;
        let deadline = Instant::now() + TIMEOUT;
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("our child") {
                break status;
            }
            assert!(Instant::now() < deadline, "it does not end\n{}", self.said());
            std::thread::sleep(POLL);
        };
        assert_eq!(self.processes(), [0; 0], "processes are left");
        for folder in std::fs::read_dir(self.directory.path()).expect("our directory").flatten() {
            let left: Vec<_> = std::fs::read_dir(folder.path()).expect("a folder").flatten().collect();
            assert!(left.is_empty(), "files are left: {left:?}");
        }
        let stdout = self.output.wait_end(TIMEOUT).unwrap_or_else(|e| panic!("{e}"));
        (status, stdout)
    }
}

impl Owner for Application {
    fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("our child")
    }

    fn said(&self) -> String {
        format!("standard output:\n{}\nstandard error:\n{}", self.output.text(), self.errors.text())
    }
}

impl Drop for Application {
    fn drop(&mut self) {
        if self.child.try_wait().is_ok_and(|status| status.is_some()) {
            return;
        }
        // The launcher ends its VM when it is told to; killed, it could not.
        let _ = kill_process(Pid::from_child(&self.child), Signal::TERM);
        let deadline = Instant::now() + Duration::from_secs(30);
        while Instant::now() < deadline && self.child.try_wait().is_ok_and(|status| status.is_none()) {
            std::thread::sleep(POLL);
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
