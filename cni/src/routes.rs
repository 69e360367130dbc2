//! Routes to the pods of other nodes: their prefix via their node address, no tunnel, no NAT.
//!
//! Works where the nodes share a link (bare metal, one VLAN). What is ours in the routing table
//! carries [`ROUTE_PROTOCOL`], so the difference to what is wanted can be taken after any crash.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::error::CniError;
use crate::netlink::{Netlink, ROUTE_PROTOCOL, Route};

/// One other node.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct NodeRoute {
    /// Its pods' prefix.
    pub pod_cidr: IpNet,
    /// Its address, of the same family.
    pub via: IpAddr,
}

/// What to change in the routing table, removals first.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct RoutePlan {
    /// Ours and no longer wanted.
    pub remove: Vec<Route>,
    /// Wanted and missing, or wanted with another next hop.
    pub ensure: Vec<Route>,
}

/// The difference between the table and the wish. Pure; touches only routes of ours.
pub fn plan(wanted: &[NodeRoute], table: &[Route]) -> RoutePlan {
    let ours: Vec<&Route> = table
        .iter()
        .filter(|r| r.protocol == ROUTE_PROTOCOL)
        .collect();
    let is_wanted = |route: &Route| {
        let mut nodes = wanted.iter();
        nodes.any(|node| node.pod_cidr.trunc() == route.destination)
    };
    let has = |node: &NodeRoute| {
        let mut routes = ours.iter();
        routes.any(|r| r.destination == node.pod_cidr.trunc() && r.gateway == Some(node.via))
    };
    RoutePlan {
        remove: ours
            .iter()
            .filter(|r| !is_wanted(r))
            .map(|r| (*r).clone())
            .collect(),
        ensure: (wanted.iter())
            .filter(|node| !has(node))
            .map(|node| Route {
                destination: node.pod_cidr.trunc(),
                gateway: Some(node.via),
                link: None,
                protocol: ROUTE_PROTOCOL,
            })
            .collect(),
    }
}

/// Makes the node routes exactly `wanted`. Goes on after a failure (an unreachable next hop must
/// not keep the other nodes apart) and returns all of them.
pub async fn ensure(host: &Netlink, wanted: &[NodeRoute]) -> Result<(), CniError> {
    let plan = plan(wanted, &host.routes().await?);
    let mut errors = Vec::new();
    for route in &plan.remove {
        errors.extend(host.remove_route(route).await.err());
    }
    for route in &plan.ensure {
        errors.extend(host.ensure_route(route).await.err());
    }
    CniError::all(errors)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn node(third: u8, via: u8) -> NodeRoute {
        NodeRoute {
            pod_cidr: format!("10.244.{third}.0/24").parse().unwrap(),
            via: IpAddr::from([192, 168, 0, via]),
        }
    }

    fn route(third: u8, via: u8, protocol: u8) -> Route {
        Route {
            destination: node(third, via).pod_cidr,
            gateway: Some(node(third, via).via),
            link: Some(2),
            protocol,
        }
    }

    proptest! {
        /// Applying the plan gives exactly the wish, and foreign routes stay.
        #[test]
        fn the_plan_leads_to_the_wish(
            wanted in proptest::collection::btree_map(0u8..20, 1u8..4, 0..12),
            table in proptest::collection::btree_map(0u8..20, (1u8..4, any::<bool>()), 0..12),
        ) {
            let wanted: Vec<_> = wanted.into_iter().map(|(third, via)| node(third, via)).collect();
            let table: Vec<_> = (table.into_iter())
                .map(|(third, (via, ours))| route(third, via, if ours { ROUTE_PROTOCOL } else { 3 }))
                .collect();
            let plan = plan(&wanted, &table);
            prop_assert!(plan.remove.iter().all(|r| r.protocol == ROUTE_PROTOCOL));
            let mut after: BTreeMap<_, _> = (table.iter())
                .filter(|r| r.protocol == ROUTE_PROTOCOL && !plan.remove.contains(r))
                .map(|r| (r.destination, r.gateway))
                .collect();
            after.extend(plan.ensure.iter().map(|r| (r.destination, r.gateway)));
            let wish: BTreeMap<_, _> =
                wanted.iter().map(|n| (n.pod_cidr, Some(n.via))).collect();
            prop_assert_eq!(after, wish);
        }
    }
}
