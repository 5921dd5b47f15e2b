//! The console on pipes, files and pseudo-terminals, with readers that read, stall and go away.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::OwnedFd;
use std::time::Instant;

use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{OptionalActions, Winsize, tcgetattr, tcsetattr, tcsetwinsize};

use super::*;
use crate::device::Device;
use crate::testkit::{Buffer, Driver};

const RX: u16 = 0;
const TX: u16 = 1;
/// Tokens of the sources when there is an output.
const TIMER: usize = 0;
const OUTPUT: usize = 1;

fn make(output: Option<OwnedFd>, input: Option<OwnedFd>) -> Box<dyn Device> {
    create("_console", Some(ConsoleEnds { output, input, terminal: false }), None).unwrap().device
}

/// A pipe whose buffer is one page.
fn pipe() -> (std::io::PipeReader, OwnedFd) {
    let (reader, writer) = std::io::pipe().unwrap();
    rustix::pipe::fcntl_setpipe_size(&writer, 4096).unwrap();
    (reader, writer.into())
}

/// A raw pseudo-terminal: its master, and the way to open the other side.
fn pty() -> (OwnedFd, impl Fn() -> File) {
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&master).unwrap();
    unlockpt(&master).unwrap();
    let path = ptsname(&master, Vec::new()).unwrap().into_string().unwrap();
    let mut raw = tcgetattr(&master).unwrap();
    raw.make_raw();
    tcsetattr(&master, OptionalActions::Now, &raw).unwrap();
    (master, move || File::options().read(true).write(true).open(&path).unwrap())
}

fn console() -> Box<dyn Device> {
    let (_, writer) = pipe();
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&[b'x'; 5000]).unwrap();
    file.rewind().unwrap();
    make(Some(writer), Some(file.into()))
}

fn bytes(n: usize) -> Vec<u8> {
    (0..n).map(|i| u8::try_from(i % 251).unwrap()).collect()
}

#[test]
fn output_reaches_a_file_in_order_and_whole() {
    let mut file = tempfile::tempfile().unwrap();
    let mut driver = Driver::new(make(Some(file.try_clone().unwrap().into()), None));
    let text = bytes(10_000);
    let head = driver.offer(TX, &[Buffer::readable(&text[..3000]), Buffer::readable(&text[3000..])]);
    driver.offer(TX, &[Buffer::readable(b"end")]);
    driver.run(TX).unwrap();
    assert_eq!(driver.used(TX).first(), Some(&(head, 0)));
    let mut written = Vec::new();
    file.rewind().unwrap();
    file.read_to_end(&mut written).unwrap();
    assert_eq!(written, [text.as_slice(), b"end"].concat());
}

#[test]
fn without_output_everything_is_taken() {
    let mut driver = Driver::new(create("_console", None, None).unwrap().device);
    driver.offer(TX, &[Buffer::readable(&[0; 100])]);
    driver.offer_raw(TX, 1 << 40, u32::MAX, false);
    driver.run(TX).unwrap();
    assert_eq!(driver.used(TX).len(), 2);
}

#[test]
fn a_full_pipe_holds_the_guest_and_loses_nothing() {
    let (mut reader, writer) = pipe();
    let mut driver = Driver::new(make(Some(writer), None));
    let text = bytes(6000);
    driver.offer(TX, &[Buffer::readable(&text)]);
    driver.run(TX).unwrap();
    assert_eq!(driver.used(TX), []);
    assert!(driver.listens(OUTPUT));
    // A pause in the middle finds nothing in flight, and no byte is sent twice.
    driver.pause_and_resume();
    driver.run(TX).unwrap();
    let mut got = vec![0; 4096];
    reader.read_exact(&mut got).unwrap();
    driver.source(OUTPUT).unwrap();
    assert_eq!(driver.used(TX).len(), 1);
    assert!(!driver.listens(OUTPUT));
    let mut rest = vec![0; 6000 - 4096];
    reader.read_exact(&mut rest).unwrap();
    assert_eq!([got, rest].concat(), text);
}

#[test]
fn what_was_sent_of_a_chain_survives_a_snapshot() {
    let (mut reader, writer) = pipe();
    let mut driver = Driver::new(make(Some(writer), None));
    driver.offer(TX, &[Buffer::readable(&bytes(6000))]);
    driver.run(TX).unwrap();
    driver.pause_and_resume();
    let saved = driver.device().save();
    assert_eq!(saved.read::<State>(KIND.name, STATE_VERSION).unwrap(), State { sent: 4096 });
    let (mut next, writer) = pipe();
    let ends = ConsoleEnds { output: Some(writer), input: None, terminal: false };
    let mut driver = Driver::new(create("_console", Some(ends), Some(&saved)).unwrap().device);
    driver.offer(TX, &[Buffer::readable(&bytes(6000))]);
    driver.run(TX).unwrap();
    let mut text = vec![0; 6000];
    reader.read_exact(&mut text[..4096]).unwrap();
    next.read_exact(&mut text[4096..]).unwrap();
    assert_eq!(text, bytes(6000));
}

