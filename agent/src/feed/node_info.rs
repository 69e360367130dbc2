//! What this machine is: the Node object's labels and status, read from `/proc` and the links.
//!
//! Reading is thin; what is computed from the texts is pure and tested. Capacity is what the
//! machine has; allocatable leaves out what [`Reserved`] keeps for the system and the agent.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;

use gantry_api::k8s_openapi::api::core::v1::{
    Node, NodeAddress, NodeCondition, NodeStatus, NodeSystemInfo,
};
use gantry_api::k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use gantry_api::k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

/// Pods per node unless configured otherwise: Kubernetes' default.
pub const PODS_MAX_DEFAULT: u32 = 110;

/// Less than this available means MemoryPressure: the kubelet's default eviction threshold
/// (<https://kubernetes.io/docs/concepts/scheduling-eviction/node-pressure-eviction/#hard-eviction-thresholds>).
const MEMORY_PRESSURE_BYTES: u64 = 100 << 20;
/// Less than this share of the file system available means DiskPressure: the kubelet's default.
const DISK_PRESSURE_PERCENT: u64 = 10;
/// More than this share of the pids in use means PIDPressure.
const PID_PRESSURE_PERCENT: u64 = 90;

/// What allocatable leaves out.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Reserved {
    /// 1000 = one CPU.
    pub cpu_millicores: u64,
    /// Memory for the system and the agent.
    pub memory_bytes: u64,
}

/// Names and limits that are configured, not read.
#[derive(Clone, Debug)]
pub struct NodeIdentity {
    /// metadata.name
    pub name: String,
    /// The address others reach this node at; none: that of the default route's interface.
    pub address: Option<IpAddr>,
    /// status.capacity.pods
    pub pods_max: u32,
    /// See [`Reserved`].
    pub reserved: Reserved,
    /// Additional labels; those that Kubernetes defines are set from the machine.
    pub labels: BTreeMap<String, String>,
}

impl NodeIdentity {
    /// A node with the default limits.
    pub fn new(name: String) -> Self {
        Self {
            name,
            address: None,
            pods_max: PODS_MAX_DEFAULT,
            reserved: Reserved::default(),
            labels: BTreeMap::new(),
        }
    }
}

/// What was read from the machine.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
struct Machine {
    cpu_count: u64,
    memory_bytes: u64,
    memory_available_bytes: u64,
    disk_bytes: u64,
    disk_available_bytes: u64,
    pid_count: u64,
    pid_limit: u64,
    hostname: String,
    address: Option<IpAddr>,
    boot_id: String,
    machine_id: String,
    system_uuid: String,
    kernel: String,
    os_image: String,
}

/// Reads the machine and makes its Node object: labels, capacity, allocatable, addresses,
/// nodeInfo and conditions (without times: the control plane sets them).
///
/// * `lib` – whose file system is the node's ephemeral storage.
pub fn read(identity: &NodeIdentity, lib: &Path) -> Node {
    node(identity, &Machine::read(lib))
}

fn text(path: &str) -> String {
    std::fs::read_to_string(path)
        .map(|text| text.trim().to_owned())
        .unwrap_or_default()
}

impl Machine {
    fn read(lib: &Path) -> Self {
        let (memory_bytes, memory_available_bytes) = memory(&text("/proc/meminfo"));
        let (disk_bytes, disk_available_bytes) = disk(lib);
        Self {
            cpu_count: std::thread::available_parallelism().map_or(1, |count| count.get() as u64),
            memory_bytes,
            memory_available_bytes,
            disk_bytes,
            disk_available_bytes,
            pid_count: task_count(&text("/proc/loadavg")),
            pid_limit: text("/proc/sys/kernel/pid_max").parse().unwrap_or(0),
            hostname: text("/proc/sys/kernel/hostname"),
            address: own_address(&text("/proc/net/route")),
            boot_id: text("/proc/sys/kernel/random/boot_id"),
            machine_id: text("/etc/machine-id"),
            system_uuid: text("/sys/class/dmi/id/product_uuid"),
            kernel: text("/proc/sys/kernel/osrelease"),
            os_image: os_image(&text("/etc/os-release")),
        }
    }
}

/// Total and available, in bytes.
fn memory(meminfo: &str) -> (u64, u64) {
    let field = |name: &str| {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name));
        let kib = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
        kib.unwrap_or(0) * 1024
    };
    (field("MemTotal:"), field("MemAvailable:"))
}

/// Size and available bytes of the file system of a path, or of its nearest ancestor that exists.
fn disk(path: &Path) -> (u64, u64) {
    let stat = path
        .ancestors()
        .find_map(|path| nix::sys::statvfs::statvfs(path).ok());
    stat.map_or((0, 0), |stat| {
        let block = stat.fragment_size();
        (stat.blocks() * block, stat.blocks_available() * block)
    })
}

