//! Applications of the template in VMs of their own, on a headless desktop, as `spectrum run` starts them.

use std::ffi::OsStr;
use std::fs::Permissions;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Stdio;

use guest_proto::Reply;
use rustix::process::Signal;
use serde_json::Value;
use tests::agent::{self, Host};
use tests::desktop::{Application, Desktop};
use tests::{Output, TIMEOUT, VmmCommand, programs, zygote};
use vmm_api::{Client, Request};
use vmm_config::SnapshotConfig;

/// The background that foot is told to have: nothing else on the screen has it.
const ORANGE: [u8; 3] = [0xff, 0x88, 0x00];
/// Another one.
const BLUE: [u8; 3] = [0x00, 0x88, 0xff];

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

    // A paused machine's windows are still there when it goes on.
    let arguments = std::fs::read(format!("/proc/{}/cmdline", foot.vmm())).unwrap();
    let mut arguments = arguments.split(|byte| *byte == 0).skip_while(|argument| *argument != b"--api-socket").skip(1);
    let socket = Path::new(OsStr::from_bytes(arguments.next().unwrap()));
    for request in [Request::VmPause, Request::VmResume] {
        Client::connect(socket).unwrap().send(&request).unwrap();
    }
    desktop.type_line("title \"resumed\"");
    desktop.wait_for_window(&mut foot, named("resumed"));

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

/// A VMM that can reach nothing but its machine's files shows windows, too, and they hear the keyboard.
#[test]
fn a_window_of_a_vmm_confined_by_landlock() {
    let mut desktop = Desktop::new();
    desktop.plug_keyboard();
    let folder = tempfile::tempdir().unwrap();
    let (vmm, log) = (folder.path().join("vmm"), folder.path().join("log"));
    let (program, log_file) = (programs::program("spectrum-vmm"), log.display());
    let script = format!("#!/bin/sh\nexec '{}' \"$@\" --landlock -v --log-file '{log_file}'\n", program.display());
    std::fs::write(&vmm, script).unwrap();
    std::fs::set_permissions(&vmm, Permissions::from_mode(0o755)).unwrap();
    let options = ["--vmm", vmm.to_str().unwrap()];
    let script = r#"title() { printf '\033]2;%s\007' "$1"; }; title ready; read -r line; title "$line"; read -r line"#;
    let command = ["foot", "-o", "colors.background=ff8800", "-o", "locked-title=no", "sh", "-c", script];
    let mut foot = Application::start(Some(&desktop), &options, &command);

    let window = desktop.wait_for_window(&mut foot, named("ready"));
    desktop.wait_for_picture("landlock", |picture| picture.share_of(&window, ORANGE) > 0.5);
    desktop.type_line("typed");
    desktop.wait_for_window(&mut foot, named("typed"));
    let log = std::fs::read_to_string(&log).unwrap();
    assert!(log.contains("paths with Landlock (FullyEnforced)"), "{log}");

    desktop.command("[app_id=\"foot\"] kill");
    let (status, _) = foot.wait();
    assert_ne!(status.code(), Some(125), "{status}");
}

/// A machine that had a window goes on from a snapshot: the window's client hears that its connection is gone, and a new
/// one has its window on the same desktop.
#[test]
fn a_new_window_opens_after_a_restore() {
    let mut desktop = Desktop::new();
    let keep = tempfile::tempdir().unwrap();
    let [socket, directory] = ["vsock", "snapshot"].map(|name| keep.path().join(name));
    let host = Host::at(&socket);
    let gpu = format!("cross-domain,wayland={}", desktop.wayland().display());
    let mut vmm = agent::command(&socket).arg("--memory", "size=512M").arg("--gpu", gpu).api().spawn();
    let link = host.greeting();
    let wake = |host: &Host| assert_eq!(host.ask(guest_proto::Request::Wake(zygote::identity())).1, Reply::Done);
    wake(&host);
    // What a client says, and how it ended, goes to the serial port: the agent's connections end with the snapshot.
    let open = |name: &str, colour: &str| {
        let foot = format!("foot -o colors.background={colour} -T {name} sh -c 'while :; do read -r line; done'");
        let run = format!("cd /home/user; {AS_USER}; u {foot}; wait $!; echo {name} ended with $?");
        let started =
            host.shell(&format!("setsid sh -c '{}' < /dev/null > /dev/ttyS0 2>&1 &", run.replace('\'', r"'\''")));
        assert_eq!(started.unwrap(), "");
    };
    open("before", "ff8800");
    let window = desktop.wait_for_window(&mut vmm, named("before"));
    desktop.wait_for_picture("before-snapshot", |picture| picture.share_of(&window, ORANGE) > 0.5);

    let mut client = vmm.client();
    client.send(&Request::VmPause).unwrap();
    let url = format!("file://{}", directory.display());
    client.send(&Request::VmSnapshot(SnapshotConfig { destination_url: url.clone() })).unwrap();
    assert_eq!(desktop.windows().len(), 1, "a paused machine's window stays");
    vmm.signal(Signal::KILL);
    let ended = vmm.wait();
    assert!(!ended.stdout.contains("before ended"), "{}", ended.stdout);
    drop(link);

    let from = format!("source_url={url},memory_restore_mode=copyonwrite,resume=true");
    let mut vmm = VmmCommand::new().api().arg("--restore", from).spawn();
    let _link = host.greeting();
    // By itself, as foot does when it cannot go on: no signal ended it.
    vmm.wait_for("before ended with 230");
    wake(&host);
    desktop.wait_for(&mut vmm, |windows| windows.is_empty().then_some(()));
    open("after", "0088ff");
    let window = desktop.wait_for_window(&mut vmm, named("after"));
    desktop.wait_for_picture("after-restore", |picture| picture.share_of(&window, BLUE) > 0.5);
    desktop.command("[app_id=\"foot\"] kill");
    vmm.wait_for("after ended with ");
    desktop.wait_for(&mut vmm, |windows| windows.is_empty().then_some(()));
}

