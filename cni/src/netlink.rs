//! Links, addresses and routes of one network namespace: thin typed calls over rtnetlink.
//!
//! A [`Netlink`] belongs to the namespace in which it was opened, whatever thread uses it later.
//! `ensure_*` and `remove_*` are idempotent; `create_*` fail with EEXIST.
//!
//! Measured (`ip link set netns` costs 21 ms, RCU grace periods): a veth's peer is created directly
//! in the pod's namespace, with hardware address, MTU and bridge, in ONE message.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use futures_util::TryStreamExt;
use ipnet::IpNet;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope,
};
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteScope,
    RouteType,
};
use rtnetlink::{Handle, LinkBridge, LinkMessageBuilder, LinkUnspec, LinkVeth};
use tokio::sync::Mutex;

use crate::error::CniError;
use crate::netns::{Netns, within};

/// Ports of one bridge at most (`BR_MAX_PORTS`, whose first number is nobody's).
pub const BRIDGE_PORT_COUNT_MAX: u32 = 1_023;

/// Our mark in the routing table (`RTA_PROTOCOL`): routes with it are ours to change or remove.
pub const ROUTE_PROTOCOL: u8 = 0x47;

/// The mark of the node's routes to its own pods; they go with the pods' links.
pub const POD_ROUTE_PROTOCOL: u8 = 0x48;

/// The index of `lo`, the same in every namespace.
pub const LOOPBACK_INDEX: u32 = 1;

/// A link as the kernel shows it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Link {
    /// ifindex, unique in its namespace.
    pub index: u32,
    /// Name, at most 15 bytes.
    pub name: String,
    /// `bridge`, `veth`, …; empty for hardware.
    pub kind: String,
    /// Hardware address.
    pub mac: Option<[u8; 6]>,
    /// Bytes.
    pub mtu: u32,
    /// Administratively up.
    pub up: bool,
    /// The bridge it is a port of.
    pub master: Option<u32>,
    /// veth: the index of the other end, in the other end's namespace.
    pub peer: Option<u32>,
}

/// A bridge to create.
#[derive(Clone, Debug)]
pub struct BridgeSpec<'a> {
    /// Its name.
    pub name: &'a str,
    /// Fixed: otherwise the bridge takes the lowest address of its ports and the pods' neighbour
    /// entries go stale whenever a pod leaves.
    pub mac: [u8; 6],
    /// Bytes.
    pub mtu: u32,
}

/// A veth pair to create: one end here, the other in `netns`.
#[derive(Clone, Debug)]
pub struct VethSpec<'a> {
    /// Name of the end here.
    pub host_name: &'a str,
    /// Name of the other end.
    pub peer_name: &'a str,
    /// Hardware address of the end here; none: the kernel draws one.
    pub host_mac: Option<[u8; 6]>,
    /// Hardware address of the other end.
    pub peer_mac: [u8; 6],
    /// Where the other end goes.
    pub netns: &'a Netns,
    /// The bridge for the end here; none: it is no port.
    pub master: Option<u32>,
    /// Bytes, both ends.
    pub mtu: u32,
}

/// A unicast route in the main table.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct Route {
    /// Destination prefix; `0.0.0.0/0` or `::/0` is the default route.
    pub destination: IpNet,
    /// Next hop; none when the destination is on the link.
    pub gateway: Option<IpAddr>,
    /// Outgoing link; none: the kernel finds it by the gateway.
    pub link: Option<u32>,
    /// The gateway is on the link though no address of the link says so.
    pub onlink: bool,
    /// The address that the node itself sends from; none: the kernel chooses.
    pub source: Option<IpAddr>,
    /// Of several routes to one destination the one with the lowest is used.
    pub metric: u32,
    /// Who made it: [`ROUTE_PROTOCOL`] for us.
    pub protocol: u8,
}

/// A connection to the kernel's routing netlink in one namespace.
#[derive(Clone)]
pub struct Netlink {
    pub(crate) handle: Handle,
    /// The kernel refuses a second dump on a socket while one is being read (EBUSY).
    pub(crate) dump: Arc<Mutex<()>>,
}

