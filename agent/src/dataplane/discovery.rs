//! Who has an address on the link: questions of this process's own, and their answers.
//!
//! ```text
//!  ask     ARP request, or neighbour solicitation ─► a packet socket
//!  answer  ARP replies ─► a packet socket that a filter keeps everything else from
//!          advertisements ─► a raw ICMPv6 socket, likewise
//! ```
//! The kernel's own table of neighbours is of no use for it: it asks when it has something to send, and
//! not as often.
//!
//! Source: RFC 826, RFC 4861 7.2.2.

use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use ebpf_maps::endpoint::Mac;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, socket};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::sys;
use super::takeover::{BROADCAST, checksum, group_of, packet_socket};
use crate::readiness;

const ETHERNET: usize = 14;
/// An ARP message for IPv4 over Ethernet, after its Ethernet header.
const ARP: usize = 28;
const ARP_HEAD: [u8; 6] = [0, 1, 8, 0, 6, 4];
const REQUEST: u8 = 1;
const REPLY: u8 = 2;
const ICMP_V6: u8 = 58;
const SOLICITATION: u8 = 135;
const ADVERTISEMENT: u8 = 136;
/// Options with a hardware address: the sender's, and that of who is advertised.
const SOURCE_LINK_ADDRESS: [u8; 2] = [1, 1];
const TARGET_LINK_ADDRESS: [u8; 2] = [2, 1];
/// An answer is smaller.
const FRAME_MAX: usize = 512;

/// Where a question is asked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Asked {
    /// The link.
    pub ifindex: u32,
    /// This node's hardware address there.
    pub mac: Mac,
    /// This node's address there, of the family that is asked for.
    pub from: IpAddr,
}

/// The sockets, in the namespace of the thread that opened them.
pub struct Discovery {
    send: OwnedFd,
    arp: AsyncFd<File>,
    /// None: this kernel has no IPv6.
    neighbours: Option<AsyncFd<File>>,
}

impl Discovery {
    /// To be called within a runtime.
    pub fn open() -> io::Result<Self> {
        let arp = packet_socket()?;
        sys::receive_arp_replies(arp.as_fd())?;
        let readable = |fd: OwnedFd| readiness::watch(fd.into(), Interest::READABLE);
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let raw = SockProtocol::IcmpV6;
        let neighbours = socket(AddressFamily::Inet6, SockType::Raw, flags, raw);
        let neighbours = match neighbours {
            Ok(socket) => {
                sys::receive_only_icmp6(socket.as_fd(), ADVERTISEMENT)?;
                Some(readable(socket)?)
            }
            Err(_) => None,
        };
        Ok(Self {
            send: packet_socket()?,
            arp: readable(arp)?,
            neighbours,
        })
    }

    /// Asks who has an address.
    ///
    /// * `to` – the hardware address to ask; none: whoever it concerns.
    pub fn ask(&self, at: Asked, address: IpAddr, to: Option<Mac>) -> io::Result<()> {
        match question(at, address, to) {
            Some(frame) => sys::send_frame(self.send.as_fd(), at.ifindex, &frame),
            None => Err(io::Error::other(
                "this node has no address of that family there",
            )),
        }
    }

