//! Hard reboots, one after the other, leak nothing.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};

use super::faults::identity;
use super::{LIMIT, delete, pod_ip, server};
use crate::cluster::Cluster;
use crate::machines::Nodes;

const REBOOTS: usize = 5;
const PODS: usize = 4;
/// Addresses of pods that are to come: the agent keeps some networks ready, and makes new ones meanwhile.
const SPARE: usize = 8;
const LEASES: &str = "ls /run/gantry/ipam/*/leases | wc -l";

/// After each of five power cuts the pods have one address each and nobody else has one.
pub(super) fn hard_reboots(nodes: &mut Nodes) -> Result<()> {
    let names: Vec<String> = (1..=PODS).map(|n| format!("pod-{n}")).collect();
    let manifest: String = names.iter().map(|name| server(name, 3, "many")).collect();
    nodes.cluster.apply_ok(&manifest)?;
    let worker = nodes.worker(3)?.clone();
    for name in &names {
        nodes.cluster.wait_ready("default", name)?;
    }
    for round in 1..=REBOOTS {
        let before: Vec<_> = names
            .iter()
            .map(|name| identity(&nodes.cluster, name))
            .collect::<Result<_>>()?;
        nodes.ask("power-cut node-3")?;
        nodes.ask("power-on node-3")?;
        nodes.wait_up(&worker)?;
        let mut addresses = BTreeSet::new();
        for (name, [container, ..]) in names.iter().zip(before) {
            // What the API says of a machine without power is what was true before.
            let what = format!("{name} to start again, round {round}");
            let anew = |c: &Cluster| Ok(identity(c, name)?[0] != container);
            nodes.cluster.wait(&what, LIMIT, anew)?;
            nodes.cluster.wait_ready("default", name)?;
            addresses.insert(pod_ip(&nodes.cluster, "default", name)?);
        }
        ensure!(addresses.len() == PODS, "round {round}: {addresses:?}");
        nodes.wait_ready("node-3")?;
        let leased = worker.ok(&["sh", "-c", LEASES])?;
        let leased: usize = leased.trim().parse()?;
        ensure!(
            leased <= PODS + SPARE,
            "round {round}: {leased} addresses are leased to {PODS} pods"
        );
    }
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    delete(&nodes.cluster, "pod", &names).context("afterwards")
}
