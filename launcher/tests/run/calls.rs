//! Calls between the apps of two VMs: this test plays the caller in one of them, and the agent in the other.

use std::{collections::BTreeMap, os::fd::AsFd};

use guest_proto::{Call, FromCaller, LinkError};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{vms::Running, *};

type Caller = Link<FromAgent, FromCaller>;

/// Calls that one VM may have at once.
const CALLS: usize = 16;

/// The app `vault`, which offers services, and `mail`, which calls them.
struct Apps {
    fixture: Fixture,
    vault: Running,
    _mail: Running,
    /// The VMM's socket of `mail`.
    socket: PathBuf,
}

impl Apps {
    fn new(policy: &str) -> Self {
        let fixture = Fixture::new();
        fs::create_dir_all(fixture.path("config/spectrum/apps")).unwrap();
        let vault = "[services]\necho = [\"cat\", \"-u\"]\nother = [\"true\"]\n";
        fs::write(fixture.path("config/spectrum/apps/vault.toml"), vault).unwrap();
        fs::write(fixture.path("config/spectrum/policy"), policy).unwrap();
        let mut socket = PathBuf::new();
        let mut start = |name: &str| {
            let mut launcher = fixture.launcher(&["run", "--boot", "--no-wayland", name]);
            launcher.env("XDG_CONFIG_HOME", fixture.path("config")).env("XDG_STATE_HOME", fixture.path("state"));
            // Nobody is to be asked on the desktop of who runs this test.
            launcher.env("DBUS_SESSION_BUS_ADDRESS", "unix:path=/no/bus");
            fixture.start_with(launcher.spawn().unwrap(), |arguments| {
                let value = arguments.iter().find_map(|argument| argument.strip_prefix("cid=3,socket="));
                socket = value.unwrap().into();
            })
        };
        let (vault, mail) = (start("vault"), start("mail"));
        Self { fixture, vault, _mail: mail, socket }
    }

    fn connect(&self) -> Caller {
        let port = format!("{}_5003", self.socket.display());
        Caller::new(UnixStream::connect(port).unwrap().into()).unwrap()
    }

    fn call(&self, app: &str, service: &str) -> Caller {
        let mut caller = self.connect();
        let call = Call { app: app.into(), service: service.into() };
        caller.queue(&FromCaller::Call(call)).unwrap();
        caller.flush().unwrap();
        caller
    }

    /// A call whose service runs.
    fn started(&self) -> (Caller, Agent) {
        let mut caller = self.call("vault", "echo");
        let (_, mut agent) = request_to_run(&self.vault.listener);
        send(&mut agent, &[started()]);
        assert_eq!(caller.exchange(20).unwrap(), FromAgent::Reply(Reply::Started { pid: 0 }));
        (caller, agent)
    }

    fn log(&self) -> String {
        fs::read_to_string(self.fixture.path("state/spectrum/policy.log")).unwrap()
    }
}

fn put(caller: &mut Caller, message: &FromCaller) {
    caller.queue(message).unwrap();
    caller.flush().unwrap();
}

