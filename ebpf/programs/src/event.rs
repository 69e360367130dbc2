//! Tells those who watch what becomes of flows; see `ebpf_maps::event`.
//!
//! ```text
//!  nobody watches ─► one element of an array is read at the end of the program, and nothing else
//!  else  drop, translate ─► notes in `Work` ─► tell ─► is it a flow's first packet? ─► budget ─► EVENTS
//! ```
//! An event is built where the ring buffer has room for it, not on the stack, and by functions that are
//! called: what they need of stack and of the verifier's patience is not added to the programs' own.
//!
//! Notes carry the time, because a watch may begin or end between a note and its telling: an old note is
//! about another packet.

use core::ptr::{addr_of_mut, read_volatile, write_volatile};

use aya_ebpf::EbpfContext;
use aya_ebpf::helpers::{bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_ktime_get_ns};
use aya_ebpf::programs::{SockAddrContext, TcContext};
use ebpf_maps::drop;
use ebpf_maps::event::{
    AT_INGRESS, BUDGET, BUDGET_DROPPED, BUDGET_PASSED, BUDGET_TICK_SHIFT, FlowEvent, IS_TRANSLATED,
    NO_IP, NOT_DROPPED, POINT_CONNECT, POINT_FROM_OUTSIDE, POINT_SEND, POINT_TO_POD, SEEN_S,
};
use ebpf_maps::flow::{Ends, IS_REPLY};
use ebpf_maps::services::{Addr, BackendValue, flow_hash, mix};

use crate::maps::{BUDGETS, EVENTS, SEEN, WATCH, work, work_in_use};
use crate::packet::{self, ACK, ICMP_V6, NO_L4, Packet, SYN, TCP};
use crate::service::Call;
use crate::socket::Peer;
use crate::work::Work;

const NS_PER_S: u64 = 1_000_000_000;
/// A note that is older is about another packet.
const NOTE_NS: u64 = 50_000_000;
/// ICMPv6 from multicast listener queries to redirects, and reports: the link's own talk.
const DISCOVERY_FIRST: u8 = 130;
const DISCOVERY_LAST: u8 = 137;
const LISTENER_REPORT_V2: u8 = 143;
/// The bits of a value of SEEN that are points and no time.
const POINTS: u64 = 0xff;

/// What the packet in hand went through so far; written only while somebody watches, but for
/// `at_ingress`, which is written with every refusal of a policy.
#[repr(C)]
pub struct Notes {
    /// When `reason` was noted.
    pub dropped_ns: u64,
    /// When `before` was noted.
    pub translated_ns: u64,
    /// When it was noted that the packet is for a pod of this node.
    pub arrived_ns: u64,
    /// What the packet said before it was translated.
    pub before: Ends,
    /// Why it is dropped.
    pub reason: u32,
    /// It was an answer.
    pub is_reply: bool,
    /// A policy for what its receiver may get has refused it.
    pub at_ingress: bool,
}

/// Whether somebody watches.
#[inline(always)]
pub fn is_watched() -> bool {
    match WATCH.get(0) {
        // SAFETY: a reference to an element; the agent writes it at any time.
        Some(until) => unsafe { read_volatile(until) != 0 },
        None => false,
    }
}

/// Runs a packet program, and tells what it did.
#[inline(always)]
pub fn told(ctx: &TcContext, point: u8, program: impl Fn(&TcContext) -> i32) -> i32 {
    let verdict = program(ctx);
    // Read at the end, and only there: what the verifier would know of it at the beginning it would
    // carry through the whole program, twice.
    if is_watched() {
        tell(ctx, u32::from(point));
    }
    verdict
}

/// The packet is dropped for this reason.
#[inline(always)]
pub fn note_drop(reason: u32) {
    if is_watched()
        && let Some(work) = work_in_use()
    {
        // SAFETY: this CPU's own element, checked by the lookup; who holds it reads no notes.
        unsafe {
            (*work).notes.dropped_ns = bpf_ktime_get_ns();
            (*work).notes.reason = reason;
        }
    }
}

