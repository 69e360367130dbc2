//! What holds a namespace and its pods back, as a user meets it: levels of security, quotas, limit ranges,
//! disruption budgets under a drain, and an autoscaler that follows what an agent measures.

use std::time::Duration;

use anyhow::{Result, ensure};

use crate::cluster::{Cluster, NODE};

/// Generous: the machine may be busy, and figures are looked at every 15 s.
const PATIENCE: Duration = Duration::from_secs(180);

const NAMESPACE: &str = r#"
apiVersion: v1
kind: Namespace
metadata:
  name: held
  labels: {pod-security.kubernetes.io/enforce: baseline, pod-security.kubernetes.io/warn: restricted}
---
apiVersion: v1
kind: ResourceQuota
metadata: {name: few, namespace: held}
spec: {hard: {pods: "2", requests.cpu: 200m}}
---
apiVersion: v1
kind: LimitRange
metadata: {name: sizes, namespace: held}
spec:
  limits:
  - {type: Container, defaultRequest: {cpu: 50m}, default: {cpu: 100m}, max: {cpu: 500m}}
"#;

/// It burns what it may: 100m, where the range asks for 50m.
const BUSY: &str = r#"
apiVersion: apps/v1
kind: Deployment
metadata: {name: busy, namespace: held}
spec:
  replicas: 1
  selector: {matchLabels: {app: busy}}
  template:
    metadata: {labels: {app: busy}}
    spec:
      terminationGracePeriodSeconds: 1
      containers:
      - name: main
        image: gantry.local/busybox:debian
        imagePullPolicy: IfNotPresent
        command: [sh, -c, "while :; do :; done"]
"#;

const BUDGET: &str = r#"
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata: {name: both, namespace: held}
spec: {minAvailable: 2, selector: {matchLabels: {app: busy}}}
"#;

pub(super) fn policies(cluster: &mut Cluster) -> Result<()> {
    cluster.apply_ok(NAMESPACE)?;
    refused(cluster)?;
    grows(cluster)?;
    drained(cluster)
}

fn pod(name: &str, spec: &str) -> String {
    format!(
        "apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: held}}
spec:
  {spec}
  containers:
  - {{name: main, image: \"gantry.local/busybox:debian\", command: [sleep, \"3600\"]}}
"
    )
}

fn refused(cluster: &Cluster) -> Result<()> {
    let host = cluster.apply(&pod("host", "hostNetwork: true"))?;
    let words = "violates PodSecurity \"baseline:latest\": host namespaces (hostNetwork=true)";
    ensure!(
        host.code != 0 && host.stderr.contains(words),
        "{}",
        host.stderr
    );
    let large = pod("large", "terminationGracePeriodSeconds: 1")
        .replace("command:", "resources: {limits: {cpu: 1}}, command:");
    let large = cluster.apply(&large)?;
    let words = "maximum cpu usage per Container is 500m, but limit is 1";
    ensure!(
        large.code != 0 && large.stderr.contains(words),
        "{}",
        large.stderr
    );
    let busy = cluster.apply(BUSY)?;
    let words = "Warning: would violate PodSecurity \"restricted:latest\": allowPrivilegeEscalation != false";
    ensure!(
        busy.code == 0 && busy.stderr.contains(words),
        "{}",
        busy.stderr
    );
    Ok(())
}

/// Twice what it aims at: the autoscaler wants more than the quota has, and gets what there is.
fn grows(cluster: &Cluster) -> Result<()> {
    let made = cluster.ok(&[
        "-n",
        "held",
        "autoscale",
        "deploy/busy",
        "--max",
        "4",
        "--cpu",
        "50%",
    ])?;
    ensure!(
        made.contains("horizontalpodautoscaler.autoscaling/busy autoscaled"),
        "{made}"
    );
    cluster.wait("the autoscaler to ask for more", PATIENCE, |c| {
        let busy = c.get(&["-n", "held", "deployment", "busy"])?;
        Ok(busy["spec"]["replicas"].as_i64() > Some(2))
    })?;
    cluster.wait("as many pods as the quota lets be", PATIENCE, |c| {
        let busy = c.get(&["-n", "held", "deployment", "busy"])?;
        let quota = c.get(&["-n", "held", "quota", "few"])?;
        Ok(busy["status"]["readyReplicas"] == 2 && quota["status"]["used"]["pods"] == "2")
    })?;
    cluster.wait("the quota to be named", PATIENCE, |c| {
        let events = c.ok(&["-n", "held", "get", "events"])?;
        Ok(
            events
                .contains("exceeded quota: few, requested: pods=1, used: pods=2, limited: pods=2"),
        )
    })?;
    let shown = cluster.ok(&["-n", "held", "get", "hpa"])?;
    ensure!(
        shown.contains("Deployment/busy") && shown.contains("%/50%"),
        "{shown}"
    );
    Ok(())
}

fn drained(cluster: &Cluster) -> Result<()> {
    cluster.apply_ok(BUDGET)?;
    cluster.wait("the budget to count", PATIENCE, |c| {
        let budget = c.get(&["-n", "held", "pdb", "both"])?;
        Ok(budget["status"]["currentHealthy"] == 2)
    })?;
    let held = cluster.gantry(&[
        "drain",
        NODE,
        "--pod-selector",
        "app=busy",
        "--timeout",
        "8s",
    ])?;
    for words in [
        "error when evicting pods/\"busy-",
        "(will retry after 5s): Cannot evict pod as it would violate the pod's disruption budget.",
        "global timeout reached: 8s",
    ] {
        ensure!(
            held.code != 0 && held.stderr.contains(words),
            "{}",
            held.stderr
        );
    }
    let busy = cluster.get(&["-n", "held", "deployment", "busy"])?;
    ensure!(busy["status"]["readyReplicas"] == 2, "{busy}");
    cluster.ok(&["-n", "held", "delete", "pdb", "both"])?;
    let gone = cluster.ok(&[
        "drain",
        NODE,
        "--pod-selector",
        "app=busy",
        "--timeout",
        "60s",
    ])?;
    ensure!(
        gone.matches(" evicted").count() == 2 && gone.contains("drained"),
        "{gone}"
    );
    cluster.ok(&["uncordon", NODE])?;
    Ok(())
}
