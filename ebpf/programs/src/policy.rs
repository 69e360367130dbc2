//! The call sites of NetworkPolicy. Both hooks and every short cut past them ask here.
//!
//! Asked for each packet with the addresses that are really used: after a Service was translated
//! to its backend, before an answer is translated back. Not asked for ARP and neighbour discovery.

use aya_ebpf::programs::TcContext;

use crate::packet::Packet;

/// Whether this pod may send this packet. Called before it leaves for anywhere, by `from_pod`.
#[inline(always)]
pub fn allows_egress(_ctx: &TcContext, _packet: &Packet, _pod_id: u64) -> bool {
    true
}

/// Whether this packet may reach this pod of this node. Called where it is delivered: by `to_pod`
/// for what comes through the node's network, by `from_pod` for what goes from pod to pod at once.
#[inline(always)]
pub fn allows_ingress(_ctx: &TcContext, _packet: &Packet, _pod_id: u64) -> bool {
    true
}