impl Netlink {
    /// Opens it in the namespace of the calling thread. Must be called within a tokio runtime.
    pub fn open() -> Result<Self, CniError> {
        let (connection, handle, _) =
            rtnetlink::new_connection().map_err(CniError::io("open a netlink socket"))?;
        // Ends by itself when the last handle is dropped.
        tokio::spawn(connection);
        Ok(Self {
            handle,
            dump: Arc::default(),
        })
    }

    /// Opens it in another namespace.
    pub async fn open_in(netns: &Netns) -> Result<Self, CniError> {
        let runtime = tokio::runtime::Handle::current();
        within(netns, move || {
            let _context = runtime.enter();
            Self::open()
        })
        .await
    }

    /// The link of that name.
    pub async fn link_by_name(&self, name: &str) -> Result<Option<Link>, CniError> {
        let request = self.handle.link().get().match_name(name);
        match request.execute().try_next().await {
            Ok(message) => Ok(message.map(|message| Link::from_message(&message))),
            Err(error) if errno(&error) == Some(libc::ENODEV) => Ok(None),
            Err(error) => Err(refused(format!("look up link {name}"), error)),
        }
    }

    /// The link of that index.
    pub async fn link_by_index(&self, index: u32) -> Result<Option<Link>, CniError> {
        let request = self.handle.link().get().match_index(index);
        match request.execute().try_next().await {
            Ok(message) => Ok(message.map(|message| Link::from_message(&message))),
            Err(error) if errno(&error) == Some(libc::ENODEV) => Ok(None),
            Err(error) => Err(refused(format!("look up link {index}"), error)),
        }
    }

    /// Every link of the namespace.
    pub async fn links(&self) -> Result<Vec<Link>, CniError> {
        let _dump = self.dump.lock().await;
        // One by one: a message is many times as large as what is wanted of it.
        let messages = self.handle.link().get().execute();
        let links = messages.map_ok(|message| Link::from_message(&message));
        (links.try_collect().await).map_err(|error| refused("list links".into(), error))
    }

    /// Creates a bridge, up.
    pub async fn create_bridge(&self, bridge: &BridgeSpec<'_>) -> Result<(), CniError> {
        let message = LinkBridge::new(bridge.name)
            .address(bridge.mac.to_vec())
            .mtu(bridge.mtu)
            .build();
        (self.handle.link().add(message).execute().await)
            .map_err(|error| refused(format!("create bridge {}", bridge.name), error))
    }

    /// Creates a veth pair whose other end appears in `veth.netns`; the end here is up and a port
    /// of its bridge. The other end has to be set up from inside: the kernel opens it before the
    /// ends know each other and refuses (`veth_open`: ENOTCONN).
    pub async fn create_veth(&self, veth: &VethSpec<'_>) -> Result<(), CniError> {
        let peer = LinkMessageBuilder::<LinkUnspec>::new()
            .name(veth.peer_name)
            .address(veth.peer_mac.to_vec())
            .mtu(veth.mtu)
            .setns_by_fd(veth.netns.raw_fd())
            .build();
        let mut builder = LinkMessageBuilder::<LinkVeth>::new_with_info_kind(InfoKind::Veth)
            .name(veth.host_name)
            .mtu(veth.mtu)
            .set_info_data(InfoData::Veth(InfoVeth::Peer(peer)))
            .up();
        if let Some(master) = veth.master {
            builder = builder.controller(master);
        }
        if let Some(mac) = veth.host_mac {
            builder = builder.address(mac.to_vec());
        }
        let message = builder.build();
        (self.handle.link().add(message).execute().await).map_err(|error| {
            let what = format!(
                "create veth {} with peer {} in {}{}",
                veth.host_name,
                veth.peer_name,
                veth.netns.path().display(),
                advice_of_port(&error),
            );
            refused(what, error)
        })
    }

