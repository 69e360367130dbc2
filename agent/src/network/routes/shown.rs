//! What the node says of its ways to the others: in its Node object and its metrics.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;

use super::RoutingPlan;

/// Nodes and problems that are named; more are counted.
const NAMED_COUNT_MAX: usize = 8;

/// Another node, or one prefix of it.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct ReachedNode {
    /// Its name.
    pub node: String,
    /// Its pods'.
    pub prefix: IpNet,
    /// `direct (eth0)`, `vxlan`, `wireguard`
    pub way: String,
    /// Without a tunnel.
    pub is_direct: bool,
}

/// How the other nodes' pods are reached at this moment.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Routes {
    /// Those that are.
    pub reached: Vec<ReachedNode>,
    /// Why the others are not, a sentence each.
    pub problems: Vec<String>,
    /// See [`RoutingPlan::near`].
    pub near: Option<BTreeSet<IpAddr>>,
    /// Bytes that a packet of a pod may have on every way; none: not known yet.
    pub mtu: Option<u32>,
}

impl Routes {
    /// What was planned, and what the kernel had against it.
    pub(super) fn new(plan: &RoutingPlan, refused: Option<String>) -> Self {
        Self {
            reached: plan.reached.clone(),
            problems: plan.problems.iter().cloned().chain(refused).collect(),
            near: plan.near.clone(),
            mtu: plan.mtu,
        }
    }

    /// How many prefixes are reached directly, and how many through the tunnel.
    pub fn counts(&self) -> (usize, usize) {
        let direct = self.reached.iter().filter(|node| node.is_direct).count();
        (direct, self.reached.len() - direct)
    }

    /// Who is not reached and why, in one line; "" when all are.
    pub fn warning(&self) -> String {
        shortened(&self.problems, "; ")
    }

    /// Who is reached how, in one line.
    pub fn summary(&self) -> String {
        let (direct, tunnelled) = self.counts();
        if self.reached.is_empty() {
            return "there is no other node with pods".into();
        }
        if self.reached.len() > NAMED_COUNT_MAX {
            return format!("{direct} nodes are reached directly, {tunnelled} by a tunnel");
        }
        let nodes = self.reached.iter();
        let nodes: Vec<String> = nodes.map(|it| format!("{} {}", it.node, it.way)).collect();
        nodes.join(", ")
    }
}

fn shortened(all: &[String], separator: &str) -> String {
    let mut text = all[..all.len().min(NAMED_COUNT_MAX)].join(separator);
    if let Some(more) = all
        .len()
        .checked_sub(NAMED_COUNT_MAX)
        .filter(|more| *more > 0)
    {
        text.push_str(&format!("{separator}and {more} more"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn routes(count: usize) -> Routes {
        let reached = (0..count).map(|index| ReachedNode {
            node: format!("n{index}"),
            prefix: format!("10.244.{index}.0/24").parse().unwrap(),
            way: if index == 0 { "vxlan" } else { "direct (eth0)" }.into(),
            is_direct: index != 0,
        });
        Routes {
            reached: reached.collect(),
            problems: (0..count)
                .map(|index| format!("node n{index}: no"))
                .collect(),
            near: None,
            mtu: None,
        }
    }

    #[test]
    fn few_are_named_and_many_counted() {
        assert_eq!(routes(2).summary(), "n0 vxlan, n1 direct (eth0)");
        assert_eq!(routes(2).warning(), "node n0: no; node n1: no");
        let many = routes(100);
        assert_eq!(
            many.summary(),
            "99 nodes are reached directly, 1 by a tunnel"
        );
        assert!(many.warning().ends_with("; node n7: no; and 92 more"));
        assert_eq!(routes(0).warning(), "");
        assert_eq!(routes(0).counts(), (0, 0));
    }
}
