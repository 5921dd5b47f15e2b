//! The device, with drivers that speak FUSE and drivers that do not.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{Mode, OFlags, open};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::protocol::*;
use super::*;
use crate::device::Device;
use crate::testkit::{Buffer, Driver};

const ROOT: u64 = passthrough::ROOT;

const NOENT: i32 = -libc::ENOENT;
const IO: i32 = -libc::EIO;
const INVAL: i32 = -libc::EINVAL;
const NOSYS: i32 = -libc::ENOSYS;
const STALE: i32 = -libc::ESTALE;
const ROFS: i32 = -libc::EROFS;

fn reference(path: &Path) -> OwnedFd {
    open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap()
}

fn config() -> FsConfig {
    FsConfig { tag: "host".into(), uid: 1234, gid: 4321, ..FsConfig::default() }
}

/// A guest with a driver that has begun a session.
struct Guest {
    dir: tempfile::TempDir,
    grants: Grants,
    driver: Driver,
    unique: u64,
}

impl Guest {
    /// `data`, a directory with the file `file`, for writing, and `note`, a file, for reading.
    fn new() -> Self {
        let mut guest = Self::before_init();
        let (error, _) = guest.init(7, 38);
        assert_eq!(error, 0);
        guest
    }

    fn before_init() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("data")).unwrap();
        fs::write(dir.path().join("data/file"), "0123456789").unwrap();
        fs::write(dir.path().join("note"), "a note").unwrap();
        let grants = Grants::new().unwrap();
        grants.add("data", reference(&dir.path().join("data")), true).unwrap();
        grants.add("note", reference(&dir.path().join("note")), false).unwrap();
        let driver = Driver::new(Box::new(create(&config(), grants.clone(), None).unwrap()));
        Self { dir, grants, driver, unique: 0 }
    }

    fn init(&mut self, major: u32, minor: u32) -> (i32, Vec<u8>) {
        let init = InitIn {
            major: major.into(),
            minor: minor.into(),
            max_readahead: (1 << 30).into(),
            flags: u32::MAX.into(),
        };
        self.call(op::INIT, 0, &[init.as_bytes()])
    }

    fn request(&mut self, opcode: u32, node: u64, body: &[&[u8]]) -> Vec<u8> {
        self.unique += 1;
        let body = body.concat();
        let header = InHeader {
            len: u32::try_from(size_of::<InHeader>() + body.len()).unwrap().into(),
            opcode: opcode.into(),
            unique: self.unique.into(),
            nodeid: node.into(),
            ..InHeader::default()
        };
        [header.as_bytes(), &body].concat()
    }

    /// Asks on the request queue; the error, and what is behind the answer's header.
    fn call(&mut self, opcode: u32, node: u64, body: &[&[u8]]) -> (i32, Vec<u8>) {
        let request = self.request(opcode, node, body);
        // The headers' boundaries are nobody's business (virtio 1.3 section 2.7.4).
        let (first, second) = request.split_at(7);
        let buffers =
            [Buffer::readable(first), Buffer::readable(second), Buffer::writable(5), Buffer::writable(1 << 17)];
        let head = self.driver.offer(1, &buffers);
        self.driver.run(1).unwrap();
        let (used, len) = *self.driver.used(1).last().unwrap();
        assert_eq!(used, head);
        let mut bytes = [self.driver.read(1, head, 2), self.driver.read(1, head, 3)].concat();
        bytes.truncate(usize::try_from(len).unwrap());
        let (out, rest) = OutHeader::read_from_prefix(&bytes).unwrap();
        assert_eq!((out.len.get(), out.unique.get()), (len, self.unique));
        (out.error.get(), rest.to_vec())
    }

    fn ok(&mut self, opcode: u32, node: u64, body: &[&[u8]]) -> Vec<u8> {
        let (error, bytes) = self.call(opcode, node, body);
        assert_eq!(error, 0, "operation {opcode}");
        bytes
    }

    fn error(&mut self, opcode: u32, node: u64, body: &[&[u8]]) -> i32 {
        let (error, bytes) = self.call(opcode, node, body);
        assert!(bytes.is_empty());
        error
    }

    fn lookup(&mut self, parent: u64, name: &str) -> EntryOut {
        get(&self.ok(op::LOOKUP, parent, &[name.as_bytes(), b"\0"]))
    }

    fn open(&mut self, node: u64, flags: i32) -> u64 {
        let open = OpenIn { flags: flags.cast_unsigned().into(), ..OpenIn::default() };
        get::<OpenOut>(&self.ok(op::OPEN, node, &[open.as_bytes()])).fh.get()
    }

    fn file(&mut self) -> u64 {
        let data = self.lookup(ROOT, "data").nodeid.get();
        self.lookup(data, "file").nodeid.get()
    }
}

