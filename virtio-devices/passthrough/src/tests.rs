//! Trees on real directories, with guests that behave, guests that do not, and hosts that change things meanwhile.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags, mknodat, open};
use vm_memory::VolatileSlice;

use super::*;

const READ: OpenFlags =
    OpenFlags { read: true, write: false, truncate: false, exclusive: false, data_sync: false, sync: false };
const WRITE: OpenFlags = OpenFlags { read: false, write: true, ..READ };

fn reference(path: &Path) -> OwnedFd {
    open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap()
}

fn name(text: &str) -> Name {
    Name::new(text.as_bytes()).unwrap()
}

/// A host with `secret` beside `shared`, which is granted for writing, and `report`, which is granted for reading.
struct Host {
    dir: tempfile::TempDir,
    grants: Grants,
    tree: Tree,
}

impl Host {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("secret"), "secret").unwrap();
        fs::write(dir.path().join("report"), "a report").unwrap();
        fs::create_dir_all(dir.path().join("shared/inner")).unwrap();
        fs::write(dir.path().join("shared/file"), "0123456789").unwrap();
        let grants = Grants::new().unwrap();
        grants.add("shared", reference(&dir.path().join("shared")), true).unwrap();
        grants.add("report", reference(&dir.path().join("report")), false).unwrap();
        let tree = Tree::new(grants.clone(), 0).unwrap();
        Self { dir, grants, tree }
    }

    fn path(&self, path: &str) -> std::path::PathBuf {
        self.dir.path().join(path)
    }

    /// Walks as a guest does, one name after another.
    fn walk(&mut self, path: &str) -> Result<u64, Errno> {
        let mut node = ROOT;
        for part in path.split('/') {
            node = self.tree.lookup(node, &Name::new(part.as_bytes())?)?.node;
        }
        Ok(node)
    }

    fn node(&mut self, path: &str) -> u64 {
        self.walk(path).unwrap()
    }

    fn read(&mut self, path: &str) -> Result<String, Errno> {
        let node = self.walk(path)?;
        let handle = self.tree.open(node, READ)?;
        read_at(&self.tree, node, handle, 0)
    }
}

fn read_at(tree: &Tree, node: u64, handle: u64, offset: u64) -> Result<String, Errno> {
    let mut buffer = [0; 64];
    let (a, b) = buffer.split_at_mut(3);
    let done = tree.read(node, handle, offset, &[VolatileSlice::from(a), VolatileSlice::from(b)])?;
    Ok(String::from_utf8_lossy(&buffer[..done]).into_owned())
}

fn write_at(tree: &Tree, node: u64, handle: u64, offset: u64, append: bool, text: &str) -> Result<usize, Errno> {
    let mut bytes = text.as_bytes().to_vec();
    tree.write(node, handle, offset, append, &[VolatileSlice::from(bytes.as_mut_slice())])
}

fn list(tree: &mut Tree, node: u64) -> Vec<String> {
    let handle = tree.open_directory(node).unwrap();
    let (mut names, mut offset) = (Vec::new(), 0);
    loop {
        let before = names.len();
        // Two at a time, so that offsets are used.
        let mut room = 2;
        tree.entries(handle, offset, 4096, |_, entry| {
            if room == 0 {
                return false;
            }
            room -= 1;
            offset = entry.next;
            names.push(String::from_utf8(entry.name).unwrap());
            true
        })
        .unwrap();
        if names.len() == before {
            break;
        }
    }
    tree.release_directory(handle);
    names.sort();
    names
}

#[test]
fn names_are_single_components() {
    for (bytes, error) in [
        (b"".as_slice(), Errno::INVAL),
        (b".", Errno::INVAL),
        (b"..", Errno::INVAL),
        (b"a/b", Errno::INVAL),
        (b"/", Errno::INVAL),
        (b"a\0b", Errno::INVAL),
        (&[b'x'; 256], Errno::NAMETOOLONG),
    ] {
        assert_eq!(Name::new(bytes).unwrap_err(), error, "{bytes:?}");
    }
    assert!(Name::new(&[b'x'; 255]).is_ok() && Name::new(b"...").is_ok());
}

