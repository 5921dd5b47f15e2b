//! `spectrum run` against a stand-in for the VMM: this test plays the VMM's sockets and the agent.

mod calls;
mod portal;
mod remembered;
mod vms;

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    os::unix::{fs::PermissionsExt, net::UnixListener, net::UnixStream},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
};

use guest_proto::{ExitStatus, FromAgent, Hello, Identity, Link, Reply, Request, Run, ToAgent, VERSION};

type Agent = Link<ToAgent, FromAgent>;

/// Says what it shall, prints its arguments into a pipe and lives until the other pipe is closed or it is told to end.
const VMM: &str = r#"#!/bin/sh
printf "$FAKE_WORDS" >&2
printf '%s\n' "$@" END > "$FAKE/arguments"
read -r how < "$FAKE/end"
echo "last words" >&2
exit "${how:-0}"
"#;

/// The places of one test, and its launcher.
struct Fixture {
    folder: tempfile::TempDir,
}

impl Fixture {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let place = folder.path();
        for name in ["runtime", "home/templates/default"] {
            fs::create_dir_all(place.join(name)).unwrap();
        }
        let mut files = String::new();
        for name in ["initramfs", "root.erofs", "vmlinux", "vmlinuz"] {
            fs::write(place.join("home/templates/default").join(name), "").unwrap();
            files += &format!(r#"{}"{name}":{{"bytes":0,"sha256":""}}"#, if files.is_empty() { "" } else { "," });
        }
        let manifest = format!(r#"{{"version":1,"suite":"x","kernel":"6.12","packages":{{}},"files":{{{files}}}}}"#);
        fs::write(place.join("home/templates/default/template.json"), manifest).unwrap();
        fs::write(place.join("vmm"), VMM).unwrap();
        fs::set_permissions(place.join("vmm"), PermissionsExt::from_mode(0o755)).unwrap();
        for pipe in ["arguments", "end"] {
            assert!(Command::new("mkfifo").arg(place.join(pipe)).status().unwrap().success());
        }
        Self { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn launcher(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_spectrum"));
        command
            .args(arguments)
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .env("FAKE", self.folder.path())
            .env("SPECTRUM_HOME", self.path("home"))
            .env("SPECTRUM_VMM", self.path("vmm"))
            .env("XDG_RUNTIME_DIR", self.path("runtime"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    fn run(&self, arguments: &[&str]) -> Child {
        let arguments = [&["run", "--boot", "--no-wayland"], arguments].concat();
        self.launcher(&arguments).spawn().unwrap()
    }

    /// Arguments of the VMM, once it runs.
    fn vmm_arguments(&self) -> Vec<String> {
        let lines = BufReader::new(fs::File::open(self.path("arguments")).unwrap()).lines();
        lines.map(Result::unwrap).take_while(|line| line != "END").collect()
    }

    /// Plays VMM and agent up to the request to run something.
    fn answer(&self) -> (Run, Agent, Agent) {
        self.answer_after(&self.vmm_arguments())
    }

    /// The same for a VMM whose arguments are known.
    fn answer_after(&self, arguments: &[String]) -> (Run, Agent, Agent) {
        let (listener, _, mut agent, ready) = Self::answer_wake_of(arguments);
        send(&mut agent, &[FromAgent::Reply(Reply::Done)]);
        let (run, agent) = request_to_run(&listener);
        (run, agent, ready)
    }

    /// Plays VMM and agent up to the first request: the listener for more, the identity, the connection it came by, and the
    /// one that the agent announced itself on.
    fn answer_wake(&self) -> (UnixListener, Identity, Agent, Agent) {
        Self::answer_wake_of(&self.vmm_arguments())
    }

    fn answer_wake_of(arguments: &[String]) -> (UnixListener, Identity, Agent, Agent) {
        let value = arguments.iter().find_map(|argument| argument.strip_prefix("cid=3,socket=")).unwrap();
        let socket = Path::new(value);
        let listener = UnixListener::bind(socket).unwrap();
        let mut ready = Agent::new(UnixStream::connect(format!("{value}_5001")).unwrap().into()).unwrap();
        ready.queue(&FromAgent::Hello(Hello { version: VERSION })).unwrap();
        ready.flush().unwrap();
        match connection(&listener) {
            (Request::Wake(identity), agent) => (listener, identity, agent, ready),
            (other, _) => panic!("{other:?}"),
        }
    }

    /// Lets the VMM end with this status.
    fn end(&self, status: &str) {
        fs::write(self.path("end"), format!("{status}\n")).unwrap();
    }

    fn assert_nothing_left(&self) {
        assert_eq!(fs::read_dir(self.path("runtime/spectrum")).unwrap().count(), 0);
    }
}

/// The launcher's next connection and its request.
fn connection(listener: &UnixListener) -> (Request, Agent) {
    let (mut stream, _) = listener.accept().unwrap();
    let mut line = [0; 13];
    stream.read_exact(&mut line).unwrap();
    assert_eq!(&line, b"CONNECT 5000\n");
    stream.write_all(b"OK 1073741824\n").unwrap();
    let mut agent = Agent::new(stream.into()).unwrap();
    match agent.exchange(20).unwrap() {
        ToAgent::Request(request) => (request, agent),
        other => panic!("{other:?}"),
    }
}

/// The launcher's next connection, which is to run something.
fn request_to_run(listener: &UnixListener) -> (Run, Agent) {
    match connection(listener) {
        (Request::Run(run), agent) => (run, agent),
        (other, _) => panic!("{other:?}"),
    }
}

fn send(agent: &mut Agent, messages: &[FromAgent]) {
    for message in messages {
        agent.queue(message).unwrap();
    }
    while !agent.is_idle() {
        agent.flush().unwrap();
    }
}

fn started() -> FromAgent {
    FromAgent::Reply(Reply::Started { pid: 7 })
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn streams_and_status_are_passed_on() {
    let fixture = Fixture::new();
    let mut child = fixture.run(&["--env", "A=b", "--cwd", "/tmp", "wc", "-c", "--help"]);
    child.stdin.take().unwrap().write_all(b"input").unwrap();
    let (run, mut agent, _ready) = fixture.answer();
    assert_eq!(run.argv, ["wc", "-c", "--help"]);
    assert_eq!((run.user.as_str(), run.cwd.as_deref(), run.then_power_off), ("user", Some("/tmp"), true));
    assert_eq!(run.env["A"], "b");
    send(&mut agent, &[started()]);
    assert_eq!(agent.exchange(20).unwrap(), ToAgent::Stdin(b"input".to_vec()));
    assert_eq!(agent.exchange(20).unwrap(), ToAgent::Stdin(vec![]));
    let raw = b"out\x1b[0m\n".to_vec();
    let messages = [
        FromAgent::Stdout(raw.clone()),
        FromAgent::Stderr(b"err\n".to_vec()),
        FromAgent::Stdout(vec![b'x'; 30_000]),
        FromAgent::Exit(ExitStatus::Code(42)),
    ];
    send(&mut agent, &messages);
    fixture.end("0");
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(42), "{}", text(&output.stderr));
    assert_eq!(output.stdout, [raw, vec![b'x'; 30_000]].concat());
    assert_eq!(text(&output.stderr), "err\n");
    fixture.assert_nothing_left();
}

#[test]
fn each_vm_gets_an_identity_of_its_own_before_anything_runs() {
    let mut identities = Vec::new();
    for _ in 0..2 {
        let fixture = Fixture::new();
        let child = fixture.run(&["My.App"]);
        let (_listener, identity, mut agent, _ready) = fixture.answer_wake();
        identities.push(identity);
        send(&mut agent, &[FromAgent::Reply(Reply::Failed { message: "the clock\u{1b}[2J is stuck".into() })]);
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(125));
        assert_eq!(text(&output.stderr), "spectrum: the clock\u{fffd}[2J is stuck\n");
        fixture.assert_nothing_left();
    }
    let [a, b] = &identities[..] else { panic!("{identities:?}") };
    assert_eq!(a.hostname.as_ref().map(|name| name.as_str()), Some("my-app"));
    assert!(a.seed != b.seed && a.machine_id != b.machine_id && a.boot_id != b.boot_id, "{identities:?}");
    assert!(a.realtime < b.realtime, "{identities:?}");
}

#[test]
fn a_signal_of_the_application_becomes_a_status() {
    let fixture = Fixture::new();
    let child = fixture.run(&["foot"]);
    let (_, mut agent, _ready) = fixture.answer();
    send(&mut agent, &[started(), FromAgent::Exit(ExitStatus::Signal(11))]);
    fixture.end("0");
    assert_eq!(child.wait_with_output().unwrap().status.code(), Some(128 + 11));
}

#[test]
fn signals_end_the_vm() {
    for (name, number) in [("INT", 2), ("TERM", 15)] {
        let fixture = Fixture::new();
        let child = fixture.run(&["foot"]);
        let (_, mut agent, _ready) = fixture.answer();
        send(&mut agent, &[started()]);
        let pid = child.id().to_string();
        assert!(Command::new("kill").args(["-s", name, &pid]).status().unwrap().success());
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(128 + number));
        assert_eq!(text(&output.stderr), "");
        fixture.assert_nothing_left();
    }
}

#[test]
fn what_the_agent_cannot_start_is_told() {
    let fixture = Fixture::new();
    let child = fixture.run(&["no-such-thing"]);
    let (_, mut agent, _ready) = fixture.answer();
    let message = "there is no program no-such-thing in the VM\u{1b}[2J".into();
    send(&mut agent, &[FromAgent::Reply(Reply::Failed { message })]);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(125));
    assert_eq!(text(&output.stderr), "spectrum: there is no program no-such-thing in the VM\u{fffd}[2J\n");
    fixture.assert_nothing_left();
}

#[test]
fn a_vmm_that_dies_is_explained_with_its_last_words() {
    // Before the agent is there, and while the application runs.
    for running in [false, true] {
        let fixture = Fixture::new();
        let child = fixture.run(&["foot"]);
        if running {
            let (_, mut agent, _ready) = fixture.answer();
            send(&mut agent, &[started()]);
            drop(agent);
        } else {
            fixture.vmm_arguments();
        }
        fixture.end("9");
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(125));
        let expected = "spectrum: the VMM ended (exit status: 9) before the application did\n\
                        the VMM's last messages:\nlast words\n";
        assert_eq!(text(&output.stderr), expected);
        fixture.assert_nothing_left();
    }
}

#[test]
fn a_guest_that_breaks_the_protocol_ends_the_run() {
    let fixture = Fixture::new();
    let child = fixture.run(&["foot"]);
    let (_, mut agent, _ready) = fixture.answer();
    send(&mut agent, &[started(), FromAgent::Hello(Hello { version: VERSION })]);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(125));
    assert!(text(&output.stderr).contains("broke the protocol"), "{}", text(&output.stderr));
    fixture.assert_nothing_left();
}

#[test]
fn a_vm_that_is_never_ready_is_given_up() {
    let fixture = Fixture::new();
    let output = fixture.run(&["--boot-timeout", "0", "foot"]).wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(125));
    assert!(text(&output.stderr).starts_with("spectrum: the VM was not ready after 0 s"), "{}", text(&output.stderr));
    fixture.assert_nothing_left();
}

