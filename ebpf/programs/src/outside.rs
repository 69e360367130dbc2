//! Services for clients outside of the nodes: node ports, load balancer and external addresses. And the
//! way of pods to the outside, whose flows are known in the same place: see `masquerade`.
//!
//! ```text
//!  received  a known flow          ─► becomes what it became before
//!            a frontend            ─► source ranges, affinity, the flow's own backend, the flow begins
//!            without backends      ─► refused at once; dropped if other nodes have some
//!            who has an announced address? ─► answered
//!  then      backend on this node  ─► into the pod, or by the node's network: see `onward`; its answer is
//!                                     translated as it leaves
//!            backend elsewhere     ─► leaves from the node's own address, for the answer to come back;
//!                                     or as it is, to the backend's node: see `direct`
//!  sent      an answer of this node's backends ─► comes from the frontend again
//!            of a pod, to the outside          ─► leaves from the node's own address
//! ```
//! The client's address stays what it is for backends of this node, so policy and logs see it. What
//! would be sent on with a source of the node's own is put on its way here (`bpf_redirect_neigh`):
//! the stack refuses such packets from outside, as forged.
//!
//! The choice depends on the flow alone: every node makes the same, and a node that has forgotten a
//! flow, or gets it in the middle, goes on with it (see the agent's `services::maglev`).
//!
//! Fragments have no ports but in the first, which the others follow: one that comes before it goes on
//! as it is, to nobody, or is dropped where it would show a pod's address.

use core::ffi::c_void;

use aya_ebpf::bindings::{TC_ACT_UNSPEC, bpf_fib_lookup as FibLookup};
use aya_ebpf::helpers::{bpf_fib_lookup, bpf_redirect, bpf_redirect_neigh};
use aya_ebpf::maps::lpm_trie::Key;
use aya_ebpf::programs::TcContext;
use ebpf_maps::endpoint::Mac;
use ebpf_maps::flow::{DIRECT_RETURN, Ends, FlowValue, IS_REPLY, ZONE_OUTSIDE};
use ebpf_maps::services::{
    AFFINITY_ADDRESS, Addr, FRONTEND_DIRECT_RETURN, FRONTEND_DROP, FRONTEND_RESTRICTED,
    FRONTEND_TABLE, FrontendKey, FrontendValue, RENDEZVOUS_COUNT_MAX, SCOPE_OUTSIDE_ADDRESS,
    SCOPE_OUTSIDE_NODE_PORT, SOURCE_RANGE_BITS, SourceRangeKey, flow_hash, mix, v4_mapped, weight,
};
use ebpf_maps::uplink::NODE_OWN;
use ebpf_maps::{counter, drop};

use crate::addr::same;
use crate::checksum::mended;
use crate::drop::{drop, packed, unpacked};
use crate::maps::{
    BACKENDS, FRONTENDS, NODE_ADDRESSES, SOURCE_RANGES, UPLINKS, count, endpoint, work,
};
use crate::packet::{
    ACK, Context, Frame, ICMP_V6, IP_OFFSET, IS_FRAGMENT, NO_L4, Packet, SYN, TCP, UDP, parse, read,
};
use crate::service::{
    Client, Frontend, READ_ATTEMPTS, backend_at, count_chosen, read_frontend, takes_more, usable,
};
use crate::work::Work;
use crate::{announce, conntrack, direct, event, failing, masquerade, nat, onward, policy, reject};

pub const AF_INET: u8 = 2;
pub const AF_INET6: u8 = 10;
/// Answers of `bpf_fib_lookup`: BPF_FIB_LKUP_RET_{SUCCESS,NO_NEIGH,FRAG_NEEDED}.
pub const FIB_SUCCESS: i64 = 0;
const FIB_NO_NEIGHBOUR: i64 = 7;
const FIB_TOO_LARGE: i64 = 8;

/// `skb->pkt_type`: sent to somebody else.
const PACKET_OTHERHOST: u32 = 3;

/// Slots of a table that are tried for a backend that takes more.
const TABLE_ATTEMPTS: u32 = 4;

/// Answers of [`choose`] that are no id of a backend.
pub const NO_FRONTEND: u32 = u32::MAX;
pub const NO_BACKEND: u32 = u32::MAX - 1;
pub const NO_BACKEND_HERE: u32 = u32::MAX - 2;
pub const NOT_ADMITTED: u32 = u32::MAX - 3;

