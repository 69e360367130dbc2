//! The walk of a packet past the host end of a pod's veth, in both directions.
//!
//! ```text
//!  sent      spoof ─► translate ─► policy (out) ─┬► another pod of this node: deliver, put into it at once
//!                        └► refused: the answer  ├► itself, through a Service: put back into it
//!                           is put back into it  └► anybody else: onward, to another machine at once or by
//!                                                  the node's network
//!  received  deliver, and on into the pod
//!  deliver   policy (in) ─► translate the answer back
//! ```
//! A pod with a bandwidth is held to it behind its policy, in both directions.
//!
//! Putting a packet into a pod (`bpf_redirect_peer`) skips the bridge and the node's stack: neither
//! sees it, its TTL stays as on a bridge, and its size was checked by the sender's own interface, which
//! has the MTU of all. `to_pod` does not see it either, so `deliver` is done before.
//!
//! A verdict of `TC_ACT_UNSPEC` is "nothing against it": other programs on the interface run next,
//! then the packet goes on.

use aya_ebpf::bindings::TC_ACT_UNSPEC;
use aya_ebpf::helpers::bpf_redirect_peer;
use aya_ebpf::programs::TcContext;
use ebpf_maps::bandwidth::{INTO_POD, OUT_OF_POD};
use ebpf_maps::drop;
use ebpf_maps::endpoint::{DIRECT, EndpointValue, LIMITED, Mac};
use ebpf_maps::flow::ZONE_SERVICE;

use crate::drop::drop;
use crate::maps::{INTERFACES, endpoint, work};
use crate::packet::{Frame, parse, read, same_mac};
use crate::translate::Outcome;
use crate::work::Work;
use crate::{bandwidth, conntrack, failing, onward, policy, reject, spoof, translate};

/// For this machine's stack, whatever the hardware address said.
pub const PACKET_HOST: u32 = 0;

/// What the pod sends.
#[inline(always)]
pub fn sent(ctx: &TcContext) -> i32 {
    let Some(work) = work() else {
        return drop(drop::MALFORMED);
    };
    let frame = parse(ctx, &mut work.packet);
    if let Err(reason) = spoof::check(ctx, frame, work) {
        return drop(reason);
    }
    let pod_id = work.pod_id;
    if frame != Frame::Ip {
        return TC_ACT_UNSPEC; // ARP
    }
    failing::heard(&work.packet);
    let own = ifindex(ctx);
    let mut to = endpoint(&work.packet.destination);
    if to.is_none() {
        match translate::sent(ctx, work, pod_id) {
            Outcome::UNTOUCHED => {}
            Outcome::TRANSLATED => to = endpoint(&work.packet.destination),
            Outcome::REFUSED => return refuse(ctx, work, own),
            dropped => return drop(dropped.reason()),
        }
        if let Some(itself) = to
            && itself.ifindex == own
        {
            return put_into(ctx, itself);
        }
    } else if conntrack::is_used(ZONE_SERVICE) && translate::may_go_apart(&work.packet) {
        match translate::sent_past(ctx, work) {
            Outcome::UNTOUCHED | Outcome::TRANSLATED => {}
            dropped => return drop(dropped.reason()),
        }
    }
    if !policy::allows_egress(ctx, &work.packet, pod_id) {
        work.notes.at_ingress = false;
        return drop(drop::POLICY);
    }
    if work.pod_flags & LIMITED != 0 && !bandwidth::allows(ctx, pod_id, OUT_OF_POD) {
        return drop(drop::BANDWIDTH);
    }
    let Some(to) = to else {
        failing::leaving(ctx, &work.packet);
        return onward::leave(ctx, work);
    };
    if to.flags & DIRECT == 0 || to.ifindex == own {
        return TC_ACT_UNSPEC;
    }
    match deliver(ctx, work, to.pod_id, to.flags) {
        Ok(()) => {
            failing::leaving(ctx, &work.packet);
            put_into(ctx, to)
        }
        Err(reason) => drop(reason),
    }
}

/// What the pod is sent.
#[inline(always)]
pub fn received(ctx: &TcContext) -> i32 {
    let Some(work) = work() else {
        return drop(drop::MALFORMED);
    };
    match parse(ctx, &mut work.packet) {
        Frame::Ip => {}
        // The pod's stack might understand it, and policy could not.
        Frame::Malformed => return drop(drop::MALFORMED),
        Frame::Arp | Frame::Other => return TC_ACT_UNSPEC,
    }
    let Some(interface) = INTERFACES.get_ptr(&ifindex(ctx)) else {
        return drop(drop::NO_POD);
    };
    // SAFETY: the pointer is an element of the map, checked by the lookup.
    let (pod_id, flags) = unsafe { ((*interface).pod_id, (*interface).flags) };
    failing::heard(&work.packet);
    match deliver(ctx, work, pod_id, flags) {
        Ok(()) => {
            if policy::is_from_node(ctx) {
                failing::leaving(ctx, &work.packet);
            }
            TC_ACT_UNSPEC
        }
        Err(reason) => drop(reason),
    }
}

/// What is done to every packet that reaches a pod, whichever way.
#[inline(always)]
pub fn deliver(ctx: &TcContext, work: &mut Work, pod_id: u64, flags: u32) -> Result<(), u32> {
    if !policy::allows_ingress(ctx, &work.packet, pod_id) {
        work.notes.at_ingress = true;
        return Err(drop::POLICY);
    }
    if flags & LIMITED != 0 && !bandwidth::allows(ctx, pod_id, INTO_POD) {
        return Err(drop::BANDWIDTH);
    }
    failing::delivered(ctx, &work.packet, pod_id);
    if conntrack::is_used(ZONE_SERVICE) {
        return translate::delivered(ctx, work);
    }
    Ok(())
}

/// Its frontend has no backend: it is told so at once.
#[inline(always)]
fn refuse(ctx: &TcContext, work: &Work, own: u32) -> i32 {
    let dropped = drop(drop::NO_BACKEND);
    match reject::answer(ctx, &work.packet) {
        true => redirect(ctx, own),
        false => dropped,
    }
}

/// Puts the packet into a pod, past everything on the way.
#[inline(always)]
pub fn put_into(ctx: &TcContext, to: &EndpointValue) -> i32 {
    // Addressed to the gateway until a Service was translated, or by a routed wiring.
    if read::<Mac>(ctx, 0).is_none_or(|mac| !same_mac(&mac, &to.pod_mac))
        && ctx.store(0, &[to.pod_mac, to.gateway_mac], 0).is_err()
    {
        return drop(drop::MALFORMED);
    }
    redirect(ctx, to.ifindex)
}

#[inline(always)]
fn redirect(ctx: &TcContext, ifindex: u32) -> i32 {
    // Kernels before 6.15 leave it as the host end saw it: a frame for somebody else.
    let _ = ctx.change_type(PACKET_HOST);
    // SAFETY: any index is a valid argument.
    unsafe { bpf_redirect_peer(ifindex, 0) as i32 }
}

#[inline(always)]
fn ifindex(ctx: &TcContext) -> u32 {
    // SAFETY: the kernel passes a valid context.
    unsafe { (*ctx.skb.skb).ifindex }
}
