//! Clones of the template, from the request to the zygote to the agent's first word on vsock, beside a boot of our own to
//! the same word and beside what other programs take to bring the same guest back; and what one takes that did nothing for
//! a minute.

use std::path::Path;
use std::time::{Duration, Instant};

use guest_proto::Reply;
use tests::agent::{self, Host};
use tests::zygote::{self, Clone};
use vmm_api::{Client, Request};
use vmm_config::SnapshotConfig;

use crate::others::Other;
use crate::report::{self, Report, Samples};
use crate::{Failure, memory};

/// How many live at once while their memory is looked at.
const IDLE: usize = 4;
/// For how long they do nothing before that.
const REST: Duration = Duration::from_secs(60);

/// Boots a VM to the agent's announcement, and saves it then if there is a directory for it; the seconds to the announcement.
fn boot(to: Option<&Path>) -> Result<f64, Failure> {
    let files = tempfile::tempdir()?;
    let socket = files.path().join("vsock");
    let host = Host::at(&socket);
    let command = agent::command(&socket).api();
    let start = Instant::now();
    let mut vmm = command.spawn();
    let link = host.greeting();
    let time = start.elapsed().as_secs_f64();
    if let Some(directory) = to {
        let mut client = vmm.client();
        client.send(&Request::VmPause)?;
        let to = SnapshotConfig { destination_url: format!("file://{}", directory.display()) };
        client.send(&Request::VmSnapshot(to))?;
    }
    drop(link);
    Ok(time)
}

/// Private and unique memory of clones that were woken and did nothing since.
fn idle(client: &mut Client) -> Result<[Samples; 2], Failure> {
    let before = memory::kernel_kib()?;
    let clones: Vec<Clone> = (0..IDLE).map(|_| Clone::new(client)).collect();
    let mut links = Vec::new();
    for clone in &clones {
        links.push(clone.host.greeting());
        let (link, reply) = clone.host.ask(guest_proto::Request::Wake(zygote::identity()));
        if reply != Reply::Done {
            return Err(format!("a clone does not wake: {reply:?}").into());
        }
        drop(link);
    }
    std::thread::sleep(REST);
    let pids: Vec<_> = clones.iter().map(|clone| clone.pid).collect();
    let samples = memory::unique_kib(&pids, before);
    pids.into_iter().for_each(zygote::end);
    samples
}

/// All arms in turn, then the idle ones.
pub fn clones(runs: usize) -> Result<Vec<Report>, Failure> {
    let files = tempfile::tempdir()?;
    let directory = files.path().join("snapshot");
    boot(Some(&directory))?;
    let (_zygote, mut client) = zygote::start(&directory);
    let others = Other::all()?;
    let names: Vec<_> = ["zygote", "cold boot"].into_iter().chain(others.iter().map(|other| other.name)).collect();
    let mut times: Vec<Samples> = names.iter().map(|_| Samples::default()).collect();
    let mut faults = Samples::default();
    for run in 0..=runs {
        let start = Instant::now();
        let clone = Clone::new(&mut client);
        let link = clone.host.greeting();
        let ours = start.elapsed().as_secs_f64();
        let minor = memory::minor_faults(clone.pid)?;
        zygote::end(clone.pid);
        drop(link);
        let mut arms = vec![ours, boot(None)?];
        for other in &others {
            arms.push(other.restore()?);
        }
        // The first is there to warm up.
        if run > 0 {
            times.iter_mut().zip(arms).for_each(|(samples, time)| samples.add(time));
            faults.add(minor);
        }
        eprintln!("bench: run {run} of {runs}");
    }
    let [private, unique] = idle(&mut client)?;
    let mut reports = report::compare("clone_to_vsock_answer", "s", &names, &times);
    reports.extend(report::compare("clone_minor_faults", "faults", &["Debian"], &[faults]));
    reports.extend(report::compare("clone_private_kib", "KiB", &["Debian"], &[private]));
    reports.extend(report::compare("clone_unique_kib", "KiB", &["Debian"], &[unique]));
    Ok(reports)
}
