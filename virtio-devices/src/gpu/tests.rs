//! The device in front of a renderer that only remembers, driven through real rings.

use std::collections::{BTreeSet, HashMap};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Mutex};

use rustix::fs::MemfdFlags;
use vm_memory::{Bytes, GuestAddress};
use zerocopy::IntoBytes;

use super::protocol::{
    BLOB_MEM_GUEST, BLOB_MEM_HOST3D, CapsetBody, CreateBlobBody, CreateContextBody, FLAG_FENCE, FLAG_INFO_RING_IDX,
    Header, MapBlobBody, MemEntry, ResourceBody, SubmitBody, cmd, resp,
};
use super::renderer::{
    Blob, BlobSource, Capset, Channel, Renderer, RendererArgs, RendererError, RendererFactory, Wake,
};
use super::{Fence, Gpu, Limits, Timeline, with_factory};
use crate::device::{Device, Memory, SavedState};
use crate::testkit::{Buffer, Driver};

const WINDOW: u64 = 1 << 20;
const CAPSET: u32 = 5;
/// A blob id that stands for a file of one page whatever size is asked for.
const SHORT_FILE: u64 = 99;

#[derive(Default)]
struct Shared {
    contexts: BTreeSet<u32>,
    blobs: HashMap<u32, (u64, bool)>,
    attached: BTreeSet<(u32, u32)>,
    pending: Vec<Fence>,
    reached: Vec<Fence>,
    submitted: Vec<(u32, Vec<u8>)>,
    withdrawn: usize,
    wake: Option<Wake>,
}

#[derive(Clone, Default)]
struct Fake(Arc<Mutex<Shared>>);

impl Fake {
    /// What the engine's thread does when the host sends something.
    fn reach(&self, context: u32, id: u64) {
        let timeline = Timeline::Ring { context, ring: 1 };
        let wake = {
            let mut s = self.0.lock().unwrap();
            s.reached.push(Fence { timeline, id });
            s.wake.clone()
        };
        wake.unwrap()();
    }
}

impl RendererFactory for Fake {
    fn create(&self, args: RendererArgs<'_>) -> Result<Box<dyn Renderer>, RendererError> {
        self.0.lock().unwrap().wake = Some(args.wake);
        Ok(Box::new(self.clone()))
    }
}

impl Renderer for Fake {
    fn capsets(&self) -> Vec<Capset> {
        vec![Capset { id: CAPSET, version: 0, data: vec![1, 2, 3, 4] }]
    }

    fn create_context(&mut self, context: u32, _: u32, _: &str) -> Result<(), RendererError> {
        assert!(self.0.lock().unwrap().contexts.insert(context));
        Ok(())
    }

    fn destroy_context(&mut self, context: u32) -> Result<(), RendererError> {
        let mut s = self.0.lock().unwrap();
        assert!(s.contexts.remove(&context));
        s.pending.retain(|f| !matches!(f.timeline, Timeline::Ring { context: c, .. } if c == context));
        Ok(())
    }

    fn create_blob(&mut self, blob: Blob<'_>) -> Result<(), RendererError> {
        let (size, host) = match blob.source {
            BlobSource::Guest(entries) => {
                assert!(!entries.is_empty());
                (blob.size, false)
            }
            BlobSource::Host { blob_id: SHORT_FILE, .. } => (4096, true),
            BlobSource::Host { .. } => (blob.size, true),
        };
        assert!(self.0.lock().unwrap().blobs.insert(blob.resource, (size, host)).is_none());
        Ok(())
    }

    fn unref(&mut self, resource: u32) -> Result<(), RendererError> {
        assert!(self.0.lock().unwrap().blobs.remove(&resource).is_some());
        Ok(())
    }

    fn attach(&mut self, context: u32, resource: u32) -> Result<(), RendererError> {
        let mut s = self.0.lock().unwrap();
        assert!(s.contexts.contains(&context) && s.blobs.contains_key(&resource));
        s.attached.insert((context, resource));
        Ok(())
    }