#[test]
fn the_vmm_gets_cloud_hypervisors_options() {
    let fixture = Fixture::new();
    let socket = fixture.path("wayland-7");
    let _compositor = UnixListener::bind(&socket).unwrap();
    let mut command = fixture.launcher(&["run", "--memory", "1G", "--cpus", "2", "--vmm-arg=-v", "My.App"]);
    let child = command.env("WAYLAND_DISPLAY", &socket).spawn().unwrap();
    let arguments = fixture.vmm_arguments();
    let value = |flag: &str| {
        let at = arguments.iter().position(|argument| argument == flag).unwrap_or_else(|| panic!("{flag}"));
        arguments[at + 1].clone()
    };
    assert_eq!(value("--memory"), "size=1G");
    assert_eq!(value("--cpus"), "boot=2");
    assert_eq!(value("--gpu"), format!("cross-domain,wayland={}", socket.display()));
    let template = fixture.path("home/templates/default");
    assert_eq!(value("--pmem"), format!("file={},discard_writes=on", template.join("root.erofs").display()));
    assert_eq!(value("--kernel"), template.join("vmlinuz").display().to_string());
    assert!(value("--cmdline").ends_with("spectrum.root=/dev/pmem0 spectrum.hostname=my-app"));
    assert_eq!(value("--fs"), "tag=host");
    assert_eq!(arguments.last().unwrap(), "-v");
    fixture.end("1");
    assert_eq!(child.wait_with_output().unwrap().status.code(), Some(125));
}

