//! Frames for the packet programs, built from the top of the stack down, with right checksums; and
//! the check that a frame which a program has changed still has them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

pub(super) type Mac = [u8; 6];

pub(super) const TCP: u8 = 6;
pub(super) const UDP: u8 = 17;
pub(super) const SYN: u8 = 2;
pub(super) const RST: u8 = 4;
pub(super) const ACK: u8 = 16;
pub(super) const FIN: u8 = 1;
const ICMP: u8 = 1;
const ICMP_V6: u8 = 58;

/// The ones' complement sum of RFC 1071.
fn sum(parts: &[&[u8]]) -> u16 {
    let bytes: Vec<u8> = parts.concat();
    let mut sum: u32 = 0;
    for pair in bytes.chunks(2) {
        let low = pair.get(1).copied().unwrap_or(0);
        sum += u32::from(u16::from_be_bytes([pair[0], low]));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

fn pseudo(source: IpAddr, destination: IpAddr, proto: u8, length: usize) -> Vec<u8> {
    let mut bytes = [octets(source), octets(destination)].concat();
    bytes.extend((length as u32).to_be_bytes());
    bytes.extend(u32::from(proto).to_be_bytes());
    bytes
}

/// The layer above IP, and the addresses that its checksum covers.
pub(super) fn tcp(source: &str, destination: &str, flags: u8, data: &[u8]) -> Vec<u8> {
    let (source, destination): (SocketAddr, SocketAddr) = addrs(source, destination);
    let mut segment = [
        source.port().to_be_bytes(),
        destination.port().to_be_bytes(),
    ]
    .concat();
    segment.extend(1000_u32.to_be_bytes()); // sequence
    let acknowledged: u32 = if flags & ACK != 0 { 2000 } else { 0 };
    segment.extend(acknowledged.to_be_bytes());
    segment.extend([5 << 4, flags, 0x20, 0, 0, 0, 0, 0]);
    segment.extend(data);
    let check = sum(&[
        &pseudo(source.ip(), destination.ip(), TCP, segment.len()),
        &segment,
    ]);
    segment[16..18].copy_from_slice(&check.to_be_bytes());
    ip(source.ip(), destination.ip(), TCP, &segment)
}

pub(super) fn udp(source: &str, destination: &str, data: &[u8]) -> Vec<u8> {
    let (source, destination) = addrs(source, destination);
    let mut datagram = [
        source.port().to_be_bytes(),
        destination.port().to_be_bytes(),
    ]
    .concat();
    datagram.extend((8 + data.len() as u16).to_be_bytes());
    datagram.extend([0, 0]);
    datagram.extend(data);
    let check = sum(&[
        &pseudo(source.ip(), destination.ip(), UDP, datagram.len()),
        &datagram,
    ]);
    datagram[6..8].copy_from_slice(&check.to_be_bytes());
    ip(source.ip(), destination.ip(), UDP, &datagram)
}

/// ICMP of the addresses' family: type, code, the four bytes behind the checksum, the rest.
pub(super) fn icmp(
    source: &str,
    destination: &str,
    head: [u8; 2],
    word: [u8; 4],
    data: &[u8],
) -> Vec<u8> {
    let (source, destination): (IpAddr, IpAddr) =
        (source.parse().unwrap(), destination.parse().unwrap());
    let mut message = [&head[..], &[0, 0], &word, data].concat();
    let (proto, covered) = match source {
        IpAddr::V4(_) => (ICMP, Vec::new()),
        IpAddr::V6(_) => (ICMP_V6, pseudo(source, destination, ICMP_V6, message.len())),
    };
    let check = sum(&[&covered, &message]);
    message[2..4].copy_from_slice(&check.to_be_bytes());
    ip(source, destination, proto, &message)
}

/// An IP packet of the addresses' family.
pub(super) fn ip(source: IpAddr, destination: IpAddr, proto: u8, payload: &[u8]) -> Vec<u8> {
    match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            v4(source, destination, proto, [0x40, 0], &[], payload)
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => v6(source, destination, proto, payload),
        _ => panic!("{source} and {destination} are of different families"),
    }
}

/// IPv4 with the fragment field and options given.
pub(super) fn v4(
    source: Ipv4Addr,
    destination: Ipv4Addr,
    proto: u8,
    fragment: [u8; 2],
    options: &[u8],
    payload: &[u8],
) -> Vec<u8> {
    assert!(options.len().is_multiple_of(4));
    let length = 20 + options.len();
    let mut header = vec![0x40 | (length / 4) as u8, 0];
    header.extend(((length + payload.len()) as u16).to_be_bytes());
    header.extend([0, 7]);
    header.extend(fragment);
    header.extend([64, proto, 0, 0]);
    header.extend(source.octets());
    header.extend(destination.octets());
    header.extend(options);
    let check = sum(&[&header]);
    header[10..12].copy_from_slice(&check.to_be_bytes());
    [&header[..], payload].concat()
}

/// IPv6; extension headers are a part of the payload.
pub(super) fn v6(
    source: Ipv6Addr,
    destination: Ipv6Addr,
    next_header: u8,
    payload: &[u8],
) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend((payload.len() as u16).to_be_bytes());
    packet.extend([next_header, 64]);
    packet.extend(source.octets());
    packet.extend(destination.octets());
    packet.extend(payload);
    packet
}

