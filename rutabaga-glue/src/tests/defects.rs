//! What rutabaga 0.1.85 does wrong, one test each, played by a guest or a compositor against the whole device. Each
//! was seen to fail (hang, crash or grow) with its mitigation taken out.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::fs::MemfdFlags;
use virtio_devices::gpu::protocol::{cmd, resp};

use super::compositor::{Compositor, receive, send};
use super::guest::{Event, Guest, send_command};
use crate::validate;
use zerocopy::IntoBytes;

fn memfd(data: &[u8]) -> OwnedFd {
    let fd = rustix::fs::memfd_create("test", MemfdFlags::CLOEXEC).unwrap();
    rustix::io::pwrite(&fd, data, 0).unwrap();
    fd
}

/// A guest with one connected context, and the compositor's end of the connection.
fn connected() -> (Guest, Compositor, UnixStream) {
    let compositor = Compositor::new();
    let mut guest = Guest::new(&compositor.path());
    guest.context(1);
    let client = compositor.accept();
    (guest, compositor, client)
}

/// The device still works: a new context talks to the compositor both ways.
fn alive(guest: &mut Guest, compositor: &Compositor, id: u32) {
    guest.context(id);
    let client = compositor.accept();
    assert_eq!(guest.send(id, b"hello", &[]), resp::OK_NODATA);
    assert_eq!(receive(&client, 5).0, b"hello");
    send(&client, b"welcome", &[] as &[OwnedFd]);
    assert_eq!(guest.message(id), (b"welcome".to_vec(), vec![]));
}

#[test]
fn r1_a_command_of_no_size_does_not_spin() {
    let (mut guest, compositor, _client) = connected();
    let poll = validate::Header { cmd: 3, ..validate::Header::default() };
    assert_eq!(guest.submit(1, &[poll.as_bytes(), &[0; 8]].concat()), resp::ERR_INVALID_PARAMETER);
    alive(&mut guest, &compositor, 2);
}

#[test]
fn r2_a_ring_without_memory_does_not_panic() {
    let compositor = Compositor::new();
    let mut guest = Guest::new(&compositor.path());
    guest.bare_context(1);
    // No entries at all: the device refuses the blob (its own test). Too short for an event:
    let (short, _) = guest.guest_blob(1, 64);
    assert_eq!(guest.init(1, short, short), resp::ERR_INVALID_PARAMETER);
    assert_eq!(guest.init(1, 77, 78), resp::ERR_INVALID_PARAMETER, "only one attempt");
    guest.bare_context(2);
    assert_eq!(guest.init(2, 77, 78), resp::ERR_INVALID_RESOURCE_ID);
    guest.bare_context(3);
    assert_eq!(guest.init(3, short, short), resp::ERR_INVALID_RESOURCE_ID, "attached to another context");
    let image = validate::Header { cmd: 2, cmd_size: 24.into(), ..validate::Header::default() };
    let body = [image.as_bytes(), &[1, 0, 0, 0, 1, 0, 0, 0], b"XR24", &[0; 4]].concat();
    for context in 1..=3 {
        assert_eq!(guest.submit(context, &body), resp::ERR_INVALID_PARAMETER);
    }
    alive(&mut guest, &compositor, 4);
}

#[test]
fn r2_a_ring_that_is_taken_away_harms_nobody() {
    let (mut guest, compositor, client) = connected();
    let waits = guest.poll(1);
    // Linux does this before it destroys the context; a new resource may get the number at once.
    for ring in [1, 2] {
        assert_eq!(guest.resource(cmd::CTX_DETACH_RESOURCE, 1, ring), resp::OK_NODATA);
        assert_eq!(guest.resource(cmd::RESOURCE_UNREF, 0, ring), resp::OK_NODATA);
    }
    assert!(guest.image(1, 3, 3).is_some());
    send(&client, b"event", &[] as &[OwnedFd]);
    assert_eq!(guest.event(1, waits), Event::Message(b"event".to_vec(), vec![]));
    let waits = guest.poll(1);
    guest.destroy(1);
    guest.wait(waits);
    alive(&mut guest, &compositor, 2);
}