    fn detach(&mut self, context: u32, resource: u32) -> Result<(), RendererError> {
        self.0.lock().unwrap().attached.remove(&(context, resource));
        Ok(())
    }

    fn export(&mut self, resource: u32) -> Result<OwnedFd, RendererError> {
        let (size, host) = self.0.lock().unwrap().blobs[&resource];
        assert!(host);
        let file = rustix::fs::memfd_create("blob", MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, size).unwrap();
        Ok(file)
    }

    fn submit(&mut self, context: u32, commands: &[u8], _: &Memory) -> Result<(), RendererError> {
        self.0.lock().unwrap().submitted.push((context, commands.to_vec()));
        if commands == b"bad!" { Err(RendererError::Invalid("bad".into())) } else { Ok(()) }
    }

    fn fence(&mut self, fence: Fence) -> Result<(), RendererError> {
        let mut s = self.0.lock().unwrap();
        match fence.timeline {
            Timeline::Ring { ring: 1, .. } => s.pending.push(fence),
            Timeline::Ring { ring: 2.., .. } => return Err(RendererError::Invalid("no such ring".into())),
            // As engines do: reported before the call returns.
            _ => s.reached.push(fence),
        }
        Ok(())
    }

    fn completed(&mut self, _: &Memory, reached: &mut Vec<Fence>) {
        reached.append(&mut self.0.lock().unwrap().reached);
    }

    fn withdraw(&mut self, _: &Memory) {
        self.0.lock().unwrap().withdrawn += 1;
    }

    fn channels(&self) -> Vec<Channel> {
        let contexts = self.0.lock().unwrap().contexts.clone();
        contexts.into_iter().map(|context| Channel { context, ring: GuestAddress(0x80_0000) }).collect()
    }

    fn reset(&mut self) {
        let mut s = self.0.lock().unwrap();
        s.contexts.clear();
        s.blobs.clear();
        s.pending.clear();
        s.reached.clear();
    }
}

struct Guest {
    driver: Driver,
    fake: Fake,
}

fn header(kind: u32, context: u32) -> Header {
    Header { kind: kind.into(), ctx_id: context.into(), ..Header::default() }
}

fn poll(context: u32, fence: u64) -> Header {
    Header {
        flags: (FLAG_FENCE | FLAG_INFO_RING_IDX).into(),
        fence_id: fence.into(),
        ring_idx: 1,
        ..header(cmd::SUBMIT_3D, context)
    }
}

const LIMITS: Limits = Limits { contexts: 4, resources: 8, blob_bytes: 1 << 20 };

fn device(fake: &Fake) -> Gpu {
    with_factory(fake, Path::new("/nowhere"), WINDOW, LIMITS).unwrap()
}

fn gpu() -> Box<Gpu> {
    Box::new(device(&Fake::default()))
}

impl Guest {
    fn new() -> Self {
        let fake = Fake::default();
        let driver = Driver::new(Box::new(device(&fake)));
        Self { driver, fake }
    }

    /// Sends a request; its head.
    fn send(&mut self, header: Header, body: &[u8]) -> u16 {
        let head =
            self.driver.offer(0, &[Buffer::readable(header.as_bytes()), Buffer::readable(body), Buffer::writable(64)]);
        self.driver.run(0).unwrap();
        head
    }

    fn kind(&self, head: u16) -> u32 {
        let answer = self.driver.read(0, head, 2);
        u32::from_le_bytes(answer[..4].try_into().unwrap())
    }

    fn answered(&self, head: u16) -> bool {
        self.driver.used(0).iter().any(|(h, _)| *h == head)
    }

    fn ask(&mut self, header: Header, body: &[u8]) -> u32 {
        let head = self.send(header, body);
        assert!(self.answered(head));
        self.kind(head)
    }

    fn context(&mut self, id: u32) -> u32 {
        let body = CreateContextBody { nlen: 4.into(), context_init: CAPSET.into(), debug_name: [b'a'; 64] };
        self.ask(header(cmd::CTX_CREATE, id), body.as_bytes())
    }