#[test]
fn hostile_states_are_refused() {
    let saved = create("_console", None, None).unwrap().device.save();
    let restore = |saved: SavedState| create("_console", None, Some(&saved)).map(drop).map_err(|e| e.to_string());
    restore(saved.clone()).unwrap();
    assert!(restore(SavedState { version: 9, ..saved.clone() }).unwrap_err().contains("version 9"));
    assert!(restore(SavedState { kind: "x".into(), ..saved.clone() }).is_err());
    for body in [vec![], vec![1, 2], vec![0xff; 10], vec![0x80]] {
        assert!(restore(SavedState { body, ..saved.clone() }).unwrap_err().contains("damaged"));
    }
    // Any number is only ever compared with what the guest really has there.
    let saved = SavedState::new(KIND.name, STATE_VERSION, &State { sent: usize::MAX });
    let (_reader, writer) = pipe();
    let ends = ConsoleEnds { output: Some(writer), input: None, terminal: false };
    let mut driver = Driver::new(create("_console", Some(ends), Some(&saved)).unwrap().device);
    driver.offer(TX, &[Buffer::readable(b"x")]);
    driver.run(TX).unwrap();
    assert_eq!(driver.used(TX).len(), 1);
}

#[test]
fn a_reader_that_went_away_does_not_stop_the_guest() {
    let (reader, writer) = pipe();
    drop(reader);
    let mut driver = Driver::new(make(Some(writer), None));
    driver.offer(TX, &[Buffer::readable(&bytes(6000))]);
    driver.run(TX).unwrap();
    assert_eq!(driver.used(TX).len(), 1);
}

/// Within 50 ms.
fn becomes_writable(fd: &OwnedFd) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let wait = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };
    poll(&mut [PollFd::new(fd, PollFlags::OUT)], Some(&wait)).unwrap() == 1
}

#[test]
fn a_pseudo_terminal_without_reader_drops_output_until_someone_reads() {
    let (master, open) = pty();
    let mut other = open();
    let watch = master.try_clone().unwrap();
    let mut driver = Driver::new(make(Some(master.try_clone().unwrap()), Some(master)));
    let mut begun = Instant::now();
    // Fill it; the kernel moves what was written from one buffer to the next for a while.
    loop {
        if !driver.listens(OUTPUT) {
            begun = Instant::now();
            driver.offer(TX, &[Buffer::readable(&bytes(4096))]);
            driver.run(TX).unwrap();
        } else if becomes_writable(&watch) {
            begun = Instant::now();
            driver.source(OUTPUT).unwrap();
        } else {
            break;
        }
    }
    let taken = driver.used(TX).len();
    // The device gives up: on its thread, by its timer.
    let running = driver.start_worker();
    running.wait_for_interrupts(TX, u32::try_from(taken).unwrap() + 1);
    assert!(begun.elapsed() >= device::PATIENCE);
    let mut driver = running.stop();
    assert_eq!(driver.used(TX).len(), taken + 1);
    driver.offer(TX, &[Buffer::readable(b"lost")]);
    driver.run(TX).unwrap();
    assert_eq!(driver.used(TX).len(), taken + 2);
    // Someone reads; what comes then arrives, after what was in the buffer.
    let running = driver.start_worker();
    let reader = std::thread::spawn(move || {
        let mut text = Vec::new();
        let mut piece = [0; 4096];
        while !text.ends_with(b"seen") {
            let n = other.read(&mut piece).unwrap();
            text.extend_from_slice(&piece[..n]);
        }
        text
    });
    let mut running = running;
    while !reader.is_finished() {
        let before = running.driver().interrupts(TX);
        running.offer(TX, &[Buffer::readable(b"seen")]);
        running.wait_for_interrupts(TX, before + 1);
    }
    let text = reader.join().unwrap();
    assert!(!text.windows(4).any(|w| w == b"lost"));
    let _ = running.stop();
}

#[test]
fn a_pseudo_terminal_nobody_opened_drops_output_and_takes_input_later() {
    let (master, open) = pty();
    drop(open());
    let mut driver = Driver::new(make(Some(master.try_clone().unwrap()), Some(master)));
    driver.offer(TX, &[Buffer::readable(&bytes(4096))]);
    driver.run(TX).unwrap();
    assert_eq!(driver.used(TX).len(), 1);
    driver.offer(RX, &[Buffer::writable(64)]);
    driver.run(RX).unwrap();
    assert!(!driver.listens(2), "a closed terminal would be readable for ever");
    driver.source(TIMER).unwrap();
    assert!(!driver.listens(2), "the timer has not expired");
    let mut other = open();
    other.write_all(b"hello").unwrap();
    let running = driver.start_worker();
    running.wait_for_interrupt(RX);
    let driver = running.stop();
    let (head, len) = driver.used(RX)[0];
    assert_eq!(&driver.read(RX, head, 0)[..len as usize], b"hello");
}

