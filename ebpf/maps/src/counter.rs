//! What the programs count, as indexes into the per-CPU array `COUNTERS` (one `u64` each).

/// Connects and unconnected sends that were translated to a backend.
pub const TRANSLATED: u32 = 0;
/// Of those, the ones that kept the backend of an earlier connection.
pub const AFFINITY_HITS: u32 = 1;
/// Connects and sends to a frontend without any backend; refused.
pub const NO_BACKEND: u32 = 2;
/// Slots or backends out of range: a fault of the agent, never of a packet; refused.
pub const BROKEN_SLOT: u32 = 3;
/// Entries that neither `PEERS` nor `REVERSE_NAT` took: the peer's name will be the backend's.
pub const REVERSE_LOST: u32 = 4;
/// Peer names and datagram sources that were turned back into a frontend.
pub const REVERSED: u32 = 5;
/// Device accesses that the device guard refused.
pub const DEVICE_DENIED: u32 = 6;

/// Flows of pods to the outside that leave from the node's own address.
pub const MASQUERADED: u32 = 7;

/// Packets that went on from the network card's driver, before the kernel had made packets of them.
pub const XDP_SENT: u32 = 8;

/// Entries of `COUNTERS`.
pub const COUNTER_COUNT: u32 = 16;

/// The name of each counter in use, by index, for metrics and reports.
pub const COUNTER_NAMES: [&str; 9] = [
    "translated",
    "affinity_hits",
    "no_backend",
    "broken_slot",
    "reverse_lost",
    "reversed",
    "device_denied",
    "masqueraded",
    "xdp_sent",
];
