//! The same guest, brought back from a snapshot by other programs that are on PATH: Cloud Hypervisor's `--restore`, and
//! Firecracker's `PUT /snapshot/load`.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use guest_proto::{Reply, Request as Ask};
use serde_json::{Value, json};
use tempfile::TempDir;
use tests::agent::{self, Host};
use tests::programs;
use vmm_api::{Client, Request};
use vmm_config::SnapshotConfig;

use crate::arms::on_path;
use crate::{Failure, MEMORY_MIB, Running};

/// For how long a program may take to open its socket.
const PATIENCE: Duration = Duration::from_secs(60);

/// How a program is spoken to.
#[derive(Clone, Copy)]
enum Interface {
    /// Flags and calls of Cloud Hypervisor's.
    CloudHypervisor,
    /// Calls of Firecracker's.
    Firecracker,
}

/// A program that has saved a VM, and can bring it back.
pub struct Other {
    /// Its name in reports.
    pub name: &'static str,
    program: PathBuf,
    interface: Interface,
    /// Its sockets and the snapshot.
    files: TempDir,
    host: Host,
}

impl Other {
    /// All that are on PATH.
    pub fn all() -> Result<Vec<Self>, Failure> {
        let known =
            [("cloud-hypervisor", Interface::CloudHypervisor), ("firecracker", Interface::Firecracker)].into_iter();
        let found = known.filter_map(|(name, interface)| Some((name, on_path(name)?, interface)));
        found.map(|(name, program, interface)| Self::new(name, program, interface)).collect()
    }

    /// Boots the template's guest to its agent's announcement, and saves it.
    fn new(name: &'static str, program: PathBuf, interface: Interface) -> Result<Self, Failure> {
        let files = tempfile::tempdir()?;
        let host = Host::at(&files.path().join("vsock"));
        let this = Self { name, program, interface, files, host };
        let _running = this.start(|command| this.boot(command))?;
        let link = this.host.greeting();
        this.save()?;
        drop(link);
        Ok(this)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.files.path().join(name)
    }

    /// Starts the program with the socket of its API where nothing is, as is that of its vsock device.
    fn start(&self, tell: impl FnOnce(&mut Command) -> Result<(), Failure>) -> Result<Running, Failure> {
        for socket in ["api", "vsock"] {
            if let Err(e) = std::fs::remove_file(self.path(socket))
                && e.kind() != std::io::ErrorKind::NotFound
            {
                return Err(e.into());
            }
        }
        let mut command = Command::new(&self.program);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        match self.interface {
            Interface::CloudHypervisor => command.arg("--api-socket").arg(self.path("api")),
            // Its virtio devices are PCI functions then, as the template's kernel wants them.
            Interface::Firecracker => command.arg("--enable-pci").arg("--api-sock").arg(self.path("api")),
        };
        tell(&mut command)?;
        let child: Child = command.spawn().map_err(|e| format!("cannot start {}: {e}", self.name))?;
        Ok(Running(child))
    }

    fn boot(&self, command: &mut Command) -> Result<(), Failure> {
        let (kernel, template) = (programs::kernel("vmlinux"), agent::template());
        let (initramfs, root) = (template.join("initramfs"), template.join("root.erofs"));
        let cmdline = |root| format!("console=ttyS0 quiet panic=-1 spectrum.root={root}");
        match self.interface {
            Interface::CloudHypervisor => {
                command.arg("--kernel").arg(kernel).arg("--initramfs").arg(initramfs);
                command.args(["--cmdline", &cmdline("/dev/pmem0"), "--memory", &format!("size={MEMORY_MIB}M")]);
                command.args(["--serial", "null", "--console", "off"]);
                command.args(["--pmem", &format!("file={},discard_writes=on", root.display())]);
                command.args(["--vsock", &format!("cid=3,socket={}", self.path("vsock").display())]);
            }
            Interface::Firecracker => {
                let source = json!({ "kernel_image_path": kernel, "initrd_path": initramfs,
                    "boot_args": cmdline("/dev/vda") });
                let drive = json!({ "drive_id": "root", "path_on_host": root, "is_root_device": false,
                    "is_read_only": true });
                let config = json!({ "boot-source": source, "drives": [drive],
                    "machine-config": { "vcpu_count": 1, "mem_size_mib": MEMORY_MIB },
                    "vsock": { "guest_cid": 3, "uds_path": self.path("vsock") } });
                std::fs::write(self.path("config"), config.to_string())?;
                command.arg("--config-file").arg(self.path("config"));
            }
        }
        Ok(())
    }

