//! Nodes behind a router: their pods reach each other through VXLAN, and so do Services and policies.
//!
//! The nodes are namespaces beside the scenario's own cluster (`crate::nodes`); here because not every
//! kernel has VXLAN, and the virtual machine's has.

use anyhow::Result;

use crate::cluster::Cluster;
use crate::nodes::{Joined, claims};

/// Both ways of joining nodes, with this kernel.
pub fn tunnel(_cluster: &mut Cluster) -> Result<()> {
    claims::all(Joined::Link, |_| Ok(()))?;
    claims::all(Joined::Router, |_| Ok(()))
}
