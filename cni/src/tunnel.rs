//! The tunnel to nodes that share no link with this one: one VXLAN device, an entry for each peer.
//!
//! ```text
//!  pod's packet ─► route: via the peer's gateway address, dev gantry-vxlan
//!                    └► neighbour entry: that address is the peer's MAC
//!                         └► forwarding entry: that MAC is behind the peer's node address ─► UDP
//! ```
//! Everything is entered by hand and permanent: the device learns nothing, floods nothing, and nobody
//! is asked by ARP. So a peer needs to be known by both sides, and to nobody else an address is told.
//! What is decapsulated must come from an address whose route leads back into the tunnel (`rp_filter`).
//!
//! Source: RFC 7348; Linux `drivers/net/vxlan`.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use futures_util::TryStreamExt;
use ipnet::IpNet;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::link::{InfoData, InfoVxlan, LinkAttribute, LinkInfo, LinkMessage};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use rtnetlink::LinkVxlan;

use crate::error::CniError;
use crate::netlink::{Link, Netlink, errno, refused};
use crate::sysctl;

/// The device's name.
pub const TUNNEL_NAME: &str = "gantry-vxlan";

/// IANA's UDP port of VXLAN.
pub const PORT_DEFAULT: u16 = 4789;

/// The network identifier that all nodes of a cluster use.
pub const VNI_DEFAULT: u32 = 0x47;

/// What the encapsulation adds to a packet over IPv4: IP 20, UDP 8, VXLAN 8, Ethernet 14.
pub const OVERHEAD_V4: u32 = 50;
/// Over IPv6: IP 40.
pub const OVERHEAD_V6: u32 = 70;

/// A hardware address.
pub type Mac = [u8; 6];

/// This node's end, and those of the peers.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Tunnel {
    /// VXLAN network identifier.
    pub vni: u32,
    /// UDP port, here and there.
    pub port: u16,
    /// This node's address, from which it sends.
    pub local: IpAddr,
    /// The device's.
    pub mac: Mac,
    /// Bytes, of what is inside.
    pub mtu: u32,
    /// The device's addresses: the gateways of this node's pods, each with a full prefix.
    pub addresses: Vec<IpNet>,
    /// The peers.
    pub ends: Vec<TunnelEnd>,
}

/// A peer's end.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TunnelEnd {
    /// Its device's.
    pub mac: Mac,
    /// The node's address, of the family of [`Tunnel::local`].
    pub remote: IpAddr,
    /// Next hops of the routes to its pods.
    pub gateways: Vec<IpAddr>,
}

/// The hardware address of a node's end: the same whoever computes it. Of an IPv4 address it has all
/// bytes, of an IPv6 address a hash.
pub fn mac_of_node(address: IpAddr) -> Mac {
    match address {
        IpAddr::V4(address) => {
            let [a, b, c, d] = address.octets();
            [0x0e, 0x47, a, b, c, d]
        }
        IpAddr::V6(address) => {
            // FNV-1a: stable across versions and machines.
            let mut hash: u64 = 0xcbf2_9ce4_8422_2325;
            for byte in address.octets() {
                hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
            }
            let [.., a, b, c, d, e] = (hash ^ (hash >> 40)).to_be_bytes();
            [0x06, a, b, c, d, e]
        }
    }
}

/// What the encapsulation takes of the MTU of the link that it leaves by.
pub fn overhead(local: IpAddr) -> u32 {
    match local {
        IpAddr::V4(_) => OVERHEAD_V4,
        IpAddr::V6(_) => OVERHEAD_V6,
    }
}

/// What of a device cannot be changed while it is there.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct Identity {
    vni: u32,
    port: u16,
    local: Option<IpAddr>,
    learning: bool,
    mac: Option<Mac>,
}

impl Identity {
    fn of(tunnel: &Tunnel) -> Self {
        Self {
            vni: tunnel.vni,
            port: tunnel.port,
            local: Some(tunnel.local),
            learning: false,
            mac: Some(tunnel.mac),
        }
    }

