//! Who is behind an address, an interface or a network namespace.
//!
//! | what | says |
//! |---|---|
//! | the packet path's own tables | the pods of this node, also before their status names an address |
//! | backends of Services, peers of policies | pods elsewhere |
//! | Services, their ports on nodes | frontends |
//! | nodes | nodes, this one for its own processes |

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::path::Path;

use ebpf_maps::event::{FlowEvent, NO_IP, POINT_FROM_POD, POINT_SEND, POINT_TO_POD};
use ebpf_maps::services::Addr;
use gantry_api::proto;
use gantry_cni::netns::{self, Netns};

use crate::dataplane::{PodPlaces, netns_cookie};
use crate::services::index::{ip_of, label64, parse_address};
use crate::view::{ServiceName, View};

/// `FlowEnd.kind`
const POD: &str = "pod";
const SERVICE: &str = "service";
const NODE: &str = "node";

/// Pods' network namespaces by their cookies.
#[derive(Clone, Default, Debug)]
pub struct Namespaces {
    /// The hash of the pod's UID, by the cookie.
    pub pods: HashMap<u64, u64>,
    /// The node's own.
    pub own: u64,
    /// The pods that were looked at.
    pub(super) looked: BTreeMap<String, u64>,
}

impl Namespaces {
    /// Looks at the pods in this directory that it has not seen yet.
    pub async fn look(&mut self, pods: &Path) {
        if self.own == 0 {
            self.own = netns_cookie().unwrap_or_default();
        }
        let mut looked = BTreeMap::new();
        for entry in std::fs::read_dir(pods).into_iter().flatten().flatten() {
            let Ok(uid) = entry.file_name().into_string() else {
                continue;
            };
            let cookie = match self.looked.get(&uid) {
                Some(cookie) => *cookie,
                None => match cookie_of(&entry.path().join("ns/net")).await {
                    Some(cookie) => cookie,
                    None => continue, // with host network, or on its way in or out
                },
            };
            looked.insert(uid, cookie);
        }
        let known = looked.iter().filter(|(_, cookie)| **cookie != self.own);
        self.pods = known.map(|(uid, cookie)| (*cookie, label64(uid))).collect();
        self.looked = looked;
    }
}

async fn cookie_of(path: &Path) -> Option<u64> {
    let netns = Netns::open(path).ok()?;
    let cookie = netns::within(&netns, || Ok(netns_cookie())).await;
    cookie.ok()?.ok()
}

/// Namespace and name.
type Name = (String, String);

/// The names of one moment.
#[derive(Default, Debug)]
pub struct Names {
    node: String,
    pods: HashMap<IpAddr, Name>,
    nodes: HashMap<IpAddr, String>,
    services: HashMap<IpAddr, ServiceName>,
    node_ports: HashMap<(u8, u16), ServiceName>,
    own: HashMap<u64, Name>,
    interfaces: BTreeMap<u32, u64>,
    cookies: HashMap<u64, u64>,
    own_cookie: u64,
}

impl Names {
    /// Of everything that the node knows.
    pub fn new(node: &str, view: &View, places: &PodPlaces, namespaces: &Namespaces) -> Self {
        let mut names = Self {
            node: node.to_owned(),
            interfaces: places.interfaces.clone(),
            cookies: namespaces.pods.clone(),
            own_cookie: namespaces.own,
            ..Self::default()
        };
        for (uid, pod) in view.pods.iter() {
            let name = |part: &Option<String>| part.clone().unwrap_or_default();
            let (namespace, pod) = (name(&pod.metadata.namespace), name(&pod.metadata.name));
            names.own.insert(label64(uid.as_str()), (namespace, pod));
        }
        for (name, route) in view.nodes.iter() {
            for address in addresses(&route.addresses) {
                names.nodes.insert(address, name.clone());
            }
        }
        for members in view.peers.values() {
            for (name, peer) in members.iter() {
                let Some((namespace, pod)) = name.split_once('/') else {
                    continue;
                };
                for address in addresses(&peer.addresses) {
                    names.pods.insert(address, (namespace.into(), pod.into()));
                }
            }
        }
        for backend in view.backends.values().flat_map(|all| all.values()) {
            if backend.pod_name.is_empty() {
                continue;
            }
            for address in addresses(&backend.addresses) {
                let name = (backend.pod_namespace.clone(), backend.pod_name.clone());
                names.pods.insert(address, name);
            }
        }
        // This node knows best who has an address here.
        for (address, id) in &places.addresses {
            if let Some(name) = names.own.get(id) {
                names.pods.insert(*address, name.clone());
            }
        }
        // A pod with host network is known by its node.
        names
            .pods
            .retain(|address, _| !names.nodes.contains_key(address));
        for (name, service) in view.services.iter() {
            let own = service.cluster_ips.iter().chain(&service.external_ips);
            let own = own.chain(&service.load_balancer_ips);
            for address in own.filter_map(|bytes| parse_address(bytes)) {
                names.services.insert(ip_of(&address), name.clone());
            }
            for port in &service.ports {
                if let (Ok(protocol), Ok(number @ 1..)) =
                    (u8::try_from(port.protocol), u16::try_from(port.node_port))
                {
                    names.node_ports.insert((protocol, number), name.clone());
                }
            }
        }
        names
    }

