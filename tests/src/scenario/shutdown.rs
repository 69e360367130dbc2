//! The machine goes down: pods end in order, say why, and are known when the node is back.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::sleeper;
use crate::cluster::{Cluster, NODE, is_ready};

const LIMIT: Duration = Duration::from_secs(120);
const MESSAGE: &str = "Pod was terminated in response to imminent node shutdown.";

/// A pod that does `script` until SIGTERM, and has a minute to end by itself.
fn pod(name: &str, more: &str, script: &str) -> String {
    format!(
        "apiVersion: v1
kind: Pod
metadata: {{name: {name}}}
spec:
  terminationGracePeriodSeconds: 60
{more}  containers:
    - name: main
      image: gantry.local/busybox:debian
      imagePullPolicy: Never
      command: [\"sh\", \"-c\", \"{script}\"]
"
    )
}

fn ended(cluster: &Cluster, name: &str) -> Result<Value> {
    let mut status = cluster.get(&["pod", name])?["status"].take();
    ensure!(
        status["phase"] == "Failed"
            && status["reason"] == "Terminated"
            && status["message"] == MESSAGE,
        "pod {name} after the shutdown: {status}"
    );
    Ok(status["containerStatuses"][0]["state"]["terminated"].take())
}

/// The obedient end by themselves, the stubborn when their share is over, the critical last.
pub(super) fn shutdown(cluster: &mut Cluster) -> Result<()> {
    cluster.kill_agent()?;
    cluster.start_agent_with(&[
        "--shutdown-grace-period=6s",
        "--shutdown-grace-period-critical-pods=3s",
    ])?;
    let wait = "sleep 3600 & wait";
    cluster.apply_ok(&pod("obedient", "", &format!("trap 'exit 7' TERM; {wait}")))?;
    cluster.apply_ok(&pod(
        "stubborn",
        "",
        &format!("trap : TERM; while true; do {wait}; done"),
    ))?;
    let class = "  priorityClassName: system-node-critical\n";
    cluster.apply_ok(&pod(
        "critical",
        class,
        &format!("trap 'exit 0' TERM; {wait}"),
    ))?;
    for name in ["obedient", "stubborn", "critical"] {
        cluster.wait_ready("default", name)?;
    }

    let output = cluster.agent(&["shutdown"])?;
    ensure!(
        output.code == 0 && output.stdout.contains("3 pods have 6 s"),
        "gantry-agent shutdown: {output:?}"
    );
    cluster.wait("the ends to be told", LIMIT, |c| {
        let names = ["obedient", "stubborn", "critical"];
        Ok(names.iter().all(|name| ended(c, name).is_ok()))
    })?;
    let (obedient, stubborn, critical) = (
        ended(cluster, "obedient")?,
        ended(cluster, "stubborn")?,
        ended(cluster, "critical")?,
    );
    ensure!(
        obedient["exitCode"] == 7 && stubborn["exitCode"] == 137,
        "{obedient} {stubborn}"
    );
    let at = |end: &Value| end["finishedAt"].as_str().map(str::to_owned);
    ensure!(
        at(&obedient) <= at(&stubborn) && at(&stubborn) <= at(&critical),
        "order: {obedient} {stubborn} {critical}"
    );
    let node = cluster.get(&["node", NODE])?;
    ensure!(
        !is_ready(&node) && node.to_string().contains("NodeShutdown"),
        "the node is still ready: {node}"
    );
    let late = sleeper("late", "").replace("spec:\n", &format!("spec:\n  nodeName: {NODE}\n"));
    cluster.apply_ok(&late)?;
    cluster.wait("a late pod to be refused", LIMIT, |c| {
        let status = c.get(&["pod", "late"])?["status"].take();
        Ok(status["phase"] == "Failed" && status["reason"] == "NodeShutdown")
    })?;

    // The node is back: nothing starts a second time, new pods run.
    cluster.kill_agent()?;
    cluster.start_agent()?;
    cluster.wait("the node to be ready again", LIMIT, |c| {
        Ok(is_ready(&c.get(&["node", NODE])?))
    })?;
    cluster.apply_ok(&sleeper("new", ""))?;
    cluster.wait_ready("default", "new")?;
    let again = ended(cluster, "stubborn").context("after the node came back")?;
    ensure!(
        again == stubborn,
        "the end of a pod is told differently: {again} {stubborn}"
    );
    Ok(())
}