fn get<T: FromBytes + Immutable + Copy>(bytes: &[u8]) -> T {
    T::read_from_prefix(bytes).unwrap().0
}

fn read(handle: u64, offset: u64, size: u32) -> ReadIn {
    ReadIn { fh: handle.into(), offset: offset.into(), size: size.into(), ..ReadIn::default() }
}

fn write(handle: u64, offset: u64, size: usize) -> WriteIn {
    let size = u32::try_from(size).unwrap();
    WriteIn { fh: handle.into(), offset: offset.into(), size: size.into(), ..WriteIn::default() }
}

/// The names in an answer to READDIR, or READDIRPLUS with their nodes.
fn names(mut bytes: &[u8], plus: bool) -> Vec<(String, u64)> {
    let mut found = Vec::new();
    while !bytes.is_empty() {
        let node = if plus {
            let (entry, rest) = EntryOut::read_from_prefix(bytes).unwrap();
            bytes = rest;
            entry.nodeid.get()
        } else {
            0
        };
        let (dirent, rest) = Dirent::read_from_prefix(bytes).unwrap();
        let len = usize::try_from(dirent.namelen.get()).unwrap();
        found.push((String::from_utf8(rest[..len].to_vec()).unwrap(), node));
        bytes = &rest[len.next_multiple_of(8)..];
    }
    found.sort();
    found
}

#[test]
fn says_what_it_is() {
    let mut guest = Guest::before_init();
    let traits = guest.driver.device().traits();
    assert_eq!((traits.device_type, traits.queue_sizes.len()), (26, 2));
    let mut wanted = b"host".to_vec();
    wanted.resize(36, 0);
    wanted.extend(1u32.to_le_bytes());
    assert_eq!(traits.config.bytes(), wanted);
}

#[test]
fn a_session_begins_with_what_both_can_do() {
    let mut guest = Guest::before_init();
    assert_eq!(guest.error(op::GETATTR, ROOT, &[&[0; 16]]), IO, "before INIT");
    assert_eq!(guest.error(op::READ, ROOT, &[read(0, 0, 1).as_bytes()]), IO);
    assert_eq!(guest.init(7, 30).0, -libc::EPROTO);
    let newer: InitOut = get(&guest.init(8, 0).1);
    assert_eq!((newer.major.get(), newer.flags.get()), (7, 0));
    assert_eq!(guest.error(op::GETATTR, ROOT, &[&[0; 16]]), IO, "nothing was agreed");
    let out: InitOut = get(&guest.init(7, 45).1);
    assert_eq!((out.major.get(), out.minor.get(), out.max_write.get(), out.max_pages.get()), (7, 38, 1 << 20, 256));
    let (writeback, posix_locks, flock) = (1 << 16, 1 << 1, 1 << 10);
    assert_eq!(out.flags.get() & (writeback | posix_locks | flock), 0);
    assert_ne!(out.flags.get() & init::DO_READDIRPLUS, 0);
    guest.ok(op::GETATTR, ROOT, &[&[0; 16]]);
    guest.ok(op::DESTROY, 0, &[]);
    assert_eq!(guest.error(op::GETATTR, ROOT, &[&[0; 16]]), IO);
}

