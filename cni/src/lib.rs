//! Pod wiring: a bridge, a veth pair per pod, an address from this node's prefix, routes. No NAT.
//!
//! ```text
//!  pod netns                       node netns
//!  eth0 10.244.1.5/24 ──veth──► gv…  ─┐
//!  eth0 10.244.1.6/24 ──veth──► gv…  ─┴ gantry0 10.244.1.1/24 ──routing──► other nodes
//! ```
//! The agent calls [`bridge`] in process; other container runtimes call the same code through the
//! CNI plugin `gantry-bridge` ([`plugin`]). Everything here is idempotent: what a crash left half
//! done is finished by the next ADD or removed by the next DEL.
//!
//! * [`config`] what a network is, validated; [`result`] what CNI answers, per spec version;
//! * [`ipam`] address leases as files; [`netlink`] the kernel's links, addresses, routes, typed;
//! * [`netns`] network namespaces by file descriptor;
//! * [`routes`] pod prefixes of other nodes; [`tunnel`] the way to those that share no link;
//! * [`sock_diag`] the sockets of a namespace, and their end;
//! * [`uplinks`] the node's interfaces towards the outside, and when they change.
//!
//! Invariants of absence: nothing else in the workspace knows rtnetlink; nothing here runs a
//! program, writes a netfilter rule or enters a namespace on a thread it does not own.

pub mod bridge;
pub mod config;
pub mod error;
pub mod genetlink;
pub mod ipam;
mod neighbours;
pub mod netlink;
pub mod netns;
pub mod plugin;
pub mod result;
pub mod routes;
pub mod sock_diag;
pub mod sysctl;
pub mod tunnel;
pub mod uplinks;
pub mod wireguard;

pub use error::CniError;
