//! What is missing on this machine, and what mends it.

use std::{
    env, fs,
    fs::OpenOptions,
    io,
    path::{Path, PathBuf},
};

use serde::Serialize;

use crate::{
    home::Home,
    run::{cgroup, options},
    template, text,
};

/// Memory of one VM that nobody said anything about, in MiB.
const VM_MEMORY: u64 = 512;

/// Tools with their Debian packages, and what they are needed for.
const TOOLS: [(&str, &str, &str); 4] = [
    ("mmdebstrap", "mmdebstrap", "to build templates"),
    ("mkfs.erofs", "erofs-utils", "to build templates"),
    ("newuidmap", "uidmap", "to build templates without being root"),
    ("passt", "passt", "for apps with network = \"internet\""),
];

/// How something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Status {
    /// As it should be.
    Ok,
    /// Missing, and no application runs without it.
    Missing,
    /// Not as it should be, and yet applications run.
    Warning,
}

/// One thing that was looked at.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Check {
    name: &'static str,
    status: Status,
    found: String,
    /// A command or a sentence.
    #[serde(skip_serializing_if = "Option::is_none")]
    fix: Option<String>,
}

/// How far /dev/kvm is to be had.
#[derive(Debug)]
enum Kvm {
    Hardware,
    Software,
    Absent,
    Refused(io::Error),
}

/// What was found on the machine.
#[derive(Debug)]
struct Facts {
    kvm: Kvm,
    /// The VMM, or what is told without it.
    vmm: Result<PathBuf, String>,
    wayland: Result<PathBuf, String>,
    /// Names of the templates that can be used, and what is told of each other one.
    templates: Result<(Vec<String>, Vec<String>), String>,
    /// XDG_RUNTIME_DIR, if it is a folder.
    runtime: Option<PathBuf>,
    /// The cgroup below which those of VMs can be, or why there is none.
    cgroup: Result<PathBuf, String>,
    /// Those of [`TOOLS`] that are there.
    tools: [Option<PathBuf>; 4],
    /// MiB that can be had without swapping; none if the kernel does not tell.
    memory: Option<u64>,
}

/// The report, and whether applications can run.
pub fn examine(home: &Home, json: bool) -> (String, bool) {
    let checks = checks(&Facts::find(home));
    let ready = checks.iter().all(|check| check.status != Status::Missing);
    let report = if json {
        serde_json::to_string_pretty(&checks).unwrap_or_default() + "\n"
    } else {
        let rows: Vec<_> = checks.iter().map(row).collect();
        text::table(&rows)
    };
    (report, ready)
}

fn row(check: &Check) -> [String; 3] {
    let status = match check.status {
        Status::Ok => "ok",
        Status::Missing => "MISSING",
        Status::Warning => "warning",
    };
    let fix = check.fix.as_ref().map_or_else(String::new, |fix| format!("; mend it: {fix}"));
    [check.name.into(), status.into(), format!("{}{fix}", check.found)]
}

impl Facts {
    fn find(home: &Home) -> Self {
        let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let runtime = env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
        Self {
            kvm: find_kvm(),
            vmm: options::find_vmm(env::var_os("SPECTRUM_VMM").as_deref().map(Path::new)).map_err(|e| e.to_string()),
            wayland: options::wayland_socket(None).map_err(|e| e.to_string()),
            templates: find_templates(home).map_err(|e| e.to_string()),
            runtime: runtime.filter(|path| path.is_absolute() && path.is_dir()),
            cgroup: cgroup::place().map_err(|error| error.to_string()),
            tools: TOOLS.map(|(tool, ..)| find_tool(tool)),
            memory: available(&meminfo),
        }
    }
}

fn find_kvm() -> Kvm {
    match OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Kvm::Absent,
        Err(error) => Kvm::Refused(error),
        // The modules that use the processor's virtualisation.
        Ok(_) if ["kvm_intel", "kvm_amd"].iter().any(|name| Path::new("/sys/module").join(name).is_dir()) => {
            Kvm::Hardware
        }
        Ok(_) => Kvm::Software,
    }
}

