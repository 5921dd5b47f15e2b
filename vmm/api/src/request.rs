//! What can be asked, and how a method and a path name it.

use serde::Serialize;
use thiserror::Error;
use vmm_config::{CloneConfig, GrantConfig, GrantName, JsonError, RestoreConfig, SnapshotConfig, VmConfig};

/// Where all requests live.
const PREFIX: &str = "/api/v1/";

/// One request, with everything needed to carry it out.
#[derive(Clone, Debug, PartialEq)]
pub enum Request {
    /// Is the VMM there, and which one is it?
    VmmPing,
    /// End the VMM, whatever the machine does.
    VmmShutdown,
    /// Define the machine.
    VmCreate(Box<VmConfig>),
    /// Start the machine that was defined.
    VmBoot,
    /// Describe the machine.
    VmInfo,
    /// Stop the machine's CPUs and devices where they are.
    VmPause,
    /// Let a paused machine go on.
    VmResume,
    /// Take the machine's power away; its definition stays.
    VmShutdown,
    /// Forget the machine.
    VmDelete,
    /// Start the machine anew.
    VmReboot,
    /// Press the power button.
    VmPowerButton,
    /// Save the paused machine to a directory.
    VmSnapshot(SnapshotConfig),
    /// Save the running machine to a directory while it goes on running.
    VmLiveSnapshot(SnapshotConfig),
    /// Keeps what the machine has touched beside the snapshot that it came from.
    VmWorkingSet(SnapshotConfig),
    /// Make a machine from a snapshot.
    VmRestore(RestoreConfig),
    /// Make another process with a machine like the template's; only a zygote answers it.
    VmClone(CloneConfig),
    /// Let the guest use a file or directory, which is named or comes along as a descriptor.
    VmAddGrant(GrantConfig),
    /// Take that back.
    VmRemoveGrant(GrantName),
}

/// The kind of a [`Request`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "each is the request of the same name")]
pub enum Action {
    VmmPing,
    VmmShutdown,
    VmCreate,
    VmBoot,
    VmInfo,
    VmPause,
    VmResume,
    VmShutdown,
    VmDelete,
    VmReboot,
    VmPowerButton,
    VmSnapshot,
    VmLiveSnapshot,
    /// `vm.working-set`
    VmWorkingSet,
    VmRestore,
    VmClone,
    VmAddGrant,
    VmRemoveGrant,
}

/// The two methods the protocol uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// Ask.
    Get,
    /// Change.
    Put,
}

impl Method {
    /// The method's name in HTTP.
    pub fn name(self) -> &'static str {
        match self {
            Self::Get => "GET",
            Self::Put => "PUT",
        }
    }
}

/// One request of the protocol.
struct Route {
    action: Action,
    method: Method,
    /// The path, below the prefix.
    name: &'static str,
    /// The second line of the answer when the request fails. Existing clients show or match these.
    failed: &'static str,
}

const fn route(action: Action, method: Method, name: &'static str, failed: &'static str) -> Route {
    Route { action, method, name, failed }
}

const ROUTES: &[Route] = &[
    route(Action::VmmPing, Method::Get, "vmm.ping", "The VMM does not answer"),
    route(Action::VmmShutdown, Method::Put, "vmm.shutdown", "The VMM could not shutdown"),
    route(Action::VmCreate, Method::Put, "vm.create", "The VM could not be created"),
    route(Action::VmBoot, Method::Put, "vm.boot", "The VM could not boot"),
    route(Action::VmInfo, Method::Get, "vm.info", "The VM info is not available"),
    route(Action::VmPause, Method::Put, "vm.pause", "The VM could not be paused"),
    route(Action::VmResume, Method::Put, "vm.resume", "The VM could not resume"),
    route(Action::VmShutdown, Method::Put, "vm.shutdown", "The VM could not shutdown"),
    route(Action::VmDelete, Method::Put, "vm.delete", "The VM could not be deleted"),
    route(Action::VmReboot, Method::Put, "vm.reboot", "The VM could not reboot"),
    route(Action::VmPowerButton, Method::Put, "vm.power-button", "The power button could not be triggered"),
    route(Action::VmSnapshot, Method::Put, "vm.snapshot", "The VM could not be snapshotted"),
    route(Action::VmLiveSnapshot, Method::Put, "vm.live-snapshot", "The VM could not be snapshotted"),
    route(Action::VmWorkingSet, Method::Put, "vm.working-set", "The working set could not be recorded"),
    route(Action::VmRestore, Method::Put, "vm.restore", "The VM could not be restored"),
    route(Action::VmClone, Method::Put, "vm.clone", "The VM could not be cloned"),
    route(Action::VmAddGrant, Method::Put, "vm.add-grant", "The grant could not be added"),
    route(Action::VmRemoveGrant, Method::Put, "vm.remove-grant", "The grant could not be removed"),
];

