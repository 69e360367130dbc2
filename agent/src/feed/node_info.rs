//! What this machine is: the Node object's labels and status, read from `/proc` and the links.
//!
//! Reading is thin; what is computed from the texts is pure and tested. Capacity is what the
//! machine has; allocatable leaves out what is reserved for the system and the agent and the room
//! that eviction defends. Pressure is judged elsewhere ([`crate::pressure`]) and shown here.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use gantry_api::k8s_openapi::api::core::v1::{
    Node, NodeAddress, NodeCondition, NodeStatus, NodeSwapStatus, NodeSystemInfo,
};
use gantry_api::k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use gantry_api::k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use gantry_cni::config::BRIDGE_NAME;
use gantry_cni::tunnel::TUNNEL_NAME;
use gantry_cni::wireguard::WIREGUARD_NAME;

use crate::devices::Offered;
use crate::network::Routes;
use crate::network::routes::KEY_ANNOTATION;
use crate::node::reservation::{Capacity, Reservation};
use crate::pressure::thresholds::Resource;

/// Pods per node unless configured otherwise: Kubernetes' default.
pub const PODS_MAX_DEFAULT: u32 = 110;

/// Names and limits that are configured, not read.
#[derive(Clone, Debug)]
pub struct NodeIdentity {
    /// metadata.name
    pub name: String,
    /// The address others reach this node at; none: that of the default route's interface.
    pub address: Option<IpAddr>,
    /// status.capacity.pods
    pub pods_max: u32,
    /// What allocatable leaves out: reserved, or defended by eviction.
    pub reserved: Reservation,
    /// Bytes of huge pages that can be limited, by page size.
    pub hugepages: BTreeMap<u64, u64>,
    /// What limits on this machine do not hold, one sentence each.
    pub degraded: Vec<String>,
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
            reserved: Reservation::default(),
            hugepages: BTreeMap::new(),
            degraded: Vec::new(),
            labels: BTreeMap::new(),
        }
    }
}

/// What was read from the machine.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
struct Machine {
    cpu_count: u64,
    memory_bytes: u64,
    hugepage_bytes: u64,
    swap_bytes: u64,
    disk_bytes: u64,
    hostname: String,
    address: Option<IpAddr>,
    /// That of IPv6 on the same interface.
    address_v6: Option<Ipv6Addr>,
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
/// * `pressures` – what the node is short of.
pub fn read(
    identity: &NodeIdentity,
    lib: &Path,
    own_address: &OwnAddress,
    pressures: &BTreeSet<Resource>,
) -> Node {
    node(identity, &Machine::read(lib, own_address), pressures)
}

/// The node's own address, read from its links only when its routes have changed, or after a minute: the
/// kernel lists all links for it, two for each pod.
#[derive(Default)]
pub struct OwnAddress(Mutex<Option<LastAddress>>);

struct LastAddress {
    /// `/proc/net/route`: an address brings the route of its network.
    routes: String,
    at: Instant,
    address: Option<IpAddr>,
}

impl OwnAddress {
    /// What it says for longer than this may hide an address without a network of its own.
    const LIFE: Duration = Duration::from_secs(60);