/// Why no VM can run here, and what mends it. Nothing if KVM can be used.
pub fn no_kvm() -> Option<String> {
    let check = kvm(&find_kvm());
    let fix = check.fix.unwrap_or_default();
    (check.status == Status::Missing).then(|| format!("{}; mend it: {fix}", check.found))
}

fn find_templates(home: &Home) -> Result<(Vec<String>, Vec<String>), template::TemplateError> {
    let (mut usable, mut damaged) = (Vec::new(), Vec::new());
    for name in template::names(home)? {
        match template::open(home, &name) {
            Ok(_) => usable.push(name),
            Err(error) => damaged.push(error.to_string()),
        }
    }
    Ok((usable, damaged))
}

fn find_tool(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let folders = env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
    folders.map(|folder| folder.join(name)).find(|path| path.is_file())
}

/// MemAvailable in MiB: proc_meminfo(5).
fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib >> 10)
}

fn checks(facts: &Facts) -> Vec<Check> {
    let mut checks = vec![kvm(&facts.kvm)];
    checks.push(match &facts.vmm {
        Ok(path) => ok("VMM", path.display()),
        Err(why) => missing("VMM", why, "install spectrum-vmm next to spectrum or in a folder of PATH"),
    });
    checks.push(match &facts.wayland {
        Ok(path) => ok("compositor", path.display()),
        Err(why) => missing("compositor", why, "run spectrum in a Wayland session"),
    });
    templates(facts, &mut checks);
    checks.push(match &facts.runtime {
        Some(path) => ok("runtime folder", path.display()),
        None => {
            let fix = "log in through a session manager such as systemd-logind, which sets it";
            warning("runtime folder", "XDG_RUNTIME_DIR is no folder: sockets go to the temporary folder", fix)
        }
    });
    checks.push(match &facts.cgroup {
        Ok(path) => ok("cgroup", path.display()),
        Err(why) => {
            let fix = "start spectrum in a session of systemd's, or with `systemd-run --user --scope spectrum ...`";
            warning("cgroup", &format!("{why}: the memory and processes of VMs have no limits"), fix)
        }
    });
    for ((tool, package, why), found) in TOOLS.iter().zip(&facts.tools) {
        checks.push(match found {
            Some(path) => ok(tool, path.display()),
            None => {
                warning(tool, &format!("not found; it is needed {why}"), &format!("sudo apt-get install {package}"))
            }
        });
    }
    if let Some(memory) = facts.memory {
        checks.push(if memory >= VM_MEMORY {
            ok("memory", format!("{memory} MiB available"))
        } else {
            let found = format!("{memory} MiB available, a VM may use {VM_MEMORY}");
            warning("memory", &found, "end other programs, or give apps less with `memory`")
        });
    }
    checks
}

fn kvm(kvm: &Kvm) -> Check {
    match kvm {
        Kvm::Hardware => ok("KVM", "/dev/kvm, with the processor's virtualisation"),
        Kvm::Software => {
            let fix = "turn on VT-x or AMD-V in the firmware, then sudo modprobe kvm_intel or kvm_amd";
            warning("KVM", "/dev/kvm without the processor's virtualisation: VMs are slow", fix)
        }
        Kvm::Absent => {
            let fix = "sudo modprobe kvm_intel or kvm_amd; if that fails, turn on VT-x or AMD-V in the firmware";
            missing("KVM", "there is no /dev/kvm", fix)
        }
        Kvm::Refused(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            missing("KVM", "this user may not open /dev/kvm", "sudo usermod -aG kvm $USER, then log in anew")
        }
        Kvm::Refused(error) => {
            missing("KVM", &format!("/dev/kvm cannot be opened: {error}"), "sudo modprobe kvm_intel or kvm_amd")
        }
    }
}

