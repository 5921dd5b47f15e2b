//! [`VmConfig::check`]: does a configuration make sense, as far as its values tell?

use std::collections::BTreeMap;
use std::fmt::Display;
use std::path::Path;

use crate::{
    ConsoleConfig, ConsoleMode, DiskConfig, FIRST_GUEST_CID, FsConfig, GpuConfig, HostFacts, ImageType, NetConfig,
    PmemConfig, Problem, ProblemKind, Unsupported, VmConfig,
};

/// A serial number is at most this long (virtio 1.3, 5.2.6: `VIRTIO_BLK_ID_BYTES`).
const DISK_SERIAL_BYTES: usize = 20;
/// A file system's name is at most this long (virtio 1.3, 5.11.4).
const FS_TAG_BYTES: usize = 36;
/// The largest virtqueue (virtio 1.3, 2.7).
const MAX_QUEUE_SIZE: u16 = 32768;
/// The smallest MTU (virtio 1.3, 5.1.4.1).
const MIN_MTU: u16 = 68;
/// A name of an interface is shorter than this (netdevice(7): `IFNAMSIZ`).
const INTERFACE_NAME_BYTES: usize = 16;
/// The smallest useful graphics window: one 4K frame fits.
const MIN_GPU_WINDOW: u64 = 64 << 20;

impl VmConfig {
    /// Everything that is wrong with the values, in the order of the sections; empty means nothing is. No file is
    /// looked at and the configuration is not changed.
    pub fn check(&self, host: &HostFacts) -> Vec<Problem> {
        let mut found = Found::default();
        self.check_cpus(host, &mut found);
        self.check_memory(host, &mut found);
        self.check_payload(&mut found);
        for (index, disk) in self.disks.iter().enumerate() {
            check_disk(&format!("disks[{index}]"), disk, &mut found);
        }
        for (index, pmem) in self.pmem.iter().enumerate() {
            check_pmem(&format!("pmem[{index}]"), pmem, &mut found);
        }
        for (index, net) in self.net.iter().enumerate() {
            check_net(&format!("net[{index}]"), net, &mut found);
        }
        self.check_consoles(&mut found);
        self.check_vsock(&mut found);
        if self.rng.src.as_os_str().is_empty() {
            found.value("rng.src", "the path is empty; the usual one is /dev/urandom");
        }
        found.unsupported("rng", &self.rng.unsupported);
        for (index, gpu) in self.gpu.iter().enumerate() {
            check_gpu(&format!("gpu[{index}]"), gpu, &mut found);
        }
        for (index, fs) in self.fs.iter().enumerate() {
            check_fs(&format!("fs[{index}]"), fs, &self.fs[..index], &mut found);
        }
        self.check_platform(&mut found);
        self.check_files(&mut found);
        self.check_copies(&mut found);
        self.check_sockets(&mut found);
        self.check_ids(&mut found);
        found.unsupported("", &self.unsupported);
        found.0
    }

    fn check_cpus(&self, host: &HostFacts, found: &mut Found) {
        let cpus = &self.cpus;
        if cpus.boot_vcpus == 0 {
            found.value("cpus.boot_vcpus", "a machine needs at least 1 CPU");
        }
        if cpus.boot_vcpus > cpus.max_vcpus {
            found.value(
                "cpus.boot_vcpus",
                format!("{} is more than the maximum of {} (max_vcpus)", cpus.boot_vcpus, cpus.max_vcpus),
            );
        }
        if cpus.max_vcpus > host.max_vcpus {
            found.value(
                "cpus.max_vcpus",
                format!("{} is more than the {} one machine can have here", cpus.max_vcpus, host.max_vcpus),
            );
        }
        found.unsupported("cpus", &cpus.unsupported);
    }

    fn check_memory(&self, host: &HostFacts, found: &mut Found) {
        let memory = &self.memory;
        if memory.size == 0 {
            found.value("memory.size", "a machine needs memory; give a size such as 512M");
        } else if memory.size > host.memory {
            found.value(
                "memory.size",
                format!("{} is more than the {} this host has", mebibytes(memory.size), mebibytes(host.memory)),
            );
        }
        if !memory.size.is_multiple_of(host.page_size) {
            found.value(
                "memory.size",
                format!("{} bytes is not a multiple of the page size of {} bytes", memory.size, host.page_size),
            );
        }
        if memory.hugepages {
            found.not_supported("memory.hugepages");
        }
        found.unsupported("memory", &memory.unsupported);
    }

