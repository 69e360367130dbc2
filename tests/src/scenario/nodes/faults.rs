//! Machines that lose power, a network that parts, a control plane that is gone.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::{LIMIT, ask, cluster_ip, delete, server, service};
use crate::cluster::{Cluster, NODE};
use crate::machines::{GRACE_S, Nodes};

/// An answer of a machine that shares a loaded host with others.
const PATIENCE: Duration = Duration::from_secs(15);
/// From silence to the node's condition: the grace period, and what a loaded host adds.
const NOTICED: Duration = Duration::from_secs(GRACE_S + 40);

/// A server on each node, one Service.
fn set_up(nodes: &Nodes) -> Result<(SocketAddr, Vec<String>)> {
    let cluster = &nodes.cluster;
    let numbers = nodes.numbers();
    let names: Vec<String> = numbers.iter().map(|n| format!("pod-{n}")).collect();
    let mut manifest = service("all", "all", "");
    for (number, name) in numbers.iter().zip(&names) {
        manifest += &server(name, *number, "all");
    }
    cluster.apply_ok(&manifest)?;
    for name in &names {
        cluster.wait_ready("default", name)?;
    }
    let at = cluster_ip(cluster, "all")?;
    all_answer(cluster, at, &names)?;
    Ok((at, names))
}

fn tear_down(nodes: &Nodes, names: &[String]) -> Result<()> {
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    delete(&nodes.cluster, "service", &["all"])?;
    delete(&nodes.cluster, "pod", &names)
}

/// Until exactly these answer, and thirty requests one after the other are answered.
fn all_answer(cluster: &Cluster, at: SocketAddr, names: &[String]) -> Result<()> {
    cluster.wait("exactly the right pods to answer", LIMIT, |_| {
        let mut seen = std::collections::BTreeSet::new();
        for _ in 0..30 {
            seen.insert(ask(at, PATIENCE)?);
        }
        ensure!(
            seen.iter().eq(names),
            "{seen:?} answer instead of {names:?}"
        );
        Ok(true)
    })
}

/// Id, address and restarts of a pod's container: what must not change.
pub(super) fn identity(cluster: &Cluster, name: &str) -> Result<[Value; 3]> {
    let status = cluster.get(&["pod", name])?["status"].clone();
    let container = &status["containerStatuses"][0];
    Ok([
        container["containerID"].clone(),
        container["restartCount"].clone(),
        status["podIP"].clone(),
    ])
}

/// A worker without power is noticed, gets no traffic, and its pod serves again when it is back.
pub(super) fn power_cut(nodes: &mut Nodes) -> Result<()> {
    let (at, names) = set_up(nodes)?;
    let victim = nodes.worker(3)?.clone();
    let left: Vec<String> = names.iter().filter(|n| *n != "pod-3").cloned().collect();
    nodes.ask(&format!("power-cut {}", victim.name))?;
    let cut = Instant::now();
    nodes.wait_condition(&victim.name, "Unknown", NOTICED)?;
    println!("vm: noticed after {} s", cut.elapsed().as_secs());
    all_answer(&nodes.cluster, at, &left).context("without the machine")?;
    nodes.ask(&format!("power-on {}", victim.name))?;
    nodes.wait_up(&victim)?;
    nodes.wait_ready(&victim.name)?;
    nodes.cluster.wait_ready("default", "pod-3")?;
    all_answer(&nodes.cluster, at, &names).context("with the machine back")?;
    tear_down(nodes, &names)
}

