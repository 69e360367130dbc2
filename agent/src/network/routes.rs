//! Which way the pods of other nodes are reached: what routes and tunnel are to be. Pure; [`follow`] acts.
//!
//! ```text
//!  view: nodes, their prefixes and addresses ─┐                ┌► route via the node, dev UPLINK
//!  links, their networks, routing table ──────┴► each prefix ──┼► route via the tunnel (VXLAN)
//!                                                              └► a problem, in words
//! ```
//! A node whose address is on a link of ours is reached directly, any other through the tunnel; the
//! administrator may want one of both for all (`--routing`), and the tunnel inside of WireGuard. Both families are alike: a prefix is routed
//! directly via an address of its own family; the tunnel carries both, over the family of this node's
//! first address (IPv4 if it has one).
//!
//! Invariants, checked by the tests: nothing of ours overlaps a network of a link, this node's own pods
//! or another node's; no route to the very destination of somebody else's; what is not routed has a
//! problem that names what is in the way.

mod follow;
mod key;
mod shown;
#[cfg(test)]
mod tests;

pub use follow::{follow_near, follow_routes};
pub use key::{KEY_ANNOTATION, OwnKey};
pub use shown::{ReachedNode, Routes};

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;

use gantry_api::proto;
use gantry_cni::config::BRIDGE_NAME;
use gantry_cni::netlink::{LOOPBACK_INDEX, Link, ROUTE_PROTOCOL, Route};
use gantry_cni::routes::{NodeRoute, Wanted, Way};
use gantry_cni::tunnel::{self, TUNNEL_NAME, Tunnel, TunnelEnd};
use gantry_cni::wireguard::{self, Key, WireGuard};
use ipnet::IpNet;

use crate::view::View;

/// The metric that a route gets which asks for none, by family.
const METRIC_V4: u32 = 0;
const METRIC_V6: u32 = 1024;

/// How other nodes are reached.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, clap::ValueEnum)]
pub enum Routing {
    /// Directly where a link is shared, else through the tunnel
    #[default]
    Auto,
    /// Directly only: every node must be on a link of this one
    Direct,
    /// Through the tunnel only
    Vxlan,
    /// Through the tunnel only, encrypted
    Wireguard,
}

/// What the administrator decides, and who this node is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RoutingConfig {
    /// This node's name.
    pub node: String,
    /// Its addresses, until the control plane shows it.
    pub addresses: Vec<IpAddr>,
    /// Which way.
    pub routing: Routing,
    /// UDP port of the tunnel, the same on all nodes.
    pub port: u16,
    /// With [`Routing::Wireguard`]: this node's side of it, or why it has none.
    pub wireguard: Option<Result<OwnKey, String>>,
    /// Where third-party network lists are: with one, [`Routing::Auto`] leaves the ways to it.
    pub conf_dir: PathBuf,
}

/// What the machine has.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Facts {
    /// Those that carry an address.
    pub links: Vec<Link>,
    /// Their addresses, with the networks that are on them, in the kernel's order.
    pub networks: Vec<(u32, IpNet)>,
    /// The main routing table.
    pub table: Vec<Route>,
}

/// What is to be.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct RoutingPlan {
    /// Routes and tunnel.
    pub wanted: Wanted,
    /// How each node is reached.
    pub reached: Vec<ReachedNode>,
    /// Addresses of nodes whose answers to our pods come by the way that they are asked: the node of a
    /// direct route, of the route's family. None: others than we know the ways.
    pub near: Option<BTreeSet<IpAddr>>,
    /// What is not reached and why, a sentence each.
    pub problems: Vec<String>,
    /// The size of packets that every way carries; none: nothing is known of it.
    pub mtu: Option<u32>,
}

struct Peer<'a> {
    name: &'a str,
    addresses: Vec<IpAddr>,
    /// Its public key; empty: it has told none.
    key: &'a [u8],
}

/// The pure core.
pub fn plan(config: &RoutingConfig, view: &View, facts: &Facts) -> RoutingPlan {
    let planner = Planner::new(config, view, facts);
    planner.plan(view)
}