    fn blob(&mut self, resource: u32, context: u32, size: u64, id: u64) -> u32 {
        let body = CreateBlobBody {
            resource_id: resource.into(),
            blob_mem: BLOB_MEM_HOST3D.into(),
            blob_flags: 1.into(),
            nr_entries: 0.into(),
            blob_id: id.into(),
            size: size.into(),
        };
        self.ask(header(cmd::RESOURCE_CREATE_BLOB, context), body.as_bytes())
    }

    fn guest_blob(&mut self, resource: u32, size: u64, count: u32, entries: &[(u64, u32)]) -> u32 {
        let body = CreateBlobBody {
            resource_id: resource.into(),
            blob_mem: BLOB_MEM_GUEST.into(),
            blob_flags: 1.into(),
            nr_entries: count.into(),
            blob_id: 0.into(),
            size: size.into(),
        };
        let mut bytes = body.as_bytes().to_vec();
        for &(addr, length) in entries {
            let entry = MemEntry { addr: addr.into(), length: length.into(), padding: 0.into() };
            bytes.extend_from_slice(entry.as_bytes());
        }
        self.ask(header(cmd::RESOURCE_CREATE_BLOB, 0), &bytes)
    }

    fn resource(&mut self, kind: u32, context: u32, resource: u32) -> u32 {
        let body = ResourceBody { resource_id: resource.into(), padding: 0.into() };
        self.ask(header(kind, context), body.as_bytes())
    }

    fn map(&mut self, resource: u32, offset: u64) -> u32 {
        let body = MapBlobBody { resource_id: resource.into(), padding: 0.into(), offset: offset.into() };
        self.ask(header(cmd::RESOURCE_MAP_BLOB, 0), body.as_bytes())
    }

    fn submit_body(commands: &[u8]) -> Vec<u8> {
        let size = u32::try_from(commands.len()).unwrap().into();
        let body = SubmitBody { size, num_in_fences: 0.into() };
        [body.as_bytes(), commands].concat()
    }
}

#[test]
fn says_what_it_is() {
    let traits = device(&Fake::default()).traits();
    assert_eq!(traits.device_type, 16);
    assert_eq!(traits.queue_sizes[0], 1024);
    assert_eq!(traits.features & 0xff, 0b11001);
    let mut config = [0; 16];
    traits.config.read(0, &mut config);
    assert_eq!(config, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0], "no scanout, one capability set");
    let mut guest = Guest::new();
    let body = |which: u32| CapsetBody { which: which.into(), version: 0.into() };
    let head = guest.send(header(cmd::GET_CAPSET_INFO, 0), body(0).as_bytes());
    assert_eq!(guest.kind(head), resp::OK_CAPSET_INFO);
    assert_eq!(guest.driver.read(0, head, 2)[24..36], [5, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0]);
    assert_eq!(guest.ask(header(cmd::GET_CAPSET_INFO, 0), body(1).as_bytes()), resp::ERR_INVALID_PARAMETER);
    let head = guest.send(header(cmd::GET_CAPSET, 0), body(CAPSET).as_bytes());
    assert_eq!(guest.kind(head), resp::OK_CAPSET);
    assert_eq!(guest.driver.read(0, head, 2)[24..28], [1, 2, 3, 4]);
    assert_eq!(guest.ask(header(cmd::GET_CAPSET, 0), body(1).as_bytes()), resp::ERR_INVALID_PARAMETER);
}