#[test]
fn input_waits_for_buffers() {
    let (reader, mut writer) = std::io::pipe().unwrap();
    let mut driver = Driver::new(make(None, Some(reader.into())));
    let input = 1;
    assert!(!driver.listens(input), "there are no buffers");
    writer.write_all(&bytes(100)).unwrap();
    driver.source(input).unwrap();
    assert!(!driver.listens(input));
    let first = driver.offer(RX, &[Buffer::writable(10), Buffer::writable(20)]);
    driver.run(RX).unwrap();
    assert_eq!(driver.used(RX), [(first, 30)]);
    assert_eq!(driver.read(RX, first, 1), bytes(30)[10..]);
    assert!(!driver.listens(input));
    let second = driver.offer(RX, &[Buffer::writable(4096)]);
    let third = driver.offer(RX, &[Buffer::writable(4096)]);
    driver.run(RX).unwrap();
    assert_eq!(driver.used(RX)[1..], [(second, 70)]);
    assert!(driver.listens(input), "a buffer is left");
    writer.write_all(b"more").unwrap();
    driver.source(input).unwrap();
    assert_eq!(driver.used(RX)[2..], [(third, 4)]);
    drop(writer);
    driver.offer(RX, &[Buffer::writable(4096)]);
    driver.run(RX).unwrap();
    assert!(!driver.listens(input), "the input has ended");
    assert_eq!(driver.used(RX).len(), 3);
}

#[test]
fn a_worker_that_ran_out_of_buffers_is_woken_by_new_ones() {
    let (reader, mut writer) = std::io::pipe().unwrap();
    let mut driver = Driver::new(make(None, Some(reader.into())));
    driver.offer(RX, &[Buffer::writable(1)]);
    let mut running = driver.start_worker();
    for count in 1..200 {
        writer.write_all(b"x").unwrap();
        running.wait_for_interrupts(RX, count);
        running.offer(RX, &[Buffer::writable(1)]);
    }
    assert_eq!(running.stop().used(RX).len(), 64);
}

#[test]
fn hostile_chains_are_returned() {
    let (mut reader, writer) = pipe();
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(b"abc").unwrap();
    file.rewind().unwrap();
    let mut driver = Driver::new(make(Some(writer), Some(file.into())));
    driver.offer(TX, &[Buffer::writable(100)]);
    driver.offer_raw(TX, u64::MAX - 10, 100, false);
    driver.offer_parts(TX, &[(u64::MAX, u32::MAX, false), (u64::MAX, u32::MAX, false)]);
    driver.offer(TX, &[Buffer::readable(b"ok")]);
    driver.run(TX).unwrap();
    assert_eq!(driver.used(TX).len(), 4);
    let mut text = [0; 2];
    reader.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"ok");
    driver.offer(RX, &[Buffer::readable(&[0; 100])]);
    driver.offer_raw(RX, u64::MAX - 10, 100, true);
    driver.offer(RX, &[Buffer::writable(100)]);
    driver.run(RX).unwrap();
    let lens: Vec<u32> = driver.used(RX).into_iter().map(|(_, len)| len).collect();
    assert_eq!(lens, [0, 0], "the input went to the second, and has ended");
}

#[test]
fn the_size_of_a_terminal_is_told() {
    let (master, open) = pty();
    let terminal: OwnedFd = open().into();
    tcsetwinsize(&terminal, Winsize { ws_row: 50, ws_col: 132, ws_xpixel: 0, ws_ypixel: 0 }).unwrap();
    let ends = ConsoleEnds { output: Some(terminal.try_clone().unwrap()), input: Some(terminal), terminal: true };
    let device = create("_console", Some(ends), None).unwrap().device;
    assert_eq!(device.traits().config.bytes(), [132, 0, 50, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    drop(master);
}

#[test]
fn the_terminal_of_the_shell_goes_on_blocking() {
    let (_master, open) = pty();
    let terminal: OwnedFd = open().into();
    let (reader, writer) = pipe();
    let (shells_pipe, shells_terminal) = (writer.try_clone().unwrap(), terminal.try_clone().unwrap());
    let _device = make(Some(writer), Some(terminal));
    for fd in [&shells_pipe, &shells_terminal] {
        assert!(!rustix::fs::fcntl_getfl(fd).unwrap().contains(rustix::fs::OFlags::NONBLOCK));
    }
    drop(reader);
}

#[test]
fn the_mode_decides_whether_there_is_a_device() {
    let count = |mode| {
        let config = VmConfig { console: vmm_config::ConsoleConfig::of(mode), ..VmConfig::default() };
        requests(&config, &HostFacts::default()).len()
    };
    use ConsoleMode::{File, Null, Off, Pty, Tty};
    assert_eq!([Off, Null, Pty, Tty, File].map(count), [0, 1, 1, 1, 1]);
}

crate::conformance_tests!(super::console);