    /// Nothing was known yet.
    pub fn is_empty(&self) -> bool {
        self.node.is_empty()
    }

    /// Whether everybody in this event has a name that has one.
    pub fn knows(&self, event: &FlowEvent) -> bool {
        if event.point <= POINT_SEND {
            let cookie = event.netns_cookie;
            return cookie == self.own_cookie
                || (self.cookies.get(&cookie)).is_some_and(|id| self.own.contains_key(id));
        }
        let has = |addr: &Addr| {
            let address = ip_of(addr);
            self.pods.contains_key(&address) || self.nodes.contains_key(&address)
        };
        event.flags & NO_IP != 0 || has(&event.source) && has(&event.destination)
    }

    /// The end that a flow comes from.
    pub fn source(&self, event: &FlowEvent) -> proto::FlowEnd {
        if event.point <= POINT_SEND {
            let pod = self.cookies.get(&event.netns_cookie);
            return match pod.and_then(|id| self.own.get(id)) {
                Some(pod) => named(POD, pod),
                None if event.netns_cookie == self.own_cookie => self.this_node(),
                None => proto::FlowEnd::default(),
            };
        }
        let mut end = self.end(&event.source, event.source_port_be, event.flags);
        // What a pod sends is its own, whatever it says; of what is no IP that is all there is.
        if event.point == POINT_FROM_POD
            && let Some(pod) = self.at(event.ifindex)
        {
            let pod = named(POD, pod);
            (end.kind, end.namespace, end.name) = (pod.kind, pod.namespace, pod.name);
        }
        end
    }

    /// The end that it goes to, behind any Service.
    pub fn destination(&self, event: &FlowEvent) -> proto::FlowEnd {
        let mut end = self.end(&event.destination, event.destination_port_be, event.flags);
        if event.point == POINT_TO_POD
            && event.flags & NO_IP != 0
            && let Some(pod) = self.at(event.ifindex)
        {
            end = named(POD, pod);
        }
        end
    }

    /// The Service that it was addressed to.
    pub fn frontend(&self, addr: &Addr, port_be: u16, protocol: u8) -> proto::FlowEnd {
        let address = ip_of(addr);
        let port = u16::from_be(port_be);
        let service = self.services.get(&address).or_else(|| {
            let is_node = self.nodes.contains_key(&address);
            self.node_ports.get(&(protocol, port)).filter(|_| is_node)
        });
        let name = service.map(|name| (name.namespace.clone(), name.name.clone()));
        let mut end = name.map(|name| named(SERVICE, &name)).unwrap_or_default();
        end.address = bytes_of(address);
        end.port = port.into();
        end
    }

    fn end(&self, addr: &Addr, port_be: u16, flags: u8) -> proto::FlowEnd {
        if flags & NO_IP != 0 {
            return proto::FlowEnd::default();
        }
        let address = ip_of(addr);
        let mut end = match (self.pods.get(&address), self.nodes.get(&address)) {
            (Some(pod), _) => named(POD, pod),
            (None, Some(node)) => named(NODE, &(String::new(), node.clone())),
            (None, None) => match self.services.get(&address) {
                Some(name) => named(SERVICE, &(name.namespace.clone(), name.name.clone())),
                None => proto::FlowEnd::default(),
            },
        };
        end.address = bytes_of(address);
        end.port = u16::from_be(port_be).into();
        end
    }

    fn at(&self, ifindex: u32) -> Option<&Name> {
        self.own.get(self.interfaces.get(&ifindex)?)
    }

    fn this_node(&self) -> proto::FlowEnd {
        named(NODE, &(String::new(), self.node.clone()))
    }
}

fn named(kind: &str, (namespace, name): &Name) -> proto::FlowEnd {
    proto::FlowEnd {
        kind: kind.to_owned(),
        namespace: namespace.clone(),
        name: name.clone(),
        ..Default::default()
    }
}

fn addresses(all: &[bytes::Bytes]) -> impl Iterator<Item = IpAddr> {
    let parsed = all.iter().filter_map(|bytes| parse_address(bytes));
    parsed.map(|addr| ip_of(&addr))
}

fn bytes_of(address: IpAddr) -> bytes::Bytes {
    match address {
        IpAddr::V4(v4) => bytes::Bytes::copy_from_slice(&v4.octets()),
        IpAddr::V6(v6) => bytes::Bytes::copy_from_slice(&v6.octets()),
    }
}
