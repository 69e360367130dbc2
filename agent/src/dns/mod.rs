//! Names for pods: the node's resolver.

use std::net::Ipv4Addr;

/// The node-local resolver's address, on `lo`.
pub const LISTEN_ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 20, 10);
