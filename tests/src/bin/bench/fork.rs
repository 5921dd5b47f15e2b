//! How long a machine stands still for a live snapshot: 256 MiB, all of it in use, 8 MiB of it changed since it was
//! cloned. In turn with it, what the ways to keep such a memory would cost by themselves.

use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::time::Duration;

use tests::tiny;
use vmm_api::{Client, Reply, Request};
use vmm_config::{CloneConfig, SnapshotConfig};

use crate::Failure;
use crate::clone::{end, process_id, snapshot_of, wait_for, zygote};
use crate::report::{self, Report, Samples};
use crate::shape::Template;
use crate::ways::Ways;

/// Clones, each of which is saved once.
pub fn pause(runs: usize) -> Result<Vec<Report>, Failure> {
    let directory = tempfile::tempdir()?;
    let url = snapshot_of(directory.path(), tiny::write_toucher, b'.')?;
    let (_zygote, mut client) = zygote(&url, directory.path())?;
    let template = Template::new()?;
    let (mut samples, mut ways) = (Samples::default(), Ways::default());
    for run in 0..runs {
        let api = directory.path().join("clone-api");
        let listener = UnixListener::bind(&api)?;
        let vsock = directory.path().join("clone-vsock");
        let other = UnixListener::bind(&vsock)?;
        let (mut read, write) = std::io::pipe()?;
        let fds = ["serial", "api", "_vsock0"].map(str::to_owned).to_vec();
        let config = CloneConfig { fds, vsock_socket: Some(vsock.clone()), ..CloneConfig::default() };
        let clone = client.clone_vm(config, &[write.as_fd(), listener.as_fd(), other.as_fd()])?;
        drop(write);
        // The second one: a whole round since.
        wait_for(&mut read, b':')?;
        wait_for(&mut read, b':')?;
        let mut own = Client::connect(&api)?;
        let to = directory.path().join(format!("live-{run}"));
        let request = SnapshotConfig { destination_url: format!("file://{}", to.display()) };
        let Reply::Forked(fork) = own.send(&Request::VmLiveSnapshot(request))? else { return Err("no answer".into()) };
        samples.add(Duration::from_micros(fork.paused_us).as_secs_f64() * 1e3);
        while !to.join("snapshot.json").exists() {
            std::thread::sleep(Duration::from_millis(5));
        }
        end(process_id(clone)?)?;
        std::fs::remove_dir_all(to)?;
        std::fs::remove_file(api)?;
        std::fs::remove_file(vsock)?;
        ways.run(&template)?;
    }
    let mut reports = report::compare("live_fork_pause_ms", "ms", &["spectrum-vmm"], &[samples]);
    reports.extend(ways.reports());
    Ok(reports)
}