    /// Sets a link up.
    pub async fn set_up(&self, index: u32) -> Result<(), CniError> {
        let message = LinkUnspec::new_with_index(index).up().build();
        (self.handle.link().set(message).execute().await)
            .map_err(|error| refused(format!("set link {index} up"), error))
    }

    /// Sets a link's MTU, in bytes.
    pub async fn set_mtu(&self, index: u32, mtu: u32) -> Result<(), CniError> {
        let message = LinkUnspec::new_with_index(index).mtu(mtu).build();
        (self.handle.link().set(message).execute().await)
            .map_err(|error| refused(format!("set mtu {mtu} on link {index}"), error))
    }

    /// Makes a link a port of a bridge.
    pub async fn set_master(&self, index: u32, bridge: u32) -> Result<(), CniError> {
        let message = LinkUnspec::new_with_index(index).controller(bridge).build();
        (self.handle.link().set(message).execute().await).map_err(|error| {
            let advice = advice_of_port(&error);
            refused(
                format!("attach link {index} to bridge {bridge}{advice}"),
                error,
            )
        })
    }

    /// Deletes a link. Ok when it is gone already.
    pub async fn remove_link(&self, index: u32) -> Result<(), CniError> {
        match self.handle.link().del(index).execute().await {
            Err(error) if errno(&error) != Some(libc::ENODEV) => {
                Err(refused(format!("delete link {index}"), error))
            }
            _ => Ok(()),
        }
    }

    /// Gives a link an address. IPv6 without duplicate detection: leases are unique already, and
    /// a tentative address could not be used for a second.
    pub async fn ensure_address(&self, index: u32, address: IpNet) -> Result<(), CniError> {
        let mut request = (self.handle.address())
            .add(index, address.addr(), address.prefix_len())
            .replace();
        if address.addr().is_ipv6() {
            let message = request.message_mut();
            message.header.flags |= AddressHeaderFlags::Nodad;
            (message.attributes).push(AddressAttribute::Flags(AddressFlags::Nodad));
        }
        (request.execute().await)
            .map_err(|error| refused(format!("add address {address} to link {index}"), error))
    }

    /// Takes an address from a link. Ok when it is gone already.
    pub async fn remove_address(&self, index: u32, address: IpNet) -> Result<(), CniError> {
        let mut request = (self.handle.address()).add(index, address.addr(), address.prefix_len());
        let message = request.message_mut().clone();
        match self.handle.address().del(message).execute().await {
            Err(error) if !matches!(errno(&error), Some(libc::EADDRNOTAVAIL | libc::ENODEV)) => {
                Err(refused(
                    format!("remove address {address} from link {index}"),
                    error,
                ))
            }
            _ => Ok(()),
        }
    }

    /// The addresses of one link.
    pub async fn addresses(&self, index: u32) -> Result<Vec<IpNet>, CniError> {
        let _dump = self.dump.lock().await;
        let request = self.handle.address().get().set_link_index_filter(index);
        let messages: Vec<AddressMessage> = (request.execute().try_collect().await)
            .map_err(|error| refused(format!("list addresses of link {index}"), error))?;
        Ok(messages.iter().filter_map(address_of).collect())
    }

    /// Every address of the namespace but link-local ones, with its link's index, in the kernel's
    /// order.
    pub async fn all_addresses(&self) -> Result<Vec<(u32, IpAddr)>, CniError> {
        let networks = self.all_networks().await?.into_iter();
        Ok(networks
            .map(|(index, network)| (index, network.addr()))
            .collect())
    }

    /// The same with the length of each address' prefix: the network that is on the link.
    pub async fn all_networks(&self) -> Result<Vec<(u32, IpNet)>, CniError> {
        let _dump = self.dump.lock().await;
        let request = self.handle.address().get();
        let global = request.execute().try_filter_map(async |message| {
            let is_global = message.header.scope == AddressScope::Universe;
            let address = address_of(&message).filter(|_| is_global);
            Ok(address.map(|address| (message.header.index, address)))
        });
        (global.try_collect().await).map_err(|error| refused("list addresses".into(), error))
    }

