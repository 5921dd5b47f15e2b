//! The socket device between a mock guest and real Unix sockets.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use zerocopy::IntoBytes;
use zerocopy::byteorder::little_endian::{U16, U32, U64};

use super::Vsock;
use super::connection::{BUF_ALLOC, parse_line};
use super::guest::{CID, Guest, Sock};
use super::packet::{Header, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use super::table::{MAX_CONNECTIONS, MAX_HANDSHAKES};
use crate::testkit::Buffer;

fn vsock() -> Box<Vsock> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let name = format!("vsock-test-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    Box::new(Vsock::new(CID, &std::env::temp_dir().join(name), None, false).unwrap())
}

crate::conformance_tests!(super::vsock);

fn line(stream: &mut UnixStream) -> String {
    let mut line = Vec::new();
    let mut byte = [0];
    while line.last() != Some(&b'\n') {
        stream.read_exact(&mut byte).unwrap();
        line.push(byte[0]);
    }
    String::from_utf8(line).unwrap()
}

fn to_the_end(stream: &mut UnixStream) -> Vec<u8> {
    let mut all = Vec::new();
    stream.read_to_end(&mut all).unwrap();
    all
}

/// A host program connected to port `port` of the guest.
fn host_connection(guest: &mut Guest, port: u32) -> (UnixStream, Sock) {
    let mut client = UnixStream::connect(&guest.socket).unwrap();
    client.write_all(format!("CONNECT {port}\n").as_bytes()).unwrap();
    let (op, header, _) = guest.next();
    assert_eq!((op, header.dst_port.get()), (Op::Request, port));
    let mut sock = Sock::new(header.src_port.get(), port, 64 << 10);
    sock.learn(&header);
    guest.send(&mut sock, Op::Response, &[]);
    assert_eq!(line(&mut client), format!("OK {}\n", sock.host_port));
    (client, sock)
}

/// A connection the guest opened to a service of the host's.
fn guest_connection(guest: &mut Guest, port: u32) -> (UnixStream, Sock) {
    let listener = UnixListener::bind(guest.service(port)).unwrap();
    let sock = guest.connect(port, 1000 + port);
    (listener.accept().unwrap().0, sock)
}

#[test]
fn a_host_program_connects_to_the_guest() {
    let mut guest = Guest::ready();
    let mut client = UnixStream::connect(&guest.socket).unwrap();
    // Data right behind the line is the guest's, not the handshake's.
    client.write_all(b"CONN").unwrap();
    guest.silence();
    client.write_all(b"ECT 52\nhello").unwrap();
    let (op, header, _) = guest.next();
    assert_eq!((op, header.dst_port.get()), (Op::Request, 52));
    let mut sock = Sock::new(header.src_port.get(), 52, 65536);
    guest.silence();
    guest.send(&mut sock, Op::Response, &[]);
    assert_eq!(line(&mut client), format!("OK {}\n", sock.host_port));
    let (op, _, data) = guest.next();
    assert_eq!((op, data.as_slice()), (Op::Rw, b"hello".as_slice()));
    guest.send(&mut sock, Op::Rw, b"world");
    let mut back = [0; 5];
    client.read_exact(&mut back).unwrap();
    assert_eq!(&back, b"world");
}

#[test]
fn a_refusal_of_the_guest_ends_the_host_programs_connection() {
    let mut guest = Guest::ready();
    let mut client = UnixStream::connect(&guest.socket).unwrap();
    client.write_all(b"CONNECT 1\n").unwrap();
    let (_, header, _) = guest.next();
    guest.send(&mut Sock::new(header.src_port.get(), 1, 0), Op::Rst, &[]);
    assert_eq!(to_the_end(&mut client), b"");
    guest.silence();
}

#[test]
fn lines_that_are_no_connect_are_refused() {
    for (text, port) in [
        ("CONNECT 52\n", Some(52)),
        ("connect 4294967295\n", Some(u32::MAX)),
        ("CONNECT 4294967296\n", None),
        ("CONNECT +5\n", None),
        ("CONNECT -5\n", None),
        ("CONNECT \n", None),
        ("CONNECT 1 2\n", None),
        ("GET / HTTP/1.1\n", None),
        ("\n", None),
        ("CONNECT 5", None),
    ] {
        assert_eq!(parse_line(text.as_bytes()), port, "{text:?}");
    }
    let mut guest = Guest::ready();
    for text in [&b"CONNECT x\n"[..], &[b' '; 40], &[0xff, b'\n']] {
        let mut client = UnixStream::connect(&guest.socket).unwrap();
        client.write_all(text).unwrap();
        guest.silence();
        // A reset instead of the end where the device left something unread.
        assert!(!matches!(client.read(&mut [0; 8]), Ok(n) if n > 0), "{text:?}");
    }
}

#[test]
fn programs_that_say_nothing_do_not_keep_others_out() {
    let mut guest = Guest::ready();
    let mut silent: Vec<_> = (0..MAX_HANDSHAKES).map(|_| UnixStream::connect(&guest.socket).unwrap()).collect();
    guest.pump();
    guest.pump();
    let _connection = host_connection(&mut guest, 7);
    assert_eq!(to_the_end(&mut silent[0]), b"", "the oldest went");
    silent[1].set_nonblocking(true).unwrap();
    assert!(silent[1].read(&mut [0]).is_err(), "the second is still there");
}

#[test]
fn the_guest_connects_to_a_service() {
    let mut guest = Guest::ready();
    let (mut server, mut sock) = guest_connection(&mut guest, 80);
    guest.send(&mut sock, Op::Rw, b"ping");
    let mut buffer = [0; 4];
    server.read_exact(&mut buffer).unwrap();
    assert_eq!(&buffer, b"ping");
    server.write_all(b"pong").unwrap();
    assert_eq!(guest.next().2, b"pong");
}

#[test]
fn nobody_listening_is_a_reset() {
    let mut guest = Guest::ready();
    let mut sock = Sock::new(81, 5, 0);
    guest.send(&mut sock, Op::Request, &[]);
    let (op, header, _) = guest.next();
    assert_eq!((op, header.src_port.get(), header.dst_port.get()), (Op::Rst, 81, 5));
}

/// Sends `total` bytes through a service that returns them, keeping to the credit; buffers of the guest are small.
fn echo(total: usize, buf_alloc: u32) {
    let mut guest = Guest::ready();
    let listener = UnixListener::bind(guest.service(9)).unwrap();
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut buffer = vec![0; 100_000];
        loop {
            let n = stream.read(&mut buffer).unwrap();
            if n == 0 {
                return;
            }
            stream.write_all(&buffer[..n]).unwrap();
        }
    });
    let mut sock = guest.connect(9, 1);
    sock.buf_alloc = buf_alloc;
    guest.send(&mut sock, Op::CreditUpdate, &[]);
    let pattern = |at: usize| u8::try_from((at * 31 + at / 251) % 256).unwrap();
    let (mut out, mut back) = (0, 0);
    while back < total {
        let n = sock.credit().min(total - out).min(60_000);
        if n > 0 {
            let data: Vec<u8> = (out..out + n).map(pattern).collect();
            guest.send(&mut sock, Op::Rw, &data);
            out += n;
        }
        guest.pump();
        if guest.inbox.is_empty() && n == 0 {
            guest.wait();
        }
        while let Some((header, data)) = guest.inbox.pop_front() {
            sock.learn(&header);
            for byte in &data {
                assert_eq!(*byte, pattern(back));
                back += 1;
            }
            sock.fwd_cnt = sock.fwd_cnt.wrapping_add(u32::try_from(data.len()).unwrap());
            match Op::parse(header.op.get()).unwrap() {
                Op::Rw => assert!(data.len() <= buf_alloc as usize, "more than the guest has room for"),
                Op::CreditRequest => guest.send(&mut sock, Op::CreditUpdate, &[]),
                Op::CreditUpdate => {}
                other => panic!("{other:?}"),
            }
        }
    }
    guest.shut_down(&sock, SHUTDOWN_BOTH);
    server.join().unwrap();
}