    fn check_payload(&self, found: &mut Found) {
        let Some(payload) = &self.payload else {
            return found.no_payload();
        };
        if payload.firmware.is_some() {
            found.add(
                ProblemKind::NotSupported,
                "payload.firmware",
                "booting firmware is not supported yet; give a kernel instead",
            );
        } else if payload.kernel.as_deref().is_none_or(is_empty) {
            found.no_payload();
        }
        if payload.initramfs.as_deref().is_some_and(is_empty) {
            found.value("payload.initramfs", "the path is empty; leave it out for none");
        }
        if payload.cmdline.as_deref().is_some_and(|line| line.contains('\0')) {
            found.value("payload.cmdline", "a command line cannot contain a zero character");
        }
        found.unsupported("payload", &payload.unsupported);
    }

    fn check_consoles(&self, found: &mut Found) {
        for (name, config) in [("serial", &*self.serial), ("console", &self.console)] {
            match config.mode {
                ConsoleMode::File if config.file.as_deref().is_none_or(is_empty) => {
                    found.value(format!("{name}.file"), "mode File needs the path of the output file");
                }
                ConsoleMode::Socket => found.add(
                    ProblemKind::NotSupported,
                    format!("{name}.mode"),
                    "Socket is not supported yet; use Pty, Tty, File, Null or Off",
                ),
                _ => {}
            }
            found.unsupported(name, &config.unsupported);
        }
        if self.serial.mode == ConsoleMode::Tty && self.console.mode == ConsoleMode::Tty {
            found.conflict(
                "console.mode",
                "serial and console cannot both be on the terminal (Tty); set one of them to Off or Null",
            );
        }
        let output = |config: &ConsoleConfig| config.file.clone().filter(|_| config.mode == ConsoleMode::File);
        if let Some(file) = output(&self.serial)
            && output(&self.console).as_ref() == Some(&file)
        {
            found.conflict(
                "console.file",
                format!("serial and console cannot both write to {}; give each a file of its own", file.display()),
            );
        }
    }

    fn check_vsock(&self, found: &mut Found) {
        let Some(vsock) = &self.vsock else { return };
        if vsock.cid < FIRST_GUEST_CID || vsock.cid == u32::MAX {
            found.value(
                "vsock.cid",
                format!("{} is reserved; guests have {FIRST_GUEST_CID} to {}", vsock.cid, u32::MAX - 1),
            );
        }
        if is_empty(&vsock.socket) {
            found.value("vsock.socket", "the path is empty; give the path of the Unix socket to be made");
        }
        found.unsupported("vsock", &vsock.unsupported);
    }

    fn check_platform(&self, found: &mut Found) {
        let Some(platform) = &self.platform else { return };
        if platform.num_pci_segments != 1 {
            found.add(
                ProblemKind::NotSupported,
                "platform.num_pci_segments",
                "1 is the only number of PCI segments supported yet",
            );
        }
        found.unsupported("platform", &platform.unsupported);
    }

    fn check_copies(&self, found: &mut Found) {
        for (i, _) in self.pmem.iter().enumerate().filter(|(_, pmem)| pmem.copy && !pmem.discard_writes) {
            let why = "a copy would lose what the guest writes; add discard_writes=on if that is wanted";
            found.conflict(format!("pmem[{i}].copy"), why);
        }
    }

    /// Two devices may share an image only if neither writes to it.
    fn check_files(&self, found: &mut Found) {
        let disks =
            self.disks.iter().enumerate().map(|(i, disk)| (format!("disks[{i}].path"), &disk.path, !disk.readonly));
        let pmem =
            self.pmem.iter().enumerate().map(|(i, pmem)| (format!("pmem[{i}].file"), &pmem.file, !pmem.discard_writes));
        let mut seen: BTreeMap<&Path, (String, bool)> = BTreeMap::new();
        for (field, path, writes) in disks.chain(pmem).filter(|(_, path, _)| !is_empty(path)) {
            match seen.get_mut(path.as_path()) {
                Some((other, other_writes)) if writes || *other_writes => {
                    found.conflict(
                        field,
                        format!(
                            "{} is already used by {other}, and one of the two writes to it; make both read-only or \
                             give each an image of its own",
                            path.display()
                        ),
                    );
                    *other_writes |= writes;
                }
                Some(_) => {}
                None => drop(seen.insert(path, (field, writes))),
            }
        }
    }

