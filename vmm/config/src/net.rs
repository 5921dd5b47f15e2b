//! `net`: network interfaces.

use std::fmt;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::keyvalue::{ParseError, Syntax};
use crate::unsupported::{Section, Unsupported};

/// One network interface. Frames go to one of `tap`, `socket` and `fd`; with none of them the link is down until a clone is
/// handed a descriptor.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct NetConfig {
    /// Name of a tap interface of the host, as it is configured there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tap: Option<String>,
    /// Unix stream socket that takes and gives Ethernet frames, each behind its length in 4 bytes, big-endian, as passt and
    /// QEMU's `-netdev stream` do.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
    /// An open descriptor, handed down by the parent process: such a socket, connected, or a tap. It means nothing after a
    /// restore.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fd: Option<i32>,
    /// The guest's MAC address. Not given: a random one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mac: Option<MacAddr>,
    /// The largest packet in bytes, without the Ethernet header. Not given: the guest's own choice.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// Destinations to which the guest's packets are dropped. If there are any, so is all that is neither IPv4 nor ARP.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub deny: Vec<Ipv4Network>,
    /// Name of the device, unique in the machine. Not given: one is made up.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Options that are not supported yet.
    #[serde(flatten)]
    pub unsupported: Unsupported<NetConfig>,
}

impl Section for NetConfig {
    const UNSUPPORTED: &'static [&'static str] = &[
        "bw_one_time_burst",
        "bw_refill_time",
        "bw_size",
        "fds",
        "host_mac",
        "iommu",
        "ip",
        "mask",
        "ops_one_time_burst",
        "ops_refill_time",
        "ops_size",
        "pci_segment",
        "rate_limiter_config",
        "vhost_mode",
        "vhost_socket",
        "vhost_user",
    ];
}

impl NetConfig {
    /// The flag's syntax. Numbers and sizes of queues, and offloads, are taken for the sake of existing scripts if they ask for what
    /// there is.
    pub const SYNTAX: Syntax = Syntax {
        flag: "--net",
        words: &[],
        keys: &["tap", "socket", "fd", "mac", "mtu", "deny", "id", "num_queues", "queue_size"],
        unsupported: Self::UNSUPPORTED,
    };

    /// Reads `tap=NAME,mac=02:00:00:00:00:01,mtu=1500`.
    ///
    /// # Errors
    /// An unknown key or a value that cannot be read.
    pub fn parse(text: &str) -> Result<Self, ParseError> {
        let options = Self::SYNTAX.parse(text)?;
        if options.number::<u16>("num_queues")?.is_some_and(|queues| queues != 2) {
            let reason = "num_queues can only be 2, one for each direction";
            return Err(ParseError::Combination { flag: Self::SYNTAX.flag, reason });
        }
        if options.number::<u16>("queue_size")?.is_some_and(|size| size != 256) {
            let reason = "queue_size can only be 256";
            return Err(ParseError::Combination { flag: Self::SYNTAX.flag, reason });
        }
        let mac = match options.text("mac") {
            Some(text) => Some(text.parse().map_err(|_| options.bad("mac", text, "six bytes, as 02:00:00:00:00:01"))?),
            None => None,
        };
        let deny = options.text("deny").unwrap_or_default().trim_start_matches('[').trim_end_matches(']');
        let network =
            |text: &str| text.parse().map_err(|_| options.bad("deny", text, "a list such as [127.0.0.0/8,192.0.2.1]"));
        Ok(Self {
            tap: options.owned("tap"),
            socket: options.owned("socket"),
            fd: options.number("fd")?,
            mac,
            mtu: options.number("mtu")?,
            deny: deny.split(',').filter(|text| !text.is_empty()).map(network).collect::<Result<_, _>>()?,
            id: options.owned("id"),
            unsupported: Unsupported::default(),
        })
    }

    /// The identifier of the device, which is number `index` of its kind.
    pub fn name(&self, index: usize) -> String {
        self.id.clone().unwrap_or_else(|| format!("_net{index}"))
    }
}

/// An Ethernet address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddr(pub [u8; 6]);

impl MacAddr {
    /// Whether one interface can have it: it is neither a group's nor zero.
    pub fn is_unicast(self) -> bool {
        self.0[0] & 1 == 0 && self.0 != [0; 6]
    }
}

/// Text that is no address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("this is not an address: write 02:00:00:00:00:01 for Ethernet, 192.0.2.0/24 for IPv4")]
pub struct AddressError;

