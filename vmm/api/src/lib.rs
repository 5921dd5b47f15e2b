//! Requests, HTTP codec with file descriptors, and the client of the VMM's socket.
