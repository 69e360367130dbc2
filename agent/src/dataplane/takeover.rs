//! Addresses that this node takes over: the link is told, so that who has sent to another node sends here.
//!
//! ```text
//!  new on this node, or on a new uplink ─► gratuitous ARP, or an unsolicited advertisement: now, after
//!                                          half a second and after one and a half
//!  IPv6                                 ─► the multicast groups that are asked for it are joined
//! ```
//! Answering whoever asks is the programs' part and needs no agent; this is not: an address that moves
//! while no agent runs is found when its neighbours ask again. The groups are left with the agent's
//! sockets, and joined again when it starts.
//!
//! Source: RFC 5227 (announcements), RFC 4861 7.2.6; sent thrice because nobody acknowledges.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use ebpf_maps::endpoint::Mac;
use ebpf_maps::services::Addr;
use ebpf_maps::uplink::UplinkValue;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use super::sys;
use crate::services::index::ip_of;

/// What follows the first time.
const AGAIN: [Duration; 2] = [Duration::from_millis(500), Duration::from_secs(1)];
/// Groups that one socket joins: each takes a little of the memory that a socket may have for options.
const GROUPS_PER_SOCKET: usize = 64;
/// All hosts of the link, as hardware addresses: of IPv4, and of IPv6 (ff02::1).
pub(super) const BROADCAST: Mac = [0xff; 6];
const ALL_NODES_MAC: Mac = [0x33, 0x33, 0, 0, 0, 1];
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
/// The solicited-node group of an address is this with its last three bytes.
const SOLICITED_NODE: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00, 0);
const ICMP_V6: u8 = 58;
const ADVERTISEMENT: u8 = 136;
/// What the sender says replaces what was known.
const OVERRIDE: u8 = 0x20;
/// ARP's operations.
const REQUEST: u8 = 1;
const REPLY: u8 = 2;

/// An uplink's index, and what the programs know of it.
pub(super) type Uplinks = BTreeMap<u32, UplinkValue>;

/// The groups that are joined.
#[derive(Default)]
pub(super) struct Takeovers {
    groups: BTreeSet<(u32, Ipv6Addr)>,
    sockets: Vec<UdpSocket>,
}

impl Takeovers {
    /// Joins the groups in which the announced addresses are asked for, and leaves all others.
    pub(super) fn listen(&mut self, uplinks: &Uplinks, announced: &BTreeSet<Addr>) {
        let addresses = announced.iter().map(ip_of);
        let groups: BTreeSet<Ipv6Addr> = addresses.filter_map(group_of).collect();
        let wanted = uplinks.keys();
        let wanted: BTreeSet<(u32, Ipv6Addr)> = wanted
            .flat_map(|uplink| groups.iter().map(|group| (*uplink, *group)))
            .collect();
        if wanted == self.groups {
            return;
        }
        // Joined anew before the old sockets go: a group that stays is never left.
        let mut sockets: Vec<UdpSocket> = Vec::new();
        let mut failed = None;
        for (number, (uplink, group)) in wanted.iter().enumerate() {
            if number.is_multiple_of(GROUPS_PER_SOCKET) {
                match UdpSocket::bind("[::]:0") {
                    Ok(socket) => sockets.push(socket),
                    Err(error) => failed = Some(error),
                }
            }
            let joined = sockets
                .last()
                .map(|own| own.join_multicast_v6(group, *uplink));
            if let Some(Err(error)) = joined {
                failed = Some(error);
            }
        }
        if let Some(error) = failed {
            tracing::warn!(%error, "some IPv6 load balancer addresses may not be found on the link");
        }
        self.groups = wanted;
        self.sockets = sockets;
    }
}

/// Tells the link of every uplink that these addresses are there, in the namespace of the calling thread.
/// The first time is over when it returns.
pub(super) fn tell(uplinks: &Uplinks, addresses: &BTreeSet<Addr>) {
    let frames: Vec<(u32, Vec<u8>)> = uplinks
        .iter()
        .flat_map(|(uplink, value)| {
            let frames = addresses
                .iter()
                .flat_map(move |addr| frames(value, ip_of(addr)));
            frames.map(move |frame| (*uplink, frame))
        })
        .collect();
    if frames.is_empty() {
        return;
    }
    let told = packet_socket().and_then(|socket| {
        send(&socket, &frames)?;
        let again = move || {
            for wait in AGAIN {
                std::thread::sleep(wait);
                // The interface may have gone; the first time it was there.
                let _ = send(&socket, &frames);
            }
        };
        let thread = std::thread::Builder::new().name("takeover".into());
        thread.stack_size(64 * 1024).spawn(again).map(drop)
    });
    if let Err(error) = told {
        tracing::warn!(%error, "the link is not told of a load balancer address: its hosts find out by asking");
    }
}

