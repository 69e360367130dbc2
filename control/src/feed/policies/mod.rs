//! NetworkPolicies as each node needs them: those that select its pods, and their peers by address.
//!
//! ```text
//!  NetworkPolicy ─┬─ podSelector ──────────► nodes with a selected pod ──► "policy/NS/NAME"
//!                 └─ from, to ─► sets of peers, one per pair of selectors
//!  Pod ───────────┬─► the sets that it is in ──► members of a set ───────► "peer/SET/NS/NAME"
//!  Namespace ─────┘
//! ```
//! The node itself finds which of its pods a policy selects (it has their labels), so a policy has the
//! same bytes everywhere, and a peer in a set too: each is encoded once. Named ports are left to the
//! node: it has the ports of its own pods, and a peer's item has the peer's.
//!
//! Work per change: a pod looks at the selectors that share a label with it, and its namespace's
//! sets; a Namespace at the sets with a namespaceSelector; a policy at the pods of its namespace and,
//! if one of its sets is new, of the namespaces that set reaches into.
//!
//! Invariants: a set exists while a policy names it; a node has a policy while it has a pod that the
//! policy selects, and a set while it has a policy that names it. What a stream has seen is kept as the
//! maps it has seen: they share with today's what did not change, so the next step costs the difference.
//!
//! Source: Kubernetes `networking/v1` types, NetworkPolicySpec and NetworkPolicyPeer.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use bytes::Bytes;
use gantry_api::digest::Digest;
use gantry_api::k8s_openapi::api::core::v1::{Namespace, Pod};
use gantry_api::k8s_openapi::api::networking::v1::NetworkPolicy;
use gantry_api::network_policy::RESOLVER_PEER;
use gantry_api::proto;
use gantry_api::proto::item::Value;
use imbl::OrdMap;
use imbl::ordmap::DiffItem;

use super::join::Name;
use super::latest::Encoded;

mod by_selector;
mod facts;

use by_selector::BySelector;
use facts::{Labels, PodFacts, PolicyFacts, SetId, SetSpec};

/// Whether a key of the feed is this module's.
pub(super) fn is_ours(key: &str) -> bool {
    key.starts_with("policy/") || key.starts_with("peer/")
}

/// An item joined from several objects: it has no revision of its own, so its content stands for one.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Joined {
    rev: u64,
    encoded: Encoded,
}

impl Joined {
    fn new(key: &str, value: &Value) -> Self {
        let rev = Encoded::new(key, 0, value.clone()).hash;
        Self {
            rev,
            encoded: Encoded::new(key, rev, value.clone()),
        }
    }
}

/// By key of the feed.
type Members = OrdMap<Arc<str>, Joined>;

struct Set {
    spec: SetSpec,
    /// The policies that name it.
    users: BTreeSet<Name>,
    members: Members,
    digest: Digest,
    /// How many policies of each node name it.
    nodes: BTreeMap<String, usize>,
}

struct Policy {
    facts: PolicyFacts,
    item: Joined,
    /// How many pods it selects on each node.
    nodes: BTreeMap<String, usize>,
}

#[derive(Default)]
struct NodePart {
    policies: BTreeSet<Name>,
    sets: BTreeSet<SetId>,
    changed_at: u64,
}

/// What a stream has seen of a node's part.
#[derive(Clone, Debug, Default)]
pub(super) struct Seen {
    /// What the agent said it holds, until the first look.
    inventory: BTreeMap<String, u64>,
    policies: BTreeMap<Arc<str>, u64>,
    sets: BTreeMap<SetId, Members>,
    /// The part's digest, and the revision of the last look.
    at: Option<(u64, u64)>,
}

impl Seen {
    /// An agent that holds these keys at these revisions.
    pub(super) fn resume(inventory: BTreeMap<String, u64>) -> Self {
        Self {
            inventory,
            ..Self::default()
        }
    }
}

