//! What a guest's kernel and its Wayland proxy do, with the virtqueue as the only way to the host.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Arc, Mutex};

use virtio_devices::device::Memory;
use virtio_devices::gpu::protocol::{
    BLOB_MEM_GUEST, BLOB_MEM_HOST3D, CreateBlobBody, CreateContextBody, FLAG_FENCE, FLAG_INFO_RING_IDX, Header,
    MapBlobBody, MemEntry, ResourceBody, SubmitBody, cmd, resp,
};
use virtio_devices::gpu::{Gpu, with_factory};
use virtio_devices::mapping::Mapping;
use virtio_devices::testkit::{Driver, RunningDriver};
use vm_memory::{Bytes, GuestAddress};
use zerocopy::IntoBytes;

use crate::RutabagaFactory;
use crate::validate;

pub const WINDOW: u64 = 64 << 20;

/// What the host sent: one event of a context's channel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A message: its bytes, and (identifier, type, size) of its files.
    Message(Vec<u8>, Vec<(u32, u32, u32)>),
    /// Bytes from a pipe, and whether that was the end.
    Pipe(u32, Vec<u8>, bool),
    /// Nothing: ask again.
    Nothing,
}

/// A guest with its device on a worker.
pub struct Guest {
    pub running: Option<RunningDriver>,
    pub window: Arc<Mutex<Mapping>>,
    /// Where requests and answers are.
    slots: Vec<(u64, u64)>,
    free: Vec<usize>,
    used: BTreeMap<u16, usize>,
    /// How far into the used ring, and which heads were there and not waited for.
    seen: u16,
    done: BTreeSet<u16>,
    rings: BTreeMap<u32, (u64, u64)>,
    next_resource: u32,
    fence: u64,
}

const SLOT: u64 = 128 << 10;
/// Where the mock has the control queue's used ring.
const USED_RING: u64 = (1 << 20) + (700 << 10);

impl Guest {
    pub fn new(wayland: &Path) -> Self {
        let limits = virtio_devices::gpu::Limits::for_window(WINDOW);
        Self::with(with_factory(&RutabagaFactory, wayland, WINDOW, limits).unwrap())
    }

    pub fn with(gpu: Gpu) -> Self {
        let window = gpu.window();
        let mut driver = Driver::new(Box::new(gpu));
        let slots: Vec<_> = (0..200).map(|_| (driver.alloc(SLOT), driver.alloc(4096))).collect();
        let free = (0..slots.len()).collect();
        Self {
            running: Some(driver.start_worker()),
            window,
            slots,
            free,
            used: BTreeMap::new(),
            seen: 0,
            done: BTreeSet::new(),
            rings: BTreeMap::new(),
            next_resource: 1,
            fence: 0,
        }
    }

    fn running(&mut self) -> &mut RunningDriver {
        self.running.as_mut().unwrap()
    }

    pub fn memory(&mut self) -> Arc<Memory> {
        self.running().driver().memory()
    }

    /// Makes a request and does not wait.
    pub fn post(&mut self, header: Header, body: &[u8]) -> u16 {
        let slot = self.free.pop().unwrap();
        let (request, answer) = self.slots[slot];
        let bytes = [header.as_bytes(), body].concat();
        self.memory().write_slice(&bytes, GuestAddress(request)).unwrap();
        let len = u32::try_from(bytes.len()).unwrap();
        let head = self.running().offer_parts(0, &[(request, len, false), (answer, 128, true)]);
        self.used.insert(head, slot);
        head
    }

    pub fn answered(&mut self, head: u16) -> bool {
        let mem = self.memory();
        let idx: u16 = mem.read_obj(GuestAddress(USED_RING + 2)).unwrap();
        while self.seen != idx {
            let entry = USED_RING + 4 + 8 * u64::from(self.seen % 1024);
            let head: u32 = mem.read_obj(GuestAddress(entry)).unwrap();
            self.done.insert(u16::try_from(head).unwrap());
            self.seen = self.seen.wrapping_add(1);
        }
        self.done.contains(&head)
    }

    /// Waits for the answer.
    pub fn wait(&mut self, head: u16) -> Vec<u8> {
        loop {
            let interrupts = self.running().driver().interrupts(0);
            if self.answered(head) {
                break;
            }
            self.running().wait_for_interrupts(0, interrupts + 1);
            assert!(!self.running().needs_reset());
        }
        self.done.remove(&head);
        let slot = self.used.remove(&head).unwrap();
        self.free.push(slot);
        let mut answer = vec![0; 128];
        self.memory().read_slice(&mut answer, GuestAddress(self.slots[slot].1)).unwrap();
        answer
    }

    pub fn ask(&mut self, header: Header, body: &[u8]) -> u32 {
        let head = self.post(header, body);
        kind(&self.wait(head))
    }

