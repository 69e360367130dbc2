//! Pods without a bridge: the node's end of the veth is no port, and routes lead to the pod's addresses.
//!
//! ```text
//!  pod netns                                        node netns
//!  eth0 10.244.1.5/32                               gv…      10.244.1.5 dev gv… src 10.244.1.1
//!    default via 10.244.1.1 dev eth0 onlink           neighbour 10.244.1.5 is the pod's MAC
//!    neighbour 10.244.1.1 is the MAC of gv…         gantry0  10.244.1.1, no ports
//! ```
//! A bridge takes 1,023 ports; routes have no such end. Both neighbour entries are permanent: nobody has
//! to answer for anything, and the kernel's limit of neighbours (1,024 for all namespaces together)
//! does not count them.
//!
//! `gantry0` stays: it has the gateways' addresses, which the node's own packets to pods come from, and
//! its prefix takes in what is sent to an address of no pod. Pods that are ports of it, from a time
//! before the node was told otherwise, ask there for the routed ones: the node answers for those
//! (proxy ARP, and a proxy entry for each IPv6 address), and only there.
//!
//! What is made here is found without being remembered: links by their hardware address, routes by
//! [`POD_ROUTE_PROTOCOL`]; routes and neighbours go with the link.

use std::collections::{BTreeSet, HashSet};
use std::net::IpAddr;

use ipnet::IpNet;

use super::{HOST_IFNAME_PREFIX, host_ifnames};
use crate::config::{BridgeNetwork, ROUTED_MAC};
use crate::error::CniError;
use crate::ipam::Owner;
use crate::netlink::{Link, Netlink, POD_ROUTE_PROTOCOL, Route};
use crate::sysctl;

/// Whether it is the node's end of a routed pod's veth. (One in 16,000 addresses that the kernel draws
/// begins so too, therefore ports of a bridge are none.)
pub fn is_of(link: &Link) -> bool {
    link.kind == "veth"
        && link.master.is_none()
        && link.name.starts_with(HOST_IFNAME_PREFIX)
        && link.mac.is_some_and(|mac| mac.starts_with(&ROUTED_MAC))
}

/// An address alone: `10.244.1.5/32`.
pub(super) fn alone(address: IpAddr) -> IpNet {
    IpNet::from(address)
}

/// The node's ways to a pod. Idempotent.
///
/// * `bridge` – has the gateways' addresses.
/// * `pod_mac` – of the interface in the pod.
pub(super) async fn ensure_ways(
    host: &Netlink,
    network: &BridgeNetwork,
    bridge: &Link,
    port: &Link,
    pod_mac: [u8; 6],
    addresses: &[IpAddr],
) -> Result<(), CniError> {
    for (address, range) in addresses.iter().zip(&network.ranges) {
        host.ensure_neighbour(port.index, *address, pod_mac).await?;
        host.ensure_route(&Route {
            destination: alone(*address),
            link: Some(port.index),
            source: Some(range.gateway()),
            protocol: POD_ROUTE_PROTOCOL,
            ..Route::default()
        })
        .await?;
        answer_for_others(&bridge.name, address.is_ipv4())?;
        if address.is_ipv6() {
            host.ensure_proxy(bridge.index, *address).await?;
        }
    }
    Ok(())
}

/// The node answers at the bridge for those whom its routes know elsewhere, at once.
fn answer_for_others(bridge: &str, is_v4: bool) -> Result<(), CniError> {
    let (family, proxy) = match is_v4 {
        true => ("ipv4", "proxy_arp"),
        false => ("ipv6", "proxy_ndp"),
    };
    sysctl::ensure(&format!("net/{family}/conf/{bridge}/{proxy}"), "1")?;
    sysctl::ensure(&format!("net/{family}/neigh/{bridge}/proxy_delay"), "0")?;
    Ok(())
}

/// Nobody answers for these at the bridge any more: they are about to be given back.
pub async fn forget(
    host: &Netlink,
    network: &BridgeNetwork,
    addresses: &[IpAddr],
) -> Result<(), CniError> {
    let v6: Vec<IpAddr> = addresses.iter().copied().filter(IpAddr::is_ipv6).collect();
    if v6.is_empty() {
        return Ok(());
    }
    let Some(bridge) = host.link_by_name(&network.bridge).await? else {
        return Ok(());
    };
    for address in v6 {
        host.remove_proxy(bridge.index, address).await?;
    }
    Ok(())
}

/// Removes the routed links of every attachment that is not in `valid`, and answers for addresses that
/// no route leads to any more; gives answers that lack. Goes on after a failure and returns all of them.
/// Leases are [`super::collect`]'s.
pub async fn collect(
    host: &Netlink,
    network: &BridgeNetwork,
    valid: &HashSet<Owner>,
) -> Result<(), CniError> {
    let kept = host_ifnames(network, valid);
    let mut errors = Vec::new();
    for link in host.links().await?.iter().filter(|link| is_of(link)) {
        if !kept.contains(&link.name) {
            errors.extend(host.remove_link(link.index).await.err());
        }
    }
    if let Some(bridge) = host.link_by_name(&network.bridge).await? {
        errors.extend(collect_proxies(host, &bridge).await.err());
    }
    CniError::all(errors)
}

async fn collect_proxies(host: &Netlink, bridge: &Link) -> Result<(), CniError> {
    let answered: BTreeSet<IpAddr> = host.proxies(bridge.index).await?.into_iter().collect();
    let routed = host.routes().await?.into_iter();
    let routed = routed.filter(|route| route.protocol == POD_ROUTE_PROTOCOL);
    let routed: BTreeSet<IpAddr> = routed
        .map(|route| route.destination.addr())
        .filter(IpAddr::is_ipv6)
        .collect();
    let mut errors = Vec::new();
    for address in answered.difference(&routed) {
        errors.extend(host.remove_proxy(bridge.index, *address).await.err());
    }
    for address in routed.difference(&answered) {
        errors.extend(host.ensure_proxy(bridge.index, *address).await.err());
    }
    CniError::all(errors)
}