/// The packet is about to become `work.becomes`.
#[inline(always)]
pub fn note_translated(work: &mut Work) {
    if is_watched() {
        keep_before(work);
    }
}

#[inline(never)]
fn keep_before(work: &mut Work) -> u32 {
    // SAFETY: takes nothing, returns a number.
    work.notes.translated_ns = unsafe { bpf_ktime_get_ns() };
    work.notes.is_reply = work.flow.flags & IS_REPLY != 0;
    let (packet, before) = (&work.packet, &mut work.notes.before);
    let mut word = 0;
    while word < 4 {
        // SAFETY: references to words; volatile, so that the compiler makes no call of it.
        unsafe {
            write_volatile(
                &mut before.source[word],
                read_volatile(&packet.source[word]),
            );
            let from = read_volatile(&packet.destination[word]);
            write_volatile(&mut before.destination[word], from);
        }
        word += 1;
    }
    before.source_port_be = packet.source_port_be;
    before.destination_port_be = packet.destination_port_be;
    0
}

/// The packet has come by an uplink and is about to be put into a pod.
#[inline(always)]
pub fn note_arrived(work: &mut Work) {
    if is_watched() {
        // SAFETY: takes nothing, returns a number.
        work.notes.arrived_ns = unsafe { bpf_ktime_get_ns() };
    }
}

/// Tells of the packet in `Work`, if it is one to tell of.
#[inline(never)]
fn tell(ctx: &TcContext, point: u32) -> u32 {
    let Some(work) = work() else {
        return 0;
    };
    // SAFETY: takes nothing, returns a number.
    let now_ns = unsafe { bpf_ktime_get_ns() };
    let has_arrived = now_ns.wrapping_sub(work.notes.arrived_ns) < NOTE_NS;
    let is_dropped = now_ns.wrapping_sub(work.notes.dropped_ns) < NOTE_NS;
    let is_translated = now_ns.wrapping_sub(work.notes.translated_ns) < NOTE_NS;
    work.notes.dropped_ns = 0;
    work.notes.translated_ns = 0;
    work.notes.arrived_ns = 0;
    let point = match has_arrived && !is_translated {
        true => u32::from(POINT_TO_POD),
        false => point,
    };
    // By uplinks comes much that is none of the cluster's business; of that nothing is parsed either.
    if !is_dropped && !is_translated && point >= u32::from(POINT_FROM_OUTSIDE) {
        return 0;
    }
    if !is_dropped && !begins(work, point, now_ns, is_translated) {
        return 0;
    }
    if !is_in_budget(is_dropped, now_ns) {
        return 0;
    }
    let Some(mut room) = EVENTS.reserve::<FlowEvent>(0) else {
        miss(is_dropped);
        return 0;
    };
    let event = room.as_mut_ptr();
    let (packet, before) = (&work.packet, &work.notes.before);
    let mut flags = 0;
    let has_ip = packet.flags & packet::NO_IP == 0;
    if !has_ip {
        flags |= NO_IP;
    }
    let is_translated = is_translated && has_ip;
    if is_translated {
        flags |= IS_TRANSLATED;
    }
    if is_dropped && work.notes.reason == drop::POLICY && work.notes.at_ingress {
        flags |= AT_INGRESS;
    }
    // SAFETY: room for an event, as reserved; every byte of it is written.
    unsafe {
        (*event).time_ns = now_ns;
        (*event).netns_cookie = 0;
        copy(
            addr_of_mut!((*event).source),
            if is_translated {
                &before.source
            } else {
                &packet.source
            },
        );
        copy(addr_of_mut!((*event).destination), &packet.destination);
        copy(addr_of_mut!((*event).frontend), &before.destination);
        (*event).source_port_be = if is_translated {
            before.source_port_be
        } else {
            packet.source_port_be
        };
        (*event).destination_port_be = packet.destination_port_be;
        (*event).frontend_port_be = before.destination_port_be;
        (*event).proto = packet.proto;
        (*event).point = point as u8;
        (*event).reason = if is_dropped {
            work.notes.reason as u8
        } else {
            NOT_DROPPED
        };
        (*event).flags = flags;
        (*event)._pad = 0;
        (*event).ifindex = (*ctx.skb.skb).ifindex;
    }
    room.submit(0);
    0
}