#[test]
fn the_root_has_the_grants_and_nothing_else() {
    let mut host = Host::new();
    assert_eq!(list(&mut host.tree, ROOT), [".", "..", "report", "shared"]);
    assert_eq!(host.read("report").unwrap(), "a report");
    assert_eq!(host.read("shared/file").unwrap(), "0123456789");
    assert_eq!(host.walk("secret").unwrap_err(), Errno::NOENT);
    for error in [
        host.tree.make_directory(ROOT, &name("x"), 0o755).unwrap_err(),
        host.tree.create(ROOT, &name("x"), 0o644, WRITE).unwrap_err(),
        host.tree.remove(ROOT, &name("report"), false).unwrap_err(),
        host.tree.remove(ROOT, &name("shared"), true).unwrap_err(),
        host.tree.rename((ROOT, &name("shared")), (ROOT, &name("other")), 0).unwrap_err(),
        host.tree.change(ROOT, None, &Change { mode: Some(0o777), ..Change::default() }).unwrap_err(),
    ] {
        assert_eq!(error, Errno::ROFS);
    }
    let shared = host.node("shared");
    assert_eq!(host.tree.rename((ROOT, &name("report")), (shared, &name("x")), 0).unwrap_err(), Errno::ROFS);
}

#[test]
fn a_directory_is_listed_in_parts_of_any_size() {
    let mut host = Host::new();
    let wanted: Vec<String> = (0..1000).map(|i| format!("{i:0>200}")).collect();
    for file in &wanted {
        fs::write(host.path("shared/inner").join(file), "").unwrap();
    }
    let inner = host.node("shared/inner");
    assert_eq!(list(&mut host.tree, inner)[2..], wanted);
}

#[test]
fn files_are_made_changed_and_removed() {
    let mut host = Host::new();
    let shared = host.node("shared");
    let (found, handle) = host.tree.create(shared, &name("new"), 0o7644, WRITE).unwrap();
    assert_eq!(write_at(&host.tree, found.node, handle, 3, false, "abc").unwrap(), 3);
    assert_eq!(write_at(&host.tree, found.node, handle, 0, true, "def").unwrap(), 3);
    host.tree.sync(found.node, handle, true).unwrap();
    assert_eq!(fs::read(host.path("shared/new")).unwrap(), b"\0\0\0abcdef");
    assert_eq!(fs::metadata(host.path("shared/new")).unwrap().mode() & 0o7000, 0);
    assert_eq!(read_at(&host.tree, found.node, handle, 0).unwrap_err(), Errno::BADF, "it is open for writing only");
    let change = Change {
        size: Some(4),
        mode: Some(0o6600),
        modified: Some(Some(Time { seconds: 1000, nanoseconds: 5 })),
        ..Change::default()
    };
    let attributes = host.tree.change(found.node, None, &change).unwrap();
    assert_eq!((attributes.size, attributes.mode, attributes.modified.seconds), (4, 0o100_600, 1000));
    // Twice the same file is the same node, and its own name is forgotten with it.
    assert_eq!(host.node("shared/new"), found.node);
    host.tree.rename((shared, &name("new")), (shared, &name("moved")), 0).unwrap();
    assert_eq!(host.node("shared/moved"), found.node);
    let linked = host.tree.link(found.node, shared, &name("linked")).unwrap();
    assert_eq!((linked.node, linked.attributes.links), (found.node, 2));
    host.tree.remove(shared, &name("moved"), false).unwrap();
    host.tree.remove(shared, &name("linked"), false).unwrap();
    assert_eq!(host.tree.attributes(found.node).unwrap().links, 0);
    let inner = host.tree.make_directory(shared, &name("d"), 0o755).unwrap();
    assert_eq!(host.tree.remove(shared, &name("d"), false).unwrap_err(), Errno::ISDIR);
    host.tree.remove(shared, &name("d"), true).unwrap();
    assert_eq!(host.tree.create(inner.node, &name("x"), 0o644, WRITE).unwrap_err(), Errno::NOENT);
    let exclusive = OpenFlags { exclusive: true, ..WRITE };
    assert_eq!(host.tree.create(shared, &name("file"), 0o644, exclusive).unwrap_err(), Errno::EXIST);
    host.tree.create(shared, &name("file"), 0o644, OpenFlags { truncate: true, ..WRITE }).unwrap();
    assert_eq!(fs::read(host.path("shared/file")).unwrap(), b"");
}