struct Planner<'a> {
    config: &'a RoutingConfig,
    facts: &'a Facts,
    own_prefixes: Vec<IpNet>,
    own_addresses: Vec<IpAddr>,
    plan: RoutingPlan,
    /// Prefixes that have a route, and whose they are.
    taken: Vec<(IpNet, String)>,
    ends: BTreeMap<String, TunnelEnd>,
    /// By public key, with whose it is.
    peers: BTreeMap<Key, (String, wireguard::Peer)>,
}

impl<'a> Planner<'a> {
    fn new(config: &'a RoutingConfig, view: &View, facts: &'a Facts) -> Self {
        let own = view.nodes.get(&config.node);
        let mut own_addresses = own.map(|own| addresses(&own.addresses)).unwrap_or_default();
        if own_addresses.is_empty() {
            own_addresses.clone_from(&config.addresses);
        }
        let mut own_prefixes: Vec<IpNet> = view.settings.pod_cidrs().collect();
        let of_view = own.map(|own| prefixes(&own.pod_cidr)).unwrap_or_default();
        own_prefixes.extend(of_view.into_iter().filter_map(Result::ok));
        own_prefixes.sort();
        own_prefixes.dedup();
        Self {
            config,
            facts,
            own_prefixes,
            own_addresses,
            plan: RoutingPlan {
                near: Some(BTreeSet::new()),
                ..RoutingPlan::default()
            },
            taken: Vec::new(),
            ends: BTreeMap::new(),
            peers: BTreeMap::new(),
        }
    }

    fn plan(mut self, view: &View) -> RoutingPlan {
        let mut all = Vec::new();
        for (name, node) in view
            .nodes
            .iter()
            .filter(|(name, _)| **name != self.config.node)
        {
            for prefix in prefixes(&node.pod_cidr) {
                let peer = Peer {
                    name,
                    addresses: addresses(&node.addresses),
                    key: &node.wireguard_key,
                };
                match prefix {
                    Ok(prefix) => all.push((prefix, peer)),
                    Err(text) => self.problem(
                        name,
                        format!("its pod prefix {text:?} is none; want one like 10.244.1.0/24"),
                    ),
                }
            }
        }
        // Of two that claim one prefix it stays with the one that has it.
        all.sort_by_key(|(prefix, peer)| (!self.has_route(*prefix, peer), peer.name.to_owned()));
        for (prefix, peer) in all {
            if let Err(words) = self.route(prefix, &peer) {
                self.problem(peer.name, words);
            }
        }
        self.finish()
    }

    fn finish(mut self) -> RoutingPlan {
        let local = self.local();
        let base = local
            .and_then(|local| self.link_with(local))
            .map(|link| link.mtu);
        let mut mtus: Vec<u32> = base.into_iter().collect();
        for route in &self.plan.wanted.routes {
            if let Way::Link(index) = route.way {
                mtus.extend(self.link(index).map(|link| link.mtu));
            }
        }
        let is_tunnelled = !self.ends.is_empty()
            || matches!(self.config.routing, Routing::Vxlan | Routing::Wireguard);
        if let (true, Some(own), Some(base)) = (is_tunnelled, local, base) {
            let (local, base) = match self.config.routing {
                Routing::Wireguard => {
                    let inside = base.saturating_sub(wireguard::OVERHEAD);
                    self.plan.wanted.wireguard = self.wireguard(own, inside);
                    (IpAddr::V6(wireguard::inner_address(own)), inside)
                }
                _ => (own, base),
            };
            let mtu = base.saturating_sub(tunnel::overhead(local));
            mtus.push(mtu);
            if !self.ends.is_empty() {
                self.plan.wanted.tunnel = Some(self.tunnel(local, mtu));
            }
        }
        self.plan.mtu = mtus.into_iter().min();
        self.plan.wanted.routes.sort();
        self.plan.reached.sort();
        self.plan.problems.sort();
        self.plan
    }

    fn tunnel(&self, local: IpAddr, mtu: u32) -> Tunnel {
        let gateways = self.own_prefixes.iter().filter_map(gateway);
        Tunnel {
            vni: tunnel::VNI_DEFAULT,
            port: self.config.port,
            local,
            mac: tunnel::mac_of_node(local),
            mtu,
            addresses: gateways.map(IpNet::from).collect(),
            ends: self.ends.values().cloned().collect(),
        }
    }

