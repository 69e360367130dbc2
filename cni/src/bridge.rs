//! Attaching a network namespace to the bridge: ADD, DEL, CHECK, STATUS, GC.
//!
//! ```text
//! ADD   bridge ─► lease ─► veth (one message, peer born in the pod's netns) ─► address ─► default route
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

use crate::config::{BridgeNetwork, mac_of};
use crate::error::CniError;
use crate::ipam::{Ipam, Owner, boot_id};
use crate::netlink::{BridgeSpec, LOOPBACK_INDEX, Link, Netlink, Route, VethSpec};
use crate::netns::Netns;
use crate::result::{Attached, AttachedAddress};

/// Prefix of every host-side veth of ours.
pub const HOST_IFNAME_PREFIX: &str = "gv";

/// MTU where neither the configuration nor an uplink says one.
const MTU_DEFAULT: u32 = 1500;

/// The name of the veth end on the node: `gv` + 13 base-32 digits of a 64-bit hash, 15 bytes.
pub fn host_ifname(network: &str, owner: &Owner) -> String {
    const DIGITS: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";
    // FNV-1a: stable across versions and machines, which std's hasher does not promise.
    let mut hash: u64 = 0xcbf2_9ce4_8422_2325;
    for part in [network, &owner.container_id, &owner.ifname] {
        for byte in part.bytes().chain([0]) {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
    let mut name = String::from(HOST_IFNAME_PREFIX);
    for digit in 0..13 {
        name.push(char::from(DIGITS[((hash >> (5 * digit)) & 31) as usize]));
    }
    name
}

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
        if let Err(error) = remove(host, network, owner).await {
            tracing::warn!(%error, container = %owner.container_id, "undo of a failed ADD");
        }
    }
    attached
}

/// The node's side of an attachment, if it is in place: the veth is up and a port of the bridge. Its
/// other end lives and dies with it; addresses and routes in there are the container's to change.
pub async fn standing(
    host: &Netlink,
    network: &BridgeNetwork,
    owner: &Owner,
) -> Result<Option<Link>, CniError> {
    let Some(bridge) = host.link_by_name(&network.bridge).await? else {
        return Ok(None);
    };
    let port = host
        .link_by_name(&host_ifname(&network.name, owner))
        .await?;
    Ok(port.filter(|port| bridge.up && port.up && port.master == Some(bridge.index)))
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
        peer_mac: mac_of(*first),
        netns,
        master: bridge.index,
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
        ifname: owner.ifname.clone(),
        mac: peer.mac.unwrap_or(veth.peer_mac),
        mtu: bridge.mtu,
        netns: netns.path().display().to_string(),
        addresses: Vec::with_capacity(addresses.len()),
    };
    // The container's own; a runtime may have done it already.
    pod.set_up(LOOPBACK_INDEX).await?;
    for (address, range) in addresses.iter().zip(&network.ranges) {
        let address = IpNet::new_assert(*address, range.prefix().prefix_len());
        pod.ensure_address(peer.index, address).await?;
        let gateway = range.gateway();
        pod.ensure_route(&default_route(gateway, peer.index))
            .await?;
        attached
            .addresses
            .push(AttachedAddress { address, gateway });
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

/// Creates the pair, or adopts it when it is whole; half of one is removed first.
async fn ensure_veth(
    host: &Netlink,
    pod: &Netlink,
    veth: &VethSpec<'_>,
) -> Result<(Link, Link), CniError> {
    for _attempt in 0..2 {
        match host.create_veth(veth).await {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {}
            Err(error) => return Err(error),
        }
        let host_link = host.link_by_name(veth.host_name).await?;
        let peer = pod.link_by_name(veth.peer_name).await?;
        match (host_link, peer) {
            (Some(host_link), Some(peer)) if peer.peer == Some(host_link.index) => {
                if host_link.master != Some(veth.master) {
                    host.set_master(host_link.index, veth.master).await?;
                }
                for (side, link) in [(host, &host_link), (pod, &peer)] {
                    if link.mtu != veth.mtu {
                        side.set_mtu(link.index, veth.mtu).await?;
                    }
                    if !link.up {
                        side.set_up(link.index).await?;
                    }
                }
                return Ok((host_link, peer));
            }
            // An earlier netns of this container, not yet taken down by the kernel.
            (Some(host_link), _) => host.remove_link(host_link.index).await?,
            (None, _) => {
                return Err(CniError::Container(format!(
                    "interface {} exists already in {} and was not made by this plugin: DEL it \
                     with the plugin that made it, or use another CNI_IFNAME",
                    veth.peer_name,
                    veth.netns.path().display()
                )));
            }
        }
    }
    Err(CniError::Container(format!(
        "veth {}: appears and disappears: another process uses the same container id",
        veth.host_name
    )))
}

/// Detaches: the link first, then the lease. Ok when there is nothing (left).
pub async fn remove(
    host: &Netlink,
    network: &BridgeNetwork,
    owner: &Owner,
) -> Result<(), CniError> {
    if let Some(link) = host
        .link_by_name(&host_ifname(&network.name, owner))
        .await?
    {
        host.remove_link(link.index).await?;
    }
    release(network, owner).await
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
pub async fn release(network: &BridgeNetwork, owner: &Owner) -> Result<(), CniError> {
    let owner = owner.clone();
    leasing(&ipam(network)?, move |ipam| ipam.release(&owner)).await?;
    Ok(())
}

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
    if host_link.master != Some(bridge.index) || !host_link.up {
        return wrong(format!(
            "veth {host_name}: not an active port of bridge {name}"
        ));
    }
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

/// GC: removes the links and leases of every attachment that is not in `valid`. Goes on after a
/// failure and returns all of them.
pub async fn collect(
    host: &Netlink,
    network: &BridgeNetwork,
    valid: &HashSet<Owner>,
) -> Result<(), CniError> {
    let mut errors = Vec::new();
    let kept: HashSet<String> = (valid.iter())
        .map(|owner| host_ifname(&network.name, owner))
        .collect();
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

/// Removes the bridge with every port of ours, and all leases. Idempotent.
pub async fn remove_network(host: &Netlink, network: &BridgeNetwork) -> Result<(), CniError> {
    let mut errors = Vec::new();
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
