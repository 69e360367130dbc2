//! Which nodes could take a pod, and the reasons of those that could not.
//!
//! The checks and the wording of their reasons are those of Kubernetes' scheduler plugins
//! NodeUnschedulable, TaintToleration, NodeAffinity, NodePorts and NodeResourcesFit, in its order:
//! the first that fails gives the node's reason. One difference: a node that is not ready, or short
//! of something, is refused by its condition, as if it had the taint that Kubernetes sets.

use std::borrow::Cow;
use std::collections::BTreeMap;

use gantry_api::k8s_openapi::api::core::v1::{
    Node, NodeSelector, NodeSelectorRequirement, NodeSelectorTerm, Pod, Taint,
};

use super::nodes::{MEMORY_PRESSURE, NodeState};
use super::request::PodRequest;
use crate::controllers::taint_eviction::tolerates;

/// The taint of a cordoned node.
const UNSCHEDULABLE: &str = "node.kubernetes.io/unschedulable";
/// The taint of a node that is not ready.
const NOT_READY: &str = "node.kubernetes.io/not-ready";

/// Why a node cannot take a pod, as it is printed after the count.
pub(super) type Reason = Cow<'static, str>;

/// What a pod that fits nowhere is waiting for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Blocked {
    /// Some node lacks only room: another pod that goes can help.
    pub(super) by_room: bool,
    /// Other pods are in the way, or missing: any that comes or goes can help.
    pub(super) by_peers: bool,
}

impl Blocked {
    /// Only room is lacking.
    pub(super) const ROOM: Self = Self {
        by_room: true,
        by_peers: false,
    };
}

/// How many taints the pod would rather avoid.
pub(super) fn unwanted_taints(node: &NodeState, pod: &PodRequest) -> i64 {
    let soft = node
        .taints
        .iter()
        .filter(|taint| taint.effect == "PreferNoSchedule");
    let unwanted = soft.filter(|taint| !pod.tolerations.iter().any(|t| tolerates(t, taint)));
    i64::try_from(unwanted.count()).unwrap_or(i64::MAX)
}

/// Whether the pod fits; else why not.
pub(super) fn check(node: &NodeState, pod: &PodRequest) -> Result<(), (Vec<Reason>, Blocked)> {
    let refused = |reason: Reason| Err((vec![reason], Blocked::default()));
    let effects = ["NoSchedule", "NoExecute"];
    if let Some(taint) = untolerated(node, pod, &effects) {
        match taint.key.as_str() {
            UNSCHEDULABLE => return refused("node(s) were unschedulable".into()),
            NOT_READY => return refused("node(s) were not ready".into()),
            _ => {}
        }
        let value = taint.value.as_deref().unwrap_or_default();
        let text = format!("node(s) had untolerated taint {{{}: {value}}}", taint.key);
        return refused(text.into());
    }
    if !matches_affinity(node, pod) {
        return refused("node(s) didn't match Pod's node affinity/selector".into());
    }
    for need in &pod.volumes {
        let here = |alternative: &Option<NodeSelector>| {
            alternative
                .as_ref()
                .is_none_or(|selector| matches_any(node, selector))
        };
        if !need.alternatives.iter().any(here) {
            return refused(need.refusal.into());
        }
    }
    let taken = |port| node.host_ports.iter().any(|held| held.conflicts_with(port));
    if pod.host_ports.iter().any(taken) {
        let reason = "node(s) didn't have free ports for the requested pod ports";
        return Err((vec![reason.into()], Blocked::ROOM));
    }
    let lacking = lacking(node, pod);
    if lacking.is_empty() {
        Ok(())
    } else {
        Err((lacking, Blocked::ROOM))
    }
}

/// The resources of which too little is left.
fn lacking(node: &NodeState, pod: &PodRequest) -> Vec<Reason> {
    let mut reasons: Vec<Reason> = Vec::new();
    if node.pod_count + 1 > node.pod_count_max {
        reasons.push("Too many pods".into());
    }
    let (has, used, wants) = (&node.allocatable, &node.used, &pod.resources);
    let lacks = |wants: i64, has: i64, used: i64| wants > 0 && wants > has.saturating_sub(used);
    if lacks(
        wants.cpu_millicores,
        has.cpu_millicores,
        used.cpu_millicores,
    ) {
        reasons.push("Insufficient cpu".into());
    }
    if lacks(wants.memory_bytes, has.memory_bytes, used.memory_bytes) {
        reasons.push("Insufficient memory".into());
    }
    if lacks(wants.storage_bytes, has.storage_bytes, used.storage_bytes) {
        reasons.push("Insufficient ephemeral-storage".into());
    }
    for (name, wanted) in &wants.other {
        let amount = |list: &BTreeMap<String, i64>| list.get(name).copied().unwrap_or(0);
        if lacks(*wanted, amount(&has.other), amount(&used.other)) {
            reasons.push(format!("Insufficient {name}").into());
        }
    }
    reasons
}

