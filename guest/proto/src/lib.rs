//! The protocol between the launcher on the host and the agent in the guest.
//!
//! # Who connects to whom
//!
//! The transport is vsock. On the host it is the VMM's hybrid Unix socket.
//!
//! * When the guest is up, its agent connects **out** to the host (CID 2) on [`READY_PORT`] and sends one
//!   [`FromAgent::Hello`]. The launcher listens on `<vsock socket>_5001` before it starts the VM, so nobody polls. The
//!   connection stays open for as long as the agent lives and the VM is not restored from a snapshot.
//! * The launcher connects **in** on [`AGENT_PORT`], one connection for each request. A connection carries one
//!   [`Request`] and, for [`Request::Run`], the streams of that one process. Any number may be open at once.
//!
//! # Calls between apps
//!
//! A process in the guest that wants a service of another app connects out to the host on [`CALL_PORT`], and sends a [`Call`] as its
//! first [`FromCaller`] frame. The launcher answers like an agent would that was asked to run the service: [`Reply::Started`] or
//! [`Reply::Failed`], then the streams, with the same windows, then [`FromAgent::Exit`]. The process that serves the call dies
//! with the connection.
//!
//! # Waking
//!
//! A VM that was cloned is its twin's copy until it is told otherwise, so the agent starts nothing until it has carried out
//! [`Request::Wake`]. A restore breaks every vsock connection. The agent waits for the end of the one to [`READY_PORT`]: then
//! it refuses [`Request::Run`], and only after that says hello on a new one. So the launcher's order is the same after a boot, a
//! restore and a clone: wait for the greeting, wake, run. A launcher that does not wait may wake the agent before it has noticed
//! the end of the old connection, and must then wake it once more.
//!
//! Where nobody listens on [`READY_PORT`], the agent tries again whenever a connection comes in ([`Request::Ping`] will do). Until
//! somebody does it cannot notice a restore: a snapshot is to be taken while the connection is open.
//!
//! # Frames
//!
//! `u32` little-endian length, then that many bytes: one byte of [`kind`](FromAgent), then the payload. The length counts
//! the kind byte and is 1 to [`MAX_FRAME`]; anything else ends the connection. Requests and replies are JSON, streams are
//! raw bytes. An empty stream frame means end of file.
//!
//! # Back-pressure
//!
//! Neither side keeps unbounded data. Output: the agent reads a process's pipes only after its last frame has left.
//! Input: the launcher may send as many bytes as the agent has granted, [`STDIN_WINDOW`] at first and then what
//! [`FromAgent::StdinCredit`] adds; so signals overtake input that the process does not read. Sending more than was
//! granted ends the connection.
//!
//! Both sides treat the other as hostile: every decoder here is total.

mod frame;
mod identity;
mod link;
mod message;
pub mod network;
pub mod portal;

pub use frame::{Decoder, MAX_FRAME, MAX_PAYLOAD, Message, ProtoError};
pub use identity::{BootId, Hostname, Identity, IdentityError, MachineId, Seed};
pub use link::{Link, LinkError};
pub use message::{Call, ExitStatus, FromAgent, FromCaller, Hello, Reply, Request, Run, ToAgent, Window};

/// The vsock port the agent listens on in the guest.
pub const AGENT_PORT: u32 = 5000;

/// The vsock port of the host that the agent connects to once it accepts requests.
pub const READY_PORT: u32 = 5001;

/// The vsock port of the host that processes in the guest connect to in order to call another app.
pub const CALL_PORT: u32 = 5003;
/// The vsock port of the host to which the connections go that [`Request::Forward`] is about.
pub const FORWARD_PORT: u32 = 5002;

/// Version of this protocol; both sides must have the same.
pub const VERSION: u32 = 3;

/// Bytes of standard input that may be sent before the agent has granted more.
pub const STDIN_WINDOW: usize = 64 * 1024;

/// The largest piece of a stream that one frame carries, in bytes.
pub const CHUNK: usize = 32 * 1024;
