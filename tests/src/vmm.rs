//! A `spectrum-vmm` process.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Termios, tcgetattr};
use tempfile::TempDir;
use vmm_api::Client;

use crate::{Initramfs, Output, TIMEOUT, programs, tiny};

/// What the kernel is to do with its console: a guest that panics reboots at once instead of hanging.
const CONSOLE: &str = "console=ttyS0 quiet panic=-1";

/// How often to look where there is no event to wait for.
const POLL: Duration = Duration::from_millis(20);

/// A command line of `spectrum-vmm`, with a directory for its files.
pub struct VmmCommand {
    arguments: Vec<OsString>,
    directory: TempDir,
}

impl Default for VmmCommand {
    fn default() -> Self {
        Self::new()
    }
}

impl VmmCommand {
    /// The program without arguments.
    #[must_use]
    pub fn new() -> Self {
        let directory = tempfile::Builder::new().prefix("vm").tempdir().expect("there is room for files");
        Self { arguments: Vec::new(), directory }
    }

    /// Boots Debian's kernel; [`guest-probe`](Initramfs::probe) does `jobs` in it, after it loaded `modules`. The
    /// serial port is on standard input and output, and there is no virtio console.
    #[must_use]
    pub fn probe(modules: &[&str], jobs: &[&str]) -> Self {
        Self::linux("vmlinuz", Initramfs::probe(modules), &jobs.join(" "))
    }

    /// Boots the kernel file `kernel` with `initramfs`; `arguments` go to its first process. As [`VmmCommand::probe`].
    #[must_use]
    pub fn linux(kernel: &str, initramfs: Initramfs, arguments: &str) -> Self {
        let this = Self::new();
        let image = this.path("initramfs");
        initramfs.write(&image);
        this.arg("--kernel", programs::kernel(kernel))
            .arg("--initramfs", image)
            .arg("--cmdline", format!("{CONSOLE} -- {arguments}"))
            .arg("--memory", "size=256M")
            .arg("--serial", "tty")
            .arg("--console", "off")
    }

    /// Boots [`tiny`], which needs no time. As [`VmmCommand::probe`].
    #[must_use]
    pub fn tiny() -> Self {
        let this = Self::new();
        let kernel = this.path("tiny");
        tiny::write_counter(&kernel);
        this.arg("--kernel", kernel).arg("--memory", "size=16M").arg("--serial", "tty").arg("--console", "off")
    }

    /// A path in this command's own directory, which goes when the process does.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Adds a flag and its value, or replaces the value if the flag is there already.
    #[must_use]
    pub fn arg(mut self, flag: &str, value: impl AsRef<OsStr>) -> Self {
        let value = value.as_ref().to_owned();
        match self.arguments.iter().position(|a| a == flag).and_then(|at| self.arguments.get_mut(at + 1)) {
            Some(old) => *old = value,
            None => self.arguments.extend([flag.into(), value]),
        }
        self
    }

    /// Adds arguments as they are.
    #[must_use]
    pub fn args<S: AsRef<OsStr>>(mut self, arguments: &[S]) -> Self {
        self.arguments.extend(arguments.iter().map(|a| a.as_ref().to_owned()));
        self
    }

    /// Adds an API socket, for [`Vmm::client`] and [`curl`](crate::curl).
    #[must_use]
    pub fn api(self) -> Self {
        let socket = self.path("api");
        self.arg("--api-socket", socket)
    }

    /// Starts it with pipes for standard input and output.
    ///
    /// # Panics
    /// If the program cannot be started.
    #[must_use]
    pub fn spawn(self) -> Vmm {
        self.spawn_as(Command::new(programs::program("spectrum-vmm")))
    }

