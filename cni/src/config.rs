//! What a network is: the CNI network configuration of type `gantry-bridge`, validated.
//!
//! ```json
//! { "cniVersion": "1.1.0", "name": "gantry", "type": "gantry-bridge",
//!   "bridge": "gantry0", "subnets": ["10.244.1.0/24"], "mtu": 1500, "leaseDir": "/run/gantry/ipam" }
//! ```
//! Only `cniVersion`, `name`, `type` and `subnets` are required. Other plugins' knobs that would
//! change the meaning (`ipam`, `ipMasq`, port mappings) are refused by name instead of ignored.

use std::net::IpAddr;
use std::path::PathBuf;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::CniError;
use crate::ipam::Range;

/// The bridge's name unless configured.
pub const BRIDGE_NAME: &str = "gantry0";

/// Where leases live unless configured: on tmpfs.
pub const LEASE_DIR: &str = "/run/gantry/ipam";

/// What the node's end of a pod's veth is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum PodLink {
    /// A port of the bridge.
    #[default]
    Bridge,
    /// No port: a route of the node's leads to each address of the pod.
    Routed,
}

impl std::fmt::Display for PodLink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Bridge => "bridge",
            Self::Routed => "routed",
        })
    }
}

impl std::str::FromStr for PodLink {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let all = [Self::Bridge, Self::Routed];
        let found = all.into_iter().find(|link| link.to_string() == text);
        found.ok_or_else(|| format!("{text:?}: want bridge or routed"))
    }
}

/// What we speak, oldest first.
pub const SUPPORTED_VERSIONS: [&str; 3] = ["0.4.0", "1.0.0", "1.1.0"];

/// A validated network.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BridgeNetwork {
    /// The network's name: the directory of its leases.
    pub name: String,
    /// The bridge's name. It has the gateways' addresses also where pods are no ports of it.
    pub bridge: String,
    /// How pods are attached from now on; a `gantry-bridge` attaches to its bridge.
    pub link: PodLink,
    /// Bytes; none: that of the link the default route leaves by, else 1500.
    pub mtu: Option<u32>,
    /// At most one per family, in the order of the configuration.
    pub ranges: Vec<Range>,
    /// Leases are below `<lease_dir>/<name>`.
    pub lease_dir: PathBuf,
}

/// The plugin's view of a network configuration: the network, and what belongs to the call.
#[derive(Clone, Debug)]
pub struct PluginConfig {
    /// One of [`SUPPORTED_VERSIONS`].
    pub version: String,
    /// What to attach to.
    pub network: BridgeNetwork,
    /// The result of ADD, or of the plugin before us in the chain.
    pub prev_result: Option<Value>,
    /// GC: attachments that stay, `(container id, interface)`.
    pub valid_attachments: Option<Vec<(String, String)>>,
}

#[derive(Deserialize)]
struct Raw {
    #[serde(rename = "cniVersion")]
    version: Option<String>,
    name: Option<String>,
    bridge: Option<String>,
    mtu: Option<u64>,
    #[serde(default)]
    subnets: Vec<String>,
    #[serde(rename = "leaseDir")]
    lease_dir: Option<PathBuf>,
    #[serde(rename = "prevResult")]
    prev_result: Option<Value>,
    ipam: Option<Value>,
    #[serde(rename = "ipMasq", default)]
    ip_masq: bool,
    #[serde(rename = "isGateway", default = "yes")]
    is_gateway: bool,
    #[serde(default)]
    capabilities: serde_json::Map<String, Value>,
    #[serde(rename = "runtimeConfig", default)]
    runtime_config: serde_json::Map<String, Value>,
    #[serde(rename = "cni.dev/valid-attachments", alias = "cni.dev/attachments")]
    valid_attachments: Option<Vec<RawAttachment>>,
}

#[derive(Deserialize)]
struct RawAttachment {
    #[serde(rename = "containerID")]
    container_id: String,
    ifname: String,
}

fn yes() -> bool {
    true
}