/// Tasks of the whole machine: the part after the slash of `0.00 0.01 0.05 2/340 1234`.
fn task_count(loadavg: &str) -> u64 {
    let tasks = loadavg
        .split_whitespace()
        .nth(3)
        .and_then(|field| field.split('/').nth(1));
    tasks.and_then(|count| count.parse().ok()).unwrap_or(0)
}

fn os_image(os_release: &str) -> String {
    let name = os_release
        .lines()
        .find_map(|line| line.strip_prefix("PRETTY_NAME="));
    name.map(|name| name.trim_matches('"').to_owned())
        .unwrap_or_else(|| "Linux".into())
}

/// The interface of the default route with the lowest metric in `/proc/net/route`.
fn default_interface(routes: &str) -> Option<&str> {
    let default = routes.lines().skip(1).filter_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let (name, destination, mask) = (fields.first()?, fields.get(1)?, fields.get(7)?);
        let metric: u32 = fields.get(6)?.parse().ok()?;
        (*destination == "00000000" && *mask == "00000000").then_some((metric, *name))
    });
    default.min().map(|(_, name)| name)
}

/// The address of the default route's interface, else the first that is not loopback.
fn own_address(routes: &str) -> Option<IpAddr> {
    let addresses: Vec<(String, Ipv4Addr)> = nix::ifaddrs::getifaddrs()
        .ok()?
        .filter_map(|interface| {
            let address = interface.address?.as_sockaddr_in()?.ip();
            Some((interface.interface_name, address))
        })
        .collect();
    let on_default = default_interface(routes)
        .and_then(|name| addresses.iter().find(|(interface, _)| interface == name));
    let other = addresses
        .iter()
        .find(|(_, ip)| !ip.is_loopback() && !ip.is_link_local());
    on_default.or(other).map(|(_, ip)| IpAddr::V4(*ip))
}

fn condition(kind: &str, status: bool, reason: &str, message: &str) -> NodeCondition {
    NodeCondition {
        type_: kind.into(),
        status: if status { "True" } else { "False" }.into(),
        reason: Some(reason.into()),
        message: Some(message.into()),
        ..Default::default()
    }
}

fn pressure(kind: &str, pressed: bool, what: &str) -> NodeCondition {
    let (reason, state) = if pressed {
        ("Has", "little left of")
    } else {
        ("HasSufficient", "enough")
    };
    let subject = kind.trim_end_matches("Pressure");
    let reason = if pressed {
        format!("{reason}{kind}")
    } else {
        format!("{reason}{subject}")
    };
    condition(
        kind,
        pressed,
        &reason,
        &format!("the node has {state} {what}"),
    )
}

fn conditions(machine: &Machine) -> Vec<NodeCondition> {
    let memory = machine.memory_bytes > 0 && machine.memory_available_bytes < MEMORY_PRESSURE_BYTES;
    let disk = machine.disk_bytes > 0
        && machine.disk_available_bytes * 100 < machine.disk_bytes * DISK_PRESSURE_PERCENT;
    let pids =
        machine.pid_limit > 0 && machine.pid_count * 100 > machine.pid_limit * PID_PRESSURE_PERCENT;
    vec![
        pressure("MemoryPressure", memory, "memory"),
        pressure("DiskPressure", disk, "disk space"),
        pressure("PIDPressure", pids, "process ids"),
        condition("Ready", true, "AgentReady", "the agent is connected"),
    ]
}

/// Kubernetes' name of an architecture.
fn architecture(rust: &str) -> &str {
    match rust {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "x86" => "386",
        "powerpc64" => "ppc64le",
        other => other,
    }
}

fn resources(
    cpu_millicores: u64,
    memory_bytes: u64,
    disk_bytes: u64,
    pods_max: u32,
) -> BTreeMap<String, Quantity> {
    let cpu = if cpu_millicores.is_multiple_of(1000) {
        (cpu_millicores / 1000).to_string()
    } else {
        format!("{cpu_millicores}m")
    };
    [
        ("cpu", cpu),
        ("memory", format!("{}Ki", memory_bytes / 1024)),
        ("ephemeral-storage", format!("{}Ki", disk_bytes / 1024)),
        ("pods", pods_max.to_string()),
    ]
    .into_iter()
    .map(|(name, value)| (name.to_owned(), Quantity(value)))
    .collect()
}