#[test]
fn r3_image_requirements_are_remembered_once_and_counted() {
    let (mut guest, compositor, _client) = connected();
    let image = |width: u32| {
        let header = validate::Header { cmd: 2, cmd_size: 24.into(), ..validate::Header::default() };
        let words = [width, 1, u32::from_le_bytes(*b"R8  "), 0].map(u32::to_le_bytes).concat();
        [header.as_bytes(), &words].concat()
    };
    let first = guest.image(1, 16, 16).unwrap();
    assert_eq!(guest.image(1, 16, 16).unwrap(), first, "the same again is the same blob");
    assert_eq!(first.0, 4096);
    let many: Vec<u8> = image(10).repeat(1000);
    for _ in 0..1000 {
        assert_eq!(guest.submit(1, &many), resp::OK_NODATA);
    }
    // rutabaga numbers what it keeps: a million requests for one image were one more than the first.
    assert_eq!(guest.image(1, 17, 17).unwrap().1, first.1 + 2);
    let different: Vec<u8> = (1..=4094).flat_map(image).collect();
    let mut refused = 0;
    for part in different.chunks(24 * 1000) {
        refused += u32::from(guest.submit(1, part) == resp::ERR_OUT_OF_MEMORY);
    }
    assert_eq!(refused, 0);
    assert_eq!(guest.submit(1, &image(5000)), resp::ERR_OUT_OF_MEMORY, "4096 different ones are enough");
    assert!(guest.image(1, 16, 16).is_some());
    alive(&mut guest, &compositor, 2);
}

/// A pipe from the guest to the host: its number for the guest, and the end the host reads.
fn host_pipe(guest: &mut Guest, client: &UnixStream) -> (u32, File) {
    let (read, write) = rustix::pipe::pipe().unwrap();
    send(client, b"send", &[write]);
    let (_, files) = guest.message(1);
    assert_eq!(files[0].1, validate::ID_WRITE_PIPE);
    (files[0].0, read.into())
}

#[test]
fn r4_a_pipe_nobody_reads_does_not_block_the_queue() {
    let (mut guest, compositor, client) = connected();
    let (pipe, mut reader) = host_pipe(&mut guest, &client);
    let block: Vec<u8> = (0..32768u32).map(|i| (i % 251) as u8).collect();
    for _ in 0..128 {
        assert_eq!(guest.write(1, pipe, &block, false), resp::OK_NODATA);
    }
    alive(&mut guest, &compositor, 2);
    // Nothing is lost for a reader that is slow, not dead.
    assert_eq!(guest.write(1, pipe, b"end", true), resp::OK_NODATA);
    let mut all = Vec::new();
    reader.read_to_end(&mut all).unwrap();
    assert_eq!(all.len(), 128 * 32768 + 3);
    assert!(all.chunks_exact(32768).all(|c| c == block) && all.ends_with(b"end"));
    assert_eq!(guest.write(1, pipe, b"x", false), resp::ERR_INVALID_PARAMETER, "closed");
}

#[test]
fn r4_what_is_kept_for_a_pipe_is_bounded() {
    let (mut guest, compositor, client) = connected();
    let (pipe, _reader) = host_pipe(&mut guest, &client);
    let block = vec![7; 60000];
    let written = (0..1000).take_while(|_| guest.write(1, pipe, &block, false) == resp::OK_NODATA).count();
    assert!((16 << 20..20 << 20).contains(&(written * 60000)), "{written} blocks");
    alive(&mut guest, &compositor, 2);
}

#[test]
fn r4_a_reader_that_goes_away_ends_the_transfer() {
    let (mut guest, compositor, client) = connected();
    let (pipe, reader) = host_pipe(&mut guest, &client);
    drop(reader);
    let ended = (0..10000).any(|_| guest.write(1, pipe, &[0; 4096], false) != resp::OK_NODATA);
    assert!(ended);
    alive(&mut guest, &compositor, 2);
}

#[test]
fn r5_a_compositor_that_does_not_read_does_not_block_the_queue() {
    let (mut guest, compositor, client) = connected();
    let waits = guest.poll(1);
    let data = vec![9; 32768];
    let command = send_command(&data, &[]);
    let sent = (0..1000).take_while(|_| guest.submit(1, &command) == resp::OK_NODATA).count();
    assert!((4 << 20..6 << 20).contains(&(sent * 32768)), "{sent} messages");
    // The guest is told: the connection is at its end, now and later.
    assert_eq!(guest.event(1, waits), Event::Message(vec![], vec![]));
    assert_eq!(guest.next(1), Event::Message(vec![], vec![]));
    drop(client);
    alive(&mut guest, &compositor, 2);
}

