//! A port of the VM's loopback that leads to the host: each connection goes on by vsock, and the launcher decides where it ends.

use std::{
    fs::File,
    io,
    net::{Ipv4Addr, Shutdown, TcpListener, TcpStream},
    os::fd::OwnedFd,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use crate::console::say;

/// More connections than this at once are closed unheard.
const CONNECTIONS: usize = 64;

/// Listens on `port`, and lets each connection go on through one of `connect`'s, for as long as the VM lives.
pub fn start(port: u16, connect: impl Fn() -> io::Result<OwnedFd> + Send + 'static) -> io::Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port))?;
    thread::Builder::new().name("forward".into()).spawn(move || serve(&listener, &connect))?;
    Ok(())
}

fn serve(listener: &TcpListener, connect: &impl Fn() -> io::Result<OwnedFd>) {
    let active = Arc::new(AtomicUsize::new(0));
    for stream in listener.incoming() {
        let Ok(stream) = stream else { continue };
        if active.fetch_add(1, Ordering::SeqCst) >= CONNECTIONS {
            active.fetch_sub(1, Ordering::SeqCst);
            continue;
        }
        let counter = active.clone();
        let started = connect().and_then(|host| {
            thread::Builder::new().name("forward".into()).spawn(move || {
                let _ = relay(stream, host);
                counter.fetch_sub(1, Ordering::SeqCst);
            })
        });
        if let Err(error) = started {
            active.fetch_sub(1, Ordering::SeqCst);
            say!("agent: a connection to the host was not made: {error}");
        }
    }
}

/// Copies in both directions until both have ended.
fn relay(stream: TcpStream, host: OwnedFd) -> io::Result<()> {
    let (mut from, mut to) = (stream.try_clone()?, File::from(host.try_clone()?));
    let forth = thread::Builder::new().name("forward".into()).spawn(move || {
        let _ = io::copy(&mut from, &mut to);
        let _ = rustix::net::shutdown(&to, rustix::net::Shutdown::Write);
    })?;
    let (mut from, mut to) = (File::from(host), stream);
    let _ = io::copy(&mut from, &mut to);
    let _ = to.shutdown(Shutdown::Write);
    let _ = forth.join();
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        os::unix::net::UnixStream,
        sync::mpsc,
    };

    use super::*;

    #[test]
    fn both_directions_and_both_ends() {
        let (sender, hosts) = mpsc::channel();
        let connect = move || {
            let (ours, theirs) = UnixStream::pair()?;
            sender.send(theirs).map_err(io::Error::other)?;
            Ok(ours.into())
        };
        // A port that was free a moment ago.
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        start(port, connect).unwrap();
        for _ in 0..2 {
            let mut application = TcpStream::connect(("127.0.0.1", port)).unwrap();
            let mut host = hosts.recv().unwrap();
            application.write_all(b"question").unwrap();
            application.shutdown(Shutdown::Write).unwrap();
            let mut text = String::new();
            host.read_to_string(&mut text).unwrap();
            assert_eq!(text, "question");
            host.write_all(b"answer").unwrap();
            drop(host);
            text.clear();
            application.read_to_string(&mut text).unwrap();
            assert_eq!(text, "answer");
        }
    }
}
