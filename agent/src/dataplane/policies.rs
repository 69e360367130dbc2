//! The policy maps as the agent writes them: which pods there are, then what the plan says.
//!
//! ```text
//!  View ─► pods of this node, with the last known of those that are attached but not in the view
//!          ─► policy::compile ─► policy::plan ─► POLICY_RULES, POLICY_PEERS, POLICY_PODS
//! ```
//! OPEN_PODS has some of the pods that POLICY_PODS says are open, where programs find them without a call: it is
//! told last of a pod that opens, and first of one that does so no longer.
//!
//! Invariants: a pod without a row passes nothing, and only a plan made of a view gives it one; a row
//! goes when the pod is detached, not when the API forgets the pod. After a failed write the picture is
//! void, and the next call adopts the maps again before it plans.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use aya::Ebpf;
use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{HashMap, Map, MapData, MapError};
use bytes::Bytes;
use ebpf_maps::policy::{
    OPEN_POD_COUNT, PEER_PREFIX_COUNT_MAX, POLICY_OPEN, PodPolicies, RULE_BITS_ALL,
    RULE_BITS_PROTO, RULE_COUNT_MAX, RuleKey, open_place,
};
use ebpf_maps::services::Addr;
use gantry_api::k8s_openapi::api::core::v1::Pod;
use gantry_api::network_policy::{RESOLVER_PEER, named_ports, takes_part};
use gantry_api::proto;
use imbl::OrdMap;

use super::DataplaneError;
use super::load::{absent_is_fine, failed, take_map, unexpected};
use super::sys::MappedArray;
use crate::ids::PodUid;
use crate::policy::plan::{Found, Pair, Rule, Step, Table};
use crate::policy::prefix::{PortPrefix, Prefix};
use crate::policy::{Limits, LocalPod, Peers, PolicyName, StuckPod, compile};
use crate::services::index::label64;
use crate::view::View;

/// See `ebpf_maps::policy` for why not all of the maps is planned for.
const LIMITS: Limits = Limits {
    peers: PEER_PREFIX_COUNT_MAX as usize / 2,
    rules: RULE_COUNT_MAX as usize / 8,
};

/// What of a view the last plan was made of.
struct Last {
    pods: Arc<BTreeMap<PodUid, Arc<Pod>>>,
    policies: Arc<OrdMap<PolicyName, Arc<proto::Policy>>>,
    peers: Arc<Peers>,
}

/// POLICY_PODS, POLICY_PEERS and POLICY_RULES.
pub(super) struct Policies {
    pods: HashMap<MapData, u64, PodPolicies>,
    peers: LpmTrie<MapData, Addr, u32>,
    rules: LpmTrie<MapData, RuleKey, u8>,
    open: MappedArray<u64>,
    table: Table,
    local: BTreeMap<u64, LocalPod>,
    attached: BTreeSet<u64>,
    /// Where the node's resolver listens: behind the cluster's DNS address.
    resolver: Option<IpAddr>,
    last: Option<Last>,
    stuck: Vec<StuckPod>,
    void: bool,
}

impl Policies {
    /// Takes the maps out of a loaded object, and reads what an earlier agent wrote.
    pub(super) fn take(ebpf: &mut Ebpf, resolver: Option<IpAddr>) -> Result<Self, DataplaneError> {
        let pods = take_map(ebpf, "POLICY_PODS")?.try_into();
        let peers = take_map(ebpf, "POLICY_PEERS")?.try_into();
        let rules = take_map(ebpf, "POLICY_RULES")?.try_into();
        let mut taken = Self {
            pods: pods.map_err(|error: MapError| unexpected("POLICY_PODS", error))?,
            peers: peers.map_err(|error: MapError| unexpected("POLICY_PEERS", error))?,
            rules: rules.map_err(|error: MapError| unexpected("POLICY_RULES", error))?,
            open: open_pods(ebpf)?,
            table: Table::default(),
            local: BTreeMap::new(),
            attached: BTreeSet::new(),
            resolver,
            last: None,
            stuck: Vec::new(),
            void: true,
        };
        taken.adopt()?;
        Ok(taken)
    }

    /// A pod is in the packet path from now on.
    pub(super) fn attach(&mut self, pod: &PodUid) {
        self.attached.insert(label64(pod.as_str()));
    }

    /// A pod has left the packet path.
    pub(super) fn detach(&mut self, pod: &PodUid) -> Result<(), DataplaneError> {
        self.detach_id(label64(pod.as_str()))
    }

