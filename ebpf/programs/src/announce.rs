//! Load balancer addresses are on no interface: who asks for one, by ARP or by neighbour discovery, gets
//! the hardware address of the uplink that was asked, if it is this node that announces it.
//!
//! Neighbour discovery asks a multicast group; the agent has joined those of the addresses that it
//! announces, or network cards and switches would keep the question from the node.

use aya_ebpf::bindings::TC_ACT_UNSPEC;
use aya_ebpf::helpers::bpf_redirect;
use aya_ebpf::programs::TcContext;
use ebpf_maps::endpoint::Mac;
use ebpf_maps::services::{Addr, v4_mapped};

use crate::maps::{ANNOUNCED, UPLINKS};
use crate::packet::{ICMP_V6, IP_OFFSET, NO_L4, Packet, V6_LENGTH, read};
use crate::reject::{change_tail, folded, halves, word_sum};

/// The kind of an ARP message, and its body for IPv4 over Ethernet.
#[repr(C)]
#[derive(Clone, Copy)]
struct Arp {
    /// Ethernet, IPv4, 6 and 4 bytes of address.
    head: [u16; 3],
    operation: u16,
    sender_mac: Mac,
    sender: [u8; 4],
    target_mac: Mac,
    target: [u8; 4],
}

const HEAD: [u16; 3] = [1_u16.to_be(), 0x0800_u16.to_be(), 0x0604_u16.to_be()];
const REQUEST: u16 = 1_u16.to_be();
const REPLY: u16 = 2_u16.to_be();

/// Answers a request for an announced address; everything else is the stack's.
#[inline(always)]
pub fn answer(ctx: &TcContext) -> i32 {
    let Some(asked) = read::<Arp>(ctx, IP_OFFSET) else {
        return TC_ACT_UNSPEC;
    };
    let is_plain = asked.head[0] == HEAD[0] && asked.head[1] == HEAD[1] && asked.head[2] == HEAD[2];
    let target = v4_mapped(u32::from_ne_bytes(asked.target));
    if !is_plain || asked.operation != REQUEST || ANNOUNCED.get_ptr(&target).is_none() {
        return TC_ACT_UNSPEC;
    }
    // SAFETY: the kernel passes a valid context.
    let ifindex = unsafe { (*ctx.skb.skb).ifindex };
    let Some(uplink) = UPLINKS.get_ptr(&ifindex) else {
        return TC_ACT_UNSPEC;
    };
    // SAFETY: the pointer is an element of the map, checked by the lookup.
    let own = unsafe { (*uplink).mac };
    let answer = Arp {
        operation: REPLY,
        sender_mac: own,
        sender: asked.target,
        target_mac: asked.sender_mac,
        target: asked.sender,
        ..asked
    };
    let ends: [Mac; 2] = [asked.sender_mac, own];
    if ctx.store(0, &ends, 0).is_err() || ctx.store(IP_OFFSET, &answer, 0).is_err() {
        return TC_ACT_UNSPEC;
    }
    // SAFETY: any index is a valid argument.
    unsafe { bpf_redirect(ifindex, 0) as i32 }
}

/// ICMPv6 types of RFC 4861, and the one hop limit that no router lets through.
pub const SOLICITATION: u8 = 135;
const ADVERTISEMENT: u8 = 136;
const HOP_LIMIT: u8 = 255;
/// From the start of the frame.
const HOP_LIMIT_OFFSET: usize = IP_OFFSET + 7;
const TARGET_OFFSET: usize = IP_OFFSET + V6_LENGTH + 8;
/// Flags of an advertisement: asked for, and overriding what was known before.
const SOLICITED: u8 = 0x40;
const OVERRIDE: u8 = 0x20;
/// Its length, and that of the option with the hardware address, in units of 8 bytes.
const MESSAGE_LENGTH: u16 = 32;
const TARGET_LINK_ADDRESS: [u8; 2] = [2, 1];
/// All nodes of the link: ff02::1, and the hardware address that stands for it.
const ALL_NODES: Addr = [0xff02_0000_u32.to_be(), 0, 0, 1_u32.to_be()];
const ALL_NODES_MAC: Mac = [0x33, 0x33, 0, 0, 0, 1];

