//! NetworkPolicy: may this pod exchange this packet with that peer? Both hooks and every short cut
//! past them ask here.
//!
//! ```text
//!  neither direction of the pod is isolated ─► allowed                           (no call, or 1 lookup)
//!  part of what was allowed before: a connection, its ICMP errors,
//!    the other fragments of a packet        ─► allowed, either way               (1 more)
//!  from the node itself to its pod          ─► allowed, and remembered           (probes)
//!  a rule for the peer's identity, or for anybody ─► allowed, and remembered     (3 more)
//!  all else                                 ─► refused
//! ```
//! Asked for each packet with the addresses that are really used: after a Service was translated
//! to its backend, before an answer is translated back. Not asked for ARP and for what a pod
//! sends to itself; neighbour discovery passes.
//!
//! A SYN is always judged, so a new rule holds for every new connection, and what is remembered of an
//! old one can open none. Connections that stand when a policy comes go on; that of a pod which has no
//! policy yet is remembered by its SYN. A pod without a row is one that the agent has not yet judged:
//! nothing passes.

use core::ptr::{addr_of, read_volatile};

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::helpers::bpf_ktime_get_coarse_ns;
use aya_ebpf::maps::lpm_trie::Key;
use aya_ebpf::programs::TcContext;
use ebpf_maps::flow::Ends;
use ebpf_maps::policy::{
    FLOW, FLOW_TIMEOUT_S, FRAGMENTS_IN, FRAGMENTS_OUT, FRAGMENTS_TIMEOUT_S, FlowKey, POLICY_CLOSED,
    POLICY_OPEN, PodPolicies, RULE_BITS_PORT, RULE_BITS_PROTO, RuleKey, open_place,
};
use ebpf_maps::services::{Addr, v4_mapped};

use crate::maps::{OPEN_PODS, POLICY_FLOWS, POLICY_PEERS, POLICY_PODS, POLICY_RULES};
use crate::packet::{
    self, ICMP, ICMP_V6, IP_OFFSET, IS_FRAGMENT, NO_L4, Packet, TCP, UDP, V4_LENGTH, V6_LENGTH,
};

const NS_PER_S: u64 = 1_000_000_000;
/// Times a row is read again when its element was reused under the reader.
const READ_ATTEMPTS: u32 = 3;
const ADDRESS_BITS: u32 = 128;

const SYN: u8 = 2;
const ACK: u8 = 16;
/// ICMPv6 from multicast listener queries to redirects, and reports: the link's own talk.
const DISCOVERY_FIRST: u8 = 130;
const DISCOVERY_LAST: u8 = 137;
const LISTENER_REPORT_V2: u8 = 143;
/// ICMP: destination unreachable, time exceeded, parameter problem.
const UNREACHABLE: u8 = 3;
const TIME_EXCEEDED: u8 = 11;
const PARAMETER_PROBLEM: u8 = 12;
/// ICMPv6: errors are 1 to 4, packet too big among them.
const V6_ERROR_LAST: u8 = 4;
/// From the start of an ICMP error to the packet that it is about.
const EMBEDDED_OFFSET: u32 = 8;

/// Whether this pod may send this packet. Called before it leaves for anywhere, by `from_pod`.
#[inline(always)]
pub fn allows_egress(ctx: &TcContext, packet: &Packet, pod_id: u64) -> bool {
    allows(ctx, packet, pod_id, true)
}

/// Whether this packet may reach this pod of this node. Called where it is delivered: by `to_pod`
/// for what comes through the node's network, by `from_pod` for what goes from pod to pod at once.
#[inline(always)]
pub fn allows_ingress(ctx: &TcContext, packet: &Packet, pod_id: u64) -> bool {
    allows(ctx, packet, pod_id, false)
}

#[inline(always)]
fn allows(ctx: &TcContext, packet: &Packet, pod_id: u64, outgoing: bool) -> bool {
    // Of what an open pod sends and is sent, only what opens a connection is of interest.
    if !opens(packet) && OPEN_PODS.get(open_place(pod_id)) == Some(&pod_id) {
        return true;
    }
    let packet = core::ptr::from_ref(packet);
    judge_packet(ctx.skb.skb, packet, pod_id, outgoing) != 0
}

/// A connection begins with it.
#[inline(always)]
fn opens(packet: &Packet) -> bool {
    packet.proto == TCP && packet.kind & (SYN | ACK) == SYN
}

// Called and not inlined: both directions of both hooks have one copy, with a stack of its own; and verified by
// itself, see `main`.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn judge_packet(
    ctx: *mut __sk_buff,
    packet: *const Packet,
    pod_id: u64,
    outgoing: bool,
) -> u32 {
    // SAFETY: null, or the caller's reference.
    match unsafe { packet.as_ref() } {
        Some(packet) => u32::from(judges(&TcContext::new(ctx), packet, pod_id, outgoing)),
        None => 0,
    }
}

