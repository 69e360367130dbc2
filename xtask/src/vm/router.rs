//! The router between the segments of a [`super::switch`]: a stateless next hop that knows every machine.
//!
//! ```text
//!  who has 10.0.S.1?            ─► the router does, in every segment
//!  IPv4 to the router's address ─► TTL - 1, the destination's MAC ─► out of the destination's port
//! ```
//! Pure: a frame in, a frame and a port out. It has no neighbours to ask for: machines and addresses are
//! given. What it does not know, and what has no hops left, it drops without a word.
//!
//! Source: RFC 1812 5.2 (forwarding), RFC 1624 (checksum of a decremented TTL), RFC 826 (ARP).

use std::net::Ipv4Addr;

/// An Ethernet address.
pub type Mac = [u8; 6];
/// The router's, in each segment.
pub const MAC: Mac = [0x52, 0x54, 0, 0, 0, 1];
/// The last byte of the router's address, in each segment.
const HOST: u8 = 1;
const IPV4: [u8; 2] = [0x08, 0x00];
const ARP: [u8; 2] = [0x08, 0x06];
/// Ethernet and IPv4 over it, a request.
const ARP_REQUEST: [u8; 8] = [0, 1, 8, 0, 6, 4, 0, 1];
const ARP_REPLY: u8 = 2;
const ETHERNET_LEN: usize = 14;

/// A machine that is routed to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Host {
    /// Its address; the third byte is its segment.
    pub address: Ipv4Addr,
    /// Its interface.
    pub mac: Mac,
}

/// What becomes of a frame.
#[derive(Debug, PartialEq, Eq)]
pub enum Routed {
    /// Back to who asked.
    Back(Vec<u8>),
    /// Out of the port of that host (its index).
    To(usize, Vec<u8>),
}

/// What the router does with a frame of a segment; `None`: nothing.
pub fn route(frame: &[u8], segment: u8, hosts: &[Host]) -> Option<Routed> {
    match frame.get(12..ETHERNET_LEN)? {
        kind if kind == ARP => answer(frame, segment),
        kind if kind == IPV4 && frame.starts_with(&MAC) => forward(frame, hosts),
        _ => None,
    }
}

fn answer(frame: &[u8], segment: u8) -> Option<Routed> {
    let arp = frame.get(ETHERNET_LEN..ETHERNET_LEN + 28)?;
    let own = [10, 0, segment, HOST];
    if arp[..8] != ARP_REQUEST || arp[24..28] != own {
        return None;
    }
    let (asker, address) = (&arp[8..14], &arp[14..18]);
    let mut reply = [asker, &MAC, &ARP, &ARP_REQUEST[..7], &[ARP_REPLY]].concat();
    reply.extend([&MAC[..], &own, asker, address].concat());
    // The shortest frame of an Ethernet.
    reply.resize(60, 0);
    Some(Routed::Back(reply))
}

fn forward(frame: &[u8], hosts: &[Host]) -> Option<Routed> {
    let header = frame.get(ETHERNET_LEN..ETHERNET_LEN + 20)?;
    let (ttl, to) = (header[8], &header[16..20]);
    if header[0] >> 4 != 4 || ttl < 2 {
        return None;
    }
    let index = hosts.iter().position(|host| host.address.octets() == *to)?;
    let mut onward = frame.to_vec();
    onward[..6].copy_from_slice(&hosts[index].mac);
    onward[6..12].copy_from_slice(&MAC);
    let packet = &mut onward[ETHERNET_LEN..];
    packet[8] = ttl - 1;
    // HC' = ~(~HC + ~m + m'), where only the high byte of m, the TTL's, has changed: by one less.
    let sum = u32::from(!u16::from_be_bytes([packet[10], packet[11]])) + u32::from(!0x0100_u16);
    let folded = (sum & 0xffff) + (sum >> 16);
    packet[10..12].copy_from_slice(&(!(folded as u16)).to_be_bytes());
    Some(Routed::To(index, onward))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOSTS: [Host; 2] = [
        Host {
            address: Ipv4Addr::new(10, 0, 1, 11),
            mac: [0x52, 0x54, 0, 0, 1, 11],
        },
        Host {
            address: Ipv4Addr::new(10, 0, 2, 12),
            mac: [0x52, 0x54, 0, 0, 2, 12],
        },
    ];

    fn sum(header: &[u8]) -> u16 {
        let words = header
            .chunks(2)
            .map(|w| u32::from(u16::from_be_bytes([w[0], w[1]])));
        let sum: u32 = words.sum();
        ((sum & 0xffff) + (sum >> 16)) as u16
    }

    fn packet(ttl: u8, to: [u8; 4]) -> Vec<u8> {
        let mut header = [
            0x45, 0, 0, 40, 0, 7, 0, 0, ttl, 17, 0, 0, 10, 0, 1, 11, 0, 0, 0, 0,
        ];
        header[16..].copy_from_slice(&to);
        let check = !sum(&header);
        header[10..12].copy_from_slice(&check.to_be_bytes());
        [&MAC[..], &HOSTS[0].mac, &IPV4, &header, &[0; 20]].concat()
    }

    #[test]
    fn a_packet_crosses_with_one_hop_less_and_a_right_checksum() {
        for ttl in 2..=255 {
            let Some(Routed::To(1, out)) = route(&packet(ttl, [10, 0, 2, 12]), 1, &HOSTS) else {
                panic!("TTL {ttl} was dropped");
            };
            assert_eq!((&out[..6], &out[6..12]), (&HOSTS[1].mac[..], &MAC[..]));
            assert_eq!(out[ETHERNET_LEN + 8], ttl - 1);
            assert_eq!(sum(&out[ETHERNET_LEN..ETHERNET_LEN + 20]), 0xffff);
        }
    }

    #[test]
    fn what_has_no_hops_or_no_host_is_dropped() {
        assert_eq!(route(&packet(1, [10, 0, 2, 12]), 1, &HOSTS), None);
        assert_eq!(route(&packet(64, [10, 244, 0, 1]), 1, &HOSTS), None);
        let mut to_other = packet(64, [10, 0, 2, 12]);
        to_other[5] = 99;
        assert_eq!(route(&to_other, 1, &HOSTS), None);
        for length in 0..40 {
            let short = &packet(64, [10, 0, 2, 12])[..length];
            if length < ETHERNET_LEN + 20 {
                assert_eq!(route(short, 1, &HOSTS), None);
            }
        }
    }

    #[test]
    fn the_router_answers_for_its_address_of_the_segment_only() {
        let ask = |address: [u8; 4]| {
            let mac = HOSTS[0].mac;
            let from = [10, 0, 1, 11];
            let ask = [
                &[0xff; 6][..],
                &mac,
                &ARP,
                &ARP_REQUEST,
                &mac,
                &from,
                &[0; 6],
            ];
            [ask.concat(), address.to_vec()].concat()
        };
        let Some(Routed::Back(reply)) = route(&ask([10, 0, 1, 1]), 1, &HOSTS) else {
            panic!("no answer");
        };
        assert_eq!(reply[..6], HOSTS[0].mac);
        assert_eq!(reply[21], ARP_REPLY);
        assert_eq!(reply[22..32], [&MAC[..], &[10, 0, 1, 1]].concat());
        assert_eq!(reply[32..42], [&HOSTS[0].mac[..], &[10, 0, 1, 11]].concat());
        assert_eq!(route(&ask([10, 0, 2, 1]), 1, &HOSTS), None);
        assert_eq!(route(&ask([10, 0, 1, 11]), 1, &HOSTS), None);
    }
}
