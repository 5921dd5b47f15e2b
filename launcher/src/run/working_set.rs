//! What the VM of an app touches while the app starts, kept beside the warm template: the app's next VM has it before it runs. It
//! is a list of pages of what all clones share, and one app's for no other.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use vmm_api::{Client, ClientError, Request};
use vmm_config::SnapshotConfig;

/// How long an application may take to start. What it touches later is not needed beforehand.
const SETTLED: Duration = Duration::from_secs(5);
/// How long the VMM may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// The folder of all, in that of the warm template.
const FOLDER: &str = "apps";
/// What the VMM calls its list.
const FILE: &str = "working-set.json";

/// That of one app.
#[derive(Clone, Debug)]
pub struct WorkingSet {
    folder: PathBuf,
}

impl WorkingSet {
    /// Of the app whose name has this hash, beside `snapshot`.
    pub fn of(snapshot: &Path, app_hash: &str) -> Self {
        Self { folder: snapshot.join(FOLDER).join(app_hash) }
    }

    /// What is known, if something is.
    pub fn open(&self) -> Option<File> {
        File::open(self.folder.join(FILE)).ok()
    }

    /// Asks the VMM that listens at `api` when the application has started, and keeps the answer.
    pub fn record_later(self, api: PathBuf) {
        let record = move || {
            thread::sleep(SETTLED);
            if let Err(error) = self.record(&api) {
                log::info!("the app's next VM has nothing beforehand: {error}");
            }
        };
        let _ = thread::Builder::new().name("working set".into()).spawn(record);
    }

    fn record(&self, api: &Path) -> Result<(), ClientError> {
        // Not the warm template's own folder: that may have been removed.
        for folder in self.folder.parent().into_iter().chain([self.folder.as_path()]) {
            match fs::create_dir(folder) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error.into()),
                _ => {}
            }
        }
        let mut api = Client::connect(api)?;
        api.set_timeout(Some(PATIENCE))?;
        let to = SnapshotConfig { destination_url: format!("file://{}", self.folder.display()) };
        api.send(&Request::VmWorkingSet(to)).map(drop)
    }
}