/// Runs its arguments in the VM's shell as the unprivileged account, in the background.
const AS_USER: &str = r#"u() { setpriv --reuid=user --regid=user --clear-groups env HOME=/home/user XDG_RUNTIME_DIR=/run/user/1000 "$@" & }"#;

/// A shell in the VM that can look at the Wayland proxy there, and start clients of it.
fn shell(desktop: &Desktop) -> Application {
    let mut shell = Application::start(Some(desktop), &["--user", "root", "--cwd", "/home/user"], &["sh"]);
    let ready = shell.shell(AS_USER);
    assert_eq!(ready, "");
    shell
}

/// Closes all windows that there are, as a user does, and waits until they are gone.
fn close_all(desktop: &mut Desktop, application: &mut Application) {
    for window in desktop.windows() {
        desktop.command(&format!("[con_id={}] kill", window["id"]));
    }
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

/// What the VMM and the guest's proxy hold.
#[derive(Clone, Debug, Default)]
struct Holdings {
    vmm_descriptors: usize,
    vmm_kib: u64,
    proxy_descriptors: usize,
    proxy_kib: u64,
}

impl Holdings {
    fn of(shell: &mut Application) -> Self {
        let vmm = shell.vmm();
        let text = shell.shell(
            "p=$(pgrep -f 'self/exe wayland'); echo descriptors $(ls /proc/$p/fd | wc -l); grep VmRSS: /proc/$p/status",
        );
        let number = |name: &str| -> u64 {
            let line = text.lines().find(|line| line.starts_with(name));
            line.and_then(|line| line.split_whitespace().nth(1)?.parse().ok())
                .unwrap_or_else(|| panic!("{name}: {text}"))
        };
        Self {
            vmm_descriptors: std::fs::read_dir(format!("/proc/{vmm}/fd")).unwrap().count(),
            vmm_kib: mappings(vmm).iter().filter(|mapping| mapping.own).map(|mapping| mapping.rss).sum(),
            proxy_descriptors: usize::try_from(number("descriptors")).unwrap(),
            proxy_kib: number("VmRSS:"),
        }
    }

    /// Nothing more than before, but for what allocators keep.
    fn is_within(&self, before: &Self) -> bool {
        self.vmm_descriptors <= before.vmm_descriptors
            && self.proxy_descriptors <= before.proxy_descriptors
            && self.vmm_kib <= before.vmm_kib + 1024
            && self.proxy_kib <= before.proxy_kib + 1024
    }
}

/// A terminal whose title is how often it has changed its size: the compositor's tree does not tell what a client has drawn.
const RESIZED: &str = r#"u foot -o resize-delay-ms=0 -o locked-title=no sh -c '
    n=0
    trap "n=\$((n + 1)); title" WINCH
    title() { printf "\033]2;resized %s\007" $n; }
    title
    while :; do read -r line; done'"#;

fn title_of_foot(windows: &[Value]) -> Option<String> {
    let title = windows.iter().find(|window| window["app_id"] == "foot")?["name"].as_str()?;
    title.starts_with("resized ").then(|| title.to_owned())
}

/// Clients come and go, and a window changes its size, and nothing of that stays.
#[test]
fn clients_and_resizes_leave_nothing_behind() {
    const AT_ONCE: usize = 5;
    let mut desktop = Desktop::new();
    let mut shell = shell(&desktop);
    let began = std::time::Instant::now();
    let mark = |what: &str| println!("{:4} s: {what}", began.elapsed().as_secs());
    let round = |desktop: &mut Desktop, shell: &mut Application| {
        for _ in 0..AT_ONCE {
            shell.say("u weston-flower");
        }
        desktop.wait_for(shell, |windows| (windows.len() == AT_ONCE).then_some(()));
        close_all(desktop, shell);
    };
    let resize = |desktop: &mut Desktop, shell: &mut Application, times: usize| {
        shell.say(RESIZED);
        let mut title = desktop.wait_for(shell, title_of_foot);
        for step in 0..times {
            // By the gap around it: a floating window would take the size of a picture that was still on its way.
            desktop.command(&format!("gaps inner current set {}", 120 + (step % 4) * 20));
            title = desktop.wait_for(shell, |windows| title_of_foot(windows).filter(|new| *new != title));
        }
        close_all(desktop, shell);
    };

    resize(&mut desktop, &mut shell, 8);
    mark("resized a few times");
    round(&mut desktop, &mut shell);
    mark("a few clients");
    let before = Holdings::of(&mut shell);

    resize(&mut desktop, &mut shell, 200);
    mark("resized 200 times");
    for _ in 0..50 / AT_ONCE {
        round(&mut desktop, &mut shell);
    }

    mark("50 clients");
    // A window goes before its client does.
    let left = shell.shell("wait; jobs");
    let after = Holdings::of(&mut shell);
    println!("before {before:?}\nafter  {after:?}");
    assert!(after.is_within(&before), "before {before:?}, after {after:?}\n{left}");
}

/// A mapping of a VMM, all sizes in KiB.
#[derive(Debug, Default)]
struct Mapping {
    path: String,
    /// It is neither guest memory nor an image.
    own: bool,
    rss: u64,
    shared_clean: u64,
    private_dirty: u64,
}

/// All of a process' mappings, from `/proc/PID/smaps`: proc_pid_smaps(5).
fn mappings(pid: u32) -> Vec<Mapping> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let mut found: Vec<Mapping> = Vec::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let (Some(key), Some(value)) = (words.next(), words.next()) else { continue };
        let Some(key) = key.strip_suffix(':') else {
            found.push(Mapping { path: words.nth(3).unwrap_or_default().into(), own: true, ..Mapping::default() });
            continue;
        };
        let (Some(last), Ok(value)) = (found.last_mut(), value.parse()) else { continue };
        match key {
            // Guest memory and images are larger than anything a VMM has for itself.
            "Size" => last.own = value < 64 * 1024,
            "Rss" => last.rss = value,
            "Shared_Clean" => last.shared_clean = value,
            "Private_Dirty" => last.private_dirty = value,
            _ => {}
        }
    }
    found
}

