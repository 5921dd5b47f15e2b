//! Questions of the policy on a real desktop: sway, a session bus, and the portal back-end of GTK. No VM is needed.

use std::{
    fs,
    process::{Child, Command, ExitStatus, Stdio},
};

use serde_json::Value;
use tempfile::TempDir;
use tests::{
    Output, TIMEOUT,
    desktop::{Desktop, Owner},
    dialog::Dialog,
    programs,
};

/// A user with a policy, in a session of their own.
struct User {
    home: TempDir,
}

impl User {
    fn new(policy: &str) -> Self {
        let home = tempfile::Builder::new().prefix("user").tempdir().unwrap();
        fs::create_dir_all(home.path().join(".config/spectrum")).unwrap();
        fs::write(home.path().join(".config/spectrum/policy"), policy).unwrap();
        Self { home }
    }

    /// `spectrum policy decide` with a session bus.
    fn decide(&self, desktop: &Desktop, timeout: &str, app: &str, target: &str) -> Decision {
        let mut command = Command::new("dbus-run-session");
        command.arg("--").arg(programs::program("spectrum")).args(["policy", "decide", "--timeout", timeout]);
        command.args(["exec", app, target]).stdin(Stdio::null()).stdout(Stdio::piped());
        command.env("HOME", self.home.path()).env("XDG_RUNTIME_DIR", self.home.path());
        command.env("WAYLAND_DISPLAY", desktop.wayland()).env("NO_AT_BRIDGE", "1");
        for variable in
            ["XDG_CONFIG_HOME", "XDG_STATE_HOME", "XDG_CURRENT_DESKTOP", "DBUS_SESSION_BUS_ADDRESS", "DISPLAY"]
        {
            command.env_remove(variable);
        }
        let mut child = command.spawn().expect("scripts/install desktop installs it");
        let output = Output::collect(child.stdout.take().unwrap());
        Decision { child, output }
    }

    fn log(&self) -> String {
        fs::read_to_string(self.home.path().join(".local/state/spectrum/policy.log")).unwrap()
    }
}

struct Decision {
    child: Child,
    output: Output,
}

impl Decision {
    /// What it printed, and its status.
    fn end(mut self) -> (String, Option<i32>) {
        let status = self.child.wait().unwrap();
        (self.output.wait_end(TIMEOUT).unwrap(), status.code())
    }
}

impl Owner for Decision {
    fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().unwrap()
    }

    fn said(&self) -> String {
        self.output.text()
    }
}

impl Drop for Decision {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn any(window: &Value) -> bool {
    window["app_id"].is_string()
}

#[test]
fn a_question_that_is_closed_or_not_answered_is_denied() {
    let mut desktop = Desktop::new();
    let user = User::new("exec mail vault:* ask\n");
    for (closed, how) in [(true, "the user denied it"), (false, "the user did not answer in 5 s")] {
        let mut decision = user.decide(&desktop, if closed { "300" } else { "5" }, "mail", "vault:ssh-agent");
        let window = desktop.wait_for_window(&mut decision, any);
        assert_eq!(window["app_id"], "xdg-desktop-portal-gtk");
        if closed {
            // Text has many shades; a window that nothing was drawn into has one.
            desktop.wait_for_picture("question", |picture| picture.colours(&window) >= 16);
            desktop.command(&format!("[con_id={}] kill", window["id"]));
        }
        let (text, status) = decision.end();
        assert!(text.starts_with("deny\t") && text.ends_with(&format!("; {how}\n")), "{text}");
        assert_eq!(status, Some(1));
    }
    let log = user.log();
    assert_eq!(log.matches(" deny exec \"mail\" \"vault:ssh-agent\" (").count(), 2, "{log}");
}

/// The question goes when it is too late, and a second one about the same app is not shown while it is there.
#[test]
fn one_question_at_a_time_and_it_goes_with_its_time() {
    let mut desktop = Desktop::new();
    let user = User::new("exec mail vault:* ask\n");
    // The bus, and with it who shows the question, stays until this ends.
    let mut first = user.decide(&desktop, "20", "mail", "vault:first");
    desktop.wait_for_window(&mut first, any);
    let (text, status) = user.decide(&desktop, "20", "mail", "vault:second").end();
    assert!(text.ends_with("; not asked: another VM of this app asks\n"), "{text}");
    assert_eq!((status, desktop.windows().len()), (Some(1), 1));
    let (text, _) = first.end();
    assert!(text.ends_with("; the user did not answer in 20 s\n"), "{text}");
}

#[test]
fn a_question_is_answered_by_key() {
    let mut desktop = Desktop::new();
    desktop.plug_keyboard();
    let user = User::new("exec mail vault:* ask\n");
    // "Deny" comes before "Allow".
    for (tabs, expected, code) in [(2, "allow", 0), (1, "deny", 1)] {
        let mut decision = user.decide(&desktop, "300", "mail", "vault:ssh-agent");
        let dialog = Dialog::wait(&mut desktop, &mut decision);
        (0..tabs).for_each(|_| dialog.press(&["-k", "Tab"]));
        dialog.end(&["-k", "Return"]);
        let (text, status) = decision.end();
        assert!(text.starts_with(&format!("{expected}\t")), "{text}");
        assert_eq!(status, Some(code));
    }
}
