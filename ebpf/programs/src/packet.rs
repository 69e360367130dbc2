//! What a frame says, read once: addresses, ports, where the layers begin.
//!
//! ```text
//!  Ethernet ─┬► ARP
//!            ├► IPv4 (options) ─┬► TCP, UDP: ports        a fragment that is not the first has none
//!            ├► IPv6 (extensions┴► ICMP: type and code
//!            └► anything else
//! ```
//! The headers of a usual packet are read where they lie; options and extension headers, which are
//! rare, are copied by a helper, because the verifier can follow that at any offset.
//!
//! Invariants: every access is checked against the end of the packet; every loop has a constant
//! bound; nothing here changes a packet (but for making its headers contiguous).

use core::mem::size_of;

use aya_ebpf::programs::{TcContext, XdpContext};
use ebpf_maps::endpoint::Mac;
use ebpf_maps::flow::Ends;
use ebpf_maps::services::{Addr, v4_mapped};

/// Length of the Ethernet header, where IP begins.
pub const IP_OFFSET: usize = 14;
/// Length of an IPv4 header without options.
pub const V4_LENGTH: usize = 20;
/// Length of the fixed IPv6 header.
pub const V6_LENGTH: usize = 40;
/// Bytes that are made contiguous: Ethernet, IPv6 and the longest header read behind it.
const CONTIGUOUS: u32 = (IP_OFFSET + V6_LENGTH + 20) as u32;
/// Extension headers that are followed; senders use one or two.
const EXTENSION_COUNT_MAX: u32 = 4;

const ETHERTYPE_V4: u16 = 0x0800_u16.to_be();
const ETHERTYPE_V6: u16 = 0x86dd_u16.to_be();
const ETHERTYPE_ARP: u16 = 0x0806_u16.to_be();

/// IANA protocol numbers.
pub const ICMP: u8 = 1;
pub const TCP: u8 = 6;
pub const UDP: u8 = 17;
pub const ICMP_V6: u8 = 58;

/// TCP flags.
pub const FIN: u8 = 1;
pub const SYN: u8 = 2;
pub const RST: u8 = 4;
pub const ACK: u8 = 16;

/// ICMP types that have an identifier: echo reply and request of both families.
const ECHO_REPLY: u8 = 0;
const ECHO: u8 = 8;
const ECHO_V6: u8 = 128;
const ECHO_REPLY_V6: u8 = 129;

const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const DESTINATION_OPTIONS: u8 = 60;

/// `Packet::flags`: a fragment, the first one or a later one.
pub const IS_FRAGMENT: u8 = 1;
/// `Packet::flags`: nothing is known of the layer above IP: a later fragment, or cut short there.
pub const NO_L4: u8 = 2;
/// `Packet::flags`: IPv4 options or IPv6 extension headers.
pub const HAS_OPTIONS: u8 = 4;
/// `Packet::flags`: the frame is no IP packet, and nothing else here is about it.
pub const NO_IP: u8 = 8;

/// An IP packet.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Packet {
    pub source: Addr,
    pub destination: Addr,
    /// TCP and UDP; network order; ICMP echo: its identifier in both; else 0.
    pub source_port_be: u16,
    pub destination_port_be: u16,
    /// IANA protocol number of the layer above IP.
    pub proto: u8,
    /// [`IS_FRAGMENT`], [`NO_L4`], [`HAS_OPTIONS`], [`NO_IP`].
    pub flags: u8,
    /// TCP: its flags. ICMP: its type.
    pub kind: u8,
    /// ICMP: its code.
    pub code: u8,
    /// From the start of the frame to the layer above IP.
    pub l4_offset: u32,
    pub is_v6: bool,
}

impl Packet {
    /// Who talks to whom.
    #[inline(always)]
    pub fn ends(&self) -> Ends {
        Ends {
            source: self.source,
            destination: self.destination,
            source_port_be: self.source_port_be,
            destination_port_be: self.destination_port_be,
        }
    }
}

/// What a frame is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Frame {
    /// An IP packet; `Work::packet` says which.
    Ip,
    Arp,
    /// Another protocol, or in a VLAN.
    Other,
    /// Too short for its own headers.
    Malformed,
}

