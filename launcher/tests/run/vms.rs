//! VMs that run, as other commands see them.

use std::{
    fs::{File, OpenOptions},
    os::{fd::OwnedFd, unix::fs::MetadataExt},
    sync::mpsc,
    thread,
    time::Duration,
};

use rustix::event::{PollFd, PollFlags, poll};
use vmm_api::{Failure, Reply as ApiReply, Request as ApiRequest, Server};

use super::*;

/// A VM that runs, with what plays its parts.
pub struct Running {
    launcher: Child,
    pub listener: UnixListener,
    _ready: Agent,
    /// The application's connection.
    application: Agent,
}

impl Fixture {
    /// Starts an application, and is its VM.
    fn start(&self, arguments: &[&str]) -> Running {
        self.start_with(self.run(arguments), |_| {})
    }

    /// The same; `before` has the VMM's arguments before the agent is there.
    pub fn start_with(&self, launcher: Child, before: impl FnOnce(&[String])) -> Running {
        let arguments = self.vmm_arguments();
        before(&arguments);
        let (listener, _, mut agent, ready) = Self::answer_wake_of(&arguments);
        send(&mut agent, &[FromAgent::Reply(Reply::Done)]);
        let (_, mut application) = request_to_run(&listener);
        send(&mut application, &[started()]);
        Running { launcher, listener, _ready: ready, application }
    }

    pub fn output(&self, arguments: &[&str]) -> (Option<i32>, String, String) {
        let output = self.launcher(arguments).stdin(Stdio::null()).output().unwrap();
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    }

    pub fn ps(&self) -> Vec<serde_json::Value> {
        let (status, text, errors) = self.output(&["ps", "--json"]);
        assert_eq!((status, &*errors), (Some(0), ""));
        serde_json::from_str(&text).unwrap()
    }

    pub fn names(&self) -> Vec<String> {
        self.ps().iter().map(|vm| vm["name"].as_str().unwrap().to_owned()).collect()
    }
}

pub fn value_of(arguments: &[String], flag: &str) -> PathBuf {
    let at = arguments.iter().position(|argument| argument == flag).unwrap();
    arguments[at + 1].trim_start_matches("file=").into()
}

/// Whether the process has not ended; a zombie has.
fn is_running(pid: &serde_json::Value) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
}

#[test]
fn vms_have_names_and_are_listed_while_they_live() {
    let fixture = Fixture::new();
    assert_eq!(fixture.names(), [""; 0]);
    let first = fixture.start(&["--name", "web", "foot", "-e", "x"]);
    let second = fixture.start(&["foot"]);
    let third = fixture.run(&["foot"]);
    // Its agent is not there yet.
    fixture.vmm_arguments();
    let vms = fixture.ps();
    assert_eq!(fixture.names(), ["foot-1", "foot-2", "web"]);
    assert_eq!(vms.iter().map(|vm| &vm["state"]).collect::<Vec<_>>(), ["running", "starting", "running"]);
    let web = &vms[2];
    assert_eq!(web["command"], serde_json::json!(["foot", "-e", "x"]));
    assert_eq!((&web["template"], &web["origin"]), (&"default".into(), &"boot".into()));
    assert_eq!(web["launcher_pid"], first.launcher.id());
    assert!(is_running(&web["pid"]) && web["pid"] != web["launcher_pid"]);
    let (_, table, _) = fixture.output(&["ps"]);
    assert!(table.starts_with("NAME    STATE     TEMPLATE  PID") && table.contains("foot -e x\n"), "{table}");

    let output = fixture.run(&["--name", "web", "foot"]).wait_with_output().unwrap();
    assert_eq!(text(&output.stderr), "spectrum: there is a VM called web already: see `spectrum ps`\n");
    let output = fixture.run(&["--name", "a/b", "foot"]).wait_with_output().unwrap();
    assert!(text(&output.stderr).contains("cannot be a VM's name"), "{}", text(&output.stderr));

    for (running, name, left) in [(third, "foot-2", 2), (second.launcher, "foot-1", 1), (first.launcher, "web", 0)] {
        assert_eq!(fixture.output(&["kill", name]), (Some(0), String::new(), String::new()));
        assert_eq!(running.wait_with_output().unwrap().status.code(), Some(125));
        assert_eq!(fixture.names().len(), left);
    }
    fixture.assert_nothing_left();
}