    fn of(&self, routes: &str, look: impl FnOnce(&str) -> Option<IpAddr>) -> Option<IpAddr> {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = &*last
            && known.routes == routes
            && known.at.elapsed() < Self::LIFE
        {
            return known.address;
        }
        let address = look(routes);
        *last = Some(LastAddress {
            routes: routes.to_owned(),
            at: Instant::now(),
            address,
        });
        address
    }
}

/// Cores and memory, before any flag is looked at.
pub fn capacity(pods_max: u32) -> Capacity {
    let memory = memory(&text("/proc/meminfo"));
    Capacity {
        cpu_count: cpu_count(),
        memory_bytes: memory.bytes,
        hugepage_bytes: memory.hugepage_bytes,
        pods: u64::from(pods_max),
    }
}

/// The highest process id, and so the most there can be; 0 when it cannot be read.
pub fn pid_max() -> u64 {
    text("/proc/sys/kernel/pid_max").parse().unwrap_or(0)
}

/// Size of the file system of a path.
pub fn disk_bytes(path: &Path) -> u64 {
    disk(path)
}

fn cpu_count() -> u64 {
    std::thread::available_parallelism().map_or(1, |count| count.get() as u64)
}

fn text(path: &str) -> String {
    std::fs::read_to_string(path)
        .map(|text| text.trim().to_owned())
        .unwrap_or_default()
}

impl Machine {
    fn read(lib: &Path, known: &OwnAddress) -> Self {
        let memory = memory(&text("/proc/meminfo"));
        let routes = text("/proc/net/route");
        let v6 = default_interface(&routes)
            .and_then(|name| own_v6_address(&text("/proc/net/if_inet6"), name));
        Self {
            cpu_count: cpu_count(),
            memory_bytes: memory.bytes,
            hugepage_bytes: memory.hugepage_bytes,
            swap_bytes: memory.swap_bytes,
            disk_bytes: disk(lib),
            hostname: text("/proc/sys/kernel/hostname"),
            address: known.of(&routes, own_address),
            address_v6: v6,
            boot_id: text("/proc/sys/kernel/random/boot_id"),
            machine_id: text("/etc/machine-id"),
            system_uuid: text("/sys/class/dmi/id/product_uuid"),
            kernel: text("/proc/sys/kernel/osrelease"),
            os_image: os_image(&text("/etc/os-release")),
        }
    }
}

/// What /proc/meminfo says, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct Memory {
    bytes: u64,
    /// Of those, set aside as huge pages.
    hugepage_bytes: u64,
    swap_bytes: u64,
}

fn memory(meminfo: &str) -> Memory {
    let field = |name: &str| {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name));
        let kib = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
        kib.unwrap_or(0) * 1024
    };
    Memory {
        bytes: field("MemTotal:"),
        hugepage_bytes: field("Hugetlb:"),
        swap_bytes: field("SwapTotal:"),
    }
}

/// Size of the file system of a path, or of its nearest ancestor that exists.
fn disk(path: &Path) -> u64 {
    let stat = path
        .ancestors()
        .find_map(|path| nix::sys::statvfs::statvfs(path).ok());
    stat.map_or(0, |stat| stat.blocks() * stat.fragment_size())
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
    first_address(&addresses, default_interface(routes))
}

/// Never one of our own links: the bridge and the tunnel have an address of pods.
fn first_address(addresses: &[(String, Ipv4Addr)], default: Option<&str>) -> Option<IpAddr> {
    let is_own = |name: &str| [BRIDGE_NAME, TUNNEL_NAME, WIREGUARD_NAME].contains(&name);
    let on_default =
        default.and_then(|name| addresses.iter().find(|(interface, _)| interface == name));
    let other = addresses
        .iter()
        .find(|(name, ip)| !is_own(name) && !ip.is_loopback() && !ip.is_link_local());
    on_default.or(other).map(|(_, ip)| IpAddr::V4(*ip))
}