    /// There as soon as this node has a key: it answers who comes first.
    fn wireguard(&self, own: IpAddr, mtu: u32) -> Option<WireGuard> {
        let key = self.config.wireguard.as_ref()?.as_ref().ok()?;
        let peers = self.peers.iter().map(|(key, (_, peer))| (*key, *peer));
        Some(WireGuard {
            private_key: key.private,
            port: key.port,
            inner: wireguard::inner_address(own),
            mtu,
            peers: peers.collect(),
        })
    }

    fn problem(&mut self, peer: &str, words: String) {
        self.plan.problems.push(format!("node {peer}: {words}"));
    }

    /// Whether the table has a direct route of ours to it.
    fn has_route(&self, prefix: IpNet, peer: &Peer<'_>) -> bool {
        let mut ours = self.facts.table.iter();
        ours.any(|route| {
            route.protocol == ROUTE_PROTOCOL
                && route.destination == prefix
                && route
                    .gateway
                    .is_some_and(|via| peer.addresses.contains(&via))
        })
    }

    fn route(&mut self, prefix: IpNet, peer: &Peer<'_>) -> Result<(), String> {
        if peer.addresses.is_empty() {
            return Err(format!(
                "it has no address, so its pods ({prefix}) are not reached"
            ));
        }
        self.check(prefix, peer)?;
        let mut within = self.foreign_within(prefix);
        within.retain(|route| route.destination != prefix);
        if let Some(route) = within.first() {
            let words = format!(
                "the route {} takes a part of its pods' prefix {prefix}",
                self.shown(route)
            );
            self.problem(peer.name, words);
        }
        let direct = match self.config.routing {
            Routing::Vxlan | Routing::Wireguard => None,
            Routing::Auto | Routing::Direct => self.direct(prefix, peer),
        };
        let (route, way) = match direct {
            Some((link, via)) => (
                NodeRoute {
                    pod_cidr: prefix,
                    via,
                    way: Way::Link(link.index),
                },
                format!("direct ({})", link.name),
            ),
            None if self.config.routing == Routing::Direct => {
                return Err(format!(
                    "none of its addresses ({}) is on a link of this node, and --routing direct \
                     allows no tunnel: its pods ({prefix}) are not reached",
                    list(&peer.addresses)
                ));
            }
            None if self.config.routing == Routing::Wireguard => {
                (self.through_tunnel(prefix, peer)?, "wireguard".to_owned())
            }
            None => (self.through_tunnel(prefix, peer)?, "vxlan".to_owned()),
        };
        self.taken.push((prefix, peer.name.to_owned()));
        if let (Way::Link(_), Some(near)) = (route.way, &mut self.plan.near) {
            let of_family = |it: &&IpAddr| it.is_ipv4() == prefix.addr().is_ipv4();
            near.extend(peer.addresses.iter().filter(of_family));
        }
        self.plan.reached.push(ReachedNode {
            node: peer.name.to_owned(),
            prefix,
            is_direct: matches!(route.way, Way::Link(_)),
            way,
        });
        self.plan.wanted.routes.push(route);
        Ok(())
    }

    /// What is in the way of a route to this prefix.
    fn check(&self, prefix: IpNet, peer: &Peer<'_>) -> Result<(), String> {
        if prefix.prefix_len() == 0 {
            return Err(format!("its pod prefix {prefix} is everything"));
        }
        if let Some((other, owner)) = self.taken.iter().find(|(other, _)| overlap(other, &prefix)) {
            return Err(format!(
                "its pod prefix {prefix} overlaps {other} of node {owner}"
            ));
        }
        if let Some(own) = self.own_prefixes.iter().find(|own| overlap(own, &prefix)) {
            return Err(format!(
                "its pod prefix {prefix} overlaps {own}, this node's own"
            ));
        }
        let mut networks = self.facts.networks.iter();
        if let Some((index, network)) = networks.find(|(index, network)| {
            overlap(&network.trunc(), &prefix) && self.name(*index) != TUNNEL_NAME
        }) {
            return Err(format!(
                "its pod prefix {prefix} overlaps {}, the network of this node's link {}",
                network.trunc(),
                self.name(*index)
            ));
        }
        if let Some(inside) = peer.addresses.iter().find(|it| prefix.contains(*it)) {
            return Err(format!(
                "its own address {inside} lies in its pods' prefix {prefix}"
            ));
        }
        let metric = match prefix {
            IpNet::V4(_) => METRIC_V4,
            IpNet::V6(_) => METRIC_V6,
        };
        let foreign = self.foreign_within(prefix);
        let mut same = foreign.iter().filter(|route| route.destination == prefix);
        match same.find(|route| route.metric <= metric) {
            Some(route) => Err(format!(
                "the route {} is in the way of its pods' prefix: remove it, and its pods are reached",
                self.shown(route)
            )),
            None => Ok(()),
        }
    }