/// The version a configuration asks for, before anything else of it is understood; "0.1.0" when
/// absent, as the specification has it.
pub fn version_of(config: &[u8]) -> String {
    #[derive(Deserialize)]
    struct Version {
        #[serde(rename = "cniVersion")]
        version: Option<String>,
    }
    let version = serde_json::from_slice::<Version>(config).ok();
    (version.and_then(|version| version.version)).unwrap_or_else(|| "0.1.0".into())
}

impl PluginConfig {
    /// Reads and validates a configuration.
    ///
    /// # Errors
    /// Names the field, its value and what would be right.
    pub fn parse(config: &[u8]) -> Result<Self, CniError> {
        let raw: Raw =
            serde_json::from_slice(config).map_err(|error| CniError::Decode(error.to_string()))?;
        let version = raw.version.clone().unwrap_or_else(|| "0.1.0".into());
        if !SUPPORTED_VERSIONS.contains(&version.as_str()) {
            return Err(CniError::Version {
                version,
                supported: SUPPORTED_VERSIONS.join(", "),
            });
        }
        refuse_foreign(&raw)?;
        let attachments = raw.valid_attachments.as_ref().map(|attachments| {
            (attachments.iter())
                .map(|a| (a.container_id.clone(), a.ifname.clone()))
                .collect()
        });
        Ok(Self {
            version,
            network: BridgeNetwork::from_raw(&raw)?,
            prev_result: raw.prev_result,
            valid_attachments: attachments,
        })
    }
}

/// Refuses what would otherwise silently not happen.
fn refuse_foreign(raw: &Raw) -> Result<(), CniError> {
    let unsupported = |field: &str, message: &str| {
        Err(CniError::Unsupported {
            field: field.into(),
            message: message.into(),
        })
    };
    if raw.ipam.as_ref().is_some_and(|ipam| !ipam.is_null()) {
        return unsupported(
            "ipam",
            "gantry-bridge leases from `subnets` itself; remove it",
        );
    }
    if raw.ip_masq {
        return unsupported(
            "ipMasq",
            "gantry-bridge never translates addresses; remove it",
        );
    }
    if !raw.is_gateway {
        return unsupported(
            "isGateway",
            "the bridge is always the pods' gateway; remove it",
        );
    }
    for (capability, instead) in [
        ("portMappings", "chain the portmap plugin after it"),
        ("bandwidth", "chain the bandwidth plugin after it"),
        ("ips", "addresses are chosen by gantry-bridge"),
        ("mac", "the address of the link follows from the IP address"),
    ] {
        let asked = raw
            .capabilities
            .get(capability)
            .is_some_and(|v| *v == Value::Bool(true));
        if asked || raw.runtime_config.contains_key(capability) {
            let field = format!("capabilities.{capability}");
            return unsupported(&field, &format!("not done by gantry-bridge: {instead}"));
        }
    }
    Ok(())
}

impl BridgeNetwork {
    /// The agent's own network: name `gantry`, the usual bridge.
    pub fn new(prefixes: &[IpNet], lease_dir: PathBuf) -> Result<Self, CniError> {
        let network = Self {
            name: "gantry".into(),
            bridge: BRIDGE_NAME.into(),
            link: PodLink::Bridge,
            mtu: None,
            ranges: ranges(prefixes)?,
            lease_dir,
        };
        Ok(network)
    }

