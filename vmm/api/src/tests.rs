//! The server, its sockets, the client and a real `curl`, around a machine that only pretends.

use std::fs::File;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::JoinHandle;
use std::time::Duration;

use proptest::prelude::*;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::{FdFlags, fcntl_getfd};
use serde_json::{Value, json};
use vmm_config::{PayloadConfig, VmConfig};

use crate::http::{Found, Parser};
use crate::*;

/// A machine that has states and nothing else.
#[derive(Default)]
struct Machine {
    config: Option<VmConfig>,
    state: Option<VmState>,
}

impl Machine {
    /// Writes the request's name to each descriptor that came along.
    fn handle(&mut self, request: Request, fds: Vec<OwnedFd>) -> Response {
        let action = request.action();
        for fd in fds {
            // Not for a child process to inherit, unless it is meant to.
            assert!(fcntl_getfd(&fd).unwrap().contains(FdFlags::CLOEXEC));
            let _ = File::from(fd).write_all(action.name().as_bytes());
        }
        match request {
            Request::VmmPing => Ok(Reply::Ping(PingInfo {
                build_version: "v0.1.0-x".into(),
                version: "v0.1.0".into(),
                pid: 42,
                features: vec!["kvm".into()],
            })),
            Request::VmCreate(_) if self.config.is_some() => Err(Failure::AlreadyCreated),
            Request::VmCreate(config) => {
                self.config = Some(*config);
                Ok(Reply::Done)
            }
            Request::VmDelete => {
                *self = Self::default();
                Ok(Reply::Done)
            }
            Request::VmmShutdown => Ok(Reply::Done),
            _ if self.config.is_none() => Err(Failure::NotCreated),
            Request::VmInfo => Ok(Reply::Info(Box::new(VmInfo {
                config: self.config.clone().unwrap(),
                state: self.state.unwrap_or(VmState::Created),
                memory_actual_size: 512 << 20,
            }))),
            Request::VmBoot | Request::VmResume => self.enter(Some(VmState::Running)),
            _ if self.state.is_none() => Err(Failure::NotRunning),
            Request::VmPause => self.enter(Some(VmState::Paused)),
            _ => self.enter(None),
        }
    }

    fn enter(&mut self, state: Option<VmState>) -> Response {
        self.state = state;
        Ok(Reply::Done)
    }
}

/// A server in a thread of its own, for as long as the value lives.
struct Running {
    path: PathBuf,
    _folder: tempfile::TempDir,
    stop: Option<UnixStream>,
    thread: Option<JoinHandle<()>>,
}

impl Running {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("api");
        let mut server = Server::bind(&path).unwrap();
        let (stop, stopped) = UnixStream::pair().unwrap();
        let thread = std::thread::spawn(move || {
            let mut machine = Machine::default();
            loop {
                let mut fds = [PollFd::new(&server, PollFlags::IN), PollFd::new(&stopped, PollFlags::IN)];
                poll(&mut fds, None).unwrap();
                if !fds[1].revents().is_empty() {
                    return;
                }
                server.dispatch(&mut |request, fds| machine.handle(request, fds)).unwrap();
            }
        });
        Self { path, _folder: folder, stop: Some(stop), thread: Some(thread) }
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.path).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream.set_write_timeout(Some(Duration::from_secs(60))).unwrap();
        stream
    }

    fn client(&self) -> Client {
        let mut client = Client::connect(&self.path).unwrap();
        client.set_timeout(Some(Duration::from_secs(60))).unwrap();
        client
    }

    /// Status and body, as `curl` got them.
    fn curl(&self, arguments: &[&str]) -> (u16, String) {
        let output = Command::new("curl")
            .args(["--silent", "--show-error", "--max-time", "60", "--write-out", "\n%{http_code}", "--unix-socket"])
            .arg(&self.path)
            .args(arguments)
            .output()
            .expect("curl is installed");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let text = String::from_utf8(output.stdout).unwrap();
        let (body, status) = text.rsplit_once('\n').unwrap();
        (status.parse().unwrap(), body.to_owned())
    }

    fn get(&self, name: &str) -> (u16, Value) {
        let (status, body) = self.curl(&[&url(name)]);
        (status, serde_json::from_str(&body).unwrap_or(Value::Null))
    }

    fn put(&self, name: &str) -> (u16, String) {
        self.curl(&["-X", "PUT", &url(name)])
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.stop.take());
        let ended = self.thread.take().unwrap().join();
        if !std::thread::panicking() {
            ended.unwrap();
        }
    }
}

fn url(name: &str) -> String {
    format!("http://localhost/api/v1/{name}")
}