fn templates(facts: &Facts, checks: &mut Vec<Check>) {
    let build = template::HOW_TO_BUILD;
    match &facts.templates {
        Ok((usable, damaged)) => {
            checks.push(match usable.as_slice() {
                [] => missing("template", "there is none that can be used", build),
                names => ok("template", names.join(", ")),
            });
            let fix = "build it anew with `spectrum template build`, or remove it with `spectrum template rm`";
            checks.extend(damaged.iter().map(|why| warning("template", why, fix)));
        }
        Err(why) => checks.push(missing("template", why, build)),
    }
}

fn ok(name: &'static str, found: impl ToString) -> Check {
    Check { name, status: Status::Ok, found: found.to_string(), fix: None }
}

fn missing(name: &'static str, found: &str, fix: &str) -> Check {
    Check { name, status: Status::Missing, found: found.into(), fix: Some(fix.into()) }
}

fn warning(name: &'static str, found: &str, fix: &str) -> Check {
    Check { name, status: Status::Warning, found: found.into(), fix: Some(fix.into()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> Facts {
        Facts {
            kvm: Kvm::Hardware,
            vmm: Ok("/bin/spectrum-vmm".into()),
            wayland: Ok("/run/wayland-0".into()),
            templates: Ok((vec!["default".into()], vec![])),
            runtime: Some("/run".into()),
            cgroup: Ok("/sys/fs/cgroup/app.slice".into()),
            tools: [(); 4].map(|()| Some("/bin/tool".into())),
            memory: Some(512),
        }
    }

    #[test]
    fn a_good_machine_needs_nothing() {
        let checks = checks(&good());
        assert_eq!(checks.len(), 11);
        assert!(checks.iter().all(|check| check.status == Status::Ok && check.fix.is_none()), "{checks:?}");
    }

    #[test]
    fn each_fault_is_told_with_what_mends_it() {
        let no = || Err("no".to_owned());
        let denied = || io::Error::from(io::ErrorKind::PermissionDenied);
        let table = [
            (Facts { kvm: Kvm::Absent, ..good() }, "KVM", Status::Missing, "modprobe"),
            (Facts { kvm: Kvm::Refused(denied()), ..good() }, "KVM", Status::Missing, "usermod -aG kvm"),
            (Facts { kvm: Kvm::Refused(io::Error::other("x")), ..good() }, "KVM", Status::Missing, "modprobe"),
            (Facts { kvm: Kvm::Software, ..good() }, "KVM", Status::Warning, "firmware"),
            (Facts { vmm: Err("no".into()), ..good() }, "VMM", Status::Missing, "install spectrum-vmm"),
            (Facts { wayland: Err("no".into()), ..good() }, "compositor", Status::Missing, "Wayland session"),
            (Facts { templates: no(), ..good() }, "template", Status::Missing, "spectrum template build"),
            (
                Facts { templates: Ok((vec![], vec![])), ..good() },
                "template",
                Status::Missing,
                "template build default",
            ),
            (
                Facts { templates: Ok((vec!["a".into()], vec!["b".into()])), ..good() },
                "template",
                Status::Warning,
                "template rm",
            ),
            (Facts { runtime: None, ..good() }, "runtime folder", Status::Warning, "log in"),
            (Facts { memory: Some(511), ..good() }, "memory", Status::Warning, "end other programs"),
        ];
        let tools = TOOLS.iter().enumerate().map(|(index, (tool, package, _))| {
            let mut facts = good();
            facts.tools[index] = None;
            (facts, *tool, Status::Warning, *package)
        });
        for (facts, name, status, fix) in table.into_iter().chain(tools) {
            let checks = checks(&facts);
            let faults: Vec<_> = checks.iter().filter(|check| check.status != Status::Ok).collect();
            let [fault] = faults.as_slice() else { panic!("{facts:?}: {faults:?}") };
            assert_eq!((fault.name, fault.status), (name, status), "{facts:?}");
            assert!(fault.fix.as_ref().unwrap().contains(fix), "{fault:?}");
        }
    }

    #[test]
    fn memory_as_the_kernel_tells_it() {
        assert_eq!(available("MemTotal: 1 kB\nMemAvailable:    2097152 kB\n"), Some(2048));
        assert_eq!(available("MemTotal: 1 kB\n"), None);
    }
}
