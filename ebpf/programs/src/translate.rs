//! Services for packets that no socket hook has translated: of raw sockets, of sockets that are not
//! below the agent's cgroup root, of namespaces and machines nested in the pod.
//!
//! ```text
//!  from a pod   a known flow      ─► becomes what it became before
//!               a frontend        ─► a backend is chosen, the flow begins
//!               without backends  ─► refused at once
//!               to a backend itself, from a port that a flow to it has ─► goes apart: from another port
//!  to a pod     an answer         ─► comes from the frontend again
//!  both ways    an ICMP error     ─► quotes again what its receiver has sent
//! ```
//! A pod that reaches itself does so from a reserved address, because it would refuse a packet that
//! comes from its own. Where two flows would become the same (one source port, two Services, one
//! backend; or a Service and the backend itself), the second gets another source port, which its answers
//! have back.
//!
//! Limits: fragments have no ports, and a frontend's are not translated.

use aya_ebpf::helpers::bpf_get_prandom_u32;
use aya_ebpf::programs::TcContext;
use ebpf_maps::counter;
use ebpf_maps::drop;
use ebpf_maps::flow::{FlowValue, HAIRPIN_V4, HAIRPIN_V6, IS_REPLY, ZONE_APART, ZONE_SERVICE};
use ebpf_maps::services::{AFFINITY_POD, Addr, BackendValue, v4_mapped};

use crate::addr::same;
use crate::drop::{packed, unpacked};
use crate::maps::{FRONTENDS, count};
use crate::packet::{ACK, IS_FRAGMENT, NO_L4, Packet, SYN, TCP, UDP};
use crate::service::{
    READ_ATTEMPTS, choose_any, choose_for, count_chosen, frontend_of, read_frontend, usable,
};
use crate::socket::Peer;
use crate::work::Work;
use crate::{conntrack, event, nat, policy};

/// Source ports that are tried for a flow that would become like another.
const PORT_ATTEMPTS: u32 = 4;
/// The lowest of them; the highest is 65,535.
const PORT_MIN: u32 = 32_768;

/// What became of a packet. One word, for the reason that `drop::packed` has.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Outcome(u32);

impl Outcome {
    /// It is about no Service.
    pub const UNTOUCHED: Self = Self(u32::MAX);
    /// It goes to a backend, or is an answer.
    pub const TRANSLATED: Self = Self(u32::MAX - 1);
    /// Its frontend has no backend.
    pub const REFUSED: Self = Self(u32::MAX - 2);

    /// The reason to drop it, where it is none of these.
    #[inline(always)]
    pub fn reason(self) -> u32 {
        self.0
    }
}

/// A packet that a pod sends to something that is no pod of this node.
#[inline(always)]
pub fn sent(ctx: &TcContext, work: &mut Work, pod_id: u64) -> Outcome {
    // A flow that goes on is what most packets are of; inlined, because calls are what costs.
    if work.packet.flags & (NO_L4 | IS_FRAGMENT) == 0
        && matches!(work.packet.proto, TCP | UDP)
        && conntrack::is_used(ZONE_SERVICE)
        && conntrack::find(work, ZONE_SERVICE)
        && stands(&work.flow, &work.packet)
    {
        conntrack::set_ends(&mut work.becomes, &work.flow.ends, false);
        if work.flow.backend_id != 0 {
            event::note_translated(work);
        }
        return match nat::rewrite_here(ctx, work) {
            Ok(()) => Outcome::TRANSLATED,
            Err(reason) => Outcome(reason),
        };
    }
    sent_anew(ctx, work, pod_id)
}

/// The same of no flow that goes on.
#[inline(never)]
fn sent_anew(ctx: &TcContext, work: &mut Work, pod_id: u64) -> Outcome {
    match sent_here(ctx, work, pod_id) {
        Ok(outcome) => outcome,
        Err(reason) => Outcome(reason),
    }
}