#[test]
fn grants_are_in_the_root() {
    let mut guest = Guest::new();
    let handle = get::<OpenOut>(&guest.ok(op::OPENDIR, ROOT, &[&[0; 8]])).fh.get();
    let list = guest.ok(op::READDIR, ROOT, &[read(handle, 0, 4096).as_bytes()]);
    let all: Vec<String> = names(&list, false).into_iter().map(|(name, _)| name).collect();
    assert_eq!(all, [".", "..", "data", "note"]);
    let plus = names(&guest.ok(op::READDIRPLUS, ROOT, &[read(handle, 0, 4096).as_bytes()]), true);
    assert_eq!((plus[0].1, plus[1].1), (0, 0), "the dots are known");
    let note = guest.lookup(ROOT, "note");
    assert_eq!(note.nodeid.get(), plus[3].1);
    assert_eq!((note.entry_valid.get(), note.attr.uid.get(), note.attr.gid.get()), (1, 1234, 4321));
    assert_eq!((note.attr.size.get(), note.attr.mode.get() & 0o170_000), (6, 0o100_000));
    assert_eq!(guest.error(op::LOOKUP, ROOT, &[b"secret\0"]), NOENT);
    assert_eq!(guest.error(op::READDIR, ROOT, &[read(handle, 0, 20).as_bytes()]), INVAL);
    assert!(guest.ok(op::READDIR, ROOT, &[read(handle, 99, 4096).as_bytes()]).is_empty());
    guest.ok(op::RELEASEDIR, ROOT, &[&handle.to_le_bytes(), &[0; 16]]);
    assert_eq!(guest.error(op::READDIR, ROOT, &[read(handle, 0, 4096).as_bytes()]), -libc::EBADF);
    // A grant that comes while the session is on.
    guest.grants.add("more", reference(guest.dir.path()), false).unwrap();
    assert_eq!(guest.lookup(ROOT, "more").attr.mode.get() & 0o170_000, 0o040_000);
}

#[test]
fn data_goes_between_file_and_guest_memory() {
    let mut guest = Guest::new();
    let file = guest.file();
    let handle = guest.open(file, libc::O_RDWR);
    assert_eq!(guest.ok(op::READ, file, &[read(handle, 3, 100).as_bytes()]), b"3456789");
    assert_eq!(guest.ok(op::READ, file, &[read(handle, 0, 2).as_bytes()]), b"01");
    assert!(guest.ok(op::READ, file, &[read(handle, 100, 100).as_bytes()]).is_empty());
    let done: WriteOut = get(&guest.ok(op::WRITE, file, &[write(handle, 8, 4).as_bytes(), b"abcd"]));
    assert_eq!(done.size.get(), 4);
    let appending = WriteIn { flags: open::APPEND.into(), ..write(handle, 0, 2) };
    guest.ok(op::WRITE, file, &[appending.as_bytes(), b"xy"]);
    // A page of the cache has its place, whatever the file was opened for.
    let page = WriteIn { write_flags: WRITE_CACHE.into(), ..appending };
    guest.ok(op::WRITE, file, &[page.as_bytes(), b"AB"]);
    guest.ok(op::FSYNC, file, &[&handle.to_le_bytes(), &[1, 0, 0, 0, 0, 0, 0, 0]]);
    assert_eq!(fs::read(guest.dir.path().join("data/file")).unwrap(), b"AB234567abcdxy");
    // More than it says there is.
    assert_eq!(guest.error(op::WRITE, file, &[write(handle, 0, 5).as_bytes(), b"abcd"]), INVAL);
    let much = vec![7; (1 << 20) + 1];
    assert_eq!(guest.error(op::WRITE, file, &[write(handle, 0, much.len()).as_bytes(), &much]), INVAL);
    guest.ok(op::WRITE, file, &[write(handle, 0, 1 << 20).as_bytes(), &much[1..]]);
    assert_eq!(fs::metadata(guest.dir.path().join("data/file")).unwrap().len(), 1 << 20);
    // As much as there is room for.
    assert_eq!(guest.ok(op::READ, file, &[read(handle, 0, u32::MAX).as_bytes()]).len(), (1 << 17) + 5 - 16);
}

