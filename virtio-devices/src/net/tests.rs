//! The interface on socket pairs: peers that talk, stall, lie and go away.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};

use super::*;
use crate::device::{Device, SavedState};
use crate::testkit::{self, Buffer, Driver};

const RX: u16 = 0;
const TX: u16 = 1;
const READABLE: usize = 0;
const WRITABLE: usize = 1;
const HEADER: usize = 12;
const MRG_RXBUF: u64 = 1 << 15;

fn net_with(config: &str, fd: Option<OwnedFd>, saved: Option<State>) -> Result<Box<dyn Device>, BuildError> {
    let net = vec![NetConfig::parse(config).unwrap()];
    let config = VmConfig { net, ..VmConfig::default() };
    let saved = saved.map(|state| SavedState::new(KIND.name, STATE_VERSION, &state));
    testkit::connected(&KIND, &config, fd, saved.as_ref())
}

/// A device and its other side.
fn connected(config: &str) -> (Box<dyn Device>, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    (net_with(config, Some(ours.into()), None).unwrap(), theirs)
}

fn frame(len: usize) -> Vec<u8> {
    (0..len).map(|i| u8::try_from(i % 251).unwrap()).collect()
}

fn send(peer: &mut UnixStream, frame: &[u8]) {
    peer.write_all(&u32::try_from(frame.len()).unwrap().to_be_bytes()).unwrap();
    peer.write_all(frame).unwrap();
}

fn receive(peer: &mut UnixStream) -> Vec<u8> {
    let mut len = [0; 4];
    peer.read_exact(&mut len).unwrap();
    let mut frame = vec![0; u32::from_be_bytes(len) as usize];
    peer.read_exact(&mut frame).unwrap();
    frame
}

fn offer_frame(driver: &mut Driver, frame: &[u8]) -> u16 {
    driver.offer(TX, &[Buffer::readable(&[0; HEADER]), Buffer::readable(frame)])
}

fn is_up(driver: &mut Driver) -> bool {
    driver.device().traits().config.bytes()[6] == 1
}

#[test]
fn the_configuration_is_told() {
    let (device, _peer) = connected("mac=02:00:00:00:00:07,mtu=9000");
    let traits = device.traits();
    assert_eq!(traits.config.bytes(), [2, 0, 0, 0, 0, 7, 1, 0, 1, 0, 0x28, 0x23]);
    assert_eq!(traits.features & (1 << 3 | 1 << 5), 1 << 3 | 1 << 5, "MTU and MAC");
    let (device, _peer) = connected("id=x");
    assert_eq!(device.traits().features & 1 << 3, 0, "no MTU");
    let mac = device.traits().config.bytes();
    assert_eq!(mac[0] & 3, 2, "a made-up address is local and one interface's: {mac:?}");
}

#[test]
fn frames_go_out_behind_their_length() {
    let (device, mut peer) = connected("id=x");
    let mut driver = Driver::new(device);
    // The header may be cut in any way.
    let sent = frame(1514);
    let whole = [&[0; HEADER], sent.as_slice()].concat();
    for cut in [1, HEADER, HEADER + 14] {
        driver.offer(TX, &[Buffer::readable(&whole[..cut]), Buffer::readable(&whole[cut..])]);
    }
    driver.run(TX).unwrap();
    for _ in 0..3 {
        assert_eq!(receive(&mut peer), sent);
    }
    assert_eq!(driver.used(TX).len(), 3);
}

#[test]
fn what_is_no_frame_is_lost() {
    let (device, mut peer) = connected("id=x");
    let mut driver = Driver::new(device);
    offer_frame(&mut driver, &frame(MIN_FRAME - 1));
    offer_frame(&mut driver, &frame(MAX_FRAME + 1));
    driver.offer(TX, &[Buffer::readable(&[0; 5])]);
    driver.offer_parts(TX, &[(u64::MAX - 5, 1000, false)]);
    driver.offer_parts(TX, &[(0, u32::MAX, false), (0, u32::MAX, false)]);
    driver.offer(TX, &[Buffer::writable(100)]);
    offer_frame(&mut driver, &frame(MAX_FRAME));
    driver.run(TX).unwrap();
    assert_eq!(driver.used(TX).len(), 7);
    assert_eq!(receive(&mut peer), frame(MAX_FRAME));
}

