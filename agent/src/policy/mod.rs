//! NetworkPolicies of this node: from the view to what the maps say, and how to get there. Pure, but
//! for [`follow`], which has it done at each new view.
//!
//! ```text
//!  View (policies, peers) ─┐
//!  pods of this node ──────┴─► compile ─► Wanted ─► plan ─► Steps ─► dataplane (maps) ─► eBPF policy
//! ```
//! Rules of the API that are kept here: a pod is isolated in a direction when any policy that selects
//! it names that direction; what it may then receive or send is the union over those policies; both
//! ends of a connection must allow it; traffic of the pod's own node is always allowed. Named ports are
//! those of the target: the pod itself for what comes in, the peer for what goes out.
//!
//! Source: Kubernetes `networking/v1` types.

pub mod compile;
pub mod follow;
pub mod plan;
pub mod prefix;
pub mod why;

#[cfg(test)]
mod tests;

use std::sync::Arc;

use gantry_api::proto;
use imbl::OrdMap;

pub use compile::{Limits, LocalPod, compile};

/// `namespace/name` of a NetworkPolicy.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct PolicyName {
    /// metadata.namespace
    pub namespace: String,
    /// metadata.name
    pub name: String,
}

/// The members of the sets that policies name: by set, then by `namespace/name` of the pod.
pub type Peers = OrdMap<String, Arc<OrdMap<String, Arc<proto::PolicyPeer>>>>;

/// A pod whose policies could not be programmed: its traffic is refused.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct StuckPod {
    /// `namespace/name`
    pub pod: String,
    /// Why, and what holds now.
    pub reason: String,
}