    fn save(&self) -> Result<(), Failure> {
        match self.interface {
            Interface::CloudHypervisor => {
                let mut client = Client::from_stream(connect(&self.path("api"))?);
                client.send(&Request::VmPause)?;
                std::fs::create_dir(self.path("snapshot"))?;
                client.send(&Request::VmSnapshot(SnapshotConfig { destination_url: self.url() }))?;
            }
            Interface::Firecracker => {
                let mut api = connect(&self.path("api"))?;
                call(&mut api, "PATCH", "/vm", &json!({ "state": "Paused" }))?;
                let to = json!({ "snapshot_type": "Full", "snapshot_path": self.path("state"),
                    "mem_file_path": self.path("memory") });
                call(&mut api, "PUT", "/snapshot/create", &to)?;
            }
        }
        Ok(())
    }

    fn url(&self) -> String {
        format!("file://{}", self.path("snapshot").display())
    }

    /// Seconds from the start of the program to the first answer of the agent.
    pub fn restore(&self) -> Result<f64, Failure> {
        let start = Instant::now();
        let _running = self.start(|command| {
            if let Interface::CloudHypervisor = self.interface {
                command.args(["--restore", &format!("source_url={}", self.url())]);
            }
            Ok(())
        })?;
        let mut api = connect(&self.path("api"))?;
        match self.interface {
            Interface::CloudHypervisor => drop(Client::from_stream(api).send(&Request::VmResume)?),
            Interface::Firecracker => {
                let memory = json!({ "backend_type": "File", "backend_path": self.path("memory") });
                let from = json!({ "snapshot_path": self.path("state"), "mem_backend": memory, "resume_vm": true });
                call(&mut api, "PUT", "/snapshot/load", &from)?;
            }
        }
        let (_link, reply) = self.host.ask(Ask::Ping);
        let time = start.elapsed().as_secs_f64();
        match reply {
            Reply::Pong { .. } => Ok(time),
            other => Err(format!("{}'s guest answers {other:?}", self.name).into()),
        }
    }
}

/// A connection to a socket that is about to be there; nothing tells of it.
fn connect(socket: &Path) -> Result<UnixStream, Failure> {
    let start = Instant::now();
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => return Ok(stream),
            Err(e) if start.elapsed() > PATIENCE => return Err(format!("{}: {e}", socket.display()).into()),
            Err(_) => std::thread::sleep(Duration::from_micros(100)),
        }
    }
}

/// One call of HTTP without an answer's body, as all of Firecracker's are that succeed.
fn call(api: &mut UnixStream, method: &str, path: &str, body: &Value) -> Result<(), Failure> {
    let body = body.to_string();
    let header =
        format!("{method} {path} HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: {}", body.len());
    api.write_all(format!("{header}\r\n\r\n{body}").as_bytes())?;
    let mut lines = BufReader::new(api).lines();
    let status = lines.next().ok_or("no answer")??;
    if status.split(' ').nth(1).is_none_or(|code| !code.starts_with('2')) {
        return Err(format!("{method} {path}: {status}").into());
    }
    // Up to the empty line.
    lines.map_while(Result::ok).take_while(|line| !line.is_empty()).for_each(drop);
    Ok(())
}
