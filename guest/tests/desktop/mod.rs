//! A headless desktop to show windows on: sway without a GPU, as an unprivileged user, with what is needed to look at it.

use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

const USER: u32 = 61234;

/// A running sway, its user's directories, and the socket of the proxy in front of it.
pub struct Desktop {
    dir: tempfile::TempDir,
    sway: Child,
    display: String,
    ipc: PathBuf,
}

/// A process that is killed when the test ends.
pub struct App(pub Child);

impl Drop for App {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Waits until `probe` returns something, and panics with `what` if it takes too long.
pub fn wait_for<T>(what: &str, mut probe: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        if let Some(found) = probe() {
            return found;
        }
        assert!(Instant::now() < deadline, "timed out waiting for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn as_root() -> bool {
    rustix::process::geteuid().is_root()
}

impl Desktop {
    /// Starts sway and waits until it is up.
    pub fn start() -> Self {
        let dir = tempfile::Builder::new().prefix("desktop").tempdir_in("/tmp").unwrap();
        let root = dir.path();
        std::fs::set_permissions(root, PermissionsExt::from_mode(0o755)).unwrap();
        for (name, mode) in [("run", 0o700), ("home", 0o755)] {
            std::fs::create_dir(root.join(name)).unwrap();
            std::fs::set_permissions(root.join(name), PermissionsExt::from_mode(mode)).unwrap();
            if as_root() {
                chown(root.join(name), Some(USER), Some(USER)).unwrap();
            }
        }
        let config = "output HEADLESS-1 resolution 800x600 position 0 0\noutput * bg #204060 solid_color\n\
                      default_border normal\nfocus_on_window_activation none\n";
        std::fs::write(root.join("sway.conf"), config).unwrap();
        let log = std::fs::File::create(root.join("sway.log")).unwrap();
        let sway = command(root, "sway")
            .envs([("WLR_BACKENDS", "headless"), ("WLR_LIBINPUT_NO_DEVICES", "1"), ("WLR_RENDERER", "pixman")])
            .arg("-c")
            .arg(root.join("sway.conf"))
            .stderr(log)
            .spawn()
            .expect("sway must be installed (packages: sway grim foot wtype wl-clipboard weston gtk-3-examples)");
        let find = |prefix: &str, suffix: &str| {
            std::fs::read_dir(root.join("run")).unwrap().map(|entry| entry.unwrap().file_name()).find_map(|name| {
                let name = name.into_string().unwrap();
                (name.starts_with(prefix) && name.ends_with(suffix) && !name.ends_with(".lock")).then_some(name)
            })
        };
        let display = wait_for("sway's display", || find("wayland-", ""));
        let ipc = root.join("run").join(wait_for("sway's control socket", || find("sway-ipc", ".sock")));
        let desktop = Self { dir, sway, display, ipc };
        wait_for("sway's output", || desktop.tree().contains("HEADLESS-1").then_some(()));
        desktop
    }

    /// The compositor's own socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("run").join(&self.display)
    }

    /// Where the proxy is to listen.
    pub fn proxy_socket(&self) -> PathBuf {
        self.dir.path().join("run").join("vm-0")
    }

    /// Who must be able to connect to the proxy.
    pub fn owner(&self) -> Option<(u32, u32)> {
        as_root().then_some((USER, USER))
    }

    /// A scratch file both sides may use.
    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join("run").join(name)
    }

    /// A program of the host's desktop.
    pub fn host(&self, program: &str) -> Command {
        let mut command = command(self.dir.path(), program);
        command.env("WAYLAND_DISPLAY", &self.display).env("SWAYSOCK", &self.ipc);
        command
    }

    /// A program that uses the proxy, as an application in a VM would.
    pub fn guest(&self, program: &str) -> Command {
        let mut command = command(self.dir.path(), program);
        command.env("WAYLAND_DISPLAY", self.proxy_socket()).env("GDK_BACKEND", "wayland");
        command
    }

    /// Sway's windows as it describes them.
    pub fn tree(&self) -> String {
        String::from_utf8(run(self.host("swaymsg").args(["-r", "-t", "get_tree"])).stdout).unwrap()
    }

    /// How many windows have this application id.
    pub fn windows(&self, app_id: &str) -> usize {
        self.tree().matches(&format!("\"app_id\": \"{app_id}\"")).count()
    }

    /// Gives sway an order.
    pub fn msg(&self, order: &str) {
        let output = run(self.host("swaymsg").arg(order));
        assert!(output.status.success(), "swaymsg {order}: {}", String::from_utf8_lossy(&output.stdout));
    }

    /// Types text, then Return. The first key of a new virtual keyboard may get lost in sway; it is one without effect.
    pub fn type_line(&self, text: &str) {
        assert!(
            run(self.host("wtype").args(["-k", "Shift_L", "-s", "200", "-d", "15", text, "-k", "Return"]))
                .status
                .success()
        );
    }

    /// A screenshot as (width, height, RGB bytes); also kept as a file if `SCREENSHOTS` names a folder.
    pub fn screenshot(&self, name: &str) -> (usize, usize, Vec<u8>) {
        if let Ok(folder) = std::env::var("SCREENSHOTS") {
            let png = run(self.host("grim").args(["-o", "HEADLESS-1", "-"])).stdout;
            std::fs::write(Path::new(&folder).join(format!("{name}.png")), png).unwrap();
        }
        let ppm = run(self.host("grim").args(["-t", "ppm", "-o", "HEADLESS-1", "-"])).stdout;
        let mut fields = ppm.splitn(4, u8::is_ascii_whitespace).map(<[u8]>::to_vec);
        let mut field = || String::from_utf8(fields.next().unwrap()).unwrap();
        assert_eq!(field(), "P6");
        let (width, height) = (field().parse().unwrap(), field().parse().unwrap());
        let pixels = width * height * 3;
        (width, height, ppm[ppm.len() - pixels..].to_vec())
    }
}

impl Desktop {
    /// Ends the compositor without warning.
    pub fn kill(&mut self) {
        let _ = self.sway.kill();
        let _ = self.sway.wait();
    }
}

impl Drop for Desktop {
    fn drop(&mut self) {
        self.kill();
    }
}

fn command(root: &Path, program: &str) -> Command {
    let mut command = if as_root() {
        let user = USER.to_string();
        let mut command = Command::new("setpriv");
        command.arg(format!("--reuid={user}")).arg(format!("--regid={user}")).args(["--clear-groups", "--", program]);
        command
    } else {
        Command::new(program)
    };
    command
        .env_clear()
        .env("PATH", "/usr/local/bin:/usr/bin:/bin")
        .env("HOME", root.join("home"))
        .env("XDG_RUNTIME_DIR", root.join("run"))
        .env("LANG", "C.UTF-8")
        .env("NO_AT_BRIDGE", "1")
        .stdin(Stdio::null());
    command
}

/// Runs a command to its end.
pub fn run(command: &mut Command) -> Output {
    command.output().unwrap()
}

/// Starts a command that goes away with the test.
pub fn spawn(command: &mut Command) -> App {
    App(command.spawn().unwrap())
}
