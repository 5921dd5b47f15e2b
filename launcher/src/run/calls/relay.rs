//! The streams of one call, between two VMs that may both be hostile.
//!
//! A frame is taken from one side only when the last one has left for the other: neither can make the launcher keep more than a
//! few frames. Windows are the agent's own: it ends a call whose caller sends more than was granted.

use std::os::fd::{AsFd, BorrowedFd};

use guest_proto::{FromAgent, FromCaller, Link, LinkError, Message, ToAgent};
use rustix::{
    event::{PollFd, PollFlags, poll},
    io::Errno,
};

use super::{AgentLink, CallError, CallerLink};

/// Carries the streams until the service has ended. The last frame to the caller may still be queued then.
pub fn run(caller: &mut CallerLink, service: &mut AgentLink) -> Result<(), CallError> {
    loop {
        caller.flush().map_err(CallError::Caller)?;
        service.flush().map_err(CallError::Service)?;
        if caller.is_idle()
            && let Some(frame) = service.received().map_err(CallError::Service)?
        {
            let last = matches!(frame, FromAgent::Exit(_));
            if matches!(frame, FromAgent::Hello(_) | FromAgent::Reply(_)) {
                return Err(CallError::Service(LinkError::Closed));
            }
            caller.queue(&frame).map_err(CallError::Caller)?;
            if last {
                return Ok(());
            }
            continue;
        }
        if service.is_idle()
            && let Some(frame) = caller.received().map_err(CallError::Caller)?
        {
            let FromCaller::Stdin(bytes) = frame else { return Err(CallError::Caller(LinkError::Closed)) };
            service.queue(&ToAgent::Stdin(bytes)).map_err(CallError::Service)?;
            continue;
        }
        // The end of a caller is noticed even while nothing more can be taken from it.
        let from_caller = interest(caller, service.is_idle()) | PollFlags::RDHUP;
        let from_service = interest(service, caller.is_idle());
        let [from_caller, from_service] = wait([(caller.as_fd(), from_caller), (service.as_fd(), from_service)])?;
        if !service.is_idle() && hung_up(from_caller) {
            return Err(CallError::Caller(LinkError::Closed));
        }
        if service.is_idle() && readable(from_caller) && !caller.fill().map_err(CallError::Caller)? {
            return Err(CallError::Caller(LinkError::Closed));
        }
        if caller.is_idle() && readable(from_service) && !service.fill().map_err(CallError::Service)? {
            return Err(CallError::Service(LinkError::Closed));
        }
    }
}

/// What to wait for: room for what is queued, and input if it can be passed on.
fn interest<Rx: Message, Tx: Message>(link: &Link<Rx, Tx>, takes: bool) -> PollFlags {
    let flags = link.interest();
    if takes { flags } else { flags - PollFlags::IN }
}

fn hung_up(flags: PollFlags) -> bool {
    flags.intersects(PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR)
}

fn readable(flags: PollFlags) -> bool {
    flags.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR)
}

/// Waits for what is wanted of each. One that nothing is wanted of is left out, or its hang-up would be reported for ever.
fn wait(all: [(BorrowedFd<'_>, PollFlags); 2]) -> Result<[PollFlags; 2], CallError> {
    let wanted = all.iter().filter(|(_, flags)| !flags.is_empty());
    let mut set: Vec<PollFd<'_>> = wanted.map(|(fd, flags)| PollFd::from_borrowed_fd(*fd, *flags)).collect();
    match poll(&mut set, None) {
        Ok(_) => {}
        Err(Errno::INTR) => return Ok([PollFlags::empty(); 2]),
        Err(errno) => return Err(CallError::Caller(errno.into())),
    }
    let mut happened = set.iter().map(PollFd::revents);
    Ok(all.map(|(_, flags)| if flags.is_empty() { flags } else { happened.next().unwrap_or(PollFlags::empty()) }))
}
