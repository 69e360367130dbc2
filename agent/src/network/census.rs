//! What of ours is on this machine, and its removal: for `down`, with no agent running.

use std::fs;
use std::io::ErrorKind;
use std::net::IpAddr;

use gantry_cni::bridge;
use gantry_cni::config::{BRIDGE_NAME, BridgeNetwork};
use gantry_cni::netlink::{LOOPBACK_INDEX, Netlink, POD_ROUTE_PROTOCOL, ROUTE_PROTOCOL};
use gantry_cni::routes::Wanted;
use gantry_cni::tunnel::TUNNEL_NAME;
use gantry_cni::wireguard::WIREGUARD_NAME;
use ipnet::IpNet;

use super::pod_networks::{from_cni, lease_dir, pinned};
use super::record::{self, Record};
use super::{NetworkError, forwarding, namespaces};
use crate::dns::LISTEN_ADDRESS;
use crate::paths::Paths;

/// Everything of ours in the node's network namespace and below `/run/gantry`.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Census {
    /// The bridge, its ports, the tunnel and what carries it.
    pub links: Vec<String>,
    /// Pinned namespaces.
    pub namespaces: Vec<String>,
    /// `address owner`.
    pub leases: Vec<String>,
    /// Routes to pods: other nodes', and those of this one that are no ports of the bridge.
    pub routes: Vec<String>,
    /// The resolver's address on `lo`.
    pub addresses: Vec<String>,
    /// Pods with an attachment record.
    pub attachments: Vec<String>,
}

impl Census {
    /// Nothing of ours is left.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// A line per thing: `link gantry0`.
    pub fn lines(&self) -> Vec<String> {
        let kinds = [
            ("link", &self.links),
            ("namespace", &self.namespaces),
            ("lease", &self.leases),
            ("route", &self.routes),
            ("address", &self.addresses),
            ("attachment", &self.attachments),
        ];
        let lines = kinds
            .iter()
            .flat_map(|(kind, things)| things.iter().map(move |thing| format!("{kind} {thing}")));
        lines.collect()
    }
}

fn network(paths: &Paths) -> Result<BridgeNetwork, NetworkError> {
    BridgeNetwork::new(&[], lease_dir(paths)).map_err(from_cni)
}

fn resolver_address() -> IpNet {
    IpNet::from(IpAddr::V4(LISTEN_ADDRESS))
}

/// Counts. Needs a runtime.
pub async fn census(paths: &Paths) -> Result<Census, NetworkError> {
    let host = Netlink::open().map_err(from_cni)?;
    let links = host.links().await.map_err(from_cni)?;
    let mut census = Census::default();
    for link in &links {
        let is_port = link.kind == "veth" && link.name.starts_with(bridge::HOST_IFNAME_PREFIX);
        let is_own = [BRIDGE_NAME, TUNNEL_NAME, WIREGUARD_NAME].contains(&link.name.as_str());
        if is_own || is_port {
            census.links.push(link.name.clone());
        }
    }
    for (_, dir) in pinned(paths)? {
        census.namespaces.push(dir.display().to_string());
    }
    let leases = bridge::ipam(&network(paths)?).and_then(|ipam| ipam.leases());
    for (address, owner) in leases.map_err(from_cni)? {
        census
            .leases
            .push(format!("{address} {}", owner.container_id));
    }
    for route in host.routes().await.map_err(from_cni)? {
        if [ROUTE_PROTOCOL, POD_ROUTE_PROTOCOL].contains(&route.protocol) {
            census.routes.push(route.to_string());
        }
    }
    let on_lo = host.addresses(LOOPBACK_INDEX).await.map_err(from_cni)?;
    if on_lo.contains(&resolver_address()) {
        census.addresses.push(resolver_address().to_string());
    }
    for pod in Record::pods(&paths.run)? {
        census.attachments.push(pod.to_string());
    }
    Ok(census)
}

/// Removes all of it; goes on after a failure and returns the first. Pods attached by third-party
/// plugins must have been removed before: only [`super::Network::remove`] runs their DEL.
pub async fn remove_all(paths: &Paths) -> Result<(), NetworkError> {
    let mut first = Ok(());
    let mut note = |result: Result<(), NetworkError>| {
        if let Err(error) = result {
            tracing::warn!(%error, "removal of the network");
            if first.is_ok() {
                first = Err(error);
            }
        }
    };
    for (_, dir) in pinned(paths)? {
        note(namespaces::remove(&dir));
    }
    let host = Netlink::open().map_err(from_cni)?;
    note(
        bridge::remove_network(&host, &network(paths)?)
            .await
            .map_err(from_cni),
    );
    note(
        gantry_cni::routes::ensure(&host, &Wanted::default())
            .await
            .map_err(from_cni),
    );
    let lo = host
        .remove_address(LOOPBACK_INDEX, resolver_address())
        .await;
    note(lo.map_err(from_cni));
    note(forwarding::restore(&paths.run));
    for dir in [
        record::dir(&paths.run),
        lease_dir(paths),
        paths.run.join("network"),
    ] {
        note(match fs::remove_dir_all(&dir) {
            Err(source) if source.kind() != ErrorKind::NotFound => Err(NetworkError::Io {
                context: format!("remove {}", dir.display()),
                source,
            }),
            _ => Ok(()),
        });
    }
    first
}