#[test]
fn ten_megabytes_come_back_through_small_buffers() {
    echo(10 << 20, 5000);
}

#[test]
fn a_lot_comes_back_through_large_buffers() {
    echo(10 << 20, 1 << 20);
}

#[test]
fn half_closed_by_the_host() {
    let mut guest = Guest::ready();
    let (mut client, mut sock) = host_connection(&mut guest, 3);
    client.write_all(b"last").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.next().2, b"last");
    let (op, header, _) = guest.next();
    assert_eq!((op, header.flags.get()), (Op::Shutdown, SHUTDOWN_SEND));
    guest.send(&mut sock, Op::Rw, b"answer");
    let mut answer = [0; 6];
    client.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"answer");
    drop(client);
    let (op, header, _) = guest.next();
    assert_eq!((op, header.flags.get()), (Op::Shutdown, SHUTDOWN_BOTH));
    guest.send(&mut sock, Op::Rst, &[]);
    guest.silence();
}

#[test]
fn half_closed_by_the_guest() {
    let mut guest = Guest::ready();
    let (mut client, mut sock) = host_connection(&mut guest, 3);
    guest.send(&mut sock, Op::Rw, b"question");
    guest.shut_down(&sock, SHUTDOWN_SEND);
    assert_eq!(to_the_end(&mut client), b"question");
    client.write_all(b"answer").unwrap();
    assert_eq!(guest.next().2, b"answer");
    guest.shut_down(&sock, SHUTDOWN_BOTH);
    assert_eq!(guest.next().0, Op::Rst);
    assert!(client.write_all(b"too late").is_err());
}