#[test]
fn files_are_made_and_changed() {
    let mut guest = Guest::new();
    let data = guest.lookup(ROOT, "data").nodeid.get();
    let create = CreateIn { flags: 0o2.into(), mode: 0o104_640.into(), ..CreateIn::default() };
    let bytes = guest.ok(op::CREATE, data, &[create.as_bytes(), b"new\0"]);
    assert_eq!(bytes.len(), size_of::<EntryOut>() + size_of::<OpenOut>());
    let (node, handle) = (get::<EntryOut>(&bytes).nodeid.get(), get::<OpenOut>(&bytes[128..]).fh.get());
    guest.ok(op::WRITE, node, &[write(handle, 0, 3).as_bytes(), b"abc"]);
    guest.ok(op::RELEASE, node, &[&handle.to_le_bytes(), &[0; 16]]);
    let set = SetattrIn {
        valid: (valid::MODE | valid::SIZE | valid::UID | valid::MTIME).into(),
        mode: 0o106_600.into(),
        size: 2.into(),
        uid: 1234.into(),
        mtime: 77.into(),
        ..SetattrIn::default()
    };
    let attr = get::<AttrOut>(&guest.ok(op::SETATTR, node, &[set.as_bytes()])).attr;
    assert_eq!((attr.mode.get(), attr.size.get(), attr.mtime.get()), (0o100_600, 2, 77));
    let give_away = SetattrIn { valid: valid::GID.into(), gid: 0.into(), ..SetattrIn::default() };
    assert_eq!(guest.error(op::SETATTR, node, &[give_away.as_bytes()]), -libc::EPERM);
    let make = MkdirIn { mode: 0o755.into(), ..MkdirIn::default() };
    let sub = get::<EntryOut>(&guest.ok(op::MKDIR, data, &[make.as_bytes(), b"sub\0"])).nodeid.get();
    guest.ok(op::RENAME, data, &[&sub.to_le_bytes(), b"new\0moved\0"]);
    let rename = Rename2In { newdir: sub.into(), flags: 1.into(), ..Rename2In::default() };
    assert_eq!(guest.error(op::RENAME2, data, &[rename.as_bytes(), b"file\0moved\0"]), -libc::EEXIST);
    guest.ok(op::LINK, sub, &[&node.to_le_bytes(), b"again\0"]);
    let link = get::<EntryOut>(&guest.ok(op::SYMLINK, sub, &[b"link\0../../../etc\0"])).nodeid.get();
    assert_eq!(guest.ok(op::READLINK, link, &[]), b"../../../etc");
    let device = MknodIn { mode: 0o020_600.into(), rdev: 0x103.into(), ..MknodIn::default() };
    assert_eq!(guest.error(op::MKNOD, sub, &[device.as_bytes(), b"null\0"]), -libc::EPERM);
    for name in ["moved", "again", "link"] {
        guest.ok(op::UNLINK, sub, &[name.as_bytes(), b"\0"]);
    }
    guest.ok(op::RMDIR, data, &[b"sub\0"]);
    let stat: StatfsOut = get(&guest.ok(op::STATFS, data, &[]));
    assert!(stat.blocks.get() > 0);
    assert_eq!(guest.error(op::UNLINK, ROOT, &[b"note\0"]), ROFS);
    let note = guest.lookup(ROOT, "note").nodeid.get();
    assert_eq!(guest.error(op::OPEN, note, &[&open::WRITE.to_le_bytes(), &[0; 4]]), ROFS);
    assert_eq!(guest.error(op::OPEN, note, &[&open::TRUNCATE.to_le_bytes(), &[0; 4]]), ROFS);
}

#[test]
fn forgetting_has_no_answer() {
    let mut guest = Guest::new();
    let file = guest.file();
    let forget = guest.request(op::FORGET, file, &[&1u64.to_le_bytes()]);
    let head = guest.driver.offer(0, &[Buffer::readable(&forget)]);
    guest.driver.run(0).unwrap();
    assert_eq!(guest.driver.used(0), [(head, 0)]);
    assert_eq!(guest.error(op::GETATTR, file, &[&[0; 16]]), STALE);
    let (file, note) = (guest.file(), guest.lookup(ROOT, "note").nodeid.get());
    let one = |node: u64| [node.to_le_bytes(), 1u64.to_le_bytes()].concat();
    // Of the three it announces there are two.
    let body = [&[3u32, 0].map(u32::to_le_bytes).concat()[..], &one(file), &one(note)].concat();
    let batch = guest.request(op::BATCH_FORGET, 0, &[&body]);
    guest.driver.offer(0, &[Buffer::readable(&batch), Buffer::writable(64)]);
    guest.driver.run(0).unwrap();
    assert_eq!(guest.driver.used(0).last().unwrap().1, 0);
    assert_eq!(guest.error(op::GETATTR, file, &[&[0; 16]]), STALE);
    assert_eq!(guest.error(op::GETATTR, note, &[&[0; 16]]), STALE);
}

