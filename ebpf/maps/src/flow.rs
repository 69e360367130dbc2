//! Flows: packets of which earlier ones were seen, and what becomes of them.
//!
//! ```text
//!  FLOWS[zone, a → b]  = becomes a' → b'        how its packets are rewritten
//!  FLOWS[zone, b'→ a'] = becomes b  → a         and its answers back
//!  ZONES[zone]         = 1 once a flow was begun there: until then nobody looks for any
//! ```
//! Two entries a flow, each other's twin: the key of one is the value of the other with source and
//! destination exchanged. So a flow that is only followed and not rewritten is one whose values
//! repeat the keys. The answers' entry is written first: no packet leaves whose answer would be
//! unknown.
//!
//! Written by the programs only; the least recently used go first. An entry that is older than its
//! state allows counts as absent.

use core::mem::{offset_of, size_of};

use crate::plain_old_data;
use crate::services::Addr;

/// Entries of `FLOWS`: two a flow. About 10 MiB, taken at once.
pub const FLOW_COUNT_MAX: u32 = 65_536;

/// `FlowKey::zone`: pods' packets to a frontend that no socket hook translated.
pub const ZONE_SERVICE: u8 = 0;
/// `FlowKey::zone`: packets between the outside and this node: to its frontends, and those of its pods
/// that leave from its address. One zone, because both share the ports of that address. A flow without
/// a backend whose values repeat the keys is one from outside to the very address of a pod.
pub const ZONE_OUTSIDE: u8 = 1;
/// `FlowKey::zone`: the fragments of one packet after its first, in the place of ports its id. One entry,
/// without a twin; of what it becomes only the addresses count.
pub const ZONE_FRAGMENTS: u8 = 2;
/// Only an element of `ZONES`, and no zone: whether a pod's own connection has ever had to go apart from
/// the flows of [`ZONE_SERVICE`], which such flows are a part of. They have no backend.
pub const ZONE_APART: u8 = 3;
/// Entries of `ZONES`.
pub const ZONE_COUNT: u32 = 8;

/// `FlowValue::flags`: this entry is for the answers.
pub const IS_REPLY: u8 = 1;
/// `FlowValue::flags`: an answer was seen.
pub const REPLIED: u8 = 2;
/// `FlowValue::flags`: TCP: a FIN or RST was seen, from either side.
pub const CLOSING: u8 = 4;

/// `FlowValue::flags`: its packets go on as they are, to the node of what they would become.
pub const DIRECT_RETURN: u8 = 8;

/// The unit of [`FlowValue::used`]: 2^30 ns of the monotonic clock, about 1.07 s.
pub const TICK_SHIFT: u32 = 30;

/// Ticks that a TCP flow lives without a packet, by what was seen of it: the kernel's
/// `nf_conntrack_tcp_timeout_*` but for established ones, which keep-alives (2 h) sustain.
pub const TCP_OPENING_TICKS: u32 = 60;
/// See [`TCP_OPENING_TICKS`].
pub const TCP_ESTABLISHED_TICKS: u32 = 3 * 3_600;
/// See [`TCP_OPENING_TICKS`].
pub const TCP_CLOSING_TICKS: u32 = 60;
/// As `nf_conntrack_udp_timeout` and `_stream`; other protocols alike.
pub const OTHER_OPENING_TICKS: u32 = 30;
/// See [`OTHER_OPENING_TICKS`].
pub const OTHER_ESTABLISHED_TICKS: u32 = 120;

/// The pod's own address when it talks to itself through a Service: it would refuse a packet from
/// its own address. Reserved on every node, never seen outside of it.
pub const HAIRPIN_V4: [u8; 4] = [169, 254, 42, 1];
/// See [`HAIRPIN_V4`]; of fd00::/8, because a link-local address cannot be answered without naming
/// the link.
pub const HAIRPIN_V6: [u8; 16] = [
    0xfd, 0x67, 0x61, 0x6e, 0x74, 0x72, 0x79, 0, 0, 0, 0, 0, 0, 0, 0, 1,
];

/// Who talks to whom.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Ends {
    /// The sender's address.
    pub source: Addr,
    /// The receiver's.
    pub destination: Addr,
    /// Network order; 0 where the protocol has no ports. ICMP echo: its identifier in both.
    pub source_port_be: u16,
    /// As above.
    pub destination_port_be: u16,
}

impl Ends {
    /// The answer's.
    #[inline(always)]
    pub const fn reversed(&self) -> Self {
        Self {
            source: self.destination,
            destination: self.source,
            source_port_be: self.destination_port_be,
            destination_port_be: self.source_port_be,
        }
    }
}

/// Key of `FLOWS`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct FlowKey {
    /// As the packet says before anything is rewritten.
    pub ends: Ends,
    /// IANA protocol number.
    pub proto: u8,
    /// One of `ZONE_*`: whose flow it is.
    pub zone: u8,
    /// Always 0.
    pub _pad: u16,
}

/// Value of `FLOWS`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct FlowValue {
    /// What the packet becomes.
    pub ends: Ends,
    /// When the flow last had a packet, in ticks: see [`TICK_SHIFT`].
    pub used: u32,
    /// The backend that was chosen; 0: none was.
    pub backend_id: u32,
    /// The `FrontendValue::service_id` it was chosen for.
    pub service_id: u32,
    /// [`IS_REPLY`], [`REPLIED`], [`CLOSING`], [`DIRECT_RETURN`].
    pub flags: u8,
    /// Always 0.
    pub _pad: [u8; 3],
}

const _: () = {
    assert!(size_of::<Ends>() == 36);
    assert!(offset_of!(Ends, source_port_be) == 32);
    assert!(size_of::<FlowKey>() == 40);
    assert!(offset_of!(FlowKey, proto) == 36);
    assert!(offset_of!(FlowKey, _pad) == 38);
    assert!(size_of::<FlowValue>() == 52);
    assert!(offset_of!(FlowValue, used) == 36);
    assert!(offset_of!(FlowValue, service_id) == 44);
    assert!(offset_of!(FlowValue, flags) == 48);
    assert!(offset_of!(FlowValue, _pad) == 49);
};

plain_old_data!(Ends, FlowKey, FlowValue);
