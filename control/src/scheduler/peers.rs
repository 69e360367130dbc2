//! Where a pod may go for the sake of other pods: affinity, anti-affinity, topology spread.
//!
//! ```text
//!  rules of the pod, pods on all nodes ─► Peers: per rule, the topology values that count ─► check(node)
//!  anti-affinity of pods that run      ─┘                                                └─► score(node)
//! ```
//! The pods are looked at once per decision, and only if the pod has rules or a pod that runs has
//! required anti-affinity; a node is then judged by its labels alone. Pure.
//!
//! Source: Kubernetes' scheduler plugins InterPodAffinity and PodTopologySpread.

use std::collections::{BTreeMap, BTreeSet};

use gantry_api::k8s_openapi::api::core::v1::{
    NodeSelectorTerm, PodAffinityTerm, PodSpec, TopologySpreadConstraint,
};
use gantry_api::k8s_openapi::apimachinery::pkg::apis::meta::v1::{
    LabelSelector, LabelSelectorRequirement,
};
use gantry_api::selector::Selector;

use super::filter::{Reason, matches_node};
use super::nodes::NodeState;
use super::request::PodRequest;

type Labels = BTreeMap<String, String>;

/// The label by which a namespace is selected: its name.
const NAMESPACE_NAME: &str = "kubernetes.io/metadata.name";

/// Which pods a term speaks of, and within what.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Term {
    /// The namespaces, when there is no selector of them.
    namespaces: BTreeSet<String>,
    namespace_selector: Option<Selector>,
    /// `None` matches no pod.
    selector: Option<Selector>,
    topology_key: String,
}

/// One spread constraint.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Spread {
    max_skew: i64,
    min_domains: usize,
    topology_key: String,
    selector: Option<Selector>,
    is_required: bool,
    ignores_affinity: bool,
}

/// What a pod says about other pods, and what it would rather have.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct Rules {
    pub(super) labels: Labels,
    affinity: Vec<Term>,
    pub(super) anti_affinity: Vec<Term>,
    /// Negative weights repel.
    preferred: Vec<(i64, Term)>,
    spread: Vec<Spread>,
    preferred_nodes: Vec<(i64, NodeSelectorTerm)>,
}

fn parsed(selector: Option<&LabelSelector>) -> Option<Selector> {
    selector.and_then(|selector| Selector::from_api(selector).ok())
}

/// The selector narrowed to the pod's own values of some labels (`matchLabelKeys`).
fn narrowed(
    selector: Option<&LabelSelector>,
    same: Option<&Vec<String>>,
    other: Option<&Vec<String>>,
    labels: &Labels,
) -> Option<LabelSelector> {
    let mut selector = selector?.clone();
    for (keys, operator) in [(same, "In"), (other, "NotIn")] {
        for key in keys.into_iter().flatten() {
            if let Some(value) = labels.get(key) {
                let requirement = LabelSelectorRequirement {
                    key: key.clone(),
                    operator: operator.to_owned(),
                    values: Some(vec![value.clone()]),
                };
                selector
                    .match_expressions
                    .get_or_insert_default()
                    .push(requirement);
            }
        }
    }
    Some(selector)
}

impl Term {
    fn of(term: &PodAffinityTerm, own_namespace: &str, labels: &Labels) -> Self {
        let (same, other) = (&term.match_label_keys, &term.mismatch_label_keys);
        let (same, other) = (same.as_ref(), other.as_ref());
        let selector = narrowed(term.label_selector.as_ref(), same, other, labels);
        let mut namespaces: BTreeSet<String> = term.namespaces.iter().flatten().cloned().collect();
        if namespaces.is_empty() && term.namespace_selector.is_none() {
            namespaces.insert(own_namespace.to_owned());
        }
        Self {
            namespaces,
            namespace_selector: parsed(term.namespace_selector.as_ref()),
            selector: parsed(selector.as_ref()),
            topology_key: term.topology_key.clone(),
        }
    }

    fn matches(&self, pod: &PodRequest) -> bool {
        let namespace = &pod.key.namespace;
        let selected = || {
            let labels = Labels::from([(NAMESPACE_NAME.to_owned(), namespace.clone())]);
            let selector = self.namespace_selector.as_ref();
            selector.is_some_and(|selector| selector.is_empty() || selector.matches(&labels))
        };
        let selector = self.selector.as_ref();
        (self.namespaces.contains(namespace) || selected())
            && selector.is_some_and(|s| s.is_empty() || s.matches(&pod.rules.labels))
    }
}