/// The first line on standard error, and the status.
fn mistake(command: &mut Command) -> (String, i32) {
    let Output { status, stderr, .. } = command.output().unwrap();
    let text = text(&stderr);
    assert_eq!(text.lines().count(), 1, "{text}");
    (text.trim().to_owned(), status.code().unwrap())
}

#[test]
fn mistakes_are_one_sentence() {
    let fixture = Fixture::new();
    let home = fixture.path("home");
    let check = |command: &mut Command, expected: &str| {
        let (text, status) = mistake(command);
        assert!(text.contains(expected), "{text}");
        assert_eq!(status, 125);
    };
    check(&mut fixture.launcher(&["run", "foot"]), "WAYLAND_DISPLAY is not set");
    check(fixture.launcher(&["run", "foot"]).env("WAYLAND_DISPLAY", "wayland-9"), "does not answer");
    check(&mut fixture.launcher(&["run", "--no-wayland", "--template", "x", "foot"]), "there is no template \"x\"");
    check(&mut fixture.launcher(&["run", "--no-wayland", "--template", "../x", "foot"]), "cannot be a template's name");
    check(&mut fixture.launcher(&["run", "--no-wayland", "--vmm", "/no/vmm", "foot"]), "there is no VMM at /no/vmm");
    check(&mut fixture.launcher(&["run", "--no-wayland", "--env", "A", "foot"]), "is not NAME=VALUE");
    check(&mut fixture.launcher(&["template", "rm", "x"]), "there is no template \"x\"");
    check(&mut fixture.launcher(&["template", "build", "x", "--guest", "/no/guest"]), "cannot use /no/guest");
    check(&mut fixture.launcher(&["template", "build", "x", "--guest", "/bin/sh"]), "is not a static");
    check(fixture.launcher(&["template", "list"]).env("SPECTRUM_HOME", "relative"), "must be an absolute path");
    fs::remove_dir_all(home.join("templates/default")).unwrap();
    check(&mut fixture.launcher(&["run", "--no-wayland", "foot"]), "there is no template yet");
    let output = fixture.launcher(&["run", "--templat", "x", "foot"]).output().unwrap();
    assert!(!output.status.success() && text(&output.stderr).contains("--template"), "{}", text(&output.stderr));
}

