//! Files of the host in a guest: our file system device beside virtiofsd, which QEMU shows to the same guest. Both serve the
//! same directory, with their defaults; both guests are the same kernel and the same program, which measures with its own clock.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tests::{Initramfs, Vmm, VmmCommand, programs};
use vmm_api::Request;
use vmm_config::GrantConfig;

use crate::report::{self, Report, Samples};
use crate::{Failure, MEMORY_MIB, Running};

const ARMS: [&str; 2] = ["spectrum-vmm", "virtiofsd in QEMU"];
/// The file that is read and the one that is written, in MiB: less than the guest has memory.
const FILE_MIB: u32 = 64;
/// Files in the directory whose attributes are asked for.
const FILES: u32 = 1000;

/// What is measured: metric, unit, what the guest is told, and what one of its answers' things is in that unit.
const METRICS: [(&str, &str, &str, f64); 4] = [
    ("grant_read", "MiB/s", "read data", 1.0 / (1 << 20) as f64),
    ("grant_write", "MiB/s", "write written 64", 1.0 / (1 << 20) as f64),
    ("grant_stat", "files/s", "stat many", 1.0),
    ("grant_round_trip", "questions/s", "ask data 2000", 1.0),
];

/// A guest that waits for orders.
trait Guest {
    /// Tells it `order`; the number of things it did, and for how many nanoseconds.
    fn order(&mut self, order: &str) -> Result<(f64, f64), Failure>;

    /// Its processes. They are stopped while the other one works, so that they take nothing from it.
    fn processes(&self) -> Vec<Pid>;

    fn signal(&self, signal: Signal) -> Result<(), Failure> {
        Ok(self.processes().into_iter().try_for_each(|pid| kill_process(pid, signal))?)
    }
}

fn parse(line: &str) -> Result<(f64, f64), Failure> {
    let (_, said) = line.split_once("files: did ").ok_or_else(|| format!("the guest says {line}"))?;
    let mut words = said.split_whitespace();
    let mut number = |skip: usize| words.nth(skip).and_then(|word| word.parse().ok()).ok_or("a number");
    Ok((number(0)?, number(1)?))
}

struct Ours(Vmm);

impl Ours {
    fn start(directory: &Path) -> Result<Self, Failure> {
        let command = VmmCommand::probe(&["virtiofs"], &["files=host"]).arg("--fs", "tag=host").api();
        let mut vmm = command.spawn();
        vmm.wait_for("files: ready");
        let grant =
            GrantConfig { id: "_fs0".into(), name: "host".into(), path: Some(directory.into()), writable: true };
        vmm.client().send(&Request::VmAddGrant(grant))?;
        Ok(Self(vmm))
    }
}

impl Guest for Ours {
    fn order(&mut self, order: &str) -> Result<(f64, f64), Failure> {
        self.0.type_text(&format!("{order}\n"));
        parse(&self.0.wait_for("probe: files:"))
    }

    fn processes(&self) -> Vec<Pid> {
        Pid::from_raw(self.0.pid().cast_signed()).into_iter().collect()
    }
}

/// QEMU, with virtiofsd beside it.
struct Theirs {
    output: BufReader<ChildStdout>,
    input: ChildStdin,
    qemu: Running,
    virtiofsd: Running,
}

fn program(name: &str) -> Result<PathBuf, Failure> {
    let tools =
        std::env::var_os("SPECTRUM_TOOLS").map(PathBuf::from).ok_or("call scripts/bench: it names the tools")?;
    Ok(programs::existing(tools.join(name)))
}

