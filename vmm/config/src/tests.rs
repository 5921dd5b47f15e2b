//! Tests of the configuration as a whole: the JSON of real users, the flags, the checks.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

const HOST: HostFacts = HostFacts { memory: 8 << 30, page_size: 4096, max_vcpus: 254, file_sizes: BTreeMap::new() };

fn bootable() -> VmConfig {
    let payload = PayloadConfig { kernel: Some("/boot/vmlinux".into()), ..Default::default() };
    VmConfig { payload: Some(payload), ..Default::default() }
}

fn problems(config: &VmConfig) -> Vec<String> {
    config.check(&HOST).iter().map(ToString::to_string).collect()
}

#[track_caller]
fn assert_problem(config: &VmConfig, kind: ProblemKind, field: &str, text: &str) {
    let found = config.check(&HOST);
    let matching = |problem: &&Problem| problem.kind == kind && problem.field == field && problem.text.contains(text);
    assert!(found.len() == 1 && found.iter().find(matching).is_some(), "{found:?}");
}

/// What Spectrum's start-vmm sends (its schema, with paths of our own).
const SPECTRUM: &str = r#"{
    "console": {"mode": "Pty", "file": null},
    "disks": [
        {"path": "/img/blk/root.img", "readonly": true, "disable_io_uring": true, "disable_aio": true},
        {"path": "/img/blk/data.img", "readonly": true, "disable_io_uring": true, "disable_aio": true}
    ],
    "fs": [{"socket": "/run/x/virtiofsd.sock", "tag": "host"}],
    "gpu": [{"socket": "/run/x/crosvm.sock"}],
    "memory": {"size": 1073741824, "shared": true},
    "net": [{"vhost_user": true, "vhost_socket": "/run/router/p", "id": "sys.netvm", "mac": "02:00:aa:bb:cc:dd"}],
    "payload": {"kernel": "/img/vmlinux", "cmdline": "console=ttyS0 root=PARTLABEL=root"},
    "serial": {"mode": "File", "file": "/run/vm/serial"},
    "vsock": {"cid": 3, "socket": "/run/vsock/x/vsock"},
    "landlock_enable": true,
    "landlock_rules": [{"path": "/sys/devices", "access": "rw"}, {"path": "/dev/vfio", "access": "rw"}]
}"#;

#[test]
fn spectrums_json_is_understood_to_the_last_field() {
    let config = VmConfig::from_json(SPECTRUM.as_bytes()).unwrap();
    let disk = |path: &str| DiskConfig {
        path: path.into(),
        readonly: true,
        disable_io_uring: true,
        disable_aio: true,
        ..Default::default()
    };
    let rule = |path: &str| LandlockRule { path: path.into(), access: LandlockAccess::ReadWrite };
    let serial = ConsoleConfig { file: Some("/run/vm/serial".into()), ..ConsoleConfig::of(ConsoleMode::File) };
    let expected = VmConfig {
        memory: MemoryConfig { size: 1 << 30, shared: true, ..Default::default() },
        payload: Some(PayloadConfig {
            kernel: Some("/img/vmlinux".into()),
            cmdline: Some("console=ttyS0 root=PARTLABEL=root".into()),
            ..Default::default()
        }),
        disks: vec![disk("/img/blk/root.img"), disk("/img/blk/data.img")],
        serial: SerialConfig(serial),
        console: ConsoleConfig::of(ConsoleMode::Pty),
        vsock: Some(VsockConfig { cid: 3, socket: "/run/vsock/x/vsock".into(), ..Default::default() }),
        gpu: vec![GpuConfig { socket: Some("/run/x/crosvm.sock".into()), ..Default::default() }],
        fs: vec![FsConfig { tag: "host".into(), socket: Some("/run/x/virtiofsd.sock".into()), ..Default::default() }],
        net: vec![NetConfig {
            id: Some("sys.netvm".into()),
            mac: Some("02:00:aa:bb:cc:dd".parse().unwrap()),
            unsupported: config.net[0].unsupported.clone(),
            ..Default::default()
        }],
        landlock_enable: true,
        landlock_rules: vec![rule("/sys/devices"), rule("/dev/vfio")],
        unsupported: config.unsupported.clone(),
        ..Default::default()
    };
    assert_eq!(config, expected);
    let fields: Vec<_> = config.check(&HOST).into_iter().map(|problem| (problem.kind, problem.field)).collect();
    let expected = ["net[0].vhost_socket", "net[0].vhost_user", "gpu[0].socket", "fs[0].socket"];
    let expected = expected.map(|field| (ProblemKind::NotSupported, field.to_owned()));
    assert_eq!(fields, expected);
}