fn refusal(mut caller: Caller) -> String {
    match caller.exchange(20).unwrap() {
        FromAgent::Reply(Reply::Failed { message }) => message,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_call_that_is_allowed_is_relayed_to_the_service_of_the_app_file() {
    let apps = Apps::new("exec mail vault:echo allow\n");
    let mut caller = apps.call("vault", "echo");
    let (run, mut agent) = request_to_run(&apps.vault.listener);
    let caller_is = BTreeMap::from([("SPECTRUM_CALLER".to_owned(), "mail".to_owned())]);
    assert_eq!((run.argv, run.env, run.user), (vec!["cat".into(), "-u".into()], caller_is, "user".into()));
    assert_eq!((run.cwd, run.then_power_off), (None, false));
    send(&mut agent, &[started()]);
    // Not the number that it has in the other VM.
    assert_eq!(caller.exchange(20).unwrap(), FromAgent::Reply(Reply::Started { pid: 0 }));
    for input in [&b"in"[..], b""] {
        put(&mut caller, &FromCaller::Stdin(input.to_vec()));
        assert_eq!(agent.exchange(20).unwrap(), ToAgent::Stdin(input.to_vec()));
    }
    let frames = [
        FromAgent::StdinCredit(2),
        FromAgent::Stdout(b"out".to_vec()),
        FromAgent::Stderr(b"error".to_vec()),
        FromAgent::Exit(ExitStatus::Code(3)),
    ];
    send(&mut agent, &frames);
    for frame in frames {
        assert_eq!(caller.exchange(20).unwrap(), frame);
    }
    let policy = apps.fixture.path("config/spectrum/policy");
    let expected =
        format!(" allow exec \"mail\" \"vault:echo\" ({}:1: exec mail vault:echo allow)\n", policy.display());
    assert!(apps.log().ends_with(&expected), "{}", apps.log());
}

#[test]
fn what_is_not_allowed_or_not_there_starts_nothing_and_tells_nothing() {
    let table = [
        ("", "vault", "echo", "the policy denies it", "(no rule of "),
        ("exec web vault:echo allow\n", "vault", "echo", "the policy denies it", "(no rule of "),
        ("exec mail vault:other allow\n", "vault", "echo", "the policy denies it", "(no rule of "),
        (
            "exec mail vault:echo deny\nexec * * allow\n",
            "vault",
            "echo",
            "the policy denies it",
            ":1: exec mail vault:echo deny)",
        ),
        (
            "exec * * allow\nexec * * alow\n",
            "vault",
            "echo",
            "the policy denies it",
            "/policy:2:10: unknown action \"alow\"",
        ),
        (
            "exec mail vault:echo ask\n",
            "vault",
            "echo",
            "the policy denies it",
            "exec mail vault:echo ask; not asked: ",
        ),
        ("exec mail vault:nothing ask\n", "vault", "nothing", "the policy denies it", "not asked: "),
        ("exec * * allow\n", "vault", "nothing", "vault offers no service nothing", " allow exec "),
        ("exec * * allow\n", "bank", "echo", "bank does not run", " allow exec \"mail\" \"bank:echo\""),
        ("exec * * allow\n", "vault", "../echo", "\"../echo\" cannot be the name of an app or a service", ""),
        ("exec * * allow\n", "a:b", "echo", "\"a:b\" cannot be the name of an app or a service", ""),
    ];
    let apps = Apps::new("");
    for (policy, app, service, expected, logged) in table {
        fs::write(apps.fixture.path("config/spectrum/policy"), policy).unwrap();
        assert_eq!(refusal(apps.call(app, service)), expected, "{policy}");
        if !logged.is_empty() {
            let log = apps.log();
            assert!(log.lines().last().unwrap().contains(logged), "{policy}: {log}");
        }
    }
    apps.vault.listener.set_nonblocking(true).unwrap();
    assert!(apps.vault.listener.accept().is_err(), "something was started");
}

#[test]
fn calls_are_bounded_and_who_goes_ends_the_call() {
    let apps = Apps::new("exec mail vault:echo allow\n");
    let mut calls: Vec<_> = (0..CALLS).map(|_| apps.started()).collect();
    assert_eq!(refusal(apps.connect()), "there are 16 calls already");
    // The caller goes: the agent ends its process with the connection.
    let (caller, mut agent) = calls.pop().unwrap();
    drop(caller);
    assert!(matches!(agent.exchange(20), Err(LinkError::Closed)));
    // The service's VM goes.
    let (mut caller, agent) = calls.pop().unwrap();
    drop(agent);
    assert!(matches!(caller.exchange(20), Err(LinkError::Closed)));
    let last = loop {
        let mut caller = apps.connect();
        // It is told at once that there is no room, or waited for.
        match caller.exchange(1) {
            Ok(_) => {}
            Err(LinkError::TimedOut(_)) => break caller,
            Err(error) => panic!("{error}"),
        }
    };
    drop((last, calls));
}

#[test]
fn a_side_that_breaks_the_protocol_is_left() {
    let apps = Apps::new("exec mail vault:echo allow\n");
    let mut caller = apps.connect();
    put(&mut caller, &FromCaller::Stdin(vec![1]));
    assert!(matches!(caller.exchange(20), Err(LinkError::Closed)));
    let again = FromCaller::Call(Call { app: "vault".into(), service: "echo".into() });
    let (mut caller, mut agent) = apps.started();
    put(&mut caller, &again);
    assert!(matches!(agent.exchange(20), Err(LinkError::Closed)));
    assert!(matches!(caller.exchange(20), Err(LinkError::Closed)));
    for wrong in [started(), FromAgent::Hello(Hello { version: VERSION })] {
        let (mut caller, mut agent) = apps.started();
        send(&mut agent, &[wrong]);
        assert!(matches!(caller.exchange(20), Err(LinkError::Closed)));
    }
}

/// Sends as much as is taken, at most 64 MiB. Gives the number of frames.
fn fill<Rx: guest_proto::Message, Tx: guest_proto::Message>(link: &mut Link<Rx, Tx>, frame: &Tx) -> usize {
    let mut count = 0;
    while count < 2048 {
        link.queue(frame).unwrap();
        count += 1;
        while !link.is_idle() {
            // Nothing says that nothing will be taken any more.
            let mut ready = [PollFd::from_borrowed_fd(link.as_fd(), PollFlags::OUT)];
            if poll(&mut ready, Some(&Timespec { tv_sec: 1, tv_nsec: 0 })).unwrap() == 0 {
                return count;
            }
            link.flush().unwrap();
        }
    }
    count
}

#[test]
fn who_does_not_read_stops_who_writes_and_nothing_is_lost() {
    const FRAME: usize = 32 * 1024;
    let apps = Apps::new("exec mail vault:echo allow\n");
    let (mut caller, mut agent) = apps.started();
    let sent = fill(&mut agent, &FromAgent::Stdout(vec![7; FRAME]));
    assert!(sent < 256, "{sent} frames on the way");
    // The other direction is free meanwhile.
    put(&mut caller, &FromCaller::Stdin(b"in".to_vec()));
    assert_eq!(agent.exchange(20).unwrap(), ToAgent::Stdin(b"in".to_vec()));
    let mut seen = 0;
    while seen < sent {
        assert_eq!(caller.exchange(20).unwrap(), FromAgent::Stdout(vec![7; FRAME]));
        seen += 1;
        agent.flush().unwrap();
    }
    let sent = fill(&mut caller, &FromCaller::Stdin(vec![8; FRAME]));
    assert!(sent < 256, "{sent} frames on the way");
    // The caller goes while nothing more is taken from it.
    drop(caller);
    let mut ended = false;
    while !ended {
        ended = agent.exchange(20).is_err_and(|error| matches!(error, LinkError::Closed | LinkError::Io(_)));
    }
}
