//! Keys and values of the eBPF maps: the one description that programs and agent share.
//!
//! ```text
//!  agent (services::plan) ──► FRONTENDS ─► SLOTS ─► BACKENDS        connect(), sendmsg()
//!                             PEERS, REVERSE_NAT ◄────────────────  written by the programs,
//!                             AFFINITY           ◄────────────────  read by recvmsg(), getpeername()
//!  agent (dataplane::pods) ──► ENDPOINTS, INTERFACES                packets of pods
//!  agent (policy::plan) ──► POLICY_PODS, POLICY_PEERS, POLICY_RULES  which of them are allowed
//!  agent (dataplane::uplinks) ──► UPLINKS, ANNOUNCED               packets from outside
//!                             FLOWS              ◄────────────────  written and read by packets
//!  agent (dataplane::flows) ──► WATCH ─► EVENTS ──► agent            what happens, while somebody watches
//! ```
//! Every address is 16 bytes in network order, an IPv4 address in its v4-mapped form
//! (`::ffff:a.b.c.d`), so that one set of maps serves both families.
//!
//! Invariants: every type is `#[repr(C)]`, has no implicit padding and no invalid bit pattern, and
//! its size and offsets are asserted at compile time. A change of any of them is a change of
//! [`LAYOUT_VERSION`]: the agent then makes new maps instead of reading old bytes as new ones.
#![no_std]

pub mod bandwidth;
pub mod counter;
pub mod device;
pub mod drop;
pub mod endpoint;
pub mod event;
pub mod flow;
pub mod policy;
pub mod services;
pub mod uplink;

/// Version of the layouts in this crate; part of the directory in which maps are pinned.
pub const LAYOUT_VERSION: u32 = 5;

/// A marker for types that may be copied to and from a map as bytes.
macro_rules! plain_old_data {
    ($($name:ty),* $(,)?) => {$(
        #[cfg(feature = "user")]
        // SAFETY: `repr(C)`, made of integers only, and the size assertion beside each type shows
        // that the fields fill it: every byte is initialised and every bit pattern is valid.
        unsafe impl aya::Pod for $name {}
    )*};
}
pub(crate) use plain_old_data;