/// See the module.
#[derive(Default)]
pub(super) struct Policies {
    namespaces: BTreeMap<String, Labels>,
    /// Those that take part.
    pods: BTreeMap<Name, PodFacts>,
    policies: BTreeMap<Name, Policy>,
    /// The policies of a namespace.
    selecting: BTreeMap<String, BySelector<Name>>,
    sets: BTreeMap<SetId, Set>,
    /// The sets that reach into a namespace.
    reaching: BTreeMap<String, BySelector<SetId>>,
    /// Kept when it is empty: a stream that is open must see that things have gone.
    nodes: BTreeMap<String, NodePart>,
    touched: BTreeSet<String>,
}

fn policy_key(name: &Name) -> Arc<str> {
    format!("policy/{}/{}", name.0, name.1).into()
}

fn peer_key(set: &SetId, pod: &Name) -> Arc<str> {
    format!("peer/{set}/{}/{}", pod.0, pod.1).into()
}

impl Policies {
    /// The nodes whose part has changed since the last call.
    pub(super) fn take_touched(&mut self) -> BTreeSet<String> {
        std::mem::take(&mut self.touched)
    }

    /// The names of all objects held, for a comparison with a snapshot: plural, namespace, name.
    pub(super) fn held(&self) -> impl Iterator<Item = (&'static str, &str, &str)> {
        let policies = self
            .policies
            .keys()
            .map(|n| ("networkpolicies", n.0.as_str(), n.1.as_str()));
        let namespaces = self
            .namespaces
            .keys()
            .map(|name| ("namespaces", "", name.as_str()));
        policies.chain(namespaces)
    }

    pub(super) fn apply_namespace(&mut self, name: &str, namespace: Option<Namespace>, rev: u64) {
        let new = namespace.map(|namespace| namespace.metadata.labels.unwrap_or_default());
        let old = match new.clone() {
            Some(labels) => self.namespaces.insert(name.to_owned(), labels),
            None => self.namespaces.remove(name),
        };
        if old == new {
            return;
        }
        let reach = |set: &Set, labels: &Option<Labels>| set.spec.covers(name, labels.as_ref());
        let changed: Vec<(SetId, bool)> = self
            .sets
            .iter()
            .filter(|(_, set)| reach(set, &old) != reach(set, &new))
            .map(|(id, set)| (id.clone(), reach(set, &new)))
            .collect();
        for (id, reaches) in changed {
            self.set_reach(&id, name, reaches, rev);
        }
    }

    /// The cluster's DNS is a peer from now on: what manifests call the pods of `kube-dns`.
    pub(super) fn add_resolver(&mut self, address: IpAddr, rev: u64) {
        let (namespace, name) = RESOLVER_PEER;
        let name = (namespace.to_owned(), name.to_owned());
        self.set_pod(&name, Some(facts::resolver(address)), rev);
    }

    pub(super) fn apply_pod(&mut self, name: &Name, pod: Option<&Pod>, rev: u64) {
        self.set_pod(name, pod.and_then(PodFacts::new), rev);
    }

    fn set_pod(&mut self, name: &Name, new: Option<PodFacts>, rev: u64) {
        let old = self.pods.get(name).cloned();
        if old == new {
            return;
        }
        match new.clone() {
            Some(new) => self.pods.insert(name.clone(), new),
            None => self.pods.remove(name),
        };
        // What comes goes first, so that nothing leaves a node only to come back.
        for policy in self.selecting(name, new.as_ref()) {
            self.select(&policy, new.as_ref(), rev);
        }
        for policy in self.selecting(name, old.as_ref()) {
            self.deselect(&policy, old.as_ref(), rev);
        }
        let sets = self.sets_with(name, new.as_ref());
        for set in self.sets_with(name, old.as_ref()).difference(&sets) {
            self.set_member(set, name, None, rev);
        }
        let peer = new.and_then(|pod| pod.peer);
        for set in &sets {
            self.set_member(set, name, peer.as_ref(), rev);
        }
    }

