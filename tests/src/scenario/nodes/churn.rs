//! Hard reboots, one after the other, leak nothing.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};

use super::{delete, pod_ip, server};
use crate::machines::Nodes;

const REBOOTS: usize = 5;
const PODS: usize = 4;

/// After each of five power cuts the pods have one address each and nobody else has one.
pub(super) fn hard_reboots(nodes: &mut Nodes) -> Result<()> {
    let names: Vec<String> = (1..=PODS).map(|n| format!("pod-{n}")).collect();
    let manifest: String = names.iter().map(|name| server(name, 3, "many")).collect();
    nodes.cluster.apply_ok(&manifest)?;
    let worker = nodes.worker(3)?.clone();
    for round in 1..=REBOOTS {
        for name in &names {
            nodes.cluster.wait_ready("default", name)?;
        }
        let mut addresses = BTreeSet::new();
        for name in &names {
            addresses.insert(pod_ip(&nodes.cluster, "default", name)?);
        }
        ensure!(addresses.len() == PODS, "round {round}: {addresses:?}");
        nodes.ask("power-cut node-3")?;
        nodes.ask("power-on node-3")?;
        nodes.wait_up(&worker)?;
        nodes.wait_ready("node-3")?;
    }
    for name in &names {
        nodes.cluster.wait_ready("default", name)?;
    }
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    delete(&nodes.cluster, "pod", &names).context("afterwards")
}
