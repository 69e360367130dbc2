//! Direct server return: what a client outside has sent to this node goes on, as it is, to the node that
//! has the backend. That node makes the same choice (every node does, see `outside`), translates it to
//! its own pod, and answers the client from the frontend: the client's address is seen there, and the
//! answers do not come back this way.
//!
//! ```text
//!  client ─► this node ─► the backend's node ─► pod
//!     ▲      hardware address, hops  │ becomes the pod's
//!     └──────────────────────────────┘ from the frontend
//! ```
//! Only where the way to the backend leads by an uplink to a next hop, which is its node: nodes of one
//! link. By any other way (a tunnel) the flow is one of those that leave from this node's own address.
//!
//! This node never sees an answer, so the flow is known as long as its client speaks. A choice that two
//! nodes make differently, because one has not heard of a change yet, sends a packet on until its hops
//! are used up, and the client sends it again.

use core::ffi::c_void;

use aya_ebpf::bindings::{bpf_fib_lookup as FibLookup, bpf_redir_neigh as NextHop};
use aya_ebpf::helpers::bpf_redirect_neigh;
use aya_ebpf::programs::TcContext;
use ebpf_maps::drop;
use ebpf_maps::flow::{DIRECT_RETURN, Ends, REPLIED, ZONE_OUTSIDE};
use ebpf_maps::services::Addr;

use crate::addr::same;
use crate::conntrack;
use crate::drop::drop;
use crate::maps::{FLOWS, UPLINKS};
use crate::outside::{AF_INET, AF_INET6, Hook, age, is_found};
use crate::work::Work;

/// Where packets that become `ends` go.
#[repr(C)]
struct Way {
    ifindex: u32,
    hop: Addr,
}

/// Whether what becomes `work.becomes` can go on as it is.
#[inline(always)]
pub fn can(hook: Hook, work: &Work) -> bool {
    can_from(hook.ctx, hook.ifindex, work)
}

#[inline(never)]
fn can_from(ctx: *mut c_void, ifindex: u32, work: &Work) -> bool {
    let mut way = Way {
        ifindex: 0,
        hop: [0; 4],
    };
    let hook = Hook { ctx, ifindex };
    find(hook, work.packet.is_v6, &work.becomes, &mut way)
}

/// Marks the flow of the packet, which has just begun.
#[inline(always)]
pub fn mark(work: &Work) {
    if let Some(flow) = FLOWS.get_ptr_mut(&work.key) {
        // SAFETY: the lookup checked the pointer. No answer will be seen, so that it counts as answered.
        unsafe { (*flow).flags |= DIRECT_RETURN | REPLIED }
    }
}

/// Sends the packet on as it is, to the node of `work.becomes`.
#[inline(never)]
pub fn send(ctx: &TcContext, work: &mut Work) -> i32 {
    let mut way = Way {
        ifindex: 0,
        hop: [0; 4],
    };
    if !find(Hook::of(ctx), work.packet.is_v6, &work.becomes, &mut way) {
        // The way is another than it was: who sends again begins anew, and leaves from this node's address.
        conntrack::forget(work, ZONE_OUTSIDE);
        return drop(drop::NO_SOURCE);
    }
    if let Err(reason) = age(ctx, work.packet.is_v6) {
        return drop(reason);
    }
    to_neighbour(way.ifindex, work.packet.is_v6, &way.hop)
}

/// Sends the packet by an interface, to a host of its link.
#[inline(always)]
pub fn to_neighbour(ifindex: u32, is_v6: bool, addr: &Addr) -> i32 {
    // SAFETY: made of integers, for which zero is a value.
    let mut hop: NextHop = unsafe { core::mem::zeroed() };
    if is_v6 {
        hop.nh_family = AF_INET6.into();
        hop.__bindgen_anon_1.ipv6_nh = *addr;
    } else {
        hop.nh_family = AF_INET.into();
        hop.__bindgen_anon_1.ipv4_nh = addr[3];
    }
    let size = core::mem::size_of::<NextHop>() as i32;
    // SAFETY: any index is a valid argument; the helper reads the next hop that it is given.
    unsafe { bpf_redirect_neigh(ifindex, &raw mut hop, size, 0) as i32 }
}

/// False: not by an uplink, or nobody stands between.
#[inline(always)]
fn find(hook: Hook, is_v6: bool, ends: &Ends, way: &mut Way) -> bool {
    // SAFETY: made of integers, for which zero is a value.
    let mut lookup: FibLookup = unsafe { core::mem::zeroed() };
    let found = hook.look_up(is_v6, &ends.source, &ends.destination, 0, &mut lookup);
    if !is_found(found) || UPLINKS.get_ptr(&lookup.ifindex).is_none() {
        return false;
    }
    way.ifindex = lookup.ifindex;
    way.hop = next_hop(&lookup, is_v6, &ends.destination);
    !same(&way.hop, &ends.destination)
}

/// Who stands between this node and the destination; the destination itself, if nobody does.
#[inline(always)]
pub fn next_hop(found: &FibLookup, is_v6: bool, destination: &Addr) -> Addr {
    // SAFETY: the helper has written the next hop in the place of the destination, of the same family.
    unsafe {
        match is_v6 {
            true => found.__bindgen_anon_4.ipv6_dst,
            false => [0, 0, destination[2], found.__bindgen_anon_4.ipv4_dst],
        }
    }
}