#[test]
fn what_is_revoked_is_stale() {
    let mut guest = Guest::new();
    let file = guest.file();
    let handle = guest.open(file, libc::O_RDWR);
    guest.grants.remove("data").unwrap();
    assert_eq!(guest.error(op::READ, file, &[read(handle, 0, 9).as_bytes()]), STALE);
    assert_eq!(guest.error(op::WRITE, file, &[write(handle, 0, 1).as_bytes(), b"x"]), STALE);
    assert_eq!(guest.error(op::LOOKUP, ROOT, &[b"data\0"]), NOENT);
    guest.driver.source(0).unwrap();
    assert_eq!(guest.error(op::GETATTR, file, &[&[0; 16]]), STALE);
    guest.ok(op::RELEASE, file, &[&handle.to_le_bytes(), &[0; 16]]);
    guest.lookup(ROOT, "note");
    assert_eq!(fs::read(guest.dir.path().join("data/file")).unwrap(), b"0123456789");
}

#[test]
fn what_makes_no_sense_is_refused() {
    let mut guest = Guest::new();
    let data = guest.lookup(ROOT, "data").nodeid.get();
    for (opcode, node, body, error) in [
        (0, ROOT, &b""[..], NOSYS),
        (7, ROOT, b"", NOSYS),
        (9999, ROOT, b"", NOSYS),
        // FLUSH, SETLK, IOCTL, POLL, SETUPMAPPING
        (25, data, &[0; 64], NOSYS),
        (32, data, &[0; 64], NOSYS),
        (39, data, &[0; 64], NOSYS),
        (40, data, &[0; 64], NOSYS),
        (48, data, &[0; 64], NOSYS),
        (op::TMPFILE, ROOT, &[0; 64], ROFS),
        (op::TMPFILE, data, &[0; 15], INVAL),
        (op::GETXATTR, data, &[0; 7], INVAL),
        (op::LOOKUP, data, b"", INVAL),
        (op::LOOKUP, data, b"no end", INVAL),
        (op::LOOKUP, data, b"..\0", INVAL),
        (op::LOOKUP, data, b".\0", INVAL),
        (op::LOOKUP, data, b"file/x\0", INVAL),
        (op::LOOKUP, data, &[b'x'; 300], INVAL),
        (op::MKDIR, data, b"\0\0\0\0\0\0\0\0../x\0", INVAL),
        (op::RENAME, data, b"\0\0\0\0\0\0\0\0file\0", INVAL),
        (op::SYMLINK, data, b"link\0no end", INVAL),
        (op::READ, data, &[0; 39], INVAL),
        (op::READ, data, &[0; 40], -libc::EBADF),
        (op::SETATTR, data, &[0; 87], INVAL),
        (op::OPEN, data, &[3, 0, 0, 0, 0, 0, 0, 0], INVAL),
        (op::OPEN, data, &[0; 8], -libc::EISDIR),
        (op::OPEN, ROOT, &[0; 8], -libc::EISDIR),
        (op::OPENDIR, 4711, &[0; 8], STALE),
        (op::LSEEK, data, &[0; 24], INVAL),
        (op::LOOKUP, u64::MAX, b"x\0", STALE),
    ] {
        assert_eq!(guest.error(opcode, node, &[body]), error, "operation {opcode} with {body:?}");
    }
}

#[test]
fn chains_that_are_no_requests_are_returned() {
    let mut guest = Guest::new();
    let request = guest.request(op::GETATTR, ROOT, &[&[0; 16]]);
    let longer = {
        let mut bytes = request.clone();
        bytes[0] += 1;
        bytes
    };
    let shorter = {
        let mut bytes = request.clone();
        bytes[0] = 39;
        bytes
    };
    let room = || Buffer::writable(256);
    let mut lengths = Vec::new();
    for buffers in [
        vec![Buffer::readable(&request[..39]), room()],
        vec![room()],
        vec![Buffer::readable(&request)],
        vec![Buffer::readable(&request), Buffer::writable(15)],
        vec![Buffer::readable(&request), Buffer::writable(100)],
        vec![Buffer::readable(&longer), room()],
        vec![Buffer::readable(&shorter), room()],
        vec![Buffer::readable(&request), room()],
    ] {
        guest.driver.offer(1, &buffers);
        guest.driver.run(1).unwrap();
        lengths.push(guest.driver.used(1).last().unwrap().1);
    }
    assert_eq!(lengths, [0, 0, 0, 0, 0, 16, 16, 120]);
    // A request whose data is in no memory, and one whose answer is to be.
    let file = guest.file();
    let handle = guest.open(file, libc::O_RDWR);
    let wild = (u64::MAX - 4096, 4096, false);
    let mut write = guest.request(op::WRITE, file, &[write(handle, 0, 4096).as_bytes()]);
    write[..4].copy_from_slice(&(80u32 + 4096).to_le_bytes());
    let read = guest.request(op::READ, file, &[read(handle, 0, 8).as_bytes()]);
    let (at, out) = (guest.driver.alloc(4096), guest.driver.alloc(4096));
    let put = |bytes: &[u8]| guest.driver.write(at, bytes);
    put(&write);
    guest.driver.offer_parts(1, &[(at, 80, false), wild, (out, 64, true)]);
    guest.driver.run(1).unwrap();
    assert_eq!(guest.driver.used(1).last().unwrap().1, 16);
    guest.driver.write(at, &read);
    guest.driver.offer_parts(1, &[(at, 80, false), (out, 16, true), (1 << 40, 64, true)]);
    guest.driver.run(1).unwrap();
    assert_eq!(guest.driver.used(1).last().unwrap().1, 16);
    assert_eq!(fs::read(guest.dir.path().join("data/file")).unwrap(), b"0123456789");
}

