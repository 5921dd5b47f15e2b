//! Portals: what an application in a VM asks the desktop for, and what it is given.
//!
//! The VM's own xdg-desktop-portal has a back-end that is here. The VM offers its session bus by a vsock port (the
//! protocol is in `guest-proto`); this side joins it, and passes what is asked on to the desktop's own portals, in whose dialogs
//! the user decides. Nothing is passed on that is not known and checked: the bus is the guest's, and so is all that comes from it.
//!
//! One thread listens, a few for each bus that was offered serve it, and one waits for each dialog. They end with the VM's
//! connections, or with the launcher.

mod backend;
mod chooser;
mod desktop;
mod files;
mod guard;
mod notify;
mod open;
mod settings;
mod text;

use std::{
    io::{self, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use files::Files;
use guest_proto::portal::{Offer, OfferError, VERSION};

use crate::{
    policy::DecisionPoint,
    run::{
        remembered::Remembered,
        vm::{self, VmError},
    },
};

/// How long the guest may take for an answer until its bus is joined.
const PATIENCE: Duration = Duration::from_secs(10);

/// Buses of one VM that are served at once. It has one; another may come before the end of the last was seen.
const BUSES: usize = 4;

/// Where a VM is found.
#[derive(Clone, Debug)]
pub struct Vm {
    /// The socket at which the VMM announces connections of the guest to the portals' port.
    pub offers: PathBuf,
    /// The VMM's socket for connections into the guest.
    pub vsock: PathBuf,
    /// The VMM's socket for its API.
    pub api: PathBuf,
    /// The VM's folder.
    pub folder: PathBuf,
}

/// Why a bus is not served.
#[derive(Debug, thiserror::Error)]
enum PortalError {
    #[error("it does not follow the protocol: {0}")]
    Offer(#[from] OfferError),
    #[error("its bus cannot be reached: {0}")]
    Vm(#[from] VmError),
    #[error("connection failed: {0}")]
    Io(#[from] io::Error),
    #[error("its bus: {0}")]
    Bus(#[from] zbus::Error),
}

/// The portals of one VM.
pub struct Portals {
    /// Decides what the application may have.
    point: Arc<DecisionPoint>,
    vm: Vm,
    files: Files,
    /// Of all its buses: a new one is no new allowance.
    notifications: notify::Limit,
    buses: AtomicUsize,
}

impl Portals {
    /// Grants what is remembered of former VMs' picks, and listens for the VM's bus from here on.
    pub fn start(point: Arc<DecisionPoint>, vm: Vm, remembered: Option<Remembered>) -> io::Result<()> {
        let files = Files::new(vm.api.clone(), vm.folder.clone(), remembered);
        files.restore(&point);
        let listener = UnixListener::bind(&vm.offers)?;
        let portals =
            Arc::new(Self { point, vm, files, notifications: notify::Limit::new(), buses: AtomicUsize::new(0) });
        thread::Builder::new().name("portals".into()).spawn(move || {
            for stream in listener.incoming() {
                let Ok(stream) = stream else { break };
                portals.clone().welcome(stream);
            }
        })?;
        Ok(())
    }

    /// The application, as the policy and the user call it.
    fn app(&self) -> &str {
        self.point.app()
    }

    /// Serves one bus, by a thread of its own.
    fn welcome(self: Arc<Self>, stream: UnixStream) {
        if self.buses.fetch_add(1, Ordering::SeqCst) >= BUSES {
            self.buses.fetch_sub(1, Ordering::SeqCst);
            return log::warn!("{}: the VM offers more than {BUSES} buses", self.app());
        }
        let portals = self.clone();
        let started = thread::Builder::new().name("bus".into()).spawn(move || {
            if let Err(error) = portals.serve(stream) {
                log::warn!("{}: the VM gets no portals: {error}", portals.app());
            }
            portals.buses.fetch_sub(1, Ordering::SeqCst);
        });
        if let Err(error) = started {
            self.buses.fetch_sub(1, Ordering::SeqCst);
            log::warn!("{}: no portals: {error}", self.app());
        }
    }

    fn serve(self: &Arc<Self>, mut stream: UnixStream) -> Result<(), PortalError> {
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Offer::read_versions(&mut stream)?;
        stream.write_all(&[VERSION])?;
        let offer = Offer::read(&mut stream)?;
        stream.write_all(&[0])?;
        let bus = vm::dial(&self.vm.vsock, offer.port, PATIENCE)?;
        backend::serve(self, guard::behind(bus)?, &offer.root)?;
        Ok(())
    }
}