    fn from_message(message: &LinkMessage, mac: Option<Mac>) -> Self {
        let mut identity = Self {
            mac,
            ..Self::default()
        };
        let infos = message.attributes.iter().filter_map(|it| match it {
            LinkAttribute::LinkInfo(infos) => Some(infos),
            _ => None,
        });
        for info in infos.flatten() {
            let LinkInfo::Data(InfoData::Vxlan(data)) = info else {
                continue;
            };
            for info in data {
                match info {
                    InfoVxlan::Id(vni) => identity.vni = *vni,
                    InfoVxlan::Port(port) => identity.port = *port,
                    InfoVxlan::Local(local) if !local.is_unspecified() => {
                        identity.local = Some((*local).into());
                    }
                    InfoVxlan::Local6(local) if !local.is_unspecified() => {
                        identity.local = Some((*local).into());
                    }
                    InfoVxlan::Learning(learning) => identity.learning = *learning,
                    _ => {}
                }
            }
        }
        identity
    }
}

/// Makes the device exist with everything that `tunnel` needs; other entries stay for now. Returns its
/// index.
pub(crate) async fn ensure(host: &Netlink, tunnel: &Tunnel) -> Result<u32, CniError> {
    let link = ensure_device(host, tunnel).await?;
    if link.mtu != tunnel.mtu {
        host.set_mtu(link.index, tunnel.mtu).await?;
    }
    for address in &tunnel.addresses {
        host.ensure_address(link.index, *address).await?;
    }
    // Who sends to the port can say any source: only those are believed whose way is this one.
    sysctl::ensure(&format!("net/ipv4/conf/{TUNNEL_NAME}/rp_filter"), "1")?;
    if !link.up {
        host.set_up(link.index).await?;
    }
    let there = Entries::read(host, link.index).await?;
    let wanted = Entries::of(tunnel);
    for (mac, remote) in wanted.forwarding.difference(&there.forwarding) {
        add_forwarding(host, link.index, *mac, *remote).await?;
    }
    for (address, mac) in wanted.neighbours.difference(&there.neighbours) {
        add_neighbour(host, link.index, *address, *mac).await?;
    }
    Ok(link.index)
}

/// Removes entries and addresses of peers that are no more.
pub(crate) async fn forget_others(
    host: &Netlink,
    index: u32,
    tunnel: &Tunnel,
) -> Result<(), CniError> {
    let there = Entries::read(host, index).await?;
    let wanted = Entries::of(tunnel);
    let mut errors = Vec::new();
    for (address, mac) in there.neighbours.difference(&wanted.neighbours) {
        let mut others = wanted.neighbours.iter();
        if !others.any(|(other, _)| other == address) {
            errors.extend(remove_neighbour(host, index, *address, *mac).await.err());
        }
    }
    for (mac, remote) in there.forwarding.difference(&wanted.forwarding) {
        errors.extend(remove_forwarding(host, index, *mac, *remote).await.err());
    }
    for address in host.addresses(index).await? {
        let is_link_local = match address.addr() {
            IpAddr::V4(address) => address.is_link_local(),
            IpAddr::V6(address) => address.is_unicast_link_local(),
        };
        if !is_link_local && !tunnel.addresses.contains(&address) {
            errors.extend(host.remove_address(index, address).await.err());
        }
    }
    CniError::all(errors)
}

/// Removes the device, and with it all routes and entries. Ok when it is gone already.
pub(crate) async fn remove(host: &Netlink) -> Result<(), CniError> {
    match host.link_by_name(TUNNEL_NAME).await? {
        Some(link) if link.kind == "vxlan" => host.remove_link(link.index).await,
        _ => Ok(()),
    }
}

