//! CHECK and STATUS: is there what ADD answered, and would ADD work now?

use ipnet::IpNet;

use super::{host_ifname, ipam, leasing, routed};
use crate::config::{BridgeNetwork, PodLink};
use crate::error::CniError;
use crate::ipam::{Ipam, Owner};
use crate::netlink::{Netlink, Route};
use crate::netns::Netns;

/// CHECK: is the attachment what ADD answered?
///
/// * `expected` – the addresses of prevResult.
///
/// # Errors
/// [`CniError::Check`] says what differs.
pub async fn check(
    host: &Netlink,
    network: &BridgeNetwork,
    owner: &Owner,
    netns: &Netns,
    expected: &[IpNet],
) -> Result<(), CniError> {
    let wrong = |text: String| Err(CniError::Check(text));
    let name = &network.bridge;
    let Some(bridge) = host.link_by_name(name).await?.filter(|link| link.up) else {
        return wrong(format!("bridge {name}: missing or down"));
    };
    let host_name = host_ifname(&network.name, owner);
    let Some(host_link) = host.link_by_name(&host_name).await? else {
        return wrong(format!("veth {host_name}: missing"));
    };
    let (is_joined, how) = match network.link {
        PodLink::Bridge => (host_link.master == Some(bridge.index), "an active port of"),
        PodLink::Routed => (routed::is_of(&host_link), "up and routed beside"),
    };
    if !is_joined || !host_link.up {
        return wrong(format!("veth {host_name}: not {how} bridge {name}"));
    }
    let ways = match network.link {
        PodLink::Bridge => Vec::new(),
        PodLink::Routed => host.routes().await?,
    };
    let pod = Netlink::open_in(netns).await?;
    let (ifname, at) = (&owner.ifname, netns.path().display());
    let Some(link) = pod.link_by_name(ifname).await?.filter(|link| link.up) else {
        return wrong(format!("interface {ifname} in {at}: missing or down"));
    };
    if link.peer != Some(host_link.index) {
        return wrong(format!(
            "interface {ifname} in {at}: not the other end of {host_name}"
        ));
    }
    let addresses = pod.addresses(link.index).await?;
    let routes = pod.routes().await?;
    let leases = leasing(&ipam(network)?, Ipam::leases).await?;
    for wanted in expected {
        if !addresses.contains(wanted) {
            return wrong(format!(
                "interface {ifname} in {at}: address {wanted} is missing"
            ));
        }
        if leases.get(&wanted.addr()) != Some(owner) {
            return wrong(format!(
                "address {wanted}: not leased to {}",
                owner.container_id
            ));
        }
        let leads_there =
            |route: &Route| route.destination == *wanted && route.link == Some(host_link.index);
        if network.link == PodLink::Routed && !ways.iter().any(leads_there) {
            return wrong(format!("route to {wanted} by {host_name}: missing"));
        }
        let is_ours = |route: &&Route| {
            route.destination.prefix_len() == 0
                && route.link == Some(link.index)
                && route.destination.addr().is_ipv4() == wanted.addr().is_ipv4()
        };
        if !routes.iter().any(|route| is_ours(&route)) {
            return wrong(format!(
                "default route by {ifname} in {at}: missing for {wanted}"
            ));
        }
    }
    Ok(())
}

/// STATUS: would ADD work now?
pub async fn status(host: &Netlink, network: &BridgeNetwork) -> Result<(), CniError> {
    let not_ready = |text: String| Err(CniError::NotReady(text));
    if let Some(link) = host.link_by_name(&network.bridge).await?
        && link.kind != "bridge"
    {
        return not_ready(format!("link {} exists and is no bridge", network.bridge));
    }
    let ipam = ipam(network)?;
    let leases = leasing(&ipam, Ipam::leases).await?;
    for range in ipam.ranges() {
        let prefix = range.prefix();
        let used = leases
            .keys()
            .filter(|address| prefix.contains(*address))
            .count() as u64;
        if used >= range.size() {
            return not_ready(format!(
                "all {} addresses of {prefix} are leased",
                range.size()
            ));
        }
    }
    Ok(())
}