#[test]
fn symbolic_links_are_text() {
    let mut host = Host::new();
    let secret = host.path("secret");
    symlink(&secret, host.path("shared/escape")).unwrap();
    symlink("..", host.path("shared/up")).unwrap();
    symlink("/proc/self/fd", host.path("shared/magic")).unwrap();
    let link = host.node("shared/escape");
    assert_eq!(host.tree.target(link).unwrap(), secret.as_os_str().as_encoded_bytes());
    assert_eq!(host.tree.open(link, READ).unwrap_err(), Errno::LOOP);
    assert_eq!(host.tree.open_directory(link).unwrap_err(), Errno::NOTDIR);
    for path in ["shared/up/secret", "shared/magic/0", "shared/escape/x"] {
        assert_eq!(host.walk(path).unwrap_err(), Errno::NOTDIR, "{path}");
    }
    let shared = host.node("shared");
    // Neither does creating follow it, nor a change of attributes.
    let (up, truncating) = (name("escape"), OpenFlags { truncate: true, ..WRITE });
    assert_eq!(host.tree.create(shared, &up, 0o644, truncating).unwrap_err(), Errno::LOOP);
    let change = |change: Change| Change { ..change };
    let size = change(Change { size: Some(0), ..Change::default() });
    assert_eq!(host.tree.change(link, None, &size).unwrap_err(), Errno::LOOP);
    let mode = change(Change { mode: Some(0o777), ..Change::default() });
    assert_eq!(host.tree.change(link, None, &mode).unwrap_err(), Errno::OPNOTSUPP);
    let times = change(Change { modified: Some(Some(Time::default())), ..Change::default() });
    host.tree.change(link, None, &times).unwrap();
    assert_ne!(fs::metadata(&secret).unwrap().mtime(), 0);
    assert_eq!(fs::read_to_string(&secret).unwrap(), "secret");
    let made = host.tree.make_link(shared, &name("made"), b"/etc/shadow").unwrap();
    assert_eq!(host.tree.target(made.node).unwrap(), b"/etc/shadow");
}

/// A guest holds a directory that the host, or another process in league with it, replaces by a link to outside.
#[test]
fn a_directory_that_becomes_a_link_leads_nowhere() {
    let mut host = Host::new();
    fs::write(host.path("shared/inner/own"), "own").unwrap();
    let inner = host.node("shared/inner");
    fs::rename(host.path("shared/inner"), host.path("shared/was")).unwrap();
    symlink(host.dir.path(), host.path("shared/inner")).unwrap();
    assert_eq!(host.tree.lookup(inner, &name("secret")).unwrap_err(), Errno::NOENT);
    assert_eq!(host.walk("shared/inner/secret").unwrap_err(), Errno::NOTDIR);
    assert!(host.tree.lookup(inner, &name("own")).is_ok(), "it is the directory it was");
}

/// Ends the other thread, also when this one fails.
struct Ends<'a>(&'a std::sync::atomic::AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, std::sync::atomic::Ordering::Relaxed);
    }
}

/// What a guest could reach while another thread swaps a directory and a link is never outside.
#[test]
fn swapping_links_and_directories_in_a_race_never_leads_outside() {
    let mut host = Host::new();
    let (shared, outside) = (host.path("shared"), host.dir.path().to_owned());
    fs::write(shared.join("inner/secret"), "inside").unwrap();
    symlink(&outside, shared.join("link")).unwrap();
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let dir = reference(&shared);
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                let flags = rustix::fs::RenameFlags::EXCHANGE;
                rustix::fs::renameat_with(&dir, "inner", &dir, "link", flags).unwrap();
            }
        });
        let _ends = Ends(&done);
        let mut seen = 0;
        for _ in 0..20_000 {
            match host.read("shared/inner/secret") {
                Ok(text) => {
                    assert_eq!(text, "inside");
                    seen += 1;
                }
                Err(e) => assert!(matches!(e, Errno::NOTDIR | Errno::LOOP), "{e}"),
            }
            host.tree.clear();
        }
        assert!(seen > 0);
    });
}

