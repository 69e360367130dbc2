//! What the join needs of NetworkPolicies and of pods, read once.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use bytes::Bytes;
use gantry_api::k8s_openapi::api::core::v1::Pod;
use gantry_api::k8s_openapi::api::networking::v1::{
    IPBlock, NetworkPolicy, NetworkPolicyPeer, NetworkPolicyPort,
};
use gantry_api::k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use gantry_api::network_policy::{addresses, named_ports, protocol_number, takes_part};
use gantry_api::proto;
use gantry_api::selector::Selector;
use sha2::{Digest as _, Sha256};

/// Labels of an object.
pub(super) type Labels = BTreeMap<String, String>;

/// Which namespaces a set of peers is in.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Namespaces {
    /// The policy's own: there is no namespaceSelector.
    Own(String),
    Matching(Selector),
}

/// A set of peers: the pods that a pair of selectors means. Equal pairs are one set.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct SetSpec {
    pub(super) namespaces: Namespaces,
    pub(super) pods: Selector,
}

/// The name of a set: a hash of its selectors, so the same after a restart. 128 bits, since people
/// who may write policies must not find two selectors with one name.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) struct SetId(String);

impl fmt::Display for SetId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl SetSpec {
    pub(super) fn id(&self) -> SetId {
        // No label has a line break.
        let text = match &self.namespaces {
            Namespaces::Own(name) => format!("in {name}\n{}", self.pods),
            Namespaces::Matching(selector) => format!("of {selector}\n{}", self.pods),
        };
        let hash = Sha256::digest(text.as_bytes());
        SetId(
            hash[..16]
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect(),
        )
    }

    /// Whether it reaches into a namespace; `labels`: of its Namespace object, if that exists.
    pub(super) fn covers(&self, namespace: &str, labels: Option<&Labels>) -> bool {
        match &self.namespaces {
            Namespaces::Own(own) => own == namespace,
            Namespaces::Matching(selector) => labels.is_some_and(|labels| selector.matches(labels)),
        }
    }
}

/// What the join needs of a NetworkPolicy.
#[derive(Clone, PartialEq, Debug)]
pub(super) struct PolicyFacts {
    /// Which pods of its namespace.
    pub(super) selector: Selector,
    pub(super) sets: BTreeMap<SetId, SetSpec>,
    /// As every node gets it.
    pub(super) message: proto::Policy,
}

impl PolicyFacts {
    /// None: its podSelector is none, which admission lets nobody store.
    pub(super) fn new(namespace: &str, policy: &NetworkPolicy) -> Option<Self> {
        let spec = policy.spec.clone().unwrap_or_default();
        let pods = spec.pod_selector.unwrap_or_default();
        let types: BTreeSet<&str> = spec.policy_types.iter().flatten().map(|t| &**t).collect();
        let (ingress, egress) = (types.contains("Ingress"), types.contains("Egress"));
        let mut facts = Self {
            selector: Selector::from_api(&pods).ok()?,
            sets: BTreeMap::new(),
            message: proto::Policy {
                pod_selector_json: Bytes::from(serde_json::to_vec(&pods).ok()?),
                ingress,
                egress,
                ..Default::default()
            },
        };
        // A section whose type is not named has no effect.
        for rule in spec.ingress.iter().flatten().filter(|_| ingress) {
            let rule = facts.rule(namespace, rule.from.as_deref(), rule.ports.as_deref());
            facts.message.incoming.push(rule);
        }
        for rule in spec.egress.iter().flatten().filter(|_| egress) {
            let mut rule = facts.rule(namespace, rule.to.as_deref(), rule.ports.as_deref());
            if rule.any_peer && rule.ports.iter().any(|port| !port.name.is_empty()) {
                facts.name_all_pods(&mut rule);
            }
            facts.message.outgoing.push(rule);
        }
        Some(facts)
    }

    /// To anybody's port of a certain name: which number that is, each pod says.
    fn name_all_pods(&mut self, rule: &mut proto::PolicyRule) {
        let all = SetSpec {
            namespaces: Namespaces::Matching(Selector::default()),
            pods: Selector::default(),
        };
        rule.sets.push(all.id().to_string());
        self.sets.insert(all.id(), all);
    }