/// Whether this is the first packet of a flow at this point.
#[inline(always)]
fn begins(work: &Work, point: u32, now_ns: u64, is_translated: bool) -> bool {
    let packet = &work.packet;
    if packet.flags & (NO_L4 | packet::NO_IP) != 0 || is_translated && work.notes.is_reply {
        return false;
    }
    if packet.proto == TCP {
        return packet.kind & (SYN | ACK) == SYN;
    }
    if packet.proto == ICMP_V6
        && packet.is_v6
        && (packet.kind >= DISCOVERY_FIRST && packet.kind <= DISCOVERY_LAST
            || packet.kind == LISTENER_REPORT_V2)
    {
        return false;
    }
    let own = key_of(packet, false);
    if !is_new(own, point, now_ns) || is_seen(key_of(packet, true), now_ns) {
        return false;
    }
    if is_translated {
        // The answers will come from there.
        let before = &work.notes.before;
        is_new(flow_key(before, packet.proto), point, now_ns);
    }
    true
}

#[inline(always)]
fn key_of(packet: &Packet, reversed: bool) -> u64 {
    let hash = match reversed {
        false => flow_hash(
            &packet.source,
            packet.source_port_be,
            &packet.destination,
            packet.destination_port_be,
            packet.proto,
        ),
        true => flow_hash(
            &packet.destination,
            packet.destination_port_be,
            &packet.source,
            packet.source_port_be,
            packet.proto,
        ),
    };
    u64::from(hash)
}

#[inline(always)]
fn flow_key(ends: &Ends, proto: u8) -> u64 {
    u64::from(flow_hash(
        &ends.source,
        ends.source_port_be,
        &ends.destination,
        ends.destination_port_be,
        proto,
    ))
}

#[inline(always)]
fn is_fresh(seen: u64, now_ns: u64) -> bool {
    now_ns.wrapping_sub(seen & !POINTS) < SEEN_S * NS_PER_S
}

#[inline(always)]
fn is_seen(key: u64, now_ns: u64) -> bool {
    match SEEN.get_ptr(&key) {
        // SAFETY: the lookup checked the pointer; of an element that is reused only one line comes
        // too often or not at all.
        Some(seen) => is_fresh(unsafe { read_volatile(seen) }, now_ns),
        None => false,
    }
}

/// Marks a flow as seen at a point; false: it was already.
#[inline(never)]
fn is_new(key: u64, point: u32, now_ns: u64) -> bool {
    let bit = 1 << (point & 7);
    let Some(seen) = SEEN.get_ptr_mut(&key) else {
        let _ = SEEN.insert(&key, &((now_ns & !POINTS) | bit), 0);
        return true;
    };
    // SAFETY: as above.
    let before = unsafe { read_volatile(seen) };
    let points = if is_fresh(before, now_ns) {
        before & POINTS
    } else {
        0
    };
    // SAFETY: as above.
    unsafe { write_volatile(seen, (now_ns & !POINTS) | points | bit) };
    points & bit == 0
}

/// Whether this CPU may tell one more of this kind; counts it either way. False as well when the one
/// who watched has not said for a while that it still does.
#[inline(never)]
fn is_in_budget(is_dropped: bool, now_ns: u64) -> bool {
    match WATCH.get(0) {
        // SAFETY: as in `is_watched`.
        Some(until) if unsafe { read_volatile(until) } > now_ns => {}
        _ => return false,
    }
    let Some(budget) = BUDGETS.get_ptr_mut(kind(is_dropped)) else {
        return false;
    };
    let tick = now_ns >> BUDGET_TICK_SHIFT;
    // SAFETY: this CPU's own element, checked by the lookup; what interrupts costs one count.
    unsafe {
        if (*budget).tick != tick {
            (*budget).tick = tick;
            (*budget).told = 0;
        }
        if (*budget).told >= BUDGET {
            (*budget).missed += 1;
            return false;
        }
        (*budget).told += 1;
    }
    true
}

