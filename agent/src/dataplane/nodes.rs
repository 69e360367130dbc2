//! What the programs know of the nodes' own addresses: the map NODE_ADDRESSES. Pure.
//!
//! ```text
//!  OWN     this node's
//!  OTHER   another one's: its answers to a pod come by the way that they are asked
//!  BEHIND  another one's behind the tunnel: asked from this node's address (see `masquerade`)
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ebpf_maps::services::Addr;
use ebpf_maps::uplink::{NODE_BEHIND, NODE_OTHER, NODE_OWN};
use gantry_api::proto;
use imbl::OrdMap;

use crate::services::index::parse_address;

/// All nodes by name, as a view has them.
pub(super) type Nodes = OrdMap<String, Arc<proto::NodeRoute>>;

/// Other nodes' addresses whose answers to a pod come by the way that they are asked; none: all of them.
pub(super) type Near = Option<BTreeSet<Addr>>;

/// What NODE_ADDRESSES is to say.
///
/// * `near` – none: nobody has said it since the agent's start, and what is `there` is right still.
pub(super) fn node_rows(
    nodes: &Nodes,
    own: &str,
    near: Option<&Near>,
    there: &BTreeMap<Addr, u32>,
) -> BTreeMap<Addr, u32> {
    let mut wanted: BTreeMap<Addr, u32> = BTreeMap::new();
    for (name, node) in nodes {
        let addresses = node.addresses.iter();
        for addr in addresses.filter_map(|bytes| parse_address(bytes)) {
            let is_near = match near {
                Some(Some(near)) => near.contains(&addr),
                Some(None) => true,
                None => there.get(&addr) != Some(&NODE_BEHIND),
            };
            let row = match is_near {
                _ if name == own => NODE_OWN,
                true => NODE_OTHER,
                false => NODE_BEHIND,
            };
            // Whoever else claims an address of this node.
            if wanted.get(&addr) != Some(&NODE_OWN) {
                wanted.insert(addr, row);
            }
        }
    }
    wanted
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::services::index::addr_of;

    fn addr(last: u8) -> Addr {
        addr_of([192, 0, 2, last].into())
    }

    fn nodes(all: &[(&str, u8)]) -> Nodes {
        let mut nodes = Nodes::new();
        for (name, last) in all {
            let node = proto::NodeRoute {
                addresses: vec![vec![192, 0, 2, *last].into()],
                ..proto::NodeRoute::default()
            };
            nodes.insert((*name).into(), Arc::new(node));
        }
        nodes
    }

    #[test]
    fn a_node_is_behind_the_tunnel_when_that_is_said_and_stays_so_over_a_restart() {
        let nodes = nodes(&[("here", 1), ("near", 2), ("far", 3)]);
        let near: Near = Some([addr(2)].into());
        let rows = node_rows(&nodes, "here", Some(&near), &BTreeMap::new());
        let expected = [
            (addr(1), NODE_OWN),
            (addr(2), NODE_OTHER),
            (addr(3), NODE_BEHIND),
        ];
        assert_eq!(rows, expected.into());
        assert_eq!(node_rows(&nodes, "here", None, &rows), rows);
        // Where others know the ways, or before anybody has looked, all are asked as they always were.
        for near in [None, Some(&None)] {
            let rows = node_rows(&nodes, "here", near, &BTreeMap::new());
            assert!(rows.values().all(|row| *row != NODE_BEHIND));
        }
    }

    #[test]
    fn an_address_that_another_node_claims_too_stays_this_nodes() {
        let both = nodes(&[("a", 1), ("here", 1), ("z", 1)]);
        let rows = node_rows(
            &both,
            "here",
            Some(&Some(BTreeSet::new())),
            &BTreeMap::new(),
        );
        assert_eq!(rows, [(addr(1), NODE_OWN)].into());
    }
}
