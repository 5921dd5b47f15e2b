//! Boots a kernel: `cargo run --example boot -- KERNEL [INITRAMFS]`. Its serial port is this terminal.

use std::error::Error;
use std::sync::Arc;

use hypervisor::kvm::Kvm;
use virtio_devices::gpu::NoRenderer;
use vmm::Vmm;
use vmm::sandbox::Unconfined;
use vmm_config::{ConsoleConfig, ConsoleMode, PayloadConfig, SerialConfig, VmConfig};

fn main() -> Result<(), Box<dyn Error>> {
    let mut files = std::env::args_os().skip(1);
    let mut config = VmConfig {
        payload: Some(PayloadConfig {
            kernel: Some(files.next().ok_or("name a kernel")?.into()),
            initramfs: files.next().map(Into::into),
            cmdline: Some("console=ttyS0".into()),
            ..PayloadConfig::default()
        }),
        serial: SerialConfig(ConsoleConfig::of(ConsoleMode::Tty)),
        console: ConsoleConfig::of(ConsoleMode::Off),
        ..VmConfig::default()
    };
    config.memory.size = 256 << 20;

    let mut vmm = Vmm::new(Arc::new(Kvm::open()?), Box::new(NoRenderer), Box::new(Unconfined))?;
    vmm.create(config)?;
    vmm.boot()?;
    let outcome = vmm.run()?;
    eprintln!("the machine ended: {outcome:?}");
    Ok(())
}
