//! Why a packet was dropped, as indexes into the per-CPU array `DROPS` (one `u64` each).

/// It came from an interface that belongs to no pod.
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

/// Entries of `DROPS`.
pub const DROP_COUNT: u32 = 32;

/// The name of each reason in use, by index, for metrics and reports.
pub const DROP_NAMES: [&str; 7] = [
    "no_pod",
    "source_address",
    "source_mac",
    "neighbour",
    "link_protocol",
    "malformed",
    "policy",
];

const _: () = assert!(DROP_NAMES.len() <= DROP_COUNT as usize);
