//! Pod networks: namespaces pinned without a process, attached by CNI, routed without NAT within the
//! cluster, and to the outside from the node's address.
//!
//! ```text
//! pod worker ─► PodNetworks ─┬► namespaces   (user,) net, ipc, uts pinned by bind mounts, from the pool
//!                            ├► gantry-cni   the default: bridge, veth, lease, routes, in process
//!                            ├► chain        or whatever /etc/cni/net.d says, by running plugins
//!                            └► dataplane    packet programs on the node's end, before the first packet
//! view ───────────────────────► routes       to the pods of other nodes: directly, or by a tunnel
//! ```
//! Everything lives below `/run/gantry`, on tmpfs, and leases are keyed by boot id: a reboot
//! leaves nothing. An agent restart changes nothing: [`Network::ensure`] finds what is there.

mod census;
mod chain;
mod forwarding;
mod interface;
pub mod masquerade;
mod namespaces;
mod packet_size;
mod pod_networks;
mod pool;
mod record;
mod resolv;
pub mod room;
pub mod routes;
mod uplinks;
mod wires;

pub use census::{Census, census, remove_all};
pub use forwarding::reserve_ports;
pub use pod_networks::{NetworkConfig, PodNetworks, third_party_plugins};
pub use resolv::{ResolvConf, node_resolv_conf, resolv_conf, resolv_conf_warnings};
pub use routes::{Routes, Routing, RoutingConfig, follow_near, follow_routes};
pub use uplinks::follow_uplinks;

use std::collections::HashSet;
use std::net::IpAddr;
use std::path::PathBuf;

use async_trait::async_trait;

use crate::dataplane::Bandwidth;
use crate::ids::PodUid;
use crate::user_namespaces::{Range, UserNamespace};

/// What a pod's network needs.
#[derive(Clone, Debug)]
pub struct PodNetworkSpec {
    /// The pod.
    pub pod: PodUid,
    /// metadata.namespace and name: CNI args.
    pub namespace: String,
    /// metadata.name
    pub name: String,
    /// The UTS namespace's host name.
    pub hostname: String,
    /// spec.hostNetwork: no network namespace of its own.
    pub host_network: bool,
    /// `hostUsers: false`: the host ids of its user namespace.
    pub user_range: Option<Range>,
    /// What it may send and be sent.
    pub bandwidth: Bandwidth,
}

/// A pod's network, ready.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PodNetwork {
    /// `status.podIPs`, the first is `status.podIP`. The node's own with host network.
    pub addresses: Vec<IpAddr>,
    /// Path of the pinned network namespace; none with host network.
    pub netns: Option<PathBuf>,
    /// Path of the pinned ipc namespace.
    pub ipcns: PathBuf,
    /// Path of the pinned uts namespace; none with host network.
    pub utsns: Option<PathBuf>,
    /// The pinned user namespace, which owns the others; none: the host's.
    pub userns: Option<UserNamespace>,
}

/// Why a network could not be made. Retried by the pod worker.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The node has no pod prefix yet, or no usable network configuration.
    #[error("network not ready: {0}")]
    NotReady(String),
    /// A CNI plugin refused.
    #[error("cni {plugin}: {message}")]
    Cni {
        /// Its name.
        plugin: String,
        /// Its own words.
        message: String,
    },
    /// The packet programs could not be put on its interface.
    #[error("packet path: {0}")]
    Packets(String),
    /// A system call failed.
    #[error("{context}: {source}")]
    Io {
        /// What was being done, to which path.
        context: String,
        /// The error of the call.
        source: std::io::Error,
    },
}

/// The network side of a node. One implementation, one fake in tests.
#[async_trait]
pub trait Network: Send + Sync + 'static {
    /// Pins the namespaces and attaches them. Idempotent: a second call returns the same addresses.
    async fn ensure(&self, pod: &PodNetworkSpec) -> Result<PodNetwork, NetworkError>;
    /// Detaches, drops the namespaces and gives the addresses back. Idempotent.
    async fn remove(&self, pod: &PodUid) -> Result<(), NetworkError>;
    /// Removes the networks of every pod not in `live`: what a crash left behind.
    async fn retain(&self, live: &HashSet<PodUid>) -> Result<(), NetworkError>;
}
