//! What is answered, and with which status and body it travels.

use std::error::Error;

use serde::{Deserialize, Serialize};
use vmm_config::VmConfig;

use crate::http::Fault;
use crate::request::{Action, RequestError};

/// The answer to a request.
pub type Response = Result<Reply, Failure>;

/// A request was carried out.
#[derive(Clone, Debug, PartialEq)]
pub enum Reply {
    /// There is nothing more to say.
    Done,
    /// Answer to `vmm.ping`.
    Ping(PingInfo),
    /// Answer to `vm.info`.
    Info(Box<VmInfo>),
    /// Answer to `vm.clone`.
    Cloned(CloneInfo),
    /// Answer to `vm.live-snapshot`: it is being written.
    Forked(ForkInfo),
}

/// Which VMM this is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PingInfo {
    /// Version with what the build adds to it.
    pub build_version: String,
    /// Version.
    pub version: String,
    /// Process id.
    pub pid: i64,
    /// Optional parts that were built in.
    #[serde(default)]
    pub features: Vec<String>,
}

/// A clone, which is a process of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CloneInfo {
    /// Its process id.
    pub pid: i64,
}

/// A live snapshot that has begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForkInfo {
    /// For how many microseconds the machine stood still.
    pub paused_us: u64,
}

/// Where in its life a machine is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum VmState {
    /// Defined, not running: before the first boot and after a shutdown.
    Created,
    /// Running.
    Running,
    /// On its way down.
    Shutdown,
    /// Stopped where it was.
    Paused,
}

/// A machine, as `vm.info` describes it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VmInfo {
    /// Its definition, with what was filled in since (the path of a pseudo-terminal).
    pub config: VmConfig,
    /// Where in its life it is.
    pub state: VmState,
    /// Bytes of memory the guest has now.
    pub memory_actual_size: u64,
}

/// A request could not be carried out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    /// There is no machine yet. Status 404.
    NotCreated,
    /// There is a machine already.
    AlreadyCreated,
    /// The machine is not running.
    NotRunning,
    /// The machine is running already.
    AlreadyRunning,
    /// Anything else: sentences, from the general to the particular.
    Other(Vec<String>),
}

impl Failure {
    /// The failure an error explains, with all its causes.
    pub fn because(error: &dyn Error) -> Self {
        let causes = std::iter::successors(Some(error), |error| (*error).source());
        let mut lines: Vec<String> = Vec::new();
        for line in causes.map(ToString::to_string) {
            // Many messages quote their cause already.
            if !lines.iter().any(|earlier| earlier.contains(&line)) {
                lines.push(line);
            }
        }
        Self::Other(lines)
    }

    fn lines(&self) -> Vec<String> {
        let line = match self {
            Self::NotCreated => "VM is not created",
            Self::AlreadyCreated => "VM is already created",
            Self::NotRunning => "VM is not running",
            Self::AlreadyRunning => "VM is already running",
            Self::Other(lines) => return lines.clone(),
        };
        vec![line.to_owned()]
    }
}

/// A status and a body, ready to be sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encoded {
    /// HTTP status.
    pub status: u16,
    /// JSON, if there is any.
    pub body: Option<Vec<u8>>,
}

impl Encoded {
    fn json<T: Serialize>(status: u16, value: &T) -> Self {
        match serde_json::to_vec(value) {
            Ok(body) => Self { status, body: Some(body) },
            // Only a path that is not UTF-8 gets here.
            Err(error) => Self::lines(500, &[error.to_string()]),
        }
    }

    fn lines(status: u16, lines: &[String]) -> Self {
        Self { status, body: Some(serde_json::Value::from(lines).to_string().into_bytes()) }
    }
}

/// The HTTP form of the answer to a request of kind `action`.
pub fn encode(action: Action, response: &Response) -> Encoded {
    match response {
        // The one request whose success has another status than the rest: what existing clients were told.
        Ok(Reply::Done) if action == Action::VmmShutdown => Encoded { status: 200, body: None },
        Ok(Reply::Done) => Encoded { status: 204, body: None },
        Ok(Reply::Ping(ping)) => Encoded::json(200, ping),
        Ok(Reply::Info(info)) => Encoded::json(200, info),
        Ok(Reply::Cloned(clone)) => Encoded::json(200, clone),
        Ok(Reply::Forked(fork)) => Encoded::json(200, fork),
        Err(failure) => {
            let status = if *failure == Failure::NotCreated { 404 } else { 500 };
            let mut lines = vec!["Error from API".to_owned(), action.failed().to_owned()];
            lines.extend(failure.lines());
            Encoded::lines(status, &lines)
        }
    }
}

/// The HTTP form of the answer to what was no request.
pub fn encode_error(error: &RequestError) -> Encoded {
    let status = match error {
        RequestError::NotFound => 404,
        RequestError::Method | RequestError::NoBody | RequestError::Body(_) => 400,
        RequestError::NotSupported(_) => 501,
    };
    Encoded::lines(status, &[error.to_string()])
}

/// The HTTP form of the answer to what was not even HTTP.
pub(crate) fn encode_fault(fault: &Fault) -> Encoded {
    Encoded::lines(fault.status(), &[fault.to_string()])
}
