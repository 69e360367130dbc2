//! A hundred pods on two workers.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::machines::Nodes;

const COUNT: usize = 100;
const LIMIT: &str = "--timeout=600s";

const DEPLOYMENT: &str = "apiVersion: v1
kind: Namespace
metadata: {name: many}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: many, namespace: many}
spec:
  replicas: 100
  selector: {matchLabels: {app: many}}
  template:
    metadata: {labels: {app: many}}
    spec:
      affinity:
        nodeAffinity:
          requiredDuringSchedulingIgnoredDuringExecution:
            nodeSelectorTerms:
              - matchExpressions:
                  - {key: kubernetes.io/hostname, operator: NotIn, values: [node-1]}
      terminationGracePeriodSeconds: 1
      containers:
        - name: main
          image: gantry.local/busybox:debian
          imagePullPolicy: IfNotPresent
          command: [sleep, \"36000\"]
          resources: {requests: {cpu: 1m, memory: 1Mi}}
";

/// They all run, on both, each with an address of its own, and all go.
pub(super) fn hundred_pods(nodes: &mut Nodes) -> Result<()> {
    let cluster = &nodes.cluster;
    let began = Instant::now();
    cluster.apply_ok(DEPLOYMENT)?;
    cluster.ok(&["-n", "many", "rollout", "status", "deployment/many", LIMIT])?;
    println!("vm: {COUNT} pods in {:.1} s", began.elapsed().as_secs_f64());
    let pods = cluster.get(&["pods", "-n", "many"])?;
    let items = pods["items"].as_array().context("no list")?;
    let mut by_node: BTreeMap<&str, usize> = BTreeMap::new();
    let mut addresses = std::collections::BTreeSet::new();
    for pod in items {
        *by_node
            .entry(pod["spec"]["nodeName"].as_str().unwrap_or_default())
            .or_default() += 1;
        addresses.insert(pod["status"]["podIP"].as_str().unwrap_or_default());
    }
    ensure!(addresses.len() == COUNT, "{} addresses", addresses.len());
    let workers = nodes.workers.len();
    ensure!(
        by_node.len() == workers && by_node.values().all(|count| *count >= COUNT / workers / 2),
        "they run on {by_node:?}"
    );
    let deleted = cluster.ok(&["delete", "namespace", "many", LIMIT]);
    deleted.context("delete a hundred pods")?;
    cluster.wait("them to be gone", Duration::from_secs(10), |c| {
        let left = c.ok(&["get", "pods", "-A", "--no-headers"])?;
        Ok(left.trim().is_empty())
    })
}
