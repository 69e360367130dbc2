//! Load balancer addresses are on no interface: who asks for one by ARP gets the hardware address of
//! the uplink that was asked, if it is this node that announces it.
//!
//! Limits: ARP only; an IPv6 address must be routed to the node.

use aya_ebpf::bindings::TC_ACT_UNSPEC;
use aya_ebpf::helpers::bpf_redirect;
use aya_ebpf::programs::TcContext;
use ebpf_maps::endpoint::Mac;
use ebpf_maps::services::v4_mapped;

use crate::maps::{ANNOUNCED, UPLINKS};
use crate::packet::{IP_OFFSET, read};

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

const _: () = assert!(core::mem::size_of::<Arp>() == 28);
