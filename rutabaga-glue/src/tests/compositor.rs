//! A compositor that is only its socket: tests decide what it sends and whether it reads.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};

pub struct Compositor {
    dir: tempfile::TempDir,
    listener: UnixListener,
}

impl Compositor {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("wayland-0")).unwrap();
        Self { dir, listener }
    }

    pub fn path(&self) -> PathBuf {
        self.dir.path().join("wayland-0")
    }

    /// The next client.
    pub fn accept(&self) -> UnixStream {
        let minute = rustix::time::Timespec { tv_sec: 60, tv_nsec: 0 };
        let mut wait = [PollFd::new(&self.listener, PollFlags::IN)];
        assert_eq!(rustix::event::poll(&mut wait, Some(&minute)).unwrap(), 1, "nobody connects");
        let client = self.listener.accept().unwrap().0;
        client.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        client
    }
}

/// Sends bytes and files in one message.
pub fn send(client: &UnixStream, data: &[u8], files: &[impl AsFd]) {
    let files: Vec<_> = files.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(files.is_empty() || control.push(SendAncillaryMessage::ScmRights(&files)));
    let sent = rustix::net::sendmsg(client, &[IoSlice::new(data)], &mut control, SendFlags::empty()).unwrap();
    assert_eq!(sent, data.len());
}

/// Receives exactly `len` bytes, and the files that come with them.
pub fn receive(client: &UnixStream, len: usize) -> (Vec<u8>, Vec<OwnedFd>) {
    let (mut data, mut files) = (vec![0; len], Vec::new());
    let mut done = 0;
    while done < len {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut part = [IoSliceMut::new(&mut data[done..])];
        let got = rustix::net::recvmsg(client, &mut part, &mut control, RecvFlags::CMSG_CLOEXEC).unwrap();
        assert!(got.bytes > 0, "the guest hung up");
        done += got.bytes;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                files.extend(fds);
            }
        }
    }
    (data, files)
}
