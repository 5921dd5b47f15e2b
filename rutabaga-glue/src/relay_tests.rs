//! What the relay takes for what.

use std::fs::File;
use std::os::fd::AsFd;

use super::*;

#[test]
fn kinds_of_files() {
    let class = |fd: &dyn AsFd| classify(fd.as_fd());
    let memory = rustix::fs::memfd_create("m", MemfdFlags::CLOEXEC).unwrap();
    assert_eq!(class(&memory), Class::Memory);
    rustix::fs::ftruncate(&memory, 1 << 32).unwrap();
    assert_eq!(class(&memory), Class::Other, "its size is no u32");
    let (read, write) = rustix::pipe::pipe().unwrap();
    assert_eq!(class(&read), Class::Other);
    assert_eq!(class(&write), Class::Pipe);
    let (socket, _) = std::os::unix::net::UnixStream::pair().unwrap();
    assert_eq!(class(&socket), Class::Other);
    assert_eq!(class(&rustix::event::eventfd(0, EventfdFlags::empty()).unwrap()), Class::Other);
    assert_eq!(class(&File::open("/dev/null").unwrap()), Class::Other, "as a device for leasing displays would be");
    assert_eq!(class(&File::open("/").unwrap()), Class::Other);
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(class(&File::create(dir.path().join("w")).unwrap()), Class::Other, "cannot be read, so not mapped");
}

#[test]
fn nobody_else_finds_the_socket() {
    let relay = Relay::new("/nowhere".into(), Bounds::default()).unwrap();
    let path = relay.path();
    assert!(path.starts_with("/proc/self/fd"));
    let name = std::fs::read_link(&path).unwrap();
    assert!(name.to_string_lossy().ends_with("(deleted)"), "{}", name.display());
    assert!(std::os::unix::net::UnixStream::connect(&path).is_ok());
}
