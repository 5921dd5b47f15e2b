//! The asking side: one connection, one blocking call per request.

use std::io::{self, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use thiserror::Error;
use vmm_config::{CloneConfig, VmConfig};

use crate::http::{MAX_FDS, MAX_HEAD};
use crate::request::{Action, Request};
use crate::response::{CloneInfo, PingInfo, Reply, VmInfo};

/// The longest answer that is accepted.
const MAX_ANSWER: usize = 16 << 20;
/// The most headers an answer may have.
const MAX_HEADERS: usize = 64;

/// Why a request has no answer, or a bad one.
#[derive(Debug, Error)]
pub enum ClientError {
    /// Nobody is there.
    #[error("cannot connect to the VMM at {}: {source}", .path.display())]
    Connect {
        /// Where.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The connection failed, or took longer than the time-out.
    #[error("the connection to the VMM failed: {0}")]
    Io(#[from] io::Error),
    /// The VMM hung up.
    #[error("the VMM closed the connection without an answer")]
    Closed,
    /// The request cannot be written as JSON.
    #[error("the request cannot be sent: {0}")]
    Request(#[source] serde_json::Error),
    /// More descriptors than one request may have.
    #[error("one request can take {MAX_FDS} file descriptors along, not {0}")]
    TooManyFds(usize),
    /// The answer makes no sense.
    #[error("the VMM's answer to {action} is not understood: {reason}")]
    Answer {
        /// The request.
        action: &'static str,
        /// What is wrong with the answer.
        reason: String,
    },
    /// The VMM refuses.
    #[error("{action} failed with status {status}: {}", .lines.join(": "))]
    Refused {
        /// The request.
        action: &'static str,
        /// The HTTP status.
        status: u16,
        /// The VMM's reasons, from the general to the particular.
        lines: Vec<String>,
    },
}

/// A connection to a VMM.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
}

impl Client {
    /// Connects to the socket `path`.
    ///
    /// # Errors
    /// Nobody listens there, or it may not be used.
    pub fn connect(path: &Path) -> Result<Self, ClientError> {
        let stream = UnixStream::connect(path).map_err(|source| ClientError::Connect { path: path.into(), source })?;
        Ok(Self { stream })
    }

    /// Takes over a connected stream.
    pub fn from_stream(stream: UnixStream) -> Self {
        Self { stream }
    }

    /// Limits how long each read and write may take; `None` waits for ever, as a new client does.
    ///
    /// # Errors
    /// The time is zero.
    pub fn set_timeout(&mut self, timeout: Option<Duration>) -> Result<(), ClientError> {
        self.stream.set_read_timeout(timeout)?;
        Ok(self.stream.set_write_timeout(timeout)?)
    }

    /// Sends a request and waits for the answer.
    ///
    /// # Errors
    /// See [`ClientError`]. After any but [`ClientError::Refused`] the connection is of no further use.
    pub fn send(&mut self, request: &Request) -> Result<Reply, ClientError> {
        self.send_with_fds(request, &[])
    }

    /// Sends a request with file descriptors alongside.
    ///
    /// # Errors
    /// As [`Client::send`]; also more descriptors than a request may have.
    pub fn send_with_fds(&mut self, request: &Request, fds: &[BorrowedFd<'_>]) -> Result<Reply, ClientError> {
        let action = request.action();
        let body = request.body().map_err(ClientError::Request)?;
        let mut message =
            format!("{} {} HTTP/1.1\r\nHost: localhost\r\n", action.method().name(), action.path()).into_bytes();
        if let Some(body) = &body {
            let headers = format!("Content-Type: application/json\r\nContent-Length: {}\r\n\r\n", body.len());
            message.extend_from_slice(headers.as_bytes());
            message.extend_from_slice(body);
        } else {
            message.extend_from_slice(b"\r\n");
        }
        self.write(&message, fds)?;
        let (status, body) = self.read_answer(action.name())?;
        reply(action, status, &body)
    }

    /// `vmm.ping`: who is there.
    ///
    /// # Errors
    /// As [`Client::send`].
    pub fn ping(&mut self) -> Result<PingInfo, ClientError> {
        match self.send(&Request::VmmPing)? {
            Reply::Ping(ping) => Ok(ping),
            _ => Err(unexpected(Action::VmmPing)),
        }
    }

    /// `vm.info`: the machine.
    ///
    /// # Errors
    /// As [`Client::send`].
    pub fn info(&mut self) -> Result<VmInfo, ClientError> {
        match self.send(&Request::VmInfo)? {
            Reply::Info(info) => Ok(*info),
            _ => Err(unexpected(Action::VmInfo)),
        }
    }

    /// `vm.create`: defines the machine.
    ///
    /// # Errors
    /// As [`Client::send`].
    pub fn create(&mut self, config: VmConfig) -> Result<(), ClientError> {
        self.send(&Request::VmCreate(Box::new(config))).map(drop)
    }

    /// `vm.clone`: a zygote makes another process. `fds` are what `config` says they are.
    ///
    /// # Errors
    /// As [`Client::send_with_fds`].
    pub fn clone_vm(&mut self, config: CloneConfig, fds: &[BorrowedFd<'_>]) -> Result<CloneInfo, ClientError> {
        match self.send_with_fds(&Request::VmClone(config), fds)? {
            Reply::Cloned(clone) => Ok(clone),
            _ => Err(unexpected(Action::VmClone)),
        }
    }

    fn write(&mut self, message: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), ClientError> {
        let mut rest = message;
        if !fds.is_empty() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if fds.len() > MAX_FDS || !control.push(SendAncillaryMessage::ScmRights(fds)) {
                return Err(ClientError::TooManyFds(fds.len()));
            }
            let sent = sendmsg(&self.stream, &[IoSlice::new(rest)], &mut control, SendFlags::NOSIGNAL);
            rest = rest.get(sent.map_err(io::Error::from)?..).unwrap_or_default();
        }
        match self.stream.write_all(rest) {
            // A server that refuses a request early says why before it hangs up.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            result => Ok(result?),
        }
    }

    /// The status and body of the next answer that is final.
    fn read_answer(&mut self, action: &'static str) -> Result<(u16, Vec<u8>), ClientError> {
        let bad = |reason: &str| ClientError::Answer { action, reason: reason.to_owned() };
        let mut buffer = Vec::new();
        loop {
            let Some((status, head, body)) = parse_answer(&buffer).map_err(|reason| bad(&reason))? else {
                if buffer.len() > MAX_HEAD {
                    return Err(bad("its headers are too long"));
                }
                self.read_some(&mut buffer)?;
                continue;
            };
            let end = head.saturating_add(body);
            if end > MAX_ANSWER {
                return Err(bad("it is too long"));
            }
            while buffer.len() < end {
                self.read_some(&mut buffer)?;
            }
            let rest = buffer.split_off(end);
            if (100..200).contains(&status) {
                buffer = rest;
                continue;
            }
            if !rest.is_empty() {
                return Err(bad("there is more than one"));
            }
            return Ok((status, buffer.split_off(head)));
        }
    }

    fn read_some(&mut self, buffer: &mut Vec<u8>) -> Result<(), ClientError> {
        let mut chunk = [0; 8192];
        loop {
            match self.stream.read(&mut chunk) {
                Ok(0) => return Err(ClientError::Closed),
                Ok(count) => {
                    buffer.extend_from_slice(chunk.get(..count).unwrap_or_default());
                    return Ok(());
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Status, length of the head, length of the body; `None` if the head is not whole yet.
fn parse_answer(bytes: &[u8]) -> Result<Option<(u16, usize, usize)>, String> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut response = httparse::Response::new(&mut headers);
    let head = match response.parse(bytes) {
        Ok(httparse::Status::Complete(head)) => head,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(error) => return Err(error.to_string()),
    };
    let status = response.code.ok_or("it has no status")?;
    let length = response.headers.iter().find(|header| header.name.eq_ignore_ascii_case("content-length"));
    let body = match length {
        None => 0,
        Some(header) => str::from_utf8(header.value)
            .ok()
            .and_then(|text| text.trim().parse().ok())
            .ok_or("its length is not a number")?,
    };
    Ok(Some((status, head, body)))
}

fn reply(action: Action, status: u16, body: &[u8]) -> Result<Reply, ClientError> {
    if !(200..300).contains(&status) {
        // Others than this VMM may answer with something else than a list of lines.
        let lines = serde_json::from_slice(body).unwrap_or_else(|_| vec![String::from_utf8_lossy(body).into_owned()]);
        return Err(ClientError::Refused { action: action.name(), status, lines });
    }
    let bad = |reason: String| ClientError::Answer { action: action.name(), reason };
    match action {
        Action::VmLiveSnapshot => {
            serde_json::from_slice(body).map(Reply::Forked).map_err(|error| bad(error.to_string()))
        }
        Action::VmClone => serde_json::from_slice(body).map(Reply::Cloned).map_err(|error| bad(error.to_string())),
        Action::VmmPing => serde_json::from_slice(body).map(Reply::Ping).map_err(|error| bad(error.to_string())),
        Action::VmInfo => {
            serde_json::from_slice(body).map(|info| Reply::Info(Box::new(info))).map_err(|error| bad(error.to_string()))
        }
        _ => Ok(Reply::Done),
    }
}

fn unexpected(action: Action) -> ClientError {
    ClientError::Answer { action: action.name(), reason: "it is of another kind".to_owned() }
}