/// A Deployment's pod that tolerates a node without power for five seconds. Its program has a name of its own.
const EVICTED: &str = "apiVersion: v1
kind: Namespace
metadata: {name: evicted}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: one, namespace: evicted}
spec:
  replicas: 1
  selector: {matchLabels: {app: one}}
  template:
    metadata: {labels: {app: one}}
    spec:
      affinity:
        nodeAffinity:
          preferredDuringSchedulingIgnoredDuringExecution:
            - weight: 100
              preference:
                matchExpressions:
                  - {key: kubernetes.io/hostname, operator: In, values: [node-3]}
      tolerations:
        - {key: node.kubernetes.io/unreachable, operator: Exists, effect: NoExecute, tolerationSeconds: 5}
        - {key: node.kubernetes.io/not-ready, operator: Exists, effect: NoExecute, tolerationSeconds: 5}
      terminationGracePeriodSeconds: 1
      containers:
        - name: main
          image: gantry.local/busybox:debian
          imagePullPolicy: IfNotPresent
          command: [sleep, \"98765\"]
";

/// Where the pods of the Deployment are that are not being deleted, and their UIDs.
fn placed(cluster: &Cluster) -> Result<Vec<[String; 2]>> {
    let pods = cluster.get(&["pods", "-n", "evicted"])?;
    let items = pods["items"].as_array().context("no list")?;
    let live = items
        .iter()
        .filter(|pod| pod["metadata"]["deletionTimestamp"].is_null());
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let pair = |pod: &Value| {
        [
            text(&pod["spec"]["nodeName"]),
            text(&pod["metadata"]["uid"]),
        ]
    };
    Ok(live.map(pair).collect())
}

/// The pod of a worker without power is given to another node when its time is up, and the worker, back,
/// does not run it again.
pub(super) fn eviction(nodes: &mut Nodes) -> Result<()> {
    nodes.cluster.apply_ok(EVICTED)?;
    let rolled_out = |c: &Cluster| {
        let status = ["rollout", "status", "deployment/one", "--timeout=240s"];
        c.ok(&[&["-n", "evicted"][..], &status].concat())
    };
    rolled_out(&nodes.cluster)?;
    let first = placed(&nodes.cluster)?;
    let [[node, uid]] = &first[..] else {
        anyhow::bail!("not one pod: {first:?}");
    };
    ensure!(node == "node-3", "the pod prefers node-3 and is on {node}");
    let victim = nodes.worker(3)?.clone();
    nodes.ask("power-cut node-3")?;
    let cut = Instant::now();
    let elsewhere = |c: &Cluster| {
        let now = placed(c)?;
        ensure!(
            matches!(&now[..], [[node, other]] if node != "node-3" && !node.is_empty() && other != uid),
            "the pods are {now:?}"
        );
        Ok(true)
    };
    let limit = NOTICED + Duration::from_secs(60);
    let cluster = &nodes.cluster;
    cluster.wait("another node to get the pod", limit, elsewhere)?;
    rolled_out(cluster)?;
    println!("vm: it runs elsewhere after {} s", cut.elapsed().as_secs());
    nodes.ask("power-on node-3")?;
    nodes.wait_up(&victim)?;
    nodes.wait_ready("node-3")?;
    // The old pod's object goes when its node has said that it does not run.
    let cluster = &nodes.cluster;
    cluster.wait("the old pod to be gone", LIMIT, |c| {
        let pods = c.get(&["pods", "-n", "evicted"])?;
        Ok(pods["items"]
            .as_array()
            .is_some_and(|items| items.len() == 1))
    })?;
    // The bracket: the shell that looks has the words in its own command line.
    let ran = "grep -l '9876[5]' /proc/[0-9]*/cmdline";
    let said = victim.run(&["sh", "-c", ran])?;
    ensure!(
        said.stdout.trim().is_empty(),
        "a returning node runs what was given away: {said:?}"
    );
    cluster.ok(&["delete", "namespace", "evicted", "--timeout=240s"])?;
    Ok(())
}

/// A worker that nobody reaches for longer than the grace period keeps its pod as it is.
pub(super) fn partition(nodes: &mut Nodes) -> Result<()> {
    let (at, names) = set_up(nodes)?;
    let before = identity(&nodes.cluster, "pod-2")?;
    let left: Vec<String> = names.iter().filter(|n| *n != "pod-2").cloned().collect();
    nodes.ask("isolate node-2")?;
    nodes.wait_condition("node-2", "Unknown", NOTICED)?;
    all_answer(&nodes.cluster, at, &left).context("without the node")?;
    nodes.ask("heal")?;
    nodes.wait_ready("node-2")?;
    nodes.cluster.wait_ready("default", "pod-2")?;
    all_answer(&nodes.cluster, at, &names).context("healed")?;
    let after = identity(&nodes.cluster, "pod-2")?;
    ensure!(before == after, "pod-2 was touched: {before:?}, {after:?}");
    tear_down(nodes, &names)
}

/// Without the control plane Services go on everywhere, and a worker that loses its power meanwhile
/// starts its pod and serves it by itself.
pub(super) fn control_kill(nodes: &mut Nodes) -> Result<()> {
    let (at, names) = set_up(nodes)?;
    let far = identity(&nodes.cluster, "pod-3")?;
    // This Service has one pod, on the machine that will start alone.
    let manifest = service("lone", "lone", "") + &server("lone", 2, "lone");
    nodes.cluster.apply_ok(&manifest)?;
    nodes.cluster.wait_ready("default", "lone")?;
    let lone = cluster_ip(&nodes.cluster, "lone")?;
    let worker = nodes.worker(2)?.clone();
    nodes.cluster.kill_control()?;
    for _ in 0..30 {
        ask(at, PATIENCE).context("without the control plane")?;
    }
    nodes.ask("power-cut node-2")?;
    nodes.ask("power-on node-2")?;
    nodes.wait_up(&worker)?;
    let script = format!("timeout 15 wget -q -O - http://{lone}/");
    let own = |_: &Cluster| Ok(worker.ok(&["sh", "-c", &script])?.trim() == "lone");
    let what = "a worker that started without the control plane to serve its pod";
    nodes.cluster.wait(what, LIMIT, own)?;

    nodes.cluster.start_control()?;
    for name in [NODE, "node-2", "node-3"] {
        nodes.wait_ready(name)?;
    }
    for name in ["pod-2", "lone"] {
        nodes.cluster.wait_ready("default", name)?;
    }
    all_answer(&nodes.cluster, at, &names).context("with the control plane back")?;
    let after = identity(&nodes.cluster, "pod-3")?;
    ensure!(far == after, "pod-3 was touched: {far:?}, {after:?}");
    delete(&nodes.cluster, "service", &["lone"])?;
    delete(&nodes.cluster, "pod", &["lone"])?;
    tear_down(nodes, &names)
}
