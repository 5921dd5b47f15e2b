//! The messages, one enum for each direction.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{
    frame::{Message, ProtoError},
    identity::Identity,
};

/// What the launcher asks of the agent, the first frame of a connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Answered with [`Reply::Pong`].
    Ping,
    /// Makes the VM another one than its twins. Comes before the first [`Request::Run`], and again each time the agent has
    /// said [`Hello`].
    Wake(Identity),
    /// Puts a folder in the place of an account's home, for good. What that was made with is copied into a folder that is empty.
    Home {
        /// Account in the guest's `/etc/passwd`.
        user: String,
        /// The folder.
        source: String,
    },
    /// Starts a process; this connection then carries its streams.
    Run(Run),
    /// Lets connections to this TCP port of the VM's loopback go on to [`crate::FORWARD_PORT`] of the host.
    Forward {
        /// The port.
        port: u16,
    },
    /// Stops every process and powers the VM off.
    PowerOff,
    /// Stops every process and resets the VM.
    Reboot,
}

/// A process to be started in the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Run {
    /// Program, looked up in the guest's `PATH` when it has no slash, and its arguments.
    pub argv: Vec<String>,
    /// Added to, or replacing, what the agent sets from the user's account.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Account in the guest's `/etc/passwd`.
    pub user: String,
    /// Working directory; the account's home without it.
    #[serde(default)]
    pub cwd: Option<String>,
    /// It gets a terminal of this size, which is all of its streams; without it, three pipes.
    #[serde(default)]
    pub terminal: Option<Window>,
    /// Power the VM off when the process has ended, even if the launcher is gone by then.
    #[serde(default)]
    pub then_power_off: bool,
}

/// The size of a terminal, in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Window {
    /// Lines.
    pub rows: u16,
    /// Characters of a line.
    pub columns: u16,
}

/// The agent's answer to a [`Request`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Reply {
    /// The agent is there and speaks this version.
    Pong {
        /// [`crate::VERSION`] of the agent.
        version: u32,
    },
    /// The process runs; its streams follow.
    Started {
        /// Its process id in the guest.
        pid: u32,
    },
    /// The request was accepted and nothing follows.
    Done,
    /// The request could not be carried out; nothing follows.
    Failed {
        /// One sentence for the user.
        message: String,
    },
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum ExitStatus {
    /// It returned this status.
    Code(u8),
    /// This signal ended it.
    Signal(u8),
}

/// The first and only frame on the connection to [`crate::READY_PORT`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hello {
    /// [`crate::VERSION`] of the agent.
    pub version: u32,
}

/// A service of another app, which the launcher and its policy are asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Call {
    /// The app that has it.
    pub app: String,
    /// One of the services that app offers.
    pub service: String,
}

/// From a process in the guest that calls another app to the launcher.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FromCaller {
    /// Kind 1.
    Call(Call),
    /// Kind 2: bytes for the service's standard input; none means end of file.
    Stdin(Vec<u8>),
}

/// From the launcher to the agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToAgent {
    /// Kind 1.
    Request(Request),
    /// Kind 2: bytes for standard input; none means end of file.
    Stdin(Vec<u8>),
    /// Kind 3: one byte, a signal number for the process's group.
    Signal(u8),
    /// Kind 4: the terminal's new size, rows and columns (`u16`, little-endian).
    Resize(Window),
}

/// From the agent to the launcher.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FromAgent {
    /// Kind 1.
    Hello(Hello),
    /// Kind 2.
    Reply(Reply),
    /// Kind 3: bytes of standard output; none means end of file.
    Stdout(Vec<u8>),
    /// Kind 4: bytes of standard error; none means end of file.
    Stderr(Vec<u8>),
    /// Kind 5: this many more bytes of standard input may be sent (`u32`, little-endian).
    StdinCredit(u32),
    /// Kind 6: the process has ended and no frame follows.
    Exit(ExitStatus),
}

fn json<T: Serialize>(kind: u8, value: &T) -> Result<(u8, Vec<u8>), ProtoError> {
    serde_json::to_vec(value)
        .map(|payload| (kind, payload))
        .map_err(|error| ProtoError::Payload { kind, reason: error.to_string() })
}

fn parse<T: DeserializeOwned>(kind: u8, payload: &[u8]) -> Result<T, ProtoError> {
    serde_json::from_slice(payload).map_err(|error| ProtoError::Payload { kind, reason: error.to_string() })
}

fn fixed<const N: usize>(kind: u8, payload: &[u8]) -> Result<[u8; N], ProtoError> {
    payload
        .try_into()
        .map_err(|_| ProtoError::Payload { kind, reason: format!("{} bytes instead of {N}", payload.len()) })
}

impl Message for ToAgent {
    fn to_parts(&self) -> Result<(u8, Vec<u8>), ProtoError> {
        match self {
            Self::Request(request) => json(1, request),
            Self::Stdin(bytes) => Ok((2, bytes.clone())),
            Self::Signal(number) => Ok((3, vec![*number])),
            Self::Resize(window) => Ok((4, [window.rows.to_le_bytes(), window.columns.to_le_bytes()].concat())),
        }
    }

    fn from_parts(kind: u8, payload: &[u8]) -> Result<Self, ProtoError> {
        match kind {
            1 => parse(kind, payload).map(Self::Request),
            2 => Ok(Self::Stdin(payload.to_vec())),
            3 => fixed(kind, payload).map(|[number]| Self::Signal(number)),
            4 => fixed(kind, payload).map(|[a, b, c, d]| {
                Self::Resize(Window { rows: u16::from_le_bytes([a, b]), columns: u16::from_le_bytes([c, d]) })
            }),
            _ => Err(ProtoError::Kind(kind)),
        }
    }
}

