//! Calls between apps: a process in this VM uses a service that the app of another VM offers. What a service is is in that app's
//! file, and who may use it in the policy; the caller knows names only.
//!
//! Each call has a thread: it waits for the user where the policy says so, and nothing else may wait for that.

mod relay;

use std::{
    io,
    os::{
        fd::OwnedFd,
        unix::net::{UnixListener, UnixStream},
    },
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use guest_proto::{Call, FromAgent, FromCaller, Link, LinkError, Reply, Request, Run, ToAgent};

use super::{
    folder::{self, VSOCK},
    vm::{self, AgentLink},
};
use crate::{
    home::is_name,
    policy::{DecisionPoint, Service},
};

/// The launcher's end of a connection from a caller.
type CallerLink = Link<FromCaller, FromAgent>;

/// Calls of one VM at once.
const CALLS: usize = 16;

/// Seconds a caller has to say what it wants, and to take the last frame.
const PATIENCE: u32 = 10;

/// Seconds the other VM has to start the service.
const START: u32 = 60;

/// The account in the VM that services run as.
const USER: &str = "user";

/// Who calls, for the service: an environment variable.
const CALLER: &str = "SPECTRUM_CALLER";

/// Why there is no call, or not to its end. The caller is told why it has none: nothing of the host is in these sentences.
#[derive(Debug, thiserror::Error)]
enum CallError {
    #[error("{0:?} cannot be the name of an app or a service")]
    Name(String),
    #[error("the policy denies it")]
    Denied,
    #[error("{0} does not run")]
    NotRunning(String),
    #[error("{app} offers no service {service}")]
    NoService { app: String, service: String },
    #[error("the service {service} of {app} cannot be started")]
    NotStarted { app: String, service: String, reason: String },
    #[error("there are {CALLS} calls already")]
    TooMany,
    #[error("the launcher cannot look for VMs")]
    Folder(#[source] io::Error),
    #[error("the caller broke the protocol or is gone: {0}")]
    Caller(#[source] LinkError),
    #[error("lost the service's VM: {0}")]
    Service(#[source] LinkError),
}

/// Serves calls of the VM whose connections `listener` accepts, for as long as this process lives.
pub fn serve(listener: UnixListener, point: Arc<DecisionPoint>) -> io::Result<()> {
    let accept = move || {
        let active = Arc::new(AtomicUsize::new(0));
        for stream in listener.incoming() {
            let stream = match stream {
                Ok(stream) => stream,
                Err(error) if is_of_one(&error) => continue,
                Err(error) => return log::error!("{:?} cannot call other apps any more: {error}", point.app()),
            };
            if active.fetch_add(1, Ordering::SeqCst) >= CALLS {
                active.fetch_sub(1, Ordering::SeqCst);
                // Without waiting: the socket takes so little at once.
                let _ = refuse(&mut CallerLink::new(stream.into()), &CallError::TooMany);
                continue;
            }
            let (point, counter) = (point.clone(), active.clone());
            let started = thread::Builder::new().name("call".into()).spawn(move || {
                if let Err(error) = carry(stream, &point) {
                    log::info!("a call by {:?}: {error}", point.app());
                }
                counter.fetch_sub(1, Ordering::SeqCst);
            });
            if started.is_err() {
                active.fetch_sub(1, Ordering::SeqCst);
            }
        }
    };
    thread::Builder::new().name("calls".into()).spawn(accept).map(drop)
}

/// Whether accepting failed for one connection only.
fn is_of_one(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted)
}

fn refuse(link: &mut Result<CallerLink, LinkError>, error: &CallError) -> Result<(), LinkError> {
    let Ok(link) = link else { return Ok(()) };
    link.queue(&FromAgent::Reply(Reply::Failed { message: error.to_string() }))?;
    link.flush()
}

/// Carries one call to its end.
fn carry(stream: UnixStream, point: &DecisionPoint) -> Result<(), CallError> {
    let mut caller = CallerLink::new(OwnedFd::from(stream)).map_err(CallError::Caller)?;
    let call = match caller.exchange(PATIENCE).map_err(CallError::Caller)? {
        FromCaller::Call(call) => call,
        FromCaller::Stdin(_) => return Err(CallError::Caller(LinkError::Closed)),
    };
    let mut service = match start(&call, point) {
        Ok(service) => service,
        Err(error) => {
            if let CallError::NotStarted { reason, .. } = &error {
                log::warn!("{error}: {reason}");
            }
            let failed = FromAgent::Reply(Reply::Failed { message: error.to_string() });
            caller.queue(&failed).and_then(|()| caller.finish(PATIENCE)).map_err(CallError::Caller)?;
            return Err(error);
        }
    };
    // Which process it is in the other VM is not the caller's business.
    caller.queue(&FromAgent::Reply(Reply::Started { pid: 0 })).map_err(CallError::Caller)?;
    relay::run(&mut caller, &mut service)?;
    caller.finish(PATIENCE).map_err(CallError::Caller)
}

/// Starts the service, if it may be used and is offered. Who may not use it does not learn whether it is.
fn start(call: &Call, point: &DecisionPoint) -> Result<AgentLink, CallError> {
    let Call { app, service } = call;
    if let Some(wrong) = [app, service].into_iter().find(|name| !is_name(name)) {
        return Err(CallError::Name(wrong.chars().take(64).collect()));
    }
    if !point.decide(Service::Exec, &format!("{app}:{service}")).allowed {
        return Err(CallError::Denied);
    }
    let (socket, argv) = find(app, service)?;
    let not_started = |reason: String| CallError::NotStarted { app: app.clone(), service: service.clone(), reason };
    let env = [(CALLER.to_owned(), point.app().to_owned())].into();
    let run = Run { argv, env, user: USER.into(), cwd: None, then_power_off: false, terminal: None };
    let mut link = vm::connect(&socket).map_err(|error| not_started(error.to_string()))?;
    link.queue(&ToAgent::Request(Request::Run(run))).map_err(CallError::Service)?;
    match link.exchange(START).map_err(CallError::Service)? {
        FromAgent::Reply(Reply::Started { .. }) => Ok(link),
        FromAgent::Reply(Reply::Failed { message }) => Err(not_started(super::relay::refused(&message).to_string())),
        _ => Err(not_started(super::relay::broken().to_string())),
    }
}

/// The connection into the VM of `app`, and the command that is its service. Of several VMs of the app the first one counts.
fn find(app: &str, service: &str) -> Result<(PathBuf, Vec<String>), CallError> {
    let all = folder::running().map_err(CallError::Folder)?;
    let of_app = all.into_iter().filter(|(_, state)| state.app == app && state.ready);
    let first = of_app.min_by_key(|(_, state)| state.started);
    let (folder, mut state) = first.ok_or_else(|| CallError::NotRunning(app.into()))?;
    match state.services.remove(service) {
        Some(argv) => Ok((folder.join(VSOCK), argv)),
        None => Err(CallError::NoService { app: app.into(), service: service.into() }),
    }
}
