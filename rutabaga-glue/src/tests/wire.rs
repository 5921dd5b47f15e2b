//! The protocol between guest and engine, against a compositor that does what the test says.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::fs::MemfdFlags;
use virtio_devices::gpu::protocol::{cmd, resp};

use super::compositor::{Compositor, receive, send};
use super::guest::{Event, Guest};
use crate::validate::{ID_BLOB, ID_READ_PIPE};

const NO_FILES: &[OwnedFd] = &[];

#[test]
fn image_memory_of_the_guest_reaches_the_compositor() {
    let compositor = Compositor::new();
    let mut guest = Guest::new(&compositor.path());
    guest.context(1);
    let client = compositor.accept();
    let (size, id) = guest.image(1, 64, 64).unwrap();
    assert_eq!(size, 64 * 64 * 4);
    let blob = guest.blob(1, u64::from(id), size).unwrap();
    let other = guest.blob(1, u64::from(id), size).unwrap();
    assert_eq!(guest.map(blob, 1 << 20), resp::OK_MAP_INFO);
    guest.fill_window(1 << 20, 64 * 64, 0xff11_2233);
    assert_eq!(guest.send(1, b"create_pool", &[(blob, ID_BLOB), (other, ID_BLOB)]), resp::OK_NODATA);
    let (data, files) = receive(&client, 11);
    assert_eq!((data.as_slice(), files.len()), (&b"create_pool"[..], 2));
    let mut pixel = [0; 4];
    rustix::io::pread(&files[0], &mut pixel, 4092).unwrap();
    assert_eq!(pixel, [0x33, 0x22, 0x11, 0xff]);
    rustix::io::pread(&files[1], &mut pixel, 4092).unwrap();
    assert_eq!(pixel, [0; 4], "each blob has memory of its own");
    assert!(rustix::fs::ftruncate(&files[0], 0).is_err(), "the compositor cannot make it smaller");
}

#[test]
fn a_read_only_keymap_is_shown_and_the_guests_writes_stay_its_own() {
    let compositor = Compositor::new();
    let mut guest = Guest::new(&compositor.path());
    guest.context(1);
    let client = compositor.accept();
    let writable = rustix::fs::memfd_create("keymap", MemfdFlags::CLOEXEC).unwrap();
    rustix::io::pwrite(&writable, b"xkb_keymap {", 0).unwrap();
    rustix::fs::ftruncate(&writable, 5000).unwrap();
    let keymap = File::open(format!("/proc/self/fd/{}", writable.as_raw_fd())).unwrap();
    send(&client, b"keymap", &[keymap]);
    let (_, files) = guest.message(1);
    assert_eq!((files[0].1, files[0].2), (ID_BLOB, 5000));
    let blob = guest.blob(1, u64::from(files[0].0), 8192).unwrap();
    assert_eq!(guest.map(blob, 0), resp::OK_MAP_INFO);
    assert_eq!(guest.read_window(0, 12), b"xkb_keymap {");
    guest.fill_window(0, 1, 0x4142_4344);
    rustix::fs::ftruncate(&writable, 0).unwrap();
    assert_eq!(guest.read_window(0, 12), b"DCBAkeymap {", "safe from its owner too");
    assert_eq!(guest.resource(cmd::RESOURCE_UNMAP_BLOB, 0, blob), resp::OK_NODATA);
}

#[test]
fn the_guest_reads_the_clipboard_of_the_host() {
    let compositor = Compositor::new();
    let mut guest = Guest::new(&compositor.path());
    guest.context(1);
    let client = compositor.accept();
    for pipe in [0x8000_0001u32, 0x8000_0002] {
        assert_eq!(guest.send(1, b"receive", &[(pipe, ID_READ_PIPE)]), resp::OK_NODATA);
        let (_, mut files) = receive(&client, 7);
        let mut writer = File::from(files.remove(0));
        writer.write_all(b"secret of the host").unwrap();
        assert_eq!(guest.next(1), Event::Pipe(pipe, b"secret of the host".to_vec(), false));
        drop(writer);
        assert_eq!(guest.next(1), Event::Pipe(pipe, vec![], true));
    }
}

#[test]
fn wrong_guesses_of_a_pipes_number_leave_nothing_behind() {
    let compositor = Compositor::new();
    let mut guest = Guest::new(&compositor.path());
    guest.context(1);
    let client = compositor.accept();
    for guess in [0, 1, 0x8000_0000, 0x8000_0002, u32::MAX].repeat(50) {
        assert_eq!(guest.send(1, b"receive", &[(guess, ID_READ_PIPE)]), resp::ERR_INVALID_PARAMETER);
    }
    // rutabaga counts on with every pipe it makes, so it has made none.
    // 64 at a time.
    for i in 1..=64 {
        assert_eq!(guest.send(1, b"receive", &[(0x8000_0000 + i, ID_READ_PIPE)]), resp::OK_NODATA);
    }
    assert_eq!(guest.send(1, b"receive", &[(0x8000_0041, ID_READ_PIPE)]), resp::ERR_OUT_OF_MEMORY);
    let (_, files) = receive(&client, 64 * 7);
    drop(files);
    assert!(matches!(guest.next(1), Event::Pipe(_, _, true)));
    assert_eq!(guest.send(1, b"receive", &[(0x8000_0041, ID_READ_PIPE)]), resp::OK_NODATA);
}