#[test]
fn further_commands_run_in_a_vm() {
    let fixture = Fixture::new();
    let mut vm = fixture.start(&["--name", "web", "foot"]);
    for arguments in [
        &["exec", "web", "--user", "root", "--cwd", "/tmp", "--env", "A=b", "--", "wc", "-c"][..],
        &["run", "--vm", "web", "--user", "root", "--cwd", "/tmp", "--env", "A=b", "wc", "-c"],
    ] {
        let mut child = fixture.launcher(arguments).spawn().unwrap();
        child.stdin.take().unwrap().write_all(b"input").unwrap();
        let (run, mut agent) = request_to_run(&vm.listener);
        assert_eq!((run.argv, run.env["A"].as_str()), (vec!["wc".into(), "-c".into()], "b"));
        assert_eq!((run.user.as_str(), run.cwd.as_deref(), run.then_power_off), ("root", Some("/tmp"), false));
        send(&mut agent, &[started()]);
        assert_eq!(agent.exchange(20).unwrap(), ToAgent::Stdin(b"input".to_vec()));
        let end = [FromAgent::Stdout(b"5\n".to_vec()), FromAgent::Exit(ExitStatus::Code(7))];
        send(&mut agent, &end);
        let output = child.wait_with_output().unwrap();
        assert_eq!((output.status.code(), &*output.stdout), (Some(7), &b"5\n"[..]), "{}", text(&output.stderr));
    }
    let child = fixture.launcher(&["shell", "web"]).spawn().unwrap();
    let (run, mut agent) = request_to_run(&vm.listener);
    assert_eq!(run.argv, ["sh", "-c", "exec \"${SHELL:-/bin/sh}\""], "nobody is there to be prompted");
    send(&mut agent, &[started(), FromAgent::Exit(ExitStatus::Code(0))]);
    assert_eq!(child.wait_with_output().unwrap().status.code(), Some(0));

    let (status, _, errors) = fixture.output(&["exec", "wbe", "--", "true"]);
    assert_eq!((status, &*errors), (Some(125), "spectrum: there is no VM called \"wbe\": did you mean web?\n"));

    // The application ends, and with it the VM; also for who has a command in it.
    let child = fixture.launcher(&["exec", "web", "--", "cat"]).spawn().unwrap();
    let (_, mut agent) = request_to_run(&vm.listener);
    send(&mut agent, &[started()]);
    send(&mut vm.application, &[FromAgent::Exit(ExitStatus::Code(0))]);
    fixture.end("0");
    assert_eq!(vm.launcher.wait_with_output().unwrap().status.code(), Some(0));
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(125), "spectrum: the VM web ended\n".into()));
    fixture.assert_nothing_left();
}

#[test]
fn a_vm_powers_off_or_is_ended() {
    for obeys in [true, false] {
        let fixture = Fixture::new();
        let vm = fixture.start(&["--name", "web", "foot"]);
        let pid = fixture.ps()[0]["pid"].clone();
        let seconds = if obeys { "60" } else { "1" };
        let child = fixture.launcher(&["stop", "web", "--timeout", seconds]).spawn().unwrap();
        let (request, mut agent) = connection(&vm.listener);
        assert_eq!(request, Request::PowerOff);
        if obeys {
            send(&mut agent, &[FromAgent::Reply(Reply::Done)]);
            fixture.end("0");
        }
        let output = child.wait_with_output().unwrap();
        let expected = if obeys { "" } else { "spectrum: web does not power off by itself: ending it\n" };
        assert_eq!((output.status.code(), text(&output.stderr)), (Some(0), expected.into()));
        assert!(!is_running(&pid));
        fixture.assert_nothing_left();
        assert_eq!(vm.launcher.wait_with_output().unwrap().status.code(), Some(125));
    }
}

#[test]
fn a_vm_whose_launcher_was_killed_is_ended_by_who_looks_next() {
    for arguments in [&["ps"][..], &["run", "--boot", "--no-wayland", "--boot-timeout", "0", "foot"]] {
        let fixture = Fixture::new();
        let mut vm = fixture.start(&["foot"]);
        let pid = fixture.ps()[0]["pid"].clone();
        vm.launcher.kill().unwrap();
        vm.launcher.wait().unwrap();
        assert!(is_running(&pid), "nobody has looked yet");
        let (_, output, _) = fixture.output(arguments);
        assert_eq!(output.lines().count(), usize::from(arguments == ["ps"]), "only the headings: {output}");
        assert!(!is_running(&pid));
        fixture.assert_nothing_left();
    }
}

