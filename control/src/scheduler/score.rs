//! Which of the nodes that fit is best, and the decision for one pod.
//!
//! The score is the sum of two of Kubernetes' scheduler plugins, each 0 to 100: LeastAllocated (how
//! much of CPU and memory would be left) and BalancedAllocation (how alike the used parts of both
//! are), and of what the pod would rather have: nodes, company, no soft taints. Of equal nodes the one with fewer pods wins, then the one that the rotating start meets
//! first.
//!
//! In a large cluster not every node is scored: the search starts where the last one ended and stops
//! when enough nodes fit (`numFeasibleNodesToFind`: all up to 100 nodes, then a falling share down
//! to 5 %), so a decision costs about the same for 100 and for 5,000 nodes.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use super::filter::{self, Blocked, Reason};
use super::nodes::NodeState;
use super::peers::Peers;
use super::request::PodRequest;

/// Clusters up to this size are searched whole.
const NODE_COUNT_WHOLE: usize = 100;

/// What is decided about one pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Decision {
    /// Bind it to the node at this index.
    Bind(usize),
    /// It fits nowhere: the sentence for the user, and what could help.
    Unschedulable(String, Blocked),
}

/// How many fitting nodes are enough to choose from.
fn enough(node_count: usize) -> usize {
    if node_count <= NODE_COUNT_WHOLE {
        return node_count;
    }
    let percent = 50_usize.saturating_sub(node_count / 125).max(5);
    (node_count * percent / 100).max(NODE_COUNT_WHOLE)
}

/// A node that fits, with what it is worth before the parts are made comparable.
struct Candidate {
    index: usize,
    base: i64,
    /// Node affinity, company of pods, and taints (fewer are better).
    parts: [i64; 3],
}

/// What the parts weigh, as Kubernetes' plugins NodeAffinity, InterPodAffinity and TaintToleration.
const WEIGHTS: [i64; 3] = [2, 2, 3];

/// Chooses a node. `start` is where the search begins; returns how many nodes it looked at, too.
pub(super) fn decide(nodes: &[NodeState], pod: &PodRequest, start: usize) -> (Decision, usize) {
    let enough = enough(nodes.len());
    let peers = Peers::of(nodes, pod);
    let mut reasons: BTreeMap<Reason, usize> = BTreeMap::new();
    let mut blocked = Blocked::default();
    let mut fitting: Vec<Candidate> = Vec::new();
    let mut looked_at = 0;
    for step in 0..nodes.len() {
        if fitting.len() >= enough {
            break;
        }
        let index = (start + step) % nodes.len();
        looked_at += 1;
        let node = &nodes[index];
        let kept_away = |reason| {
            let by_peers = Blocked {
                by_peers: true,
                ..Blocked::default()
            };
            (vec![reason], by_peers)
        };
        match filter::check(node, pod).and_then(|()| peers.check(node).map_err(kept_away)) {
            Ok(()) => fitting.push(Candidate {
                index,
                base: i64::try_from(score(node, pod)).unwrap_or(i64::MAX),
                parts: [
                    pod.rules.node_preference(node),
                    peers.preference(node),
                    -filter::unwanted_taints(node, pod),
                ],
            }),
            Err((why, what)) => {
                blocked.by_room |= what.by_room;
                blocked.by_peers |= what.by_peers;
                for reason in why {
                    *reasons.entry(reason).or_insert(0) += 1;
                }
            }
        }
    }
    let decision = match best(nodes, &fitting) {
        Some(index) => Decision::Bind(index),
        None => Decision::Unschedulable(filter::explain(nodes.len(), &reasons), blocked),
    };
    (decision, looked_at)
}

/// The candidate of the highest sum; each part is stretched to 0..=100 points over the candidates.
fn best(nodes: &[NodeState], fitting: &[Candidate]) -> Option<usize> {
    let mut lowest = [i64::MAX; 3];
    let mut highest = [i64::MIN; 3];
    for candidate in fitting {
        for (part, value) in candidate.parts.iter().enumerate() {
            lowest[part] = lowest[part].min(*value);
            highest[part] = highest[part].max(*value);
        }
    }
    let total = |candidate: &Candidate| {
        let parts = candidate.parts.iter().enumerate().map(|(part, value)| {
            let span = highest[part].saturating_sub(lowest[part]);
            // In thousandths of a point, as the base is.
            let stretched = (value - lowest[part])
                .saturating_mul(100_000)
                .checked_div(span);
            stretched.unwrap_or(0) * WEIGHTS[part]
        });
        parts.sum::<i64>() + candidate.base
    };
    let rank =
        |candidate: &Candidate| (total(candidate), Reverse(nodes[candidate.index].pod_count));
    let mut chosen: Option<(_, usize)> = None;
    for candidate in fitting {
        let rank = rank(candidate);
        if chosen.as_ref().is_none_or(|(known, _)| rank > *known) {
            chosen = Some((rank, candidate.index));
        }
    }
    chosen.map(|(_, index)| index)
}

/// The sum of both scores, in thousandths so that close nodes still differ.
fn score(node: &NodeState, pod: &PodRequest) -> u64 {
    let parts = [
        used_part(
            node.allocatable.cpu_millicores,
            node.scored
                .cpu_millicores
                .saturating_add(pod.scored.cpu_millicores),
        ),
        used_part(
            node.allocatable.memory_bytes,
            node.scored
                .memory_bytes
                .saturating_add(pod.scored.memory_bytes),
        ),
    ];
    let least_allocated = (2_000 - parts[0] - parts[1]) * 50;
    // The standard deviation of two values is half their distance.
    let balanced = 100_000 - parts[0].abs_diff(parts[1]) * 50;
    least_allocated + balanced
}

/// Used thousandths of `total`, at most 1000; everything of a node that has none.
fn used_part(total: i64, used: i64) -> u64 {
    let (Ok(total), Ok(used)) = (u128::try_from(total), u128::try_from(used)) else {
        return 1_000;
    };
    let part = (used * 1_000).checked_div(total).unwrap_or(1_000);
    u64::try_from(part.min(1_000)).unwrap_or(1_000)
}
