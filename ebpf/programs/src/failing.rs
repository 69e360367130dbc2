//! Connects that a backend does not answer, noted for the agent, which leaves such backends out.
//!
//! ```text
//!  SYN leaves  of a socket in PEERS, past every policy:  the first ─► PEERS[cookie].syn_count
//!                                                        again     ─► FAILURES[backend].resent
//!  close()     of such a socket that is still waiting              ─► FAILURES[backend].given_up
//!  RST comes   to a pod that has sent that SYN                     ─► FAILURES[sender].refused
//!  SYN-ACK     to anybody, where there is an entry                 ─► FAILURES[sender].answered
//! ```
//! A SYN is seen where it leaves the pod or the node, and an answer where it leaves its sender or comes in:
//! what a pod does to its packets before or behind that, in a namespace of its own, is seen by nobody
//! else, and what a policy drops has not left. Clients can still make SYNs that nobody would answer; so
//! the agent leaves out only who answers nobody.
//!
//! Packets other than the first of a connection, and resets, are looked at no further than their flags.

use aya_ebpf::helpers::bpf_get_socket_cookie;
use aya_ebpf::programs::TcContext;
use ebpf_maps::services::{Addr, FailureKey, FailureValue, PeerValue};

use crate::addr::same;
use crate::maps::{FAILURES, PEERS};
use crate::packet::{ACK, NO_L4, Packet, RST, SYN, TCP};
use crate::policy;

/// From the TCP header to the sequence number.
const SEQUENCE: usize = 4;

/// What became of a connect.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    Resent,
    GivenUp,
    Refused,
}

/// The packet leaves the pod or the node that made it, and nothing of this node stands in its way.
#[inline(always)]
pub fn leaving(ctx: &TcContext, packet: &Packet) {
    if flags(packet) & (SYN | ACK) == SYN {
        sent(ctx, packet);
    }
}

#[inline(never)]
fn sent(ctx: &TcContext, packet: &Packet) -> u32 {
    // SAFETY: the helper takes this hook's context; 0 where the socket is not known.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.skb.skb.cast()) };
    let Some(peer) = PEERS.get_ptr_mut(&cookie) else {
        return 0;
    };
    // SAFETY: the element is this socket's own, and only its end frees it.
    let peer: &mut PeerValue = unsafe { &mut *peer };
    if peer.backend_port_be != packet.destination_port_be
        || !same(&peer.backend, &packet.destination)
    {
        return 0;
    }
    let before = peer.syn_count;
    peer.syn_count = before.saturating_add(1);
    if before != 0 {
        note(
            &packet.destination,
            packet.destination_port_be,
            Failure::Resent,
        );
    }
    0
}

/// Somebody whose address is known to be true says this.
#[inline(always)]
pub fn heard(packet: &Packet) {
    if flags(packet) & (SYN | ACK) == SYN | ACK {
        answered(packet);
    }
}

#[inline(never)]
fn answered(packet: &Packet) -> u32 {
    let key = FailureKey {
        addr: packet.source,
        port_be: packet.source_port_be,
        _pad: 0,
    };
    if let Some(value) = FAILURES.get_ptr_mut(&key) {
        // SAFETY: the lookup checked the pointer. CPUs may write at once: of many, one is lost.
        unsafe { (*value).answered = (*value).answered.wrapping_add(1) }
    }
    0
}

/// The packet is delivered to this pod.
#[inline(always)]
pub fn delivered(ctx: &TcContext, packet: &Packet, pod_id: u64) {
    if flags(packet) & (RST | ACK) == RST | ACK {
        refused(ctx, packet, pod_id);
    }
}

#[inline(never)]
fn refused(ctx: &TcContext, packet: &Packet, pod_id: u64) -> u32 {
    // A reset of what acknowledges nothing, so of a SYN, begins at 0 (RFC 9293, 3.5.2).
    let sequence = ctx.load::<u32>(packet.l4_offset as usize + SEQUENCE);
    if sequence == Ok(0) && policy::has_opened(&packet.ends().reversed(), pod_id) {
        note(&packet.source, packet.source_port_be, Failure::Refused);
    }
    0
}

/// The flags of a TCP segment; none of anything else.
#[inline(always)]
fn flags(packet: &Packet) -> u8 {
    match packet.proto == TCP && packet.flags & NO_L4 == 0 {
        true => packet.kind,
        false => 0,
    }
}

/// One more failed connect to this backend.
#[inline(never)]
pub fn note(addr: &Addr, port_be: u16, failure: Failure) -> u32 {
    let key = FailureKey {
        addr: *addr,
        port_be,
        _pad: 0,
    };
    if let Some(value) = FAILURES.get_ptr_mut(&key) {
        // SAFETY: as in `answered`.
        let value = unsafe { &mut *value };
        let count = match failure {
            Failure::Resent => &mut value.resent,
            Failure::GivenUp => &mut value.given_up,
            Failure::Refused => &mut value.refused,
        };
        *count = count.wrapping_add(1);
        return 0;
    }
    let value = FailureValue {
        resent: u32::from(failure == Failure::Resent),
        given_up: u32::from(failure == Failure::GivenUp),
        refused: u32::from(failure == Failure::Refused),
        answered: 0,
    };
    let _ = FAILURES.insert(&key, &value, 0);
    0
}
