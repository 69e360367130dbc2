//! The main job across nodes: a replica on each, one Service, clients keep their address.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};

use super::pod_ip;
use crate::machines::Nodes;
use crate::scenario::{MAIN_JOB, get};

/// One replica on each node.
pub(super) const SPREAD: &str = "    spec:
      topologySpreadConstraints:
        - maxSkew: 1
          topologyKey: kubernetes.io/hostname
          whenUnsatisfiable: DoNotSchedule
          labelSelector: {matchLabels: {app: web}}
      containers:
        - name: nginx
";

/// The manifest with as many replicas as nodes, one on each.
pub(super) fn spread(nodes: &Nodes) -> Result<String> {
    let count = nodes.numbers().len();
    let manifest = MAIN_JOB
        .replacen(
            "    spec:\n      containers:\n        - name: nginx\n",
            SPREAD,
            1,
        )
        .replacen("  replicas: 3\n", &format!("  replicas: {count}\n"), 1);
    ensure!(manifest.contains("maxSkew"), "the manifest has changed");
    Ok(manifest)
}

/// The pods of the Deployment: name and node.
pub(super) fn replicas(nodes: &Nodes) -> Result<Vec<(String, String)>> {
    let pods = nodes.cluster.get(&["pods", "-n", "web", "-l", "app=web"])?;
    let items = pods["items"].as_array().context("no list")?;
    let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
    Ok(items
        .iter()
        .map(|pod| {
            (
                text(&pod["metadata"]["name"]),
                text(&pod["spec"]["nodeName"]),
            )
        })
        .collect())
}

/// A replica on every node answers by name, from node-1 and from a pod, and sees the pod's own address.
pub(super) fn main_job(nodes: &mut Nodes) -> Result<()> {
    let cluster = &nodes.cluster;
    cluster.apply_ok(&spread(nodes)?)?;
    let count = nodes.numbers().len();
    let web = ["-n", "web"];
    let status = ["rollout", "status", "deployment/web", "--timeout=180s"];
    cluster.ok(&[&web[..], &status].concat())?;
    cluster.wait_ready("web", "client")?;
    let replicas = replicas(nodes)?;
    let on: BTreeSet<&String> = replicas.iter().map(|(_, node)| node).collect();
    ensure!(on.len() == count, "{count} replicas run on {on:?}");

    let service = cluster.get(&["service", "web", "-n", "web"])?;
    let ip = service["spec"]["clusterIP"].as_str();
    let address = SocketAddr::new(ip.context("no cluster IP")?.parse()?, 80);
    let mut seen = BTreeSet::new();
    for _ in 0..60 {
        seen.insert(get(address)?);
    }
    ensure!(seen.len() == count, "from node-1 only {seen:?} answered");
    let script = "for i in $(seq 60); do wget -S -q -O /dev/null http://web 2>&1; done";
    let said = cluster.ok(&["-n", "web", "exec", "client", "--", "sh", "-c", script])?;
    let from_pod: BTreeSet<&str> = said
        .lines()
        .filter_map(|l| l.trim().strip_prefix("X-Pod: "))
        .collect();
    ensure!(
        from_pod.len() == count,
        "from the pod only {from_pod:?} answered: {said}"
    );
    let client = pod_ip(cluster, "web", "client")?;
    for (name, node) in &replicas {
        let log = cluster.ok(&["-n", "web", "logs", name])?;
        let own = format!("{client} ");
        ensure!(
            log.lines().any(|line| line.starts_with(&own)),
            "{name} on {node} has not seen {client}: {log}"
        );
    }
    Ok(())
}
