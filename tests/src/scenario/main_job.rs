//! The main job: three nginx behind a Service, by name.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};

use super::{MAIN_JOB, get};
use crate::cluster::Cluster;

/// Three nginx answer by name, from the host and from a pod; each of them does.
pub(super) fn main_job(cluster: &mut Cluster) -> Result<()> {
    cluster.import("nginx")?;
    cluster.apply_ok(MAIN_JOB)?;
    cluster.ok(&[
        "-n",
        "web",
        "rollout",
        "status",
        "deployment/web",
        "--timeout=120s",
    ])?;
    cluster.wait_ready("web", "client")?;
    let service = cluster.get(&["service", "web", "-n", "web"])?;
    let address = service["spec"]["clusterIP"]
        .as_str()
        .context("no cluster IP")?
        .to_owned();
    let mut seen = BTreeSet::new();
    for _ in 0..60 {
        seen.insert(get(SocketAddr::new(address.parse()?, 80))?);
    }
    ensure!(seen.len() == 3, "from the host only {seen:?} answered");
    let script = "for i in $(seq 30); do wget -S -q -O /dev/null http://web 2>&1; done";
    let said = cluster.ok(&["-n", "web", "exec", "client", "--", "sh", "-c", script])?;
    let from_pod: BTreeSet<&str> = said
        .lines()
        .filter_map(|l| l.trim().strip_prefix("X-Pod: "))
        .collect();
    ensure!(
        from_pod.len() == 3,
        "from the pod only {from_pod:?} answered: {said}"
    );
    let resolved = cluster.ok(&[
        "-n",
        "web",
        "exec",
        "client",
        "--",
        "nslookup",
        "web.web.svc.cluster.local",
    ])?;
    ensure!(resolved.contains(&address), "nslookup: {resolved}");
    // A second apply of the same file changes nothing.
    let again = cluster.apply(MAIN_JOB)?;
    ensure!(
        again.code == 0 && !again.stdout.contains("configured"),
        "{}",
        again.stdout
    );
    cluster.ok(&["delete", "namespace", "web", "--timeout=60s"])?;
    let left = cluster.ok(&["get", "pods", "-A", "--no-headers"])?;
    ensure!(
        left.trim().is_empty(),
        "pods left after the namespace: {left}"
    );
    Ok(())
}
