//! A control plane that loses its data and gets a backup: pods go on with the same processes.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::sleeper;
use crate::cluster::{Cluster, NODE};

const DATA: &str = "/var/lib/gantry-control";

/// The first process of a pod's container `main`, as the host numbers it.
fn pid(cluster: &Cluster, pod: &str) -> Result<String> {
    let file = ("pids", "cgroup.procs");
    let procs = super::cgroup_file(cluster, pod, "main", "cgroup.procs", file)?;
    let first = procs.lines().next();
    Ok(first
        .with_context(|| format!("no process of {pod}"))?
        .to_owned())
}

fn restarts(cluster: &Cluster, pod: &str) -> Result<i64> {
    let object = cluster.get(&["pod", pod])?;
    let count = &object["status"]["containerStatuses"][0]["restartCount"];
    count
        .as_i64()
        .with_context(|| format!("no restart count of {pod}"))
}

/// Saved while it works, lost, restored into an empty directory: running pods are adopted.
pub(super) fn restore(cluster: &mut Cluster) -> Result<()> {
    // `later` waits for its node when the backup is taken: the backup does not know where it runs.
    cluster.apply_ok(&sleeper("before", ""))?;
    cluster.wait_ready("default", "before")?;
    cluster.ok(&["cordon", NODE])?;
    cluster.apply_ok(&sleeper("later", ""))?;
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("backup");
    let file = file.to_str().context("the path is no text")?.to_owned();
    let said = cluster.ok(&["backup", "save", &file])?;
    ensure!(said.contains("objects at revision"), "{said}");
    cluster.ok(&["uncordon", NODE])?;
    cluster.wait_ready("default", "later")?;
    cluster.apply_ok(&sleeper("after", ""))?;
    cluster.wait_ready("default", "after")?;
    let names = ["before", "later", "after"];
    let pids = names.map(|pod| pid(cluster, pod));
    let [before, later, after] = pids;
    let pids = [before?, later?, after?];

    let refused = cluster.gantry(&["backup", "restore", &file])?;
    ensure!(
        refused.code != 0 && refused.stderr.contains("gantry-control runs"),
        "a running control plane was restored: {refused:?}"
    );
    cluster.kill_control()?;
    // The machine is lost but for the pods, and for the key, of which the operator has a copy.
    let key = directory.path().join("store.key");
    std::fs::copy(Path::new(DATA).join("pki/store.key"), &key)?;
    let key = key.to_str().context("the path is no text")?;
    std::fs::remove_dir_all(DATA)?;
    let refused = cluster.gantry(&["backup", "restore", &file])?;
    ensure!(
        refused.code != 0 && refused.stderr.contains("--backup-key"),
        "restored without the key: {refused:?}"
    );
    let said = cluster.ok(&["backup", "restore", &file, "--backup-key", key])?;
    ensure!(
        said.contains("restored") && Path::new(DATA).exists(),
        "{said}"
    );
    cluster.start_control()?;

    let minute = Duration::from_secs(60);
    cluster.wait("the pod to be adopted", minute, |c| {
        Ok(c.get(&["pod", "later"])?["spec"]["nodeName"] == NODE)
    })?;
    cluster.wait_ready("default", "later")?;
    cluster.wait_ready("default", "before")?;
    // The node was cordoned when the backup was taken, and so it is again.
    cluster.ok(&["uncordon", NODE])?;
    cluster.apply_ok(&sleeper("new", ""))?;
    cluster.wait_ready("default", "new")?;
    for (pod, old) in names.iter().zip(&pids) {
        ensure!(
            Path::new("/proc").join(old).exists(),
            "process {old} of pod {pod} has ended"
        );
    }
    for pod in ["before", "later"] {
        let now = pid(cluster, pod)?;
        ensure!(
            pids.contains(&now),
            "pod {pod} has another process: {now} of {pids:?}"
        );
        ensure!(restarts(cluster, pod)? == 0, "pod {pod} was restarted");
        cluster.ok(&["exec", pod, "--", "true"])?;
    }
    let unknown = cluster.gantry(&["get", "pod", "after"])?;
    ensure!(
        unknown.code != 0,
        "the backup does not have this pod: {unknown:?}"
    );
    cluster.ok(&["delete", "pod", "before", "later", "new", "--timeout=60s"])?;
    Ok(())
}