/// What became of a packet. One word, for the reason that `drop::packed` has.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Outcome(u32);

impl Outcome {
    /// It is about no Service.
    const UNTOUCHED: Self = Self(u32::MAX);
    /// It is to go on with what it has become.
    const TRANSLATED: Self = Self(u32::MAX - 1);
    /// Its frontend has no backend.
    const REFUSED: Self = Self(u32::MAX - 2);
    /// It is to go on as it is, to the node of its backend.
    const DIRECT: Self = Self(u32::MAX - 3);
}

/// What comes in by an uplink.
#[inline(always)]
pub fn received(ctx: &TcContext) -> i32 {
    let Some(work) = work() else {
        return drop(drop::MALFORMED);
    };
    match parse(ctx, &mut work.packet) {
        Frame::Ip => {}
        Frame::Arp => return announce::answer(ctx),
        Frame::Other | Frame::Malformed => return TC_ACT_UNSPEC,
    }
    failing::heard(&work.packet);
    if work.packet.proto == ICMP_V6 && work.packet.kind == announce::SOLICITATION {
        return announce::advertise(ctx, &work.packet);
    }
    match translate(ctx, work) {
        Outcome::UNTOUCHED => onward::arrive(ctx, work),
        Outcome::TRANSLATED => send_on(ctx, work),
        Outcome::REFUSED => refuse(ctx, work),
        Outcome::DIRECT => direct::send(ctx, work),
        Outcome(reason) => drop(reason),
    }
}

/// What goes out by an uplink.
#[inline(always)]
pub fn sent(ctx: &TcContext) -> i32 {
    if !conntrack::is_used(ZONE_OUTSIDE) && !masquerade::is_used() {
        return TC_ACT_UNSPEC;
    }
    let Some(work) = work() else {
        return drop(drop::MALFORMED);
    };
    if parse(ctx, &mut work.packet) != Frame::Ip {
        return TC_ACT_UNSPEC;
    }
    if policy::is_from_node(ctx) {
        failing::leaving(ctx, &work.packet);
    }
    match unpacked(restore(ctx, work)) {
        Ok(()) => TC_ACT_UNSPEC,
        Err(reason) => drop(reason),
    }
}

/// An answer of a backend of this node comes from the frontend again; what a pod sends, from the node.
#[inline(never)]
fn restore(ctx: &TcContext, work: &mut Work) -> u32 {
    packed(restore_here(ctx, work))
}

#[inline(always)]
fn restore_here(ctx: &TcContext, work: &mut Work) -> Result<(), u32> {
    if work.packet.flags & NO_L4 != 0 {
        if work.packet.flags & IS_FRAGMENT == 0 {
            return Ok(());
        }
        if masquerade::find_fragments(ctx, work) {
            // What goes on as it is does so here too.
            return match work.flow.flags & DIRECT_RETURN {
                0 => nat::rewrite(ctx, work),
                _ => Ok(()),
            };
        }
    } else if nat::is_error(&work.packet) {
        return nat::rewrite_error(ctx, work, ZONE_OUTSIDE);
    } else if conntrack::find(work, ZONE_OUTSIDE) {
        // A client's own packets to a frontend do not leave as they came.
        if work.flow.flags & IS_REPLY == 0 && work.flow.backend_id != 0 {
            return Ok(());
        }
        if work.flow.backend_id != 0 {
            count(counter::REVERSED);
        }
        work.becomes = work.flow.ends;
        masquerade::remember_fragments(ctx, work);
        return nat::rewrite(ctx, work);
    }
    match masquerade::is_used() {
        true => masquerade::leave(ctx, work),
        false => Ok(()),
    }
}

#[inline(never)]
fn translate(ctx: &TcContext, work: &mut Work) -> Outcome {
    match translate_here(ctx, work) {
        Ok(outcome) => outcome,
        Err(reason) => Outcome(reason),
    }
}