    pub(super) fn apply_policy(&mut self, name: &Name, policy: Option<&NetworkPolicy>, rev: u64) {
        let new = policy.and_then(|policy| PolicyFacts::new(&name.0, policy));
        if self.policies.get(name).map(|policy| &policy.facts) == new.as_ref() {
            return;
        }
        for (id, spec) in new.iter().flat_map(|new| &new.sets) {
            self.use_set(id, spec, name, rev);
        }
        if let Some(old) = self.policies.get(name) {
            let selector = old.facts.selector.clone();
            let nodes: Vec<String> = old.nodes.keys().cloned().collect();
            nodes.iter().for_each(|node| self.detach(node, name, rev));
            unfile(&mut self.selecting, &name.0, &selector, name);
        }
        let old = self.policies.remove(name);
        let kept = new.as_ref().map(|new| new.sets.clone()).unwrap_or_default();
        if let Some(new) = new {
            self.insert_policy(name, new, rev);
        }
        for id in old.iter().flat_map(|old| old.facts.sets.keys()) {
            if !kept.contains_key(id) {
                self.leave_set(id, name, rev);
            }
        }
    }

    fn insert_policy(&mut self, name: &Name, facts: PolicyFacts, rev: u64) {
        let mut nodes: BTreeMap<String, usize> = BTreeMap::new();
        let bound = pods_of(&self.pods, &name.0).filter(|(_, pod)| !pod.node.is_empty());
        for (_, pod) in bound.filter(|(_, pod)| facts.selector.matches(&pod.labels)) {
            *nodes.entry(pod.node.clone()).or_insert(0) += 1;
        }
        let in_namespace = self.selecting.entry(name.0.clone()).or_default();
        in_namespace.insert(&facts.selector, name.clone());
        let at: Vec<String> = nodes.keys().cloned().collect();
        let item = Joined::new(&policy_key(name), &Value::Policy(facts.message.clone()));
        let policy = Policy { facts, item, nodes };
        self.policies.insert(name.clone(), policy);
        at.iter().for_each(|node| self.attach(node, name, rev));
    }

    /// The policies that select a pod.
    fn selecting(&self, name: &Name, pod: Option<&PodFacts>) -> Vec<Name> {
        let (Some(pod), Some(policies)) = (pod, self.selecting.get(&name.0)) else {
            return Vec::new();
        };
        let selects = |policy: &&Name| {
            let policy = self.policies.get(*policy);
            policy.is_some_and(|policy| policy.facts.selector.matches(&pod.labels))
        };
        let candidates = policies.candidates(&pod.labels);
        candidates.filter(selects).cloned().collect()
    }

    /// The sets that a pod is in.
    fn sets_with(&self, name: &Name, pod: Option<&PodFacts>) -> BTreeSet<SetId> {
        let pod = pod.filter(|pod| pod.peer.is_some());
        let (Some(pod), Some(sets)) = (pod, self.reaching.get(&name.0)) else {
            return BTreeSet::new();
        };
        let has = |id: &&SetId| {
            let set = self.sets.get(*id);
            set.is_some_and(|set| set.spec.pods.matches(&pod.labels))
        };
        sets.candidates(&pod.labels).filter(has).cloned().collect()
    }

    fn select(&mut self, name: &Name, pod: Option<&PodFacts>, rev: u64) {
        let (Some(policy), Some(pod)) = (self.policies.get_mut(name), pod) else {
            return;
        };
        if pod.node.is_empty() {
            return;
        }
        let count = policy.nodes.entry(pod.node.clone()).or_insert(0);
        *count += 1;
        if *count == 1 {
            self.attach(&pod.node, name, rev);
        }
    }

    fn deselect(&mut self, name: &Name, pod: Option<&PodFacts>, rev: u64) {
        let (Some(policy), Some(pod)) = (self.policies.get_mut(name), pod) else {
            return;
        };
        if let Some(count) = policy.nodes.get_mut(&pod.node) {
            *count -= 1;
            if *count == 0 {
                policy.nodes.remove(&pod.node);
                self.detach(&pod.node, name, rev);
            }
        }
    }

    /// A node needs a policy from now on.
    fn attach(&mut self, node: &str, name: &Name, rev: u64) {
        let Some(policy) = self.policies.get(name) else {
            return;
        };
        let part = self.nodes.entry(node.to_owned()).or_default();
        part.policies.insert(name.clone());
        for id in policy.facts.sets.keys() {
            if let Some(set) = self.sets.get_mut(id) {
                *set.nodes.entry(node.to_owned()).or_insert(0) += 1;
                part.sets.insert(id.clone());
            }
        }
        self.touch(node, rev);
    }

