//! Pods' packets to the outside leave from the node's own address: the network around the node knows
//! no way back to a pod's.
//!
//! ```text
//!  leaves  of a pod, to nobody that knows pods ─► a port of the node's address, the flow begins
//!  comes   to a pod's very address, by a route that somebody has made ─► its answers stay as they are
//! ```
//! Who knows pods: the other pods, nodes that are reached directly, what the agent was told besides. The
//! node's own packets and those of its host network have its address anyway. TCP may begin in the middle: the port follows
//! from the flow, so a flow that was forgotten mostly gets its own again, and goes on.
//!
//! What has no port to exchange (neither TCP nor UDP nor an echo) is told by its addresses and protocol:
//! one pod at a time can use it with one peer.
//!
//! An uplink without an address of the packet's family lets it pass as it is.

use aya_ebpf::maps::lpm_trie::Key;
use aya_ebpf::programs::TcContext;
use ebpf_maps::endpoint::DIRECT;
use ebpf_maps::flow::{DIRECT_RETURN, FlowKey, ZONE_FRAGMENTS, ZONE_OUTSIDE};
use ebpf_maps::services::Addr;
use ebpf_maps::uplink::{
    NEVER, NODE_BEHIND, POD, SOURCE_PORT_COUNT, SOURCE_PORT_MIN, SWITCH_MASQUERADE,
};
use ebpf_maps::{counter, drop};

use crate::addr::same;
use crate::drop::{packed, unpacked};
use crate::maps::{FLOWS, MASQUERADE, NODE_ADDRESSES, UPLINKS, count, endpoint, is_on};
use crate::outside::{hash_of, ifindex};
use crate::packet::{
    self, ACK, ICMP, ICMP_V6, IP_OFFSET, IS_FRAGMENT, NO_L4, Packet, SYN, TCP, UDP,
};
use crate::work::Work;
use crate::{conntrack, nat};

/// Source ports that are tried for a flow.
const PORT_ATTEMPTS: u32 = 8;
/// How far apart they are; coprime to their number.
const PORT_STRIDE: u32 = 911;
const ADDRESS_BITS: u32 = 128;

/// Whether it is done at all.
#[inline(always)]
pub fn is_used() -> bool {
    is_on(SWITCH_MASQUERADE)
}

/// A packet that leaves and belongs to no known flow. Untouched unless it is to be masqueraded.
///
/// # Errors
/// A reason to drop it.
#[inline(always)]
pub fn leave(ctx: &TcContext, work: &mut Work) -> Result<(), u32> {
    unpacked(leave_packed(ctx, work))
}

#[inline(never)]
fn leave_packed(ctx: &TcContext, work: &mut Work) -> u32 {
    packed(leave_here(ctx, work))
}

#[inline(always)]
fn leave_here(ctx: &TcContext, work: &mut Work) -> Result<(), u32> {
    if !is_between(&work.packet.source, &work.packet.destination) {
        return Ok(());
    }
    if work.packet.flags & NO_L4 != 0 {
        return Err(drop::FRAGMENT);
    }
    if is_answer(&work.packet) {
        return Ok(());
    }
    let Some(uplink) = UPLINKS.get_ptr(&ifindex(ctx)) else {
        return Ok(());
    };
    work.becomes = work.packet.ends();
    // SAFETY: the pointer is an element of the map, checked by the lookup.
    work.becomes.source = unsafe {
        if work.packet.is_v6 {
            (*uplink).v6
        } else {
            (*uplink).v4
        }
    };
    if same(&work.becomes.source, &[0; 4]) {
        return Ok(());
    }
    if !begin_from_port(work, 0, 0) {
        return Err(drop::NO_PORT);
    }
    count(counter::MASQUERADED);
    remember_fragments(ctx, work);
    nat::rewrite(ctx, work)
}

/// A packet that came and belongs to no known flow: if it is for the very address of a pod, its answers
/// are not for [`leave`].
#[inline(never)]
pub fn arrive(work: &mut Work) {
    if !nat::is_error(&work.packet) && is_between(&work.packet.destination, &work.packet.source) {
        work.becomes = work.packet.ends();
        // A full map only costs what it was for, and being LRU it is never full.
        let _ = conntrack::begin(work, ZONE_OUTSIDE, 0, 0);
    }
}

