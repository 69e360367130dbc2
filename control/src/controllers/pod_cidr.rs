//! Pod addresses for nodes: a part of the cluster CIDR for each.
//!
//! One worker with one key hands them all out, so two nodes that join at the same instant cannot
//! get the same part; the write is a compare-and-set on the node. A part is free again when its node
//! object is gone, and the search goes round, so a part that became free is reused as late as
//! possible: other nodes may still route it.
//!
//! Source: Kubernetes `pkg/controller/nodeipam/ipam/range_allocator.go`.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use gantry_api::k8s_openapi::api::core::v1::Node;
use gantry_api::status::Status;
use ipnet::Ipv4Net;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::informer::ObjectKey;
use super::queue::WorkQueue;
use super::{Context, Controller, EventType};

/// When to look again for a free part after there was none.
const EXHAUSTED_RETRY: Duration = Duration::from_secs(30);

/// What to write, and which nodes get nothing.
#[derive(Debug, Default, PartialEq, Eq)]
struct Plan {
    /// Index of the node and its part.
    assign: Vec<(usize, Ipv4Net)>,
    /// Indexes of nodes for which no part is free.
    without: Vec<usize>,
    /// Parts that two nodes have; only a user can have written that.
    doubled: Vec<Ipv4Net>,
    /// Where the next search starts.
    next: u32,
}

/// Decides the parts. `nodes` are the parts that nodes have now; the search starts at part `next`.
fn plan(cluster: Ipv4Net, prefix_len: u8, nodes: &[Option<Ipv4Net>], next: u32) -> Plan {
    let mut plan = Plan {
        next,
        ..Plan::default()
    };
    let mut taken: BTreeSet<Ipv4Net> = BTreeSet::new();
    for part in nodes.iter().flatten() {
        if !taken.insert(part.trunc()) {
            plan.doubled.push(*part);
        }
    }
    let bits = u32::from(prefix_len.saturating_sub(cluster.prefix_len())).min(31);
    let part_count = 1_u32 << bits;
    let part_at = |index: u32| {
        let shift = 32_u32.saturating_sub(u32::from(prefix_len));
        let offset = index.checked_shl(shift).unwrap_or(0);
        let base = u32::from(cluster.network()).checked_add(offset)?;
        Ipv4Net::new(base.into(), prefix_len).ok()
    };
    // Wider parts, as an earlier setting may have given out, take the narrower ones in them.
    let overlaps = |part: &Ipv4Net, taken: &BTreeSet<Ipv4Net>| {
        taken.contains(part) || taken.iter().any(|t| t.contains(part) || part.contains(t))
    };
    for (index, _) in nodes.iter().enumerate().filter(|(_, part)| part.is_none()) {
        let mut candidates = (0..part_count).map(|step| plan.next.wrapping_add(step) % part_count);
        let free = candidates.find_map(|candidate| {
            let part = part_at(candidate)?;
            (!overlaps(&part, &taken)).then_some((candidate, part))
        });
        match free {
            Some((candidate, part)) => {
                taken.insert(part);
                plan.next = (candidate + 1) % part_count;
                plan.assign.push((index, part));
            }
            None => plan.without.push(index),
        }
    }
    plan
}

fn part_of(node: &Node) -> Option<Ipv4Net> {
    let spec = node.spec.as_ref()?;
    let first = spec.pod_cidrs.iter().flatten().next();
    spec.pod_cidr.as_ref().or(first)?.parse().ok()
}

struct PodCidrs {
    context: Arc<Context>,
    /// Where the next search starts.
    next: Mutex<u32>,
}

impl Controller for PodCidrs {
    const NAME: &'static str = "cidr-allocator";
    type Key = ObjectKey;