    /// Makes a route exist as given; replaces one to the same destination.
    pub async fn ensure_route(&self, route: &Route) -> Result<(), CniError> {
        (self
            .handle
            .route()
            .add(route.to_message())
            .replace()
            .execute()
            .await)
            .map_err(|error| refused(format!("add route {route}"), error))
    }

    /// Adds a route.
    ///
    /// # Errors
    /// EEXIST where there is one to the same destination, whoever made it.
    pub async fn create_route(&self, route: &Route) -> Result<(), CniError> {
        (self.handle.route().add(route.to_message()).execute().await)
            .map_err(|error| refused(format!("add route {route}"), error))
    }

    /// Removes a route. Ok when it is gone already.
    pub async fn remove_route(&self, route: &Route) -> Result<(), CniError> {
        match self.handle.route().del(route.to_message()).execute().await {
            Err(error) if !matches!(errno(&error), Some(libc::ESRCH | libc::ENODEV)) => {
                Err(refused(format!("remove route {route}"), error))
            }
            _ => Ok(()),
        }
    }

    /// The unicast routes of the main table, one family after the other.
    pub async fn routes(&self) -> Result<Vec<Route>, CniError> {
        let _dump = self.dump.lock().await;
        let mut routes = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut filter = RouteMessage::default();
            filter.header.address_family = family;
            let mut dump = std::pin::pin!(self.handle.route().get(filter).execute());
            while let Some(message) =
                (dump.try_next().await).map_err(|error| refused("list routes".into(), error))?
            {
                routes.extend(Route::from_message(&message));
            }
        }
        Ok(routes)
    }

    /// The MTU of the link that the default route leaves by, in bytes.
    pub async fn uplink_mtu(&self) -> Result<Option<u32>, CniError> {
        let routes = self.routes().await?;
        let uplink = routes
            .iter()
            .find(|route| route.destination.prefix_len() == 0)
            .and_then(|route| route.link);
        let Some(index) = uplink else {
            return Ok(None);
        };
        let request = self.handle.link().get().match_index(index);
        let message = (request.execute().try_next().await)
            .map_err(|error| refused(format!("look up link {index}"), error))?;
        Ok(message.map(|message| Link::from_message(&message).mtu))
    }
}

impl Link {
    pub(crate) fn from_message(message: &LinkMessage) -> Self {
        let mut link = Link {
            index: message.header.index,
            name: String::new(),
            kind: String::new(),
            mac: None,
            mtu: 0,
            up: message.header.flags.contains(LinkFlags::Up),
            master: None,
            peer: None,
        };
        for attribute in &message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name.clone_from(name),
                LinkAttribute::Address(mac) => link.mac = mac.as_slice().try_into().ok(),
                LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
                LinkAttribute::Controller(index) => link.master = Some(*index).filter(|i| *i != 0),
                LinkAttribute::Link(index) => link.peer = Some(*index),
                LinkAttribute::LinkInfo(infos) => {
                    for info in infos {
                        if let LinkInfo::Kind(kind) = info {
                            link.kind = kind.to_string();
                        }
                    }
                }
                _ => {}
            }
        }
        link
    }
}

impl Route {
    fn to_message(&self) -> RouteMessage {
        let mut message = RouteMessage::default();
        let header = &mut message.header;
        header.address_family = family(self.destination.addr());
        header.destination_prefix_length = self.destination.prefix_len();
        header.table = RouteHeader::RT_TABLE_MAIN;
        header.protocol = RouteProtocol::from(self.protocol);
        header.kind = RouteType::Unicast;
        header.scope = if self.gateway.is_some() || self.destination.addr().is_ipv6() {
            RouteScope::Universe
        } else {
            RouteScope::Link
        };
        if self.destination.prefix_len() > 0 {
            let network = route_address(self.destination.network());
            message
                .attributes
                .push(RouteAttribute::Destination(network));
        }
        if let Some(gateway) = self.gateway {
            (message.attributes).push(RouteAttribute::Gateway(route_address(gateway)));
        }
        if let Some(link) = self.link {
            message.attributes.push(RouteAttribute::Oif(link));
        }
        if self.onlink {
            message.header.flags |= RouteFlags::Onlink;
        }
        if let Some(source) = self.source {
            (message.attributes).push(RouteAttribute::PrefSource(route_address(source)));
        }
        if self.metric > 0 {
            (message.attributes).push(RouteAttribute::Priority(self.metric));
        }
        message
    }