#[test]
fn unknown_and_short_requests_are_answered_with_an_error() {
    let mut guest = Guest::new();
    for kind in [0, 0x100, 0x104, 0x10d, 0x300, 0x301, 0x1100, u32::MAX] {
        assert_eq!(guest.ask(header(kind, 0), &[0; 100]), resp::ERR_UNSPEC, "{kind:#x}");
    }
    for kind in [0x102, 0x108, 0x109, 0x10c, 0x200, 0x202, 0x203, 0x207, 0x208, 0x209] {
        assert_eq!(guest.ask(header(kind, 1), &[0; 3]), resp::ERR_INVALID_PARAMETER, "{kind:#x}");
    }
    // No header, no room for an answer, addresses nowhere: returned with length 0.
    guest.driver.offer(0, &[Buffer::readable(&[1; 23]), Buffer::writable(64)]);
    guest.driver.offer(0, &[Buffer::readable(header(cmd::CTX_DESTROY, 1).as_bytes())]);
    guest.driver.offer_raw(0, u64::MAX - 4, 64, false);
    let before = guest.driver.used(0).len();
    guest.driver.run(0).unwrap();
    assert!(guest.driver.used(0)[before..].iter().all(|(_, len)| *len == 0));
    assert_eq!(guest.driver.used(0).len(), before + 3);
}

#[test]
fn a_request_longer_than_any_is_refused_without_reading_it_all() {
    let mut guest = Guest::new();
    let at = guest.driver.alloc(64);
    guest.driver.memory().write_slice(header(cmd::SUBMIT_3D, 1).as_bytes(), GuestAddress(at)).unwrap();
    let answer = guest.driver.alloc(64);
    guest.driver.offer_parts(0, &[(at, 24, false), (0, 48 << 20, false), (answer, 64, true)]);
    guest.driver.run(0).unwrap();
    let kind: u32 = guest.driver.memory().read_obj(GuestAddress(answer)).unwrap();
    assert_eq!(kind, resp::ERR_INVALID_PARAMETER);
}

#[test]
fn contexts_are_counted_and_their_numbers_checked() {
    let mut guest = Guest::new();
    assert_eq!(guest.context(0), resp::ERR_INVALID_CONTEXT_ID);
    for id in 1..=4 {
        assert_eq!(guest.context(id), resp::OK_NODATA);
    }
    assert_eq!(guest.context(4), resp::ERR_INVALID_CONTEXT_ID, "in use");
    assert_eq!(guest.context(5), resp::ERR_OUT_OF_MEMORY, "a flood of contexts");
    assert_eq!(guest.ask(header(cmd::CTX_DESTROY, 9), &[]), resp::ERR_INVALID_CONTEXT_ID);
    assert_eq!(guest.ask(header(cmd::CTX_DESTROY, 4), &[]), resp::OK_NODATA);
    assert_eq!(guest.context(5), resp::OK_NODATA);
    let other = CreateContextBody { nlen: u32::MAX.into(), context_init: 2.into(), debug_name: [0xff; 64] };
    assert_eq!(guest.ask(header(cmd::CTX_CREATE, 8), other.as_bytes()), resp::ERR_INVALID_PARAMETER, "virgl");
}

#[test]
fn guest_blobs_are_inside_guest_memory_and_as_large_as_they_say() {
    let mut guest = Guest::new();
    let page = guest.driver.alloc(8192);
    assert_eq!(guest.guest_blob(1, 4096, 1, &[(page, 4096)]), resp::OK_NODATA);
    assert_eq!(guest.guest_blob(1, 4096, 1, &[(page, 4096)]), resp::ERR_INVALID_RESOURCE_ID, "in use");
    assert_eq!(guest.guest_blob(0, 4096, 1, &[(page, 4096)]), resp::ERR_INVALID_RESOURCE_ID);
    for (size, count, entries) in [
        (4096, 0, vec![]),
        (4096, 1, vec![]),
        (8192, 1, vec![(page, 4096)]),
        (4096, 1, vec![(1 << 40, 4096)]),
        (4096, 1, vec![((64 << 20) - 100, 4096)]),
        (4096, 1, vec![(u64::MAX - 10, 4096)]),
        (4096, 2, vec![(page, 4096), (page, 0)]),
        (0, 1, vec![(page, 4096)]),
        (u64::MAX, 1, vec![(page, 4096)]),
        (4096, u32::MAX, vec![(page, 4096)]),
        (4096, 16385, vec![(page, 4096)]),
    ] {
        assert_eq!(guest.guest_blob(2, size, count, &entries), resp::ERR_INVALID_PARAMETER, "{size} {count}");
    }
    assert_eq!(guest.map(1, 0), resp::ERR_INVALID_RESOURCE_ID, "guest memory is not shown in the window");
}

