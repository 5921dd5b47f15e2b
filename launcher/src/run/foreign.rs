//! Machines that bring their own system, as those imported from Spectrum OS: there is no agent in them, and they end when their
//! application does.

use std::{
    ffi::OsString,
    fs,
    path::Path,
    time::{Duration, Instant},
};

use guest_proto::ExitStatus;

use super::{
    RunError,
    folder::{API, RunFolder, VSOCK},
    grants::{Grant, GrantError},
    io_error,
    options::Settings,
    persist::Kept,
    relay::Waits,
    signals::Signals,
    vm::{GRANTS_TAG, GUEST_CID, Vm, VmError, with},
};
use crate::template::{CONFIG, VMLINUX};

/// What the guest knows its configuration and its only place for files by.
const CONFIG_GRANT: &str = "config";
const DISK_GRANT: &str = "disk";

/// How long the VMM may take until it can be told what is granted: the guest waits for that only a moment.
const PATIENCE: Duration = Duration::from_secs(10);
/// The VMM does not tell when.
const STEP: Duration = Duration::from_millis(5);

/// Grants what the machine expects, and waits until it has ended.
pub fn run(
    vm: &mut Vm,
    signals: &Signals,
    settings: &Settings,
    kept: Option<&mut Kept>,
) -> Result<ExitStatus, RunError> {
    let mut grants =
        vec![Grant { path: settings.template.folder.join(CONFIG), writable: false, called: Some(CONFIG_GRANT.into()) }];
    let disk = match kept {
        Some(kept) => {
            kept.used_by(vm.folder().name(), vm.folder().folder())?;
            kept.grant().path
        }
        None => {
            let disk = vm.folder().path(DISK_GRANT);
            fs::create_dir(&disk).map_err(io_error("make a folder for the VM's files"))?;
            disk
        }
    };
    grants.push(Grant { path: disk, writable: true, called: Some(DISK_GRANT.into()) });
    grants.extend(settings.grants.iter().cloned());
    let end = Instant::now() + PATIENCE;
    for grant in &grants {
        loop {
            let given =
                vm.api().map_err(GrantError::Vmm).and_then(|mut api| grant.give(&mut api, vm.folder().folder()));
            match given {
                Ok(_) => break,
                Err(GrantError::Vmm(_) | GrantError::Refused(_)) if Instant::now() < end => {
                    vm.wait(signals, &[], Some(Instant::now() + STEP))?;
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
    vm.is_ready()?;
    loop {
        match vm.wait(signals, &[], None) {
            Ok(_) => {}
            Err(RunError::Vm(VmError::Ended { .. })) if vm.ended_well() => return Ok(ExitStatus::Code(0)),
            Err(error) => return Err(error),
        }
    }
}

/// What Spectrum OS starts such a machine with, as far as there is the same here.
pub fn arguments(settings: &Settings, folder: &RunFolder) -> Vec<OsString> {
    let file = |path: &Path| with("file=", path, "");
    let mut arguments: Vec<OsString> = vec![
        "--api-socket".into(),
        folder.path(API).into(),
        "--kernel".into(),
        settings.template.folder.join(VMLINUX).into(),
        "--cmdline".into(),
        "console=ttyS0 root=PARTLABEL=root".into(),
        "--cpus".into(),
        format!("boot={}", settings.cpus).into(),
        "--memory".into(),
        format!("size={}", settings.memory).into(),
        "--vsock".into(),
        with(&format!("cid={GUEST_CID},socket="), &folder.path(VSOCK), ""),
        "--serial".into(),
        file(&folder.path("console")),
        "--console".into(),
        "null".into(),
        "--rng".into(),
        "src=/dev/urandom".into(),
        "--fs".into(),
        format!("tag={GRANTS_TAG}").into(),
    ];
    if !settings.template.manifest.disks.is_empty() {
        arguments.push("--disk".into());
    }
    for disk in &settings.template.manifest.disks {
        arguments.push(with("path=", &settings.template.folder.join(disk), ",readonly=on"));
    }
    if let Some(socket) = &settings.wayland {
        arguments.push("--gpu".into());
        arguments.push(with("cross-domain,wayland=", socket, ""));
    }
    arguments.extend(settings.vmm_arguments.iter().cloned());
    arguments
}
