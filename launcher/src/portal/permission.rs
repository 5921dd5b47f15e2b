//! The one place where portals ask what an application may do.

use crate::{
    places::Places,
    policy::{Action, Policy, Service},
};

/// What the policy says, as it is at this moment. Denied if there is no policy that can be read.
pub fn ask(service: Service, app: &str, target: &str) -> Action {
    let load = || -> Result<Policy, Box<dyn std::error::Error>> { Ok(Policy::load(&Places::find()?)?) };
    match load() {
        Ok(policy) => policy.decide(service, app, target).action,
        Err(error) => {
            log::warn!("{app}: {service} is denied: {error}");
            Action::Deny
        }
    }
}