/// A frame as a hook lends it: of a packet of the kernel's, or as a network card has left it.
pub trait Context {
    /// Where it begins, and where what can be read in its place ends.
    fn bounds(&self) -> (usize, usize);
    /// Whether it was in a VLAN: the tag is not in its place.
    fn is_tagged(&self) -> bool;
    /// All of its bytes, wherever they lie.
    fn length(&self) -> u32;
    /// Moves so many of its first bytes to where they can be read; false: they cannot be.
    fn pull(&self, length: u32) -> bool;
    /// A copy of bytes at any offset; none: they are not there, or there is no helper that copies them.
    fn copied<T>(&self, offset: usize) -> Option<T>;
}

impl Context for TcContext {
    #[inline(always)]
    fn bounds(&self) -> (usize, usize) {
        (self.data(), self.data_end())
    }

    #[inline(always)]
    fn is_tagged(&self) -> bool {
        // SAFETY: the kernel passes a valid context.
        unsafe { (*self.skb.skb).vlan_present != 0 }
    }

    #[inline(always)]
    fn length(&self) -> u32 {
        self.len()
    }

    #[inline(always)]
    fn pull(&self, length: u32) -> bool {
        self.pull_data(length).is_ok()
    }

    #[inline(always)]
    fn copied<T>(&self, offset: usize) -> Option<T> {
        self.load(offset).ok()
    }
}

/// What needs more than the headers of a usual packet is left to the hooks of the other kind.
impl Context for XdpContext {
    #[inline(always)]
    fn bounds(&self) -> (usize, usize) {
        (self.data(), self.data_end())
    }

    #[inline(always)]
    fn is_tagged(&self) -> bool {
        false
    }

    #[inline(always)]
    fn length(&self) -> u32 {
        (self.data_end() - self.data()) as u32
    }

    #[inline(always)]
    fn pull(&self, _length: u32) -> bool {
        false
    }

    #[inline(always)]
    fn copied<T>(&self, _offset: usize) -> Option<T> {
        None
    }
}

/// Reads a frame into `packet`.
#[inline(always)]
pub fn parse<C: Context>(ctx: &C, packet: &mut Packet) -> Frame {
    match plain(ctx, packet) {
        true => Frame::Ip,
        false => parse_any(ctx, packet),
    }
}

/// The bytes of an IPv4 packet up to the end of a TCP header.
#[repr(C)]
#[derive(Clone, Copy)]
struct PlainV4 {
    version_length: u8,
    _service: u8,
    _length: u16,
    _id: u16,
    fragment_be: u16,
    _hops: u8,
    proto: u8,
    _sum: u16,
    source: u32,
    destination: u32,
    l4: PlainL4,
}

/// The same of an IPv6 packet.
#[repr(C)]
#[derive(Clone, Copy)]
struct PlainV6 {
    version: u8,
    _flow: [u8; 3],
    _length: u16,
    next: u8,
    _hops: u8,
    source: Addr,
    destination: Addr,
    l4: PlainL4,
}

/// A TCP header, or one of UDP and what follows.
#[repr(C)]
#[derive(Clone, Copy)]
struct PlainL4 {
    source_port_be: u16,
    destination_port_be: u16,
    _numbers: [u16; 4],
    _length: u8,
    flags: u8,
    _rest: [u16; 3],
}

/// Reads the frame of a TCP segment or UDP datagram without options or fragments: most are, and they cost
/// one check of the bounds and no call. False: it is another, or too short to tell.
#[inline(always)]
fn plain<C: Context>(ctx: &C, packet: &mut Packet) -> bool {
    if ctx.is_tagged() {
        return false;
    }
    let (start, end) = ctx.bounds();
    let ip = start + IP_OFFSET;
    if ip + size_of::<PlainV4>() > end {
        return false;
    }
    // SAFETY: within the packet, as just checked; all are made of integers, and the machine reads words at any
    // address.
    let (kind, v4) = unsafe { (*((start + 12) as *const u16), &*(ip as *const PlainV4)) };
    let l4 = if kind == ETHERTYPE_V4 {
        let is_fragment = v4.fragment_be & 0x3fff_u16.to_be() != 0;
        if v4.version_length != 0x45 || is_fragment || !matches!(v4.proto, TCP | UDP) {
            return false;
        }
        packet.source = v4_mapped(v4.source);
        packet.destination = v4_mapped(v4.destination);
        packet.proto = v4.proto;
        packet.is_v6 = false;
        packet.l4_offset = (IP_OFFSET + V4_LENGTH) as u32;
        &v4.l4
    } else if kind == ETHERTYPE_V6 && ip + size_of::<PlainV6>() <= end {
        // SAFETY: as above.
        let v6 = unsafe { &*(ip as *const PlainV6) };
        if v6.version >> 4 != 6 || !matches!(v6.next, TCP | UDP) {
            return false;
        }
        let mut index = 0;
        while index < 4 {
            packet.source[index] = v6.source[index];
            packet.destination[index] = v6.destination[index];
            index += 1;
        }
        packet.proto = v6.next;
        packet.is_v6 = true;
        packet.l4_offset = (IP_OFFSET + V6_LENGTH) as u32;
        &v6.l4
    } else {
        return false;
    };
    packet.source_port_be = l4.source_port_be;
    packet.destination_port_be = l4.destination_port_be;
    packet.kind = match packet.proto {
        TCP => l4.flags,
        _ => 0,
    };
    packet.code = 0;
    packet.flags = 0;
    true
}

