//! Which of the nodes that fit is best, and the decision for one pod.
//!
//! The score is the sum of two of Kubernetes' scheduler plugins, each 0 to 100: LeastAllocated (how
//! much of CPU and memory would be left) and BalancedAllocation (how alike the used parts of both
//! are). Of equal nodes the one with fewer pods wins, then the one that the rotating start meets
//! first.
//!
//! In a large cluster not every node is scored: the search starts where the last one ended and stops
//! when enough nodes fit (`numFeasibleNodesToFind`: all up to 100 nodes, then a falling share down
//! to 5 %), so a decision costs about the same for 100 and for 5,000 nodes.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use super::filter::{self, Blocked, Reason};
use super::nodes::NodeState;
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

/// Chooses a node. `start` is where the search begins; returns how many nodes it looked at, too.
pub(super) fn decide(nodes: &[NodeState], pod: &PodRequest, start: usize) -> (Decision, usize) {
    let enough = enough(nodes.len());
    let mut reasons: BTreeMap<Reason, usize> = BTreeMap::new();
    let mut blocked = Blocked::default();
    let mut best: Option<((u64, Reverse<i64>), usize)> = None;
    let (mut fitting, mut looked_at) = (0, 0);
    for step in 0..nodes.len() {
        if fitting >= enough {
            break;
        }
        let index = (start + step) % nodes.len();
        looked_at += 1;
        match filter::check(&nodes[index], pod) {
            Ok(()) => {
                fitting += 1;
                let rank = (score(&nodes[index], pod), Reverse(nodes[index].pod_count));
                if best.as_ref().is_none_or(|(best, _)| rank > *best) {
                    best = Some((rank, index));
                }
            }
            Err((why, what)) => {
                blocked.by_room |= what.by_room;
                for reason in why {
                    *reasons.entry(reason).or_insert(0) += 1;
                }
            }
        }
    }
    let decision = match best {
        Some((_, index)) => Decision::Bind(index),
        None => Decision::Unschedulable(filter::explain(nodes.len(), &reasons), blocked),
    };
    (decision, looked_at)
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
