//! Attaching a network namespace to the bridge: ADD, DEL, CHECK, STATUS, GC.
//!
//! ```text
//! ADD   bridge ─► lease ─► veth (one message, peer born in the pod's netns) ─► address ─► default route
//!         ─► without the bridge: the node's routes to it, see [`routed`]
//! DEL   veth ─► lease           an address is free only when nothing answers for it any more
//! ```
//! Each step is idempotent, so ADD after a crash finishes what is there, and DEL after a crash
//! removes what is there. A failed ADD undoes what it made itself.
//!
//! The host end's name is a hash of (network, container id, interface): nothing has to be
//! remembered to find it again. Ports of the bridge with other names are never touched.

use std::collections::HashSet;
use std::net::IpAddr;

use ipnet::IpNet;

use crate::config::{BridgeNetwork, PodLink, mac_of, routed_mac_of};
use crate::error::CniError;
use crate::ipam::{Ipam, Owner, boot_id};
use crate::netlink::{BridgeSpec, LOOPBACK_INDEX, Link, Netlink, Route, VethSpec};
use crate::netns::Netns;
use crate::result::{Attached, AttachedAddress};

mod check;
pub mod routed;
mod veth;

pub use check::{check, status};
pub use veth::{HOST_IFNAME_PREFIX, host_ifname};

use veth::ensure_veth;

/// MTU where neither the configuration nor an uplink says one.
const MTU_DEFAULT: u32 = 1500;

/// The leases of `network` in this boot.
pub fn ipam(network: &BridgeNetwork) -> Result<Ipam, CniError> {
    let boot_id = boot_id()?;
    let ranges = network.ranges.clone();
    Ok(Ipam::new(
        &network.lease_dir,
        &network.name,
        &boot_id,
        ranges,
    ))
}

/// Runs a lease operation off the runtime's workers: it takes a file lock.
async fn leasing<T, F>(ipam: &Ipam, work: F) -> Result<T, CniError>
where
    T: Send + 'static,
    F: FnOnce(&Ipam) -> Result<T, CniError> + Send + 'static,
{
    let ipam = ipam.clone();
    match tokio::task::spawn_blocking(move || work(&ipam)).await {
        Ok(result) => result,
        Err(error) => Err(CniError::Io {
            context: "lease an address".into(),
            source: std::io::Error::other(error),
        }),
    }
}

/// Makes the bridge exist, up, with its addresses; its MTU is the configured one or, when it is
/// created, that of the uplink. Parallel callers may race: all succeed.
pub async fn ensure_bridge(host: &Netlink, network: &BridgeNetwork) -> Result<Link, CniError> {
    let name = network.bridge.as_str();
    let mut found = host.link_by_name(name).await?;
    if found.is_none() {
        let mtu = match network.mtu {
            Some(mtu) => mtu,
            None => host.uplink_mtu().await?.unwrap_or(MTU_DEFAULT),
        };
        let gateway = network.gateways().first().map(IpNet::addr);
        let mac = mac_of(gateway.unwrap_or(IpAddr::from([0; 4])));
        match host.create_bridge(&BridgeSpec { name, mac, mtu }).await {
            Err(error) if error.raw_os_error() != Some(libc::EEXIST) => return Err(error),
            _ => found = host.link_by_name(name).await?,
        }
    }
    let Some(mut bridge) = found else {
        return Err(CniError::Container(format!(
            "bridge {name}: removed while being used"
        )));
    };
    if bridge.kind != "bridge" {
        return Err(CniError::Config {
            field: "bridge".into(),
            message: format!(
                "link {name} exists and is of kind {:?}, not a bridge: rename it or configure \
                 another name",
                bridge.kind
            ),
        });
    }
    if let Some(mtu) = network.mtu.filter(|mtu| *mtu != bridge.mtu) {
        host.set_mtu(bridge.index, mtu).await?;
        bridge.mtu = mtu;
    }
    if !bridge.up {
        host.set_up(bridge.index).await?;
        bridge.up = true;
    }
    for gateway in network.gateways() {
        host.ensure_address(bridge.index, gateway).await?;
    }
    Ok(bridge)
}