#[test]
fn what_the_guest_sent_before_it_closed_reaches_a_slow_program() {
    let mut guest = Guest::ready();
    let (mut server, mut sock) = guest_connection(&mut guest, 4);
    let mut sent = 0;
    // Until the socket is full and the guest's credit as well.
    loop {
        while let Some((header, _)) = guest.inbox.pop_front() {
            sock.learn(&header);
        }
        let n = sock.credit().min(50_000);
        if n == 0 {
            break;
        }
        guest.send(&mut sock, Op::Rw, &vec![1; n]);
        sent += n;
        guest.pump();
    }
    assert!(sent > BUF_ALLOC as usize);
    guest.shut_down(&sock, SHUTDOWN_BOTH);
    assert_eq!(guest.next().0, Op::Rst, "at once: the guest waits for it");
    let reader = std::thread::spawn(move || to_the_end(&mut server).len());
    while !reader.is_finished() {
        guest.pump();
        std::thread::yield_now();
    }
    assert_eq!(reader.join().unwrap(), sent);
}

#[test]
fn a_program_that_goes_is_a_shutdown() {
    let mut guest = Guest::ready();
    let (mut server, mut sock) = guest_connection(&mut guest, 4);
    server.write_all(b"bye").unwrap();
    drop(server);
    assert_eq!(guest.next().2, b"bye");
    let (op, header, _) = guest.next();
    assert_eq!((op, header.flags.get()), (Op::Shutdown, SHUTDOWN_BOTH));
    // On its way meanwhile.
    guest.send(&mut sock, Op::Rw, b"anybody there?");
    guest.silence();
    guest.shut_down(&sock, SHUTDOWN_BOTH);
    assert_eq!(guest.next().0, Op::Rst);
}

#[test]
fn a_program_that_goes_before_the_guest_answers_is_a_reset() {
    let mut guest = Guest::ready();
    let mut client = UnixStream::connect(&guest.socket).unwrap();
    client.write_all(b"CONNECT 1\n").unwrap();
    assert_eq!(guest.next().0, Op::Request);
    drop(client);
    assert_eq!(guest.next().0, Op::Rst);
}

