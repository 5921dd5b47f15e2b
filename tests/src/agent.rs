//! A VM of the template without its launcher: the test speaks to the agent itself.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use guest_proto::{AGENT_PORT, FromAgent, Hello, Link, READY_PORT, Reply, Request, Run, ToAgent, VERSION};

use crate::{TIMEOUT, VmmCommand};

/// The launcher's end of a connection.
pub type AgentLink = Link<FromAgent, ToAgent>;

/// The folder of the template.
///
/// # Panics
/// If none is named in the environment.
#[must_use]
pub fn template() -> PathBuf {
    let variable =
        |name: &str| std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set: see scripts/template"));
    Path::new(&variable("SPECTRUM_HOME")).join("templates").join(variable("SPECTRUM_TEMPLATE"))
}

/// What `spectrum run` gives the VMM, but for the GPU, with the console on standard output. Its vsock device's socket is
/// `socket`.
///
/// # Panics
/// If no template is named in the environment.
#[must_use]
pub fn command(socket: &Path) -> VmmCommand {
    let folder = template();
    VmmCommand::new()
        .arg("--kernel", folder.join("vmlinuz"))
        .arg("--initramfs", folder.join("initramfs"))
        .arg("--cmdline", "console=ttyS0 quiet panic=-1 spectrum.root=/dev/pmem0")
        .arg("--memory", "size=256M")
        .arg("--serial", "tty")
        .arg("--console", "off")
        .arg("--pmem", format!("file={},discard_writes=on", folder.join("root.erofs").display()))
        .arg("--vsock", format!("cid=3,socket={}", socket.display()))
}

/// The host's side of the vsock device.
pub struct Host {
    ready: UnixListener,
    socket: PathBuf,
}

fn seconds() -> u32 {
    u32::try_from(TIMEOUT.as_secs()).expect("not that long")
}

impl Host {
    /// Listens for the agents of machines whose vsock device's socket will be `socket`, one after another.
    ///
    /// # Panics
    /// If that is not possible.
    #[must_use]
    pub fn at(socket: &Path) -> Self {
        let ready = UnixListener::bind(format!("{}_{READY_PORT}", socket.display())).expect("nobody else listens");
        Self { ready, socket: socket.to_owned() }
    }

    /// Waits for the agent to announce itself; the connection is to be kept.
    ///
    /// # Panics
    /// If it says something else.
    #[must_use]
    pub fn greeting(&self) -> AgentLink {
        let (stream, _) = self.ready.accept().expect("a connection");
        let mut link = AgentLink::new(stream.into()).expect("a socket");
        let said = link.exchange(seconds()).expect("a greeting");
        assert_eq!(said, FromAgent::Hello(Hello { version: VERSION }));
        link
    }

    /// A connection that has sent `request`, and the answer.
    ///
    /// # Panics
    /// If there is none.
    #[must_use]
    pub fn ask(&self, request: Request) -> (AgentLink, Reply) {
        let mut stream = UnixStream::connect(&self.socket).expect("the VMM listens");
        stream.write_all(format!("CONNECT {AGENT_PORT}\n").as_bytes()).expect("the VMM listens");
        let (mut line, mut byte) = (Vec::new(), [0]);
        while line.last() != Some(&b'\n') {
            stream.read_exact(&mut byte).expect("the VMM answers");
            line.extend(byte);
        }
        assert!(line.starts_with(b"OK "), "{}", String::from_utf8_lossy(&line));
        let mut link = AgentLink::new(stream.into()).expect("a socket");
        link.queue(&ToAgent::Request(request)).expect("it fits into a frame");
        match link.exchange(seconds()).expect("an answer") {
            FromAgent::Reply(reply) => (link, reply),
            other => panic!("{other:?}"),
        }
    }

    /// What root's shell in the VM prints when it runs `script`, or why the agent does not run it.
    ///
    /// # Errors
    /// The agent refused.
    ///
    /// # Panics
    /// If the agent breaks the protocol.
    pub fn shell(&self, script: &str) -> Result<String, String> {
        let run = Run {
            argv: ["sh", "-c", script].map(String::from).into(),
            env: [].into(),
            user: "root".into(),
            cwd: None,
            terminal: None,
            then_power_off: false,
        };
        let mut link = match self.ask(Request::Run(run)) {
            (link, Reply::Started { .. }) => link,
            (_, Reply::Failed { message }) => return Err(message),
            (_, other) => panic!("{other:?}"),
        };
        let mut text = Vec::new();
        loop {
            match link.exchange(seconds()).expect("the process goes on") {
                FromAgent::Stdout(bytes) | FromAgent::Stderr(bytes) => text.extend(bytes),
                FromAgent::Exit(_) => return Ok(String::from_utf8_lossy(&text).into_owned()),
                _ => {}
            }
        }
    }
}