/// Attaches `netns` to the network as interface `owner.ifname`. Idempotent.
///
/// # Errors
/// After an error nothing of this call is left, except the bridge.
pub async fn add(
    host: &Netlink,
    network: &BridgeNetwork,
    owner: &Owner,
    netns: &Netns,
) -> Result<Attached, CniError> {
    if netns.inode()? == Netns::current()?.inode()? {
        return Err(CniError::Container(format!(
            "{}: is the node's own network namespace; a pod needs one of its own",
            netns.path().display()
        )));
    }
    let ipam = ipam(network)?;
    let bridge = ensure_bridge(host, network).await?;
    let allocation = {
        let owner = owner.clone();
        leasing(&ipam, move |ipam| ipam.allocate(&owner)).await?
    };
    let attached = wire(host, network, owner, netns, &bridge, &allocation.addresses).await;
    if attached.is_err() && allocation.new {
        // The first error is the one to report; what fails here is found by the next DEL or GC.
        let undone = remove(host, network, owner, &allocation.addresses).await;
        if let Err(error) = undone {
            tracing::warn!(%error, container = %owner.container_id, "undo of a failed ADD");
        }
    }
    attached
}

/// The node's side of an attachment that is in place.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Standing {
    /// The index of the veth end on the node.
    pub port: u32,
    /// See [`Attached::gateway_mac`].
    pub gateway_mac: [u8; 6],
}

/// The node's side of an attachment, if it is in place: the veth is up, and a port of the bridge or
/// with the ways to the pod, which are mended. Its other end lives and dies with it; addresses and routes
/// in there are the container's to change.
pub async fn standing(
    host: &Netlink,
    network: &BridgeNetwork,
    owner: &Owner,
    addresses: &[IpAddr],
) -> Result<Option<Standing>, CniError> {
    let port = host
        .link_by_name(&host_ifname(&network.name, owner))
        .await?;
    let Some(port) = port.filter(|port| port.up) else {
        return Ok(None);
    };
    match network.link {
        PodLink::Bridge => {
            let bridge = host.link_by_name(&network.bridge).await?;
            let bridge = bridge.filter(|bridge| bridge.up && port.master == Some(bridge.index));
            Ok(bridge.map(|bridge| Standing::of(&port, &bridge)))
        }
        PodLink::Routed => {
            let Some(first) = addresses.first().filter(|_| routed::is_of(&port)) else {
                return Ok(None);
            };
            let (bridge, mac) = (ensure_bridge(host, network).await?, mac_of(*first));
            routed::ensure_ways(host, network, &bridge, &port, mac, addresses).await?;
            Ok(Some(Standing::of(&port, &port)))
        }
    }
}

impl Standing {
    fn of(port: &Link, gateway: &Link) -> Self {
        Self {
            port: port.index,
            gateway_mac: gateway.mac.unwrap_or_default(),
        }
    }
}

/// The link, its addresses and its routes.
async fn wire(
    host: &Netlink,
    network: &BridgeNetwork,
    owner: &Owner,
    netns: &Netns,
    bridge: &Link,
    addresses: &[IpAddr],
) -> Result<Attached, CniError> {
    let host_name = host_ifname(&network.name, owner);
    let Some(first) = addresses.first() else {
        return Err(CniError::Config {
            field: "subnets".into(),
            message: "empty: no address to give".into(),
        });
    };
    let veth = VethSpec {
        host_name: &host_name,
        peer_name: &owner.ifname,
        host_mac: (network.link == PodLink::Routed).then(|| routed_mac_of(*first)),
        peer_mac: mac_of(*first),
        netns,
        master: (network.link == PodLink::Bridge).then_some(bridge.index),
        mtu: bridge.mtu,
    };
    let pod = Netlink::open_in(netns).await?;
    let (host_link, peer) = ensure_veth(host, &pod, &veth).await?;
    let mut attached = Attached {
        bridge: bridge.name.clone(),
        bridge_mac: bridge.mac.unwrap_or_default(),
        host_ifname: host_name.clone(),
        host_ifindex: host_link.index,
        host_mac: host_link.mac.unwrap_or_default(),
        gateway_mac: match network.link {
            PodLink::Bridge => bridge.mac.unwrap_or_default(),
            PodLink::Routed => host_link.mac.unwrap_or_default(),
        },
        ifname: owner.ifname.clone(),
        mac: peer.mac.unwrap_or(veth.peer_mac),
        mtu: bridge.mtu,
        netns: netns.path().display().to_string(),
        addresses: Vec::with_capacity(addresses.len()),
    };
    // The container's own; a runtime may have done it already.
    pod.set_up(LOOPBACK_INDEX).await?;
    for (address, range) in addresses.iter().zip(&network.ranges) {
        let gateway = range.gateway();
        let mut route = default_route(gateway, peer.index);
        let address = match network.link {
            PodLink::Bridge => IpNet::new_assert(*address, range.prefix().prefix_len()),
            PodLink::Routed => routed::alone(*address),
        };
        pod.ensure_address(peer.index, address).await?;
        if network.link == PodLink::Routed {
            route.onlink = true;
            pod.ensure_neighbour(peer.index, gateway, attached.host_mac)
                .await?;
        }
        pod.ensure_route(&route).await?;
        attached
            .addresses
            .push(AttachedAddress { address, gateway });
    }
    if network.link == PodLink::Routed {
        routed::ensure_ways(host, network, bridge, &host_link, attached.mac, addresses).await?;
    }
    Ok(attached)
}