    fn check_sockets(&self, found: &mut Found) {
        let vsock = self.vsock.iter().map(|vsock| ("vsock.socket".to_owned(), Some(&vsock.socket)));
        let gpu = self.gpu.iter().enumerate().flat_map(|(i, gpu)| {
            [(format!("gpu[{i}].wayland"), gpu.wayland.as_ref()), (format!("gpu[{i}].socket"), gpu.socket.as_ref())]
        });
        let net = self.net.iter().enumerate().map(|(i, net)| (format!("net[{i}].socket"), net.socket.as_ref()));
        let mut seen: BTreeMap<&Path, String> = BTreeMap::new();
        for (field, path) in vsock.chain(gpu).chain(net) {
            let Some(path) = path.filter(|path| !is_empty(path)) else { continue };
            match seen.get(path.as_path()) {
                Some(other) => found.conflict(
                    field,
                    format!(
                        "the socket {} is already used by {other}; give each device a socket of its own",
                        path.display()
                    ),
                ),
                None => drop(seen.insert(path, field)),
            }
        }
    }

    fn check_ids(&self, found: &mut Found) {
        let disks = self.disks.iter().enumerate().map(|(i, disk)| (format!("disks[{i}].id"), &disk.id));
        let pmem = self.pmem.iter().enumerate().map(|(i, pmem)| (format!("pmem[{i}].id"), &pmem.id));
        let vsock = self.vsock.iter().map(|vsock| ("vsock.id".to_owned(), &vsock.id));
        let gpu = self.gpu.iter().enumerate().map(|(i, gpu)| (format!("gpu[{i}].id"), &gpu.id));
        let fs = self.fs.iter().enumerate().map(|(i, fs)| (format!("fs[{i}].id"), &fs.id));
        let net = self.net.iter().enumerate().map(|(i, net)| (format!("net[{i}].id"), &net.id));
        let mut seen: BTreeMap<&str, String> = BTreeMap::new();
        for (field, id) in disks.chain(pmem).chain(vsock).chain(gpu).chain(fs).chain(net) {
            let Some(id) = id.as_deref() else { continue };
            if id.is_empty() || id.starts_with('_') {
                found.value(
                    field,
                    format!(
                        "\"{id}\" cannot be used: a name is not empty, and names that start with _ are made up here"
                    ),
                );
            } else if let Some(other) = seen.get(id) {
                found.conflict(field, format!("\"{id}\" is already the name of {other}; each device needs its own"));
            } else {
                seen.insert(id, field);
            }
        }
    }
}

fn check_disk(name: &str, disk: &DiskConfig, found: &mut Found) {
    if is_empty(&disk.path) {
        found.value(format!("{name}.path"), "the path is empty; give the image file");
    }
    if let Some(serial) = disk.serial.as_deref().filter(|serial| serial.len() > DISK_SERIAL_BYTES) {
        found.value(
            format!("{name}.serial"),
            format!("{} bytes is too long; a serial number has at most {DISK_SERIAL_BYTES}", serial.len()),
        );
    }
    if disk.num_queues == 0 {
        found.value(format!("{name}.num_queues"), "a disk needs at least 1 queue");
    }
    if !disk.queue_size.is_power_of_two() || disk.queue_size > MAX_QUEUE_SIZE {
        found.value(
            format!("{name}.queue_size"),
            format!("{} is not a power of two up to {MAX_QUEUE_SIZE}", disk.queue_size),
        );
    }
    if !matches!(disk.image_type, None | Some(ImageType::Raw | ImageType::Unknown)) {
        found.add(
            ProblemKind::NotSupported,
            format!("{name}.image_type"),
            "only raw images are supported yet; convert it with qemu-img convert -O raw",
        );
    }
    found.unsupported(name, &disk.unsupported);
}

fn check_pmem(name: &str, pmem: &PmemConfig, found: &mut Found) {
    if is_empty(&pmem.file) {
        found.value(format!("{name}.file"), "the path is empty; give the image file");
    }
    if pmem.size == Some(0) {
        found.value(format!("{name}.size"), "the size is 0; leave it out to take the size of the file");
    }
    found.unsupported(name, &pmem.unsupported);
}