#[inline(always)]
fn sent_here(ctx: &TcContext, work: &mut Work, pod_id: u64) -> Result<Outcome, u32> {
    if work.packet.flags & (NO_L4 | IS_FRAGMENT) != 0 {
        return Ok(Outcome::UNTOUCHED);
    }
    let is_used = conntrack::is_used(ZONE_SERVICE);
    if is_used && nat::is_error(&work.packet) {
        nat::rewrite_error(ctx, work, ZONE_SERVICE)?;
        return Ok(Outcome::TRANSLATED);
    }
    if !matches!(work.packet.proto, TCP | UDP) {
        return Ok(Outcome::UNTOUCHED);
    }
    match choose(&work.packet, pod_id)? {
        Choice::NoFrontend if is_used && begins(&work.packet) && goes_apart(work) => {}
        Choice::NoFrontend => return Ok(Outcome::UNTOUCHED),
        Choice::NoBackend => return Ok(Outcome::REFUSED),
        Choice::Backend(id, backend) => {
            work.flow.backend_id = id;
            work.flow.service_id = backend.service_id;
            set_backend(work, pod_id, backend);
        }
    }
    begin(work)?;
    if work.flow.backend_id != 0 {
        event::note_translated(work);
    }
    nat::rewrite(ctx, work)?;
    Ok(Outcome::TRANSLATED)
}

/// Whether [`sent_past`] has to see a packet, where flows of Services are about.
#[inline(always)]
pub fn may_go_apart(packet: &Packet) -> bool {
    packet.flags & (NO_L4 | IS_FRAGMENT) == 0
        && matches!(packet.proto, TCP | UDP)
        && (begins(packet) || conntrack::is_used(ZONE_APART))
}

/// A packet that a pod sends to another pod of this node, by its own address: past every Service.
#[inline(never)]
pub fn sent_past(ctx: &TcContext, work: &mut Work) -> Outcome {
    match sent_past_here(ctx, work) {
        Ok(outcome) => outcome,
        Err(reason) => Outcome(reason),
    }
}

#[inline(always)]
fn sent_past_here(ctx: &TcContext, work: &mut Work) -> Result<Outcome, u32> {
    if conntrack::find(work, ZONE_SERVICE) {
        // An answer is its receiver's business: see `delivered`.
        if work.flow.flags & IS_REPLY != 0 {
            return Ok(Outcome::UNTOUCHED);
        }
        work.becomes = work.flow.ends;
    } else {
        if !begins(&work.packet) || !goes_apart(work) {
            return Ok(Outcome::UNTOUCHED);
        }
        begin(work)?;
    }
    nat::rewrite(ctx, work)?;
    Ok(Outcome::TRANSLATED)
}

/// A connection past every Service begins. Mostly nothing stands in its way, and it stays as it is; else
/// `work.becomes` is the same from another port.
#[inline(never)]
fn goes_apart(work: &mut Work) -> bool {
    if !conntrack::is_taken(work, ZONE_SERVICE) {
        if conntrack::is_used(ZONE_APART) {
            conntrack::forget(work, ZONE_SERVICE);
        }
        return false;
    }
    work.becomes.source_port_be = any_port();
    work.flow.backend_id = 0;
    work.flow.service_id = 0;
    conntrack::mark_used(ZONE_APART);
    true
}

/// A packet that is put into a pod: the answers of what [`sent`] has translated.
///
/// # Errors
/// A reason to drop it.
#[inline(always)]
pub fn delivered(ctx: &TcContext, work: &mut Work) -> Result<(), u32> {
    unpacked(delivered_packed(ctx, work))
}

#[inline(never)]
fn delivered_packed(ctx: &TcContext, work: &mut Work) -> u32 {
    packed(delivered_here(ctx, work))
}

#[inline(always)]
fn delivered_here(ctx: &TcContext, work: &mut Work) -> Result<(), u32> {
    if work.packet.flags & NO_L4 != 0 {
        return Ok(());
    }
    if nat::is_error(&work.packet) {
        return nat::rewrite_error(ctx, work, ZONE_SERVICE);
    }
    if matches!(work.packet.proto, TCP | UDP)
        && conntrack::find(work, ZONE_SERVICE)
        && work.flow.flags & IS_REPLY != 0
    {
        count(counter::REVERSED);
        work.becomes = work.flow.ends;
        return nat::rewrite(ctx, work);
    }
    Ok(())
}