    /// Takes out every pod that is neither in `live` nor in the view of the last plan, which may be newer:
    /// a pod that has come in between would pass nothing until a view comes after it.
    pub(super) fn retain<'a>(
        &mut self,
        live: impl Iterator<Item = &'a PodUid>,
    ) -> Result<(), DataplaneError> {
        let live: BTreeSet<u64> = live.map(|pod| label64(pod.as_str())).collect();
        let rows = self.pods.keys().filter_map(Result::ok);
        let gone = rows.filter(|id| !live.contains(id) && !self.local.contains_key(id));
        let gone: BTreeSet<u64> = gone.collect();
        gone.into_iter().try_for_each(|id| self.detach_id(id))
    }

    fn detach_id(&mut self, id: u64) -> Result<(), DataplaneError> {
        self.attached.remove(&id);
        self.local.remove(&id);
        self.last = None;
        let steps: Vec<Step> = self.table.forget(id).into_iter().collect();
        self.perform(&steps)
    }

    /// Makes the maps say what the policies of `view` say; returns the pods that are closed because
    /// their rules do not fit.
    pub(super) fn apply(
        &mut self,
        view: &View,
        now: Duration,
    ) -> Result<Vec<StuckPod>, DataplaneError> {
        if self.void {
            self.adopt()?;
        }
        if view.rev == 0 {
            // A node that nobody has told of policies yet: its static pods are open.
            let new = local_pods(view)
                .map(|pod| pod.id)
                .filter(|id| !self.table.has(*id));
            let new: Vec<u64> = new.collect();
            let steps: Vec<Step> = new.into_iter().map(|id| self.table.open(id)).collect();
            self.perform(&steps)?;
            return Ok(Vec::new());
        }
        let unchanged = self.last.as_ref().is_some_and(|last| {
            Arc::ptr_eq(&last.pods, &view.pods)
                && Arc::ptr_eq(&last.policies, &view.policies)
                && Arc::ptr_eq(&last.peers, &view.peers)
        });
        if unchanged {
            return Ok(self.stuck.clone());
        }
        let mut local: BTreeMap<u64, LocalPod> =
            local_pods(view).map(|pod| (pod.id, pod)).collect();
        for (id, pod) in &self.local {
            if self.attached.contains(id) {
                local.entry(*id).or_insert_with(|| pod.clone());
            }
        }
        let same = |last: &Last| {
            Arc::ptr_eq(&last.policies, &view.policies) && Arc::ptr_eq(&last.peers, &view.peers)
        };
        // Pods' statuses change all the time, what policies see of them seldom.
        if !(self.last.as_ref().is_some_and(same) && local == self.local) {
            let pods: Vec<LocalPod> = local.values().cloned().collect();
            let peers = with_resolver(&view.peers, self.resolver);
            let (wanted, stuck) = compile(&pods, &view.policies, &peers, LIMITS);
            let steps = self.table.plan(&wanted, now);
            self.perform(&steps)?;
            self.stuck = stuck;
        }
        self.local = local;
        self.last = Some(Last {
            pods: view.pods.clone(),
            policies: view.policies.clone(),
            peers: view.peers.clone(),
        });
        Ok(self.stuck.clone())
    }

    fn adopt(&mut self) -> Result<(), DataplaneError> {
        let mut found = Found::default();
        let mut open = BTreeMap::new();
        for row in self.pods.iter() {
            let (id, row) = row.map_err(|error| failed("read POLICY_PODS", &error))?;
            let (ingress, egress) = (row.ingress, row.egress);
            let pair = Pair { ingress, egress };
            if is_open(&pair) {
                open.insert(open_place(id), id);
            }
            found.endpoints.insert(id, pair);
        }
        for place in 0..OPEN_POD_COUNT {
            let id = open.get(&place).copied().unwrap_or(0);
            self.open.write(place, id).map_err(unmapped)?;
        }
        for row in self.peers.iter() {
            let (key, identity) = row.map_err(|error| failed("read POLICY_PEERS", &error))?;
            let prefix = Prefix::from_key(&key.data(), key.prefix_len());
            found.peers.insert(prefix, identity);
        }
        for key in self.rules.keys() {
            let key = key.map_err(|error| failed("read POLICY_RULES", &error))?;
            found.rules.insert(rule_of(&key));
        }
        self.table = Table::adopt(found);
        self.last = None;
        self.void = false;
        Ok(())
    }

    /// # Errors
    /// The steps before the failed one have been performed, the ones after it have not.
    fn perform(&mut self, steps: &[Step]) -> Result<(), DataplaneError> {
        let done = steps.iter().try_for_each(|step| self.perform_one(step));
        self.void |= done.is_err();
        done
    }

    fn perform_one(&mut self, step: &Step) -> Result<(), DataplaneError> {
        if let Step::SetEndpoint(id, _) | Step::RemoveEndpoint(id) = step {
            let place = open_place(*id);
            if self.open.read(place).map_err(unmapped)? == Some(*id) {
                self.open.write(place, 0).map_err(unmapped)?;
            }
        }
        self.perform_in_maps(step)?;
        if let Step::SetEndpoint(id, pair) = step
            && is_open(pair)
        {
            self.open.write(open_place(*id), *id).map_err(unmapped)?;
        }
        Ok(())
    }

    fn perform_in_maps(&mut self, step: &Step) -> Result<(), DataplaneError> {
        let peer = |prefix: &Prefix| Key::new(prefix.bits(), prefix.addr());
        match step {
            Step::AddRule(rule) => self.rules.insert(&key_of(rule), 1, 0),
            Step::RemoveRule(rule) => absent_is_fine(self.rules.remove(&key_of(rule))),
            Step::SetPeer(prefix, identity) => self.peers.insert(&peer(prefix), *identity, 0),
            Step::RemovePeer(prefix) => absent_is_fine(self.peers.remove(&peer(prefix))),
            Step::SetEndpoint(id, pair) => {
                let row = PodPolicies {
                    pod_id: *id,
                    ingress: pair.ingress,
                    egress: pair.egress,
                };
                self.pods.insert(id, row, 0)
            }
            Step::RemoveEndpoint(id) => absent_is_fine(self.pods.remove(id)),
        }
        .map_err(|error| failed(&format!("policy maps: {step:?}"), &error))
    }
}