    /// Routes of others to this prefix or to a part of it.
    fn foreign_within(&self, prefix: IpNet) -> Vec<&'a Route> {
        let foreign = self.facts.table.iter().filter(|route| {
            route.protocol != ROUTE_PROTOCOL && prefix.contains(&route.destination)
        });
        foreign.collect()
    }

    /// As `ip route` would show it.
    fn shown(&self, route: &Route) -> String {
        let via = route.gateway.map(|via| format!(" via {via}"));
        let link = route.link.map(|index| format!(" dev {}", self.name(index)));
        format!(
            "{}{}{} (proto {})",
            route.destination,
            via.unwrap_or_default(),
            link.unwrap_or_default(),
            route.protocol
        )
    }

    /// A link of ours with one of the peer's addresses on it, and that address.
    fn direct(&self, prefix: IpNet, peer: &Peer<'_>) -> Option<(&'a Link, IpAddr)> {
        let of_family = |it: &&IpAddr| it.is_ipv4() == prefix.addr().is_ipv4();
        peer.addresses.iter().filter(of_family).find_map(|address| {
            let mut on = self
                .facts
                .networks
                .iter()
                .filter(|(_, network)| network.contains(address) && network.addr() != *address);
            let link = on.find_map(|(index, _)| {
                let link = self.link(*index)?;
                let is_own = link.name == BRIDGE_NAME || link.name == TUNNEL_NAME;
                (link.up && !is_own && link.index != LOOPBACK_INDEX).then_some(link)
            })?;
            Some((link, *address))
        })
    }

    fn through_tunnel(&mut self, prefix: IpNet, peer: &Peer<'_>) -> Result<NodeRoute, String> {
        let unreached = |words: String| format!("{words}: its pods ({prefix}) are not reached");
        let Some(local) = self.local() else {
            return Err(unreached("this node has no address of its own".into()));
        };
        if self.link_with(local).is_none() {
            let words = format!("this node's address {local} is on none of its links");
            return Err(unreached(words));
        }
        let mut remotes = peer.addresses.iter();
        let Some(remote) = remotes.find(|it| it.is_ipv4() == local.is_ipv4()) else {
            return Err(unreached(format!(
                "this node's tunnel leaves from {local}, and it has no address of that family ({})",
                list(&peer.addresses)
            )));
        };
        if self.own_addresses.contains(remote) {
            return Err(unreached(format!(
                "its address {remote} is this node's own"
            )));
        }
        let inside = |prefix: &IpNet| prefix.contains(remote);
        if let Some(prefix) = self.own_prefixes.iter().find(|prefix| inside(prefix)) {
            return Err(unreached(format!(
                "its address {remote} lies in this node's pod prefix {prefix}"
            )));
        }
        let Some(via) = gateway(&prefix) else {
            return Err(unreached(format!(
                "its pod prefix {prefix} has no room for a gateway"
            )));
        };
        let mut new = TunnelEnd {
            mac: tunnel::mac_of_node(*remote),
            remote: *remote,
            gateways: Vec::new(),
        };
        if self.config.routing == Routing::Wireguard {
            let inner = wireguard::inner_address(*remote);
            let sealed = self.seal(peer, *remote, inner).map_err(unreached)?;
            self.peers.insert(
                sealed,
                (
                    peer.name.to_owned(),
                    wireguard::Peer {
                        endpoint: SocketAddr::new(*remote, self.own_port()),
                        inner,
                    },
                ),
            );
            // Its tunnel begins there, so that is what its device's hardware address follows from.
            new.remote = inner.into();
            new.mac = tunnel::mac_of_node(new.remote);
        }
        let mut others = self.ends.iter();
        if let Some((other, _)) =
            others.find(|(name, end)| name.as_str() != peer.name && end.mac == new.mac)
        {
            return Err(unreached(format!(
                "node {other} has the same address {remote}"
            )));
        }
        let end = self.ends.entry(peer.name.to_owned()).or_insert(new);
        end.gateways.push(via);
        Ok(NodeRoute {
            pod_cidr: prefix,
            via,
            way: Way::Tunnel,
        })
    }

    /// The key of a peer that can be reached encrypted.
    fn seal(&self, peer: &Peer<'_>, remote: IpAddr, inner: Ipv6Addr) -> Result<Key, String> {
        match &self.config.wireguard {
            Some(Ok(_)) => {}
            Some(Err(words)) => return Err(words.clone()),
            None => return Err("this node has no WireGuard key".into()),
        }
        let Ok(key) = Key::try_from(peer.key) else {
            return Err(
                "it has told no WireGuard key: start its agent with --routing wireguard too".into(),
            );
        };
        let mut others = self.peers.iter();
        let other = others.find(|(other, (name, peer_of))| {
            name != peer.name && (**other == key || peer_of.inner == inner)
        });
        match other {
            Some((other, (name, _))) if *other == key => {
                Err(format!("node {name} has the same WireGuard key"))
            }
            Some((_, (name, _))) => Err(format!(
                "node {name} has the same inner address as {remote}"
            )),
            None => Ok(key),
        }
    }

    fn own_port(&self) -> u16 {
        let own = self
            .config
            .wireguard
            .as_ref()
            .and_then(|own| own.as_ref().ok());
        own.map_or(wireguard::PORT_DEFAULT, |own| own.port)
    }

    /// The address that the tunnel leaves from.
    fn local(&self) -> Option<IpAddr> {
        let mut own = self.own_addresses.iter();
        let v4 = own.clone().find(|address| address.is_ipv4());
        v4.or_else(|| own.next()).copied()
    }

    fn link(&self, index: u32) -> Option<&'a Link> {
        self.facts.links.iter().find(|link| link.index == index)
    }

    fn link_with(&self, address: IpAddr) -> Option<&'a Link> {
        let mut networks = self.facts.networks.iter();
        let (index, _) = networks.find(|(_, network)| network.addr() == address)?;
        self.link(*index)
    }

    fn name(&self, index: u32) -> String {
        match self.link(index) {
            Some(link) => link.name.clone(),
            None => index.to_string(),
        }
    }
}