/// An advertisement, from the start of its frame.
#[repr(C)]
struct Advertisement {
    to: Mac,
    from: Mac,
    ethertype: [u8; 2],
    version: [u8; 4],
    length: [u8; 2],
    next: u8,
    hop_limit: u8,
    source: [[u16; 2]; 4],
    destination: [[u16; 2]; 4],
    kind: [u8; 2],
    sum: u16,
    flags: [u8; 4],
    target: [[u16; 2]; 4],
    option: [u8; 2],
    mac: Mac,
}

/// Answers a solicitation of an announced address; everything else is the stack's.
#[inline(never)]
pub fn advertise(ctx: &TcContext, packet: &Packet) -> i32 {
    match advertise_here(ctx, packet) {
        // SAFETY: any index is a valid argument.
        Some(ifindex) => unsafe { bpf_redirect(ifindex, 0) as i32 },
        None => TC_ACT_UNSPEC,
    }
}

#[inline(always)]
fn advertise_here(ctx: &TcContext, packet: &Packet) -> Option<u32> {
    let plain = packet.l4_offset == (IP_OFFSET + V6_LENGTH) as u32 && packet.flags & NO_L4 == 0;
    if !plain || packet.code != 0 || read::<u8>(ctx, HOP_LIMIT_OFFSET)? != HOP_LIMIT {
        return None;
    }
    let target = ctx.load::<Addr>(TARGET_OFFSET).ok()?;
    ANNOUNCED.get_ptr(&target)?;
    // SAFETY: the kernel passes a valid context.
    let ifindex = unsafe { (*ctx.skb.skb).ifindex };
    let uplink = UPLINKS.get_ptr(&ifindex)?;
    // SAFETY: the pointer is an element of the map, checked by the lookup.
    let own = unsafe { (*uplink).mac };
    let asker: Mac = read(ctx, 6)?;
    // Somebody who wants the address for himself has none yet.
    let is_probe = packet.source[0] | packet.source[1] | packet.source[2] | packet.source[3] == 0;
    let (to, destination, flags) = match is_probe {
        true => (ALL_NODES_MAC, ALL_NODES, OVERRIDE),
        false => (asker, packet.source, SOLICITED | OVERRIDE),
    };
    let kind = [ADVERTISEMENT, 0];
    let head = u16::from_ne_bytes;
    let mut sum = u32::from(MESSAGE_LENGTH.to_be()) + u32::from(u16::from(ICMP_V6).to_be());
    sum += u32::from(head(kind)) + u32::from(head([flags, 0]));
    sum += u32::from(head(TARGET_LINK_ADDRESS));
    let mut word = 0;
    while word < 4 {
        // The target is the source too.
        sum += 2 * word_sum(target[word]) + word_sum(destination[word]);
        word += 1;
    }
    let [a, b, c, d, e, f] = own;
    sum += u32::from(head([a, b])) + u32::from(head([c, d])) + u32::from(head([e, f]));
    let answer = Advertisement {
        to,
        from: own,
        ethertype: [0x86, 0xdd],
        version: [0x60, 0, 0, 0],
        length: MESSAGE_LENGTH.to_be_bytes(),
        next: ICMP_V6,
        hop_limit: HOP_LIMIT,
        source: target.map(halves),
        destination: destination.map(halves),
        kind,
        sum: folded(sum),
        flags: [flags, 0, 0, 0],
        target: target.map(halves),
        option: TARGET_LINK_ADDRESS,
        mac: own,
    };
    change_tail(ctx, core::mem::size_of::<Advertisement>())?;
    ctx.store(0, &answer, 0).ok()?;
    Some(ifindex)
}

const _: () = {
    assert!(core::mem::size_of::<Arp>() == 28);
    assert!(
        core::mem::size_of::<Advertisement>() == IP_OFFSET + V6_LENGTH + MESSAGE_LENGTH as usize
    );
};