/// The default route of a pod.
fn default_route(gateway: IpAddr, link: u32) -> Route {
    let any = match gateway {
        IpAddr::V4(_) => IpAddr::from([0; 4]),
        IpAddr::V6(_) => IpAddr::from([0; 16]),
    };
    Route {
        destination: IpNet::new_assert(any, 0),
        gateway: Some(gateway),
        link: Some(link),
        protocol: libc::RTPROT_BOOT,
        ..Route::default()
    }
}

/// Detaches: the link first, then the lease. Ok when there is nothing (left).
///
/// * `addresses` – the attachment's, as far as known: nobody answers for those of a routed one any more.
pub async fn remove(
    host: &Netlink,
    network: &BridgeNetwork,
    owner: &Owner,
    addresses: &[IpAddr],
) -> Result<(), CniError> {
    if let Some(link) = host
        .link_by_name(&host_ifname(&network.name, owner))
        .await?
    {
        host.remove_link(link.index).await?;
    }
    release(host, network, owner, addresses).await
}

/// Keeps these addresses for a later ADD of this owner, where they are free.
pub async fn prefer(
    network: &BridgeNetwork,
    owner: &Owner,
    wanted: Vec<IpAddr>,
) -> Result<(), CniError> {
    let owner = owner.clone();
    leasing(&ipam(network)?, move |ipam| ipam.prefer(&owner, &wanted)).await
}

/// Gives the addresses back. Only for a caller who knows that the link is gone.
pub async fn release(
    host: &Netlink,
    network: &BridgeNetwork,
    owner: &Owner,
    addresses: &[IpAddr],
) -> Result<(), CniError> {
    if network.link == PodLink::Routed {
        routed::forget(host, network, addresses).await?;
    }
    let owner = owner.clone();
    leasing(&ipam(network)?, move |ipam| ipam.release(&owner)).await?;
    Ok(())
}

/// The names of these attachments' ends on the node.
fn host_ifnames(network: &BridgeNetwork, owners: &HashSet<Owner>) -> HashSet<String> {
    let names = owners.iter();
    names
        .map(|owner| host_ifname(&network.name, owner))
        .collect()
}

/// GC: removes the links and leases of every attachment that is not in `valid`. Goes on after a
/// failure and returns all of them.
pub async fn collect(
    host: &Netlink,
    network: &BridgeNetwork,
    valid: &HashSet<Owner>,
) -> Result<(), CniError> {
    let mut errors = Vec::new();
    let kept = host_ifnames(network, valid);
    let bridge = host.link_by_name(&network.bridge).await?;
    if let Some(bridge) = bridge {
        for link in ports(&host.links().await?, &bridge) {
            if !kept.contains(&link.name)
                && let Err(error) = host.remove_link(link.index).await
            {
                errors.push(error);
            }
        }
    }
    let valid = valid.clone();
    let released = leasing(&ipam(network)?, move |ipam| {
        ipam.retain(|owner| valid.contains(owner))
    })
    .await;
    if let Err(error) = released {
        errors.push(error);
    }
    CniError::all(errors)
}

/// The ports of `bridge` that this crate made.
pub fn ports<'a>(links: &'a [Link], bridge: &Link) -> Vec<&'a Link> {
    let ours = links.iter().filter(|link| {
        link.master == Some(bridge.index)
            && link.kind == "veth"
            && link.name.starts_with(HOST_IFNAME_PREFIX)
    });
    ours.collect()
}

/// Removes the agent's network: the bridge with every port of ours, routed pods' links, and all leases.
/// Idempotent.
pub async fn remove_network(host: &Netlink, network: &BridgeNetwork) -> Result<(), CniError> {
    let mut errors = Vec::new();
    errors.extend(routed::collect(host, network, &HashSet::new()).await.err());
    if let Some(bridge) = host.link_by_name(&network.bridge).await? {
        for port in ports(&host.links().await?, &bridge) {
            if let Err(error) = host.remove_link(port.index).await {
                errors.push(error);
            }
        }
        if bridge.kind == "bridge"
            && let Err(error) = host.remove_link(bridge.index).await
        {
            errors.push(error);
        }
    }
    if let Err(error) = ipam(network)?.remove_all() {
        errors.push(error);
    }
    CniError::all(errors)
}

#[cfg(test)]
mod tests;
