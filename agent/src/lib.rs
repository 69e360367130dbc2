//! The node agent: pods from namespaces and cgroups, Services in eBPF, names, and nobody else.
//!
//! ```text
//!  Pod, Service, Backend ──► feed ──► view ──► pods::workers ──► pod worker ──► runtime · cgroups · network ──► cni
//!                                      ├─────► services::index ──► plan ──► dataplane::sync ──► maps ──► programs
//!                                      └─────► dns
//!  status, events ◄──────────────────────────── pods::status ◄── observations (exit, probe, OOM)
//! ```
//! Deciding code is pure and property-tested (`pods::state`, `runtime::spec`, `services`,
//! `cgroups::limits`); acting code is thin and idempotent. Effects sit behind small traits
//! ([`runtime::Runtime`], [`network::Network`], [`dataplane::Dataplane`]) passed as arguments.
//!
//! Invariants of absence: only `dataplane` knows aya; nothing here knows libcontainer (that is
//! `gantry-rt`) or rtnetlink (that is `gantry-cni`); nothing opens a port outside the pod network.

pub mod blocking;
pub mod cgroups;
pub mod check;
pub mod cleanup;
pub mod credentials;
pub mod dataplane;
pub mod devices;
mod directory_watch;
pub mod dns;
pub mod explain;
pub mod feed;
pub mod flows;
pub mod health_check;
pub mod ids;
pub mod images;
pub mod join;
mod keyed_locks;
pub mod memory;
pub mod network;
pub mod node;
pub mod oom;
pub mod open_files;
pub mod orlov;
pub mod paths;
mod plugin_socket;
pub mod pods;
pub mod policy;
pub mod pressure;
pub mod readiness;
pub mod run_directory;
pub mod runtime;
pub mod services;
pub mod shutdown;
pub mod static_pods;
pub mod stats;
pub mod user_namespaces;
pub mod view;
pub mod volumes;