    /// None when it is no unicast route of the main table.
    pub(crate) fn from_message(message: &RouteMessage) -> Option<Self> {
        let header = &message.header;
        if header.table != RouteHeader::RT_TABLE_MAIN || header.kind != RouteType::Unicast {
            return None;
        }
        let unspecified = match header.address_family {
            AddressFamily::Inet => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            AddressFamily::Inet6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
            _ => return None,
        };
        let (mut address, mut gateway, mut link) = (unspecified, None, None);
        let (mut source, mut metric) = (None, 0);
        for attribute in &message.attributes {
            match attribute {
                RouteAttribute::Destination(value) => address = ip(value)?,
                RouteAttribute::Gateway(value) => gateway = ip(value),
                RouteAttribute::Oif(index) => link = Some(*index),
                RouteAttribute::PrefSource(value) => source = ip(value),
                RouteAttribute::Priority(value) => metric = *value,
                _ => {}
            }
        }
        Some(Self {
            destination: IpNet::new(address, header.destination_prefix_length).ok()?,
            gateway,
            link,
            onlink: header.flags.contains(RouteFlags::Onlink),
            source,
            metric,
            protocol: header.protocol.into(),
        })
    }
}

impl std::fmt::Display for Route {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.destination)?;
        if let Some(gateway) = self.gateway {
            write!(f, " via {gateway}")?;
        }
        match self.link {
            Some(link) => write!(f, " dev {link}"),
            None => Ok(()),
        }
    }
}

fn family(address: IpAddr) -> AddressFamily {
    match address {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}

fn route_address(address: IpAddr) -> RouteAddress {
    match address {
        IpAddr::V4(address) => RouteAddress::Inet(address),
        IpAddr::V6(address) => RouteAddress::Inet6(address),
    }
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some(IpAddr::V4(*address)),
        RouteAddress::Inet6(address) => Some(IpAddr::V6(*address)),
        _ => None,
    }
}

/// The address that a message is about.
fn address_of(message: &AddressMessage) -> Option<IpNet> {
    // IFA_LOCAL is the address itself where both exist; IPv6 has IFA_ADDRESS only.
    let attributes = message.attributes.iter();
    let local = attributes.clone().find_map(|attribute| match attribute {
        AddressAttribute::Local(address) => Some(*address),
        _ => None,
    });
    let plain = || {
        attributes.clone().find_map(|attribute| match attribute {
            AddressAttribute::Address(address) => Some(*address),
            _ => None,
        })
    };
    IpNet::new(local.or_else(plain)?, message.header.prefix_len).ok()
}

/// What to do about a bridge that takes no more ports.
fn advice_of_port(error: &rtnetlink::Error) -> String {
    match errno(error) {
        Some(libc::EXFULL) => format!(
            " (the bridge is full: it takes {BRIDGE_PORT_COUNT_MAX} ports; run fewer pods on this node, \
             or start its agent with --pod-link routed, which needs none)"
        ),
        _ => String::new(),
    }
}

pub(crate) fn errno(error: &rtnetlink::Error) -> Option<i32> {
    match error {
        rtnetlink::Error::NetlinkError(message) => Some(message.raw_code().abs()),
        _ => None,
    }
}

pub(crate) fn refused(what: String, error: rtnetlink::Error) -> CniError {
    let source = match errno(&error) {
        Some(code) => io::Error::from_raw_os_error(code),
        None => io::Error::other(error.to_string()),
    };
    CniError::Kernel { what, source }
}