#[test]
fn r5_a_slow_compositor_gets_everything_in_order() {
    let (mut guest, _compositor, client) = connected();
    for i in 0..60u8 {
        assert_eq!(guest.send(1, &vec![i; 32768], &[]), resp::OK_NODATA);
    }
    for i in 0..60u8 {
        assert!(receive(&client, 32768).0.iter().all(|b| *b == i));
    }
}

#[test]
fn r6_files_of_unknown_kinds_do_not_end_the_context() {
    let (mut guest, compositor, client) = connected();
    let (read_end, _write_end) = rustix::pipe::pipe().unwrap();
    let (socket, _other) = UnixStream::pair().unwrap();
    let event = rustix::event::eventfd(0, rustix::event::EventfdFlags::empty()).unwrap();
    let sparse = memfd(b"x");
    rustix::fs::ftruncate(&sparse, 1 << 33).unwrap();
    let files: [OwnedFd; 6] = [
        read_end,
        socket.into(),
        event,
        File::open("/dev/null").unwrap().into(),
        File::open("/").unwrap().into(),
        sparse,
    ];
    for file in &files {
        send(&client, b"one", &[file]);
        let (data, ids) = guest.message(1);
        assert_eq!(data, b"one");
        assert_eq!(ids.len(), 1);
        assert_eq!((ids[0].1, ids[0].2), (validate::ID_BLOB, 4096), "a page of zeros in its place");
        let blob = guest.blob(1, u64::from(ids[0].0), 4096).unwrap();
        assert_eq!(guest.map(blob, 0), resp::OK_MAP_INFO);
        assert!(guest.read_window(0, 4096).iter().all(|b| *b == 0));
        assert_eq!(guest.resource(cmd::RESOURCE_UNREF, 0, blob), resp::OK_NODATA);
    }
    send(&client, b"still here", &[] as &[OwnedFd]);
    assert_eq!(guest.message(1).0, b"still here");
    alive(&mut guest, &compositor, 2);
}

#[test]
fn r7_more_than_28_files_come_in_parts_and_in_order() {
    let (mut guest, _compositor, client) = connected();
    let files: Vec<OwnedFd> = (0..60u8).map(|i| memfd(&[i; 16])).collect();
    send(&client, b"sixty files", &files);
    let (mut data, mut ids) = (Vec::new(), Vec::new());
    while data.len() < 11 {
        let (part, more) = guest.message(1);
        data.extend(part);
        ids.extend(more);
    }
    assert_eq!(data, b"sixty files");
    assert_eq!(ids.len(), 60);
    for (i, (id, _, size)) in ids.into_iter().enumerate() {
        assert_eq!(size, 16);
        let blob = guest.blob(1, u64::from(id), 4096).unwrap();
        assert_eq!(guest.map(blob, 0), resp::OK_MAP_INFO);
        assert_eq!(usize::from(guest.read_window(0, 1)[0]), i);
        guest.resource(cmd::RESOURCE_UNREF, 0, blob);
    }
}

#[test]
fn r8_a_blob_larger_than_its_file_is_refused() {
    let (mut guest, compositor, client) = connected();
    send(&client, b"two", &[memfd(&[5; 4096]), memfd(&[6; 4096])]);
    let (_, ids) = guest.message(1);
    assert_eq!(guest.blob(1, u64::from(ids[0].0), 1 << 20), None);
    assert_eq!(guest.blob(1, u64::from(ids[0].0), 4096), None, "used up");
    let blob = guest.blob(1, u64::from(ids[1].0), 4096).unwrap();
    assert_eq!(guest.map(blob, 8192), resp::OK_MAP_INFO);
    assert_eq!(guest.read_window(8192, 2), [6, 6]);
    alive(&mut guest, &compositor, 2);
}

#[test]
fn r8_a_file_that_shrinks_afterwards_is_not_mapped() {
    let (mut guest, compositor, client) = connected();
    let file = memfd(&[6; 8192]);
    send(&client, b"one", &[file.as_fd()]);
    let (_, ids) = guest.message(1);
    let blob = guest.blob(1, u64::from(ids[0].0), 8192).unwrap();
    rustix::fs::ftruncate(&file, 0).unwrap();
    assert_eq!(guest.map(blob, 0), resp::ERR_INVALID_PARAMETER);
    alive(&mut guest, &compositor, 2);
}

#[test]
fn r9_without_proc_there_is_a_clear_error() {
    let error = crate::check_proc("/nonexistent/self/fd/3").unwrap_err();
    assert!(error.contains("/proc") && error.contains("mount it"), "{error}");
    crate::check_process().unwrap();
}