/// Makes the flow of the packet known that becomes `work.becomes`, but for the source port, which is
/// chosen here: a free one of those that the node's own sockets do not get by themselves.
///
/// * `backend_id`, `service_id` – as for `conntrack::begin`.
#[inline(never)]
pub fn begin_from_port(work: &mut Work, backend_id: u32, service_id: u32) -> bool {
    let is_echo = matches!(work.packet.proto, ICMP | ICMP_V6) && work.packet.source_port_be != 0;
    if !is_echo && !matches!(work.packet.proto, TCP | UDP) {
        return conntrack::begin(work, ZONE_OUTSIDE, backend_id, service_id);
    }
    let first = hash_of(&work.packet);
    let mut attempt = 0;
    while attempt < PORT_ATTEMPTS {
        let offset = first.wrapping_add(attempt * PORT_STRIDE) % SOURCE_PORT_COUNT;
        let port_be = ((SOURCE_PORT_MIN + offset) as u16).to_be();
        work.becomes.source_port_be = port_be;
        if is_echo {
            work.becomes.destination_port_be = port_be;
        }
        if conntrack::begin(work, ZONE_OUTSIDE, backend_id, service_id) {
            return true;
        }
        attempt += 1;
    }
    false
}

/// Notes what the first fragment of a packet becomes, `work.becomes`, for those that follow.
#[inline(never)]
pub fn remember_fragments(ctx: &TcContext, work: &mut Work) {
    if work.packet.flags & IS_FRAGMENT == 0 {
        return;
    }
    let [source_port_be, destination_port_be] = id(ctx, &work.packet);
    work.key = FlowKey {
        ends: work.packet.ends(),
        proto: work.packet.proto,
        zone: ZONE_FRAGMENTS,
        _pad: 0,
    };
    work.key.ends.source_port_be = source_port_be;
    work.key.ends.destination_port_be = destination_port_be;
    conntrack::set_ends(&mut work.answer.ends, &work.becomes, false);
    work.answer.used = conntrack::ticks(work);
    work.answer.backend_id = 0;
    work.answer.service_id = 0;
    work.answer.flags = work.flow.flags & DIRECT_RETURN;
    work.answer._pad = [0; 3];
    // LRU: it is never full.
    let _ = FLOWS.insert(&work.key, &work.answer, 0);
}

/// A fragment that is not the first follows it: `work.becomes` is what it becomes.
#[inline(never)]
pub fn find_fragments(ctx: &TcContext, work: &mut Work) -> bool {
    let [source_port_be, destination_port_be] = id(ctx, &work.packet);
    work.packet.source_port_be = source_port_be;
    work.packet.destination_port_be = destination_port_be;
    let is_known = conntrack::find(work, ZONE_FRAGMENTS);
    work.packet.source_port_be = 0;
    work.packet.destination_port_be = 0;
    if is_known {
        conntrack::set_ends(&mut work.becomes, &work.flow.ends, false);
    }
    is_known
}

/// The packet's id, which its fragments share.
#[inline(always)]
fn id(ctx: &TcContext, packet: &Packet) -> [u16; 2] {
    if packet.is_v6 {
        // The fragment header ends where the rest begins; behind other headers nothing is found.
        ctx.load(packet.l4_offset as usize - 4).unwrap_or([0; 2])
    } else {
        [0, packet::read(ctx, IP_OFFSET + 4).unwrap_or(0)]
    }
}

/// The first one is a pod's address, the other one of somebody who knows no pods.
#[inline(always)]
fn is_between(pod: &Addr, other: &Addr) -> bool {
    is_pod(pod) && kind(other) & NEVER == 0 && !is_near_node(other)
}

/// Mostly of a pod that is known, which costs no call.
#[inline(always)]
fn is_pod(addr: &Addr) -> bool {
    match endpoint(addr) {
        Some(pod) if pod.flags & DIRECT != 0 => true,
        _ => kind(addr) & POD != 0,
    }
}

/// The address of a node whose answers to a pod come back by the way that they were asked.
#[inline(always)]
fn is_near_node(addr: &Addr) -> bool {
    match NODE_ADDRESSES.get_ptr(addr) {
        // SAFETY: the pointer is an element of the map, checked by the lookup.
        Some(node) => unsafe { *node != NODE_BEHIND },
        None => false,
    }
}

#[inline(never)]
fn kind(addr: &Addr) -> u32 {
    match MASQUERADE.get(Key::new(ADDRESS_BITS, *addr)) {
        Some(kind) => *kind,
        None => 0,
    }
}

/// What only answers: its flow began elsewhere, and none begins with it.
#[inline(always)]
fn is_answer(packet: &Packet) -> bool {
    packet.proto == TCP && packet.kind & (SYN | ACK) == SYN | ACK
}

const _: () = assert!(!SOURCE_PORT_COUNT.is_multiple_of(PORT_STRIDE));
