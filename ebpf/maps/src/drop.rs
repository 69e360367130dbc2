//! Why a packet was dropped, as indexes into the per-CPU array `DROPS` (one `u64` each).

/// It came from an interface that belongs to no pod, or to none yet: a sandbox in waiting says which
/// IPv6 groups it has joined.
pub const NO_POD: u32 = 0;
/// Its source is no address of the pod that sent it.
pub const SOURCE_ADDRESS: u32 = 1;
/// Its source is not the hardware address of the pod that sent it.
pub const SOURCE_MAC: u32 = 2;
/// ARP or neighbour discovery that speaks for an address of somebody else, or for a router.
pub const NEIGHBOUR: u32 = 3;
/// Neither IPv4 nor IPv6 nor ARP, or in a VLAN: nothing that a pod's network carries.
pub const LINK_PROTOCOL: u32 = 4;
/// Too short for its own headers, or with more IPv6 extension headers than are followed.
pub const MALFORMED: u32 = 5;
/// A NetworkPolicy does not allow it.
pub const POLICY: u32 = 6;
/// A frontend without backends: answered by a reset or an ICMP error.
pub const NO_BACKEND: u32 = 7;
/// The map of flows took no entry, or no free source port was found for one.
pub const FLOWS_FULL: u32 = 8;
/// A slot or backend of a Service was out of range: a fault of the agent, never of a packet.
pub const BROKEN_SLOT: u32 = 9;

/// The client is not in `loadBalancerSourceRanges`.
pub const SOURCE_RANGE: u32 = 10;
/// Only other nodes have backends, and `externalTrafficPolicy: Local` keeps traffic from them.
pub const NO_BACKEND_HERE: u32 = 11;
/// The way to a backend elsewhere has no address of the node to be answered at.
pub const NO_SOURCE: u32 = 12;
/// It has been sent on too often.
pub const TTL: u32 = 13;

/// To go on with the node's own address as its source, and every port tried for it is taken.
pub const NO_PORT: u32 = 14;
/// To the outside, from a pod: a fragment that came before the first of its packet.
pub const FRAGMENT: u32 = 15;

/// The pod has used up its bandwidth.
pub const BANDWIDTH: u32 = 16;

/// Entries of `DROPS`.
pub const DROP_COUNT: u32 = 32;

/// The name of each reason in use, by index, for metrics and reports.
pub const DROP_NAMES: [&str; 17] = [
    "no_pod",
    "source_address",
    "source_mac",
    "neighbour",
    "link_protocol",
    "malformed",
    "policy",
    "no_backend",
    "flows_full",
    "broken_slot",
    "source_range",
    "no_backend_here",
    "no_source",
    "ttl",
    "no_port",
    "fragment",
    "bandwidth",
];

const _: () = assert!(DROP_NAMES.len() <= DROP_COUNT as usize);