#[test]
fn files_that_are_not_the_contexts_cannot_be_sent_or_made_blobs() {
    let compositor = Compositor::new();
    let mut guest = Guest::new(&compositor.path());
    guest.context(1);
    let _first = compositor.accept();
    guest.context(2);
    let second = compositor.accept();
    let (size, id) = guest.image(1, 8, 8).unwrap();
    let blob = guest.blob(1, u64::from(id), size).unwrap();
    assert_eq!(guest.send(2, b"x", &[(blob, ID_BLOB)]), resp::ERR_INVALID_RESOURCE_ID, "attached to the other");
    assert_eq!(guest.send(1, b"x", &[(1, ID_BLOB)]), resp::ERR_INVALID_RESOURCE_ID, "a ring is no file");
    assert_eq!(guest.blob(1, u64::from(id) + (1 << 32), size), None, "rutabaga would take the lower half");
    assert_eq!(guest.blob(1, 12345, 4096), None);
    let memory = rustix::fs::memfd_create("m", MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&memory, 4096).unwrap();
    send(&second, b"x", &[&memory; 9]);
    let (_, files) = guest.message(2);
    assert_eq!(guest.blob(1, u64::from(files[8].0), 4096), None, "of the other context");
    assert!(guest.blob(2, u64::from(files[8].0), 4096).is_some());
    assert_eq!(guest.write(2, files[0].0, b"x", false), resp::ERR_INVALID_PARAMETER, "no pipe");
}

#[test]
fn the_end_of_the_connection_is_an_empty_message() {
    let compositor = Compositor::new();
    let mut guest = Guest::new(&compositor.path());
    guest.context(1);
    let client = compositor.accept();
    let waits = guest.poll(1);
    assert_eq!(guest.send(1, b"unread", &[]), resp::OK_NODATA);
    send(&client, b"last words", NO_FILES);
    drop(client);
    assert_eq!(guest.event(1, waits), Event::Message(b"last words".to_vec(), vec![]));
    assert_eq!(guest.next(1), Event::Message(vec![], vec![]));
    assert_eq!(guest.next(1), Event::Message(vec![], vec![]));
    guest.destroy(1);
}

#[test]
fn without_a_compositor_a_context_is_at_its_end_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let mut guest = Guest::new(&dir.path().join("nobody"));
    guest.context(1);
    assert_eq!(guest.next(1), Event::Message(vec![], vec![]));
}

#[test]
fn events_of_two_contexts_do_not_mix_and_two_polls_get_two_events() {
    let compositor = Compositor::new();
    let mut guest = Guest::new(&compositor.path());
    guest.context(1);
    let first = compositor.accept();
    guest.context(2);
    let second = compositor.accept();
    let (a, b) = (guest.poll(1), guest.poll(2));
    send(&second, b"for two", NO_FILES);
    assert_eq!(guest.event(2, b), Event::Message(b"for two".to_vec(), vec![]));
    assert!(!guest.answered(a));
    let early = guest.poll(1);
    send(&first, b"for one", NO_FILES);
    assert_eq!(guest.event(1, a), Event::Message(b"for one".to_vec(), vec![]));
    assert!(!guest.answered(early), "one event, one answer");
    send(&first, b"again", NO_FILES);
    assert_eq!(guest.event(1, early), Event::Message(b"again".to_vec(), vec![]));
}

#[test]
fn nothing_is_lost_or_repeated_over_a_pause() {
    let compositor = Compositor::new();
    let mut guest = Guest::new(&compositor.path());
    guest.context(1);
    let client = compositor.accept();
    send(&client, b"before", NO_FILES);
    assert_eq!(guest.message(1).0, b"before");
    let waits = guest.poll(1);
    guest.pause_and_resume();
    assert_eq!(guest.event(1, waits), Event::Nothing, "the pause gave it back, with nothing in the ring");
    send(&client, b"after", NO_FILES);
    assert_eq!(guest.message(1).0, b"after");
    // What is sent while the machine is stopped reaches neither its memory nor the void.
    let waits = guest.poll(1);
    let driver = guest.running.take().unwrap().stop();
    send(&client, b"during", NO_FILES);
    guest.running = Some(driver.start_worker());
    assert_eq!(guest.event(1, waits), Event::Nothing);
    assert_eq!(guest.message(1).0, b"during");
}

#[test]
fn a_guest_that_hoards_files_gets_no_more() {
    let compositor = Compositor::new();
    let mut guest = Guest::new(&compositor.path());
    guest.context(1);
    let client = compositor.accept();
    let memory = rustix::fs::memfd_create("m", MemfdFlags::CLOEXEC).unwrap();
    let mut files = 0;
    loop {
        send(&client, b"x", &[&memory; 28]);
        let (data, more) = guest.message(1);
        if data.is_empty() {
            break;
        }
        files += more.len();
        assert!(files < 400);
    }
    assert!(files > 256, "{files}");
    assert_eq!(guest.next(1), Event::Message(vec![], vec![]));
    guest.destroy(1);
}

#[test]
fn a_hundred_clients_come_and_go() {
    let compositor = Compositor::new();
    let mut guest = Guest::new(&compositor.path());
    let mut clients = Vec::new();
    for id in 1..=100 {
        guest.context(id);
        clients.push(compositor.accept());
    }
    let waiting: Vec<u16> = (1..=100).map(|id| guest.poll(id)).collect();
    for (i, client) in clients.iter().enumerate() {
        send(client, &[u8::try_from(i).unwrap()], NO_FILES);
    }
    for (i, head) in waiting.into_iter().enumerate() {
        let id = u32::try_from(i).unwrap() + 1;
        assert_eq!(guest.event(id, head), Event::Message(vec![u8::try_from(i).unwrap()], vec![]));
    }
    for id in 1..=100 {
        guest.destroy(id);
    }
    for mut client in clients {
        assert_eq!(client.read(&mut [0; 1]).unwrap(), 0, "the compositor sees the client go");
    }
    guest.context(101);
}