#[test]
fn frames_come_in_one_by_one_and_in_pieces() {
    let (device, mut peer) = connected("id=x");
    let mut driver = Driver::new(device);
    let head = driver.offer(RX, &[Buffer::writable(12), Buffer::writable(2000)]);
    driver.run(RX).unwrap();
    assert!(driver.listens(READABLE));
    let sent = [&100u32.to_be_bytes(), frame(100).as_slice()].concat();
    for (index, byte) in sent.iter().enumerate() {
        assert_eq!(driver.used(RX).len(), 0, "{index} bytes are no frame");
        peer.write_all(&[*byte]).unwrap();
        driver.source(READABLE).unwrap();
    }
    assert_eq!(driver.used(RX), [(head, 112)]);
    assert_eq!(driver.read(RX, head, 0), [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
    assert_eq!(driver.read(RX, head, 1)[..100], frame(100));
}

#[test]
fn a_long_frame_takes_several_buffers_where_that_was_agreed() {
    let (device, mut peer) = connected("id=x");
    let mut driver = Driver::new(device);
    let heads: Vec<u16> = (0..3).map(|_| driver.offer(RX, &[Buffer::writable(1000)])).collect();
    driver.run(RX).unwrap();
    send(&mut peer, &frame(2500));
    driver.source(READABLE).unwrap();
    assert_eq!(driver.used(RX), [(heads[0], 1000), (heads[1], 1000), (heads[2], 512)]);
    assert_eq!(driver.read(RX, heads[0], 0)[10..12], [3, 0]);
    let all = heads.iter().flat_map(|head| driver.read(RX, *head, 0)).collect::<Vec<_>>();
    assert_eq!(all[12..2512], frame(2500));

    // Where it was not, the frame is lost, and the buffer is still good for the next.
    let (device, mut peer) = connected("id=x");
    let features = device.traits().features & !MRG_RXBUF;
    let mut driver = Driver::with_features(device, features);
    let head = driver.offer(RX, &[Buffer::writable(1000)]);
    send(&mut peer, &frame(2500));
    send(&mut peer, &frame(60));
    driver.source(READABLE).unwrap();
    assert_eq!(driver.used(RX), [(head, 72)]);
}

#[test]
fn frames_wait_for_buffers_in_order() {
    let (device, mut peer) = connected("id=x");
    let mut driver = Driver::new(device);
    for len in [100, 2000, 300] {
        send(&mut peer, &frame(len));
    }
    driver.offer(RX, &[Buffer::writable(1000)]);
    driver.offer(RX, &[Buffer::writable(1000)]);
    driver.source(READABLE).unwrap();
    assert_eq!(driver.used(RX).iter().map(|(_, len)| *len).collect::<Vec<_>>(), [112]);
    assert!(!driver.listens(READABLE), "the second waits for two more buffers");
    driver.pause_and_resume();
    for _ in 0..3 {
        driver.offer(RX, &[Buffer::writable(1000)]);
    }
    driver.run(RX).unwrap();
    assert_eq!(driver.used(RX).iter().map(|(_, len)| *len).collect::<Vec<_>>(), [112, 1000, 1000, 12, 312]);
    assert!(driver.listens(READABLE));
}

#[test]
fn a_frame_that_no_ring_can_hold_is_lost() {
    let (device, mut peer) = connected("id=x");
    let mut driver = Driver::new(device);
    send(&mut peer, &frame(60_000));
    send(&mut peer, &frame(14));
    for _ in 0..256 {
        driver.offer(RX, &[Buffer::writable(50)]);
    }
    driver.run(RX).unwrap();
    assert_eq!(driver.used(RX).iter().map(|(_, len)| *len).collect::<Vec<_>>(), [26]);
}

#[test]
fn a_peer_that_does_not_read_holds_the_guest_and_no_frame_is_torn() {
    let (device, mut peer) = connected("id=x");
    let mut driver = Driver::new(device);
    let mut offered = 0;
    while !driver.listens(WRITABLE) || offered == 0 {
        for _ in 0..8 {
            offer_frame(&mut driver, &frame(9000));
        }
        offered += 8;
        driver.run(TX).unwrap();
    }
    let taken = driver.used_idx(TX);
    assert!(usize::from(taken) < offered, "{taken} of {offered}");
    driver.pause_and_resume();
    driver.run(TX).unwrap();
    assert_eq!(driver.used_idx(TX), taken, "nothing more is taken");
    // On its own thread it goes on when it can.
    let running = driver.start_worker();
    for _ in 0..offered {
        assert_eq!(receive(&mut peer), frame(9000));
    }
    let driver = running.stop();
    assert_eq!(usize::from(driver.used_idx(TX)), offered);
    assert!(!driver.listens(WRITABLE));
}

#[test]
fn a_peer_that_is_gone_takes_the_link_with_it() {
    let (device, peer) = connected("id=x");
    let mut driver = Driver::new(device);
    driver.offer(RX, &[Buffer::writable(2000)]);
    driver.run(RX).unwrap();
    assert!(is_up(&mut driver));
    drop(peer);
    driver.source(READABLE).unwrap();
    assert!(!is_up(&mut driver));
    assert_eq!(driver.config_interrupts(), 1);
    assert!(!driver.listens(READABLE), "it would be readable for ever");
    // The guest can still send, to nobody.
    offer_frame(&mut driver, &frame(100));
    driver.run(TX).unwrap();
    assert_eq!((driver.used(TX).len(), driver.config_interrupts()), (1, 1));

    let (device, peer) = connected("id=x");
    let mut driver = Driver::new(device);
    drop(peer);
    for _ in 0..3 {
        offer_frame(&mut driver, &frame(100));
    }
    driver.run(TX).unwrap();
    assert_eq!((driver.used(TX).len(), driver.config_interrupts(), is_up(&mut driver)), (3, 1, false));
}

#[test]
fn a_length_that_cannot_be_ends_the_connection() {
    let (device, mut peer) = connected("id=x");
    let mut driver = Driver::new(device);
    driver.offer(RX, &[Buffer::writable(2000)]);
    send(&mut peer, &frame(20));
    send(&mut peer, &[]);
    peer.write_all(&u32::MAX.to_be_bytes()).unwrap();
    driver.source(READABLE).unwrap();
    assert_eq!(driver.used(RX).len(), 1, "what came before is good, and what is no frame is none");
    assert!(!is_up(&mut driver));
    assert_eq!(peer.read(&mut [0]).unwrap(), 0, "the other side hears of it");
}

#[test]
fn a_worker_that_ran_out_of_buffers_is_woken_by_new_ones() {
    let (device, mut peer) = connected("id=x");
    let mut running = Driver::new(device).start_worker();
    for count in 1..200 {
        send(&mut peer, &frame(60));
        running.offer(RX, &[Buffer::writable(2000)]);
        running.wait_for_interrupts(RX, count);
    }
    assert!(!running.needs_reset());
}

/// An Ethernet frame with the beginning of an IPv4 packet.
fn packet_to(address: [u8; 4]) -> Vec<u8> {
    let mut frame = frame(60);
    frame[12..15].copy_from_slice(&[8, 0, 0x45]);
    frame[30..34].copy_from_slice(&address);
    frame
}

#[test]
fn destinations_that_are_denied_are_not_reached() {
    let (device, mut peer) = connected("deny=[127.0.0.0/8,192.0.2.1]");
    let mut driver = Driver::new(device);
    let mut arp = frame(42);
    arp[12..14].copy_from_slice(&[8, 6]);
    let with_type = |ethertype: [u8; 2]| {
        let mut frame = packet_to([8, 8, 8, 8]);
        frame[12..14].copy_from_slice(&ethertype);
        frame
    };
    let mut other_version = packet_to([8, 8, 8, 8]);
    other_version[14] = 0x65;
    let denied = [
        packet_to([127, 0, 0, 1]),
        packet_to([127, 255, 0, 1]),
        packet_to([192, 0, 2, 1]),
        packet_to([8, 8, 8, 8])[..33].to_vec(),
        other_version,
        // IPv6, and a VLAN's tag.
        with_type([0x86, 0xdd]),
        with_type([0x81, 0x00]),
    ];
    let allowed = [packet_to([192, 0, 2, 2]), packet_to([8, 8, 8, 8]), arp];
    for frame in denied.iter().chain(&allowed) {
        offer_frame(&mut driver, frame);
    }
    driver.run(TX).unwrap();
    assert_eq!(driver.used(TX).len(), denied.len() + allowed.len());
    for frame in &allowed {
        assert_eq!(&receive(&mut peer), frame);
    }
}

#[test]
fn a_restored_guest_keeps_its_address_and_hears_of_its_link() {
    let state = State { mac: [2, 0, 0, 0, 0, 9], up: true };
    let mut driver = Driver::new(net_with("mac=02:00:00:00:00:01", None, Some(state)).unwrap());
    assert_eq!(driver.config_interrupts(), 1);
    assert_eq!(driver.device().traits().config.bytes()[..8], [2, 0, 0, 0, 0, 9, 0, 0]);
    let saved: State = driver.device().save().read(KIND.name, STATE_VERSION).unwrap();
    assert_eq!(saved, State { up: false, ..state });
    driver.pause_and_resume();
    assert_eq!(driver.config_interrupts(), 1, "it is told once");

    // A clone of a machine without a peer is handed one.
    let (ours, mut peer) = UnixStream::pair().unwrap();
    let mut driver = Driver::new(net_with("id=x", Some(ours.into()), Some(saved)).unwrap());
    assert_eq!((driver.config_interrupts(), is_up(&mut driver)), (1, true));
    offer_frame(&mut driver, &frame(100));
    driver.run(TX).unwrap();
    assert_eq!(receive(&mut peer), frame(100));

    let hostile = State { mac: [1; 6], up: true };
    assert!(net_with("id=x", None, Some(hostile)).err().unwrap().to_string().contains("cannot be the address"));
}

#[test]
fn a_connection_is_handed_on_at_the_boundary_of_a_frame() {
    let (ours, mut peer) = UnixStream::pair().unwrap();
    let duplicate = ours.try_clone().unwrap();
    let mut driver = Driver::new(net_with("id=x", Some(ours.into()), None).unwrap());
    // A frame has come in part when the machine is started anew; the rest follows.
    let sent = [&100u32.to_be_bytes(), frame(100).as_slice()].concat();
    peer.write_all(&sent[..50]).unwrap();
    driver.offer(RX, &[Buffer::writable(2000)]);
    driver.source(READABLE).unwrap();
    peer.write_all(&sent[50..]).unwrap();
    send(&mut peer, &frame(60));
    drop(driver);
    let mut driver = Driver::new(net_with("id=x", Some(duplicate.try_clone().unwrap().into()), None).unwrap());
    let head = driver.offer(RX, &[Buffer::writable(2000)]);
    driver.source(READABLE).unwrap();
    assert_eq!(driver.used(RX), [(head, 72)], "the next is whole");
    // One that does not come to its end ends the connection.
    peer.write_all(&sent[..50]).unwrap();
    driver.source(READABLE).unwrap();
    drop(driver);
    assert_eq!(peer.read(&mut [0]).unwrap(), 0);
}

#[test]
fn sockets_are_connected_and_mistakes_told() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("passt");
    let listener = UnixListener::bind(&path).unwrap();
    let config = format!("socket={}", path.display());
    let mut driver = Driver::new(net_with(&config, None, None).unwrap());
    let (mut peer, _) = listener.accept().unwrap();
    offer_frame(&mut driver, &frame(100));
    driver.run(TX).unwrap();
    assert_eq!(receive(&mut peer), frame(100));
    drop((driver, listener));
    let mistake = |config: &str, fd| net_with(config, fd, None).err().unwrap().to_string();
    assert!(mistake(&config, None).contains("is passt running there?"));
    assert!(mistake("tap=no-such-tap/x", None).contains("_net0: cannot use the tap"));
    assert!(mistake("fd=7", None).contains("fd=7 was not handed down"));
    let file: OwnedFd = std::fs::File::open("/dev/null").unwrap().into();
    assert!(mistake("id=x", Some(file)).contains("it is no tap"));
    let (datagram, _other) = std::os::unix::net::UnixDatagram::pair().unwrap();
    assert!(mistake("id=x", Some(datagram.into())).contains("no connected Unix stream socket"));
}

fn fresh() -> Box<dyn Device> {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut theirs = theirs;
    for len in [60, 1514, 9000] {
        send(&mut theirs, &frame(len));
    }
    // Its end is seen after what it said.
    net_with("deny=127.0.0.0/8", Some(ours.into()), None).unwrap()
}

crate::conformance_tests!(super::fresh);