/// As a clone does: the driver goes on in the middle of its session, with other grants.
#[test]
fn a_session_goes_on_after_a_restore() {
    let mut guest = Guest::new();
    let file = guest.file();
    let handle = guest.open(file, libc::O_RDWR);
    let saved = guest.driver.device().save();
    let grants = Grants::new().unwrap();
    let restored = create(&config(), grants.clone(), Some(&saved)).unwrap();
    guest.driver = Driver::new(Box::new(restored));
    guest.ok(op::GETATTR, ROOT, &[&[0; 16]]);
    assert_eq!(guest.error(op::GETATTR, file, &[&[0; 16]]), STALE);
    assert_eq!(guest.error(op::LOOKUP, ROOT, &[b"data\0"]), NOENT);
    grants.add("data", reference(&guest.dir.path().join("data")), true).unwrap();
    let again = guest.file();
    assert!(again > file, "the driver still knows the old number");
    assert!(guest.open(again, libc::O_RDWR) > handle);
    assert_eq!(guest.error(op::READ, again, &[read(handle, 0, 9).as_bytes()]), -libc::EBADF);
    assert_eq!(guest.error(op::GETATTR, file, &[&[0; 16]]), STALE);
    let other = SavedState::new("rng", 1, &());
    assert!(create(&config(), grants.clone(), Some(&other)).is_err());
    // One that has counted to the end gets no more numbers.
    let last = SavedState::new(KIND.name, STATE_VERSION, &State { begun: true, next: u64::MAX });
    guest.driver = Driver::new(Box::new(create(&config(), grants, Some(&last)).unwrap()));
    assert_eq!(guest.error(op::LOOKUP, ROOT, &[b"data\0"]), -libc::ENFILE);
}

/// The thread hears of a revocation while the driver is silent.
#[test]
fn descriptors_are_closed_without_a_request() {
    let mut guest = Guest::new();
    let file = guest.file();
    guest.open(file, libc::O_RDWR);
    let held = tempfile::tempdir_in(guest.dir.path()).unwrap();
    guest.grants.add("held", reference(held.path()), true).unwrap();
    guest.lookup(ROOT, "held");
    let path = fs::canonicalize(held.path()).unwrap();
    let count = || {
        let links = fs::read_dir("/proc/self/fd").unwrap().flatten();
        links.filter(|link| fs::read_link(link.path()).is_ok_and(|to| to == path)).count()
    };
    assert_eq!(count(), 1);
    let running = guest.driver.start_worker();
    guest.grants.remove("held").unwrap();
    // There is no event for the end of a descriptor.
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while count() > 0 && std::time::Instant::now() < deadline {
        std::thread::yield_now();
    }
    assert_eq!(count(), 0);
    drop(running.stop());
}

fn device() -> Box<dyn Device> {
    let grants = Grants::new().unwrap();
    grants.add("src", reference(Path::new(env!("CARGO_MANIFEST_DIR"))), false).unwrap();
    Box::new(create(&config(), grants, None).unwrap())
}

crate::conformance_tests!(super::device);