#[test]
fn resources_and_bytes_of_host_memory_are_counted() {
    let mut guest = Guest::new();
    guest.context(1);
    assert_eq!(guest.blob(1, 2, 4096, 7), resp::ERR_INVALID_CONTEXT_ID);
    assert_eq!(guest.blob(1, 1, (1 << 20) + 1, 7), resp::ERR_OUT_OF_MEMORY);
    assert_eq!(guest.blob(1, 1, u64::MAX, 7), resp::ERR_OUT_OF_MEMORY);
    assert_eq!(guest.blob(1, 1, 1 << 19, 7), resp::OK_NODATA);
    assert_eq!(guest.blob(2, 1, 1 << 19, 7), resp::OK_NODATA);
    assert_eq!(guest.blob(3, 1, 1, 7), resp::ERR_OUT_OF_MEMORY);
    assert_eq!(guest.resource(cmd::RESOURCE_UNREF, 0, 2), resp::OK_NODATA);
    for id in 2..=8 {
        assert_eq!(guest.blob(id, 1, 4096, 7), resp::OK_NODATA);
    }
    assert_eq!(guest.blob(9, 1, 4096, 7), resp::ERR_OUT_OF_MEMORY, "a flood of resources");
    assert_eq!(guest.resource(cmd::RESOURCE_UNREF, 0, 77), resp::ERR_INVALID_RESOURCE_ID);
}

#[test]
fn a_blob_larger_than_its_file_is_refused() {
    let mut guest = Guest::new();
    guest.context(1);
    assert_eq!(guest.blob(1, 1, 1 << 20, SHORT_FILE), resp::ERR_INVALID_PARAMETER);
    assert!(guest.fake.0.lock().unwrap().blobs.is_empty(), "and does not stay");
    assert_eq!(guest.blob(1, 1, 4096, SHORT_FILE), resp::OK_NODATA);
}

#[test]
fn blobs_are_shown_inside_the_window_once_and_never_over_one_another() {
    let mut guest = Guest::new();
    guest.context(1);
    guest.blob(1, 1, 8192, 7);
    guest.blob(2, 1, 8192, 7);
    for offset in [1, WINDOW, WINDOW - 4096, u64::MAX - 4095, u64::MAX, 1 << 40] {
        assert_eq!(guest.map(1, offset), resp::ERR_INVALID_PARAMETER, "{offset:#x}");
    }
    assert_eq!(guest.map(1, 4096), resp::OK_MAP_INFO);
    assert_eq!(guest.map(1, 65536), resp::ERR_INVALID_PARAMETER, "shown already");
    assert_eq!(guest.map(2, 8192), resp::ERR_INVALID_PARAMETER, "over another");
    assert_eq!(guest.resource(cmd::RESOURCE_UNMAP_BLOB, 0, 2), resp::ERR_INVALID_PARAMETER, "not shown");
    assert_eq!(guest.resource(cmd::RESOURCE_UNMAP_BLOB, 0, 1), resp::OK_NODATA);
    assert_eq!(guest.map(2, 8192), resp::OK_MAP_INFO);
    assert_eq!(guest.resource(cmd::RESOURCE_UNREF, 0, 2), resp::OK_NODATA, "while it is shown");
    assert_eq!(guest.map(1, 8192), resp::OK_MAP_INFO);
}

#[test]
fn a_poll_waits_for_its_own_context_and_ring() {
    let mut guest = Guest::new();
    guest.context(1);
    guest.context(2);
    let body = Guest::submit_body(&[3]);
    let first = guest.send(poll(1, 10), &body);
    let second = guest.send(poll(2, 11), &body);
    assert!(!guest.answered(first) && !guest.answered(second));
    guest.fake.reach(2, 11);
    let before = guest.driver.interrupts(0);
    guest.driver.source(0).unwrap();
    assert!(!guest.answered(first) && guest.answered(second));
    assert_eq!(guest.driver.interrupts(0), before + 1);
    let answer = guest.driver.read(0, second, 2);
    assert_eq!(answer[..21], [0, 0x11, 0, 0, 3, 0, 0, 0, 11, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 1], "fence and ring");
    guest.fake.reach(1, 10);
    guest.driver.source(0).unwrap();
    assert!(guest.answered(first));
}