    /// A node no longer needs a policy.
    fn detach(&mut self, node: &str, name: &Name, rev: u64) {
        let (Some(policy), Some(part)) = (self.policies.get(name), self.nodes.get_mut(node)) else {
            return;
        };
        part.policies.remove(name);
        for id in policy.facts.sets.keys() {
            let Some(set) = self.sets.get_mut(id) else {
                continue;
            };
            if let Some(count) = set.nodes.get_mut(node) {
                *count -= 1;
                if *count == 0 {
                    set.nodes.remove(node);
                    part.sets.remove(id);
                }
            }
        }
        self.touch(node, rev);
    }

    fn touch(&mut self, node: &str, rev: u64) {
        if let Some(part) = self.nodes.get_mut(node) {
            part.changed_at = rev;
            self.touched.insert(node.to_owned());
        }
    }

    fn use_set(&mut self, id: &SetId, spec: &SetSpec, user: &Name, rev: u64) {
        if let Some(set) = self.sets.get_mut(id) {
            set.users.insert(user.clone());
            return;
        }
        let set = Set {
            spec: spec.clone(),
            users: BTreeSet::from([user.clone()]),
            members: Members::new(),
            digest: Digest::default(),
            nodes: BTreeMap::new(),
        };
        self.sets.insert(id.clone(), set);
        for namespace in self.reach_of(spec) {
            self.set_reach(id, &namespace, true, rev);
        }
    }

    fn leave_set(&mut self, id: &SetId, user: &Name, rev: u64) {
        let Some(set) = self.sets.get_mut(id) else {
            return;
        };
        set.users.remove(user);
        if !set.users.is_empty() {
            return;
        }
        let spec = set.spec.clone();
        for namespace in self.reach_of(&spec) {
            self.set_reach(id, &namespace, false, rev);
        }
        self.sets.remove(id);
    }

    fn reach_of(&self, spec: &SetSpec) -> Vec<String> {
        match &spec.namespaces {
            facts::Namespaces::Own(name) => vec![name.clone()],
            facts::Namespaces::Matching(_) => {
                let all = self.namespaces.iter();
                all.filter(|(name, labels)| spec.covers(name, Some(labels)))
                    .map(|(name, _)| name.clone())
                    .collect()
            }
        }
    }

    /// A set reaches into a namespace from now on, or no longer.
    fn set_reach(&mut self, id: &SetId, namespace: &str, reaches: bool, rev: u64) {
        let Some(set) = self.sets.get(id) else { return };
        let selector = set.spec.pods.clone();
        if reaches {
            let sets = self.reaching.entry(namespace.to_owned()).or_default();
            sets.insert(&selector, id.clone());
        } else {
            unfile(&mut self.reaching, namespace, &selector, id);
        }
        let meant = |pod: &PodFacts| pod.peer.is_some() && selector.matches(&pod.labels);
        let pods: Vec<_> = pods_of(&self.pods, namespace)
            .filter(|(_, pod)| meant(pod))
            .map(|(name, pod)| (name.clone(), pod.peer.clone().filter(|_| reaches)))
            .collect();
        for (name, peer) in pods {
            self.set_member(id, &name, peer.as_ref(), rev);
        }
    }

    fn set_member(&mut self, id: &SetId, pod: &Name, peer: Option<&proto::PolicyPeer>, rev: u64) {
        let Some(set) = self.sets.get_mut(id) else {
            return;
        };
        let key = peer_key(id, pod);
        let new = peer.map(|peer| Joined::new(&key, &Value::Peer(peer.clone())));
        let old = match new.clone() {
            Some(new) => set.members.insert(key, new),
            None => set.members.remove(&key),
        };
        if old == new {
            return;
        }
        for one in old.iter().chain(&new) {
            set.digest.toggle(one.encoded.hash);
        }
        let nodes: Vec<String> = set.nodes.keys().cloned().collect();
        nodes.iter().for_each(|node| self.touch(node, rev));
    }

