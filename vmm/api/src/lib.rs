//! Requests to a virtual machine monitor: what can be asked, how it travels, who serves it and who asks.
//!
//! The protocol is that of Cloud Hypervisor's REST API, as far as its requests are supported: HTTP/1.1 on a Unix
//! socket, `PUT` or `GET` of `/api/v1/NAME`, JSON bodies, file descriptors alongside.
//!
//! * [`Request`] and [`Response`] are the typed ends. A program that runs machines sees these only.
//! * [`Server`] owns the listening socket and its connections. It never blocks and has no threads: it is one file
//!   descriptor to wait for and one method to call then.
//! * [`Client`] is the other side: one blocking call per request.

#![forbid(unsafe_code)]

mod client;
mod connection;
mod http;
mod listener;
mod request;
mod response;
mod server;

#[cfg(test)]
mod tests;

pub use client::{Client, ClientError};
pub use connection::Connection;
pub use http::{Fault, HttpRequest, MAX_BODY, MAX_FDS, MAX_HEAD};
pub use listener::ListenError;
pub use request::{Action, Method, Request, RequestError};
pub use response::{
    CloneInfo, Encoded, Failure, ForkInfo, PingInfo, Reply, Response, VmInfo, VmState, encode, encode_error,
};
pub use server::Server;