    fn from_raw(raw: &Raw) -> Result<Self, CniError> {
        let name = raw.name.clone().unwrap_or_default();
        check_name(&name)?;
        let bridge = raw.bridge.clone().unwrap_or_else(|| BRIDGE_NAME.into());
        check_ifname(&bridge).map_err(|message| invalid("bridge", message))?;
        let mtu = match raw.mtu {
            None | Some(0) => None,
            // 68 is the least IPv4 works with; 1280 is IPv6's.
            Some(mtu @ 68..=65535) => Some(mtu as u32),
            Some(mtu) => return Err(invalid("mtu", format!("{mtu}: want 68 to 65535 bytes"))),
        };
        if raw.subnets.is_empty() {
            let message = "missing: want this node's pod prefix, e.g. [\"10.244.1.0/24\"]";
            return Err(invalid("subnets", message.into()));
        }
        let mut prefixes = Vec::new();
        for (index, text) in raw.subnets.iter().enumerate() {
            let prefix = text.parse::<IpNet>().map_err(|_| {
                let field = format!("subnets[{index}]");
                invalid(
                    &field,
                    format!("{text:?}: want a prefix like 10.244.1.0/24"),
                )
            })?;
            prefixes.push(prefix);
        }
        let lease_dir = raw.lease_dir.clone().unwrap_or_else(|| LEASE_DIR.into());
        if !lease_dir.is_absolute() {
            let message = format!("{}: want an absolute path", lease_dir.display());
            return Err(invalid("leaseDir", message));
        }
        Ok(Self {
            name,
            bridge,
            link: PodLink::Bridge,
            mtu,
            ranges: ranges(&prefixes)?,
            lease_dir,
        })
    }

    /// The first host of each range, with the range's prefix length: the bridge's addresses.
    pub fn gateways(&self) -> Vec<IpNet> {
        let gateways = self.ranges.iter().map(|range| {
            let prefix_len = range.prefix().prefix_len();
            IpNet::new_assert(range.gateway(), prefix_len)
        });
        gateways.collect()
    }
}

fn ranges(prefixes: &[IpNet]) -> Result<Vec<Range>, CniError> {
    let is_v4 = |prefix: &&IpNet| prefix.addr().is_ipv4();
    let v4_count = prefixes.iter().filter(is_v4).count();
    if v4_count > 1 || prefixes.len() - v4_count > 1 {
        let list: Vec<String> = prefixes.iter().map(ToString::to_string).collect();
        let message = format!("{}: want at most one per address family", list.join(", "));
        return Err(invalid("subnets", message));
    }
    prefixes.iter().map(|prefix| Range::new(*prefix)).collect()
}

fn invalid(field: &str, message: String) -> CniError {
    CniError::Config {
        field: field.into(),
        message,
    }
}

/// The specification's grammar of network names and container ids.
fn is_name(text: &str) -> bool {
    text.len() <= 253
        && text
            .as_bytes()
            .first()
            .is_some_and(u8::is_ascii_alphanumeric)
        && (text.bytes()).all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'))
}

fn check_name(name: &str) -> Result<(), CniError> {
    if is_name(name) {
        return Ok(());
    }
    let message =
        format!("{name:?}: want a letter or digit, then letters, digits, '_', '.' or '-'");
    Err(invalid("name", message))
}

/// Checks a container id: it becomes part of a lease.
pub fn check_container_id(id: &str) -> Result<(), CniError> {
    if is_name(id) {
        return Ok(());
    }
    Err(CniError::Environment {
        variable: "CNI_CONTAINERID",
        message: format!("{id:?}: want a letter or digit, then letters, digits, '_', '.' or '-'"),
    })
}

/// Checks an interface name as the kernel does.
pub fn check_ifname(name: &str) -> Result<(), String> {
    let fits = (1..=15).contains(&name.len())
        && name != "."
        && name != ".."
        && (name.bytes()).all(|b| b.is_ascii_graphic() && b != b'/' && b != b':');
    if fits {
        Ok(())
    } else {
        Err(format!(
            "{name:?}: want 1 to 15 printable characters without '/' and ':'"
        ))
    }
}

/// A locally administered hardware address that follows from the IP address (`0a:58` + the last
/// four bytes, as kubenet has it): when an address is reused, neighbour entries stay right.
pub fn mac_of(address: IpAddr) -> [u8; 6] {
    let last = match address {
        IpAddr::V4(address) => address.octets(),
        IpAddr::V6(address) => {
            let [.., a, b, c, d] = address.octets();
            [a, b, c, d]
        }
    };
    [0x0a, 0x58, last[0], last[1], last[2], last[3]]
}