#[test]
fn a_fence_reported_at_once_is_answered_at_once() {
    let mut guest = Guest::new();
    guest.context(1);
    let body = Guest::submit_body(&[]);
    let global = Header { flags: FLAG_FENCE.into(), fence_id: 3.into(), ..header(cmd::SUBMIT_3D, 1) };
    assert_eq!(guest.ask(global, &body), resp::OK_NODATA);
    let query = Header { ring_idx: 0, ..poll(1, 4) };
    assert_eq!(guest.ask(query, &body), resp::OK_NODATA);
}

#[test]
fn fences_on_failed_requests_dead_contexts_and_unknown_rings_do_not_wait() {
    let mut guest = Guest::new();
    guest.context(1);
    assert_eq!(guest.ask(poll(1, 5), &Guest::submit_body(b"bad!")), resp::ERR_INVALID_PARAMETER);
    assert_eq!(guest.ask(poll(7, 6), &Guest::submit_body(&[])), resp::ERR_INVALID_CONTEXT_ID);
    assert_eq!(guest.ask(Header { ring_idx: 9, ..poll(1, 7) }, &Guest::submit_body(&[])), resp::ERR_INVALID_PARAMETER);
    let waits = guest.send(poll(1, 8), &Guest::submit_body(&[]));
    assert!(!guest.answered(waits));
    // Its own fence is on a ring of the context it destroys.
    let last = Header { kind: cmd::CTX_DESTROY.into(), ..poll(1, 9) };
    assert_eq!(guest.ask(last, &[]), resp::ERR_INVALID_CONTEXT_ID);
    assert!(guest.answered(waits), "what waits for a context goes with it");
    guest.fake.reach(1, 8);
    guest.driver.source(0).unwrap();
    assert_eq!(guest.context(1), resp::OK_NODATA);
}

#[test]
fn attaching_needs_both_sides() {
    let mut guest = Guest::new();
    guest.context(1);
    guest.blob(1, 1, 4096, 7);
    assert_eq!(guest.resource(cmd::CTX_ATTACH_RESOURCE, 1, 2), resp::ERR_INVALID_RESOURCE_ID);
    assert_eq!(guest.resource(cmd::CTX_ATTACH_RESOURCE, 2, 1), resp::ERR_INVALID_CONTEXT_ID);
    assert_eq!(guest.resource(cmd::CTX_ATTACH_RESOURCE, 1, 1), resp::OK_NODATA);
    assert_eq!(guest.resource(cmd::CTX_DETACH_RESOURCE, 1, 1), resp::OK_NODATA);
    assert_eq!(guest.resource(cmd::CTX_DETACH_RESOURCE, 2, 1), resp::ERR_INVALID_CONTEXT_ID);
}

#[test]
fn a_pause_gives_everything_back_and_keeps_contexts() {
    let mut guest = Guest::new();
    guest.context(1);
    guest.blob(1, 1, 4096, 7);
    guest.map(1, 0);
    let waits = guest.send(poll(1, 8), &Guest::submit_body(&[]));
    guest.driver.pause_and_resume();
    assert!(guest.answered(waits));
    assert_eq!(guest.fake.0.lock().unwrap().withdrawn, 1);
    assert_eq!(guest.fake.0.lock().unwrap().contexts.len(), 1);
    guest.fake.reach(1, 8);
    guest.driver.source(0).unwrap();
    let again = guest.send(poll(1, 9), &Guest::submit_body(&[]));
    assert!(!guest.answered(again));
    assert_eq!(guest.map(1, 65536), resp::ERR_INVALID_PARAMETER, "shown as before");
}

