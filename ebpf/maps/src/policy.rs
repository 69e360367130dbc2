//! NetworkPolicies: may this pod exchange this packet with that peer?
//!
//! ```text
//!  POLICY_PODS[pod's id]           = {ingress, egress}      OPEN: allowed; none: nothing is
//!  OPEN_PODS[place of the id]      = pod's id               it is OPEN both ways: POLICY_PODS says so too
//!  POLICY_FLOWS[pod, peer, ports]  = last use               present: allowed, either way
//!  POLICY_PEERS[peer's address]    = identity               longest prefix; none: 0
//!  POLICY_RULES[policy, identity, protocol, port]           longest prefix; present: allowed
//!  POLICY_RULES[policy, 0, protocol, port]                  what everybody may
//! ```
//! Five lookups at most, whatever the number of policies. The agent never changes what a number means
//! while something leads to it (`agent/src/policy/plan.rs`).

use core::mem::{offset_of, size_of};

use crate::plain_old_data;
use crate::services::Addr;

/// Entries of `POLICY_PODS`: the pods of this node.
pub const POLICY_POD_COUNT_MAX: u32 = 4_096;
/// Entries of `OPEN_PODS`, in which a program looks without a call. One place may be that of many pods, of which
/// one is there.
pub const OPEN_POD_COUNT: u32 = 4_096;
/// Entries of `POLICY_PEERS`. The agent plans for half: during a change old and new are there.
pub const PEER_PREFIX_COUNT_MAX: u32 = 131_072;
/// Entries of `POLICY_RULES`. The agent plans for an eighth: during a change old, new and those of
/// passage are there, and after it the old ones for a second.
pub const RULE_COUNT_MAX: u32 = 524_288;

/// A policy's number: nothing is asked, everything is allowed.
pub const POLICY_OPEN: u32 = 0;
/// A policy's number: nothing is allowed.
pub const POLICY_CLOSED: u32 = 1;
/// The first number of a policy with rules.
pub const POLICY_FIRST: u32 = 2;

/// The place of a pod in `OPEN_PODS`.
#[inline(always)]
pub const fn open_place(pod_id: u64) -> u32 {
    pod_id as u32 & (OPEN_POD_COUNT - 1)
}

/// Value of `POLICY_PODS`, whose key is the pod's id (`InterfaceValue::pod_id`).
///
/// A hash map's freed element may be reused while a program reads it, so it names its key.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct PodPolicies {
    /// The pod that it belongs to.
    pub pod_id: u64,
    /// The policy for what the pod receives.
    pub ingress: u32,
    /// The policy for what it sends.
    pub egress: u32,
}

/// The data of a key of `POLICY_RULES`, in the order in which the prefix counts its bits.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct RuleKey {
    /// The policy's number.
    pub policy: u32,
    /// The peer's identity; 0: any.
    pub identity: u32,
    /// Always 0.
    pub _pad: u8,
    /// IANA protocol number.
    pub proto: u8,
    /// The destination port, network order.
    pub port_be: u16,
}

/// Entries of `POLICY_FLOWS`; the least recently used go first.
pub const FLOW_COUNT_MAX: u32 = 65_536;

/// `FlowKey::kind`: a connection, or an exchange of datagrams.
pub const FLOW: u8 = 0;
/// `FlowKey::kind`: the later fragments of a packet to the pod; the ports are the packet's id.
pub const FRAGMENTS_IN: u8 = 1;
/// `FlowKey::kind`: those of a packet from the pod.
pub const FRAGMENTS_OUT: u8 = 2;

/// How long a peer may answer what is no TCP: the kernel's `nf_conntrack_udp_timeout_stream` is 120 s.
/// TCP needs no end: only a SYN opens a connection, and each is judged.
pub const FLOW_TIMEOUT_S: u64 = 180;
/// How long the fragments of a packet may take: as the kernel's `ipfrag_time`.
pub const FRAGMENTS_TIMEOUT_S: u64 = 30;

/// Key of `POLICY_FLOWS`: what was allowed for a pod, and so is in both directions. The value is the time of
/// its last use: nanoseconds of the monotonic clock, coarse.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct FlowKey {
    /// The pod.
    pub pod_id: u64,
    /// The other end.
    pub peer: Addr,
    /// The pod's port, network order; 0 where the protocol has none.
    pub pod_port_be: u16,
    /// The peer's.
    pub peer_port_be: u16,
    /// IANA protocol number.
    pub proto: u8,
    /// [`FLOW`], [`FRAGMENTS_IN`] or [`FRAGMENTS_OUT`].
    pub kind: u8,
    /// Always 0.
    pub _pad: u16,
}

/// Length of a rule's prefix: every protocol.
pub const RULE_BITS_ALL: u32 = 72;
/// Length of a rule's prefix: every port of a protocol.
pub const RULE_BITS_PROTO: u32 = 80;
/// Length of a rule's prefix: one port. What is looked up.
pub const RULE_BITS_PORT: u32 = 96;

const _: () = {
    assert!(OPEN_POD_COUNT.is_power_of_two());
    assert!(size_of::<PodPolicies>() == 16);
    assert!(offset_of!(PodPolicies, ingress) == 8);
    assert!(offset_of!(PodPolicies, egress) == 12);
    assert!(size_of::<FlowKey>() == 32);
    assert!(offset_of!(FlowKey, peer) == 8);
    assert!(offset_of!(FlowKey, pod_port_be) == 24);
    assert!(offset_of!(FlowKey, peer_port_be) == 26);
    assert!(offset_of!(FlowKey, proto) == 28);
    assert!(offset_of!(FlowKey, kind) == 29);
    assert!(size_of::<RuleKey>() == 12);
    assert!(offset_of!(RuleKey, proto) * 8 == RULE_BITS_ALL as usize);
    assert!(offset_of!(RuleKey, port_be) * 8 == RULE_BITS_PROTO as usize);
    assert!(size_of::<RuleKey>() * 8 == RULE_BITS_PORT as usize);
};

plain_old_data!(PodPolicies, RuleKey, FlowKey);