    /// As [`VmmCommand::spawn`], with `launcher` before the arguments: the program, perhaps run by another one.
    ///
    /// # Panics
    /// If it cannot be started.
    #[must_use]
    pub fn spawn_as(self, mut launcher: Command) -> Vmm {
        launcher.args(&self.arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = launcher.spawn().unwrap_or_else(|e| panic!("cannot start {launcher:?}: {e}"));
        let input = File::from(OwnedFd::from(child.stdin.take().expect("a pipe")));
        let output = Output::collect(child.stdout.take().expect("a pipe"));
        Vmm::new(child, input, output, self.directory)
    }

    /// Starts it on a terminal of its own, as its session's leader: what is typed there reaches it as it does a user's.
    ///
    /// # Panics
    /// If it cannot be started.
    #[must_use]
    pub fn spawn_on(self, terminal: &Terminal) -> Vmm {
        let mut command = Command::new("setsid");
        let end = || Stdio::from(terminal.user.try_clone().expect("descriptors"));
        command.args(["--ctty", "--wait"]).arg(programs::program("spectrum-vmm")).args(&self.arguments);
        let child = command
            .stdin(end())
            .stdout(end())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|e| panic!("cannot start {command:?}: {e}"));
        let main = || terminal.main.try_clone().expect("descriptors");
        let mut vmm = Vmm::new(child, main(), Output::collect(main()), self.directory);
        vmm.on_terminal = true;
        vmm
    }

    /// Runs it to its end without input: for command lines that are wrong.
    ///
    /// # Panics
    /// If it does not end.
    #[must_use]
    pub fn run(self) -> Ended {
        self.run_as(Command::new(programs::program("spectrum-vmm")))
    }

    /// As [`VmmCommand::run`], with `launcher` before the arguments.
    ///
    /// # Panics
    /// If it does not end.
    #[must_use]
    pub fn run_as(self, launcher: Command) -> Ended {
        let mut vmm = self.spawn_as(launcher);
        vmm.input = None;
        vmm.wait_for_end(TIMEOUT / 10)
    }
}

/// A pseudo-terminal.
pub struct Terminal {
    /// The side of the one who types and reads.
    pub main: File,
    /// The side that programs have.
    pub user: File,
}

impl Default for Terminal {
    fn default() -> Self {
        Self::new()
    }
}

impl Terminal {
    /// A new one, in the state a shell finds it in.
    ///
    /// # Panics
    /// If there is none to be had.
    #[must_use]
    pub fn new() -> Self {
        let main = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).expect("a pseudo-terminal");
        grantpt(&main).expect("its other end");
        unlockpt(&main).expect("its other end");
        let name = ptsname(&main, Vec::new()).expect("its name");
        // Not ours: the first terminal that a session's leader opens becomes the session's.
        let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY | rustix::fs::OFlags::CLOEXEC;
        let user = rustix::fs::open(name.as_c_str(), flags, rustix::fs::Mode::empty()).expect("its other end");
        Self { main: main.into(), user: user.into() }
    }

    /// Its settings.
    ///
    /// # Panics
    /// If it has none.
    #[must_use]
    pub fn settings(&self) -> String {
        let Termios { input_modes, output_modes, control_modes, local_modes, .. } =
            tcgetattr(self.user.as_fd()).expect("a terminal has settings");
        format!("{input_modes:?} {output_modes:?} {control_modes:?} {local_modes:?}")
    }
}

/// How a process ended.
#[derive(Debug)]
pub struct Ended {
    /// Its status.
    pub status: ExitStatus,
    /// All of its standard output.
    pub stdout: String,
    /// All of its standard error.
    pub stderr: String,
}

impl Ended {
    /// Ends the test unless the status is 0 and nothing was logged but what is meant to be.
    ///
    /// # Panics
    /// If it was not.
    pub fn assert_success(&self) {
        assert!(self.status.success(), "{}\n{}\n{}", self.status, self.stderr, self.stdout);
    }
}

/// A running VMM. Dropping it kills the process.
pub struct Vmm {
    child: Child,
    input: Option<File>,
    output: Output,
    errors: Output,
    /// The output goes on when the process has ended.
    on_terminal: bool,
    directory: TempDir,
}

