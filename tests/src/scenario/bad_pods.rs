//! Pods that go wrong while they run: each says why, and the pod beside them notices nothing.
//!
//! OOM kills, fork bombs and node pressure are in `resources`; images that go wrong are in the unit
//! tests of the agent's `images`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::life_cycle::host_pid;
use super::resources::events;
use super::sleeper;
use crate::cluster::{Cluster, is_ready};

/// Generous: the machine may be busy.
const PATIENCE: Duration = Duration::from_secs(120);

/// A server that is asked every second whether it still answers.
const NEIGHBOUR: &str = "apiVersion: v1
kind: Pod
metadata: {name: neighbour}
spec:
  terminationGracePeriodSeconds: 1
  containers:
    - name: main
      image: gantry.local/busybox:debian
      imagePullPolicy: Never
      command: [httpd, -f, -p, \"8080\", -h, /etc]
      livenessProbe:
        {httpGet: {path: /hostname, port: 8080}, periodSeconds: 1, timeoutSeconds: 10, failureThreshold: 3}
      readinessProbe: {tcpSocket: {port: 8080}, periodSeconds: 1, timeoutSeconds: 10}
---
";

/// Nobody listens on 9; a volume smaller than what is written to it; a directory that goes away;
/// a shell that ignores signals; a layer that outgrows its limit.
fn wrong(vanishing: &Path) -> String {
    let closed = sleeper(
        "closed",
        "      readinessProbe: {httpGet: {path: /, port: 9}, periodSeconds: 1}
",
    );
    let full = sleeper(
        "full",
        "      volumeMounts: [{name: v, mountPath: /data}]
  volumes:
    - {name: v, emptyDir: {medium: Memory, sizeLimit: 1Mi}}
",
    )
    .replace(
        "[\"sleep\", \"3600\"]",
        "[sh, -c, \"dd if=/dev/zero of=/data/x bs=64k count=64 2>/dev/termination-log\"]",
    )
    .replace("spec:\n", "spec:\n  restartPolicy: Never\n");
    let directory = vanishing.display();
    let vanishes = sleeper(
        "vanishes",
        &format!(
            "      volumeMounts: [{{name: v, mountPath: /data}}]
  volumes:
    - {{name: v, hostPath: {{path: {directory}, type: Directory}}}}
"
        ),
    );
    let deaf = sleeper("deaf", "").replace(
        "[\"sleep\", \"3600\"]",
        "[sh, -c, \"trap '' TERM INT HUP; while :; do sleep 1; done\"]",
    );
    let greedy = sleeper(
        "greedy",
        "      resources: {limits: {ephemeral-storage: 1Mi}}
",
    )
    .replace(
        "[\"sleep\", \"3600\"]",
        "[sh, -c, \"dd if=/dev/zero of=/x bs=64k count=64; exec sleep 3600\"]",
    );
    [closed, full, vanishes, deaf, greedy].join("---\n")
}

/// A closed port, a full volume, a directory that vanishes, processes that hear nothing, a disk limit.
pub(super) fn bad_pods(cluster: &mut Cluster) -> Result<()> {
    let top = tempfile::tempdir()?;
    let vanishing = top.path().join("data");
    std::fs::create_dir(&vanishing)?;
    cluster.apply_ok(NEIGHBOUR)?;
    cluster.wait_ready("default", "neighbour")?;
    cluster.apply_ok(&wrong(&vanishing))?;
    closed_port(cluster)?;
    full_volume(cluster)?;
    vanished_volume(cluster, &vanishing)?;
    frozen(cluster)?;
    too_much_disk(cluster)?;
    let neighbour = cluster.get(&["pod", "neighbour"])?;
    let restarts = &neighbour["status"]["containerStatuses"][0]["restartCount"];
    ensure!(is_ready(&neighbour) && *restarts == 0, "{neighbour}");
    Ok(())
}

fn closed_port(cluster: &Cluster) -> Result<()> {
    cluster.wait("the closed port in an event", PATIENCE, |c| {
        let told = events(c, "closed", "Unhealthy")?;
        let right = |text: &String| text.contains("Readiness") && text.contains("refused");
        Ok(told.iter().any(right))
    })?;
    let pod = cluster.get(&["pod", "closed"])?;
    let restarts = &pod["status"]["containerStatuses"][0]["restartCount"];
    ensure!(!is_ready(&pod) && *restarts == 0, "{}", pod["status"]);
    Ok(())
}

fn full_volume(cluster: &Cluster) -> Result<()> {
    cluster.wait_phase("default", "full", "Failed")?;
    let pod = cluster.get(&["pod", "full"])?;
    let state = &pod["status"]["containerStatuses"][0]["state"]["terminated"];
    let message = state["message"].as_str().unwrap_or_default();
    ensure!(
        state["exitCode"] == 1 && message.contains("No space left on device"),
        "{state}"
    );
    Ok(())
}

fn vanished_volume(cluster: &Cluster, directory: &Path) -> Result<()> {
    cluster.wait_ready("default", "vanishes")?;
    std::fs::remove_dir_all(directory)?;
    let pid = host_pid(cluster, "vanishes", "main", 0)?;
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(i32::try_from(pid)?),
        nix::sys::signal::Signal::SIGKILL,
    )?;
    let path = directory.display().to_string();
    cluster.wait("the container to say what is missing", PATIENCE, |c| {
        let pod = c.get(&["pod", "vanishes"])?;
        let waiting = &pod["status"]["containerStatuses"][0]["state"]["waiting"];
        let message = waiting["message"].as_str().unwrap_or_default();
        Ok(message.contains(&path))
    })?;
    // As soon as it is back, so is the pod.
    std::fs::create_dir(directory)?;
    cluster.wait_ready("default", "vanishes")
}

/// What a container writes into its own layer counts against its limit of ephemeral storage.
fn too_much_disk(cluster: &Cluster) -> Result<()> {
    cluster.wait_phase("default", "greedy", "Failed")?;
    let status = &cluster.get(&["pod", "greedy"])?["status"];
    let message = status["message"].as_str().unwrap_or_default();
    ensure!(
        status["reason"] == "Evicted" && message.contains("exceeds") && message.contains("1Mi"),
        "{status}"
    );
    Ok(())
}

/// Processes that ignore SIGTERM, and that cannot even take SIGKILL while they are frozen.
fn frozen(cluster: &Cluster) -> Result<()> {
    cluster.wait_ready("default", "deaf")?;
    let pid = host_pid(cluster, "deaf", "main", 0)?;
    let table = std::fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let find = |controller: &str| {
        let mut lines = table.lines().filter_map(|l| {
            let mut fields = l.splitn(3, ':').skip(1);
            Some((fields.next()?, fields.next()?))
        });
        lines.find(|(names, _)| names.split(',').any(|n| n == controller))
    };
    let root = PathBuf::from("/sys/fs/cgroup");
    let (file, word) = match (find("freezer"), find("")) {
        (Some((_, path)), _) => (format!("freezer{path}/freezer.state"), "FROZEN"),
        (None, Some((_, path))) => (
            format!("{}/cgroup.freeze", path.trim_start_matches('/')),
            "1",
        ),
        (None, None) => (String::new(), ""),
    };
    let file = root.join(file);
    std::fs::write(&file, word).with_context(|| format!("freeze by {}", file.display()))?;
    cluster.ok(&["delete", "pod", "deaf", "--timeout=120s"])?;
    ensure!(
        !Path::new(&format!("/proc/{pid}")).exists(),
        "{pid} lives on"
    );
    Ok(())
}