#[test]
fn an_app_file_says_what_is_run_and_the_command_line_wins() {
    let fixture = Fixture::new();
    let apps = fixture.path("share/spectrum/apps");
    fs::create_dir_all(&apps).unwrap();
    let text = "command = [\"firefox\", \"--new\"]\nmemory = \"2G\"\ncpus = 2\nwayland = false\n";
    fs::write(apps.join("web.toml"), text).unwrap();
    for (flags, memory) in [(&[][..], "size=2G"), (&["--memory", "1G"][..], "size=1G")] {
        let mut command = fixture.launcher(&[&["run", "--boot"], flags, &["web", "--memory"]].concat());
        let child = command.env("XDG_DATA_DIRS", fixture.path("share")).spawn().unwrap();
        let arguments = fixture.vmm_arguments();
        assert!(arguments.iter().any(|argument| argument == memory), "{arguments:?}");
        assert!(arguments.iter().any(|argument| argument == "boot=2"), "{arguments:?}");
        assert!(!arguments.iter().any(|argument| argument == "--gpu"), "{arguments:?}");
        let (run, mut agent, _ready) = fixture.answer_after(&arguments);
        assert_eq!(run.argv, ["firefox", "--new", "--memory"]);
        send(&mut agent, &[started(), FromAgent::Exit(ExitStatus::Code(0))]);
        fixture.end("0");
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    }
}

#[test]
fn an_app_that_asks_for_what_there_is_not_is_not_started() {
    let fixture = Fixture::new();
    let apps = fixture.path("share/spectrum/apps");
    fs::create_dir_all(&apps).unwrap();
    let file = apps.join("web.toml");
    let table = [
        ("shares = [{ path = \"/no/such\" }]", " shares /no/such, which cannot be used ("),
        ("clipboard = \"deny\"", "asks for clipboard, but "),
        ("sound = true", "asks for sound, but "),
        ("\nmemroy = \"1G\"", ":2:1: unknown key \"memroy\": did you mean \"memory\"?"),
    ];
    for (text, expected) in table {
        fs::write(&file, text).unwrap();
        let mut command = fixture.launcher(&["run", "--no-wayland", "--vmm", "/no/vmm", "web"]);
        let (message, status) = mistake(command.env("XDG_DATA_DIRS", fixture.path("share")));
        assert!(message.starts_with(&format!("spectrum: {}", file.display())), "{message}");
        assert!(message.contains(expected), "{message}");
        assert_eq!(status, 125);
    }
}
