//! The fast path between pods and other machines, past the node's IP stack.
//!
//! ```text
//!  leave   to the gateway's hardware address, by an uplink, to a host of its link that is known,
//!          short enough, with hops left                                       ─► to that host
//!  arrive  for a pod of this node, from where its answer would go to          ─► put into the pod
//!  all else, of pods of a third party's wiring, or where it is switched off   ─► the node's stack
//! ```
//! Invariants: a packet is either sent on or dropped here, or is what it was; where the stack would answer (no
//! hops left, too long, no route), ask (who is the neighbour), refuse (a source from where no such packet should
//! come) or look closer (options), it does.
//!
//! A route's own MTU counts where it is locked, as the kernel's lookup has it; else that of its interface does.
//! Netfilter rules of the node do not see these packets, and into a pod of this node they have as many hops
//! left as they came with. The programs of the uplink see all of them.

use aya_ebpf::bindings::TC_ACT_UNSPEC;
use aya_ebpf::programs::TcContext;
use ebpf_maps::endpoint::{DIRECT, Mac};
use ebpf_maps::uplink::SWITCH_FAST_PATH;

use crate::drop::drop;
use crate::maps::{endpoint, is_on};
use crate::outside::{Hook, age};
use crate::packet::{
    HAS_OPTIONS, IP_OFFSET, Packet, TCP, UDP, V4_LENGTH, V6_LENGTH, read, same_mac,
};
use crate::pod::{self, PACKET_HOST};
use crate::work::Work;
use crate::{direct, event, way};

/// From the TCP header to the word with its length.
const TCP_LENGTH: usize = 12;
const UDP_LENGTH: u32 = 8;

/// What a pod sends to somebody who is no pod of this node.
#[inline(always)]
pub fn leave(ctx: &TcContext, work: &Work) -> i32 {
    if is_on(SWITCH_FAST_PATH) && work.packet.flags == 0 {
        return leave_at_once(ctx, work);
    }
    TC_ACT_UNSPEC
}

#[inline(never)]
fn leave_at_once(ctx: &TcContext, work: &Work) -> i32 {
    sent(ctx, &work.packet).unwrap_or(TC_ACT_UNSPEC)
}

/// None: it is the stack's.
#[inline(always)]
fn sent(ctx: &TcContext, packet: &Packet) -> Option<i32> {
    let own = endpoint(&packet.source)?;
    if own.flags & DIRECT == 0 || !same_mac(&read::<Mac>(ctx, 0)?, &own.gateway_mac) {
        return None;
    }
    let hook = Hook::of(ctx);
    let way = way::of(hook, packet.is_v6, &packet.source, &packet.destination)?;
    if way.is_uplink == 0 || length(ctx, packet)? > u32::from(way.length_max) {
        return None;
    }
    age(ctx, packet.is_v6).ok()?;
    Some(direct::to_neighbour(way.ifindex, packet.is_v6, &way.hop))
}

/// Bytes of the IP packet, or of the longest that will be made of it.
#[inline(always)]
fn length(ctx: &TcContext, packet: &Packet) -> Option<u32> {
    // SAFETY: the kernel passes a valid context.
    let (length, segment) = unsafe { ((*ctx.skb.skb).len, (*ctx.skb.skb).gso_size) };
    if segment == 0 {
        return Some(length.wrapping_sub(IP_OFFSET as u32));
    }
    let ip = if packet.is_v6 { V6_LENGTH } else { V4_LENGTH };
    let above = match packet.proto {
        TCP => u32::from(read::<u8>(ctx, IP_OFFSET + ip + TCP_LENGTH)? >> 4) * 4,
        UDP => UDP_LENGTH,
        _ => return None,
    };
    Some(ip as u32 + above + segment)
}

/// What has come by an uplink, and is what it is to be.
#[inline(always)]
pub fn arrive(ctx: &TcContext, work: &mut Work) -> i32 {
    if is_on(SWITCH_FAST_PATH) && work.packet.flags & HAS_OPTIONS == 0 {
        return arrive_at_once(ctx, work);
    }
    TC_ACT_UNSPEC
}

#[inline(never)]
fn arrive_at_once(ctx: &TcContext, work: &mut Work) -> i32 {
    let Some(to) = endpoint(&work.packet.destination) else {
        return TC_ACT_UNSPEC;
    };
    // SAFETY: the kernel passes a valid context.
    let kind = unsafe { (*ctx.skb.skb).pkt_type };
    if to.flags & DIRECT == 0 || kind != PACKET_HOST || !is_answered_by_it(ctx, &work.packet) {
        return TC_ACT_UNSPEC;
    }
    event::note_arrived(work);
    match pod::deliver(ctx, work, to.pod_id, to.flags) {
        Ok(()) => pod::put_into(ctx, to),
        Err(reason) => drop(reason),
    }
}

/// Whether the answer would go by this very interface: a source that is a pod or an address of this node, or
/// is reached by another way, is for the stack to judge.
#[inline(always)]
fn is_answered_by_it(ctx: &TcContext, packet: &Packet) -> bool {
    let hook = Hook::of(ctx);
    match way::of(hook, packet.is_v6, &packet.destination, &packet.source) {
        Some(way) => way.ifindex == hook.ifindex,
        None => false,
    }
}
