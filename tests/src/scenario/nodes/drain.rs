//! A node is emptied for work on it: its pods go elsewhere, clients notice nothing, and it comes back.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::{LIMIT, ask, delete, server, service};
use crate::cluster::Cluster;
use crate::machines::Nodes;

const NAMESPACE: &str = "drained";
/// Between two requests: three machines share the host's processors.
const EVERY: Duration = Duration::from_millis(100);
const PATIENCE: Duration = Duration::from_secs(15);

/// Three pods, spread over the nodes.
const DEPLOYMENT: &str = "apiVersion: v1
kind: Namespace
metadata: {name: drained}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, namespace: drained}
spec:
  replicas: 3
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      topologySpreadConstraints:
        - maxSkew: 1
          topologyKey: kubernetes.io/hostname
          whenUnsatisfiable: ScheduleAnyway
          labelSelector: {matchLabels: {app: web}}
      terminationGracePeriodSeconds: 5
      containers:
        - name: main
          image: gantry.local/busybox:debian
          imagePullPolicy: IfNotPresent
          command: [sh, -c, \"mkdir -p /w && hostname > /w/index.html && exec httpd -f -p 8080 -h /w\"]
          readinessProbe: {tcpSocket: {port: 8080}, periodSeconds: 1}
---
";

/// `gantry drain` refuses what nothing would start again, then moves the pods of a Deployment; the node
/// takes none until it is uncordoned.
pub(super) fn drain(nodes: &mut Nodes) -> Result<()> {
    let cluster = &nodes.cluster;
    let frontend = service("web", "web", "").replacen(
        "metadata: {name: web}",
        "metadata: {name: web, namespace: drained}",
        1,
    );
    cluster.apply_ok(&(DEPLOYMENT.to_owned() + &frontend))?;
    rolled_out(cluster)?;
    ensure!(
        on(cluster, "node-2")? > 0,
        "no replica is on node-2, so that nothing would move"
    );
    cluster.apply_ok(&server("bare", 2, "bare"))?;
    cluster.wait_ready("default", "bare")?;
    let refused = cluster.gantry(&["drain", "node-2", "--timeout=60s"])?;
    ensure!(
        refused.code != 0 && refused.stderr.contains("bare"),
        "a pod that nothing starts again was not named: {refused:?}"
    );
    let at = cluster.get(&["service", "web", "-n", NAMESPACE])?;
    let ip = at["spec"]["clusterIP"].as_str().context("no cluster IP")?;
    let at = SocketAddr::new(ip.parse()?, 80);
    let lost = lost_while(at, || {
        let drained = ["drain", "node-2", "--force", "--timeout=240s"];
        cluster.ok(&drained).context("drain")?;
        rolled_out(cluster)
    })?;
    // On a host that is too slow for three machines a pod is not acked by all of them within its second.
    let events = cluster.ok(&["-n", NAMESPACE, "get", "events"])?;
    ensure!(
        lost.is_empty() || events.contains("drained: not by all"),
        "all nodes acked, but {}",
        lost.join("; ")
    );
    ensure!(on(cluster, "node-2")? == 0, "a drained node has pods");
    let table = cluster.ok(&["get", "node", "node-2"])?;
    ensure!(table.contains("SchedulingDisabled"), "{table}");
    cluster.apply_ok(&server("waits", 2, "bare"))?;
    let unscheduled = |c: &Cluster| -> Result<bool> {
        let pod = c.get(&["pod", "waits"])?;
        let conditions = pod["status"]["conditions"].as_array();
        let mut conditions = conditions.into_iter().flatten();
        Ok(conditions.any(|c| c["type"] == "PodScheduled" && c["reason"] == "Unschedulable"))
    };
    cluster.wait("a pod to find no node", LIMIT, unscheduled)?;
    cluster.ok(&["uncordon", "node-2"])?;
    cluster.wait_ready("default", "waits")?;
    delete(cluster, "pod", &["waits"])
}

fn rolled_out(cluster: &Cluster) -> Result<()> {
    let status = ["rollout", "status", "deployment/web", "--timeout=240s"];
    cluster
        .ok(&[&["-n", NAMESPACE][..], &status].concat())
        .map(drop)
}

/// How many of the Deployment's pods are on a node.
fn on(cluster: &Cluster, node: &str) -> Result<usize> {
    let pods = cluster.get(&["pods", "-n", NAMESPACE])?;
    let items = pods["items"].as_array().context("no list")?;
    Ok(items
        .iter()
        .filter(|pod| pod["spec"]["nodeName"] == node)
        .count())
}

/// Asks while something happens, and once more afterwards; returns what was lost.
pub(super) fn lost_while(
    at: SocketAddr,
    happens: impl FnOnce() -> Result<()>,
) -> Result<Vec<String>> {
    let (over, answered) = (AtomicBool::new(false), AtomicU64::new(0));
    let lost = std::thread::scope(|scope| {
        let client = scope.spawn(|| {
            let (began, mut lost) = (Instant::now(), Vec::new());
            loop {
                let last = over.load(Ordering::Relaxed);
                match ask(at, PATIENCE) {
                    Ok(_) => drop(answered.fetch_add(1, Ordering::Relaxed)),
                    Err(error) => {
                        lost.push(format!("{} s on: {error:#}", began.elapsed().as_secs()))
                    }
                }
                if last {
                    return lost;
                }
                std::thread::sleep(EVERY);
            }
        });
        let happened = happens();
        over.store(true, Ordering::Relaxed);
        let lost = client.join();
        happened?;
        lost.map_err(|_| anyhow::anyhow!("the client panicked"))
    })?;
    let answered = answered.into_inner();
    println!(
        "vm: {answered} requests were answered meanwhile, {} lost",
        lost.len()
    );
    ensure!(answered > 10, "only {answered} requests: {lost:?}");
    Ok(lost)
}
