//! Hard reboots, one after the other, leak nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use anyhow::{Context, Result, ensure};

use super::faults::identity;
use super::{LIMIT, delete, pod_ips, server};
use crate::cluster::Cluster;
use crate::machines::Nodes;
use crate::machines::hand::Machine;

const REBOOTS: usize = 5;
const PODS: usize = 4;
/// Networks of pods that are to come: the agent keeps so many ready.
const READY: usize = 4;
/// The address, and a link to who has it.
const LEASES: &str = "for lease in /run/gantry/ipam/*/leases/*; do \
                      echo ${lease##*/} $(readlink $lease); done";

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
            addresses.extend(pod_ips(&nodes.cluster, "default", name)?);
        }
        // Of each family one.
        ensure!(
            addresses.len() == 2 * PODS,
            "round {round}: the pods have {addresses:?}"
        );
        nodes.wait_ready("node-3")?;
        let what = format!("no address to be leased to nobody, round {round}");
        let are_used = |_: &Cluster| leased_to_these(&worker, &addresses).map(|()| true);
        nodes.cluster.wait(&what, LIMIT, are_used)?;
    }
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    delete(&nodes.cluster, "pod", &names).context("afterwards")
}

/// The pods have leases of all their addresses, and beside them only the networks that are kept ready do, each
/// of one address a family.
fn leased_to_these(worker: &Machine, addresses: &BTreeSet<IpAddr>) -> Result<()> {
    let said = worker.ok(&["sh", "-c", LEASES])?;
    let mut by_owner: BTreeMap<&str, Vec<IpAddr>> = BTreeMap::new();
    for (address, owner) in said.lines().filter_map(|line| line.split_once(' ')) {
        by_owner.entry(owner).or_default().push(address.parse()?);
    }
    let leased: BTreeSet<IpAddr> = by_owner.values().flatten().copied().collect();
    let bare: Vec<_> = addresses.difference(&leased).collect();
    ensure!(
        bare.is_empty(),
        "pods have {bare:?} without a lease: {said}"
    );
    ensure!(
        by_owner.values().all(|of_one| of_one.len() == 2) && by_owner.len() <= PODS + READY,
        "{} networks have addresses, of {PODS} pods and {READY} that are kept ready: {said}",
        by_owner.len()
    );
    Ok(())
}