#[test]
fn more_than_the_credit_is_a_reset() {
    let mut guest = Guest::ready();
    let (mut server, mut sock) = guest_connection(&mut guest, 4);
    // Nobody reads: first the socket fills, then the device's buffer.
    let mut sent = 0;
    loop {
        guest.send(&mut sock, Op::Rw, &[7; 60_000]);
        guest.pump();
        if guest.inbox.iter().any(|(h, _)| h.op.get() == Op::Rst.raw()) {
            break;
        }
        sent += 60_000;
        assert!(sent < 100 << 20, "the device takes any amount");
    }
    let mut received = Vec::new();
    let _ = server.read_to_end(&mut received);
    assert!(received.len() <= sent);
    guest.inbox.clear();
    guest.send(&mut sock, Op::Rw, &[1]);
    assert_eq!(guest.next().0, Op::Rst, "the connection is gone");
}

#[test]
fn the_device_sends_no_more_than_the_guest_has_room_for() {
    let mut guest = Guest::ready();
    let (mut client, mut sock) = host_connection(&mut guest, 3);
    sock.buf_alloc = 10;
    guest.send(&mut sock, Op::CreditUpdate, &[]);
    client.write_all(&[5; 25]).unwrap();
    assert_eq!(guest.next().2.len(), 10);
    assert_eq!(guest.next().0, Op::CreditRequest);
    guest.silence();
    sock.fwd_cnt = 10;
    guest.send(&mut sock, Op::CreditUpdate, &[]);
    assert_eq!(guest.next().2.len(), 10);
    // A count that cannot be gives no credit.
    sock.fwd_cnt = 5_000_000;
    guest.inbox.clear();
    guest.send(&mut sock, Op::CreditUpdate, &[]);
    guest.silence();
}

#[test]
fn headers_that_make_no_sense_are_answered_or_dropped() {
    let mut guest = Guest::ready();
    let (mut server, mut sock) = guest_connection(&mut guest, 4);
    let other = Sock::new(99, 98, 0);
    let edit = |change: fn(&mut Header)| {
        let mut header = other.header(Op::Rw);
        change(&mut header);
        header
    };
    for (header, answered) in [
        (edit(|h| h.len = U32::new(1)), true),
        (edit(|h| h.len = U32::new(u32::MAX)), true),
        (edit(|h| h.op = U16::new(0)), true),
        (edit(|h| h.op = U16::new(77)), true),
        (edit(|h| h.op = U16::new(Op::Rst.raw())), false),
        (edit(|h| h.op = U16::new(Op::Response.raw())), true),
        (edit(|h| h.op = U16::new(Op::Shutdown.raw())), true),
        (edit(|h| h.kind = U16::new(2)), true),
        (edit(|h| (h.kind, h.op) = (U16::new(2), U16::new(Op::Request.raw()))), true),
        (edit(|h| h.src_cid = U64::new(7)), false),
        (edit(|h| (h.src_cid, h.len) = (U64::new(7), U32::new(9))), false),
    ] {
        guest.send_raw(&header, &[]);
        guest.pump();
        let answer = guest.inbox.pop_front().map(|(h, _)| (h.op.get(), h.kind));
        assert_eq!(answer, answered.then_some((Op::Rst.raw(), header.kind)), "{header:?}");
        guest.silence();
    }
    // Another destination is answered in its name, which is not the host's.
    guest.refill = false;
    let mut elsewhere = other.header(Op::Request);
    elsewhere.dst_cid = U64::new(5);
    let before = guest.driver.used_idx(0);
    guest.send_raw(&elsewhere, &[]);
    assert_eq!(guest.driver.used_idx(0), before.wrapping_add(1));
    let (head, _) = *guest.driver.used(0).last().unwrap();
    assert_eq!(&guest.driver.read(0, head, 0)[..8], U64::new(5).as_bytes());
    // None of it harmed the connection.
    guest.driver.offer(1, &[Buffer::readable(&[1; 20])]);
    guest.driver.offer(1, &[Buffer::writable(64)]);
    guest.send(&mut sock, Op::Rw, b"fine");
    let mut buffer = [0; 4];
    server.read_exact(&mut buffer).unwrap();
    assert_eq!(&buffer, b"fine");
}

