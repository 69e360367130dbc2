//! What CNI answers: results and errors, in the shape of the version that was asked for.

use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::{Value, json};

use crate::error::CniError;

/// One address of an attachment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AttachedAddress {
    /// The address with the prefix length of its network.
    pub address: IpNet,
    /// The bridge's address in the same network.
    pub gateway: IpAddr,
}

/// What ADD made, or found made.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Attached {
    /// The bridge.
    pub bridge: String,
    /// Its hardware address.
    pub bridge_mac: [u8; 6],
    /// The veth end on the node.
    pub host_ifname: String,
    /// Its index.
    pub host_ifindex: u32,
    /// Its hardware address.
    pub host_mac: [u8; 6],
    /// What the container's packets to everybody else are addressed to: one of the two.
    pub gateway_mac: [u8; 6],
    /// The veth end in the container.
    pub ifname: String,
    /// Its hardware address.
    pub mac: [u8; 6],
    /// Bytes, of both ends.
    pub mtu: u32,
    /// CNI_NETNS.
    pub netns: String,
    /// One per family.
    pub addresses: Vec<AttachedAddress>,
}

impl Attached {
    /// The result object of specification version `version`.
    pub fn to_json(&self, version: &str) -> Value {
        let ips: Vec<Value> = (self.addresses.iter())
            .map(|ip| {
                let mut entry = json!({
                    "address": ip.address.to_string(),
                    "gateway": ip.gateway.to_string(),
                    "interface": 2,
                });
                if version == "0.4.0" {
                    entry["version"] = json!(if ip.gateway.is_ipv4() { "4" } else { "6" });
                }
                entry
            })
            .collect();
        let routes: Vec<Value> = (self.addresses.iter())
            .map(|ip| {
                let dst = if ip.gateway.is_ipv4() {
                    "0.0.0.0/0"
                } else {
                    "::/0"
                };
                json!({ "dst": dst, "gw": ip.gateway.to_string() })
            })
            .collect();
        let mut interfaces = [
            json!({ "name": self.bridge, "mac": mac_text(self.bridge_mac) }),
            json!({ "name": self.host_ifname, "mac": mac_text(self.host_mac) }),
            json!({ "name": self.ifname, "mac": mac_text(self.mac), "sandbox": self.netns }),
        ];
        if version == "1.1.0" {
            for interface in &mut interfaces {
                interface["mtu"] = json!(self.mtu);
            }
        }
        json!({
            "cniVersion": version,
            "interfaces": interfaces,
            "ips": ips,
            "routes": routes,
            "dns": {},
        })
    }
}

/// The error object: `{"cniVersion", "code", "msg"}`.
pub fn error_json(version: &str, error: &CniError) -> Value {
    json!({ "cniVersion": version, "code": error.code(), "msg": error.to_string() })
}

/// The addresses of a CNI result of any plugin, version 0.3 or later.
///
/// # Errors
/// In words, when `ips` is not a list of objects with an `address` prefix.
pub fn addresses_of(result: &Value) -> Result<Vec<IpNet>, String> {
    let Some(ips) = result.get("ips") else {
        return Ok(Vec::new());
    };
    let Some(ips) = ips.as_array() else {
        return Err("result: ips: want a list".into());
    };
    let mut addresses = Vec::with_capacity(ips.len());
    for (index, ip) in ips.iter().enumerate() {
        let text = ip
            .get("address")
            .and_then(Value::as_str)
            .unwrap_or_default();
        let address = text.parse().map_err(|_| {
            format!("result: ips[{index}].address: {text:?}: want an address like 10.0.0.5/24")
        })?;
        addresses.push(address);
    }
    Ok(addresses)
}

/// `0a:58:0a:f4:01:05`
pub fn mac_text(mac: [u8; 6]) -> String {
    let bytes: Vec<String> = mac.iter().map(|byte| format!("{byte:02x}")).collect();
    bytes.join(":")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attached() -> Attached {
        Attached {
            bridge: "gantry0".into(),
            bridge_mac: [0x0a, 0x58, 10, 0, 0, 1],
            host_ifname: "gvabc".into(),
            host_ifindex: 7,
            host_mac: [2, 0, 0, 0, 0, 1],
            gateway_mac: [0x0a, 0x58, 10, 0, 0, 1],
            ifname: "eth0".into(),
            mac: [0x0a, 0x58, 10, 0, 0, 5],
            mtu: 1450,
            netns: "/run/netns/a".into(),
            addresses: vec![AttachedAddress {
                address: "10.0.0.5/24".parse().unwrap(),
                gateway: "10.0.0.1".parse().unwrap(),
            }],
        }
    }

    #[test]
    fn the_result_has_the_shape_of_its_version() {
        let old = attached().to_json("0.4.0");
        assert_eq!(old["ips"][0]["version"], "4");
        assert!(old["interfaces"][0].get("mtu").is_none());
        let new = attached().to_json("1.1.0");
        assert!(new["ips"][0].get("version").is_none());
        assert_eq!(new["interfaces"][2]["mtu"], 1450);
        assert_eq!(new["interfaces"][2]["sandbox"], "/run/netns/a");
        assert_eq!(new["ips"][0]["interface"], 2);
        assert_eq!(
            new["routes"][0],
            json!({ "dst": "0.0.0.0/0", "gw": "10.0.0.1" })
        );
    }

    #[test]
    fn addresses_are_read_from_any_result() {
        let addresses = addresses_of(&attached().to_json("1.0.0")).unwrap();
        assert_eq!(addresses, ["10.0.0.5/24".parse().unwrap()]);
        assert_eq!(addresses_of(&json!({})).unwrap(), []);
        let error = addresses_of(&json!({ "ips": [{ "address": 7 }] })).unwrap_err();
        assert!(error.contains("ips[0].address"), "{error}");
    }
}