    async fn reconcile(&self, _: &ObjectKey) -> Result<Option<Duration>, Status> {
        let settings = &self.context.settings;
        let nodes = self.context.caches.nodes.all();
        let parts: Vec<Option<Ipv4Net>> = nodes.iter().map(|node| part_of(node)).collect();
        let next = *self.next.lock().unwrap_or_else(PoisonError::into_inner);
        let plan = plan(
            settings.cluster_cidr,
            settings.node_prefix_len,
            &parts,
            next,
        );
        for part in &plan.doubled {
            tracing::error!(%part, "two nodes have the same pod CIDR: delete one of the nodes");
        }
        for (index, part) in &plan.assign {
            let mut node = Node::clone(&nodes[*index]);
            let spec = node.spec.get_or_insert_default();
            spec.pod_cidr = Some(part.to_string());
            spec.pod_cidrs = Some(vec![part.to_string()]);
            // With the revision that was read: if anyone was faster, this fails and is planned anew.
            super::ignore_not_found(self.context.registry.update(&node).await)?;
            let name = node.metadata.name.as_deref().unwrap_or_default();
            tracing::info!(node = name, %part, "pod CIDR assigned");
        }
        *self.next.lock().unwrap_or_else(PoisonError::into_inner) = plan.next;
        for index in &plan.without {
            let node = &nodes[*index];
            let name = node.metadata.name.as_deref().unwrap_or_default();
            let message = format!("Node {name} status is now: CIDRNotAvailable");
            let (type_, reason) = (EventType::Warning, "CIDRNotAvailable");
            let event = super::event_about(&**node, Self::NAME, type_, reason, message);
            self.context.registry.event(event).await;
        }
        Ok((!plan.without.is_empty()).then_some(EXHAUSTED_RETRY))
    }
}

/// Starts the worker.
pub(super) fn start(context: &Arc<Context>, tasks: &mut JoinSet<()>, shutdown: &CancellationToken) {
    let queue: WorkQueue<ObjectKey> = WorkQueue::new();
    let nodes = queue.clone();
    context.caches.nodes.on_change(move |delta| {
        // Only a node without a part, or one that leaves its part behind, changes anything.
        if matches!(delta, super::informer::Delta::Deleted(_)) || part_of(delta.object()).is_none()
        {
            nodes.add(ObjectKey::new("", "nodes"));
        }
    });
    let controller = PodCidrs {
        context: Arc::clone(context),
        next: Mutex::new(0),
    };
    super::spawn_workers(controller, &queue, 1, context, tasks, shutdown);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn net(text: &str) -> Ipv4Net {
        text.parse().unwrap()
    }

    #[test]
    fn every_node_gets_its_own_part_and_the_search_goes_round() {
        let cluster = net("10.244.0.0/16");
        let first = plan(cluster, 24, &[None, None], 0);
        assert_eq!(
            first.assign,
            [(0, net("10.244.0.0/24")), (1, net("10.244.1.0/24"))]
        );
        // The first node is gone: its part is not the next one to be given out.
        let second = plan(cluster, 24, &[Some(net("10.244.1.0/24")), None], first.next);
        assert_eq!(second.assign, [(1, net("10.244.2.0/24"))]);
        let last = plan(cluster, 24, &[None, None], 255);
        assert_eq!(
            last.assign,
            [(0, net("10.244.255.0/24")), (1, net("10.244.0.0/24"))]
        );
    }

    #[test]
    fn exhaustion_and_doubles_are_told() {
        let cluster = net("10.0.0.0/30");
        let taken = |text: &str| Some(net(text));
        let nodes = [
            taken("10.0.0.0/31"),
            taken("10.0.0.0/31"),
            None,
            None,
            taken("10.0.0.9/32"),
        ];
        let plan = plan(cluster, 31, &nodes, 0);
        assert_eq!(plan.assign, [(2, net("10.0.0.2/31"))]);
        assert_eq!(plan.without, [3]);
        assert_eq!(plan.doubled, [net("10.0.0.0/31")]);
    }

    proptest! {
        #[test]
        fn parts_never_overlap(
            held in proptest::collection::vec(proptest::option::of(0_u8..16), 0..24),
            next in any::<u32>(),
        ) {
            let cluster = net("10.9.0.0/20");
            let mut nodes: Vec<Option<Ipv4Net>> = Vec::new();
            for part in held {
                let part = part.map(|i| net(&format!("10.9.{i}.0/24")));
                if part.is_none() || !nodes.contains(&part) { nodes.push(part); }
            }
            let plan = plan(cluster, 24, &nodes, next);
            let mut all: Vec<Ipv4Net> = nodes.iter().flatten().copied().collect();
            all.extend(plan.assign.iter().map(|(_, part)| *part));
            let distinct: BTreeSet<Ipv4Net> = all.iter().copied().collect();
            prop_assert_eq!(distinct.len(), all.len());
            prop_assert!(all.iter().all(|part| cluster.contains(part)));
            prop_assert!(plan.without.is_empty() || all.len() == 16);
        }
    }
}