pub(super) fn arp(operation: u8, sender: (Mac, &str), target: (Mac, &str)) -> Vec<u8> {
    let v4 = |text: &str| text.parse::<Ipv4Addr>().unwrap().octets();
    let mut message = vec![0, 1, 8, 0, 6, 4, 0, operation];
    message.extend(sender.0);
    message.extend(v4(sender.1));
    message.extend(target.0);
    message.extend(v4(target.1));
    message
}

/// A frame; the ethertype follows from the first byte: IP's version, else ARP.
pub(super) fn frame(source: Mac, destination: Mac, payload: &[u8]) -> Vec<u8> {
    let ethertype: [u8; 2] = match payload[0] >> 4 {
        4 => [0x08, 0x00],
        6 => [0x86, 0xdd],
        _ => [0x08, 0x06],
    };
    framed(source, destination, ethertype, payload)
}

pub(super) fn framed(source: Mac, destination: Mac, ethertype: [u8; 2], payload: &[u8]) -> Vec<u8> {
    [&destination[..], &source, &ethertype, payload].concat()
}

/// Panics unless every checksum of this frame is right: of IPv4, of the layer above, and of the
/// packet that an ICMP error quotes, as far as it is there.
pub(super) fn assert_checksums(frame: &[u8]) {
    let packet = &frame[14..];
    let (source, destination, proto, payload) = match packet[0] >> 4 {
        4 => {
            let length = usize::from(packet[0] & 15) * 4;
            assert_eq!(sum(&[&packet[..length]]), 0, "IPv4 header");
            (
                octets_v4(&packet[12..16]),
                octets_v4(&packet[16..20]),
                packet[9],
                &packet[length..],
            )
        }
        6 => (
            octets_v6(&packet[8..24]),
            octets_v6(&packet[24..40]),
            packet[6],
            &packet[40..],
        ),
        version => panic!("version {version}"),
    };
    let covered = match proto {
        ICMP => Vec::new(),
        _ => pseudo(source, destination, proto, payload.len()),
    };
    assert_eq!(sum(&[&covered, payload]), 0, "protocol {proto}");
    let is_error = match proto {
        ICMP => matches!(payload[0], 3 | 11 | 12),
        ICMP_V6 => payload[0] < 128,
        _ => false,
    };
    if is_error && payload[8] >> 4 == 4 {
        let quoted = &payload[8..];
        assert_eq!(sum(&[&quoted[..20]]), 0, "quoted IPv4 header");
    }
}

/// The same frame of TCP or UDP as it is on its way on the machine that sends it: its sum is that of the
/// pseudo header, and the network card is to add the rest.
pub(super) fn partial(frame: &[u8]) -> Vec<u8> {
    let mut partial = frame.to_vec();
    let (source, destination) = ends(frame);
    let (header, proto) = match frame[14] >> 4 {
        4 => (20, frame[23]),
        _ => (40, frame[20]),
    };
    let l4 = 14 + header;
    let covered = pseudo(source.ip(), destination.ip(), proto, frame.len() - l4);
    let place = l4 + if proto == TCP { 16 } else { 6 };
    partial[place..place + 2].copy_from_slice(&(!sum(&[&covered])).to_be_bytes());
    partial
}

/// Source and destination of a frame's packet; ports are 0 where there are none.
pub(super) fn ends(frame: &[u8]) -> (SocketAddr, SocketAddr) {
    ends_of_packet(&frame[14..])
}

/// As [`ends`], of the packet that an ICMP error quotes.
pub(super) fn quoted_ends(frame: &[u8]) -> (SocketAddr, SocketAddr) {
    let header = if frame[14] >> 4 == 4 { 20 } else { 40 };
    ends_of_packet(&frame[14 + header + 8..])
}

fn ends_of_packet(packet: &[u8]) -> (SocketAddr, SocketAddr) {
    let (source, destination, proto, rest) = match packet[0] >> 4 {
        4 => (
            octets_v4(&packet[12..16]),
            octets_v4(&packet[16..20]),
            packet[9],
            &packet[20..],
        ),
        _ => (
            octets_v6(&packet[8..24]),
            octets_v6(&packet[24..40]),
            packet[6],
            &packet[40..],
        ),
    };
    let port = |at: usize| u16::from_be_bytes([rest[at], rest[at + 1]]);
    let (from, to) = match proto {
        TCP | UDP => (port(0), port(2)),
        _ => (0, 0),
    };
    (
        SocketAddr::new(source, from),
        SocketAddr::new(destination, to),
    )
}

fn octets_v4(bytes: &[u8]) -> IpAddr {
    IpAddr::from(<[u8; 4]>::try_from(bytes).unwrap())
}

fn octets_v6(bytes: &[u8]) -> IpAddr {
    IpAddr::from(<[u8; 16]>::try_from(bytes).unwrap())
}

fn addrs(source: &str, destination: &str) -> (SocketAddr, SocketAddr) {
    (source.parse().unwrap(), destination.parse().unwrap())
}