    fn rule(
        &mut self,
        namespace: &str,
        peers: Option<&[NetworkPolicyPeer]>,
        ports: Option<&[NetworkPolicyPort]>,
    ) -> proto::PolicyRule {
        let (peers, ports) = (peers.unwrap_or_default(), ports.unwrap_or_default());
        let mut rule = proto::PolicyRule {
            any_peer: peers.is_empty(),
            any_port: ports.is_empty(),
            ports: ports.iter().filter_map(port).collect(),
            ..Default::default()
        };
        for peer in peers {
            if let Some(block) = &peer.ip_block {
                rule.blocks.push(self::block(block));
            } else if let Some(set) = set(namespace, peer) {
                let id = set.id();
                rule.sets.push(id.to_string());
                self.sets.insert(id, set);
            }
        }
        rule.sets.sort_unstable();
        rule.sets.dedup();
        rule
    }
}

/// None, for a selector that cannot be read, means nobody.
fn set(namespace: &str, peer: &NetworkPolicyPeer) -> Option<SetSpec> {
    let pods = peer.pod_selector.as_ref().map(Selector::from_api);
    let namespaces = match &peer.namespace_selector {
        None => Namespaces::Own(namespace.to_owned()),
        Some(selector) => Namespaces::Matching(Selector::from_api(selector).ok()?),
    };
    Some(SetSpec {
        namespaces,
        pods: pods.transpose().ok()?.unwrap_or_default(),
    })
}

fn block(block: &IPBlock) -> proto::PolicyBlock {
    proto::PolicyBlock {
        cidr: block.cidr.clone(),
        except: block.except.clone().unwrap_or_default(),
    }
}

/// None, for a protocol that admission refuses, means no port.
fn port(port: &NetworkPolicyPort) -> Option<proto::PolicyPort> {
    let protocol = protocol_number(port.protocol.as_deref())?;
    let number = |value: i32| u16::try_from(value).ok().map(u32::from);
    Some(match &port.port {
        None => proto::PolicyPort {
            protocol,
            first: 0,
            last: u32::from(u16::MAX),
            name: String::new(),
        },
        Some(IntOrString::String(name)) => proto::PolicyPort {
            protocol,
            name: name.clone(),
            ..Default::default()
        },
        Some(IntOrString::Int(first)) => proto::PolicyPort {
            protocol,
            first: number(*first)?,
            last: number(port.end_port.unwrap_or(*first))?,
            name: String::new(),
        },
    })
}

/// The labels of the DNS pods of other clusters.
const RESOLVER_LABEL: (&str, &str) = ("k8s-app", "kube-dns");

/// The cluster's DNS as if it were a pod.
pub(super) fn resolver(address: IpAddr) -> PodFacts {
    let port = |name: &str, protocol| proto::BackendPort {
        name: name.to_owned(),
        protocol,
        port: 53,
    };
    let (key, value) = RESOLVER_LABEL;
    PodFacts {
        labels: Labels::from([(key.to_owned(), value.to_owned())]),
        node: String::new(),
        peer: Some(proto::PolicyPeer {
            addresses: vec![address_bytes(address)],
            ports: vec![port("dns", 17), port("dns-tcp", 6)],
        }),
    }
}

fn address_bytes(address: IpAddr) -> Bytes {
    match address {
        IpAddr::V4(address) => Bytes::copy_from_slice(&address.octets()),
        IpAddr::V6(address) => Bytes::copy_from_slice(&address.octets()),
    }
}

/// What the join needs of a pod that takes part.
#[derive(Clone, PartialEq, Debug)]
pub(super) struct PodFacts {
    pub(super) labels: Labels,
    /// Empty: not bound.
    pub(super) node: String,
    /// None: it has no address yet.
    pub(super) peer: Option<proto::PolicyPeer>,
}

impl PodFacts {
    /// None: no policy speaks of it.
    pub(super) fn new(pod: &Pod) -> Option<Self> {
        if !takes_part(pod) {
            return None;
        }
        let addresses: Vec<Bytes> = addresses(pod).into_iter().map(address_bytes).collect();
        let spec = pod.spec.as_ref();
        let peer = (!addresses.is_empty()).then(|| proto::PolicyPeer {
            addresses,
            ports: spec.map(named_ports).unwrap_or_default(),
        });
        Some(Self {
            labels: pod.metadata.labels.clone().unwrap_or_default(),
            node: spec.and_then(|s| s.node_name.clone()).unwrap_or_default(),
            peer,
        })
    }
}