impl Spread {
    fn of(constraint: &TopologySpreadConstraint, labels: &Labels) -> Self {
        let keys = constraint.match_label_keys.as_ref();
        let selector = narrowed(constraint.label_selector.as_ref(), keys, None, labels);
        Self {
            max_skew: i64::from(constraint.max_skew),
            min_domains: constraint
                .min_domains
                .and_then(|n| usize::try_from(n).ok())
                .unwrap_or(1),
            topology_key: constraint.topology_key.clone(),
            selector: parsed(selector.as_ref()),
            is_required: constraint.when_unsatisfiable == "DoNotSchedule",
            ignores_affinity: constraint.node_affinity_policy.as_deref() == Some("Ignore"),
        }
    }

    fn matches(&self, pod: &PodRequest) -> bool {
        let selector = self.selector.as_ref();
        selector.is_some_and(|s| s.is_empty() || s.matches(&pod.rules.labels))
    }
}

impl Rules {
    /// What the pod's spec says.
    pub(super) fn of(spec: &PodSpec, namespace: &str, labels: Labels) -> Self {
        let affinity = spec.affinity.clone().unwrap_or_default();
        let pods = affinity.pod_affinity.unwrap_or_default();
        let anti = affinity.pod_anti_affinity.unwrap_or_default();
        let terms = |list: Option<Vec<PodAffinityTerm>>| -> Vec<Term> {
            let list = list.unwrap_or_default();
            list.iter()
                .map(|term| Term::of(term, namespace, &labels))
                .collect()
        };
        let mut preferred = Vec::new();
        for (sign, list) in [
            (1, pods.preferred_during_scheduling_ignored_during_execution),
            (
                -1,
                anti.preferred_during_scheduling_ignored_during_execution,
            ),
        ] {
            preferred.extend(list.unwrap_or_default().iter().map(|weighted| {
                let term = Term::of(&weighted.pod_affinity_term, namespace, &labels);
                (sign * i64::from(weighted.weight), term)
            }));
        }
        let nodes = affinity.node_affinity.unwrap_or_default();
        let nodes = nodes.preferred_during_scheduling_ignored_during_execution;
        let spread = spec.topology_spread_constraints.iter().flatten();
        Self {
            affinity: terms(pods.required_during_scheduling_ignored_during_execution),
            anti_affinity: terms(anti.required_during_scheduling_ignored_during_execution),
            preferred,
            spread: spread
                .map(|constraint| Spread::of(constraint, &labels))
                .collect(),
            preferred_nodes: nodes
                .unwrap_or_default()
                .into_iter()
                .map(|weighted| (i64::from(weighted.weight), weighted.preference))
                .collect(),
            labels,
        }
    }

    fn needs_peers(&self) -> bool {
        !(self.affinity.is_empty()
            && self.anti_affinity.is_empty()
            && self.preferred.is_empty()
            && self.spread.is_empty())
    }

    /// What the node itself is worth to the pod.
    pub(super) fn node_preference(&self, node: &NodeState) -> i64 {
        let wanted = self.preferred_nodes.iter();
        let wanted = wanted.filter(|(_, term)| matches_node(node, term));
        wanted.map(|(weight, _)| weight).sum()
    }
}

/// Counts of one spread constraint.
#[derive(Debug)]
struct Domains {
    counts: BTreeMap<String, i64>,
    least: i64,
    /// The pod would count itself.
    own: i64,
}

/// What the pods that run mean for one pod.
#[derive(Debug, Default)]
pub(super) struct Peers {
    /// Per required term, the values where a pod matches; `None`: the pod is the first of its kind.
    affinity: Vec<(String, Option<BTreeSet<String>>)>,
    anti_affinity: Vec<(String, BTreeSet<String>)>,
    /// Topology that pods which run keep this one from.
    forbidden: BTreeSet<(String, String)>,
    spread: Vec<(Spread, Domains)>,
    preferred: Vec<(String, BTreeMap<String, i64>)>,
}