/// The hardware address of the node's end of a routed pod's veth, by the pod's first address. Given
/// when the link is made, so that no rule of the machine's device manager replaces it: the pod's way
/// out is an entry with this address.
pub fn routed_mac_of(address: IpAddr) -> [u8; 6] {
    let ([first, second], [.., a, b, c, d]) = (ROUTED_MAC, mac_of(address));
    [first, second, a, b, c, d]
}

/// What such an address begins with.
pub const ROUTED_MAC: [u8; 2] = [0x0a, 0x59];

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> Result<PluginConfig, CniError> {
        PluginConfig::parse(json.as_bytes())
    }

    fn message(json: &str) -> String {
        parse(json).unwrap_err().to_string()
    }

    const GOOD: &str = r#"{"cniVersion":"1.1.0","name":"gantry","type":"gantry-bridge",
        "subnets":["10.244.1.0/24","fd00:1::/64"],"mtu":1450}"#;

    #[test]
    fn a_whole_configuration_is_understood() {
        let config = parse(GOOD).unwrap();
        assert_eq!(config.network.bridge, "gantry0");
        assert_eq!(config.network.mtu, Some(1450));
        let gateways: Vec<_> = config
            .network
            .gateways()
            .iter()
            .map(ToString::to_string)
            .collect();
        assert_eq!(gateways, ["10.244.1.1/24", "fd00:1::1/64"]);
    }

    #[test]
    fn each_bad_field_is_named_with_its_value() {
        let with = |field: &str, value: &str| {
            let mut config: Value = serde_json::from_str(GOOD).unwrap();
            config[field] = serde_json::from_str(value).unwrap();
            message(&config.to_string())
        };
        assert!(with("name", "\"a/b\"").contains("name: \"a/b\": want a letter"));
        assert!(with("bridge", "\"sixteen-letters-x\"").contains("bridge: \"sixteen-letters-x\""));
        assert!(with("mtu", "20").contains("mtu: 20: want 68 to 65535"));
        assert!(with("subnets", "[]").contains("subnets: missing"));
        assert!(with("subnets", "[\"10.0.0\"]").contains("subnets[0]: \"10.0.0\""));
        let twice = with("subnets", "[\"10.0.0.0/24\",\"10.0.1.0/24\"]");
        assert!(twice.contains("at most one per address family"), "{twice}");
        assert!(with("leaseDir", "\"x\"").contains("leaseDir: x: want an absolute path"));
        assert!(with("ipam", "{\"type\":\"host-local\"}").contains("ipam: gantry-bridge leases"));
        assert!(with("ipMasq", "true").contains("ipMasq"));
        assert!(with("capabilities", "{\"portMappings\":true}").contains("portmap plugin"));
        assert!(with("cniVersion", "\"0.1.0\"").contains("want one of 0.4.0, 1.0.0, 1.1.0"));
    }

    #[test]
    fn errors_carry_the_codes_of_the_specification() {
        assert_eq!(parse("{").unwrap_err().code(), 6);
        assert_eq!(parse("{\"cniVersion\":\"9.9.9\"}").unwrap_err().code(), 1);
        assert_eq!(
            parse("{\"cniVersion\":\"1.0.0\",\"name\":\"x\"}")
                .unwrap_err()
                .code(),
            7
        );
    }

    #[test]
    fn the_hardware_address_follows_from_the_address() {
        assert_eq!(
            mac_of("10.244.1.5".parse().unwrap()),
            [0x0a, 0x58, 10, 244, 1, 5]
        );
        assert_eq!(
            mac_of("fd00::1:5".parse().unwrap()),
            [0x0a, 0x58, 0, 1, 0, 5]
        );
        assert_eq!(
            routed_mac_of("10.244.1.5".parse().unwrap()),
            [0x0a, 0x59, 10, 244, 1, 5]
        );
    }
}