    /// Adds what brings `seen` to now, and moves it there. Returns the digest of the node's part.
    pub(super) fn step(
        &self,
        node: &str,
        seen: &mut Seen,
        rev: u64,
        items: &mut Vec<Bytes>,
    ) -> u64 {
        let nothing = NodePart::default();
        let part = self.nodes.get(node).unwrap_or(&nothing);
        match seen.at {
            Some((digest, at)) if at >= part.changed_at => return digest,
            _ => {}
        }
        let policies: BTreeMap<Arc<str>, &Joined> = part
            .policies
            .iter()
            .filter_map(|name| Some((policy_key(name), &self.policies.get(name)?.item)))
            .collect();
        let sets: BTreeMap<&SetId, &Set> = part
            .sets
            .iter()
            .filter_map(|id| Some((id, self.sets.get(id)?)))
            .collect();
        if seen.at.is_none() {
            let members = sets.values().flat_map(|set| &set.members);
            let wanted = members.chain(policies.iter().map(|(key, item)| (key, *item)));
            by_inventory(&seen.inventory, wanted.collect(), items);
        } else {
            let gone = seen
                .policies
                .keys()
                .filter(|key| !policies.contains_key(*key));
            items.extend(gone.map(|key| Encoded::deletion(key)));
            for (key, item) in &policies {
                if seen.policies.get(key) != Some(&item.rev) {
                    items.push(item.encoded.bytes.clone());
                }
            }
            by_difference(&seen.sets, &sets, items);
        }
        let policy_hashes = policies.values().map(|item| item.encoded.hash);
        let set_digests = sets.values().map(|set| set.digest.value());
        let digest: Digest = policy_hashes.chain(set_digests).collect();
        let sets = sets.into_iter();
        *seen = Seen {
            inventory: BTreeMap::new(),
            policies: policies
                .into_iter()
                .map(|(key, item)| (key, item.rev))
                .collect(),
            sets: sets
                .map(|(id, set)| (id.clone(), set.members.clone()))
                .collect(),
            at: Some((digest.value(), rev)),
        };
        digest.value()
    }
}

fn by_inventory(
    inventory: &BTreeMap<String, u64>,
    wanted: BTreeMap<&Arc<str>, &Joined>,
    items: &mut Vec<Bytes>,
) {
    let wanted: BTreeMap<&str, &Joined> = wanted
        .into_iter()
        .map(|(key, item)| (&**key, item))
        .collect();
    let gone = inventory
        .keys()
        .filter(|key| !wanted.contains_key(key.as_str()));
    items.extend(gone.map(|key| Encoded::deletion(key)));
    let new = wanted
        .iter()
        .filter(|(key, item)| inventory.get(**key) != Some(&item.rev));
    items.extend(new.map(|(_, item)| item.encoded.bytes.clone()));
}

fn by_difference(
    seen: &BTreeMap<SetId, Members>,
    sets: &BTreeMap<&SetId, &Set>,
    items: &mut Vec<Bytes>,
) {
    let nothing = Members::new();
    for (_, old) in seen.iter().filter(|(id, _)| !sets.contains_key(id)) {
        items.extend(old.keys().map(|key| Encoded::deletion(key)));
    }
    for (id, set) in sets {
        let old = seen.get(*id).unwrap_or(&nothing);
        items.extend(old.diff(&set.members).map(|change| match change {
            DiffItem::Add(_, new) | DiffItem::Update { new: (_, new), .. } => {
                new.encoded.bytes.clone()
            }
            DiffItem::Remove(key, _) => Encoded::deletion(key),
        }));
    }
}

fn pods_of<'a>(
    pods: &'a BTreeMap<Name, PodFacts>,
    namespace: &str,
) -> impl Iterator<Item = (&'a Name, &'a PodFacts)> {
    let namespace = namespace.to_owned();
    pods.range((namespace.clone(), String::new())..)
        .take_while(move |(name, _)| name.0 == namespace)
}

fn unfile<T: Ord + Clone>(
    drawers: &mut BTreeMap<String, BySelector<T>>,
    namespace: &str,
    selector: &gantry_api::selector::Selector,
    thing: &T,
) {
    if let Some(drawer) = drawers.get_mut(namespace) {
        drawer.remove(selector, thing);
        if drawer.is_empty() {
            drawers.remove(namespace);
        }
    }
}

#[cfg(test)]
mod tests;
