//! Routes to the pods of other nodes: their prefix via their node, no NAT.
//!
//! ```text
//! ensure  tunnel device, ends of new peers ─► routes: removed, changed, added ─► ends of peers that went
//! ```
//! A node on a link of ours is the next hop itself; any other is reached through the [`tunnel`]. What is
//! ours in the routing table carries [`ROUTE_PROTOCOL`], so the difference to what is wanted can be taken
//! after any crash.
//!
//! Invariants: a route of somebody else is neither changed nor removed, also not one to the same
//! destination; a prefix that stays is never without a route in between.

use std::collections::BTreeSet;
use std::net::IpAddr;

use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use ipnet::IpNet;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::AddressScope;
use rtnetlink::packet_core::NetlinkPayload;
use rtnetlink::{MulticastGroup, new_multicast_connection};

use crate::bridge::HOST_IFNAME_PREFIX;
use crate::config::BRIDGE_NAME;
use crate::error::CniError;
use crate::netlink::{Link, Netlink, POD_ROUTE_PROTOCOL, ROUTE_PROTOCOL, Route};
use crate::tunnel::{self, Tunnel};
use crate::wireguard::{self, WireGuard};

/// How the node is reached that has a prefix.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Way {
    /// It is on this link (ifindex).
    Link(u32),
    /// Through the tunnel.
    Tunnel,
}

/// The pods of one other node.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct NodeRoute {
    /// Their prefix.
    pub pod_cidr: IpNet,
    /// The next hop, of the same family: the node's address on the link, or its end of the tunnel.
    pub via: IpAddr,
    /// Where that is.
    pub way: Way,
}

/// All that is to be reachable.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Wanted {
    /// The other nodes' pods.
    pub routes: Vec<NodeRoute>,
    /// The tunnel, where a route needs it.
    pub tunnel: Option<Tunnel>,
    /// What carries the tunnel, where it is to be encrypted.
    pub wireguard: Option<WireGuard>,
}

impl Wanted {
    /// As rows of the routing table. Without the tunnel's device those through it are left out.
    fn rows(&self, device: Option<u32>) -> Vec<Route> {
        let sources = self.tunnel.iter().flat_map(|tunnel| &tunnel.addresses);
        let source = |of: &IpNet| {
            let mut sources = sources.clone().map(IpNet::addr);
            sources.find(|source| source.is_ipv4() == of.addr().is_ipv4())
        };
        let rows = self.routes.iter().filter_map(|node| {
            let plain = Route {
                destination: node.pod_cidr.trunc(),
                gateway: Some(node.via),
                protocol: ROUTE_PROTOCOL,
                ..Route::default()
            };
            match node.way {
                Way::Link(index) => Some(Route {
                    link: Some(index),
                    ..plain
                }),
                // The node's own packets must come from where the answers go through the tunnel too.
                Way::Tunnel => device.map(|index| Route {
                    link: Some(index),
                    onlink: true,
                    source: source(&node.pod_cidr),
                    ..plain
                }),
            }
        });
        rows.collect()
    }
}

/// What to change in the routing table, in this order.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct RoutePlan {
    /// Ours and no longer wanted.
    pub remove: Vec<Route>,
    /// Ours, and to lead elsewhere.
    pub replace: Vec<Route>,
    /// Missing.
    pub create: Vec<Route>,
}