impl Peers {
    /// Looks at every pod once.
    pub(super) fn of(nodes: &[NodeState], pod: &PodRequest) -> Self {
        let mut peers = Self::default();
        for node in nodes {
            for other in node
                .pods
                .iter()
                .filter(|o| !o.rules.anti_affinity.is_empty())
            {
                for term in other
                    .rules
                    .anti_affinity
                    .iter()
                    .filter(|term| term.matches(pod))
                {
                    if let Some(value) = node.labels.get(&term.topology_key) {
                        peers
                            .forbidden
                            .insert((term.topology_key.clone(), value.clone()));
                    }
                }
            }
        }
        let rules = &pod.rules;
        if !rules.needs_peers() {
            return peers;
        }
        for term in &rules.affinity {
            let values = matching(nodes, term);
            let first = values.is_empty() && term.matches(pod);
            peers
                .affinity
                .push((term.topology_key.clone(), (!first).then(|| keys(values))));
        }
        for term in &rules.anti_affinity {
            let values = keys(matching(nodes, term));
            peers
                .anti_affinity
                .push((term.topology_key.clone(), values));
        }
        for (weight, term) in &rules.preferred {
            let mut values = matching(nodes, term);
            values.values_mut().for_each(|count| *count *= weight);
            peers.preferred.push((term.topology_key.clone(), values));
        }
        for spread in &rules.spread {
            peers
                .spread
                .push((spread.clone(), domains(nodes, pod, spread)));
        }
        peers
    }

    /// Whether the pod may go to this node for the sake of others.
    pub(super) fn check(&self, node: &NodeState) -> Result<(), Reason> {
        for (spread, domains) in self.spread.iter().filter(|(spread, _)| spread.is_required) {
            let Some(value) = node.labels.get(&spread.topology_key) else {
                let text =
                    "node(s) didn't match pod topology spread constraints (missing required label)";
                return Err(text.into());
            };
            let count = domains.counts.get(value).copied().unwrap_or(0) + domains.own;
            if count - domains.least > spread.max_skew {
                return Err("node(s) didn't match pod topology spread constraints".into());
            }
        }
        let value = |key: &String| node.labels.get(key);
        for (key, values) in &self.affinity {
            let here = value(key)
                .is_some_and(|here| values.as_ref().is_none_or(|values| values.contains(here)));
            if !here {
                return Err("node(s) didn't match pod affinity rules".into());
            }
        }
        for (key, values) in &self.anti_affinity {
            if value(key).is_some_and(|here| values.contains(here)) {
                return Err("node(s) didn't match pod anti-affinity rules".into());
            }
        }
        let kept_away = |(key, other): &(String, String)| value(key) == Some(other);
        if self.forbidden.iter().any(kept_away) {
            return Err("node(s) didn't satisfy existing pods anti-affinity rules".into());
        }
        Ok(())
    }

    /// What the company there is worth; spread counts against a crowd.
    pub(super) fn preference(&self, node: &NodeState) -> i64 {
        let mut sum = 0;
        for (key, values) in &self.preferred {
            let here = node.labels.get(key).and_then(|value| values.get(value));
            sum += here.copied().unwrap_or(0);
        }
        for (spread, domains) in self.spread.iter().filter(|(spread, _)| !spread.is_required) {
            let here = node.labels.get(&spread.topology_key);
            sum -= here
                .and_then(|v| domains.counts.get(v))
                .copied()
                .unwrap_or(0)
                * 100;
        }
        sum
    }
}

fn keys(values: BTreeMap<String, i64>) -> BTreeSet<String> {
    values.into_keys().collect()
}

/// How many pods match per value of the term's topology.
fn matching(nodes: &[NodeState], term: &Term) -> BTreeMap<String, i64> {
    let mut values = BTreeMap::new();
    for node in nodes {
        let Some(value) = node.labels.get(&term.topology_key) else {
            continue;
        };
        let count = node.pods.iter().filter(|pod| term.matches(pod)).count();
        if count > 0 {
            *values.entry(value.clone()).or_insert(0) += i64::try_from(count).unwrap_or(i64::MAX);
        }
    }
    values
}

/// How many pods of the pod's namespace match per domain of nodes that it may go to.
fn domains(nodes: &[NodeState], pod: &PodRequest, spread: &Spread) -> Domains {
    let mut counts = BTreeMap::new();
    for node in nodes {
        let Some(value) = node.labels.get(&spread.topology_key) else {
            continue;
        };
        if !spread.ignores_affinity && !super::filter::matches_affinity(node, pod) {
            continue;
        }
        let here = node
            .pods
            .iter()
            .filter(|other| other.key.namespace == pod.key.namespace && spread.matches(other));
        let here = i64::try_from(here.count()).unwrap_or(i64::MAX);
        *counts.entry(value.clone()).or_insert(0) += here;
    }
    let least = match counts.len() < spread.min_domains {
        true => 0,
        false => counts.values().copied().min().unwrap_or(0),
    };
    Domains {
        counts,
        least,
        own: i64::from(spread.matches(pod)),
    }
}