fn check_net(name: &str, net: &NetConfig, found: &mut Found) {
    let ways = [net.tap.is_some(), net.socket.is_some(), net.fd.is_some()];
    if ways.iter().filter(|way| **way).count() > 1 {
        found.conflict(name, "an interface has one back-end; keep one of tap, socket and fd");
    }
    if net.socket.as_deref().is_some_and(is_empty) {
        found.value(format!("{name}.socket"), "the path is empty; give the socket of passt or the like");
    }
    if let Some(tap) = net.tap.as_deref().filter(|tap| tap.is_empty() || tap.len() >= INTERFACE_NAME_BYTES) {
        found
            .value(format!("{name}.tap"), format!("\"{tap}\" is no name of an interface; give that of the host's tap"));
    }
    if let Some(mac) = net.mac.filter(|mac| !mac.is_unicast()) {
        found.value(
            format!("{name}.mac"),
            format!("{mac} cannot be an interface's; the first byte is even, such as 02"),
        );
    }
    if let Some(mtu) = net.mtu.filter(|mtu| *mtu < MIN_MTU) {
        found.value(format!("{name}.mtu"), format!("{mtu} is less than the {MIN_MTU} that a network has at least"));
    }
    found.unsupported(name, &net.unsupported);
}

fn check_gpu(name: &str, gpu: &GpuConfig, found: &mut Found) {
    if gpu.socket.is_some() {
        found.add(
            ProblemKind::NotSupported,
            format!("{name}.socket"),
            "a vhost-user graphics process is not supported yet; use the cross-domain device with wayland, the \
             compositor's socket",
        );
    } else if gpu.wayland.as_deref().is_none_or(is_empty) {
        found.value(format!("{name}.wayland"), "the socket of the Wayland compositor is missing");
    }
    if !gpu.window.is_power_of_two() || gpu.window < MIN_GPU_WINDOW {
        found.value(
            format!("{name}.window"),
            format!("{} bytes is not a power of two from {} on", gpu.window, mebibytes(MIN_GPU_WINDOW)),
        );
    }
    found.unsupported(name, &gpu.unsupported);
}

fn check_fs(name: &str, fs: &FsConfig, before: &[FsConfig], found: &mut Found) {
    if fs.socket.is_some() {
        found.add(
            ProblemKind::NotSupported,
            format!("{name}.socket"),
            "a vhost-user process needs guest memory that it shares, and clones need memory of their own; leave socket \
             out: the VMM serves the file system itself, and vm.add-grant puts files and directories into it",
        );
    }
    let tag = fs.tag.as_str();
    if tag.is_empty() || tag.len() > FS_TAG_BYTES || tag.contains('\0') {
        found.value(
            format!("{name}.tag"),
            format!("\"{tag}\" cannot be used: a name has 1 to {FS_TAG_BYTES} bytes and no zero character"),
        );
    } else if before.iter().any(|other| other.tag == tag) {
        found.conflict(
            format!("{name}.tag"),
            format!("\"{tag}\" is the name of another file system; give each its own"),
        );
    }
    found.unsupported(name, &fs.unsupported);
}

fn is_empty(path: &Path) -> bool {
    path.as_os_str().is_empty()
}

fn mebibytes(bytes: u64) -> impl Display {
    format!("{} MiB", bytes >> 20)
}

/// The problems found so far.
#[derive(Default)]
struct Found(Vec<Problem>);

impl Found {
    fn add(&mut self, kind: ProblemKind, field: impl Into<String>, text: impl Into<String>) {
        self.0.push(Problem { kind, field: field.into(), text: text.into() });
    }

    fn value(&mut self, field: impl Into<String>, text: impl Into<String>) {
        self.add(ProblemKind::Value, field, text);
    }

    fn conflict(&mut self, field: impl Into<String>, text: impl Into<String>) {
        self.add(ProblemKind::Conflict, field, text);
    }

    fn not_supported(&mut self, field: impl Into<String>) {
        self.add(ProblemKind::NotSupported, field, "this is not supported yet; leave it out");
    }

    fn no_payload(&mut self) {
        self.add(ProblemKind::NoPayload, "payload.kernel", "there is nothing to boot; give a kernel");
    }

    fn unsupported<S>(&mut self, section: &str, fields: &Unsupported<S>) {
        for name in fields.names() {
            let field = if section.is_empty() { name.to_owned() } else { format!("{section}.{name}") };
            self.not_supported(field);
        }
    }
}