/// The difference between the table and the wish. Pure; touches only routes of ours.
///
/// * `kept` – destinations whose routes stay though none is wanted now.
pub fn plan(wanted: &[Route], kept: &BTreeSet<IpNet>, table: &[Route]) -> RoutePlan {
    let ours: Vec<&Route> = table
        .iter()
        .filter(|route| route.protocol == ROUTE_PROTOCOL)
        .collect();
    let of = |route: &Route| {
        let mut own = ours.iter();
        own.find(|own| own.destination == route.destination)
    };
    let leads_there = |own: &Route, route: &Route| {
        own.gateway == route.gateway && own.link == route.link && own.source == route.source
    };
    let is_kept = |own: &Route| {
        let mut wanted = wanted.iter();
        kept.contains(&own.destination) || wanted.any(|it| it.destination == own.destination)
    };
    let mut plan = RoutePlan {
        remove: (ours.iter().filter(|own| !is_kept(own)))
            .map(|own| (*own).clone())
            .collect(),
        ..RoutePlan::default()
    };
    for route in wanted {
        match of(route) {
            None => plan.create.push(route.clone()),
            Some(own) if leads_there(own, route) => {}
            Some(_) => plan.replace.push(route.clone()),
        }
    }
    plan
}

/// Makes the node routes exactly `wanted`. Goes on after a failure (an unreachable next hop must
/// not keep the other nodes apart) and returns all of them.
pub async fn ensure(host: &Netlink, wanted: &Wanted) -> Result<(), CniError> {
    let mut errors = Vec::new();
    let mut device = None;
    if let Some(wireguard) = &wanted.wireguard {
        errors.extend(wireguard::ensure(host, wireguard).await.err());
    }
    if let Some(tunnel) = &wanted.tunnel {
        match tunnel::ensure(host, tunnel).await {
            Ok(index) => device = Some(index),
            Err(error) => errors.push(error),
        }
    }
    let kept = wanted.routes.iter().map(|route| route.pod_cidr.trunc());
    let plan = plan(&wanted.rows(device), &kept.collect(), &host.routes().await?);
    for route in &plan.remove {
        errors.extend(host.remove_route(route).await.err());
    }
    for route in &plan.replace {
        errors.extend(host.ensure_route(route).await.err());
    }
    for route in &plan.create {
        errors.extend(host.create_route(route).await.err());
    }
    let tidied = match (&wanted.tunnel, device) {
        (Some(tunnel), Some(index)) => tunnel::forget_others(host, index, tunnel).await,
        (Some(_), None) => Ok(()),
        (None, _) => tunnel::remove(host).await,
    };
    errors.extend(tidied.err());
    let tidied = match &wanted.wireguard {
        Some(wireguard) => wireguard::forget_others(host, wireguard).await,
        None => wireguard::remove(host).await,
    };
    errors.extend(tidied.err());
    CniError::all(errors)
}

/// Tells when routes, addresses or links of this namespace changed in a way that may concern the node
/// routes.
pub struct Changes {
    messages: BoxStream<'static, ()>,
}

impl Changes {
    /// Listens in the namespace of the calling thread. Must be called within a tokio runtime.
    pub fn open() -> Result<Self, CniError> {
        let groups = [
            MulticastGroup::Link,
            MulticastGroup::Ipv4Ifaddr,
            MulticastGroup::Ipv6Ifaddr,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv6Route,
        ];
        let (connection, _, messages) = new_multicast_connection(&groups)
            .map_err(CniError::io("listen for changes of routes"))?;
        // Ends by itself when the receiver is dropped.
        tokio::spawn(connection);
        let messages = messages.filter_map(|(message, _)| async move {
            match message.payload {
                NetlinkPayload::InnerMessage(message) => concerns(&message).then_some(()),
                // Messages were lost, or something unheard of: a look costs little.
                _ => Some(()),
            }
        });
        Ok(Self {
            messages: messages.boxed(),
        })
    }

    /// Waits for the next change; none: the kernel's socket is gone. Cancel-safe.
    pub async fn next(&mut self) -> Option<()> {
        self.messages.next().await
    }
}

