//! The programs that are measured.

use std::path::{Path, PathBuf};
use std::process::Command;

use tests::{programs, tiny};

use crate::{Failure, MEMORY_MIB};

const CMDLINE: &str = "console=ttyS0 quiet panic=-1";

/// How a program is told what to boot.
#[derive(Debug, Clone, Copy)]
enum Interface {
    /// Flags of Cloud Hypervisor's; ours are the same.
    Flags,
    /// A configuration file, as Firecracker wants it.
    File,
}

/// One program.
pub struct Arm {
    /// Its name in reports.
    pub name: &'static str,
    program: PathBuf,
    interface: Interface,
    kernel: PathBuf,
    initramfs: Option<PathBuf>,
}

/// The program `name`, if it is on PATH.
pub fn on_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|folder| folder.join(name)).find(|file| file.is_file())
}

impl Arm {
    fn all(kernel: &Path, initramfs: Option<&Path>) -> Vec<Self> {
        let arm = |name, program, interface| Self {
            name,
            program,
            interface,
            kernel: kernel.to_owned(),
            initramfs: initramfs.map(Path::to_owned),
        };
        let mut arms = vec![arm("spectrum-vmm", programs::program("spectrum-vmm"), Interface::Flags)];
        arms.extend(on_path("cloud-hypervisor").map(|p| arm("cloud-hypervisor", p, Interface::Flags)));
        arms.extend(on_path("firecracker").map(|p| arm("firecracker", p, Interface::File)));
        arms
    }

    /// All programs with Debian's kernel as PVH ELF, which all of them boot, and the initramfs of `scripts/bench`.
    pub fn linux(_directory: &Path) -> Result<Vec<Self>, Failure> {
        let initramfs =
            std::env::var_os("SPECTRUM_BENCH_INITRAMFS").ok_or("call scripts/bench: it makes the initramfs")?;
        Ok(Self::all(&programs::kernel("vmlinux"), Some(Path::new(&initramfs))))
    }

    /// All programs with a guest that prints one byte.
    pub fn tiny(directory: &Path) -> Result<Vec<Self>, Failure> {
        let kernel = directory.join("tiny");
        tiny::write_one_byte(&kernel);
        Ok(Self::all(&kernel, None))
    }

    /// How to start it; the serial port is standard output.
    pub fn command(&self, directory: &Path) -> Result<Command, Failure> {
        let mut command = Command::new(&self.program);
        match self.interface {
            Interface::Flags => {
                command.arg("--kernel").arg(&self.kernel).args(["--serial", "tty", "--console", "off"]);
                command.args(["--cpus", "boot=1", "--memory", &format!("size={MEMORY_MIB}M")]);
                if let Some(initramfs) = &self.initramfs {
                    command.arg("--initramfs").arg(initramfs).args(["--cmdline", CMDLINE]);
                }
            }
            Interface::File => {
                let file = directory.join("firecracker.json");
                let mut source = serde_json::json!({ "kernel_image_path": self.kernel, "boot_args": CMDLINE });
                if let Some(initramfs) = &self.initramfs {
                    source["initrd_path"] = serde_json::json!(initramfs);
                }
                let machine = serde_json::json!({ "vcpu_count": 1, "mem_size_mib": MEMORY_MIB });
                let config = serde_json::json!({ "boot-source": source, "machine-config": machine, "drives": [] });
                std::fs::write(&file, config.to_string())?;
                command.arg("--no-api").arg("--config-file").arg(file);
            }
        }
        Ok(command)
    }
}