#[inline(always)]
fn translate_here(ctx: &TcContext, work: &mut Work) -> Result<Outcome, u32> {
    let is_used = conntrack::is_used(ZONE_OUTSIDE);
    if work.packet.flags & NO_L4 != 0 {
        let is_fragment = work.packet.flags & IS_FRAGMENT != 0;
        if !is_used || !is_fragment || !masquerade::find_fragments(ctx, work) {
            return Ok(Outcome::UNTOUCHED);
        }
        if work.flow.flags & DIRECT_RETURN != 0 {
            return Ok(Outcome::DIRECT);
        }
        nat::rewrite(ctx, work)?;
        return Ok(Outcome::TRANSLATED);
    }
    if is_used && nat::is_error(&work.packet) {
        let before = work.packet.destination;
        nat::rewrite_error(ctx, work, ZONE_OUTSIDE)?;
        let is_other = same(&before, &work.packet.destination);
        return Ok(if is_other {
            Outcome::UNTOUCHED
        } else {
            Outcome::TRANSLATED
        });
    }
    let is_known = is_used && conntrack::find(work, ZONE_OUTSIDE);
    if is_known && work.flow.flags & IS_REPLY == 0 && work.flow.backend_id == 0 {
        return Ok(Outcome::UNTOUCHED);
    }
    if is_known && stands(&work.flow, &work.packet) {
        work.becomes = work.flow.ends;
    } else {
        let chosen = match work.packet.proto {
            // A pod's own address is no frontend; to look for it costs no call.
            TCP | UDP if endpoint(&work.packet.destination).is_none() => choose(work),
            _ => NO_FRONTEND,
        };
        if chosen != NO_FRONTEND && is_for_another(ctx) {
            return Ok(Outcome::UNTOUCHED);
        }
        match chosen {
            NO_FRONTEND => {
                if masquerade::is_used() {
                    masquerade::arrive(work);
                }
                return Ok(Outcome::UNTOUCHED);
            }
            NO_BACKEND => return Ok(Outcome::REFUSED),
            NO_BACKEND_HERE => return Err(drop::NO_BACKEND_HERE),
            NOT_ADMITTED => return Err(drop::SOURCE_RANGE),
            id => begin(Hook::of(ctx), work, id)?,
        }
    }
    masquerade::remember_fragments(ctx, work);
    if work.flow.flags & DIRECT_RETURN != 0 {
        return Ok(Outcome::DIRECT);
    }
    event::note_translated(work);
    nat::rewrite(ctx, work)?;
    Ok(Outcome::TRANSLATED)
}

/// Whether it was sent to another host of the link: an address that a bridge does not know goes to all.
#[inline(always)]
fn is_for_another(ctx: &TcContext) -> bool {
    // SAFETY: the kernel passes a valid context.
    let kind = unsafe { (*ctx.skb.skb).pkt_type };
    kind == PACKET_OTHERHOST && !is_to(ctx, ifindex(ctx))
}

/// Whether a frame is for the hardware address of this uplink.
#[inline(always)]
pub fn is_to(ctx: &impl Context, ifindex: u32) -> bool {
    let (Some(uplink), Some(to)) = (UPLINKS.get_ptr(&ifindex), read::<Mac>(ctx, 0)) else {
        return false;
    };
    // SAFETY: the pointer is an element of the map, checked by the lookup.
    same_mac(&to, unsafe { &(*uplink).mac })
}

/// Whether a known flow goes on: see `translate::stands`.
#[inline(always)]
pub fn stands(flow: &FlowValue, packet: &Packet) -> bool {
    let begins = packet.proto == UDP || packet.kind & (SYN | ACK) == SYN;
    flow.flags & IS_REPLY != 0 || !begins || usable(flow.backend_id, flow.service_id).is_some()
}

