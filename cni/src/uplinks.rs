//! The node's interfaces towards the outside: those that carry an address of the node, and the tunnel to
//! other nodes, by which a Service's backends may be reached too.
//!
//! Invariants: never `lo`, never what has no hardware address (frames there have no Ethernet
//! header), never a port of a bridge (the bridge has the addresses); which address is the first of
//! its family is the kernel's order, so the primary one.

use std::net::IpAddr;

use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::AddressScope;
use rtnetlink::packet_core::NetlinkPayload;
use rtnetlink::{MulticastGroup, new_multicast_connection};

use crate::error::CniError;
use crate::netlink::{LOOPBACK_INDEX, Link};
use crate::tunnel::TUNNEL_NAME;

/// An interface by which the outside reaches the node.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Uplink {
    /// ifindex.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its kind: `vxlan`, `veth`; empty for a network card.
    pub kind: String,
    /// Its hardware address.
    pub mac: [u8; 6],
    /// The addresses it carries, the primary one of each family first.
    pub addresses: Vec<IpAddr>,
}

/// The uplinks among these links.
///
/// * `addresses` – ifindex and address, in the kernel's order.
/// * `node` – the node's addresses, as its Node object has them.
pub fn uplinks(links: &[Link], addresses: &[(u32, IpAddr)], node: &[IpAddr]) -> Vec<Uplink> {
    let candidates = links
        .iter()
        .filter(|link| link.index != LOOPBACK_INDEX && link.master.is_none());
    candidates
        .filter_map(|link| {
            let own = addresses.iter().filter(|(index, _)| *index == link.index);
            let own: Vec<IpAddr> = own.map(|(_, address)| *address).collect();
            let is_tunnel = link.kind == "vxlan" && link.name == TUNNEL_NAME;
            (is_tunnel || own.iter().any(|address| node.contains(address))).then_some(())?;
            Some(Uplink {
                index: link.index,
                name: link.name.clone(),
                kind: link.kind.clone(),
                mac: link.mac.filter(|mac| *mac != [0; 6])?,
                addresses: own,
            })
        })
        .collect()
}

/// Tells when an address came to a link of this namespace or left one.
pub struct AddressChanges {
    messages: BoxStream<'static, ()>,
}

impl AddressChanges {
    /// Listens in the namespace of the calling thread. Must be called within a tokio runtime.
    pub fn open() -> Result<Self, CniError> {
        let groups = [MulticastGroup::Ipv4Ifaddr, MulticastGroup::Ipv6Ifaddr];
        let (connection, _, messages) = new_multicast_connection(&groups)
            .map_err(CniError::io("listen for changes of addresses"))?;
        // Ends by itself when the receiver is dropped.
        tokio::spawn(connection);
        let messages = messages.filter_map(|(message, _)| async move {
            match message.payload {
                NetlinkPayload::InnerMessage(
                    RouteNetlinkMessage::NewAddress(address)
                    | RouteNetlinkMessage::DelAddress(address),
                ) => {
                    // Every pod's veth gets a link-local address: nobody reaches the node by it.
                    (address.header.scope == AddressScope::Universe).then_some(())
                }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn link(index: u32, name: &str, master: Option<u32>) -> Link {
        Link {
            index,
            name: name.into(),
            kind: String::new(),
            mac: Some([2, 0, 0, 0, 0, index as u8]),
            mtu: 1500,
            up: true,
            master,
            peer: None,
        }
    }

    #[test]
    fn uplinks_carry_an_address_of_the_node() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let links = [
            link(1, "lo", None),
            link(2, "eth0", None),
            link(3, "gantry0", None),
            link(4, "gvpod", Some(3)),
            link(5, "eth1", None),
            Link {
                mac: None,
                ..link(6, "tun0", None)
            },
        ];
        let addresses = [
            (1, ip("127.0.0.1")),
            (2, ip("192.0.2.1")),
            (2, ip("192.0.2.5")),
            (2, ip("2001:db8::1")),
            (3, ip("10.244.0.1")),
            (5, ip("198.51.100.1")),
            (6, ip("192.0.2.1")),
        ];
        let node = [ip("192.0.2.1")];
        let found = uplinks(&links, &addresses, &node);
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].name, "eth0");
        assert_eq!(
            found[0].addresses,
            addresses[1..4]
                .iter()
                .map(|(_, ip)| *ip)
                .collect::<Vec<_>>()
        );
        let tunnel = Link {
            kind: "vxlan".into(),
            ..link(7, TUNNEL_NAME, None)
        };
        let with_tunnel = [links[1].clone(), tunnel, link(8, TUNNEL_NAME, None)];
        let of_tunnel = [addresses[1], (7, ip("10.244.0.1")), (8, ip("10.244.0.1"))];
        let found = uplinks(&with_tunnel, &of_tunnel, &node);
        let found: Vec<_> = found.iter().map(|it| (it.index, it.addresses[0])).collect();
        assert_eq!(found, [(2, ip("192.0.2.1")), (7, ip("10.244.0.1"))]);
        let both = [ip("192.0.2.1"), ip("198.51.100.1")];
        assert_eq!(uplinks(&links, &addresses, &both).len(), 2);
        assert!(uplinks(&links, &addresses, &[]).is_empty());
    }
}