    /// The next answer: an address, and the hardware address of who has it. Cancel-safe.
    pub async fn answer(&self) -> io::Result<(IpAddr, Mac)> {
        let advertised = async {
            match &self.neighbours {
                Some(socket) => next(socket, parse_advertisement).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            // Cancel-safe: what has been taken from a socket is returned.
            answer = next(&self.arp, parse_reply) => answer,
            answer = advertised => answer,
        }
    }
}

async fn next(
    socket: &AsyncFd<File>,
    parse: fn(&[u8]) -> Option<(IpAddr, Mac)>,
) -> io::Result<(IpAddr, Mac)> {
    let mut frame = [0; FRAME_MAX];
    loop {
        let length = socket
            .async_io(Interest::READABLE, |socket| {
                let flags = MsgFlags::MSG_DONTWAIT;
                Ok(recv(socket.as_raw_fd(), &mut frame, flags)?)
            })
            .await?;
        if let Some(answer) = parse(&frame[..length]) {
            return Ok(answer);
        }
    }
}

fn question(at: Asked, address: IpAddr, to: Option<Mac>) -> Option<Vec<u8>> {
    match (at.from, address) {
        (IpAddr::V4(from), IpAddr::V4(address)) => Some(arp(at.mac, from, address, to)),
        (IpAddr::V6(from), IpAddr::V6(address)) => solicitation(at.mac, from, address, to),
        _ => None,
    }
}

fn arp(own: Mac, from: Ipv4Addr, address: Ipv4Addr, to: Option<Mac>) -> Vec<u8> {
    let mut frame = [&to.unwrap_or(BROADCAST)[..], &own, &[8, 6]].concat();
    frame.extend([&ARP_HEAD[..], &[0, REQUEST]].concat());
    frame.extend([&own[..], &from.octets(), &[0; 6], &address.octets()].concat());
    frame
}

fn solicitation(own: Mac, from: Ipv6Addr, address: Ipv6Addr, to: Option<Mac>) -> Option<Vec<u8>> {
    let group = group_of(address.into())?;
    let [.., a, b, c, d] = group.octets();
    let (to, destination) = match to {
        Some(to) => (to, address),
        None => ([0x33, 0x33, a, b, c, d], group),
    };
    let mut message = vec![SOLICITATION, 0, 0, 0, 0, 0, 0, 0];
    message.extend([&address.octets()[..], &SOURCE_LINK_ADDRESS, &own].concat());
    let length = message.len() as u16;
    let pseudo = [
        &from.octets()[..],
        &destination.octets(),
        &[0, 0],
        &length.to_be_bytes(),
        &[0, 0, 0, ICMP_V6],
    ];
    let sum = checksum(&[&pseudo.concat()[..], &message].concat());
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    let mut frame = [&to[..], &own, &[0x86, 0xdd, 0x60, 0, 0, 0]].concat();
    frame.extend(length.to_be_bytes());
    frame.extend([ICMP_V6, 255]);
    frame.extend([&from.octets()[..], &destination.octets(), &message].concat());
    Some(frame)
}

/// Of a frame, from its Ethernet header on.
fn parse_reply(frame: &[u8]) -> Option<(IpAddr, Mac)> {
    let arp: &[u8; ARP] = frame.get(ETHERNET..)?.first_chunk()?;
    if arp[..6] != ARP_HEAD || arp[6..8] != [0, REPLY] {
        return None;
    }
    let mac: Mac = *arp[8..].first_chunk()?;
    let sender: [u8; 4] = *arp[14..].first_chunk()?;
    Some((sender.into(), mac))
}

/// Of an ICMPv6 message: the kernel has checked its sum. The hop limit it has not, but a forged answer only
/// says that somebody is there.
fn parse_advertisement(message: &[u8]) -> Option<(IpAddr, Mac)> {
    let head: &[u8; 24] = message.first_chunk()?;
    if head[0] != ADVERTISEMENT {
        return None;
    }
    let target: [u8; 16] = *head[8..].first_chunk()?;
    let option: &[u8; 8] = message[24..].first_chunk()?;
    let mac: Mac = *option
        .strip_prefix(&TARGET_LINK_ADDRESS[..])?
        .first_chunk()?;
    Some((IpAddr::from(target), mac))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const OWN: Mac = [2, 0, 0, 0, 0, 1];
    const OTHER: Mac = [2, 0, 0, 0, 0, 2];

    fn at(from: &str) -> Asked {
        Asked {
            ifindex: 2,
            mac: OWN,
            from: from.parse().unwrap(),
        }
    }

    #[test]
    fn a_question_is_asked_in_the_words_of_its_family() {
        let asked = |from: &str, address: &str, to| {
            question(at(from), address.parse().unwrap(), to).unwrap()
        };
        let frame = asked("192.0.2.1", "192.0.2.2", None);
        assert_eq!((frame.len(), &frame[..6]), (42, &BROADCAST[..]));
        assert_eq!(frame[28..32], [192, 0, 2, 1]);
        assert_eq!(frame[38..], [192, 0, 2, 2]);
        assert_eq!(asked("192.0.2.1", "192.0.2.2", Some(OTHER))[..6], OTHER);
        let frame = asked("2001:db8::1", "2001:db8::ab:cdef", None);
        assert_eq!(
            (frame.len(), &frame[..6]),
            (86, &[0x33, 0x33, 0xff, 0xab, 0xcd, 0xef][..])
        );
        // Of a message with its right sum nothing remains.
        let pseudo = [
            &frame[22..54],
            &[0, 0, 0, 32, 0, 0, 0, ICMP_V6],
            &frame[54..],
        ]
        .concat();
        assert_eq!(checksum(&pseudo), 0);
        assert_eq!(
            question(at("192.0.2.1"), "2001:db8::1".parse().unwrap(), None),
            None
        );
    }

    #[test]
    fn an_answer_says_who_has_what() {
        let mut reply = arp(
            OTHER,
            [192, 0, 2, 2].into(),
            [192, 0, 2, 1].into(),
            Some(OWN),
        );
        assert_eq!(parse_reply(&reply), None, "a question is none");
        reply[21] = REPLY;
        assert_eq!(parse_reply(&reply), Some(([192, 0, 2, 2].into(), OTHER)));
        let address: Ipv6Addr = "2001:db8::2".parse().unwrap();
        let mut message = vec![ADVERTISEMENT, 0, 0, 0, 0x60, 0, 0, 0];
        message.extend([&address.octets()[..], &TARGET_LINK_ADDRESS, &OTHER].concat());
        assert_eq!(parse_advertisement(&message), Some((address.into(), OTHER)));
        assert_eq!(
            parse_advertisement(&message[..24]),
            None,
            "it does not say where"
        );
    }

    proptest! {
        #[test]
        fn nothing_that_comes_is_too_much(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            let _ = (parse_reply(&bytes), parse_advertisement(&bytes));
        }
    }
}