fn is_open(pair: &Pair) -> bool {
    pair.ingress == POLICY_OPEN && pair.egress == POLICY_OPEN
}

fn open_pods(ebpf: &mut Ebpf) -> Result<MappedArray<u64>, DataplaneError> {
    match take_map(ebpf, "OPEN_PODS")? {
        Map::Array(data) => MappedArray::map(data.fd().as_fd(), OPEN_POD_COUNT).map_err(unmapped),
        _ => Err(unexpected("OPEN_PODS", "not an array")),
    }
}

fn unmapped(error: io::Error) -> DataplaneError {
    DataplaneError::kernel("map OPEN_PODS into memory", &error)
}

/// Who may ask the cluster's DNS may ask the node's resolver: that is where its packets go.
fn with_resolver(peers: &Peers, resolver: Option<IpAddr>) -> Peers {
    let Some(resolver) = resolver else {
        return peers.clone();
    };
    let bytes = match resolver {
        IpAddr::V4(address) => Bytes::copy_from_slice(&address.octets()),
        IpAddr::V6(address) => Bytes::copy_from_slice(&address.octets()),
    };
    let (namespace, name) = RESOLVER_PEER;
    let name = format!("{namespace}/{name}");
    let mut all = peers.clone();
    for (set, members) in peers {
        if let Some(peer) = members.get(&name) {
            let mut peer = proto::PolicyPeer::clone(peer);
            peer.addresses.push(bytes.clone());
            let members = members.update(name.clone(), Arc::new(peer));
            all.insert(set.clone(), Arc::new(members));
        }
    }
    all
}

/// The pods of this node that policies speak of.
fn local_pods(view: &View) -> impl Iterator<Item = LocalPod> {
    let pods = view.pods.iter().filter(|(_, pod)| takes_part(pod));
    pods.map(|(uid, pod)| LocalPod {
        id: label64(uid.as_str()),
        namespace: pod.metadata.namespace.clone().unwrap_or_default(),
        name: pod.metadata.name.clone().unwrap_or_default(),
        labels: pod.metadata.labels.clone().unwrap_or_default(),
        ports: pod.spec.as_ref().map(named_ports).unwrap_or_default(),
    })
}

fn key_of(rule: &Rule) -> Key<RuleKey> {
    let (bits, proto, port) = match rule.ports {
        PortPrefix::All => (RULE_BITS_ALL, 0, 0),
        PortPrefix::Of {
            protocol,
            port,
            len,
        } => (RULE_BITS_PROTO + u32::from(len), protocol, port),
    };
    let key = RuleKey {
        policy: rule.policy,
        identity: rule.identity,
        _pad: 0,
        proto,
        port_be: port.to_be(),
    };
    Key::new(bits, key)
}

fn rule_of(key: &Key<RuleKey>) -> Rule {
    let data = key.data();
    let ports = match key.prefix_len().checked_sub(RULE_BITS_PROTO) {
        None => PortPrefix::All,
        Some(len) => PortPrefix::Of {
            protocol: data.proto,
            port: u16::from_be(data.port_be),
            len: u8::try_from(len).unwrap_or(u8::MAX).min(16),
        },
    };
    Rule {
        policy: data.policy,
        identity: data.identity,
        ports,
    }
}

impl Policies {
    /// Lets a pod without policies pass: for tests of what has nothing to do with them.
    #[cfg(test)]
    pub(super) fn open(&mut self, pod: &PodUid) {
        let step = self.table.open(label64(pod.as_str()));
        self.perform(&[step]).unwrap();
    }
}