#[inline(always)]
fn judges(ctx: &TcContext, packet: &Packet, pod_id: u64, outgoing: bool) -> bool {
    let Some((ingress, egress)) = policies_of(pod_id) else {
        return false;
    };
    let (peer, pod_port_be, peer_port_be) = if outgoing {
        (
            packet.destination,
            packet.source_port_be,
            packet.destination_port_be,
        )
    } else {
        (
            packet.source,
            packet.destination_port_be,
            packet.source_port_be,
        )
    };
    let flow = FlowKey {
        pod_id,
        peer,
        pod_port_be,
        peer_port_be,
        proto: packet.proto,
        kind: FLOW,
        _pad: 0,
    };
    let has_l4 = packet.flags & NO_L4 == 0;
    let opens = has_l4 && opens(packet);
    if ingress == POLICY_OPEN && egress == POLICY_OPEN {
        if opens {
            remember(&flow);
        }
        return true;
    }
    if is_discovery(packet) {
        return true;
    }
    let fragments = fragments(ctx, packet, &flow, outgoing);
    if !has_l4 && packet.flags & IS_FRAGMENT != 0 && is_known(&fragments, FRAGMENTS_TIMEOUT_S) {
        return true;
    }
    let known = !opens && (has_l4 && is_known(&flow, FLOW_TIMEOUT_S))
        || is_known_error(ctx, packet, pod_id, outgoing);
    let policy = if outgoing { egress } else { ingress };
    let allowed = known
        || policy == POLICY_OPEN
        || !outgoing && is_from_node(ctx)
        || policy != POLICY_CLOSED && has_rule(policy, packet, &peer, has_l4);
    if !allowed {
        return false;
    }
    if has_l4 && !known && !is_error(packet) {
        remember(&flow);
    }
    if has_l4 && packet.flags & IS_FRAGMENT != 0 {
        remember(&fragments);
    }
    true
}

/// Whether this pod has ever opened a TCP connection with these ends.
#[inline(never)]
pub fn has_opened(ends: &Ends, pod_id: u64) -> bool {
    let flow = FlowKey {
        pod_id,
        peer: ends.destination,
        pod_port_be: ends.source_port_be,
        peer_port_be: ends.destination_port_be,
        proto: TCP,
        kind: FLOW,
        _pad: 0,
    };
    POLICY_FLOWS.get_ptr(&flow).is_some()
}

/// The pod's policies, read consistently; none: it has no row.
#[inline(always)]
fn policies_of(pod_id: u64) -> Option<(u32, u32)> {
    let mut attempt = 0;
    while attempt < READ_ATTEMPTS {
        attempt += 1;
        let row: *const PodPolicies = POLICY_PODS.get_ptr(&pod_id)?;
        // SAFETY: the lookup checked the pointer; the element stays mapped while the program runs.
        // Another pod's row shows itself by its id, which is read last.
        let (ingress, egress, owner) = unsafe {
            (
                read_volatile(addr_of!((*row).ingress)),
                read_volatile(addr_of!((*row).egress)),
                read_volatile(addr_of!((*row).pod_id)),
            )
        };
        if owner == pod_id {
            return Some((ingress, egress));
        }
    }
    None
}

#[inline(always)]
fn has_rule(policy: u32, packet: &Packet, peer: &Addr, has_l4: bool) -> bool {
    let identity = match POLICY_PEERS.get(Key::new(ADDRESS_BITS, *peer)) {
        Some(identity) => *identity,
        None => 0,
    };
    // Without a port, only a rule for all ports can be met.
    let bits = if has_l4 {
        RULE_BITS_PORT
    } else {
        RULE_BITS_PROTO
    };
    let key = RuleKey {
        policy,
        identity,
        _pad: 0,
        proto: packet.proto,
        port_be: packet.destination_port_be,
    };
    if identity != 0 && POLICY_RULES.get(Key::new(bits, key)).is_some() {
        return true;
    }
    let anybody = RuleKey { identity: 0, ..key };
    POLICY_RULES.get(Key::new(bits, anybody)).is_some()
}

/// Whether this is remembered and not too old; then it is as new.
#[inline(always)]
fn is_known(flow: &FlowKey, timeout_s: u64) -> bool {
    let Some(used) = POLICY_FLOWS.get_ptr_mut(flow) else {
        return false;
    };
    if flow.proto == TCP && flow.kind == FLOW {
        return true;
    }
    // SAFETY: takes nothing, returns a number.
    let now_ns = unsafe { bpf_ktime_get_coarse_ns() };
    // SAFETY: the lookup checked the pointer and has made the element the most recently used, so that
    // it is not reused in these nanoseconds; a lost refresh only shortens a timeout.
    let age_ns = now_ns.wrapping_sub(unsafe { read_volatile(used) });
    if age_ns >= timeout_s * NS_PER_S {
        return false;
    }
    if age_ns > NS_PER_S {
        // SAFETY: as above.
        unsafe { *used = now_ns };
    }
    true
}