pub(super) fn packet_socket() -> io::Result<OwnedFd> {
    // Of no protocol: it sends, and nothing is to be received.
    let flags = SockFlag::SOCK_CLOEXEC;
    Ok(socket(AddressFamily::Packet, SockType::Raw, flags, None)?)
}

/// All of them, whatever became of the ones before; the first failure.
fn send(socket: &OwnedFd, frames: &[(u32, Vec<u8>)]) -> io::Result<()> {
    let mut first = Ok(());
    for (uplink, frame) in frames {
        first = first.and(sys::send_frame(socket.as_fd(), *uplink, frame));
    }
    first
}

/// What is sent for one address by one uplink.
fn frames(uplink: &UplinkValue, address: IpAddr) -> Vec<Vec<u8>> {
    match address {
        IpAddr::V4(address) => [REQUEST, REPLY]
            .map(|operation| arp(operation, uplink.mac, address))
            .into(),
        IpAddr::V6(address) => vec![advertisement(uplink.mac, address)],
    }
}

fn arp(operation: u8, own: Mac, address: Ipv4Addr) -> Vec<u8> {
    let target = if operation == REQUEST {
        [0; 6]
    } else {
        BROADCAST
    };
    let mut frame = [&BROADCAST[..], &own, &[8, 6]].concat();
    frame.extend([0, 1, 8, 0, 6, 4, 0, operation]);
    frame.extend([&own[..], &address.octets(), &target, &address.octets()].concat());
    frame
}

fn advertisement(own: Mac, address: Ipv6Addr) -> Vec<u8> {
    let option = [2, 1];
    let mut message = vec![ADVERTISEMENT, 0, 0, 0, OVERRIDE, 0, 0, 0];
    message.extend([&address.octets()[..], &option, &own].concat());
    let length = message.len() as u16;
    let pseudo = [
        &address.octets()[..],
        &ALL_NODES.octets(),
        &[0, 0],
        &length.to_be_bytes(),
        &[0, 0, 0, ICMP_V6],
    ];
    let sum = checksum(&[&pseudo.concat()[..], &message].concat());
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    let mut frame = [&ALL_NODES_MAC[..], &own, &[0x86, 0xdd, 0x60, 0, 0, 0]].concat();
    frame.extend(length.to_be_bytes());
    frame.extend([ICMP_V6, 255]);
    frame.extend([&address.octets()[..], &ALL_NODES.octets(), &message].concat());
    frame
}

/// RFC 1071, over an even number of bytes.
pub(super) fn checksum(bytes: &[u8]) -> u16 {
    let (pairs, _) = bytes.as_chunks::<2>();
    let sum: u32 = pairs
        .iter()
        .map(|pair| u32::from(u16::from_be_bytes(*pair)))
        .sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    !((sum & 0xffff) + (sum >> 16)) as u16
}

/// The solicited-node multicast address (RFC 4291, 2.7.1).
pub(super) fn group_of(address: IpAddr) -> Option<Ipv6Addr> {
    let IpAddr::V6(address) = address else {
        return None;
    };
    let (mut group, octets) = (SOLICITED_NODE.octets(), address.octets());
    group[13..].copy_from_slice(&octets[13..]);
    Some(group.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_asked_for_in_its_own_group() {
        let group = |text: &str| group_of(text.parse().unwrap()).map(|group| group.to_string());
        assert_eq!(
            group("2001:db8::aa:bbcc:ddee"),
            Some("ff02::1:ffcc:ddee".into())
        );
        assert_eq!(group("192.0.2.1"), None);
    }

    #[test]
    fn a_takeover_is_told_in_the_words_of_each_family() {
        let uplink = UplinkValue {
            mac: [2, 0, 0, 0, 0, 1],
            ..UplinkValue::default()
        };
        let told = frames(&uplink, "192.0.2.9".parse().unwrap());
        assert_eq!(told.len(), 2);
        assert!(
            told.iter()
                .all(|frame| frame.len() == 42 && frame[..6] == BROADCAST)
        );
        assert_eq!((told[0][21], told[1][21]), (REQUEST, REPLY));
        assert!(told.iter().all(|frame| frame[28..32] == [192, 0, 2, 9]));
        let told = frames(&uplink, "2001:db8::9".parse().unwrap());
        assert_eq!((told.len(), told[0].len()), (1, 86));
    }
}