/// Requests of Cloud Hypervisor's that are not supported yet.
const NOT_SUPPORTED: &[&str] = &[
    "vm.add-device",
    "vm.add-disk",
    "vm.add-fs",
    "vm.add-generic-vhost-user",
    "vm.add-gpu",
    "vm.add-net",
    "vm.add-pmem",
    "vm.add-user-device",
    "vm.add-vdpa",
    "vm.add-vsock",
    "vm.coredump",
    "vm.counters",
    "vm.nmi",
    "vm.receive-migration",
    "vm.remove-device",
    "vm.resize",
    "vm.resize-disk",
    "vm.resize-zone",
    "vm.send-migration",
];

/// Why a method, path and body are no [`Request`].
#[derive(Debug, Error)]
pub enum RequestError {
    /// There is nothing of that name.
    #[error("Not Found")]
    NotFound,
    /// The method does not go with the path.
    #[error("Bad Request")]
    Method,
    /// The body of a request that needs one is missing.
    #[error("the request needs a JSON body")]
    NoBody,
    /// The body cannot be read.
    #[error(transparent)]
    Body(#[from] JsonError),
    /// Cloud Hypervisor knows it, this VMM does not yet.
    #[error("{0} is not supported yet")]
    NotSupported(&'static str),
}

impl Action {
    fn route(self) -> &'static Route {
        // The tests hold the table to be complete; the first entry stands in for what cannot happen.
        ROUTES.iter().find(|route| route.action == self).unwrap_or(&ROUTES[0])
    }

    /// The HTTP method.
    pub fn method(self) -> Method {
        self.route().method
    }

    /// The name, such as `vm.boot`: the last part of the path.
    pub fn name(self) -> &'static str {
        self.route().name
    }

    /// The whole path.
    pub fn path(self) -> String {
        format!("{PREFIX}{}", self.name())
    }

    /// The sentence that says that it failed.
    pub(crate) fn failed(self) -> &'static str {
        self.route().failed
    }
}

impl Request {
    /// Reads a request off its parts.
    ///
    /// # Errors
    /// See [`RequestError`].
    pub fn parse(method: &str, path: &str, body: &[u8]) -> Result<Self, RequestError> {
        let path = path.split_once('?').map_or(path, |(path, _)| path);
        let name = path.strip_prefix(PREFIX).ok_or(RequestError::NotFound)?;
        let Some(route) = ROUTES.iter().find(|route| route.name == name) else {
            let known = NOT_SUPPORTED.iter().find(|known| **known == name);
            return Err(known.map_or(RequestError::NotFound, |name| RequestError::NotSupported(name)));
        };
        if method != route.method.name() {
            return Err(RequestError::Method);
        }
        Ok(match route.action {
            Action::VmmPing => Self::VmmPing,
            Action::VmmShutdown => Self::VmmShutdown,
            Action::VmCreate
            | Action::VmSnapshot
            | Action::VmLiveSnapshot
            | Action::VmWorkingSet
            | Action::VmRestore
            | Action::VmAddGrant
            | Action::VmRemoveGrant
                if body.is_empty() =>
            {
                return Err(RequestError::NoBody);
            }
            Action::VmCreate => Self::VmCreate(Box::new(VmConfig::from_json(body)?)),
            Action::VmBoot => Self::VmBoot,
            Action::VmInfo => Self::VmInfo,
            Action::VmPause => Self::VmPause,
            Action::VmResume => Self::VmResume,
            Action::VmShutdown => Self::VmShutdown,
            Action::VmDelete => Self::VmDelete,
            Action::VmReboot => Self::VmReboot,
            Action::VmPowerButton => Self::VmPowerButton,
            Action::VmSnapshot => Self::VmSnapshot(SnapshotConfig::from_json(body)?),
            Action::VmLiveSnapshot => Self::VmLiveSnapshot(SnapshotConfig::from_json(body)?),
            Action::VmWorkingSet => Self::VmWorkingSet(SnapshotConfig::from_json(body)?),
            Action::VmRestore => Self::VmRestore(RestoreConfig::from_json(body)?),
            Action::VmClone if body.is_empty() => Self::VmClone(CloneConfig::default()),
            Action::VmClone => Self::VmClone(CloneConfig::from_json(body)?),
            Action::VmAddGrant => Self::VmAddGrant(GrantConfig::from_json(body)?),
            Action::VmRemoveGrant => Self::VmRemoveGrant(GrantName::from_json(body)?),
        })
    }

