//! The node's end of a pod's veth, where a third party's plugins made it.
//!
//! ```text
//!  result of ADD: interfaces ─┐
//!  link in the pod: peer ─────┴─► link on the node: veth, its peer is the pod's ─► PodInterface
//!                                 anything else ─► why it cannot be told, in words
//! ```

use std::net::IpAddr;

use gantry_cni::CniError;
use gantry_cni::netlink::{Link, Netlink};
use serde_json::Value;

use super::chain::IFNAME;
use crate::dataplane::{Bandwidth, PodInterface};
use crate::ids::PodUid;

/// Finds it; the inner error says in words why it cannot be told.
pub(super) async fn find(
    host: &Netlink,
    inside: &Netlink,
    pod: &PodUid,
    addresses: &[IpAddr],
    result: Option<&Value>,
) -> Result<Result<PodInterface, String>, CniError> {
    let Some(link) = inside.link_by_name(IFNAME).await? else {
        return Ok(Err(format!("the pod has no interface {IFNAME}")));
    };
    let outer = match link.peer {
        Some(index) => host.link_by_index(index).await?,
        None => None,
    };
    let bridge = match outer.as_ref().and_then(|outer| outer.master) {
        Some(index) => host.link_by_index(index).await?,
        None => None,
    };
    let found = judge(&link, outer.as_ref(), result);
    Ok(found.map(|(host_mac, pod_mac, ifindex)| PodInterface {
        prepared: false,
        bandwidth: Bandwidth::default(),
        pod: pod.clone(),
        ifindex,
        gateway_mac: bridge.and_then(|bridge| bridge.mac).unwrap_or(host_mac),
        pod_mac,
        addresses: addresses.to_vec(),
        // A shaper of the plugins may stand on the host end.
        direct: false,
    }))
}

type Ends = ([u8; 6], [u8; 6], u32);

/// Whether `outer` is the other end of `inner`. The index alone may be that of a link of the same
/// number in a third namespace.
fn judge(inner: &Link, outer: Option<&Link>, result: Option<&Value>) -> Result<Ends, String> {
    if inner.kind != "veth" {
        let kind = match inner.kind.as_str() {
            "" => "a device of its own",
            kind => kind,
        };
        return Err(format!(
            "{IFNAME} in the pod is {kind}, not one end of a veth pair"
        ));
    }
    let elsewhere = || format!("the other end of {IFNAME} is not in the node's network namespace");
    let outer = outer.filter(|outer| outer.kind == "veth" && outer.peer == Some(inner.index));
    let outer = outer.ok_or_else(elsewhere)?;
    let told = told(result);
    if !told.is_empty() && !told.contains(&outer.name.as_str()) {
        return Err(elsewhere());
    }
    match (outer.mac, inner.mac) {
        (Some(host), Some(pod)) => Ok((host, pod, outer.index)),
        _ => Err(format!("{IFNAME} has no hardware address of 6 bytes")),
    }
}

/// The interfaces on the node that the plugins say they made.
fn told(result: Option<&Value>) -> Vec<&str> {
    let interfaces = result.and_then(|result| result["interfaces"].as_array());
    let on_node = interfaces.into_iter().flatten().filter(|interface| {
        let sandbox = interface["sandbox"].as_str();
        sandbox.is_none_or(str::is_empty)
    });
    on_node
        .filter_map(|interface| interface["name"].as_str())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn veth(index: u32, name: &str, peer: u32) -> Link {
        Link {
            index,
            name: name.into(),
            kind: "veth".into(),
            mac: Some([2, 0, 0, 0, 0, index as u8]),
            mtu: 1500,
            up: true,
            master: None,
            peer: Some(peer),
        }
    }

    #[test]
    fn only_a_veth_whose_ends_know_each_other_is_told() {
        let (inner, outer) = (veth(2, "eth0", 7), veth(7, "veth1", 2));
        let found = judge(&inner, Some(&outer), None).unwrap();
        assert_eq!(found, ([2, 0, 0, 0, 0, 7], [2, 0, 0, 0, 0, 2], 7));
        let result = json!({ "interfaces": [
            { "name": "cni0" }, { "name": "veth1" }, { "name": "eth0", "sandbox": "/run/netns/a" },
        ] });
        assert!(judge(&inner, Some(&outer), Some(&result)).is_ok());
        let other = json!({ "interfaces": [{ "name": "veth9" }] });
        let words = judge(&inner, Some(&outer), Some(&other)).unwrap_err();
        assert!(words.contains("not in the node's"), "{words}");
        assert!(judge(&inner, Some(&veth(7, "veth1", 3)), None).is_err());
        assert!(judge(&inner, None, None).is_err());
    }

    #[test]
    fn what_is_no_veth_is_named() {
        let mut inner = veth(2, "eth0", 7);
        inner.kind = "macvlan".into();
        let words = judge(&inner, None, None).unwrap_err();
        assert!(words.contains("macvlan"), "{words}");
    }
}
