//! Everybody reaches every pod by its own address: pods and nodes, on one link and behind the router.

use std::net::IpAddr;

use anyhow::{Context, Result, ensure};

use super::{LIMIT, delete, pod_ip, server};
use crate::machines::Nodes;

/// More than one frame carries, so that it travels in full ones.
const BODY: usize = 200_000;

/// From every pod and every node to every pod, and from every pod to every node, also with full frames.
pub(super) fn reach(nodes: &mut Nodes) -> Result<()> {
    let numbers = nodes.numbers();
    let names: Vec<String> = numbers.iter().map(|n| format!("pod-{n}")).collect();
    let pods: Vec<String> = numbers
        .iter()
        .zip(&names)
        .map(|(number, name)| server(name, *number, "reach"))
        .collect();
    let cluster = &nodes.cluster;
    cluster.apply_ok(&pods.concat())?;
    let mut addresses: Vec<(String, IpAddr)> = Vec::new();
    for name in &names {
        cluster.wait_ready("default", name)?;
        addresses.push((name.clone(), pod_ip(cluster, "default", name)?));
    }
    let big = format!("head -c {BODY} /dev/zero > /w/big");
    for name in &names {
        cluster.ok(&["exec", name, "--", "sh", "-c", &big])?;
    }
    let script: String = addresses
        .iter()
        .map(|(name, ip)| {
            format!(
                "[ \"$(timeout 30 wget -q -O - http://{ip}:8080/)\" = {name} ] || echo {name} does not answer; \
                 [ $(timeout 30 wget -q -O - http://{ip}:8080/big | wc -c) = {BODY} ] || echo {name} sends no full frames; "
            )
        })
        .collect();
    let to_nodes: String = numbers
        .iter()
        .map(|n| {
            let address = nodes.address(*n);
            // The agent's hand listens there; on node-1 it is the API.
            let port = if *n == 1 { 6443 } else { 7001 };
            format!("nc -w 30 {address} {port} < /dev/null || echo node-{n} does not answer; ")
        })
        .collect();
    // A route may take a moment after its node; then nothing is missing.
    for name in &names {
        cluster.wait(&format!("{name} to reach all"), LIMIT, |c| {
            let line = format!("{script}{to_nodes}");
            let said = c.ok(&["exec", name, "--", "sh", "-c", &line])?;
            ensure!(said.trim().is_empty(), "from {name}: {said}");
            Ok(true)
        })?;
    }
    for number in &numbers {
        let said = nodes.on(*number, &script)?;
        ensure!(said.trim().is_empty(), "from node-{number}: {said}");
    }
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    delete(cluster, "pod", &names).context("afterwards")
}