    /// The request's kind.
    pub fn action(&self) -> Action {
        match self {
            Self::VmmPing => Action::VmmPing,
            Self::VmmShutdown => Action::VmmShutdown,
            Self::VmCreate(_) => Action::VmCreate,
            Self::VmBoot => Action::VmBoot,
            Self::VmInfo => Action::VmInfo,
            Self::VmPause => Action::VmPause,
            Self::VmResume => Action::VmResume,
            Self::VmShutdown => Action::VmShutdown,
            Self::VmDelete => Action::VmDelete,
            Self::VmReboot => Action::VmReboot,
            Self::VmPowerButton => Action::VmPowerButton,
            Self::VmSnapshot(_) => Action::VmSnapshot,
            Self::VmLiveSnapshot(_) => Action::VmLiveSnapshot,
            Self::VmWorkingSet(_) => Action::VmWorkingSet,
            Self::VmRestore(_) => Action::VmRestore,
            Self::VmClone(_) => Action::VmClone,
            Self::VmAddGrant(_) => Action::VmAddGrant,
            Self::VmRemoveGrant(_) => Action::VmRemoveGrant,
        }
    }

    /// The JSON that goes along, if any.
    ///
    /// # Errors
    /// A path in the configuration that is not UTF-8.
    pub fn body(&self) -> Result<Option<Vec<u8>>, serde_json::Error> {
        match self {
            Self::VmCreate(config) => json(config).map(Some),
            Self::VmSnapshot(config) | Self::VmLiveSnapshot(config) | Self::VmWorkingSet(config) => {
                json(config).map(Some)
            }
            Self::VmRestore(config) => json(config).map(Some),
            Self::VmClone(config) => json(config).map(Some),
            Self::VmAddGrant(grant) => json(grant).map(Some),
            Self::VmRemoveGrant(grant) => json(grant).map(Some),
            _ => Ok(None),
        }
    }
}

fn json<T: Serialize>(value: &T) -> Result<Vec<u8>, serde_json::Error> {
    serde_json::to_vec(value)
}

#[cfg(test)]
mod tests {
    use vmm_config::MemoryRestoreMode;

    use super::*;

    fn all() -> Vec<Request> {
        vec![
            Request::VmmPing,
            Request::VmmShutdown,
            Request::VmCreate(Box::default()),
            Request::VmBoot,
            Request::VmInfo,
            Request::VmPause,
            Request::VmResume,
            Request::VmShutdown,
            Request::VmDelete,
            Request::VmReboot,
            Request::VmPowerButton,
            Request::VmSnapshot(SnapshotConfig { destination_url: "file:///s".into() }),
            Request::VmLiveSnapshot(SnapshotConfig { destination_url: "file:///l".into() }),
            Request::VmWorkingSet(SnapshotConfig { destination_url: "file:///w".into() }),
            Request::VmRestore(RestoreConfig {
                source_url: "file:///s".into(),
                prefault: false,
                memory_restore_mode: MemoryRestoreMode::Copy,
                resume: true,
                no_share: false,
            }),
            Request::VmClone(CloneConfig { fds: vec!["api".into()], ..CloneConfig::default() }),
            Request::VmAddGrant(GrantConfig { path: Some("/p".into()), writable: true, ..GrantConfig::default() }),
            Request::VmRemoveGrant(GrantName { id: "i".into(), name: "n".into() }),
        ]
    }

    #[test]
    fn every_request_has_its_route_and_comes_back_from_it() {
        assert_eq!(ROUTES.len(), all().len());
        for request in all() {
            let action = request.action();
            assert_eq!(action.route().action, action);
            let body = request.body().unwrap().unwrap_or_default();
            assert_eq!(Request::parse(action.method().name(), &action.path(), &body).unwrap(), request);
        }
    }

    #[test]
    fn what_is_no_request_is_told_apart() {
        let parse = |method, path| Request::parse(method, path, b"").unwrap_err();
        assert!(matches!(parse("GET", "/api/v1/vm.nothing"), RequestError::NotFound));
        assert!(matches!(parse("GET", "/vm.info"), RequestError::NotFound));
        assert!(matches!(parse("POST", "/api/v1/vm.boot"), RequestError::Method));
        assert!(matches!(parse("GET", "/api/v1/vm.boot"), RequestError::Method));
        assert!(matches!(parse("PUT", "/api/v1/vm.create"), RequestError::NoBody));
        assert!(matches!(parse("PUT", "/api/v1/vm.resize"), RequestError::NotSupported("vm.resize")));
        assert!(Request::parse("GET", "/api/v1/vm.info?x=1", b"").is_ok());
    }
}