#[inline(never)]
fn parse_any<C: Context>(ctx: &C, packet: &mut Packet) -> Frame {
    let frame = parse_here(ctx, packet);
    if frame != Frame::Ip {
        packet.flags = NO_IP;
    }
    frame
}

#[inline(always)]
fn parse_here<C: Context>(ctx: &C, packet: &mut Packet) -> Frame {
    if ctx.is_tagged() {
        return Frame::Other;
    }
    let (length, wanted) = (ctx.length(), CONTIGUOUS);
    let wanted = if length < wanted { length } else { wanted };
    let (start, end) = ctx.bounds();
    if start + (wanted as usize) > end && !ctx.pull(wanted) {
        return Frame::Malformed;
    }
    let parsed = match read::<u16>(ctx, 12) {
        Some(ETHERTYPE_V4) => v4(ctx, packet),
        Some(ETHERTYPE_V6) => v6(ctx, packet),
        Some(ETHERTYPE_ARP) => return Frame::Arp,
        Some(_) => return Frame::Other,
        None => None,
    };
    match parsed {
        Some(()) => Frame::Ip,
        None => Frame::Malformed,
    }
}

/// The frame's source hardware address.
#[inline(always)]
pub fn source_mac(ctx: &TcContext) -> Option<Mac> {
    read(ctx, 6)
}

/// Equality of hardware addresses that lie at even offsets, by two words and not by six bytes.
#[inline(always)]
pub fn same_mac(a: &Mac, b: &Mac) -> bool {
    let words = |mac: &Mac| {
        let start = core::ptr::from_ref(mac);
        // SAFETY: six bytes behind the reference; the machine reads words at any address.
        unsafe { (*start.cast::<u32>(), *start.cast::<u16>().add(2)) }
    };
    words(a) == words(b)
}

/// Bytes of the packet at a constant offset, where they lie.
#[inline(always)]
pub fn read<T: Copy>(ctx: &impl Context, offset: usize) -> Option<T> {
    let (start, end) = ctx.bounds();
    let start = start + offset;
    if start + size_of::<T>() > end {
        return None;
    }
    // SAFETY: within the packet, as just checked; every T here is made of integers. The machine
    // reads words at any address, and the verifier knows where it does not.
    Some(unsafe { *(start as *const T) })
}

#[inline(always)]
fn v4<C: Context>(ctx: &C, packet: &mut Packet) -> Option<()> {
    let version_length: u8 = read(ctx, IP_OFFSET)?;
    let fragment = u16::from_be(read(ctx, IP_OFFSET + 6)?);
    let length = u32::from(version_length & 15) * 4;
    if version_length >> 4 != 4 || length < V4_LENGTH as u32 {
        return None;
    }
    *packet = Packet {
        source: v4_mapped(read(ctx, IP_OFFSET + 12)?),
        destination: v4_mapped(read(ctx, IP_OFFSET + 16)?),
        source_port_be: 0,
        destination_port_be: 0,
        proto: read(ctx, IP_OFFSET + 9)?,
        flags: 0,
        kind: 0,
        code: 0,
        l4_offset: IP_OFFSET as u32 + length,
        is_v6: false,
    };
    // More fragments, or an offset.
    if fragment & 0x3fff != 0 {
        packet.flags |= IS_FRAGMENT;
    }
    if length != V4_LENGTH as u32 {
        packet.flags |= HAS_OPTIONS;
    }
    if fragment & 0x1fff != 0 {
        packet.flags |= NO_L4;
    } else if length == V4_LENGTH as u32 {
        l4(packet, |at| read(ctx, IP_OFFSET + V4_LENGTH + at));
    } else {
        l4(packet, |at| ctx.copied(length as usize + IP_OFFSET + at));
    }
    Some(())
}

