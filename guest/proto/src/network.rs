//! What both sides know of the guest's network: all VMs have the same addresses, since each has a network of its own.

use std::net::Ipv4Addr;

/// The guest's address.
pub const GUEST_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);

/// How many bits of it are those of its network.
pub const NETWORK_BITS: u8 = 24;

/// The way out of it.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);

/// Who answers DNS.
pub const RESOLVER: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 3);