#[inline(always)]
fn remember(flow: &FlowKey) {
    // SAFETY: takes nothing, returns a number.
    let now_ns = unsafe { bpf_ktime_get_coarse_ns() };
    // LRU: it is never full.
    let _ = POLICY_FLOWS.insert(flow, &now_ns, 0);
}

/// What the fragments of a packet have in common: its id, in place of the ports.
#[inline(always)]
fn fragments(ctx: &TcContext, packet: &Packet, flow: &FlowKey, outgoing: bool) -> FlowKey {
    let mut id = [0; 4];
    if packet.flags & IS_FRAGMENT != 0 {
        id = if packet.is_v6 {
            // The fragment header ends where the rest begins; behind other headers nothing is found.
            ctx.load(packet.l4_offset as usize - 4).unwrap_or([0; 4])
        } else {
            let [high, low] = packet::read(ctx, IP_OFFSET + 4).unwrap_or([0; 2]);
            [0, 0, high, low]
        };
    }
    FlowKey {
        pod_port_be: u16::from_ne_bytes([id[0], id[1]]),
        peer_port_be: u16::from_ne_bytes([id[2], id[3]]),
        kind: if outgoing {
            FRAGMENTS_OUT
        } else {
            FRAGMENTS_IN
        },
        ..*flow
    }
}

/// Whether the node itself sent this: a packet that came from elsewhere bears the interface by which
/// it came.
#[inline(always)]
pub fn is_from_node(ctx: &TcContext) -> bool {
    // SAFETY: the kernel passes a valid context.
    unsafe { (*ctx.skb.skb).ingress_ifindex == 0 }
}

#[inline(always)]
fn is_discovery(packet: &Packet) -> bool {
    packet.is_v6
        && packet.proto == ICMP_V6
        && packet.flags & (NO_L4 | IS_FRAGMENT) == 0
        && (packet.kind >= DISCOVERY_FIRST && packet.kind <= DISCOVERY_LAST
            || packet.kind == LISTENER_REPORT_V2)
}

#[inline(always)]
fn is_error(packet: &Packet) -> bool {
    if packet.flags & NO_L4 != 0 {
        return false;
    }
    match packet.proto {
        ICMP if !packet.is_v6 => {
            matches!(packet.kind, UNREACHABLE | TIME_EXCEEDED | PARAMETER_PROBLEM)
        }
        ICMP_V6 if packet.is_v6 => packet.kind >= 1 && packet.kind <= V6_ERROR_LAST,
        _ => false,
    }
}

/// Whether this is an ICMP error about something that was allowed. It may come from any router.
#[inline(always)]
fn is_known_error(ctx: &TcContext, packet: &Packet, pod_id: u64, outgoing: bool) -> bool {
    if !is_error(packet) {
        return false;
    }
    let start = (packet.l4_offset + EMBEDDED_OFFSET) as usize;
    let about = if packet.is_v6 {
        embedded_v6(ctx, start)
    } else {
        embedded_v4(ctx, start)
    };
    let Some((source, destination, proto, ports)) = about else {
        return false;
    };
    // What the pod complains of came to it; what it is told of it has sent.
    let (peer, pod_port_be, peer_port_be) = if outgoing {
        (source, ports[1], ports[0])
    } else {
        (destination, ports[0], ports[1])
    };
    let flow = FlowKey {
        pod_id,
        peer,
        pod_port_be,
        peer_port_be,
        proto,
        kind: FLOW,
        _pad: 0,
    };
    is_known(&flow, FLOW_TIMEOUT_S)
}

/// Source, destination, protocol, ports.
type Embedded = (Addr, Addr, u8, [u16; 2]);

#[inline(always)]
fn embedded_v4(ctx: &TcContext, start: usize) -> Option<Embedded> {
    let version_length: u8 = ctx.load(start).ok()?;
    let proto: u8 = ctx.load(start + 9).ok()?;
    let [source, destination] = ctx.load::<[u32; 2]>(start + 12).ok()?;
    let length = usize::from(version_length & 15) * 4;
    if length < V4_LENGTH {
        return None;
    }
    let ports = embedded_ports(ctx, start + length, proto)?;
    Some((v4_mapped(source), v4_mapped(destination), proto, ports))
}

/// Extension headers are not followed: such an error is judged by the rules.
#[inline(always)]
fn embedded_v6(ctx: &TcContext, start: usize) -> Option<Embedded> {
    let proto: u8 = ctx.load(start + 6).ok()?;
    let source: Addr = ctx.load(start + 8).ok()?;
    let destination: Addr = ctx.load(start + 24).ok()?;
    let ports = embedded_ports(ctx, start + V6_LENGTH, proto)?;
    Some((source, destination, proto, ports))
}

#[inline(always)]
fn embedded_ports(ctx: &TcContext, start: usize, proto: u8) -> Option<[u16; 2]> {
    match proto {
        TCP | UDP => ctx.load(start).ok(),
        _ => Some([0; 2]),
    }
}