async fn ensure_device(host: &Netlink, tunnel: &Tunnel) -> Result<Link, CniError> {
    if let Some((link, identity)) = device(host).await? {
        if link.kind != "vxlan" {
            return Err(CniError::Container(format!(
                "link {TUNNEL_NAME} exists and is of kind {:?}, not a VXLAN: rename it",
                link.kind
            )));
        }
        if identity == Identity::of(tunnel) {
            return Ok(link);
        }
        host.remove_link(link.index).await?;
    }
    let builder = LinkVxlan::new(TUNNEL_NAME, tunnel.vni)
        .port(tunnel.port)
        .learning(false)
        .address(tunnel.mac.to_vec())
        .mtu(tunnel.mtu);
    let builder = match tunnel.local {
        IpAddr::V4(local) => builder.local(local),
        IpAddr::V6(local) => builder.local6(local),
    };
    let created = host.handle.link().add(builder.build()).execute().await;
    created.map_err(|error| {
        let advice = match errno(&error) {
            Some(libc::EOPNOTSUPP) => {
                " (the kernel has no VXLAN: load the module vxlan, or join the nodes by a link and \
                 use --routing direct)"
            }
            Some(libc::EADDRINUSE | libc::EEXIST) => {
                " (another VXLAN has this port or number: ip -d link show type vxlan)"
            }
            _ => "",
        };
        refused(
            format!(
                "create link {TUNNEL_NAME}, VNI {} on UDP port {} of {}{advice}",
                tunnel.vni, tunnel.port, tunnel.local
            ),
            error,
        )
    })?;
    let made = device(host).await?.map(|(link, _)| link);
    made.ok_or_else(|| CniError::Container(format!("link {TUNNEL_NAME}: removed while being used")))
}

async fn device(host: &Netlink) -> Result<Option<(Link, Identity)>, CniError> {
    let request = host.handle.link().get().match_name(TUNNEL_NAME);
    match request.execute().try_next().await {
        Ok(message) => Ok(message.map(|message| {
            let link = Link::from_message(&message);
            let identity = Identity::from_message(&message, link.mac);
            (link, identity)
        })),
        Err(error) if errno(&error) == Some(libc::ENODEV) => Ok(None),
        Err(error) => Err(refused(format!("look up link {TUNNEL_NAME}"), error)),
    }
}

/// The device's permanent entries.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
struct Entries {
    /// Address of a peer's gateway, and its MAC.
    neighbours: BTreeSet<(IpAddr, Mac)>,
    /// MAC, and the node behind which it is.
    forwarding: BTreeSet<(Mac, IpAddr)>,
}

impl Entries {
    fn of(tunnel: &Tunnel) -> Self {
        let mut entries = Self::default();
        for end in &tunnel.ends {
            let gateways = end.gateways.iter().map(|gateway| (*gateway, end.mac));
            entries.neighbours.extend(gateways);
            entries.forwarding.insert((end.mac, end.remote));
        }
        entries
    }

    async fn read(host: &Netlink, index: u32) -> Result<Self, CniError> {
        let _dump = host.dump.lock().await;
        let mut entries = Self::default();
        for family in [
            AddressFamily::Inet,
            AddressFamily::Inet6,
            AddressFamily::Bridge,
        ] {
            let request = host.handle.neighbours().get().set_address_family(family);
            let mut dump = std::pin::pin!(request.execute());
            while let Some(message) = dump
                .try_next()
                .await
                .map_err(|error| refused("list neighbours".into(), error))?
            {
                if message.header.ifindex == index
                    && message.header.state == NeighbourState::Permanent
                {
                    entries.note(&message);
                }
            }
        }
        Ok(entries)
    }

    fn note(&mut self, message: &NeighbourMessage) {
        let (mut mac, mut address) = (None, None);
        for attribute in &message.attributes {
            match attribute {
                NeighbourAttribute::LinkLayerAddress(bytes) => {
                    mac = bytes.as_slice().try_into().ok()
                }
                NeighbourAttribute::Destination(destination) => address = ip(destination),
                _ => {}
            }
        }
        let (Some(mac), Some(address)) = (mac, address) else {
            return;
        };
        if message.header.family == AddressFamily::Bridge {
            self.forwarding.insert((mac, address));
        } else {
            self.neighbours.insert((address, mac));
        }
    }
}

fn ip(address: &NeighbourAddress) -> Option<IpAddr> {
    match address {
        NeighbourAddress::Inet(address) => Some((*address).into()),
        NeighbourAddress::Inet6(address) => Some((*address).into()),
        // In an entry of a forwarding table no family says which it is.
        NeighbourAddress::Other(bytes) => match bytes.as_slice() {
            [a, b, c, d] => Some(Ipv4Addr::new(*a, *b, *c, *d).into()),
            bytes => Some(Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?).into()),
        },
        _ => None,
    }
}