#[inline(always)]
fn v6<C: Context>(ctx: &C, packet: &mut Packet) -> Option<()> {
    let version: u8 = read(ctx, IP_OFFSET)?;
    let mut next: u8 = read(ctx, IP_OFFSET + 6)?;
    if version >> 4 != 6 {
        return None;
    }
    *packet = Packet {
        source: read(ctx, IP_OFFSET + 8)?,
        destination: read(ctx, IP_OFFSET + 24)?,
        source_port_be: 0,
        destination_port_be: 0,
        proto: next,
        flags: 0,
        kind: 0,
        code: 0,
        l4_offset: (IP_OFFSET + V6_LENGTH) as u32,
        is_v6: true,
    };
    if !is_extension(next) {
        l4(packet, |at| read(ctx, IP_OFFSET + V6_LENGTH + at));
        return Some(());
    }
    let mut offset = (IP_OFFSET + V6_LENGTH) as u32;
    let mut flags = HAS_OPTIONS;
    let mut followed = 0;
    while is_extension(next) && flags & NO_L4 == 0 {
        if followed == EXTENSION_COUNT_MAX {
            return None;
        }
        followed += 1;
        let [following, length, high, low] = ctx.copied::<[u8; 4]>(offset as usize)?;
        let length = match next {
            FRAGMENT => {
                flags |= IS_FRAGMENT;
                if u16::from_be_bytes([high, low]) & 0xfff8 != 0 {
                    flags |= NO_L4;
                }
                8
            }
            AUTHENTICATION => (u32::from(length) + 2) * 4,
            _ => (u32::from(length) + 1) * 8,
        };
        offset += length;
        next = following;
    }
    packet.proto = next;
    packet.flags = flags;
    packet.l4_offset = offset;
    if flags & NO_L4 == 0 {
        l4(packet, |at| ctx.copied(offset as usize + at));
    }
    Some(())
}

#[inline(always)]
fn is_extension(next: u8) -> bool {
    matches!(
        next,
        HOP_BY_HOP | ROUTING | FRAGMENT | AUTHENTICATION | DESTINATION_OPTIONS
    )
}

/// Fills in what the layer above IP says; `word` gives four bytes of it.
#[inline(always)]
fn l4(packet: &mut Packet, word: impl Fn(usize) -> Option<u32>) {
    let known = match packet.proto {
        TCP => ports(packet, &word).and_then(|()| {
            let [_, flags, ..] = word(12)?.to_ne_bytes();
            packet.kind = flags;
            Some(())
        }),
        UDP => ports(packet, &word),
        ICMP | ICMP_V6 => word(0).map(|head| {
            let [kind, code, ..] = head.to_ne_bytes();
            packet.kind = kind;
            packet.code = code;
            let is_echo = match packet.proto {
                ICMP => matches!(kind, ECHO | ECHO_REPLY),
                _ => matches!(kind, ECHO_V6 | ECHO_REPLY_V6),
            };
            if is_echo && let Some(rest) = word(4) {
                let [high, low, ..] = rest.to_ne_bytes();
                packet.source_port_be = u16::from_ne_bytes([high, low]);
                packet.destination_port_be = packet.source_port_be;
            }
        }),
        _ => Some(()),
    };
    if known.is_none() {
        packet.flags |= NO_L4;
    }
}

#[inline(always)]
fn ports(packet: &mut Packet, word: impl Fn(usize) -> Option<u32>) -> Option<()> {
    let [a, b, c, d] = word(0)?.to_ne_bytes();
    packet.source_port_be = u16::from_ne_bytes([a, b]);
    packet.destination_port_be = u16::from_ne_bytes([c, d]);
    Some(())
}

const _: () = {
    assert!(size_of::<PlainV4>() == V4_LENGTH + 20);
    assert!(size_of::<PlainV6>() == V6_LENGTH + 20);
};
