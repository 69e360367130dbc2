//! The walk of a packet past the host end of a pod's veth, in both directions.
//!
//! A verdict of `TC_ACT_UNSPEC` is "nothing against it": other programs on the interface run next,
//! then the packet goes on.

use aya_ebpf::bindings::TC_ACT_UNSPEC;
use aya_ebpf::programs::TcContext;
use ebpf_maps::drop;

use crate::drop::drop;
use crate::maps::INTERFACES;
use crate::packet::{Frame, parse};
use crate::{policy, spoof};

/// What the pod sends.
#[inline(always)]
pub fn sent(ctx: &TcContext) -> i32 {
    let frame = parse(ctx);
    let pod_id = match spoof::check(ctx, &frame) {
        Ok(pod_id) => pod_id,
        Err(reason) => return drop(reason),
    };
    let Frame::Ip(packet) = &frame else {
        return TC_ACT_UNSPEC; // ARP
    };
    if !policy::allows_egress(ctx, packet, pod_id) {
        return drop(drop::POLICY);
    }
    TC_ACT_UNSPEC
}

/// What the pod is sent.
#[inline(always)]
pub fn received(ctx: &TcContext) -> i32 {
    let packet = match parse(ctx) {
        Frame::Ip(packet) => packet,
        // The pod's stack might understand it, and policy could not.
        Frame::Malformed => return drop(drop::MALFORMED),
        Frame::Arp | Frame::Other => return TC_ACT_UNSPEC,
    };
    // SAFETY: the kernel passes a valid context.
    let ifindex = unsafe { (*ctx.skb.skb).ifindex };
    let Some(interface) = INTERFACES.get_ptr(&ifindex) else {
        return drop(drop::NO_POD);
    };
    // SAFETY: the pointer is an element of the map, checked by the lookup.
    let pod_id = unsafe { (*interface).pod_id };
    if !policy::allows_ingress(ctx, &packet, pod_id) {
        return drop(drop::POLICY);
    }
    TC_ACT_UNSPEC
}