/// The backend of a packet to a frontend, by its id; else one of the numbers above what ids are.
///
/// One number comes back, so that the verifier goes on once, however the choice was made.
#[inline(never)]
pub fn choose(work: &mut Work) -> u32 {
    let packet = &work.packet;
    let Some((key, mut value)) = frontend_of(packet) else {
        return NO_FRONTEND;
    };
    let mut attempt = 0;
    while attempt < READ_ATTEMPTS {
        attempt += 1;
        if let Some(frontend) = read_frontend(&key, value) {
            // A port of another node is answered for where that has sent it on.
            let is_ours = key.scope != SCOPE_OUTSIDE_NODE_PORT
                || frontend.flags & FRONTEND_DIRECT_RETURN != 0
                || is_own(&packet.destination);
            if !is_ours {
                return NO_FRONTEND;
            }
            work.frontend_flags = frontend.flags;
            if !admits(&frontend, &packet.source) {
                return NOT_ADMITTED;
            }
            if frontend.count == 0 && frontend.flags & FRONTEND_DROP != 0 {
                return NO_BACKEND_HERE;
            }
            if frontend.count == 0 {
                return NO_BACKEND;
            }
            let id = choose_from(&frontend, packet);
            if id != 0 {
                return id;
            }
        }
        // Changed under the reader.
        match FRONTENDS.get_ptr(&key) {
            Some(newer) => value = newer,
            None => return NO_FRONTEND,
        }
    }
    0
}

/// The frontend for the outside that a packet is addressed to.
#[inline(always)]
fn frontend_of(packet: &Packet) -> Option<(FrontendKey, *const FrontendValue)> {
    let key = FrontendKey {
        addr: packet.destination,
        port_be: packet.destination_port_be,
        proto: packet.proto,
        scope: SCOPE_OUTSIDE_ADDRESS,
    };
    if let Some(value) = FRONTENDS.get_ptr(&key) {
        return Some((key, value));
    }
    NODE_ADDRESSES.get_ptr(&packet.destination)?;
    let key = FrontendKey {
        addr: if packet.is_v6 { [0; 4] } else { v4_mapped(0) },
        scope: SCOPE_OUTSIDE_NODE_PORT,
        ..key
    };
    let value = FRONTENDS.get_ptr(&key)?;
    Some((key, value))
}

#[inline(always)]
fn is_own(addr: &Addr) -> bool {
    match NODE_ADDRESSES.get_ptr(addr) {
        // SAFETY: the pointer is an element of the map, checked by the lookup.
        Some(owner) => unsafe { *owner == NODE_OWN },
        None => false,
    }
}

#[inline(always)]
fn admits(frontend: &Frontend, client: &Addr) -> bool {
    if frontend.flags & FRONTEND_RESTRICTED == 0 {
        return true;
    }
    let data = SourceRangeKey {
        service_id: frontend.service_id,
        addr: *client,
    };
    SOURCE_RANGES
        .get(&Key::new(SOURCE_RANGE_BITS + 128, data))
        .is_some()
}

/// The backend that the client had, with affinity, else the flow's own; 0: a slot is broken.
#[inline(always)]
fn choose_from(frontend: &Frontend, packet: &Packet) -> u32 {
    if frontend.affinity_s == 0 {
        return of_flow(frontend, hash_of(packet));
    }
    let [a, b, c, d] = packet.source;
    // An IPv4 address is its own number.
    let high = if packet.is_v6 {
        mix(a ^ mix(b ^ mix(c)))
    } else {
        0
    };
    let client = (u64::from(high) << 32) | u64::from(d);
    // Without a memory of the client all of its flows still agree, and so do the nodes.
    let flow = mix(high ^ d);
    let kind = AFFINITY_ADDRESS;
    let client = Client::of(frontend, kind, client);
    if let Some((id, _)) = client.backend(frontend.affinity_s) {
        return id;
    }
    let id = of_flow(frontend, flow);
    if id == 0 {
        return 0;
    }
    client.keep(id);
    id
}

#[inline(always)]
pub fn hash_of(packet: &Packet) -> u32 {
    flow_hash(
        &packet.source,
        packet.source_port_be,
        &packet.destination,
        packet.destination_port_be,
        packet.proto,
    )
}