    /// A context without a connection.
    pub fn bare_context(&mut self, id: u32) {
        let body = CreateContextBody { nlen: 4.into(), context_init: 5.into(), debug_name: [b't'; 64] };
        assert_eq!(self.ask(header(cmd::CTX_CREATE, id), body.as_bytes()), resp::OK_NODATA);
    }

    /// A blob in guest memory that begins with `first` contiguous bytes, attached: its number and address.
    pub fn guest_blob(&mut self, context: u32, first: u32) -> (u32, u64) {
        let id = self.next_resource;
        self.next_resource += 1;
        let addr = self.running().driver().alloc(u64::from(first));
        let body = CreateBlobBody {
            resource_id: id.into(),
            blob_mem: BLOB_MEM_GUEST.into(),
            blob_flags: 1.into(),
            nr_entries: 1.into(),
            blob_id: 0.into(),
            size: u64::from(first).into(),
        };
        let entry = MemEntry { addr: addr.into(), length: first.into(), padding: 0.into() };
        let bytes = [body.as_bytes(), entry.as_bytes()].concat();
        assert_eq!(self.ask(header(cmd::RESOURCE_CREATE_BLOB, 0), &bytes), resp::OK_NODATA);
        assert_eq!(self.resource(cmd::CTX_ATTACH_RESOURCE, context, id), resp::OK_NODATA);
        (id, addr)
    }

    pub fn init(&mut self, context: u32, query: u32, channel: u32) -> u32 {
        let init = validate::Header { cmd: 1, cmd_size: 20.into(), ..validate::Header::default() };
        let words = [query, channel, 1].map(u32::to_le_bytes).concat();
        self.submit(context, &[init.as_bytes(), &words].concat())
    }

    /// A context connected to the compositor.
    pub fn context(&mut self, id: u32) {
        self.bare_context(id);
        let (query, query_at) = self.guest_blob(id, 4096);
        let (channel, channel_at) = self.guest_blob(id, 4096);
        assert_eq!(self.init(id, query, channel), resp::OK_NODATA);
        self.rings.insert(id, (query_at, channel_at));
    }

    pub fn submit(&mut self, context: u32, commands: &[u8]) -> u32 {
        self.ask(header(cmd::SUBMIT_3D, context), &submit_body(commands))
    }

    /// Waits for the host, later.
    pub fn poll(&mut self, context: u32) -> u16 {
        self.fence += 1;
        let header = Header {
            flags: (FLAG_FENCE | FLAG_INFO_RING_IDX).into(),
            fence_id: self.fence.into(),
            ring_idx: 1,
            ..header(cmd::SUBMIT_3D, context)
        };
        let poll = validate::Header { cmd: 3, cmd_size: 16.into(), ..validate::Header::default() };
        self.post(header, &submit_body(&[poll.as_bytes(), &[0; 8]].concat()))
    }

    /// The event that answered a poll.
    pub fn event(&mut self, context: u32, head: u16) -> Event {
        assert_eq!(kind(&self.wait(head)), resp::OK_NODATA);
        let mut page = vec![0; 4096];
        let at = self.rings[&context].1;
        self.memory().read_slice(&mut page, GuestAddress(at)).unwrap();
        let word = |at: usize| u32::from_le_bytes(page[at..at + 4].try_into().unwrap());
        match page[0] {
            5 => {
                let (count, size) = (word(8) as usize, word(12) as usize);
                assert!(count <= 28, "more identifiers than there is room for");
                let files = (0..count).map(|i| (word(16 + 4 * i), word(128 + 4 * i), word(240 + 4 * i))).collect();
                Event::Message(page[352..352 + size].to_vec(), files)
            }
            6 => Event::Pipe(word(8), page[24..24 + word(16) as usize].to_vec(), word(12) != 0),
            3 => Event::Nothing,
            other => panic!("event of kind {other}"),
        }
    }

    /// Waits for the host.
    pub fn next(&mut self, context: u32) -> Event {
        let head = self.poll(context);
        self.event(context, head)
    }

    /// Waits for a message.
    pub fn message(&mut self, context: u32) -> (Vec<u8>, Vec<(u32, u32, u32)>) {
        match self.next(context) {
            Event::Message(bytes, files) => (bytes, files),
            other => panic!("{other:?}"),
        }
    }

    pub fn send(&mut self, context: u32, data: &[u8], files: &[(u32, u32)]) -> u32 {
        self.submit(context, &send_command(data, files))
    }

    pub fn write(&mut self, context: u32, pipe: u32, data: &[u8], hang_up: bool) -> u32 {
        let header = validate::Header {
            cmd: 7,
            cmd_size: u16::try_from(24 + data.len()).unwrap().into(),
            ..validate::Header::default()
        };
        let words = [pipe, u32::from(hang_up), u32::try_from(data.len()).unwrap(), 0].map(u32::to_le_bytes).concat();
        self.submit(context, &[header.as_bytes(), &words, data].concat())
    }