#[test]
fn what_vmm_and_console_said_is_shown_without_what_a_terminal_would_obey() {
    let fixture = Fixture::new();
    let mut command = fixture.launcher(&["run", "--boot", "--no-wayland", "foot"]);
    let launcher = command.env("FAKE_WORDS", "a warning\\033[2J\\n").spawn().unwrap();
    // All of it is read before the agent's greeting is.
    let vm = fixture.start_with(launcher, |arguments| {
        let mut console = OpenOptions::new().write(true).open(value_of(arguments, "--console")).unwrap();
        console.write_all(b"from \x1b]0;the guest\r\n").unwrap();
    });
    let expected = "a warning\u{fffd}[2J\nfrom \u{fffd}]0;the guest\n";
    assert_eq!(fixture.output(&["logs", "foot-1"]), (Some(0), expected.into(), String::new()));
    assert_eq!(fixture.output(&["kill", "foot-1"]).0, Some(0));
    vm.launcher.wait_with_output().unwrap();
    fixture.assert_nothing_left();
}

/// Plays the VMM's API at `path`: tells of each request, and refuses what is called "bad".
pub fn serve_api(path: &Path) -> mpsc::Receiver<(ApiRequest, Vec<OwnedFd>)> {
    let (sender, receiver) = mpsc::channel();
    let mut server = Server::bind(path).unwrap();
    thread::spawn(move || {
        loop {
            poll(&mut [PollFd::new(&server, PollFlags::IN)], None).unwrap();
            let handled = server.dispatch(&mut |request, fds| {
                let refused = matches!(&request, ApiRequest::VmRemoveGrant(grant) if grant.name == "bad");
                let _ = sender.send((request, fds));
                if refused { Err(Failure::NotRunning) } else { Ok(ApiReply::Done) }
            });
            handled.unwrap();
        }
    });
    receiver
}

#[test]
fn files_are_granted_and_taken_back() {
    let fixture = Fixture::new();
    let file = fixture.path("report.txt");
    fs::write(&file, "").unwrap();
    let path = file.display().to_string();
    let mut api = None;
    let launcher = fixture.run(&["--name", "web", "--grant", &format!("{path}:rw"), "foot"]);
    let vm = fixture.start_with(launcher, |arguments| api = Some(serve_api(&value_of(arguments, "--api-socket"))));
    let api = api.unwrap();
    let next = || api.recv_timeout(Duration::from_secs(20)).unwrap();
    let expect_grant = |name: &str, writable: bool| {
        let (ApiRequest::VmAddGrant(grant), fds) = next() else { panic!("no grant") };
        assert_eq!((grant.id.as_str(), grant.name.as_str(), grant.writable), ("_fs0", name, writable));
        assert_eq!((grant.path, fds.len()), (None, 1));
        let given = File::from(fds.into_iter().next().unwrap()).metadata().unwrap();
        let meant = fs::metadata(&file).unwrap();
        assert_eq!((given.dev(), given.ino()), (meant.dev(), meant.ino()));
    };
    expect_grant("report.txt", true);
    let (status, _, errors) = fixture.output(&["grant", "web", &path]);
    assert_eq!(status, Some(125));
    assert!(errors.starts_with("spectrum: /host/report.txt is there already: choose another name"), "{errors}");
    assert_eq!(fixture.output(&["grant", "web", &path, "--write", "--as", "r"]).1, "/host/r\n");
    expect_grant("r", true);
    let grants = |fixture: &Fixture| fixture.ps()[0]["grants"].to_string();
    let expected = |names: &[&str]| {
        let grant = |name: &&str| format!(r#"{{"name":"{name}","path":"{path}","writable":true}}"#);
        format!("[{}]", names.iter().map(grant).collect::<Vec<_>>().join(","))
    };
    assert_eq!(grants(&fixture), expected(&["r", "report.txt"]));
    assert_eq!(fixture.output(&["revoke", "web", "r"]), (Some(0), String::new(), String::new()));
    assert!(matches!(next(), (ApiRequest::VmRemoveGrant(grant), _) if grant.id == "_fs0" && grant.name == "r"));
    assert_eq!(grants(&fixture), expected(&["report.txt"]));
    let (status, _, errors) = fixture.output(&["revoke", "web", "bad"]);
    assert!(status == Some(125) && errors.starts_with("spectrum: the VM's file system refuses: "), "{errors}");
    let (status, _, errors) = fixture.output(&["grant", "web", "/no/such"]);
    assert_eq!(status, Some(125));
    assert_eq!(errors, "spectrum: cannot grant /no/such: No such file or directory (os error 2)\n");
    assert_eq!(fixture.output(&["kill", "web"]).0, Some(0));
    vm.launcher.wait_with_output().unwrap();
    fixture.assert_nothing_left();
}
