//! A new identity for each VM, whatever it was made from.

use std::time::{SystemTime, UNIX_EPOCH};

use guest_proto::{BootId, Identity, MachineId, Request, Seed};
use rustix::rand::{GetRandomFlags, getrandom};

use super::{RunError, io_error, relay, vm::AgentLink};

/// Lets the agent at the other end of `link` give the VM an identity that no other has. Nothing runs in it before.
pub fn give(link: AgentLink, hostname: &str) -> Result<(), RunError> {
    relay::carry_out(link, Request::Wake(new(hostname)?))
}

fn new(hostname: &str) -> Result<Identity, RunError> {
    let hostname = Some(hostname.parse()?);
    let seed = Seed::new(random()?);
    let (machine_id, boot_id) = (MachineId::from_random(random()?), BootId::from_random(random()?));
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let realtime = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX);
    Ok(Identity { seed, realtime, machine_id, boot_id, hostname })
}

/// Up to 256 bytes come whole: getrandom(2).
fn random<const N: usize>() -> Result<[u8; N], RunError> {
    let mut bytes = [0; N];
    getrandom(&mut bytes, GetRandomFlags::empty()).map_err(io_error("get random numbers for the VM"))?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_are_alike() {
        let before = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos();
        let [a, b] = [new("foot").unwrap(), new("foot").unwrap()];
        let after = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos();
        assert!(a.seed != b.seed && a.machine_id != b.machine_id && a.boot_id != b.boot_id);
        assert!((before..=after).contains(&a.realtime.into()));
        assert_eq!(a.hostname.unwrap().as_str(), "foot");
        assert!(new("not a name").is_err());
    }
}
