//! What can end one application's connection. Never more than that one: the other applications do not notice.

use std::io;

use super::wire::WireError;

/// Codes of `wl_display.error` (`wayland.xml`) and of `wl_shm.error`, as posted to the application.
pub mod code {
    /// `wl_display`: the object does not exist.
    pub const INVALID_OBJECT: u32 = 0;
    /// `wl_display`: no such request, or its arguments are malformed.
    pub const INVALID_METHOD: u32 = 1;
    /// `wl_display`: out of memory or of another bounded resource.
    pub const NO_MEMORY: u32 = 2;
    /// `wl_display`: the proxy or the host failed.
    pub const IMPLEMENTATION: u32 = 3;
    /// `wl_shm`: offset, size or stride do not fit the pool.
    pub const SHM_INVALID_STRIDE: u32 = 1;
    /// `wl_shm`: the pool's file cannot be read.
    pub const SHM_INVALID_FD: u32 = 2;
}

/// Why a connection ended before the application closed it.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The application did what the protocol forbids; it is told with `wl_display.error`.
    #[error("the application broke the Wayland protocol: {text} (object {object})")]
    Application {
        /// The object at fault, by the application's numbering.
        object: u32,
        /// A code of that object's interface.
        code: u32,
        /// What happened.
        text: String,
    },
    /// The host's side sent something that makes no sense.
    #[error("the host broke the protocol: {0}")]
    Host(String),
    /// A system call failed.
    #[error("{what}: {source}")]
    Io {
        /// What was attempted.
        what: &'static str,
        /// The failure.
        source: io::Error,
    },
}

impl SessionError {
    /// The application's fault, at `object`.
    pub fn application(object: u32, code: u32, text: impl Into<String>) -> Self {
        Self::Application { object, code, text: text.into() }
    }

    /// The host's fault.
    pub fn host(text: impl Into<String>) -> Self {
        Self::Host(text.into())
    }

    /// For `map_err` on system calls.
    pub fn io<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::Io { what, source: source.into() }
    }

    /// For `map_err` on a request that does not parse.
    pub fn request(object: u32) -> impl FnOnce(WireError) -> Self {
        move |error| Self::application(object, code::INVALID_METHOD, error.to_string())
    }

    /// For `map_err` on an event that does not parse.
    pub fn event(error: WireError) -> Self {
        Self::host(error.to_string())
    }
}
