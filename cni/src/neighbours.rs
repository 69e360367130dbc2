//! Neighbour entries of one network namespace: who has an address, without being asked.

use std::net::IpAddr;

use futures_util::TryStreamExt;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourState,
};

use crate::error::CniError;
use crate::netlink::{Netlink, errno, refused};

impl Netlink {
    /// A permanent entry: the address is at this hardware address.
    pub async fn ensure_neighbour(
        &self,
        index: u32,
        address: IpAddr,
        mac: [u8; 6],
    ) -> Result<(), CniError> {
        let request = self.handle.neighbours().add(index, address);
        let request = request.link_layer_address(&mac).replace();
        (request.execute().await)
            .map_err(|error| refused(format!("add neighbour {address} to link {index}"), error))
    }

    /// The node answers on this link for the address, which is elsewhere.
    pub async fn ensure_proxy(&self, index: u32, address: IpAddr) -> Result<(), CniError> {
        let request = self.handle.neighbours().add(index, address);
        let request = request.flags(NeighbourFlags::Proxy);
        (request
            .state(NeighbourState::None)
            .replace()
            .execute()
            .await)
            .map_err(|error| refused(format!("add proxy {address} to link {index}"), error))
    }

    /// It does so no more. Ok when it did not.
    pub async fn remove_proxy(&self, index: u32, address: IpAddr) -> Result<(), CniError> {
        let mut request = self.handle.neighbours().add(index, address);
        request = request.flags(NeighbourFlags::Proxy);
        let message = request.message_mut().clone();
        match self.handle.neighbours().del(message).execute().await {
            Err(error) if !matches!(errno(&error), Some(libc::ENOENT | libc::ENODEV)) => Err(
                refused(format!("remove proxy {address} from link {index}"), error),
            ),
            _ => Ok(()),
        }
    }

    /// The IPv6 addresses that the node answers for on this link. (For IPv4 routes and a setting of
    /// the link are enough.)
    pub async fn proxies(&self, index: u32) -> Result<Vec<IpAddr>, CniError> {
        let _dump = self.dump.lock().await;
        let request = self.handle.neighbours().get().proxies();
        let mut dump = std::pin::pin!(request.set_address_family(AddressFamily::Inet6).execute());
        let mut found = Vec::new();
        while let Some(message) =
            (dump.try_next().await).map_err(|error| refused("list proxies".into(), error))?
        {
            if message.header.ifindex != index {
                continue;
            }
            found.extend(message.attributes.iter().find_map(|it| match it {
                NeighbourAttribute::Destination(NeighbourAddress::Inet6(address)) => {
                    Some(IpAddr::V6(*address))
                }
                _ => None,
            }));
        }
        Ok(found)
    }
}