/// Whether a known flow goes on. TCP does to a backend that has left its Service; what begins anew
/// does not. What has no backend has none to lose.
#[inline(always)]
fn stands(flow: &FlowValue, packet: &Packet) -> bool {
    flow.flags & IS_REPLY != 0
        || flow.backend_id == 0
        || !begins(packet)
        || usable(flow.backend_id, flow.service_id).is_some()
}

/// Whether a connection may begin with this packet: a datagram always begins anew.
#[inline(always)]
fn begins(packet: &Packet) -> bool {
    packet.proto == UDP || packet.kind & (SYN | ACK) == SYN
}

enum Choice {
    NoFrontend,
    NoBackend,
    Backend(u32, &'static BackendValue),
}

#[inline(always)]
fn choose(packet: &Packet, pod_id: u64) -> Result<Choice, u32> {
    let peer = Peer {
        addr: packet.destination,
        port_be: packet.destination_port_be,
        proto: packet.proto,
    };
    let Some((key, mut value)) = frontend_of(&peer) else {
        return Ok(Choice::NoFrontend);
    };
    let mut attempt = 0;
    while attempt < READ_ATTEMPTS {
        attempt += 1;
        if let Some(frontend) = read_frontend(&key, value) {
            if frontend.count == 0 {
                return Ok(Choice::NoBackend);
            }
            let chosen = match frontend.affinity_s {
                0 => choose_any(&frontend),
                timeout_s => choose_for(&frontend, AFFINITY_POD, pod_id, timeout_s),
            };
            if let Some((id, backend)) = chosen {
                return Ok(Choice::Backend(id, backend));
            }
        }
        // Changed under the reader.
        match FRONTENDS.get_ptr(&key) {
            Some(newer) => value = newer,
            None => return Ok(Choice::NoFrontend),
        }
    }
    Err(drop::BROKEN_SLOT)
}

/// What a packet to a frontend becomes.
#[inline(always)]
fn set_backend(work: &mut Work, pod_id: u64, backend: &BackendValue) {
    work.becomes = work.packet.ends();
    work.becomes.destination = backend.addr;
    work.becomes.destination_port_be = backend.port_be;
    if same(&work.packet.source, &backend.addr) {
        work.becomes.source = hairpin(work.packet.is_v6);
    }
    avoid_own(work, pod_id);
}

/// The flow of the packet, which becomes `work.becomes`, from another port where that is another's; to
/// the backend that `work.flow` names.
#[inline(always)]
fn begin(work: &mut Work) -> Result<(), u32> {
    let mut attempt = 0;
    while !conntrack::begin(
        work,
        ZONE_SERVICE,
        work.flow.backend_id,
        work.flow.service_id,
    ) {
        attempt += 1;
        if attempt > PORT_ATTEMPTS {
            return Err(drop::FLOWS_FULL);
        }
        work.becomes.source_port_be = any_port();
    }
    if work.flow.backend_id != 0 {
        count(counter::TRANSLATED);
        count_chosen(work.flow.backend_id);
    }
    Ok(())
}

/// The pod may have a connection to the backend itself from this port, and no flow tells of that: then
/// another port.
#[inline(never)]
fn avoid_own(work: &mut Work, pod_id: u64) -> u32 {
    if work.packet.proto == TCP
        && policy::has_opened(&work.becomes, pod_id)
        && !conntrack::was_own(work, ZONE_SERVICE)
    {
        work.becomes.source_port_be = any_port();
    }
    0
}

#[inline(always)]
fn any_port() -> u16 {
    // SAFETY: takes nothing, returns a number.
    let random = unsafe { bpf_get_prandom_u32() };
    ((PORT_MIN | (random & (PORT_MIN - 1))) as u16).to_be()
}

#[inline(always)]
fn hairpin(is_v6: bool) -> Addr {
    let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = HAIRPIN_V6;
    match is_v6 {
        false => v4_mapped(u32::from_ne_bytes(HAIRPIN_V4)),
        true => [
            u32::from_ne_bytes([a, b, c, d]),
            u32::from_ne_bytes([e, f, g, h]),
            u32::from_ne_bytes([i, j, k, l]),
            u32::from_ne_bytes([m, n, o, p]),
        ],
    }
}