/// The gateway of a node's pods: the first host, as `gantry_cni::ipam` has it.
fn gateway(prefix: &IpNet) -> Option<IpAddr> {
    let range = gantry_cni::ipam::Range::new(*prefix).ok()?;
    Some(range.gateway())
}

fn overlap(a: &IpNet, b: &IpNet) -> bool {
    a.contains(b) || b.contains(a)
}

/// `10.244.1.0/24`, or one per family: `10.244.1.0/24,fd00:1::/64`. What is none is returned as it is.
fn prefixes(text: &str) -> Vec<Result<IpNet, String>> {
    let parts = text
        .split(',')
        .map(str::trim)
        .filter(|part| !part.is_empty());
    let parsed = parts.map(|part| match part.parse::<IpNet>() {
        Ok(net) => Ok(net.trunc()),
        Err(_) => Err(part.to_owned()),
    });
    parsed.collect()
}

/// Of 4 or 16 bytes each; others are none.
fn addresses(all: &[impl AsRef<[u8]>]) -> Vec<IpAddr> {
    let parse = |bytes: &[u8]| match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from),
        _ => <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from),
    };
    all.iter()
        .filter_map(|bytes| parse(bytes.as_ref()))
        .collect()
}

/// A node's own addresses, in its order.
pub fn node_addresses(node: &proto::NodeRoute) -> Vec<IpAddr> {
    addresses(&node.addresses)
}

fn list(addresses: &[IpAddr]) -> String {
    let texts: Vec<String> = addresses.iter().map(ToString::to_string).collect();
    texts.join(", ")
}