#[test]
fn extended_attributes_fit_or_say_how_large_they_are() {
    let mut guest = Guest::new();
    let file = guest.file();
    let set = |size: usize| SetxattrIn { size: u32::try_from(size).unwrap().into(), ..SetxattrIn::default() };
    let room = |size: u32| GetxattrIn { size: size.into(), ..GetxattrIn::default() };
    guest.ok(op::SETXATTR, file, &[set(5).as_bytes(), b"user.a\0", b"value"]);
    let sized: GetxattrOut = get(&guest.ok(op::GETXATTR, file, &[room(0).as_bytes(), b"user.a\0"]));
    assert_eq!(sized.size.get(), 5);
    assert_eq!(guest.ok(op::GETXATTR, file, &[room(5).as_bytes(), b"user.a\0"]), b"value");
    assert_eq!(guest.error(op::GETXATTR, file, &[room(4).as_bytes(), b"user.a\0"]), -libc::ERANGE);
    let sized: GetxattrOut = get(&guest.ok(op::LISTXATTR, file, &[room(0).as_bytes()]));
    assert_eq!(sized.size.get(), 7);
    assert_eq!(guest.ok(op::LISTXATTR, file, &[room(100).as_bytes()]), b"user.a\0");
    for (bytes, error) in [
        (vec![], INVAL),
        ([set(6).as_bytes(), b"user.a\0", b"value"].concat(), INVAL),
        ([set(5).as_bytes(), b"user.a"].concat(), INVAL),
        ([set((64 << 10) + 1).as_bytes(), b"user.a\0"].concat(), -libc::E2BIG),
        ([set(1).as_bytes(), b"security.capability\0x"].concat(), -libc::EOPNOTSUPP),
        ([set(1).as_bytes(), b"\0x"].concat(), -libc::ERANGE),
    ] {
        assert_eq!(guest.error(op::SETXATTR, file, &[&bytes]), error, "{bytes:?}");
    }
    guest.ok(op::REMOVEXATTR, file, &[b"user.a\0"]);
    assert_eq!(guest.error(op::GETXATTR, file, &[room(5).as_bytes(), b"user.a\0"]), -libc::ENODATA);
    let note = guest.lookup(ROOT, "note").nodeid.get();
    assert_eq!(guest.error(op::SETXATTR, note, &[set(1).as_bytes(), b"user.a\0x"]), ROFS);
}

#[test]
fn a_file_without_a_name_is_made_whatever_the_driver_calls_it() {
    let mut guest = Guest::new();
    let data = guest.lookup(ROOT, "data").nodeid.get();
    let create = CreateIn { flags: libc::O_RDWR.cast_unsigned().into(), mode: 0o100_600.into(), ..CreateIn::default() };
    let bytes = guest.ok(op::TMPFILE, data, &[create.as_bytes(), b"/\0"]);
    let entry: EntryOut = get(&bytes);
    assert_eq!((entry.attr.nlink.get(), entry.attr.mode.get()), (0, 0o100_600));
    assert_eq!(bytes.len(), size_of::<EntryOut>() + size_of::<OpenOut>());
    guest.ok(op::SYNCFS, ROOT, &[&[0; 8]]);
}

#[test]
fn a_long_directory_is_listed_whole_in_small_pieces() {
    let mut guest = Guest::new();
    (0..100).for_each(|i| fs::write(guest.dir.path().join(format!("data/{i:0>200}")), "").unwrap());
    let data = guest.lookup(ROOT, "data").nodeid.get();
    for opcode in [op::READDIR, op::READDIRPLUS] {
        let dir = get::<OpenOut>(&guest.ok(op::OPENDIR, data, &[OpenIn::default().as_bytes()])).fh.get();
        let (mut offset, mut names) = (0, 0);
        loop {
            let bytes = guest.ok(opcode, data, &[read(dir, offset, 512).as_bytes()]);
            let mut rest = bytes.as_slice();
            if rest.is_empty() {
                break;
            }
            while !rest.is_empty() {
                let skip = if opcode == op::READDIRPLUS { size_of::<EntryOut>() } else { 0 };
                let entry: Dirent = get(&rest[skip..]);
                offset = entry.off.get();
                names += 1;
                let len = skip + size_of::<Dirent>() + usize::try_from(entry.namelen.get()).unwrap();
                rest = &rest[len.next_multiple_of(8)..];
            }
        }
        assert_eq!(names, 103, "with the dots and the file");
        guest.ok(op::RELEASEDIR, data, &[ReleaseIn { fh: dir.into() }.as_bytes()]);
    }
}