#[test]
fn packets_out_of_place_reset_their_connection() {
    for op in [Op::Request, Op::Response] {
        let mut guest = Guest::ready();
        let (mut server, mut sock) = guest_connection(&mut guest, 4);
        guest.send(&mut sock, op, &[]);
        assert_eq!(guest.next().0, Op::Rst, "{op:?}");
        assert_eq!(to_the_end(&mut server), b"");
    }
    let mut guest = Guest::ready();
    let (_server, mut sock) = guest_connection(&mut guest, 4);
    guest.shut_down(&sock, SHUTDOWN_SEND);
    guest.send(&mut sock, Op::Rw, b"after all");
    assert_eq!(guest.next().0, Op::Rst);
    let (_server, sock) = guest_connection(&mut guest, 5);
    guest.shut_down(&sock, SHUTDOWN_RECEIVE);
    guest.silence();
    let mut wrong = sock.header(Op::Rw);
    wrong.len = U32::new(5);
    guest.send_raw(&wrong, b"4444");
    assert_eq!(guest.next().0, Op::Rst, "longer than its chain");
}

#[test]
fn a_program_that_does_not_read_holds_up_nobody() {
    let mut guest = Guest::ready();
    let (_slow, mut slow) = guest_connection(&mut guest, 4);
    let (mut quick, mut sock) = guest_connection(&mut guest, 5);
    while slow.credit() > 0 {
        let n = slow.credit().min(50_000);
        guest.send(&mut slow, Op::Rw, &vec![0; n]);
        guest.pump();
        while let Some((header, _)) = guest.inbox.pop_front() {
            slow.learn(&header);
        }
    }
    guest.send(&mut sock, Op::Rw, b"hello");
    let mut buffer = [0; 5];
    quick.read_exact(&mut buffer).unwrap();
    assert_eq!(&buffer, b"hello");
}

#[test]
fn a_flood_from_one_program_leaves_room_for_another() {
    let mut guest = Guest::ready();
    let (flood, mut a) = host_connection(&mut guest, 1);
    let (mut calm, _) = host_connection(&mut guest, 2);
    a.buf_alloc = 1 << 30;
    guest.send(&mut a, Op::CreditUpdate, &[]);
    flood.set_nonblocking(true).unwrap();
    while (&flood).write(&[1; 4096]).is_ok() {}
    calm.write_all(b"me too").unwrap();
    // One turn of the device, with 64 receive buffers.
    guest.driver.source(0).unwrap();
    guest.pump();
    let calm_at = guest.inbox.iter().position(|(_, data)| data == b"me too").unwrap();
    assert!(calm_at <= 16, "after {calm_at} packets of the other");
}

#[test]
fn one_connection_too_many_is_refused() {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum }).unwrap();
    let mut guest = Guest::ready();
    let listener = UnixListener::bind(guest.service(6)).unwrap();
    let mut servers = Vec::new();
    for port in 0..u32::try_from(MAX_CONNECTIONS).unwrap() {
        guest.connect(6, port);
        servers.push(listener.accept().unwrap().0);
    }
    let mut last = Sock::new(6, 5000, 0);
    guest.send(&mut last, Op::Request, &[]);
    assert_eq!(guest.next().0, Op::Rst);
    let mut client = UnixStream::connect(&guest.socket).unwrap();
    guest.silence();
    assert_eq!(to_the_end(&mut client), b"");
    // All of them work; and one that ends makes room.
    for server in &mut servers {
        server.write_all(b"x").unwrap();
    }
    guest.pump();
    assert_eq!(guest.inbox.iter().filter(|(_, data)| data == b"x").count(), MAX_CONNECTIONS);
    guest.inbox.clear();
    guest.send(&mut Sock::new(6, 17, 0), Op::Rst, &[]);
    guest.connect(6, 5000);
}

