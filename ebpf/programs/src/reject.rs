//! "Nobody serves this", said at once: a packet becomes its own answer and goes back into the pod
//! that sent it.
//!
//! ```text
//!  TCP  ─► reset, as if the address had no such port
//!  UDP  ─► ICMP port unreachable, quoting the datagram's head
//! ```
//! Resets, packets with options or extension headers, and all that is neither TCP nor UDP get no
//! answer. The answer's checksums are complete; where the packet was one whose device should have
//! filled them in, the pod does not look at them, because it never left the machine.

use aya_ebpf::bindings::bpf_adj_room_mode::BPF_ADJ_ROOM_MAC;
use aya_ebpf::helpers::bpf_skb_change_tail;
use aya_ebpf::programs::TcContext;
use ebpf_maps::endpoint::Mac;
use ebpf_maps::services::Addr;

use crate::packet::{
    ACK, HAS_OPTIONS, ICMP, ICMP_V6, IP_OFFSET, IS_FRAGMENT, NO_L4, Packet, RST, SYN, TCP, UDP,
    V4_LENGTH, V6_LENGTH, read,
};

const TTL: u8 = 64;
const TCP_LENGTH: usize = 20;
const ICMP_LENGTH: usize = 8;
/// Bytes of the layer above IP that an error quotes: the ports.
const QUOTED_L4: usize = 8;
/// Types and codes of "port unreachable".
const UNREACHABLE_V4: [u8; 2] = [3, 3];
const UNREACHABLE_V6: [u8; 2] = [1, 4];

#[repr(C)]
struct V4<T> {
    /// Version and length, service, total length, id, "don't fragment", TTL, protocol.
    head: [u8; 10],
    sum: u16,
    source: [u16; 2],
    destination: [u16; 2],
    rest: T,
}