    /// Size and blob id for an image; nothing if refused.
    pub fn image(&mut self, context: u32, width: u32, height: u32) -> Option<(u64, u32)> {
        let header = validate::Header { cmd: 2, cmd_size: 24.into(), ..validate::Header::default() };
        let format = u32::from_le_bytes(*b"XR24");
        let words = [width, height, format, 1 << 4].map(u32::to_le_bytes).concat();
        if self.submit(context, &[header.as_bytes(), &words].concat()) != resp::OK_NODATA {
            return None;
        }
        let at = self.rings[&context].0;
        let mem = self.memory();
        Some((mem.read_obj(GuestAddress(at + 40)).unwrap(), mem.read_obj(GuestAddress(at + 48)).unwrap()))
    }

    /// A blob of host memory; nothing if refused.
    pub fn blob(&mut self, context: u32, blob_id: u64, size: u64) -> Option<u32> {
        let id = self.next_resource;
        self.next_resource += 1;
        let body = CreateBlobBody {
            resource_id: id.into(),
            blob_mem: BLOB_MEM_HOST3D.into(),
            blob_flags: 1.into(),
            nr_entries: 0.into(),
            blob_id: blob_id.into(),
            size: size.into(),
        };
        let answer = self.ask(header(cmd::RESOURCE_CREATE_BLOB, context), body.as_bytes());
        if answer != resp::OK_NODATA {
            return None;
        }
        assert_eq!(self.resource(cmd::CTX_ATTACH_RESOURCE, context, id), resp::OK_NODATA);
        Some(id)
    }

    pub fn map(&mut self, resource: u32, offset: u64) -> u32 {
        let body = MapBlobBody { resource_id: resource.into(), padding: 0.into(), offset: offset.into() };
        self.ask(header(cmd::RESOURCE_MAP_BLOB, 0), body.as_bytes())
    }

    pub fn resource(&mut self, kind: u32, context: u32, resource: u32) -> u32 {
        let body = ResourceBody { resource_id: resource.into(), padding: 0.into() };
        self.ask(header(kind, context), body.as_bytes())
    }

    pub fn destroy(&mut self, context: u32) {
        assert_eq!(self.ask(header(cmd::CTX_DESTROY, context), &[]), resp::OK_NODATA);
    }

    /// What a vCPU would read in the window.
    #[expect(unsafe_code, reason = "the window is memory of the guest")]
    pub fn read_window(&self, offset: usize, len: usize) -> Vec<u8> {
        let base = self.window.lock().unwrap().host_address() as *const u8;
        // SAFETY: the test has mapped a blob there.
        (0..len).map(|i| unsafe { base.add(offset + i).read_volatile() }).collect()
    }

    /// What a vCPU would write.
    #[expect(unsafe_code, reason = "the window is memory of the guest")]
    pub fn fill_window(&self, offset: usize, pixels: usize, pixel: u32) {
        let base = self.window.lock().unwrap().host_address() as *mut u32;
        for i in 0..pixels {
            // SAFETY: the test has mapped a writable blob there.
            unsafe { base.byte_add(offset).add(i).write_volatile(pixel) };
        }
    }

    pub fn pause_and_resume(&mut self) {
        let driver = self.running.take().unwrap().stop();
        self.running = Some(driver.start_worker());
    }
}

pub fn header(kind: u32, context: u32) -> Header {
    Header { kind: kind.into(), ctx_id: context.into(), ..Header::default() }
}

pub fn kind(answer: &[u8]) -> u32 {
    u32::from_le_bytes(answer[..4].try_into().unwrap())
}

pub fn submit_body(commands: &[u8]) -> Vec<u8> {
    let size = u32::try_from(commands.len()).unwrap().into();
    [SubmitBody { size, num_in_fences: 0.into() }.as_bytes(), commands].concat()
}

pub fn send_command(data: &[u8], files: &[(u32, u32)]) -> Vec<u8> {
    let header = validate::Header {
        cmd: 4,
        cmd_size: u16::try_from(352 + data.len()).unwrap().into(),
        ..validate::Header::default()
    };
    let mut message = vec![0; 352];
    message[..8].copy_from_slice(header.as_bytes());
    message[8..12].copy_from_slice(&u32::try_from(files.len()).unwrap().to_le_bytes());
    message[12..16].copy_from_slice(&u32::try_from(data.len()).unwrap().to_le_bytes());
    for (i, (id, kind)) in files.iter().enumerate() {
        message[16 + 4 * i..20 + 4 * i].copy_from_slice(&id.to_le_bytes());
        message[128 + 4 * i..132 + 4 * i].copy_from_slice(&kind.to_le_bytes());
    }
    message.extend_from_slice(data);
    message
}