/// Whether a node is among those that a selector names: where a volume may be used.
pub(crate) fn node_satisfies(node: &Node, selector: &NodeSelector) -> bool {
    matches_any(&NodeState::of(node), selector)
}

/// Whether a node suits pods that every suiting node gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Suits {
    /// A new one may start there.
    pub(crate) may_start: bool,
    /// One that runs there may stay.
    pub(crate) may_stay: bool,
}

/// Judges a node by what concerns the node alone: affinity and taints, not what is left of it.
pub(crate) fn suits(node: &Node, pod: &Pod) -> Suits {
    let state = NodeState::of(node);
    let mut pod = pod.clone();
    // A template's pod has no uid yet; the request is not kept.
    pod.metadata.uid.get_or_insert_default();
    let Some(request) = PodRequest::of(&pod) else {
        return Suits {
            may_start: false,
            may_stay: false,
        };
    };
    let matches = matches_affinity(&state, &request);
    let tolerates = |effects: &[&str]| untolerated(&state, &request, effects).is_none();
    Suits {
        may_start: matches && tolerates(&["NoSchedule", "NoExecute"]),
        may_stay: matches && tolerates(&["NoExecute"]),
    }
}

/// The first taint that keeps the pod away. A cordon and a node that is not ready count as the taints
/// that Kubernetes sets for them.
fn untolerated(node: &NodeState, pod: &PodRequest, effects: &[&str]) -> Option<Taint> {
    let taint = |key: &str, effect: &str| Taint {
        key: key.to_owned(),
        effect: effect.to_owned(),
        ..Taint::default()
    };
    let cordon = node.is_cordoned.then(|| taint(UNSCHEDULABLE, "NoSchedule"));
    let sick = ["NoSchedule", "NoExecute"].map(|effect| taint(NOT_READY, effect));
    let sick = sick.into_iter().filter(|_| !node.is_ready);
    let all = cordon
        .into_iter()
        .chain(sick)
        .chain(node.taints.iter().cloned());
    let mut strict = all.filter(|taint| effects.contains(&&*taint.effect));
    // A pod that asks for something is not what a shortage of memory evicts first (Kubernetes gives
    // it the toleration).
    let asks = pod.resources.cpu_millicores > 0 || pod.resources.memory_bytes > 0;
    strict.find(|taint| {
        let tolerated = pod.tolerations.iter().any(|t| tolerates(t, taint));
        !(tolerated || asks && taint.key == MEMORY_PRESSURE)
    })
}

pub(super) fn matches_affinity(node: &NodeState, pod: &PodRequest) -> bool {
    let selected = pod
        .node_selector
        .iter()
        .all(|(key, value)| node.labels.get(key) == Some(value));
    selected
        && pod
            .required_affinity
            .as_ref()
            .is_none_or(|required| matches_any(node, required))
}

/// The terms are alternatives; the requirements of a term hold together. An empty term matches
/// nothing.
fn matches_any(node: &NodeState, selector: &NodeSelector) -> bool {
    selector
        .node_selector_terms
        .iter()
        .any(|term| matches_node(node, term))
}

/// Whether one term names this node.
pub(super) fn matches_node(node: &NodeState, term: &NodeSelectorTerm) -> bool {
    let labels = term.match_expressions.as_deref().unwrap_or_default();
    let fields = term.match_fields.as_deref().unwrap_or_default();
    let field = |requirement: &NodeSelectorRequirement| {
        requirement.key == "metadata.name" && matches(requirement, Some(&node.name))
    };
    let label = |requirement: &NodeSelectorRequirement| {
        matches(
            requirement,
            node.labels.get(&requirement.key).map(String::as_str),
        )
    };
    !(labels.is_empty() && fields.is_empty())
        && labels.iter().all(label)
        && fields.iter().all(field)
}

fn matches(requirement: &NodeSelectorRequirement, value: Option<&str>) -> bool {
    let values = requirement.values.as_deref().unwrap_or_default();
    let is_listed = value.is_some_and(|value| values.iter().any(|listed| listed == value));
    let number = |text: Option<&str>| text.and_then(|text| text.parse::<i64>().ok());
    let bound = || number(values.first().map(String::as_str));
    match requirement.operator.as_str() {
        "In" => is_listed,
        "NotIn" => !is_listed,
        "Exists" => value.is_some(),
        "DoesNotExist" => value.is_none(),
        "Gt" => number(value)
            .zip(bound())
            .is_some_and(|(value, bound)| value > bound),
        "Lt" => number(value)
            .zip(bound())
            .is_some_and(|(value, bound)| value < bound),
        _ => false,
    }
}

/// Kubernetes' sentence about a pod that fits nowhere.
pub(super) fn explain(node_count: usize, reasons: &BTreeMap<Reason, usize>) -> String {
    if node_count == 0 {
        return "no nodes available to schedule pods".to_owned();
    }
    let mut parts: Vec<String> = reasons
        .iter()
        .map(|(reason, count)| format!("{count} {reason}"))
        .collect();
    parts.sort_unstable();
    format!("0/{node_count} nodes are available: {}.", parts.join(", "))
}