impl Vmm {
    fn new(mut child: Child, input: File, output: Output, directory: TempDir) -> Self {
        let errors = Output::collect(child.stderr.take().expect("a pipe"));
        Self { child, input: Some(input), output, errors, on_terminal: false, directory }
    }

    /// A path in its own directory, as [`VmmCommand::path`].
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its standard output so far: the guest's text on the serial port.
    #[must_use]
    pub fn text(&self) -> String {
        self.output.text()
    }

    /// Its standard error so far: its log.
    #[must_use]
    pub fn log(&self) -> String {
        self.errors.text()
    }

    /// Waits for a line of the guest's that contains `text`, behind the one found last; returns it.
    ///
    /// # Panics
    /// If it does not come; with all that did.
    pub fn wait_for(&mut self, text: &str) -> String {
        let found = self.output.wait_for(text, TIMEOUT);
        found.unwrap_or_else(|e| panic!("{e}\nstandard error:\n{}", self.errors.text()))
    }

    /// Waits for a line of the log, on standard error.
    ///
    /// # Panics
    /// If it does not come.
    pub fn wait_for_log(&mut self, text: &str) -> String {
        self.errors.wait_for(text, TIMEOUT).unwrap_or_else(|e| panic!("{e}"))
    }

    /// Types `text` on the serial port.
    ///
    /// # Panics
    /// If nobody listens.
    pub fn type_text(&mut self, text: &str) {
        let input = self.input.as_mut().expect("the input is open");
        input.write_all(text.as_bytes()).expect("somebody reads the input");
    }

    /// Ends its standard input.
    pub fn close_input(&mut self) {
        self.input = None;
    }

    /// Sends a signal.
    ///
    /// # Panics
    /// If the process is gone.
    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("the process is there");
    }

    /// The API socket of [`VmmCommand::api`].
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.path("api")
    }

    /// A connection to the API; waits until there is one.
    ///
    /// # Panics
    /// If the VMM ends instead.
    #[must_use]
    pub fn client(&mut self) -> Client {
        self.wait_for_socket(&self.socket());
        let mut client = Client::connect(&self.socket()).unwrap_or_else(|e| panic!("{e}\n{}", self.errors.text()));
        client.set_timeout(Some(TIMEOUT)).expect("not zero");
        client
    }

    /// Waits until somebody listens on `path`.
    ///
    /// # Panics
    /// If the VMM ends instead.
    pub fn wait_for_socket(&mut self, path: &Path) {
        let deadline = Instant::now() + TIMEOUT;
        // There is no event for the moment somebody listens: those of the directory come before it.
        while std::os::unix::net::UnixStream::connect(path).is_err() {
            let ended = self.try_wait();
            assert!(ended.is_none() && Instant::now() < deadline, "no {}\n{}", path.display(), self.errors.text());
            std::thread::sleep(POLL);
        }
    }

    /// How the process ended, if it has.
    ///
    /// # Panics
    /// Never: it is a child of this one.
    #[must_use]
    pub fn try_wait(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("our child")
    }

    /// Waits until the process ends by itself.
    ///
    /// # Panics
    /// If it does not.
    #[must_use]
    pub fn wait(mut self) -> Ended {
        self.wait_here()
    }

    /// As [`Vmm::wait`], and keeps its files.
    ///
    /// # Panics
    /// If it does not.
    pub fn wait_here(&mut self) -> Ended {
        self.wait_for_end(TIMEOUT)
    }

    fn wait_for_end(&mut self, timeout: Duration) -> Ended {
        // Its standard error ends when the process does, unless it handed it on.
        let stderr = self.errors.wait_end(timeout);
        let stderr = stderr.unwrap_or_else(|e| panic!("{e}\nstandard output:\n{}", self.output.text()));
        let status = self.child.wait().expect("our child");
        self.input = None;
        let stdout = if self.on_terminal { Ok(self.output.text()) } else { self.output.wait_end(TIMEOUT) };
        Ended { status, stdout: stdout.unwrap_or_else(|e| panic!("{e}")), stderr }
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        // Both fail only if it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