/// The mapping of the template's image.
fn image(pid: u32) -> Mapping {
    let mut found: Vec<_> = mappings(pid).into_iter().filter(|mapping| mapping.path.ends_with("root.erofs")).collect();
    assert_eq!(found.len(), 1, "{found:?}");
    found.remove(0)
}

/// Two VMs read the same part of one image: it is in the host's memory once, and in neither guest's.
#[test]
fn vms_of_one_template_share_its_pages() {
    const READ_MIB: u64 = 48;
    // Its largest files: more than the guest would read otherwise.
    let read = format!("cat $(find /usr/lib -type f -size +4M | sort) | head -c {READ_MIB}M | wc -c");
    let mut vms = [(); 2].map(|()| Application::start(None, &[], &["sh"]));
    for vm in &mut vms {
        let mounted = vm.shell("grep -c 'erofs.*dax=always' /proc/mounts");
        assert_eq!(mounted, "1", "the root file system uses DAX");
        let before = cached(vm);
        assert_eq!(vm.shell(&read), (READ_MIB << 20).to_string());
        let after = cached(vm);
        println!("page cache of the guest: {before} KiB, after reading {READ_MIB} MiB: {after} KiB");
        assert!(after < before + 4096, "the guest's page cache grew from {before} to {after} KiB");
    }
    let pids = [vms[0].vmm(), vms[1].vmm()];
    for pid in pids {
        let image = image(pid);
        println!("{image:?}");
        assert!(image.shared_clean >= READ_MIB * 1024, "not shared: {image:?}");
        assert_eq!(image.private_dirty, 0, "a copy of its own: {image:?}");
    }
    for vm in vms {
        let (status, _) = vm.wait();
        assert!(status.success(), "{status}");
    }
}

/// The guest's page cache in KiB.
fn cached(vm: &mut Application) -> u64 {
    let line = vm.shell("grep ^Cached: /proc/meminfo");
    line.split_whitespace().nth(1).and_then(|word| word.parse().ok()).unwrap_or_else(|| panic!("{line:?}"))
}