impl Theirs {
    fn start(directory: &Path, files: &Path) -> Result<Self, Failure> {
        let (socket, image) = (files.join("virtiofsd"), files.join("initramfs"));
        Initramfs::probe(&["virtiofs"]).write(&image);
        let log = File::create(files.join("virtiofsd.log"))?;
        let mut virtiofsd = Command::new(program("virtiofsd")?);
        virtiofsd.arg("--socket-path").arg(&socket).arg("--shared-dir").arg(directory).stderr(log);
        let virtiofsd = Running(virtiofsd.spawn()?);
        wait_for_file(&socket)?;
        let mut qemu = Command::new("qemu-system-x86_64");
        qemu.args([
            "-accel",
            "kvm",
            "-cpu",
            "host",
            "-m",
            &format!("{MEMORY_MIB}M"),
            "-nodefaults",
            "-nographic",
            "-no-reboot",
        ]);
        qemu.args(["-object", &format!("memory-backend-memfd,id=ram,size={MEMORY_MIB}M,share=on")]);
        qemu.args(["-machine", "q35,memory-backend=ram", "-serial", "stdio"]);
        qemu.args(["-chardev", &format!("socket,id=fs,path={}", socket.display())]);
        qemu.args(["-device", "vhost-user-fs-pci,chardev=fs,tag=host,queue-size=1024"]);
        qemu.arg("-kernel").arg(programs::kernel("vmlinuz")).arg("-initrd").arg(&image);
        qemu.args(["-append", "console=ttyS0 quiet panic=-1 -- files=host"]);
        let mut qemu: Child = qemu.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let (output, input) = (qemu.stdout.take().ok_or("a pipe")?, qemu.stdin.take().ok_or("a pipe")?);
        let (output, qemu) = (BufReader::new(output), Running(qemu));
        let mut this = Self { output, input, qemu, virtiofsd };
        this.line("files: ready")?;
        Ok(this)
    }

    fn line(&mut self, wanted: &str) -> Result<String, Failure> {
        let mut all = String::new();
        loop {
            let mut line = Vec::new();
            if self.output.read_until(b'\n', &mut line)? == 0 {
                return Err(format!("QEMU's guest ended before it said {wanted}: {all}").into());
            }
            let line = String::from_utf8_lossy(&line);
            if line.contains(wanted) {
                return Ok(line.into_owned());
            }
            all.push_str(&line);
        }
    }
}

impl Guest for Theirs {
    fn order(&mut self, order: &str) -> Result<(f64, f64), Failure> {
        self.input.write_all(format!("{order}\n").as_bytes())?;
        parse(&self.line("probe: files:")?)
    }

    fn processes(&self) -> Vec<Pid> {
        [&self.qemu, &self.virtiofsd].map(|running| Pid::from_child(&running.0)).into()
    }
}

/// virtiofsd says nothing when it listens.
fn wait_for_file(path: &Path) -> Result<(), Failure> {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !path.exists() {
        if Instant::now() > deadline {
            return Err(format!("{} does not appear", path.display()).into());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

fn prepare(directory: &Path) -> Result<(), Failure> {
    let host = directory.join("host");
    std::fs::create_dir(&host)?;
    let mut data = File::create(host.join("data"))?;
    (0..FILE_MIB).try_for_each(|i| data.write_all(&vec![i.to_le_bytes()[0]; 1 << 20]))?;
    std::fs::create_dir(host.join("many"))?;
    (0..FILES).try_for_each(|i| File::create(host.join(format!("many/file-{i}"))).map(drop))?;
    Ok(())
}

/// Both arms in turn.
pub fn measure(runs: usize) -> Result<Vec<Report>, Failure> {
    let (shared, files) = (tempfile::tempdir()?, tempfile::tempdir()?);
    prepare(shared.path())?;
    let mut ours = Ours::start(&shared.path().join("host"))?;
    ours.signal(Signal::STOP)?;
    let mut theirs = Theirs::start(shared.path(), files.path())?;
    theirs.signal(Signal::STOP)?;
    let mut samples: [[Samples; 2]; METRICS.len()] = Default::default();
    for run in 0..=runs {
        for ((metric, _, order, scale), samples) in METRICS.iter().zip(&mut samples) {
            let order = order.replacen(' ', " host/", 1);
            let guests: [&mut dyn Guest; 2] = [&mut ours, &mut theirs];
            for ((guest, samples), arm) in guests.into_iter().zip(samples).zip(ARMS) {
                guest.signal(Signal::CONT)?;
                let (done, ns) = guest.order(&order).map_err(|e| format!("{metric} of {arm}: {e}"))?;
                guest.signal(Signal::STOP)?;
                // The first is there to warm up.
                if run > 0 {
                    samples.add(done * scale / (ns / 1e9));
                }
            }
        }
        eprintln!("bench: run {run} of {runs}");
    }
    let reports = METRICS.iter().zip(&samples).map(|((metric, unit, ..), s)| report::compare(metric, unit, &ARMS, s));
    Ok(reports.flatten().collect())
}
