//! Which frames a guest may send. A network helper that connects as a process of the host (passt) reaches whatever the host
//! reaches itself, its own loopback included, so the limit is drawn in front of it.

use std::net::Ipv4Addr;

use vmm_config::Ipv4Network;

const ETHERTYPE_IPV4: [u8; 2] = [0x08, 0x00];
const ETHERTYPE_ARP: [u8; 2] = [0x08, 0x06];

/// Destinations that are out of bounds; without any, every frame may pass.
pub(super) struct Filter(Vec<Ipv4Network>);

impl Filter {
    pub(super) fn new(deny: &[Ipv4Network]) -> Self {
        Self(deny.to_vec())
    }

    /// Whether an Ethernet frame may be sent. What cannot be judged may not: other protocols, tagged and cut off frames.
    pub(super) fn allows(&self, frame: &[u8]) -> bool {
        if self.0.is_empty() {
            return true;
        }
        match frame.get(12..14).and_then(|bytes| bytes.try_into().ok()) {
            Some(ETHERTYPE_ARP) => true,
            // RFC 791: the version is the upper half of the first byte, the destination bytes 16 to 19.
            Some(ETHERTYPE_IPV4) if frame.get(14).is_some_and(|byte| byte >> 4 == 4) => {
                let destination: Option<[u8; 4]> = frame.get(30..34).and_then(|bytes| bytes.try_into().ok());
                destination.is_some_and(|to| !self.0.iter().any(|network| network.contains(Ipv4Addr::from(to))))
            }
            _ => false,
        }
    }
}
