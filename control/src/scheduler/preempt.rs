//! Which pods go so that a more important one fits.
//!
//! ```text
//!  pod fits nowhere ─► per node: without all pods of lower priority, does it fit? ─► give back as many
//!                      as possible, the most important first ─► the node whose victims matter least
//! ```
//! Where it can be, the victims are pods that no disruption budget protects: pods that one protects are
//! given back first, and a node without such victims wins. Where it cannot, the budget is overruled, as in
//! Kubernetes.
//!
//! Victims get their grace; the pod stays in the queue and is nominated to the node, and comes back when
//! they are gone. Pure: nothing is deleted here.
//!
//! Invariants: a victim has a lower priority than the pod; no victim could stay.
//!
//! Source: Kubernetes `pkg/scheduler/framework/preemption`.

use std::cmp::Reverse;
use std::sync::Arc;

use gantry_api::k8s_openapi::api::policy::v1::PodDisruptionBudget;
use gantry_api::selector::Selector;

use super::filter;
use super::nodes::NodeState;
use super::peers::Peers;
use super::request::PodRequest;

/// Who goes, and where.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Preemption {
    /// The node.
    pub(super) node: Arc<str>,
    /// Its pods that go.
    pub(super) victims: Vec<Arc<PodRequest>>,
}

/// How many pods of a set may still go.
#[derive(Debug, Clone)]
pub(super) struct Budget {
    pub(super) namespace: String,
    pub(super) selector: Selector,
    pub(super) allowed: i32,
    /// Pods that are counted already.
    pub(super) disrupted: Vec<String>,
}

impl Budget {
    /// What a stored budget allows; `None` for one without a selector, which is about no pod.
    pub(super) fn of(budget: &PodDisruptionBudget) -> Option<Budget> {
        let selector = budget.spec.as_ref()?.selector.as_ref()?;
        let status = budget.status.clone().unwrap_or_default();
        Some(Budget {
            namespace: budget.metadata.namespace.clone().unwrap_or_default(),
            selector: Selector::from_api(selector).ok()?,
            allowed: status.disruptions_allowed.unwrap_or(0),
            disrupted: status
                .disrupted_pods
                .unwrap_or_default()
                .into_keys()
                .collect(),
        })
    }

    fn counts(&self, pod: &PodRequest) -> bool {
        self.namespace == pod.key.namespace
            && self.selector.matches(&pod.rules.labels)
            && !self.disrupted.contains(&pod.key.name)
    }
}

/// Which of these pods, in this order, would be one more than a budget allows.
fn violating(pods: &[Arc<PodRequest>], budgets: &[Budget]) -> Vec<bool> {
    let mut left: Vec<i32> = budgets.iter().map(|budget| budget.allowed).collect();
    let judge = |pod: &Arc<PodRequest>| {
        let mut is_too_many = false;
        for (budget, left) in budgets.iter().zip(&mut left) {
            if budget.counts(pod) {
                *left -= 1;
                is_too_many |= *left < 0;
            }
        }
        is_too_many
    };
    pods.iter().map(judge).collect()
}

/// Whether the pod fits on the node at `index` of this state of all nodes.
fn fits(nodes: &[NodeState], index: usize, pod: &PodRequest) -> bool {
    let node = &nodes[index];
    filter::check(node, pod).is_ok() && Peers::of(nodes, pod).check(node).is_ok()
}

/// The victims on one node, and how many of them a budget protects; `None` when no victims help.
fn victims(
    nodes: &mut [NodeState],
    index: usize,
    pod: &PodRequest,
    budgets: &[Budget],
) -> Option<(usize, Vec<Arc<PodRequest>>)> {
    let before = nodes[index].clone();
    let lower = before
        .pods
        .iter()
        .filter(|other| other.priority < pod.priority);
    let mut lower: Vec<Arc<PodRequest>> = lower.cloned().collect();
    // The most important is given back first.
    lower.sort_by_key(|other| (Reverse(other.priority), other.uid.clone()));
    for other in &lower {
        nodes[index].subtract(other);
    }
    let protected = violating(&lower, budgets);
    let mut order: Vec<(Arc<PodRequest>, bool)> = lower.iter().cloned().zip(protected).collect();
    // Stable: within both kinds the most important stays the first.
    order.sort_by_key(|(_, is_protected)| !is_protected);
    let (mut gone, mut violation_count) = (Vec::new(), 0);
    let helps = !lower.is_empty() && fits(nodes, index, pod);
    if helps {
        for (other, is_protected) in order {
            nodes[index].add(&other);
            if !fits(nodes, index, pod) {
                nodes[index].subtract(&other);
                gone.push(other);
                violation_count += usize::from(is_protected);
            }
        }
    }
    nodes[index] = before;
    (helps && !gone.is_empty()).then_some((violation_count, gone))
}

/// Chooses: fewest victims that a budget protects, lowest top priority of victims, then lowest sum, then
/// fewest.
pub(super) fn choose(
    nodes: &[NodeState],
    pod: &PodRequest,
    budgets: &[Budget],
) -> Option<Preemption> {
    if pod.never_preempts {
        return None;
    }
    let mut scratch = nodes.to_vec();
    let mut best: Option<((usize, i32, i64, usize), Preemption)> = None;
    for (index, node) in nodes.iter().enumerate() {
        if node.pods.iter().all(|other| other.priority >= pod.priority) {
            continue;
        }
        let Some((violation_count, victims)) = victims(&mut scratch, index, pod, budgets) else {
            continue;
        };
        let top = victims
            .iter()
            .map(|victim| victim.priority)
            .max()
            .unwrap_or(i32::MIN);
        let sum = victims
            .iter()
            .map(|victim| i64::from(victim.priority))
            .sum();
        let rank = (violation_count, top, sum, victims.len());
        if best.as_ref().is_none_or(|(known, _)| rank < *known) {
            let preemption = Preemption {
                node: Arc::clone(&node.name),
                victims,
            };
            best = Some((rank, preemption));
        }
    }
    best.map(|(_, preemption)| preemption)
}