fn node(identity: &NodeIdentity, machine: &Machine) -> Node {
    let arch = architecture(std::env::consts::ARCH);
    let hostname = if machine.hostname.is_empty() {
        &identity.name
    } else {
        &machine.hostname
    };
    let address = identity
        .address
        .or(machine.address)
        .unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST));
    let mut labels = identity.labels.clone();
    labels.insert("kubernetes.io/hostname".into(), identity.name.clone());
    labels.insert("kubernetes.io/arch".into(), arch.into());
    labels.insert("kubernetes.io/os".into(), "linux".into());
    let reserved = identity.reserved;
    let cpu_millicores = machine.cpu_count * 1000;
    let version = concat!("gantry-", env!("CARGO_PKG_VERSION"));
    let named = |kind: &str, address: String| NodeAddress {
        type_: kind.into(),
        address,
    };
    let status = NodeStatus {
        capacity: Some(resources(
            cpu_millicores,
            machine.memory_bytes,
            machine.disk_bytes,
            identity.pods_max,
        )),
        allocatable: Some(resources(
            cpu_millicores.saturating_sub(reserved.cpu_millicores),
            machine.memory_bytes.saturating_sub(reserved.memory_bytes),
            machine.disk_bytes,
            identity.pods_max,
        )),
        addresses: Some(vec![
            named("InternalIP", address.to_string()),
            named("Hostname", hostname.clone()),
        ]),
        conditions: Some(conditions(machine)),
        node_info: Some(NodeSystemInfo {
            architecture: arch.into(),
            boot_id: machine.boot_id.clone(),
            container_runtime_version: format!("gantry://{}", env!("CARGO_PKG_VERSION")),
            kernel_version: machine.kernel.clone(),
            kube_proxy_version: version.into(),
            kubelet_version: version.into(),
            machine_id: machine.machine_id.clone(),
            operating_system: "linux".into(),
            os_image: machine.os_image.clone(),
            system_uuid: machine.system_uuid.clone(),
            ..Default::default()
        }),
        ..Default::default()
    };
    Node {
        metadata: ObjectMeta {
            name: Some(identity.name.clone()),
            labels: Some(labels),
            ..Default::default()
        },
        status: Some(status),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_is_read_in_bytes() {
        let meminfo = "MemTotal:  2048 kB\nMemFree: 1 kB\nMemAvailable:  1024 kB\n";
        assert_eq!(memory(meminfo), (2 << 20, 1 << 20));
        assert_eq!(memory(""), (0, 0));
    }

    #[test]
    fn the_default_route_with_the_lowest_metric_wins() {
        let routes = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\n\
            wlan0\t00000000\t0102A8C0\t0003\t0\t0\t600\t00000000\t0\n\
            eth0\t00000000\t0102A8C0\t0003\t0\t0\t100\t00000000\t0\n\
            br0\t0000F40A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\n";
        assert_eq!(default_interface(routes), Some("eth0"));
        assert_eq!(default_interface("Iface\n"), None);
    }

    #[test]
    fn pressure_conditions_follow_the_machine() {
        let healthy = Machine {
            memory_bytes: 8 << 30,
            memory_available_bytes: 4 << 30,
            disk_bytes: 100,
            disk_available_bytes: 50,
            pid_count: 10,
            pid_limit: 1000,
            ..Default::default()
        };
        let status = |machine: &Machine, kind: &str| {
            let all = conditions(machine);
            all.into_iter()
                .find(|c| c.type_ == kind)
                .map(|c| c.status)
                .unwrap()
        };
        for kind in ["MemoryPressure", "DiskPressure", "PIDPressure"] {
            assert_eq!(status(&healthy, kind), "False");
        }
        let pressed = Machine {
            memory_available_bytes: 1 << 20,
            disk_available_bytes: 5,
            pid_count: 950,
            ..healthy
        };
        for kind in ["MemoryPressure", "DiskPressure", "PIDPressure", "Ready"] {
            assert_eq!(status(&pressed, kind), "True");
        }
    }

    #[test]
    fn allocatable_leaves_out_what_is_reserved() {
        let mut identity = NodeIdentity::new("n".into());
        identity.reserved = Reserved {
            cpu_millicores: 250,
            memory_bytes: 1 << 20,
        };
        let machine = Machine {
            cpu_count: 2,
            memory_bytes: 4 << 20,
            ..Default::default()
        };
        let status = node(&identity, &machine).status.unwrap();
        assert_eq!(status.capacity.unwrap()["cpu"].0, "2");
        let allocatable = status.allocatable.unwrap();
        assert_eq!(allocatable["cpu"].0, "1750m");
        assert_eq!(allocatable["memory"].0, "3072Ki");
        assert_eq!(allocatable["pods"].0, "110");
    }

    #[test]
    fn this_machine_can_be_read() {
        let node = read(&NodeIdentity::new("n".into()), Path::new("/no/such/path"));
        let status = node.status.unwrap();
        assert_ne!(status.capacity.unwrap()["memory"].0, "0Ki");
        assert_eq!(status.addresses.unwrap().len(), 2);
        assert!(!status.node_info.unwrap().boot_id.is_empty());
    }
}