#[repr(C)]
struct V6<T> {
    version: [u8; 4],
    length_be: u16,
    next: u8,
    hop_limit: u8,
    source: Addr,
    destination: Addr,
    rest: T,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Tcp {
    source_port_be: u16,
    destination_port_be: u16,
    sequence: [u16; 2],
    acknowledged: [u16; 2],
    offset: u8,
    flags: u8,
    window: u16,
    sum: u16,
    urgent: u16,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Icmp {
    kind: [u8; 2],
    sum: u16,
    unused: [u16; 2],
}

/// Turns the packet into its answer; false when there is to be none.
#[inline(never)]
pub fn answer(ctx: &TcContext, packet: &Packet) -> bool {
    answer_here(ctx, packet).is_some()
}

#[inline(always)]
fn answer_here(ctx: &TcContext, packet: &Packet) -> Option<()> {
    if packet.flags & (HAS_OPTIONS | NO_L4 | IS_FRAGMENT) != 0 {
        return None;
    }
    match packet.proto {
        TCP => reset(ctx, packet)?,
        UDP => unreachable(ctx, packet)?,
        _ => return None,
    }
    let [to, from]: [Mac; 2] = read(ctx, 0)?;
    ctx.store(0, &[from, to], 0).ok()
}

#[inline(always)]
fn reset(ctx: &TcContext, packet: &Packet) -> Option<()> {
    if packet.kind & RST != 0 {
        return None;
    }
    let [sequence, acknowledged]: [u32; 2] = ctx.load(packet.l4_offset as usize + 4).ok()?;
    // RFC 9293, 3.5.2: what it has acknowledged is where the reset stands; a SYN is acknowledged.
    let (sequence, acknowledged, flags) = if packet.kind & ACK != 0 {
        (acknowledged, 0, RST)
    } else if packet.kind & SYN != 0 {
        let next = u32::from_be(sequence).wrapping_add(1);
        (0, next.to_be(), RST | ACK)
    } else {
        return None;
    };
    let mut tcp = Tcp {
        source_port_be: packet.destination_port_be,
        destination_port_be: packet.source_port_be,
        sequence: halves(sequence),
        acknowledged: halves(acknowledged),
        offset: ((TCP_LENGTH / 4) << 4) as u8,
        flags,
        window: 0,
        sum: 0,
        urgent: 0,
    };
    let mut sum = pseudo(packet, TCP, TCP_LENGTH as u16);
    sum += u32::from(tcp.source_port_be) + u32::from(tcp.destination_port_be);
    sum += word_sum(sequence) + word_sum(acknowledged);
    sum += u32::from(u16::from_ne_bytes([tcp.offset, tcp.flags]));
    tcp.sum = folded(sum);
    let header = if packet.is_v6 { V6_LENGTH } else { V4_LENGTH };
    change_tail(ctx, IP_OFFSET + header + TCP_LENGTH)?;
    if packet.is_v6 {
        ctx.store(IP_OFFSET, &v6(packet, TCP, TCP_LENGTH as u16, tcp), 0)
    } else {
        ctx.store(IP_OFFSET, &v4(packet, TCP, TCP_LENGTH as u16, tcp), 0)
    }
    .ok()
}

#[inline(always)]
fn unreachable(ctx: &TcContext, packet: &Packet) -> Option<()> {
    if packet.is_v6 {
        unreachable_v6(ctx, packet)
    } else {
        unreachable_v4(ctx, packet)
    }
}

#[inline(always)]
fn unreachable_v4(ctx: &TcContext, packet: &Packet) -> Option<()> {
    const QUOTED: usize = V4_LENGTH + QUOTED_L4;
    change_tail(ctx, IP_OFFSET + QUOTED)?;
    let quoted: [u32; QUOTED / 4] = ctx.load(IP_OFFSET).ok()?;
    let mut sum = u32::from(u16::from_ne_bytes(UNREACHABLE_V4));
    let mut index = 0;
    while index < QUOTED / 4 {
        sum += word_sum(quoted[index]);
        index += 1;
    }
    let icmp = Icmp {
        kind: UNREACHABLE_V4,
        sum: folded(sum),
        unused: [0; 2],
    };
    make_room(ctx, V4_LENGTH + ICMP_LENGTH)?;
    let length = (ICMP_LENGTH + QUOTED) as u16;
    ctx.store(IP_OFFSET, &v4(packet, ICMP, length, icmp), 0)
        .ok()
}

#[inline(always)]
fn unreachable_v6(ctx: &TcContext, packet: &Packet) -> Option<()> {
    const QUOTED: usize = V6_LENGTH + QUOTED_L4;
    const LENGTH: u16 = (ICMP_LENGTH + QUOTED) as u16;
    change_tail(ctx, IP_OFFSET + QUOTED)?;
    let quoted: [u32; QUOTED / 4] = ctx.load(IP_OFFSET).ok()?;
    let mut sum = pseudo(packet, ICMP_V6, LENGTH);
    sum += u32::from(u16::from_ne_bytes(UNREACHABLE_V6));
    let mut index = 0;
    while index < QUOTED / 4 {
        sum += word_sum(quoted[index]);
        index += 1;
    }
    let icmp = Icmp {
        kind: UNREACHABLE_V6,
        sum: folded(sum),
        unused: [0; 2],
    };
    make_room(ctx, V6_LENGTH + ICMP_LENGTH)?;
    ctx.store(IP_OFFSET, &v6(packet, ICMP_V6, LENGTH, icmp), 0)
        .ok()
}

/// An IPv4 header for the way back, and what follows it.
#[inline(always)]
fn v4<T>(packet: &Packet, proto: u8, payload: u16, rest: T) -> V4<T> {
    let [high, low] = (V4_LENGTH as u16 + payload).to_be_bytes();
    let head = [0x45, 0, high, low, 0, 0, 0x40, 0, TTL, proto];
    let (source, destination) = (packet.destination[3], packet.source[3]);
    let mut sum = word_sum(source) + word_sum(destination);
    let mut index = 0;
    while index < head.len() {
        sum += u32::from(u16::from_ne_bytes([head[index], head[index + 1]]));
        index += 2;
    }
    V4 {
        head,
        sum: folded(sum),
        source: halves(source),
        destination: halves(destination),
        rest,
    }
}

/// The same for IPv6.
#[inline(always)]
fn v6<T>(packet: &Packet, next: u8, payload: u16, rest: T) -> V6<T> {
    V6 {
        version: [0x60, 0, 0, 0],
        length_be: payload.to_be(),
        next,
        hop_limit: TTL,
        source: packet.destination,
        destination: packet.source,
        rest,
    }
}

/// The sum of the pseudo header, the same in both directions.
#[inline(always)]
fn pseudo(packet: &Packet, proto: u8, length: u16) -> u32 {
    let mut sum = u32::from(length.to_be()) + u32::from(u16::from(proto).to_be());
    let mut word = if packet.is_v6 { 0 } else { 3 };
    while word < 4 {
        sum += word_sum(packet.source[word]) + word_sum(packet.destination[word]);
        word += 1;
    }
    sum
}

/// What a word adds to a sum of halves.
#[inline(always)]
pub fn word_sum(word: u32) -> u32 {
    (word & 0xffff) + (word >> 16)
}

/// The checksum that such a sum becomes.
#[inline(always)]
pub fn folded(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    !(sum as u16)
}

/// A word as two, in the order of memory.
#[inline(always)]
pub fn halves(word: u32) -> [u16; 2] {
    let [a, b, c, d] = word.to_ne_bytes();
    [u16::from_ne_bytes([a, b]), u16::from_ne_bytes([c, d])]
}

/// Makes the frame this long.
#[inline(always)]
pub fn change_tail(ctx: &TcContext, length: usize) -> Option<()> {
    // SAFETY: the helper takes this hook's context.
    let result = unsafe { bpf_skb_change_tail(ctx.skb.skb, length as u32, 0) };
    (result == 0).then_some(())
}

/// Room between Ethernet and IP.
#[inline(always)]
fn make_room(ctx: &TcContext, length: usize) -> Option<()> {
    ctx.adjust_room(length as i32, BPF_ADJ_ROOM_MAC, 0).ok()
}

const _: () = {
    assert!(core::mem::size_of::<V4<Tcp>>() == V4_LENGTH + TCP_LENGTH);
    assert!(core::mem::size_of::<V4<Icmp>>() == V4_LENGTH + ICMP_LENGTH);
    assert!(core::mem::size_of::<V6<Tcp>>() == V6_LENGTH + TCP_LENGTH);
    assert!(core::mem::size_of::<V6<Icmp>>() == V6_LENGTH + ICMP_LENGTH);
};