#[test]
fn an_empty_object_means_the_defaults() {
    let config = VmConfig::from_json(b"{}").unwrap();
    assert_eq!(config, VmConfig::default());
    assert_eq!((config.cpus.boot_vcpus, config.cpus.max_vcpus, config.memory.size), (1, 1, 512 << 20));
    assert_eq!((config.serial.mode, config.console.mode), (ConsoleMode::Null, ConsoleMode::Tty));
    assert_eq!(config.rng.src.to_str(), Some("/dev/urandom"));
    assert_problem(&config, ProblemKind::NoPayload, "payload.kernel", "nothing to boot");
}

#[test]
fn null_is_absent_and_unknown_fields_are_ignored() {
    let text = br#"{"cpus": null, "memory": {"size": null, "shared": null, "colour": 3}, "disks": null,
        "payload": {"kernel": "/k", "cmdline": null}, "net": null, "fs": [], "balloon": null, "no_such_section": {},
        "pmem": [{"file": "/p", "size": null, "id": null, "pci_segment": 0, "iommu": false}], "vsock": null,
        "debug_console": {"file": null, "mode": "Off", "iobase": 233}, "watchdog": false, "rng": {}}"#;
    let config = VmConfig::from_json(text).unwrap();
    assert_eq!(problems(&config), Vec::<String>::new());
    assert_eq!(config.memory, MemoryConfig::default());
    assert_eq!(config.pmem, vec![PmemConfig { file: "/p".into(), ..Default::default() }]);
}

#[test]
fn what_cloud_hypervisor_has_and_we_do_not_is_reported() {
    let text = br#"{"payload": {"kernel": "/k"}, "watchdog": true, "memory": {"hugepages": true, "zones": [{}]},
        "cpus": {"boot_vcpus": 2, "features": {"amx": true}}, "balloon": {"size": 1, "deflate_on_oom": false},
        "disks": [{"path": "/d", "vhost_user": true}, {"path": "/q", "image_type": "Qcow2"}],
        "serial": {"mode": "Socket", "socket": "/s"}, "platform": {"num_pci_segments": 2, "uuid": "x"}}"#;
    let found = VmConfig::from_json(text).unwrap().check(&HOST);
    assert!(found.iter().all(|problem| problem.kind == ProblemKind::NotSupported), "{found:?}");
    let fields: Vec<_> = found.iter().map(|problem| problem.field.as_str()).collect();
    let expected = [
        "cpus.features",
        "memory.hugepages",
        "disks[0].vhost_user",
        "disks[1].image_type",
        "serial.mode",
        "platform.num_pci_segments",
        "platform.uuid",
        "balloon",
        "watchdog",
    ];
    // An array of empty objects is not empty.
    assert_eq!(fields.iter().filter(|field| **field == "memory.zones").count(), 1);
    assert_eq!(fields.iter().filter(|field| **field != "memory.zones").copied().collect::<Vec<_>>(), expected);
}

#[test]
fn json_survives_a_round_trip() {
    let mut config = VmConfig::from_json(SPECTRUM.as_bytes()).unwrap();
    config.gpu = vec![GpuConfig::parse("cross-domain,wayland=/w,window=1G").unwrap()];
    config.pmem = vec![PmemConfig::parse("file=/p,size=2M,discard_writes=on,id=p0").unwrap()];
    config.cpus = CpusConfig::parse("boot=2,max=4").unwrap();
    config.platform = Some(PlatformConfig::default());
    for config in [config, VmConfig::default()] {
        let text = serde_json::to_vec(&config).unwrap();
        assert_eq!(VmConfig::from_json(&text).unwrap(), config);
    }
}

