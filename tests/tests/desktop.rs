//! Applications of the template in VMs of their own, on a headless desktop, as `spectrum run` starts them.

use std::io::Write;
use std::process::Stdio;

use serde_json::Value;
use tests::desktop::{Application, Desktop};
use tests::{Output, TIMEOUT};

/// The background that foot is told to have: nothing else on the screen has it.
const ORANGE: [u8; 3] = [0xff, 0x88, 0x00];

fn named(name: &'static str) -> impl Fn(&Value) -> bool {
    move |window| window["name"] == name
}

/// The main job: a terminal in a VM, its window on the host's desktop, typing into it, the clipboard both ways, and the
/// VM ends with the window. What the shell in the VM learns is seen in the window's title.
#[test]
fn foot_can_be_seen_typed_into_copied_from_and_closed() {
    let mut desktop = Desktop::new();
    desktop.plug_keyboard();
    let title = r#"title() { printf '\033]2;%s\007' "$1"; }"#;
    let script = format!("{title}; title ready; while read -r line; do eval \"$line\"; done");
    let mut foot = Application::start(
        Some(&desktop),
        &[],
        &["foot", "-o", "colors.background=ff8800", "-o", "locked-title=no", "sh", "-c", &script],
    );

    let window = desktop.wait_for_window(&mut foot, named("ready"));
    assert_eq!(window["app_id"], "foot");
    desktop.wait_for_picture("foot", |picture| picture.share_of(&window, ORANGE) > 0.5);

    desktop.type_line("title \"typed by $(id -un) on $(hostname)\"");
    desktop.wait_for_window(&mut foot, named("typed by user on foot"));

    let mut copy = desktop.client("wl-copy").stdin(Stdio::piped()).spawn().unwrap();
    copy.stdin.take().unwrap().write_all("from the host: \u{e4}\u{20ac}".as_bytes()).unwrap();
    assert!(copy.wait().unwrap().success());
    desktop.type_line("title \"$(wl-paste -n)\"");
    desktop.wait_for_window(&mut foot, named("from the host: \u{e4}\u{20ac}"));

    let mut watch =
        desktop.client("wl-paste").args(["--watch", "sh", "-c", "cat; echo ."]).stdout(Stdio::piped()).spawn().unwrap();
    let mut pasted = Output::collect(watch.stdout.take().unwrap());
    desktop.type_line("wl-copy from the VM; title copied");
    pasted.wait_for("from the VM.", TIMEOUT).unwrap();
    assert_eq!(desktop.output("wl-paste", &["-n"]), b"from the VM");
    watch.kill().unwrap();
    watch.wait().unwrap();

    desktop.command("[app_id=\"foot\"] kill");
    let (status, _) = foot.wait();
    // foot ends as the shell it hangs up on does, or with 0.
    assert_ne!(status.code(), Some(125), "{status}");
    assert!(desktop.windows().is_empty());
}

/// Runs its arguments in the VM's shell as the unprivileged account, in the background.
const AS_USER: &str = r#"u() { setpriv --reuid=user --regid=user --clear-groups env HOME=/home/user XDG_RUNTIME_DIR=/run/user/1000 "$@" & }"#;

/// A shell in the VM that can look at the Wayland proxy there, and start clients of it.
fn shell(desktop: &Desktop) -> Application {
    let mut shell = Application::start(Some(desktop), &["--user", "root"], &["sh"]);
    let ready = shell.shell(AS_USER);
    assert_eq!(ready, "");
    shell
}

/// Closes all windows that there are, as a user does, and waits until they are gone.
fn close_all(desktop: &mut Desktop, application: &mut Application) {
    desktop.command("[app_id=\".*\"] kill");
    desktop.wait_for(application, |windows| windows.is_empty().then_some(()));
}

/// Other toolkits draw, and clients of one VM come and go one by one.
#[test]
fn weston_terminal_and_a_gtk_application_show_their_windows() {
    let mut desktop = Desktop::new();
    let mut shell = shell(&desktop);
    let applications = [
        ("weston-terminal", "org.freedesktop.weston.wayland-terminal"),
        ("gtk3-demo-application", "gtk3-demo-application"),
    ];
    for (program, app_id) in applications {
        shell.say(&format!("u {program}"));
        let window = desktop.wait_for_window(&mut shell, |window| window["app_id"] == app_id);
        assert!(!window["name"].as_str().unwrap_or_default().is_empty(), "no title: {window}");
        // Text has many shades; a window that nothing was drawn into has one.
        desktop.wait_for_picture(program, |picture| picture.colours(&window) >= 16);
        close_all(&mut desktop, &mut shell);
    }
    shell.say("exit 7");
    let (status, _) = shell.wait();
    assert_eq!(status.code(), Some(7), "the application's exit status is the launcher's");
}