#[test]
fn a_reset_forgets_everything() {
    let mut guest = Guest::new();
    guest.context(1);
    guest.blob(1, 1, 1 << 20, 7);
    guest.map(1, 0);
    guest.driver.pause_and_resume();
    guest.driver.device().reset();
    assert_eq!(
        guest.driver.device().save(),
        SavedState::new(super::KIND.name, 1, &(vec![(0u32, 0u64); 0], vec![(0u64, 0u64); 0]))
    );
    assert_eq!(guest.context(1), resp::OK_NODATA);
    assert_eq!(guest.blob(1, 1, 1 << 20, 7), resp::OK_NODATA, "nothing is counted any more");
    assert_eq!(guest.map(1, 0), resp::OK_MAP_INFO);
}

#[test]
fn after_a_restore_lost_contexts_hear_that_their_channel_is_at_its_end() {
    let mut guest = Guest::new();
    guest.context(3);
    guest.blob(1, 3, 8192, 7);
    guest.map(1, 4096);
    guest.driver.pause_and_resume();
    let saved = guest.driver.device().save();
    assert_eq!(saved.version, 1);

    let fake = Fake::default();
    let mut restored = device(&fake);
    restored.restore(&saved).unwrap();
    assert_eq!(restored.save(), saved, "and can be saved again");
    let mut guest = Guest { driver: Driver::new(Box::new(restored)), fake };
    guest.driver.memory().write_slice(&[0xee; 400], GuestAddress(0x80_0000)).unwrap();
    // Not fenced: an error. Waiting for the host: the end.
    assert_eq!(guest.ask(header(cmd::SUBMIT_3D, 3), &Guest::submit_body(&[])), resp::ERR_INVALID_CONTEXT_ID);
    assert_eq!(guest.ask(poll(3, 5), &Guest::submit_body(&[])), resp::OK_NODATA);
    let mut event = [0; 400];
    guest.driver.memory().read_slice(&mut event, GuestAddress(0x80_0000)).unwrap();
    assert_eq!(event[0], 5);
    assert!(event[1..352].iter().all(|b| *b == 0) && event[352..].iter().all(|b| *b == 0xee));
    assert_eq!(guest.ask(header(cmd::CTX_DESTROY, 3), &[]), resp::OK_NODATA);
    assert_eq!(guest.ask(poll(3, 6), &Guest::submit_body(&[])), resp::ERR_INVALID_CONTEXT_ID);
    assert_eq!(guest.context(3), resp::OK_NODATA);
}

#[test]
fn a_damaged_snapshot_is_refused() {
    let saved = device(&Fake::default()).save();
    let refuse = |change: &dyn Fn(&mut SavedState)| {
        let mut saved = saved.clone();
        change(&mut saved);
        assert!(device(&Fake::default()).restore(&saved).is_err());
    };
    refuse(&|s| s.version = 2);
    refuse(&|s| s.kind = "rng".into());
    refuse(&|s| s.body = vec![]);
    refuse(&|s| s.body.push(0));
    refuse(&|s| *s = SavedState::new(super::KIND.name, 1, &(vec![(0u32, 0u64); 0], vec![(WINDOW, 4096u64)])));
    refuse(&|s| *s = SavedState::new(super::KIND.name, 1, &(vec![(0u32, 0u64); 0], vec![(4096u64, u64::MAX - 4095)])));
}

#[test]
fn the_cursor_queue_swallows_what_it_gets() {
    let mut guest = Guest::new();
    let head = guest.driver.offer(1, &[Buffer::readable(&[0; 56])]);
    guest.driver.run(1).unwrap();
    assert_eq!(guest.driver.used(1), [(head, 0)]);
}

#[test]
fn fences_reach_a_device_on_a_worker() {
    let mut guest = Guest::new();
    guest.context(1);
    let head = guest.send(poll(1, 5), &Guest::submit_body(&[]));
    let before = guest.driver.interrupts(0);
    let running = guest.driver.start_worker();
    guest.fake.reach(1, 5);
    running.wait_for_interrupts(0, before + 1);
    guest.driver = running.stop();
    assert!(guest.answered(head));
}

crate::conformance_tests!(super::gpu);