/// The lasting global IPv6 address of an interface with the lowest number, in `/proc/net/if_inet6`.
fn own_v6_address(table: &str, interface: &str) -> Option<Ipv6Addr> {
    /// Where it holds: everywhere.
    const GLOBAL: &str = "00";
    /// Temporary, duplicate, deprecated (`IFA_F_*`).
    const FLEETING: u32 = 0x01 | 0x08 | 0x20;
    let addresses = table.lines().filter_map(|line| {
        let mut fields = line.split_whitespace();
        let address = u128::from_str_radix(fields.next()?, 16).ok()?;
        let (scope, flags, name) = (fields.nth(2)?, fields.next()?, fields.next()?);
        let flags = u32::from_str_radix(flags, 16).ok()?;
        let is_it = name == interface && scope == GLOBAL && flags & FLEETING == 0;
        is_it.then(|| Ipv6Addr::from(address))
    });
    addresses.min()
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

fn conditions(
    identity: &NodeIdentity,
    machine: &Machine,
    pressures: &BTreeSet<Resource>,
) -> Vec<NodeCondition> {
    let what = |resource| match resource {
        Resource::Memory => "memory",
        Resource::Disk => "disk space",
        Resource::Pids => "process ids",
    };
    let mut all: Vec<NodeCondition> = Resource::ALL
        .into_iter()
        .map(|r| pressure(r.condition(), pressures.contains(&r), what(r)))
        .collect();
    all.push(limits_degraded(&identity.degraded));
    all.push(swap(machine.swap_bytes));
    all.push(condition(
        "Ready",
        true,
        "AgentReady",
        "the agent is connected",
    ));
    all
}

/// The same node with the devices that plugins offer.
pub fn with_devices(mut node: Node, amounts: &Offered) -> Node {
    let Some(status) = &mut node.status else {
        return node;
    };
    let add = |name: &String, list: &mut Option<BTreeMap<String, Quantity>>, count: usize| {
        let list = list.get_or_insert_default();
        list.insert(name.clone(), Quantity(count.to_string()));
    };
    for (name, (total, healthy)) in amounts {
        add(name, &mut status.capacity, *total);
        add(name, &mut status.allocatable, *healthy);
    }
    node
}

/// The same node with what is known of its Service maps: additions will soon not fit, in words; "".
pub fn with_service_maps(mut node: Node, warning: &str) -> Node {
    let kind = "ServiceMapsPressure";
    let condition = match warning.is_empty() {
        true => condition(
            kind,
            false,
            "ServiceMapsHaveRoom",
            "the maps of Services have room",
        ),
        false => condition(kind, true, "ServiceMapsNearlyFull", warning),
    };
    if let Some(status) = &mut node.status {
        status.conditions.get_or_insert_default().push(condition);
    }
    node
}

/// The same node with how it reaches the pods of the others, and whom it does not.
pub fn with_routes(mut node: Node, routes: &Routes) -> Node {
    let kind = "RoutesDegraded";
    let warning = routes.warning();
    let condition = match warning.is_empty() {
        true => condition(kind, false, "NodesAreReached", &routes.summary()),
        false => condition(kind, true, "NodesOutOfReach", &warning),
    };
    if let Some(status) = &mut node.status {
        status.conditions.get_or_insert_default().push(condition);
    }
    node
}

/// The same node with the key that others reach it by; none: this is not done.
pub fn with_wireguard_key(mut node: Node, key: Option<&str>) -> Node {
    if let Some(key) = key {
        let annotations = node.metadata.annotations.get_or_insert_default();
        annotations.insert(KEY_ANNOTATION.to_owned(), key.to_owned());
    }
    node
}

/// The same node, that takes no pods any more.
pub fn going_down(mut node: Node) -> Node {
    let conditions = node.status.iter_mut();
    let conditions = conditions.flat_map(|status| status.conditions.iter_mut().flatten());
    for ready in conditions.filter(|condition| condition.type_ == "Ready") {
        *ready = condition("Ready", false, "NodeShutdown", "the node is shutting down");
    }
    node
}

/// What `describe node` says about limits that this machine cannot hold.
fn limits_degraded(sentences: &[String]) -> NodeCondition {
    let kind = "LimitsDegraded";
    match sentences.is_empty() {
        true => condition(kind, false, "AllLimitsHold", "every limit is held"),
        false => condition(kind, true, "KernelLacksSomething", &sentences.join("; ")),
    }
}

/// Pods never swap: their memory limits would mean something else from machine to machine.
fn swap(swap_bytes: u64) -> NodeCondition {
    let message = match swap_bytes {
        0 => "the machine has no swap".to_owned(),
        bytes => format!(
            "the machine has {} MiB of swap, of which pods get nothing (memory.swap.max is 0)",
            bytes >> 20
        ),
    };
    condition("PodsMaySwap", false, "NoSwap", &message)
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
    identity: &NodeIdentity,
) -> BTreeMap<String, Quantity> {
    let cpu = if cpu_millicores.is_multiple_of(1000) {
        (cpu_millicores / 1000).to_string()
    } else {
        format!("{cpu_millicores}m")
    };
    let pages = identity.hugepages.iter().map(|(size, bytes)| {
        let size = match size {
            size if *size >= 1 << 30 => format!("{}Gi", size >> 30),
            size if *size >= 1 << 20 => format!("{}Mi", size >> 20),
            size => format!("{}Ki", size >> 10),
        };
        (format!("hugepages-{size}"), bytes.to_string())
    });
    [
        ("cpu", cpu),
        ("memory", format!("{}Ki", memory_bytes / 1024)),
        ("ephemeral-storage", format!("{}Ki", disk_bytes / 1024)),
        ("pods", identity.pods_max.to_string()),
    ]
    .into_iter()
    .map(|(name, value)| (name.to_owned(), value))
    .chain(pages)
    .map(|(name, value)| (name, Quantity(value)))
    .collect()
}

fn node(identity: &NodeIdentity, machine: &Machine, pressures: &BTreeSet<Resource>) -> Node {
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
    // What an administrator has chosen is alone.
    let second = machine.address_v6.filter(|_| identity.address.is_none());
    let mut labels = identity.labels.clone();
    labels.insert("kubernetes.io/hostname".into(), identity.name.clone());
    labels.insert("kubernetes.io/arch".into(), arch.into());
    labels.insert("kubernetes.io/os".into(), "linux".into());
    let reserved = identity.reserved;
    let cpu_millicores = machine.cpu_count * 1000;
    let memory_allocatable = machine
        .memory_bytes
        .saturating_sub(reserved.memory_bytes)
        .saturating_sub(machine.hugepage_bytes);
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
            identity,
        )),
        allocatable: Some(resources(
            cpu_millicores.saturating_sub(reserved.cpu_millicores),
            memory_allocatable,
            machine.disk_bytes.saturating_sub(reserved.disk_bytes),
            identity,
        )),
        addresses: Some(
            [named("InternalIP", address.to_string())]
                .into_iter()
                .chain(second.map(|second| named("InternalIP", second.to_string())))
                .chain([named("Hostname", hostname.clone())])
                .collect(),
        ),
        conditions: Some(conditions(identity, machine, pressures)),
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
            swap: i64::try_from(machine.swap_bytes)
                .ok()
                .filter(|bytes| *bytes > 0)
                .map(|bytes| NodeSwapStatus {
                    capacity: Some(bytes),
                }),
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
        let meminfo = "MemTotal:  2048 kB\nMemFree: 1 kB\nSwapTotal:  1024 kB\nHugetlb: 4 kB\n";
        let read = Memory {
            bytes: 2 << 20,
            hugepage_bytes: 4 << 10,
            swap_bytes: 1 << 20,
        };
        assert_eq!(memory(meminfo), read);
        assert_eq!(memory(""), Memory::default());
    }

    #[test]
    fn links_are_listed_again_when_routes_have_changed() {
        let at = |last: u8| Some(IpAddr::V4(Ipv4Addr::new(192, 0, 2, last)));
        let own = OwnAddress::default();
        assert_eq!(own.of("a", |_| at(1)), at(1));
        assert_eq!(own.of("a", |_| panic!("listed again")), at(1));
        assert_eq!(own.of("b", |_| None), None);
        assert_eq!(own.of("a", |_| at(2)), at(2));
    }

    #[test]
    fn the_second_address_is_a_lasting_one_of_the_same_interface() {
        let table = "\
            fe800000000000005054000001fffe0c 02 40 20 80 eth0\n\
            fd001000000000000000000000010012 02 40 00 80 eth0\n\
            fd001000000000000000000000010011 02 40 00 01 eth0\n\
            fd001000000000000000000000020001 03 40 00 80 eth1\n\
            00000000000000000000000000000001 01 80 10 80 lo\n";
        let address = |name| own_v6_address(table, name).map(|address| address.to_string());
        assert_eq!(address("eth0"), Some("fd00:1000::1:12".into()));
        assert_eq!(address("eth1"), Some("fd00:1000::2:1".into()));
        assert_eq!(address("lo"), None);
        let machine = Machine {
            address: Some([192, 0, 2, 7].into()),
            address_v6: own_v6_address(table, "eth0"),
            ..Machine::default()
        };
        let addresses = |identity: &NodeIdentity| {
            let node = node(identity, &machine, &BTreeSet::new());
            let all = node.status.and_then(|status| status.addresses);
            all.into_iter()
                .flatten()
                .map(|it| it.address)
                .collect::<Vec<_>>()
        };
        let mut identity = NodeIdentity::new("a".into());
        assert_eq!(addresses(&identity), ["192.0.2.7", "fd00:1000::1:12", "a"]);
        identity.address = Some([192, 0, 2, 8].into());
        assert_eq!(addresses(&identity), ["192.0.2.8", "a"]);
    }

    #[test]
    fn a_node_is_not_reached_at_its_pods_gateway() {
        let at = |name: &str, last: u8| (name.to_owned(), Ipv4Addr::new(192, 0, 2, last));
        let all = [
            at("gantry0", 1),
            at("gantry-vxlan", 1),
            at("eth1", 7),
            at("eth0", 8),
        ];
        let seven = Some(IpAddr::from([192, 0, 2, 7]));
        assert_eq!(first_address(&all, None), seven);
        assert_eq!(
            first_address(&all, Some("eth0")),
            Some(IpAddr::from([192, 0, 2, 8]))
        );
        assert_eq!(first_address(&all[..2], None), None);
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
    fn conditions_say_what_is_short_and_what_does_not_hold() {
        let mut identity = NodeIdentity::new("n".into());
        identity.degraded = vec!["no PSI".into(), "no hugetlb".into()];
        let machine = Machine {
            swap_bytes: 2 << 30,
            ..Default::default()
        };
        let all = conditions(&identity, &machine, &[Resource::Disk].into());
        let of = |kind: &str| {
            let found = all.iter().find(|c| c.type_ == kind).unwrap();
            (found.status.as_str(), found.message.clone().unwrap())
        };
        assert_eq!(of("MemoryPressure").0, "False");
        assert_eq!(of("DiskPressure").0, "True");
        assert_eq!(of("PIDPressure").0, "False");
        assert_eq!(of("Ready").0, "True");
        assert_eq!(of("LimitsDegraded"), ("True", "no PSI; no hugetlb".into()));
        assert!(of("PodsMaySwap").1.contains("2048 MiB of swap"));
    }

    #[test]
    fn allocatable_leaves_out_what_is_reserved() {
        let mut identity = NodeIdentity::new("n".into());
        identity.reserved = Reservation {
            cpu_millicores: 250,
            memory_bytes: 1 << 20,
            disk_bytes: 1 << 20,
            pids: 0,
        };
        identity.hugepages = [(2 << 20, 2 << 20)].into();
        let machine = Machine {
            cpu_count: 2,
            memory_bytes: 6 << 20,
            hugepage_bytes: 2 << 20,
            disk_bytes: 3 << 20,
            ..Default::default()
        };
        let status = node(&identity, &machine, &BTreeSet::new()).status.unwrap();
        assert_eq!(status.capacity.unwrap()["cpu"].0, "2");
        let allocatable = status.allocatable.unwrap();
        assert_eq!(allocatable["cpu"].0, "1750m");
        assert_eq!(allocatable["memory"].0, "3072Ki");
        assert_eq!(allocatable["ephemeral-storage"].0, "2048Ki");
        assert_eq!(allocatable["hugepages-2Mi"].0, "2097152");
        assert_eq!(allocatable["pods"].0, "110");
    }

    #[test]
    fn this_machine_can_be_read() {
        let node = read(
            &NodeIdentity::new("n".into()),
            Path::new("/no/such/path"),
            &OwnAddress::default(),
            &BTreeSet::new(),
        );
        let status = node.status.unwrap();
        assert_ne!(status.capacity.unwrap()["memory"].0, "0Ki");
        // One of each family that the machine has, and its name.
        let addresses = status.addresses.unwrap();
        assert!((2..=3).contains(&addresses.len()), "{addresses:?}");
        assert_eq!(addresses.last().unwrap().type_, "Hostname");
        assert!(!status.node_info.unwrap().boot_id.is_empty());
    }
}