impl FromStr for MacAddr {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit()));
            *byte = part.and_then(|part| u8::from_str_radix(part, 16).ok()).ok_or(AddressError)?;
        }
        if parts.next().is_some() { Err(AddressError) } else { Ok(Self(bytes)) }
    }
}

impl TryFrom<String> for MacAddr {
    type Error = AddressError;

    fn try_from(text: String) -> Result<Self, AddressError> {
        text.parse()
    }
}

impl From<MacAddr> for String {
    fn from(mac: MacAddr) -> Self {
        mac.to_string()
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// An IPv4 address, or all that begin with the same bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Ipv4Network {
    address: Ipv4Addr,
    /// How many bits count, at most 32.
    bits: u8,
}

impl Ipv4Network {
    /// Those whose first `bits` bits are those of `address`; more than 32 are 32.
    pub fn new(address: Ipv4Addr, bits: u8) -> Self {
        Self { address, bits: bits.min(32) }
    }

    /// Whether `address` is one of them.
    pub fn contains(&self, address: Ipv4Addr) -> bool {
        let mask = u32::MAX.checked_shl(32 - u32::from(self.bits)).unwrap_or(0);
        (self.address.to_bits() ^ address.to_bits()) & mask == 0
    }
}

impl FromStr for Ipv4Network {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let (address, bits) = text.split_once('/').unwrap_or((text, "32"));
        let bits: u8 = bits.parse().ok().filter(|bits| *bits <= 32).ok_or(AddressError)?;
        Ok(Self { address: address.parse().map_err(|_| AddressError)?, bits })
    }
}

impl TryFrom<String> for Ipv4Network {
    type Error = AddressError;

    fn try_from(text: String) -> Result<Self, AddressError> {
        text.parse()
    }
}

impl From<Ipv4Network> for String {
    fn from(network: Ipv4Network) -> Self {
        network.to_string()
    }
}

impl fmt::Display for Ipv4Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.bits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cloud_hypervisors_flag_and_ours() {
        let net = NetConfig::parse("tap=vmtap0,mac=02:AA:00:00:00:01,mtu=9000,num_queues=2,queue_size=256,iommu=off")
            .unwrap();
        assert_eq!((net.tap.as_deref(), net.mtu), (Some("vmtap0"), Some(9000)));
        assert_eq!(net.mac.unwrap().to_string(), "02:aa:00:00:00:01");
        let net = NetConfig::parse("socket=/run/passt,deny=[127.0.0.0/8,192.0.2.1],id=lan").unwrap();
        assert_eq!((net.socket, net.id.as_deref()), (Some("/run/passt".into()), Some("lan")));
        assert_eq!(net.deny.iter().map(ToString::to_string).collect::<Vec<_>>(), ["127.0.0.0/8", "192.0.2.1/32"]);
        assert_eq!(NetConfig::parse("fd=7,deny=10.0.0.0/8").unwrap().deny.len(), 1);
    }

    #[test]
    fn every_mistake_gets_a_clear_sentence() {
        let mistake = |text: &str| NetConfig::parse(text).unwrap_err().to_string();
        assert!(mistake("tap=a,ip=192.168.0.1").contains("--net: ip is not supported yet"));
        assert!(mistake("vhost_user=on,socket=/s").contains("vhost_user is not supported yet"));
        assert!(mistake("tap=a,num_queues=4").contains("num_queues can only be 2"));
        assert!(mistake("tap=a,queue_size=512").contains("queue_size can only be 256"));
        for mac in ["02:00:00:00:00", "02:00:00:00:00:00:00", "2:0:0:0:0:0", "+2:00:00:00:00:00", "zz:00:00:00:00:00"] {
            assert!(mistake(&format!("mac={mac}")).contains("is not six bytes"), "{mac}");
        }
        for deny in ["10.0.0.0/33", "10.0.0", "::1"] {
            assert!(mistake(&format!("deny={deny}")).contains("is not a list such as"), "{deny}");
        }
    }

    #[test]
    fn networks_contain_what_begins_alike() {
        let contains =
            |network: &str, address: &str| network.parse::<Ipv4Network>().unwrap().contains(address.parse().unwrap());
        assert!(contains("127.0.0.0/8", "127.255.1.2") && !contains("127.0.0.0/8", "128.0.0.1"));
        assert!(contains("192.0.2.1", "192.0.2.1") && !contains("192.0.2.1", "192.0.2.0"));
        assert!(contains("1.2.3.4/0", "255.255.255.255"));
    }
}