#[test]
fn without_receive_buffers_input_waits_and_output_does_not() {
    let mut guest = Guest::ready();
    let (mut client, mut sock) = host_connection(&mut guest, 3);
    guest.refill = false;
    // Uses up what the guest offered.
    let mut got = 0;
    while guest.driver.listens(0) {
        client.write_all(&[1; 100]).unwrap();
        guest.pump();
        got += guest.inbox.drain(..).count();
    }
    assert!(got > 30 && got <= 64, "{got}");
    client.write_all(b"more").unwrap();
    guest.send(&mut sock, Op::Rw, b"out");
    let mut out = [0; 3];
    client.read_exact(&mut out).unwrap();
    guest.send(&mut Sock::new(5, 5, 0), Op::Rw, &[]);
    guest.silence();
    guest.start_receiving();
    assert!(guest.driver.listens(0));
    assert_eq!(guest.next().0, Op::Rst);
    guest.pump();
    let rest: Vec<u8> = guest.inbox.drain(..).flat_map(|(_, data)| data).collect();
    assert!(rest.ends_with(b"more"));
}

#[test]
fn a_guest_that_never_receives_cannot_pile_up_replies() {
    let mut guest = Guest::new();
    let stray = Sock::new(5, 5, 0).header(Op::Rw);
    let mut answered = 0;
    for _ in 0..2000 {
        let before = guest.driver.used_idx(1);
        guest.send_raw(&stray, &[]);
        if guest.driver.used_idx(1) == before {
            break;
        }
        answered += 1;
    }
    assert_eq!(answered, 1024);
    guest.start_receiving();
    guest.pump();
    assert_eq!(guest.inbox.len(), 1025);
    assert_eq!(guest.driver.used_idx(1), 1025);
}

#[test]
fn a_pause_keeps_connections_and_a_reset_ends_them() {
    let mut guest = Guest::ready();
    let (mut client, _sock) = host_connection(&mut guest, 3);
    client.write_all(b"before").unwrap();
    guest.driver.pause_and_resume();
    assert_eq!(guest.next().2, b"before");
    guest.driver.device().reset();
    assert_eq!(to_the_end(&mut client), b"");
    // The listener is still there: the guest may come up again.
    let _connection = host_connection(&mut guest, 4);
}

#[test]
fn a_restored_guest_is_told_that_its_connections_are_gone() {
    let mut guest = Guest::with_state(true);
    guest.driver.run(2).unwrap();
    let small = guest.driver.offer(2, &[Buffer::writable(2)]);
    let head = guest.driver.offer(2, &[Buffer::writable(8)]);
    guest.driver.offer(2, &[Buffer::writable(8)]);
    guest.driver.run(2).unwrap();
    assert_eq!(guest.driver.used(2), [(small, 0), (head, 4)]);
    assert_eq!(guest.driver.read(2, head, 0)[..4], [0; 4]);
    assert_eq!(guest.driver.interrupts(2), 1);
}

#[test]
fn works_on_a_worker() {
    let Guest { driver, socket, _dir, .. } = Guest::new();
    let mut running = driver.start_worker();
    let first = running.offer(0, &[Buffer::writable(4096)]);
    let mut client = UnixStream::connect(&socket).unwrap();
    client.set_read_timeout(Some(std::time::Duration::from_secs(60))).unwrap();
    client.write_all(b"CONNECT 52\n").unwrap();
    running.wait_for_interrupts(0, 1);
    let request = running.driver().read(0, first, 0);
    let mut sock = Sock::new(u32::from_le_bytes(request[16..20].try_into().unwrap()), 52, 1 << 20);
    running.offer(1, &[Buffer::readable(sock.header(Op::Response).as_bytes())]);
    assert!(line(&mut client).starts_with("OK "));
    // No receive buffer for a while; each is used as it comes, however often the device ran dry.
    for round in 0..200u32 {
        client.write_all(&round.to_le_bytes()).unwrap();
        let head = running.offer(0, &[Buffer::writable(4096)]);
        running.wait_for_interrupts(0, round + 2);
        assert_eq!(running.driver().read(0, head, 0)[44..48], round.to_le_bytes());
    }
    sock.fwd_cnt = 800;
    let mut header = sock.header(Op::Rw);
    header.len = U32::new(3);
    running.offer(1, &[Buffer::readable(header.as_bytes()), Buffer::readable(b"end")]);
    let mut end = [0; 3];
    client.read_exact(&mut end).unwrap();
    assert!(!running.needs_reset());
    drop(running.stop());
}
