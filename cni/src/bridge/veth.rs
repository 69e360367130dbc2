//! The veth pair of an attachment: its name on the node, made or adopted.

use super::routed;
use crate::error::CniError;
use crate::ipam::Owner;
use crate::netlink::{Link, Netlink, VethSpec};

/// Prefix of every host-side veth of ours.
pub const HOST_IFNAME_PREFIX: &str = "gv";

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

/// Creates the pair, or adopts it when it is whole; half of one is removed first.
pub(super) async fn ensure_veth(
    host: &Netlink,
    pod: &Netlink,
    veth: &VethSpec<'_>,
) -> Result<(Link, Link), CniError> {
    for _attempt in 0..3 {
        match host.create_veth(veth).await {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {}
            Err(error) => return Err(error),
        }
        let host_link = host.link_by_name(veth.host_name).await?;
        let peer = pod.link_by_name(veth.peer_name).await?;
        match (host_link, peer) {
            (Some(host_link), Some(peer))
                if peer.peer == Some(host_link.index)
                    && routed::is_of(&host_link) == veth.master.is_none() =>
            {
                if let Some(master) = veth.master
                    && host_link.master != Some(master)
                {
                    host.set_master(host_link.index, master).await?;
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
            // An earlier netns of this container, not yet taken down by the kernel; or a pair of the other
            // kind.
            (Some(host_link), _) => host.remove_link(host_link.index).await?,
            // That netns was taken down between the refusal and the look.
            (None, None) => {}
            (None, Some(_)) => {
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