/// The backend of a flow: by the table, else the heaviest of the list; 0: a slot is broken.
#[inline(always)]
fn of_flow(frontend: &Frontend, flow: u32) -> u32 {
    let is_table = frontend.flags & FRONTEND_TABLE != 0;
    backend_of_flow(
        frontend.base,
        frontend.count,
        frontend.service_id,
        u32::from(is_table),
        flow,
    )
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn backend_of_flow(
    base: u32,
    count: u32,
    service_id: u32,
    is_table: u32,
    flow: u32,
) -> u32 {
    if is_table != 0 || count > RENDEZVOUS_COUNT_MAX {
        // Neighbours in a table are mostly of different backends.
        let mut step = 0;
        let mut on_trial = 0;
        while step < TABLE_ATTEMPTS {
            let index = flow.wrapping_add(step).checked_rem(count).unwrap_or(0);
            let own = weighed(base.wrapping_add(index), service_id, flow);
            if own >> 32 != 0 {
                return own as u32;
            }
            if on_trial == 0 {
                on_trial = own as u32;
            }
            step += 1;
        }
        return on_trial;
    }
    let mut heaviest = 0;
    let mut index = 0;
    while index < RENDEZVOUS_COUNT_MAX {
        if index >= count {
            break;
        }
        let own = weighed(base.wrapping_add(index), service_id, flow);
        if own > heaviest {
            heaviest = own;
        }
        index += 1;
    }
    heaviest as u32
}

/// The weight of the backend in a slot in the upper half, its id in the lower; 0: it belongs to another
/// Service by now. One that is on trial and takes no more has no weight: it is for those who find nobody
/// else.
// Verified by itself, see `main`: it is called for every slot.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn weighed(slot: u32, service_id: u32, flow: u32) -> u64 {
    match backend_at(slot, service_id) {
        Some((id, backend)) if takes_more(id, backend) => {
            (u64::from(weight(flow, backend.hash) | 1) << 32) | u64::from(id)
        }
        Some((id, _)) => u64::from(id),
        None => 0,
    }
}

/// Makes the flow known, and `work.becomes` what its packets become.
#[inline(always)]
pub fn begin(hook: Hook, work: &mut Work, backend_id: u32) -> Result<(), u32> {
    let Some(backend) = BACKENDS.get(backend_id).filter(|_| backend_id != 0) else {
        return Err(drop::BROKEN_SLOT);
    };
    work.becomes = work.packet.ends();
    work.becomes.destination = backend.addr;
    work.becomes.destination_port_be = backend.port_be;
    let (zone, service_id) = (ZONE_OUTSIDE, backend.service_id);
    count(counter::TRANSLATED);
    count_chosen(backend_id);
    let Some(uplink) = UPLINKS.get_ptr(&route(hook, work.packet.is_v6, &work.becomes)) else {
        let has_begun = conntrack::begin(work, zone, backend_id, service_id);
        return has_begun.then_some(()).ok_or(drop::FLOWS_FULL);
    };
    if work.frontend_flags & FRONTEND_DIRECT_RETURN != 0 && direct::can(hook, work) {
        if !conntrack::begin(work, zone, backend_id, service_id) {
            return Err(drop::FLOWS_FULL);
        }
        direct::mark(work);
        work.flow.flags |= DIRECT_RETURN;
        return Ok(());
    }
    // SAFETY: the pointer is an element of the map, checked by the lookup.
    let own = unsafe {
        if work.packet.is_v6 {
            (*uplink).v6
        } else {
            (*uplink).v4
        }
    };
    if same(&own, &[0; 4]) {
        return Err(drop::NO_SOURCE);
    }
    work.becomes.source = own;
    let has_begun = masquerade::begin_from_port(work, backend_id, service_id);
    has_begun.then_some(()).ok_or(drop::NO_PORT)
}

/// Nobody serves it: said at once.
#[inline(always)]
fn refuse(ctx: &TcContext, work: &Work) -> i32 {
    let dropped = drop(drop::NO_BACKEND);
    if !reject::answer(ctx, &work.packet) {
        return dropped;
    }
    // SAFETY: any index is a valid argument.
    unsafe { bpf_redirect(ifindex(ctx), 0) as i32 }
}

/// A translated packet goes on: out again at once, or by the node's network.
#[inline(always)]
fn send_on(ctx: &TcContext, work: &mut Work) -> i32 {
    // A pod of this node is reached by no uplink: no route is asked about it.
    if endpoint(&work.packet.destination).is_some() {
        return onward::arrive(ctx, work);
    }
    work.becomes = work.packet.ends();
    let out = route(Hook::of(ctx), work.packet.is_v6, &work.becomes);
    if UPLINKS.get_ptr(&out).is_none() {
        return TC_ACT_UNSPEC;
    }
    match age(ctx, work.packet.is_v6) {
        // SAFETY: any index is a valid argument; without a next hop the helper looks for it.
        Ok(()) => unsafe { bpf_redirect_neigh(out, core::ptr::null_mut(), 0, 0) as i32 },
        Err(reason) => drop(reason),
    }
}

