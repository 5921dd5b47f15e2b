//! The network interface, if the VM has one: an address, a way out and a resolver that are the same in all VMs, set up by
//! rtnetlink(7).

use std::{fs, io, net::Ipv4Addr, path::Path};

use guest_proto::network::{GATEWAY, GUEST_ADDRESS, NETWORK_BITS, RESOLVER};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink::SocketAddrNetlink, recv, sendto, socket_with,
};

/// Where the kernel lists interfaces.
const INTERFACES: &str = "/sys/class/net";

/// Names of Ethernet interfaces begin so, as the kernel gives them.
const ETHERNET: &str = "eth";

/// Sets the first interface up, if there is one.
pub fn configure() -> io::Result<()> {
    let Some(index) = first_interface(Path::new(INTERFACES))? else { return Ok(()) };
    let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
    for message in [link_up(index), address(index), route(index)] {
        let kernel = SocketAddrNetlink::new(0, 0);
        sendto(&socket, &message, SendFlags::empty(), &kernel)?;
        let mut answer = [0; 512];
        let (n, _) = recv(&socket, &mut answer, RecvFlags::empty())?;
        acknowledged(answer.get(..n).unwrap_or_default())?;
    }
    // The answers of the resolver may be long, and it is asked by UDP.
    fs::write("/etc/resolv.conf", format!("nameserver {RESOLVER}\noptions edns0\n"))
}

/// The kernel's number of the first Ethernet interface.
fn first_interface(folder: &Path) -> io::Result<Option<u32>> {
    let names = fs::read_dir(folder)?.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    let Some(first) = names.filter(|name| name.starts_with(ETHERNET)).min() else { return Ok(None) };
    let text = fs::read_to_string(folder.join(first).join("ifindex"))?;
    text.trim().parse().map(Some).map_err(io::Error::other)
}

/// A request with a body and attributes, netlink(7); all its parts are multiples of 4 bytes.
fn request(kind: u16, flags: u16, body: &[u8], attributes: &[(u16, [u8; 4])]) -> Vec<u8> {
    let attribute = |(kind, value): &(u16, [u8; 4])| [&8u16.to_ne_bytes()[..], &kind.to_ne_bytes(), value].concat();
    let attributes: Vec<u8> = attributes.iter().flat_map(attribute).collect();
    let len = u32::try_from(16 + body.len() + attributes.len()).unwrap_or_default();
    let flags = flags | REQUEST_AND_ACKNOWLEDGE;
    let header = [&len.to_ne_bytes()[..], &kind.to_ne_bytes(), &flags.to_ne_bytes(), &[0; 8]].concat();
    [header.as_slice(), body, &attributes].concat()
}

const IPV4: u8 = 2;
/// NLM_F_REQUEST, NLM_F_ACK.
const REQUEST_AND_ACKNOWLEDGE: u16 = 0x1 | 0x4;
/// NLM_F_CREATE.
const CREATE: u16 = 0x400;

/// `struct ifinfomsg`: family, padding, type, index, flags, mask of flags.
fn link_up(index: u32) -> Vec<u8> {
    let up = libc::IFF_UP.cast_unsigned().to_ne_bytes();
    let body = [&[0; 4][..], &index.to_ne_bytes(), &up, &up].concat();
    request(libc::RTM_NEWLINK, 0, &body, &[])
}

/// `struct ifaddrmsg`: family, bits of the network, flags, scope, index.
fn address(index: u32) -> Vec<u8> {
    let body = [&[IPV4, NETWORK_BITS, 0, 0][..], &index.to_ne_bytes()].concat();
    let address = GUEST_ADDRESS.octets();
    request(libc::RTM_NEWADDR, CREATE, &body, &[(libc::IFA_LOCAL, address), (libc::IFA_ADDRESS, address)])
}

/// `struct rtmsg`: family, bits of destination and source, type of service, table, protocol, scope, type, flags.
fn route(index: u32) -> Vec<u8> {
    let body =
        [IPV4, 0, 0, 0, libc::RT_TABLE_MAIN, libc::RTPROT_BOOT, libc::RT_SCOPE_UNIVERSE, libc::RTN_UNICAST, 0, 0, 0, 0];
    let attributes = [(libc::RTA_GATEWAY, Ipv4Addr::octets(&GATEWAY)), (libc::RTA_OIF, index.to_ne_bytes())];
    request(libc::RTM_NEWROUTE, CREATE, &body, &attributes)
}

/// `struct nlmsgerr`: behind the header, a negative errno or zero.
fn acknowledged(answer: &[u8]) -> io::Result<()> {
    let code = answer.get(16..20).and_then(|bytes| bytes.try_into().ok()).map(i32::from_ne_bytes);
    match code {
        Some(0) => Ok(()),
        Some(code) if code < 0 => Err(io::Error::from_raw_os_error(-code)),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_ethernet_interface() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(first_interface(folder.path()).unwrap(), None);
        for (name, index) in [("lo", "1"), ("eth1", "3"), ("eth0", "2")] {
            fs::create_dir(folder.path().join(name)).unwrap();
            fs::write(folder.path().join(name).join("ifindex"), format!("{index}\n")).unwrap();
        }
        assert_eq!(first_interface(folder.path()).unwrap(), Some(2));
    }

    #[test]
    fn requests_say_how_long_they_are() {
        for message in [link_up(2), address(2), route(2)] {
            assert_eq!(message[..4], u32::try_from(message.len()).unwrap().to_ne_bytes());
            assert_eq!(message.len() % 4, 0);
        }
        assert_eq!(link_up(2).len(), 32);
    }

    #[test]
    fn refusals_are_errors() {
        let answer = |code: i32| [&[0; 16][..], &code.to_ne_bytes()].concat();
        acknowledged(&answer(0)).unwrap();
        assert_eq!(acknowledged(&answer(-libc::ENODEV)).unwrap_err().raw_os_error(), Some(libc::ENODEV));
        assert!(acknowledged(&[0; 10]).is_err());
    }
}
