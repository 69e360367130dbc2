//! Pod addresses for nodes: a part of the cluster CIDR for each.
//!
//! One worker with one key hands them all out, so two nodes that join at the same instant cannot
//! get the same part; the write is a compare-and-set on the node. A part is free again when its node
//! object is gone, and the search goes round, so a part that became free is reused as late as
//! possible: other nodes may still route it.
//!
//! Source: Kubernetes `pkg/controller/nodeipam/ipam/range_allocator.go`.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use gantry_api::k8s_openapi::api::core::v1::Node;
use gantry_api::status::Status;
use ipnet::IpNet;
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
    assign: Vec<(usize, IpNet)>,
    /// Indexes of nodes for which no part is free.
    without: Vec<usize>,
    /// Parts that two nodes have; only a user can have written that.
    doubled: Vec<IpNet>,
    /// Where the next search starts.
    next: u32,
}

/// Decides the parts. `nodes` are the parts that nodes have now; the search starts at part `next`.
fn plan(cluster: IpNet, prefix_len: u8, nodes: &[Option<IpNet>], next: u32) -> Plan {
    let mut plan = Plan {
        next,
        ..Plan::default()
    };
    let mut taken: BTreeSet<IpNet> = BTreeSet::new();
    for part in nodes.iter().flatten() {
        if !taken.insert(part.trunc()) {
            plan.doubled.push(*part);
        }
    }
    let bits = u32::from(prefix_len.saturating_sub(cluster.prefix_len())).min(31);
    let part_count = 1_u32 << bits;
    let shift = u32::from(cluster.max_prefix_len().saturating_sub(prefix_len));
    let part_at = |index: u32| {
        let offset = u128::from(index).checked_shl(shift).unwrap_or(0);
        let address: IpAddr = match cluster.network() {
            IpAddr::V4(base) => {
                let offset = u32::try_from(offset).ok()?;
                Ipv4Addr::from(u32::from(base).checked_add(offset)?).into()
            }
            IpAddr::V6(base) => Ipv6Addr::from(u128::from(base).checked_add(offset)?).into(),
        };
        IpNet::new(address, prefix_len).ok()
    };
    // Wider parts, as an earlier setting may have given out, take the narrower ones in them.
    let overlaps = |part: &IpNet, taken: &BTreeSet<IpNet>| {
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

/// The part of a family that a node has.
fn part_of(node: &Node, is_v4: bool) -> Option<IpNet> {
    let spec = node.spec.as_ref()?;
    let all = spec.pod_cidr.iter().chain(spec.pod_cidrs.iter().flatten());
    let mut all = all.filter_map(|text| text.parse::<IpNet>().ok());
    all.find(|part| part.addr().is_ipv4() == is_v4)
}

/// The node with this part as well, the first family first.
fn with_part(node: &Node, part: IpNet) -> Node {
    let mut node = node.clone();
    let mut all: Vec<IpNet> = [true, false]
        .into_iter()
        .filter_map(|is_v4| part_of(&node, is_v4))
        .collect();
    all.retain(|other| other.addr().is_ipv4() != part.addr().is_ipv4());
    all.push(part);
    all.sort_by_key(|part| part.addr().is_ipv6());
    let all: Vec<String> = all.iter().map(ToString::to_string).collect();
    let spec = node.spec.get_or_insert_default();
    spec.pod_cidr = all.first().cloned();
    spec.pod_cidrs = Some(all);
    node
}

struct PodCidrs {
    context: Arc<Context>,
    /// Where the next search starts, by family.
    next: Mutex<[u32; 2]>,
}

impl Controller for PodCidrs {
    const NAME: &'static str = "cidr-allocator";
    type Key = ObjectKey;

    async fn reconcile(&self, _: &ObjectKey) -> Result<Option<Duration>, Status> {
        let settings = &self.context.settings;
        let nodes = self.context.caches.nodes.all();
        let mut next = *self.next.lock().unwrap_or_else(PoisonError::into_inner);
        let mut changed: BTreeMap<usize, Node> = BTreeMap::new();
        let mut without: BTreeSet<usize> = BTreeSet::new();
        for (cluster, next) in settings.cluster_cidr.all().zip(&mut next) {
            let is_v4 = cluster.addr().is_ipv4();
            let prefix_len = match is_v4 {
                true => settings.node_prefix_len,
                false => settings.node_prefix_len_v6,
            };
            let parts: Vec<_> = nodes.iter().map(|node| part_of(node, is_v4)).collect();
            let plan = plan(cluster, prefix_len, &parts, *next);
            for part in &plan.doubled {
                tracing::error!(%part, "two nodes have the same pod CIDR: delete one of the nodes");
            }
            for (index, part) in &plan.assign {
                let node = changed.get(index).unwrap_or(&nodes[*index]);
                let node = with_part(node, *part);
                changed.insert(*index, node);
            }
            without.extend(plan.without);
            *next = plan.next;
        }
        // Both families in one write: pods of a node have both, or wait.
        for (_, node) in changed
            .iter()
            .filter(|(index, _)| !without.contains(*index))
        {
            // With the revision that was read: if anyone was faster, this fails and is planned anew.
            super::ignore_not_found(self.context.registry.update(node).await)?;
            let name = node.metadata.name.as_deref().unwrap_or_default();
            let parts = node.spec.as_ref().and_then(|spec| spec.pod_cidrs.clone());
            let parts = parts.unwrap_or_default().join(",");
            tracing::info!(node = name, parts, "pod CIDR assigned");
        }
        *self.next.lock().unwrap_or_else(PoisonError::into_inner) = next;
        for index in &without {
            let node = &nodes[*index];
            let name = node.metadata.name.as_deref().unwrap_or_default();
            let message = format!("Node {name} status is now: CIDRNotAvailable");
            let (type_, reason) = (EventType::Warning, "CIDRNotAvailable");
            let event = super::event_about(&**node, Self::NAME, type_, reason, message);
            self.context.registry.event(event).await;
        }
        Ok((!without.is_empty()).then_some(EXHAUSTED_RETRY))
    }
}

/// Starts the worker.
pub(super) fn start(context: &Arc<Context>, tasks: &mut JoinSet<()>, shutdown: &CancellationToken) {
    let queue: WorkQueue<ObjectKey> = WorkQueue::new();
    let nodes = queue.clone();
    let is_dual = context.settings.cluster_cidr.v6.is_some();
    context.caches.nodes.on_change(move |delta| {
        // Only a node without a part, or one that leaves its part behind, changes anything.
        let lacks = |is_v4| part_of(delta.object(), is_v4).is_none();
        let lacks_one = lacks(true) || is_dual && lacks(false);
        if matches!(delta, super::informer::Delta::Deleted(_)) || lacks_one {
            nodes.add(ObjectKey::new("", "nodes"));
        }
    });
    let controller = PodCidrs {
        context: Arc::clone(context),
        next: Mutex::default(),
    };
    super::spawn_workers(controller, &queue, 1, context, tasks, shutdown);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn net(text: &str) -> IpNet {
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

    #[test]
    fn a_node_gets_a_part_of_each_family_the_first_one_first() {
        let cluster = net("fd00:10:244::/56");
        let first = plan(cluster, 64, &[None, None], 255);
        assert_eq!(
            first.assign,
            [
                (0, net("fd00:10:244:ff::/64")),
                (1, net("fd00:10:244::/64"))
            ]
        );
        let node = with_part(&Node::default(), net("fd00:10:244:1::/64"));
        let node = with_part(&node, net("10.244.1.0/24"));
        let spec = node.spec.clone().unwrap();
        assert_eq!(spec.pod_cidr.as_deref(), Some("10.244.1.0/24"));
        assert_eq!(
            spec.pod_cidrs.unwrap(),
            ["10.244.1.0/24", "fd00:10:244:1::/64"]
        );
        assert_eq!(part_of(&node, false), Some(net("fd00:10:244:1::/64")));
        assert_eq!(
            part_of(&with_part(&Node::default(), net("10.244.1.0/24")), false),
            None
        );
    }

    proptest! {
        #[test]
        fn parts_never_overlap(
            held in proptest::collection::vec(proptest::option::of(0_u8..16), 0..24),
            next in any::<u32>(),
        ) {
            let cluster = net("10.9.0.0/20");
            let mut nodes: Vec<Option<IpNet>> = Vec::new();
            for part in held {
                let part = part.map(|i| net(&format!("10.9.{i}.0/24")));
                if part.is_none() || !nodes.contains(&part) { nodes.push(part); }
            }
            let plan = plan(cluster, 24, &nodes, next);
            let mut all: Vec<IpNet> = nodes.iter().flatten().copied().collect();
            all.extend(plan.assign.iter().map(|(_, part)| *part));
            let distinct: BTreeSet<IpNet> = all.iter().copied().collect();
            prop_assert_eq!(distinct.len(), all.len());
            prop_assert!(all.iter().all(|part| cluster.contains(part)));
            prop_assert!(plan.without.is_empty() || all.len() == 16);
        }
    }
}
