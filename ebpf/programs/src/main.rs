//! The eBPF programs: one entry point per hook, and nothing decided here.
//!
//! ```text
//!  connect(), sendmsg()      ──► service::translate ──► a backend's address, or refused
//!  recvmsg(), getpeername()  ──► reverse::restore   ──► the frontend's address again
//!  close()                   ──► reverse::forget
//!  a SYN goes, or is answered ─► failing           ──► who answers nobody, for the agent
//!  open(), mknod()           ──► device::is_allowed
//!  packet out of a pod       ──► pod::sent     ──► spoof ──► translate ──► policy ─┬► the node's network
//!                                                                                ├► onward ─► another machine
//!                                                                                └► pod::deliver
//!  packet into a pod         ──► pod::received ──► pod::deliver ──► policy ──► translate ──► the pod
//!  packet from outside       ──► outside ──► onward ─► pod::deliver, or the node's network
//!  packet to the outside     ──► outside
//! ```
//! The service hooks attach to the root of cgroup v2, so they see every pod and the node's own
//! processes; a Service costs once per connection and nothing per packet. The packet hooks attach
//! to the host end of each pod's veth.
//!
//! Functions that are called where many things may have happened before, in loops above all, are exported
//! (`no_mangle`): the verifier walks such a one by itself, once, with arguments of which it knows the type and
//! nothing else, and takes each call for a step. All others it walks anew at each call, with whatever is known
//! there. Their arguments are numbers, the context, and pointers to structures of a known size; their answer is
//! a number. What they get by a pointer is no map's element any more: see `maps::work_of`.
//!
//! Invariants: no program writes FRONTENDS, SLOTS, BACKENDS, ENDPOINTS or INTERFACES; none can
//! reach a panic (a program that can is refused by the verifier); what is no frontend passes the
//! service hooks untouched; a packet is never dropped without a reason that is counted.
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]

mod addr;
mod announce;
mod bandwidth;
mod checksum;
mod conntrack;
mod device;
mod direct;
mod drop;
mod event;
mod failing;
mod maps;
mod masquerade;
mod nat;
mod onward;
mod outside;
mod packet;
mod pod;
mod policy;
mod reject;
mod reverse;
mod service;
mod socket;
mod spoof;
mod translate;
mod way;
mod work;
mod xdp;

use aya_ebpf::macros::{cgroup_device, cgroup_sock, cgroup_sock_addr, classifier, xdp};
use aya_ebpf::programs::{DeviceContext, SockAddrContext, SockContext, TcContext, XdpContext};
use ebpf_maps::event::{POINT_FROM_OUTSIDE, POINT_FROM_POD, POINT_TO_OUTSIDE, POINT_TO_POD};

use crate::service::Call;

/// What a hook returns for "go on" and "refuse".
const PASS: i32 = 1;
const REFUSE: i32 = 0;

/// The kernel lends some helpers (`bpf_ktime_get_coarse_ns` among them in some versions) only to
/// programs under a GPL-compatible licence; this is its spelling of one.
#[unsafe(no_mangle)]
#[unsafe(link_section = "license")]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[cgroup_sock_addr(connect4)]
pub fn connect4(ctx: SockAddrContext) -> i32 {
    service::forward(
        &ctx,
        socket::peer_v4(&ctx),
        Call::Connect,
        socket::set_peer_v4,
    )
}

#[cgroup_sock_addr(connect6)]
pub fn connect6(ctx: SockAddrContext) -> i32 {
    service::forward(
        &ctx,
        socket::peer_v6(&ctx),
        Call::Connect,
        socket::set_peer_v6,
    )
}

#[cgroup_sock_addr(sendmsg4)]
pub fn sendmsg4(ctx: SockAddrContext) -> i32 {
    service::forward(&ctx, socket::peer_v4(&ctx), Call::Send, socket::set_peer_v4)
}

#[cgroup_sock_addr(sendmsg6)]
pub fn sendmsg6(ctx: SockAddrContext) -> i32 {
    service::forward(&ctx, socket::peer_v6(&ctx), Call::Send, socket::set_peer_v6)
}

#[cgroup_sock_addr(recvmsg4)]
pub fn recvmsg4(ctx: SockAddrContext) -> i32 {
    reverse::restore(&ctx, socket::peer_v4(&ctx), socket::set_peer_v4)
}

#[cgroup_sock_addr(recvmsg6)]
pub fn recvmsg6(ctx: SockAddrContext) -> i32 {
    reverse::restore(&ctx, socket::peer_v6(&ctx), socket::set_peer_v6)
}

#[cgroup_sock_addr(getpeername4)]
pub fn getpeername4(ctx: SockAddrContext) -> i32 {
    reverse::restore(&ctx, socket::peer_v4(&ctx), socket::set_peer_v4)
}

#[cgroup_sock_addr(getpeername6)]
pub fn getpeername6(ctx: SockAddrContext) -> i32 {
    reverse::restore(&ctx, socket::peer_v6(&ctx), socket::set_peer_v6)
}

#[cgroup_sock(sock_release)]
pub fn sock_release(ctx: SockContext) -> i32 {
    reverse::forget(&ctx);
    PASS
}

#[cgroup_device]
pub fn device_guard(ctx: DeviceContext) -> i32 {
    if device::is_allowed(&ctx) {
        PASS
    } else {
        REFUSE
    }
}

/// At the ingress of the host end of a pod's veth: what the pod sends.
#[classifier]
pub fn from_pod(ctx: TcContext) -> i32 {
    event::told(&ctx, POINT_FROM_POD, pod::sent)
}

/// At the egress of the host end of a pod's veth: what the pod is sent, but for what `from_pod`
/// hands from one pod to another.
#[classifier]
pub fn to_pod(ctx: TcContext) -> i32 {
    event::told(&ctx, POINT_TO_POD, pod::received)
}

/// At the ingress of an uplink: what comes from outside.
#[classifier]
pub fn from_netdev(ctx: TcContext) -> i32 {
    event::told(&ctx, POINT_FROM_OUTSIDE, outside::received)
}

/// In the driver of an uplink, where it is told to be, before `from_netdev`.
#[xdp(frags)]
pub fn xdp_netdev(ctx: XdpContext) -> u32 {
    xdp::received(&ctx)
}

/// At the egress of an uplink: what leaves for outside.
#[classifier]
pub fn to_netdev(ctx: TcContext) -> i32 {
    event::told(&ctx, POINT_TO_OUTSIDE, outside::sent)
}

/// Never reached: the verifier refuses a program that could come here.
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