#[inline(always)]
fn miss(is_dropped: bool) {
    if let Some(budget) = BUDGETS.get_ptr_mut(kind(is_dropped)) {
        // SAFETY: as in `is_in_budget`.
        unsafe { (*budget).missed += 1 }
    }
}

#[inline(always)]
fn kind(is_dropped: bool) -> u32 {
    if is_dropped {
        BUDGET_DROPPED
    } else {
        BUDGET_PASSED
    }
}

/// # Safety
/// `to` has room for an address.
#[inline(always)]
unsafe fn copy(to: *mut Addr, from: &Addr) {
    let to = to.cast::<u32>();
    let mut word = 0;
    while word < 4 {
        // SAFETY: the caller's promise; volatile, so that the compiler makes no call of it.
        unsafe { write_volatile(to.add(word), read_volatile(&from[word])) };
        word += 1;
    }
}

/// A socket was sent on from a frontend to a backend; null: it was refused, nobody serves it.
#[inline(always)]
pub fn called(ctx: &SockAddrContext, peer: &Peer, backend: *const BackendValue, call: Call) {
    if is_watched() {
        tell_call(ctx, peer, backend, u32::from(call == Call::Send));
    }
}

#[inline(never)]
fn tell_call(
    ctx: &SockAddrContext,
    peer: &Peer,
    backend: *const BackendValue,
    is_send: u32,
) -> u32 {
    // SAFETY: the first takes nothing; the other two take this hook's context.
    let (now_ns, netns_cookie, socket) = unsafe {
        (
            bpf_ktime_get_ns(),
            bpf_get_netns_cookie(ctx.as_ptr()),
            bpf_get_socket_cookie(ctx.as_ptr()),
        )
    };
    let is_dropped = backend.is_null();
    let point = if is_send != 0 {
        POINT_SEND
    } else {
        POINT_CONNECT
    };
    // An unconnected socket asks again for each datagram.
    if is_send != 0 && !is_dropped {
        let hash = flow_hash(
            &peer.addr,
            mix(socket as u32) as u16,
            &peer.addr,
            peer.port_be,
            0,
        );
        if !is_new((socket << 32) | u64::from(hash), u32::from(point), now_ns) {
            return 0;
        }
    }
    if !is_in_budget(is_dropped, now_ns) {
        return 0;
    }
    let Some(mut room) = EVENTS.reserve::<FlowEvent>(0) else {
        miss(is_dropped);
        return 0;
    };
    let event = room.as_mut_ptr();
    // SAFETY: room for an event, as reserved; every byte of it is written. A backend that is not null
    // is an element of BACKENDS.
    unsafe {
        (*event).time_ns = now_ns;
        (*event).netns_cookie = netns_cookie;
        copy(addr_of_mut!((*event).source), &[0; 4]);
        copy(addr_of_mut!((*event).frontend), &peer.addr);
        if is_dropped {
            copy(addr_of_mut!((*event).destination), &peer.addr);
            (*event).destination_port_be = peer.port_be;
            (*event).reason = drop::NO_BACKEND as u8;
        } else {
            copy(addr_of_mut!((*event).destination), &(*backend).addr);
            (*event).destination_port_be = (*backend).port_be;
            (*event).reason = NOT_DROPPED;
        }
        (*event).source_port_be = 0;
        (*event).frontend_port_be = peer.port_be;
        (*event).proto = peer.proto;
        (*event).point = point;
        (*event).flags = IS_TRANSLATED;
        (*event)._pad = 0;
        (*event).ifindex = 0;
    }
    room.submit(0);
    0
}