fn bootable() -> VmConfig {
    let payload = PayloadConfig { kernel: Some("/k".into()), ..Default::default() };
    VmConfig { payload: Some(payload), ..Default::default() }
}

fn read_all(mut stream: UnixStream) -> String {
    let mut text = Vec::new();
    // A reset after the answer is as good an end as any.
    let _ = stream.read_to_end(&mut text);
    String::from_utf8_lossy(&text).into_owned()
}

#[test]
fn curl_leads_a_machine_through_its_life() {
    let server = Running::start();
    let ping = json!({"build_version": "v0.1.0-x", "version": "v0.1.0", "pid": 42, "features": ["kvm"]});
    assert_eq!(server.get("vmm.ping"), (200, ping));
    let absent = json!(["Error from API", "The VM info is not available", "VM is not created"]);
    assert_eq!(server.get("vm.info"), (404, absent));
    assert_eq!(server.put("vm.boot").0, 404);

    let create = ["-X", "PUT", "-H", "Content-Type: application/json", "-d"];
    let body = r#"{"payload": {"kernel": "/k"}, "disks": null, "colour": "red"}"#;
    assert_eq!(server.curl(&[&create[..], &[body, &url("vm.create")]].concat()), (204, String::new()));
    let (status, text) = server.curl(&[&create[..], &[body, &url("vm.create")]].concat());
    assert_eq!(
        (status, text.as_str()),
        (500, r#"["Error from API","The VM could not be created","VM is already created"]"#)
    );
    let (status, info) = server.get("vm.info");
    assert_eq!((status, &info["state"], &info["config"]["payload"]["kernel"]), (200, &json!("Created"), &json!("/k")));

    assert_eq!(server.put("vm.pause").0, 500);
    for (action, state) in
        [("vm.boot", "Running"), ("vm.pause", "Paused"), ("vm.resume", "Running"), ("vm.shutdown", "Created")]
    {
        assert_eq!(server.put(action), (204, String::new()));
        assert_eq!(server.get("vm.info").1["state"], json!(state));
    }
    assert_eq!(server.put("vm.delete").0, 204);
    assert_eq!(server.put("vm.delete").0, 204);
    assert_eq!(server.get("vm.info").0, 404);
    assert_eq!(server.put("vmm.shutdown"), (200, String::new()));
}

#[test]
fn curl_is_told_what_is_wrong() {
    let server = Running::start();
    assert_eq!(server.get("vm.nothing"), (404, json!(["Not Found"])));
    assert_eq!(server.curl(&["-X", "POST", &url("vm.boot")]).0, 400);
    assert_eq!(server.put("vm.resize"), (501, r#"["vm.resize is not supported yet"]"#.into()));
    let create = |body: &str| server.curl(&["-X", "PUT", "-d", body, &url("vm.create")]);
    let (status, text) = create(r#"{"memory": {"size": "1G"}}"#);
    assert!(status == 400 && text.contains("memory.size: invalid type"), "{status} {text}");
    assert_eq!(create("{").0, 400);
    assert_eq!(create("").0, 400);
    let chunked = ["-H", "Transfer-Encoding: chunked", "-d", "{}", "-X", "PUT", &url("vm.create")];
    assert_eq!(server.curl(&chunked).0, 501);
}

#[test]
fn curl_asks_before_it_sends_a_large_body() {
    let server = Running::start();
    let mut config = bootable();
    config.payload.as_mut().unwrap().cmdline = Some("x".repeat(500_000));
    let file = server.path.with_file_name("body");
    let write = |config: &VmConfig| std::fs::write(&file, serde_json::to_vec(config).unwrap()).unwrap();
    let data = format!("@{}", file.display());
    let arguments = ["-X", "PUT", "-H", "Expect: 100-continue", "--data-binary", &data, &url("vm.create")];
    write(&config);
    assert_eq!(server.curl(&arguments).0, 204);
    assert_eq!(server.client().info().unwrap().config, config);
    config.payload.as_mut().unwrap().cmdline = Some("x".repeat(MAX_BODY));
    write(&config);
    assert_eq!(server.curl(&arguments).0, 413);
}

#[test]
fn the_client_gets_typed_answers() {
    let server = Running::start();
    let mut client = server.client();
    assert_eq!(client.ping().unwrap().pid, 42);
    let refused = client.info().unwrap_err();
    assert!(matches!(&refused, ClientError::Refused { status: 404, .. }), "{refused}");
    assert_eq!(
        refused.to_string(),
        "vm.info failed with status 404: Error from API: The VM info is not available: VM is not created"
    );
    client.create(bootable()).unwrap();
    for request in [Request::VmBoot, Request::VmPause, Request::VmResume] {
        assert_eq!(client.send(&request).unwrap(), Reply::Done);
    }
    let info = client.info().unwrap();
    assert_eq!((info.state, info.config), (VmState::Running, bootable()));
    let nobody = Client::connect(Path::new("/nowhere/at/all")).unwrap_err().to_string();
    assert!(nobody.starts_with("cannot connect to the VMM at /nowhere/at/all: "), "{nobody}");
}

#[test]
fn descriptors_reach_the_request_they_came_with() {
    let server = Running::start();
    let mut client = server.client();
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    client.ping().unwrap();
    client.send_with_fds(&Request::VmCreate(Box::new(bootable())), &[theirs.as_fd(), theirs.as_fd()]).unwrap();
    drop(theirs);
    assert_eq!(read_all(ours), "vm.createvm.create");
    let many = vec![client_fd(&server); MAX_FDS + 1];
    let many: Vec<_> = many.iter().map(|fd| fd.as_fd()).collect();
    assert!(matches!(client.send_with_fds(&Request::VmmPing, &many), Err(ClientError::TooManyFds(33))));
}

fn client_fd(server: &Running) -> std::sync::Arc<UnixStream> {
    std::sync::Arc::new(server.connect())
}

/// Sends `bytes` with `count` copies of a descriptor.
fn send_fds(stream: &UnixStream, bytes: &[u8], fd: &UnixStream, count: usize) -> rustix::io::Result<usize> {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    let fds = vec![fd.as_fd(); count];
    let mut space = vec![std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(count))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    sendmsg(stream, &[std::io::IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)
}

#[test]
fn a_flood_of_descriptors_is_refused_and_none_is_kept() {
    let server = Running::start();
    // All at once, and one with each byte.
    for (pieces, each) in [(1, 200), (40, 1)] {
        let stream = server.connect();
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        for _ in 0..pieces {
            if send_fds(&stream, b"G", &theirs, each).is_err() {
                break;
            }
        }
        drop(theirs);
        let answer = read_all(stream);
        assert!(answer.starts_with("HTTP/1.1 400 ") && answer.contains("file descriptors"), "{answer}");
        // The end of the file: every copy the server got is closed.
        assert_eq!(read_all(ours), "");
    }
    server.client().ping().unwrap();
}

#[test]
fn one_bad_client_does_not_disturb_another() {
    let server = Running::start();
    let mut good = server.client();
    let cases: [(&[u8], &str); 5] = [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\n\n", "400 "),
        (&[b'a'; 17 << 10], "431 "),
        (b"GET / HTTP/9.9\r\n\r\n", "400 "),
        (b"PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: 4294967296\r\n\r\n", "413 "),
        (b"PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n{}", "400 "),
    ];
    for (bytes, status) in cases {
        let mut bad = server.connect();
        let _ = bad.write_all(bytes);
        let answer = read_all(bad);
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{answer}");
        assert!(answer.contains("\r\nConnection: close\r\n"), "{answer}");
        good.ping().unwrap();
    }
    // One that hangs up in the middle, and one that never says anything.
    let mut rude = server.connect();
    rude.write_all(b"PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: 100\r\n\r\n{").unwrap();
    drop(rude);
    let _silent = server.connect();
    good.ping().unwrap();
}

#[test]
fn a_slow_client_is_served_in_the_end() {
    let server = Running::start();
    let mut slow = server.connect();
    let mut good = server.client();
    for byte in b"GET /api/v1/vmm.ping HTTP/1.0\r\nHost: x\r\n\r\n" {
        slow.write_all(&[*byte]).unwrap();
        good.ping().unwrap();
    }
    let answer = read_all(slow);
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n") && answer.ends_with("}"), "{answer}");
}

#[test]
fn requests_in_one_piece_are_answered_in_order() {
    let server = Running::start();
    let mut stream = server.connect();
    let requests = "GET /api/v1/vmm.ping HTTP/1.1\r\n\r\nGET /api/v1/vm.info HTTP/1.1\r\n\r\n\
                    PUT /api/v1/vmm.shutdown HTTP/1.1\r\nConnection: close\r\n\r\nGET /never HTTP/1.1\r\n\r\n";
    stream.write_all(requests.as_bytes()).unwrap();
    let answer = read_all(stream);
    let statuses: Vec<_> = answer.split("HTTP/1.1 ").skip(1).map(|part| &part[..3]).collect();
    assert_eq!(statuses, ["200", "404", "200"]);
}

#[test]
fn a_client_that_does_not_read_is_not_read_from() {
    const REQUEST: &[u8] = b"GET /api/v1/vmm.ping HTTP/1.1\r\n\r\n";
    const MANY: usize = 50_000;
    let server = Running::start();
    let mut greedy = server.connect();
    greedy.set_nonblocking(true).unwrap();
    let mut good = server.client();
    let (mut sent, mut rounds_without_progress) = (0, 0);
    // A ping is answered in a turn in which the greedy client would be read from too.
    while rounds_without_progress < 3 {
        rounds_without_progress += 1;
        while let Ok(count) = greedy.write(&REQUEST[sent % REQUEST.len()..]) {
            sent += count;
            rounds_without_progress = 0;
            assert!(sent < MANY * REQUEST.len(), "the server takes everything in without bound");
        }
        good.ping().unwrap();
    }
    // As soon as it reads, it is served again, to the last request.
    greedy.set_nonblocking(false).unwrap();
    let mut writer = greedy.try_clone().unwrap();
    let rest = std::thread::spawn(move || {
        writer.write_all(&REQUEST[sent % REQUEST.len()..]).unwrap();
        writer.shutdown(Shutdown::Write).unwrap();
    });
    let answers = read_all(greedy);
    rest.join().unwrap();
    assert_eq!(answers.matches("HTTP/1.1 200 OK").count(), sent / REQUEST.len() + 1);
}

#[test]
fn more_clients_than_places_push_out_the_silent() {
    let server = Running::start();
    let mut first = server.client();
    first.ping().unwrap();
    let mut crowd: Vec<_> = (0..100).map(|_| server.client()).collect();
    crowd.last_mut().unwrap().ping().unwrap();
    assert!(first.ping().is_err());
}

#[test]
fn the_socket_is_the_owners_alone_and_goes_with_the_server() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("api");
    let server = Server::bind(&path).unwrap();
    assert_eq!(std::fs::symlink_metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    let taken = Server::bind(&path).unwrap_err();
    assert!(matches!(taken, ListenError::InUse(_)), "{taken}");
    drop(server);
    assert!(!path.exists());

    // Left behind by a process that died.
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let server = Server::bind(&path).unwrap();
    UnixStream::connect(&path).unwrap();
    // Another's by now: it stays.
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "x").unwrap();
    drop(server);
    assert!(path.exists());

    let file = Server::bind(&path).unwrap_err();
    assert!(matches!(file, ListenError::NotASocket(_)), "{file}");
    assert!(matches!(Server::bind(&path.join("x".repeat(108))), Err(ListenError::TooLong(_))));
    let missing = Server::bind(&folder.path().join("no/such/folder")).unwrap_err().to_string();
    assert!(missing.starts_with("cannot bind the socket "), "{missing}");
}

#[test]
fn a_listening_socket_can_be_handed_down() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("api");
    let mut server = Server::from_listener(UnixListener::bind(&path).unwrap().into()).unwrap();
    let mut stream = UnixStream::connect(&path).unwrap();
    stream.write_all(b"PUT /api/v1/vm.boot HTTP/1.1\r\nConnection: close\r\n\r\n").unwrap();
    // The new connection, then its request.
    for _ in 0..2 {
        poll(&mut [PollFd::new(&server, PollFlags::IN)], None).unwrap();
        server.dispatch(&mut |_, _| Ok(Reply::Done)).unwrap();
    }
    assert!(read_all(stream).starts_with("HTTP/1.1 204 No Content\r\n"));
    assert_eq!(server.connections(), 0);
    drop(server);
    assert!(path.exists());
    let (one, _two) = UnixStream::pair().unwrap();
    assert!(matches!(Server::from_listener(one.into()), Err(ListenError::NotListening)));
    assert!(matches!(Server::from_listener(File::open("/dev/null").unwrap().into()), Err(ListenError::NotListening)));
}

#[test]
fn a_failure_tells_its_causes_once() {
    let io = std::io::Error::other("the disk is on fire");
    let error = ListenError::System { step: "bind", path: "/s".into(), source: io };
    assert_eq!(
        Failure::because(&error),
        Failure::Other(vec!["cannot bind the socket /s: the disk is on fire".to_owned()])
    );
}

proptest! {
    #[test]
    fn the_parser_survives_anything(pieces in proptest::collection::vec(
        prop_oneof![
            proptest::collection::vec(any::<u8>(), 0..200),
            "(GET|PUT) /[a-z]{0,5} HTTP/1\\.[01]\r?\n((Content-Length|Expect|Connection): [0-9a-z-]{0,5}\r?\n){0,3}\r?\n?"
                .prop_map(String::into_bytes),
        ],
        0..20,
    )) {
        let mut parser = Parser::default();
        'stream: for piece in pieces {
            prop_assert!(parser.push(&piece, Vec::new()).is_ok());
            loop {
                match parser.next() {
                    Ok(Found::Nothing) => break,
                    Ok(_) => {}
                    Err(_) => break 'stream,
                }
            }
        }
    }
}