async fn add_neighbour(
    host: &Netlink,
    index: u32,
    address: IpAddr,
    mac: Mac,
) -> Result<(), CniError> {
    let request = host.handle.neighbours().add(index, address);
    let request = request.link_layer_address(&mac).replace();
    (request.execute().await)
        .map_err(|error| refused(format!("add neighbour {address} to {TUNNEL_NAME}"), error))
}

async fn add_forwarding(
    host: &Netlink,
    index: u32,
    mac: Mac,
    remote: IpAddr,
) -> Result<(), CniError> {
    let request = host.handle.neighbours().add_bridge(index, &mac);
    let request = request.destination(remote).flags(NeighbourFlags::Own);
    (request.replace().execute().await)
        .map_err(|error| refused(format!("add node {remote} to {TUNNEL_NAME}"), error))
}

async fn remove_neighbour(
    host: &Netlink,
    index: u32,
    address: IpAddr,
    mac: Mac,
) -> Result<(), CniError> {
    let mut request = host.handle.neighbours().add(index, address);
    request = request.link_layer_address(&mac);
    let message = request.message_mut().clone();
    gone(
        host.handle.neighbours().del(message).execute().await,
        || format!("remove neighbour {address} from {TUNNEL_NAME}"),
    )
}

async fn remove_forwarding(
    host: &Netlink,
    index: u32,
    mac: Mac,
    remote: IpAddr,
) -> Result<(), CniError> {
    let request = host.handle.neighbours().add_bridge(index, &mac);
    let mut request = request.destination(remote).flags(NeighbourFlags::Own);
    let message = request.message_mut().clone();
    gone(
        host.handle.neighbours().del(message).execute().await,
        || format!("remove node {remote} from {TUNNEL_NAME}"),
    )
}

/// What is not there any more has been removed.
fn gone(done: Result<(), rtnetlink::Error>, what: impl FnOnce() -> String) -> Result<(), CniError> {
    match done {
        Err(error) if !matches!(errno(&error), Some(libc::ENOENT | libc::ENODEV)) => {
            Err(refused(what(), error))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hardware_addresses_are_local_single_and_as_many_as_nodes() {
        let texts = [
            "192.0.2.1",
            "192.0.2.2",
            "198.51.100.1",
            "fd00::1",
            "fd00:1::1",
            "fd00::2",
        ];
        let macs: BTreeSet<Mac> = texts
            .iter()
            .map(|text| mac_of_node(text.parse().unwrap()))
            .collect();
        assert_eq!(macs.len(), texts.len());
        for mac in &macs {
            assert_eq!(mac[0] & 3, 2, "locally administered, for one: {mac:x?}");
        }
        // Every version of the agent must say the same.
        let mac = mac_of_node("192.0.2.1".parse().unwrap());
        assert_eq!(mac, [0x0e, 0x47, 192, 0, 2, 1]);
        let mac = mac_of_node("fd00::1".parse().unwrap());
        assert_eq!(mac[0], 0x06);
    }

    #[test]
    fn forwarding_entries_are_of_either_family() {
        let mut entries = Entries::default();
        for (remote, bytes) in [
            ("192.0.2.1", vec![192, 0, 2, 1]),
            ("::1", [[0; 15].as_slice(), &[1]].concat()),
        ] {
            let mut message = NeighbourMessage::default();
            message.header.family = AddressFamily::Bridge;
            message.attributes = vec![
                NeighbourAttribute::LinkLayerAddress(vec![2, 0, 0, 0, 0, 1]),
                NeighbourAttribute::Destination(NeighbourAddress::Other(bytes)),
            ];
            entries.note(&message);
            let remote = remote.parse().unwrap();
            assert!(entries.forwarding.contains(&([2, 0, 0, 0, 0, 1], remote)));
        }
        // Cut short, or of a node that is no peer: nothing.
        let mut message = NeighbourMessage::default();
        message.attributes = vec![NeighbourAttribute::LinkLayerAddress(vec![2])];
        entries.note(&message);
        assert_eq!((entries.forwarding.len(), entries.neighbours.len()), (2, 0));
    }
}