#[test]
fn json_errors_name_the_field() {
    let error = |text: &str| VmConfig::from_json(text.as_bytes()).unwrap_err().to_string();
    assert!(error(r#"{"memory": {"size": "512M"}}"#).starts_with("in the configuration, memory.size: invalid type"));
    assert!(error(r#"{"disks": [{"path": "/a"}, {"readonly": true}]}"#).contains("disks[1]: missing field `path`"));
    assert!(error(r#"{"serial": {"mode": "Loud"}}"#).contains("serial.mode: unknown variant `Loud`"));
    assert!(error(r#"{"cpus": {"boot_vcpus": -1}}"#).contains("cpus"));
    assert!(error("[]").starts_with("in the configuration, top level: invalid type"));
    assert!(error("{").starts_with("the configuration is not valid JSON: EOF"));
    assert!(error(&"[".repeat(100_000)).contains("recursion limit"));
}

#[test]
fn flags_are_read() {
    assert_eq!(CpusConfig::parse("boot=4").unwrap().max_vcpus, 4);
    let memory = MemoryConfig::parse("size=256M,shared=off,hotplug_method=acpi,mergeable=off").unwrap();
    assert_eq!(memory, MemoryConfig { size: 256 << 20, ..Default::default() });
    let disk =
        DiskConfig::parse("path=\"/a,b\",readonly=yes,id=x,queue_size=256,image_type=raw,_disable_aio=on").unwrap();
    let expected = DiskConfig {
        path: "/a,b".into(),
        readonly: true,
        id: Some("x".into()),
        queue_size: 256,
        disable_aio: true,
        image_type: Some(ImageType::Raw),
        ..Default::default()
    };
    assert_eq!(disk, expected);
    assert_eq!(SerialConfig::parse("tty").unwrap().mode, ConsoleMode::Tty);
    assert_eq!(ConsoleConfig::parse("file=/o").unwrap().file, Some("/o".into()));
    assert_eq!(VsockConfig::parse("cid=3,socket=/s").unwrap().cid, 3);
    assert_eq!(RngConfig::parse("src=/dev/random").unwrap().src.to_str(), Some("/dev/random"));
    let gpu = GpuConfig::parse("cross-domain,wayland=/w").unwrap();
    assert_eq!(gpu, GpuConfig { wayland: Some("/w".into()), ..Default::default() });
    assert_eq!(GpuConfig::parse("socket=/s").unwrap().socket, Some("/s".into()));
    assert_eq!(LandlockRule::parse("path=/d,access=rw").unwrap().access, LandlockAccess::ReadWrite);
    assert_eq!(PlatformConfig::parse("num_pci_segments=1").unwrap(), PlatformConfig::default());
}

#[test]
fn every_flag_mistake_gets_one_clear_sentence() {
    let disk = |text: &str| DiskConfig::parse(text).unwrap_err().to_string();
    assert!(disk("pth=/a").starts_with("--disk: unknown key \"pth\" (did you mean \"path\"?); accepted: path=, "));
    assert!(disk("zzzzzzzzzz=/a").starts_with("--disk: unknown key \"zzzzzzzzzz\"; accepted: path=, "));
    assert_eq!(disk("readonly=on"), "--disk: path is missing; give path=FILE");
    assert_eq!(disk("path="), "--disk: path is missing; give path=FILE");
    assert_eq!(disk("path=/a,path=/b"), "--disk: path is given twice; keep one of them");
    assert_eq!(disk("path"), "--disk: path needs a value: write path=VALUE");
    assert_eq!(disk("path=/a,vhost_user=on"), "--disk: vhost_user is not supported yet; leave it out");
    assert!(disk("path=/a,readonly=maybe").starts_with("--disk: readonly=maybe is not on or off"));
    assert!(disk("path=/a,queue_size=70000").contains("queue_size=70000 is not a whole number"));
    assert_eq!(disk("path=\"/a,id=x"), "--disk: a quote or bracket is not closed in \"path=\"/a,id=x\"");
    assert!(disk("").starts_with("--disk: the value is empty; accepted: path=, "));
    assert!(disk("path=/a,").starts_with("--disk: unknown key \"\""));
    let memory = MemoryConfig::parse("size=1Q").unwrap_err().to_string();
    assert_eq!(memory, "--memory: size=1Q is not a size such as 512M, 2G or a number of bytes");
    let serial = |text: &str| SerialConfig::parse(text).unwrap_err().to_string();
    assert!(serial("ttty").contains("did you mean \"tty\"?"));
    assert_eq!(serial("tty,null"), "--serial: give exactly one of tty, pty, file=PATH, null and off");
    assert_eq!(serial("file="), "--serial: file is missing; give file=PATH");
    let gpu = |text: &str| GpuConfig::parse(text).unwrap_err().to_string();
    assert!(gpu("cross-domian,wayland=/w").contains("did you mean \"cross-domain\"?"));
    assert_eq!(gpu("cross-domain"), "--gpu: wayland is missing; give wayland=SOCKET");
    assert!(gpu("wayland=/w").contains("cross-domain,wayland=SOCKET"));
    assert_eq!(VsockConfig::parse("socket=/s").unwrap_err().to_string(), "--vsock: cid is missing; give cid=3");
}

#[test]
fn sizes() {
    for (text, bytes) in [
        ("0", 0),
        ("4096", 4096),
        ("1K", 1024),
        ("256M", 256 << 20),
        ("2MiB", 2 << 20),
        ("1g", 1 << 30),
        ("3T", 3 << 40),
    ] {
        assert_eq!(parse_size(text), Some(bytes), "{text}");
    }
    for text in ["", "M", "-1", "1.5G", "1 M", "0x10", "1Mi", "99999999999999999999", "18446744073709551615K"] {
        assert_eq!(parse_size(text), None, "{text}");
    }
}

#[test]
fn values_out_of_range_are_found() {
    let check = |change: fn(&mut VmConfig), field: &str, text: &str| {
        let mut config = bootable();
        change(&mut config);
        let before = config.clone();
        assert_problem(&config, ProblemKind::Value, field, text);
        assert_eq!(config, before);
    };
    check(|config| config.memory.size = 0, "memory.size", "needs memory");
    check(|config| config.memory.size = 9 << 30, "memory.size", "9216 MiB is more than the 8192 MiB this host has");
    check(|config| config.memory.size = (512 << 20) + 1, "memory.size", "not a multiple of the page size");
    check(|config| config.cpus.boot_vcpus = 0, "cpus.boot_vcpus", "at least 1");
    check(|config| config.cpus.boot_vcpus = 2, "cpus.boot_vcpus", "more than the maximum of 1");
    check(|config| config.cpus.max_vcpus = 255, "cpus.max_vcpus", "254");
    check(|config| config.rng.src = "".into(), "rng.src", "empty");
    check(|config| config.serial.mode = ConsoleMode::File, "serial.file", "path");
    for cid in [0, 2, u32::MAX] {
        let config =
            VmConfig { vsock: Some(VsockConfig { cid, socket: "/s".into(), ..Default::default() }), ..bootable() };
        assert_problem(&config, ProblemKind::Value, "vsock.cid", "reserved");
    }
    let with_disk = |disk: DiskConfig| VmConfig { disks: vec![disk], ..bootable() };
    let disk = || DiskConfig { path: "/d".into(), ..Default::default() };
    let serial = Some("x".repeat(21));
    assert_problem(&with_disk(DiskConfig { serial, ..disk() }), ProblemKind::Value, "disks[0].serial", "21 bytes");
    for queue_size in [0, 3, 65535] {
        let config = with_disk(DiskConfig { queue_size, ..disk() });
        assert_problem(&config, ProblemKind::Value, "disks[0].queue_size", "power of two");
    }
    let config = with_disk(DiskConfig { id: Some("_x".into()), ..disk() });
    assert_problem(&config, ProblemKind::Value, "disks[0].id", "start with _");
    assert_problem(&with_disk(DiskConfig::default()), ProblemKind::Value, "disks[0].path", "empty");
}

#[test]
fn conflicts_are_found() {
    let disk = |path: &str, readonly, id: Option<&str>| DiskConfig {
        path: path.into(),
        readonly,
        id: id.map(Into::into),
        ..Default::default()
    };
    let config = VmConfig { disks: vec![disk("/d", true, None), disk("/d", false, None)], ..bootable() };
    assert_problem(&config, ProblemKind::Conflict, "disks[1].path", "/d is already used by disks[0].path");
    let config = VmConfig { disks: vec![disk("/d", true, None), disk("/d", true, None)], ..bootable() };
    assert_eq!(problems(&config), Vec::<String>::new());

    let pmem = PmemConfig { file: "/d".into(), ..Default::default() };
    let config = VmConfig { disks: vec![disk("/d", true, None)], pmem: vec![pmem], ..bootable() };
    assert_problem(&config, ProblemKind::Conflict, "pmem[0].file", "disks[0].path");

    let config = VmConfig { disks: vec![disk("/a", true, Some("x")), disk("/b", true, Some("x"))], ..bootable() };
    assert_problem(&config, ProblemKind::Conflict, "disks[1].id", "already the name of disks[0].id");

    let vsock = VsockConfig { cid: 3, socket: "/s".into(), ..Default::default() };
    let gpu = GpuConfig { wayland: Some("/s".into()), ..Default::default() };
    let config = VmConfig { vsock: Some(vsock), gpu: vec![gpu], ..bootable() };
    assert_problem(&config, ProblemKind::Conflict, "gpu[0].wayland", "already used by vsock.socket");

    let config = VmConfig { serial: SerialConfig(ConsoleConfig::of(ConsoleMode::Tty)), ..bootable() };
    assert_problem(&config, ProblemKind::Conflict, "console.mode", "both");
    let file = || ConsoleConfig { file: Some("/o".into()), ..ConsoleConfig::of(ConsoleMode::File) };
    let config = VmConfig { serial: SerialConfig(file()), console: file(), ..bootable() };
    assert_problem(&config, ProblemKind::Conflict, "console.file", "/o");
}

fn parse_with_everything(text: &str) {
    let _ = CpusConfig::parse(text);
    let _ = MemoryConfig::parse(text);
    let _ = DiskConfig::parse(text);
    let _ = PmemConfig::parse(text);
    let _ = SerialConfig::parse(text);
    let _ = ConsoleConfig::parse(text);
    let _ = VsockConfig::parse(text);
    let _ = RngConfig::parse(text);
    let _ = GpuConfig::parse(text);
    let _ = PlatformConfig::parse(text);
    let _ = LandlockRule::parse(text);
    let _ = parse_size(text);
}

proptest! {
    #[test]
    fn parsers_never_panic(text in ".*") {
        parse_with_everything(&text);
    }

    #[test]
    fn parsers_never_panic_near_the_grammar(
        text in r#"((size|path|file|id|boot|tty|cid)?=?["\[\],é]?(on|1|9M|/a)?["\]]?,?){0,6}"#
    ) {
        parse_with_everything(&text);
    }

    #[test]
    fn a_quoted_path_comes_back_unchanged(path in "[^\0]{1,40}") {
        let text = format!("path=\"{}\",readonly=on", path.replace('"', "\"\""));
        let disk = DiskConfig::parse(&text).unwrap();
        prop_assert_eq!(disk.path.to_str(), Some(path.as_str()));
        prop_assert!(disk.readonly);
    }

    #[test]
    fn json_never_panics(text in r#"(\{|\}|\[|\]|"memory"|"disks"|:|,|null|1|"x"){0,20}"#) {
        if let Ok(config) = VmConfig::from_json(text.as_bytes()) {
            let _ = config.check(&HOST);
        }
    }
}

#[test]
fn file_systems_have_names_of_their_own_and_no_socket() {
    let fs = |text: &str| FsConfig::parse(text).unwrap();
    assert_eq!(fs("tag=host"), FsConfig { tag: "host".into(), uid: 1000, gid: 1000, ..Default::default() });
    let other = fs("tag=other,uid=5,gid=6,id=files");
    assert_eq!((other.uid, other.gid, other.id.as_deref()), (5, 6, Some("files")));
    assert!(FsConfig::parse("uid=5").unwrap_err().to_string().contains("tag is missing"));
    let with = |all: &[FsConfig]| VmConfig { fs: all.to_vec(), ..bootable() };
    assert_eq!(problems(&with(&[fs("tag=host"), other])), [""; 0]);
    let cloud_hypervisors = fs("tag=host,socket=/run/fs.sock,num_queues=1,queue_size=1024");
    assert_problem(&with(&[cloud_hypervisors]), ProblemKind::NotSupported, "fs[0].socket", "memory that it shares");
    let long = "x".repeat(37);
    for tag in ["", long.as_str(), "a\0b"] {
        let fs = FsConfig { tag: tag.into(), ..Default::default() };
        assert_problem(&with(&[fs]), ProblemKind::Value, "fs[0].tag", "36 bytes");
    }
    let twice = with(&[fs("tag=host"), fs("tag=host")]);
    assert_problem(&twice, ProblemKind::Conflict, "fs[1].tag", "another file system");
    let same = with(&[fs("tag=a,id=x"), fs("tag=b,id=x")]);
    assert_problem(&same, ProblemKind::Conflict, "fs[1].id", "already the name");
    assert!(GrantConfig::from_json(br#"{"id": "_fs0", "name": "a", "writeable": true}"#).is_err(), "misspelt");
}
