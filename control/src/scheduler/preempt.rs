//! Which pods go so that a more important one fits.
//!
//! ```text
//!  pod fits nowhere ─► per node: without all pods of lower priority, does it fit? ─► give back as many
//!                      as possible, the most important first ─► the node whose victims matter least
//! ```
//! Victims get their grace; the pod stays in the queue and is nominated to the node, and comes back when
//! they are gone. Pure: nothing is deleted here.
//!
//! Invariants: a victim has a lower priority than the pod; no victim could stay.
//!
//! Source: Kubernetes `pkg/scheduler/framework/preemption`.

use std::cmp::Reverse;
use std::sync::Arc;

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

/// Whether the pod fits on the node at `index` of this state of all nodes.
fn fits(nodes: &[NodeState], index: usize, pod: &PodRequest) -> bool {
    let node = &nodes[index];
    filter::check(node, pod).is_ok() && Peers::of(nodes, pod).check(node).is_ok()
}

/// The victims on one node; `None` when no victims help.
fn victims(
    nodes: &mut [NodeState],
    index: usize,
    pod: &PodRequest,
) -> Option<Vec<Arc<PodRequest>>> {
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
    let mut gone = Vec::new();
    let helps = !lower.is_empty() && fits(nodes, index, pod);
    if helps {
        for other in lower {
            nodes[index].add(&other);
            if !fits(nodes, index, pod) {
                nodes[index].subtract(&other);
                gone.push(other);
            }
        }
    }
    nodes[index] = before;
    (helps && !gone.is_empty()).then_some(gone)
}

/// Chooses: lowest top priority of victims, then lowest sum, then fewest.
pub(super) fn choose(nodes: &[NodeState], pod: &PodRequest) -> Option<Preemption> {
    if pod.never_preempts {
        return None;
    }
    let mut scratch = nodes.to_vec();
    let mut best: Option<((i32, i64, usize), Preemption)> = None;
    for (index, node) in nodes.iter().enumerate() {
        if node.pods.iter().all(|other| other.priority >= pod.priority) {
            continue;
        }
        let Some(victims) = victims(&mut scratch, index, pod) else {
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
        let rank = (top, sum, victims.len());
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