/// One hop further.
#[inline(always)]
pub fn age(ctx: &TcContext, is_v6: bool) -> Result<(), u32> {
    let at = if is_v6 { IP_OFFSET + 7 } else { IP_OFFSET + 8 };
    let Some([hops, proto]) = read::<[u8; 2]>(ctx, at) else {
        return Err(drop::MALFORMED);
    };
    if hops <= 1 {
        return Err(drop::TTL);
    }
    if is_v6 {
        return ctx.store(at, &(hops - 1), 0).map_err(|_| drop::MALFORMED);
    }
    let Some(sum) = read::<u16>(ctx, at + 2) else {
        return Err(drop::MALFORMED);
    };
    let word = |hops: u8| u16::from_ne_bytes([hops, proto]);
    let change = u64::from(!word(hops)) + u64::from(word(hops - 1));
    // In one call: calls are what costs.
    let aged = [word(hops - 1), mended(sum, change)];
    ctx.store(at, &aged, 0).map_err(|_| drop::MALFORMED)
}

/// Where a program runs: its context, of whatever kind, and the interface.
#[derive(Clone, Copy)]
pub struct Hook {
    pub ctx: *mut c_void,
    pub ifindex: u32,
}

impl Hook {
    #[inline(always)]
    pub fn of(ctx: &TcContext) -> Self {
        Self {
            ctx: ctx.skb.skb.cast(),
            ifindex: ifindex(ctx),
        }
    }

    /// Asks the node's routes about such packets; with a length, also whether they are too long.
    #[inline(always)]
    pub fn look_up(
        self,
        is_v6: bool,
        source: &Addr,
        destination: &Addr,
        length: u16,
        lookup: &mut FibLookup,
    ) -> i64 {
        lookup.ifindex = self.ifindex;
        lookup.__bindgen_anon_1.tot_len = length;
        if is_v6 {
            lookup.family = AF_INET6;
            lookup.__bindgen_anon_3.ipv6_src = *source;
            lookup.__bindgen_anon_4.ipv6_dst = *destination;
        } else {
            lookup.family = AF_INET;
            lookup.__bindgen_anon_3.ipv4_src = source[3];
            lookup.__bindgen_anon_4.ipv4_dst = destination[3];
        }
        let size = core::mem::size_of::<FibLookup>() as i32;
        // SAFETY: the helper takes this hook's context and fills the structure that it is given.
        unsafe { bpf_fib_lookup(self.ctx, core::ptr::from_mut(lookup), size, 0) }
    }
}

/// The interface that the node's routes name for such packets; 0: an own address, or no route.
#[inline(always)]
fn route(hook: Hook, is_v6: bool, ends: &Ends) -> u32 {
    route_from(hook.ctx, hook.ifindex, is_v6, ends)
}

#[inline(never)]
fn route_from(ctx: *mut c_void, ifindex: u32, is_v6: bool, ends: &Ends) -> u32 {
    // SAFETY: made of integers, for which zero is a value.
    let mut lookup: FibLookup = unsafe { core::mem::zeroed() };
    let hook = Hook { ctx, ifindex };
    let found = hook.look_up(is_v6, &ends.source, &ends.destination, 0, &mut lookup);
    match is_found(found) {
        true => lookup.ifindex,
        false => 0,
    }
}

/// Whether there is a route.
#[inline(always)]
pub fn is_found(answer: i64) -> bool {
    matches!(answer, FIB_SUCCESS | FIB_NO_NEIGHBOUR | FIB_TOO_LARGE)
}

#[inline(always)]
pub fn ifindex(ctx: &TcContext) -> u32 {
    // SAFETY: the kernel passes a valid context.
    unsafe { (*ctx.skb.skb).ifindex }
}

/// Equality without a call to memcmp.
#[inline(always)]
pub fn same_mac(a: &Mac, b: &Mac) -> bool {
    a[0] == b[0] && a[1] == b[1] && a[2] == b[2] && a[3] == b[3] && a[4] == b[4] && a[5] == b[5]
}