impl Message for FromCaller {
    fn to_parts(&self) -> Result<(u8, Vec<u8>), ProtoError> {
        match self {
            Self::Call(call) => json(1, call),
            Self::Stdin(bytes) => Ok((2, bytes.clone())),
        }
    }

    fn from_parts(kind: u8, payload: &[u8]) -> Result<Self, ProtoError> {
        match kind {
            1 => parse(kind, payload).map(Self::Call),
            2 => Ok(Self::Stdin(payload.to_vec())),
            _ => Err(ProtoError::Kind(kind)),
        }
    }
}

impl Message for FromAgent {
    fn to_parts(&self) -> Result<(u8, Vec<u8>), ProtoError> {
        match self {
            Self::Hello(hello) => json(1, hello),
            Self::Reply(reply) => json(2, reply),
            Self::Stdout(bytes) => Ok((3, bytes.clone())),
            Self::Stderr(bytes) => Ok((4, bytes.clone())),
            Self::StdinCredit(bytes) => Ok((5, bytes.to_le_bytes().to_vec())),
            Self::Exit(status) => json(6, status),
        }
    }

    fn from_parts(kind: u8, payload: &[u8]) -> Result<Self, ProtoError> {
        match kind {
            1 => parse(kind, payload).map(Self::Hello),
            2 => parse(kind, payload).map(Self::Reply),
            3 => Ok(Self::Stdout(payload.to_vec())),
            4 => Ok(Self::Stderr(payload.to_vec())),
            5 => fixed(kind, payload).map(|bytes| Self::StdinCredit(u32::from_le_bytes(bytes))),
            6 => parse(kind, payload).map(Self::Exit),
            _ => Err(ProtoError::Kind(kind)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{BootId, MachineId, Seed};

    fn round_trip<M: Message + PartialEq + std::fmt::Debug>(message: &M) {
        let (kind, payload) = message.to_parts().unwrap();
        assert_eq!(&M::from_parts(kind, &payload).unwrap(), message);
    }

    #[test]
    fn every_message_survives_the_wire() {
        let run = Run {
            argv: vec!["foot".into(), "-e".into(), "ä b".into()],
            env: BTreeMap::from([("A".into(), "1".into())]),
            user: "user".into(),
            cwd: Some("/".into()),
            terminal: Some(Window { rows: 24, columns: 80 }),
            then_power_off: true,
        };
        let identity = Identity {
            seed: Seed::new([7; Seed::LEN]),
            realtime: u64::MAX,
            machine_id: MachineId::from_random([1; 16]),
            boot_id: BootId::from_random([2; 16]),
            hostname: Some("foot".parse().unwrap()),
        };
        let home = Request::Home { user: "user".into(), source: "/host/.home".into() };
        let nameless = Identity { hostname: None, ..identity.clone() };
        let wake = [identity, nameless].map(Request::Wake);
        let forward = Request::Forward { port: 8080 };
        for request in [Request::Ping, home, Request::Run(run), forward, Request::PowerOff, Request::Reboot]
            .into_iter()
            .chain(wake)
        {
            round_trip(&ToAgent::Request(request));
        }
        round_trip(&ToAgent::Stdin(vec![]));
        round_trip(&ToAgent::Signal(9));
        round_trip(&ToAgent::Resize(Window { rows: 0x1234, columns: 0xfedc }));
        round_trip(&FromCaller::Call(Call { app: "vault".into(), service: "ssh-agent".into() }));
        round_trip(&FromCaller::Stdin(vec![0, 255]));
        let failed = Reply::Failed { message: "no".into() };
        for reply in [Reply::Pong { version: 1 }, Reply::Started { pid: 7 }, Reply::Done, failed] {
            round_trip(&FromAgent::Reply(reply));
        }
        round_trip(&FromAgent::Hello(Hello { version: 1 }));
        round_trip(&FromAgent::Stdout(vec![0, 255]));
        round_trip(&FromAgent::Stderr(vec![]));
        round_trip(&FromAgent::StdinCredit(0x1234_5678));
        round_trip(&FromAgent::Exit(ExitStatus::Code(255)));
        round_trip(&FromAgent::Exit(ExitStatus::Signal(15)));
    }

    #[test]
    fn wrong_payloads_are_refused() {
        assert!(ToAgent::from_parts(0, b"").is_err());
        assert!(ToAgent::from_parts(9, b"").is_err());
        assert!(ToAgent::from_parts(3, b"").is_err());
        assert!(ToAgent::from_parts(3, b"ab").is_err());
        assert!(ToAgent::from_parts(4, b"abc").is_err());
        assert!(ToAgent::from_parts(1, br#"{"run":{"argv":[],"user":"u","extra":1}}"#).is_err());
        assert!(FromCaller::from_parts(3, b"a").is_err());
        assert!(FromCaller::from_parts(1, br#"{"app":"a","service":"b","argv":["sh"]}"#).is_err());
        assert!(FromAgent::from_parts(5, b"abc").is_err());
        assert!(FromAgent::from_parts(6, br#"{"code":256}"#).is_err());
        assert!(ToAgent::from_parts(1, br#"{"wake":{"realtime":1}}"#).is_err());
        let deep = [b'['; 60_000];
        assert!(ToAgent::from_parts(1, &deep).is_err());
    }
}