#[test]
fn devices_pipes_and_sockets_cannot_be_reached_or_made() {
    let mut host = Host::new();
    let pipe = host.path("shared/pipe");
    mknodat(CWD, &pipe, rustix::fs::FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(host.path("shared/socket")).unwrap();
    for path in ["shared/pipe", "shared/socket"] {
        assert_eq!(host.walk(path).unwrap_err(), Errno::ACCESS);
    }
    let shared = host.node("shared");
    assert_eq!(host.tree.create(shared, &name("pipe"), 0o644, WRITE).unwrap_err(), Errno::ACCESS);
    for mode in [0o010_644, 0o020_644, 0o060_644, 0o140_644, 0o040_755] {
        assert_eq!(host.tree.make_file(shared, &name("x"), mode).unwrap_err(), Errno::PERM, "{mode:o}");
    }
    host.tree.make_file(shared, &name("x"), 0o100_644).unwrap();
    let refused = host.grants.add("pipe", reference(&pipe), false).unwrap_err().to_string();
    assert!(refused.contains("neither a regular file nor a directory"), "{refused}");
    let null = host.grants.add("null", reference(Path::new("/dev/null")), false).unwrap_err();
    assert!(matches!(null, GrantError::Kind(_)));
}

#[test]
fn read_only_grants_stay_as_they_are() {
    let mut host = Host::new();
    host.grants.add("fixed", reference(&host.path("shared")), false).unwrap();
    let (fixed, file) = (host.node("fixed"), host.node("fixed/file"));
    let truncate = OpenFlags { truncate: true, ..READ };
    let n = name("x");
    let handle = host.tree.open(file, READ).unwrap();
    host.tree.sync(file, handle, false).unwrap();
    for error in [
        host.tree.open(file, WRITE).unwrap_err(),
        host.tree.open(file, truncate).unwrap_err(),
        host.tree.create(fixed, &n, 0o644, WRITE).unwrap_err(),
        host.tree.create(fixed, &name("file"), 0o644, READ).unwrap_err(),
        host.tree.make_directory(fixed, &n, 0o755).unwrap_err(),
        host.tree.make_file(fixed, &n, 0o100_644).unwrap_err(),
        host.tree.make_link(fixed, &n, b"x").unwrap_err(),
        host.tree.link(file, fixed, &n).unwrap_err(),
        host.tree.remove(fixed, &name("file"), false).unwrap_err(),
        host.tree.rename((fixed, &name("file")), (fixed, &n), 0).unwrap_err(),
        host.tree.change(file, Some(handle), &Change { size: Some(0), ..Change::default() }).unwrap_err(),
        host.tree.change(file, None, &Change { mode: Some(0), ..Change::default() }).unwrap_err(),
        host.tree.change(file, None, &Change { accessed: Some(None), ..Change::default() }).unwrap_err(),
        host.tree.allocate(file, handle, 0, 100, FallocateFlags::empty()).unwrap_err(),
        write_at(&host.tree, file, handle, 0, false, "x").unwrap_err(),
        host.tree.copy((file, handle, 0), (file, handle, 5), 5).unwrap_err(),
    ] {
        assert_eq!(error, Errno::ROFS);
    }
    assert_eq!(fs::read(host.path("shared/file")).unwrap(), b"0123456789");
}

#[test]
fn nothing_crosses_from_one_grant_to_another() {
    let mut host = Host::new();
    fs::create_dir(host.path("second")).unwrap();
    host.grants.add("second", reference(&host.path("second")), true).unwrap();
    host.grants.add("again", reference(&host.path("shared")), false).unwrap();
    let (shared, second, file) = (host.node("shared"), host.node("second"), host.node("shared/file"));
    let n = name("file");
    assert_eq!(host.tree.rename((shared, &n), (second, &n), 0).unwrap_err(), Errno::XDEV);
    assert_eq!(host.tree.link(file, second, &n).unwrap_err(), Errno::XDEV);
    // The same file in another grant is another node, and as read-only as that grant.
    let again = host.node("again/file");
    assert_ne!(again, file);
    assert_eq!(host.tree.open(again, WRITE).unwrap_err(), Errno::ROFS);
    let inner = name("inner");
    assert_eq!(host.tree.rename((shared, &n), (shared, &inner), 4).unwrap_err(), Errno::INVAL, "whiteout");
    host.tree.rename((shared, &n), (shared, &inner), 2).unwrap();
    assert!(fs::metadata(host.path("shared/inner")).unwrap().is_file(), "exchanged");
    assert_eq!(host.tree.rename((shared, &n), (shared, &inner), 1).unwrap_err(), Errno::EXIST);
}

#[test]
fn a_file_grant_is_that_file_alone() {
    let mut host = Host::new();
    host.grants.add("rw", reference(&host.path("secret")), true).unwrap();
    let node = host.node("rw");
    assert_eq!(host.tree.lookup(node, &name("report")).unwrap_err(), Errno::NOTDIR);
    assert_eq!(host.tree.remove(node, &name("x"), false).unwrap_err(), Errno::NOTDIR);
    let shared = host.node("shared");
    assert_eq!(host.tree.link(node, shared, &name("x")).unwrap_err(), Errno::XDEV);
    let handle = host.tree.open(node, OpenFlags { truncate: true, ..WRITE }).unwrap();
    write_at(&host.tree, node, handle, 0, false, "changed").unwrap();
    assert_eq!(fs::read_to_string(host.path("secret")).unwrap(), "changed");
}

/// A descriptor that is open is used as it is: no other right to the file is needed.
#[test]
fn a_file_that_was_handed_in_open_is_not_opened_again() {
    let mut host = Host::new();
    let path = host.path("secret");
    let open_rw = || OwnedFd::from(fs::File::options().read(true).write(true).open(&path).unwrap());
    host.grants.add("open", open_rw(), true).unwrap();
    let node = host.node("open");
    let same = |flags| {
        let node = host.tree.node(node).unwrap();
        std::sync::Arc::ptr_eq(&host.tree.open_node(node, flags).unwrap(), &node.fd)
    };
    assert!(same(OFlags::RDONLY) && same(OFlags::WRONLY) && same(OFlags::RDWR));
    let handle = host.tree.open(node, OpenFlags { read: true, truncate: true, sync: true, ..WRITE }).unwrap();
    write_at(&host.tree, node, handle, 2, false, "ab").unwrap();
    assert_eq!(read_at(&host.tree, node, handle, 0).unwrap(), "\0\0ab");
    let append = fs::File::options().append(true).read(true).open(host.path("report")).unwrap();
    assert!(matches!(host.grants.add("log", append.into(), true), Err(GrantError::Append(_))));
}

#[test]
fn what_is_revoked_is_gone_at_once_and_closed_soon() {
    let mut host = Host::new();
    let (file, inner, report) = (host.node("shared/file"), host.node("shared/inner"), host.node("report"));
    let (handle, kept) = (host.tree.open(file, READ).unwrap(), host.tree.open(report, READ).unwrap());
    let dir = host.tree.open_directory(inner).unwrap();
    let descriptors = || fs::read_dir("/proc/self/fd").unwrap().count();
    let before = (host.tree.in_use(), descriptors());
    host.grants.remove("shared").unwrap();
    assert_eq!(host.tree.attributes(file).unwrap_err(), Errno::STALE);
    assert_eq!(read_at(&host.tree, file, handle, 0).unwrap_err(), Errno::STALE);
    // Not even under the number of a node that is still there.
    assert_eq!(read_at(&host.tree, report, handle, 0).unwrap_err(), Errno::STALE);
    assert_eq!(host.tree.entries(dir, 0, 4096, |_, _| true).unwrap_err(), Errno::STALE);
    assert_eq!(host.walk("shared").unwrap_err(), Errno::NOENT);
    host.tree.forget_revoked();
    assert_eq!(before.0, (4, 3));
    assert_eq!(host.tree.in_use(), (1, 1));
    assert_eq!(host.tree.attributes(file).unwrap_err(), Errno::STALE);
    assert_eq!(read_at(&host.tree, report, kept, 0).unwrap(), "a report");
    host.tree.release(handle);
    assert!(matches!(host.grants.remove("shared"), Err(GrantError::Missing(_))));
    // The same name again is another grant.
    host.grants.add("shared", reference(&host.path("shared")), false).unwrap();
    assert_ne!(host.node("shared/file"), file);
    assert_eq!(host.tree.attributes(file).unwrap_err(), Errno::STALE);
}

#[test]
fn grants_have_names_of_their_own() {
    let host = Host::new();
    for bad in ["", ".", "..", "a/b", "a\0b"] {
        let refused = host.grants.add(bad, reference(&host.path("secret")), false);
        assert!(matches!(refused, Err(GrantError::Name(_))), "{bad:?}");
    }
    let taken = host.grants.add("shared", reference(&host.path("secret")), false).unwrap_err().to_string();
    assert!(taken.contains("called shared already"), "{taken}");
}

#[test]
fn nodes_and_handles_are_bounded_and_forgotten() {
    let mut host = Host::new();
    let file = host.node("shared/file");
    host.tree.limits.nodes = host.tree.in_use().0;
    assert_eq!(host.walk("shared/inner").unwrap_err(), Errno::NFILE);
    assert_eq!(host.node("shared/file"), file, "one that is there is no new one");
    host.tree.limits.files = 2;
    let handle = host.tree.open(file, READ).unwrap();
    host.tree.open(file, READ).unwrap();
    assert_eq!(host.tree.open(file, READ).unwrap_err(), Errno::MFILE);
    host.tree.release(handle);
    host.tree.open(file, READ).unwrap();
    host.tree.limits.directories = 1;
    host.tree.open_directory(ROOT).unwrap();
    assert_eq!(host.tree.open_directory(ROOT).unwrap_err(), Errno::MFILE);
    // Told three times: forgotten after as many.
    host.tree.forget(file, 1);
    host.node("shared/file");
    host.tree.forget(file, 1);
    assert!(host.tree.attributes(file).is_ok());
    host.tree.forget(file, u64::MAX);
    assert_eq!(host.tree.attributes(file).unwrap_err(), Errno::STALE);
    host.tree.forget(file, 1);
    let mut tree = Tree::new(host.grants.clone(), u64::MAX).unwrap();
    assert_eq!(tree.lookup(ROOT, &name("report")).unwrap_err(), Errno::NFILE);
}

#[test]
fn files_with_their_owners_rights_are_not_written() {
    let mut host = Host::new();
    fs::set_permissions(host.path("shared/file"), fs::Permissions::from_mode(0o4755)).unwrap();
    let file = host.node("shared/file");
    assert_eq!(host.tree.attributes(file).unwrap().mode, 0o100_755);
    assert_eq!(host.tree.open(file, WRITE).unwrap_err(), Errno::PERM);
    assert!(host.tree.open(file, READ).is_ok());
}

#[test]
fn ranges_are_copied_reserved_and_searched() {
    let mut host = Host::new();
    let file = host.node("shared/file");
    let both = OpenFlags { read: true, ..WRITE };
    let handle = host.tree.open(file, both).unwrap();
    assert_eq!(host.tree.copy((file, handle, 0), (file, handle, 100), 5).unwrap(), 5);
    assert_eq!(read_at(&host.tree, file, handle, 99).unwrap(), "\0".to_owned() + "01234");
    host.tree.allocate(file, handle, 0, 1 << 20, FallocateFlags::empty()).unwrap();
    assert_eq!(host.tree.attributes(file).unwrap().size, 1 << 20);
    let collapse = FallocateFlags::COLLAPSE_RANGE;
    assert_eq!(host.tree.allocate(file, handle, 0, 4096, collapse).unwrap_err(), Errno::OPNOTSUPP);
    assert!(host.tree.seek(file, handle, 0, true).unwrap() > 0);
    assert_eq!(host.tree.seek(file, handle, u64::MAX, true).unwrap_err(), Errno::NXIO);
    assert!(read_at(&host.tree, file, handle, u64::MAX).is_err());
    assert!(host.tree.file_system(file).unwrap().is_some() && host.tree.file_system(ROOT).unwrap().is_none());
}

fn extended(text: &str) -> ExtendedName {
    ExtendedName::new(text.as_bytes()).unwrap()
}

#[test]
fn extended_attributes_are_those_of_users() {
    for (name, error) in [
        ("", Errno::RANGE),
        ("user.", Errno::OPNOTSUPP),
        ("users.a", Errno::OPNOTSUPP),
        ("security.capability", Errno::OPNOTSUPP),
        ("system.posix_acl_access", Errno::OPNOTSUPP),
        ("trusted.overlay.opaque", Errno::OPNOTSUPP),
        ("user.a\0b", Errno::INVAL),
    ] {
        assert_eq!(ExtendedName::new(name.as_bytes()), Err(error), "{name}");
    }
    assert_eq!(ExtendedName::new(&[b"user.".as_slice(), &[b'x'; 251]].concat()), Err(Errno::RANGE));

    let mut host = Host::new();
    let (file, dir, report) = (host.node("shared/file"), host.node("shared"), host.node("report"));
    for node in [file, dir] {
        host.tree.set_extended(node, &extended("user.a"), b"value", 0).unwrap();
        assert_eq!(host.tree.extended(node, &extended("user.a")).unwrap(), b"value");
        assert_eq!(host.tree.set_extended(node, &extended("user.a"), b"b", 1), Err(Errno::EXIST), "XATTR_CREATE");
        assert_eq!(host.tree.set_extended(node, &extended("user.b"), b"b", 2), Err(Errno::NODATA), "XATTR_REPLACE");
        assert_eq!(host.tree.set_extended(node, &extended("user.b"), b"b", 4), Err(Errno::INVAL));
    }
    // Those of another class are nobody's business.
    let path = host.path("shared/file");
    if rustix::process::geteuid().is_root() {
        rustix::fs::setxattr(&path, "trusted.hidden", b"x", rustix::fs::XattrFlags::empty()).unwrap();
    }
    assert_eq!(host.tree.list_extended(file).unwrap(), b"user.a\0");
    host.tree.remove_extended(file, &extended("user.a")).unwrap();
    assert_eq!(host.tree.extended(file, &extended("user.a")), Err(Errno::NODATA));
    assert_eq!(host.tree.list_extended(file).unwrap(), b"");

    // Not in the root, not through a link, not without the right to write, not when it was taken back.
    symlink("file", host.path("shared/link")).unwrap();
    let link = host.node("shared/link");
    assert_eq!(host.tree.set_extended(link, &extended("user.a"), b"b", 0), Err(Errno::PERM));
    assert_eq!(host.tree.extended(link, &extended("user.a")), Err(Errno::NODATA));
    assert_eq!(host.tree.set_extended(ROOT, &extended("user.a"), b"b", 0), Err(Errno::OPNOTSUPP));
    assert_eq!(host.tree.set_extended(report, &extended("user.a"), b"b", 0), Err(Errno::ROFS));
    assert_eq!(host.tree.remove_extended(report, &extended("user.a")), Err(Errno::ROFS));
    assert_eq!(host.tree.list_extended(report).unwrap(), b"");
    host.grants.remove("shared").unwrap();
    assert_eq!(host.tree.list_extended(file), Err(Errno::STALE));
}

#[test]
fn a_file_without_a_name_gets_one() {
    let mut host = Host::new();
    let dir = host.node("shared");
    let flags = OpenFlags { read: true, ..WRITE };
    let (found, handle) = host.tree.create_unnamed(dir, 0o640, flags).unwrap();
    assert_eq!((found.attributes.links, found.attributes.mode & 0o777), (0, 0o640));
    write_at(&host.tree, found.node, handle, 0, false, "hidden").unwrap();
    assert_eq!(list(&mut host.tree, dir), [".", "..", "file", "inner"]);
    host.tree.link(found.node, dir, &name("named")).unwrap();
    assert_eq!(fs::read_to_string(host.path("shared/named")).unwrap(), "hidden");

    // A second one is never seen, and there is none in the root, in a file, or where nothing may be written.
    let (found, handle) = host.tree.create_unnamed(dir, 0o600, WRITE).unwrap();
    host.tree.release(handle);
    host.tree.forget(found.node, 1);
    assert_eq!(host.tree.link(found.node, dir, &name("late")).unwrap_err(), Errno::STALE);
    let (file, report) = (host.node("shared/file"), host.node("report"));
    assert_eq!(host.tree.create_unnamed(ROOT, 0o600, WRITE).unwrap_err(), Errno::ROFS);
    assert_eq!(host.tree.create_unnamed(file, 0o600, WRITE).unwrap_err(), Errno::NOTDIR);
    assert_eq!(host.tree.create_unnamed(report, 0o600, WRITE).unwrap_err(), Errno::ROFS);
    assert!(host.tree.create_unnamed(dir, 0o600, READ).is_err(), "it would be of no use");
}

#[test]
fn what_is_reserved_at_once_is_bounded() {
    let mut host = Host::new();
    let node = host.node("shared/file");
    let handle = host.tree.open(node, WRITE).unwrap();
    let keep = FallocateFlags::KEEP_SIZE;
    assert_eq!(host.tree.allocate(node, handle, 0, u64::MAX >> 1, keep), Err(Errno::FBIG));
    assert_eq!(host.tree.allocate(node, handle, 0, (64 << 30) + 1, FallocateFlags::empty()), Err(Errno::FBIG));
    host.tree.allocate(node, handle, 0, 1 << 16, FallocateFlags::empty()).unwrap();
    assert_eq!(fs::metadata(host.path("shared/file")).unwrap().len(), 1 << 16);
    host.tree.sync_file_systems().unwrap();
}