/// Not what every pod brings that starts or ends: its veth, its routes, and the bridge's news about it.
fn concerns(message: &RouteNetlinkMessage) -> bool {
    match message {
        RouteNetlinkMessage::NewAddress(address) | RouteNetlinkMessage::DelAddress(address) => {
            address.header.scope == AddressScope::Universe
        }
        RouteNetlinkMessage::NewLink(link) | RouteNetlinkMessage::DelLink(link) => {
            let name = Link::from_message(link).name;
            !name.starts_with(HOST_IFNAME_PREFIX) && name != BRIDGE_NAME
        }
        RouteNetlinkMessage::NewRoute(route) | RouteNetlinkMessage::DelRoute(route) => {
            Route::from_message(route).is_some_and(|route| match route.destination {
                _ if route.protocol == POD_ROUTE_PROTOCOL => false,
                IpNet::V4(_) => true,
                IpNet::V6(net) => !net.addr().is_unicast_link_local() && !net.addr().is_multicast(),
            })
        }
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    const DEVICE: u32 = 9;

    fn node(third: u8, via: u8) -> NodeRoute {
        NodeRoute {
            pod_cidr: format!("10.244.{third}.0/24").parse().unwrap(),
            via: IpAddr::from([192, 168, 0, via]),
            // Some of both kinds.
            way: match via {
                1 => Way::Tunnel,
                _ => Way::Link(2),
            },
        }
    }

    fn route(third: u8, via: u8, protocol: u8) -> Route {
        let wanted = Wanted {
            routes: vec![node(third, via)],
            ..Wanted::default()
        };
        let mut rows = wanted.rows(Some(DEVICE));
        Route {
            protocol,
            ..rows.remove(0)
        }
    }

    #[test]
    fn without_its_device_a_route_through_the_tunnel_is_left_as_it_is() {
        let wanted = Wanted {
            routes: vec![node(1, 1), node(2, 2)],
            ..Wanted::default()
        };
        let rows = wanted.rows(None);
        assert_eq!(rows, [route(2, 2, ROUTE_PROTOCOL)]);
        let kept = BTreeSet::from([node(1, 1).pod_cidr]);
        let table = [route(1, 1, ROUTE_PROTOCOL), route(3, 1, ROUTE_PROTOCOL)];
        let plan = plan(&rows, &kept, &table);
        assert_eq!(plan.remove, table[1..]);
        assert_eq!(plan.create, rows);
    }

    proptest! {
        /// Applying the plan gives exactly the wish, and foreign routes stay as they are.
        #[test]
        fn the_plan_leads_to_the_wish(
            wanted in proptest::collection::btree_map(0u8..20, 1u8..4, 0..12),
            table in proptest::collection::btree_map(0u8..20, (1u8..4, any::<bool>()), 0..12),
        ) {
            let wanted = Wanted {
                routes: wanted.into_iter().map(|(third, via)| node(third, via)).collect(),
                ..Wanted::default()
            };
            let rows = wanted.rows(Some(DEVICE));
            let table: Vec<_> = (table.into_iter())
                .map(|(third, (via, ours))| route(third, via, if ours { ROUTE_PROTOCOL } else { 3 }))
                .collect();
            let plan = plan(&rows, &BTreeSet::new(), &table);
            prop_assert!(plan.remove.iter().all(|r| r.protocol == ROUTE_PROTOCOL));
            let ours: BTreeMap<IpNet, &Route> = (table.iter())
                .filter(|r| r.protocol == ROUTE_PROTOCOL)
                .map(|r| (r.destination, r))
                .collect();
            // Replacing takes the place of the one that is there: it must be ours.
            prop_assert!(plan.replace.iter().all(|r| ours.contains_key(&r.destination)));
            prop_assert!(plan.create.iter().all(|r| !ours.contains_key(&r.destination)));
            let mut after: BTreeMap<IpNet, Route> = (ours.values())
                .filter(|r| !plan.remove.contains(r))
                .map(|r| (r.destination, (*r).clone()))
                .collect();
            after.extend(plan.replace.iter().chain(&plan.create).map(|r| (r.destination, r.clone())));
            let wish: BTreeMap<IpNet, Route> =
                rows.iter().map(|r| (r.destination, r.clone())).collect();
            prop_assert_eq!(after, wish);
        }
    }
}
