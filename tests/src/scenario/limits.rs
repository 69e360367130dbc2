//! requests, limits and device rules, in the kernel's files.

use anyhow::{Context, Result, ensure};

use super::{cgroup_file, cgroup_path, sleeper};
use crate::cluster::Cluster;

/// requests and limits are in the kernel's files; a busy loop, a fork bomb and an OOM end at them.
pub(super) fn limits(cluster: &mut Cluster) -> Result<()> {
    cluster.apply_ok(&sleeper(
        "limited",
        "      resources:
        requests: {cpu: 100m, memory: 32Mi}
        limits: {cpu: 250m, memory: 64Mi}
",
    ))?;
    cluster.wait_ready("default", "limited")?;
    let memory = cgroup_file(
        cluster,
        "limited",
        "main",
        "memory.max",
        ("memory", "memory.limit_in_bytes"),
    )?;
    ensure!(memory == "67108864", "memory limit: {memory}");
    let cpu = cgroup_file(
        cluster,
        "limited",
        "main",
        "cpu.max",
        ("cpu", "cpu.cfs_quota_us"),
    )?;
    ensure!(cpu == "25000 100000" || cpu == "25000", "cpu limit: {cpu}");
    let pids = cgroup_file(cluster, "limited", "", "pids.max", ("pids", "pids.max"))?;
    ensure!(pids == "4096", "pid limit of the pod: {pids}");
    throttled(cluster)?;
    fork_bomb(cluster)?;
    cluster.apply_ok(
        "apiVersion: v1
kind: Pod
metadata:
  name: greedy
spec:
  restartPolicy: Never
  containers:
    - name: main
      image: gantry.local/busybox:debian
      imagePullPolicy: IfNotPresent
      command: [\"sh\", \"-c\", \"exec tail /dev/zero\"]
      resources:
        limits: {memory: 24Mi}
",
    )?;
    cluster.wait_phase("default", "greedy", "Failed")?;
    let pod = cluster.get(&["pod", "greedy"])?;
    let ended = &pod["status"]["containerStatuses"][0]["state"]["terminated"];
    ensure!(
        ended["reason"] == "OOMKilled" && ended["exitCode"] == 137,
        "{ended}"
    );
    Ok(())
}

/// A busy loop in the container is held at its share of a processor.
fn throttled(cluster: &Cluster) -> Result<()> {
    let count = || -> Result<u64> {
        let stat = cgroup_file(cluster, "limited", "main", "cpu.stat", ("cpu", "cpu.stat"))?;
        let line = stat.lines().find_map(|l| l.strip_prefix("nr_throttled "));
        Ok(line.context("no nr_throttled in cpu.stat")?.parse()?)
    };
    let before = count()?;
    let busy = "timeout 5 sh -c 'while :; do :; done'; true";
    cluster.ok(&["exec", "limited", "--", "sh", "-c", busy])?;
    let times = count()? - before;
    ensure!(
        times >= 10,
        "it was throttled {times} times in five seconds"
    );
    Ok(())
}

/// All processes of a pod count for its limit: with forty in the kernel's file, a fork bomb ends there.
fn fork_bomb(cluster: &Cluster) -> Result<()> {
    const MAX: u64 = 40;
    let file = |name: &str| cgroup_path(cluster, "limited", "", name, ("pids", name));
    let limit = file("pids.max")?;
    std::fs::write(&limit, MAX.to_string()).with_context(|| limit.display().to_string())?;
    let bomb = "for i in $(seq 100); do sleep 20 >/dev/null 2>&1 & done 2>&1";
    let said = cluster.gantry(&["exec", "limited", "--", "sh", "-c", bomb])?;
    let current = std::fs::read_to_string(file("pids.current")?)?;
    let current: u64 = current.trim().parse()?;
    ensure!(
        (MAX - 2..=MAX).contains(&current) && said.stdout.contains("fork"),
        "{current} processes with a limit of {MAX}: {said:?}"
    );
    cluster.ok(&["delete", "pod", "limited", "--timeout=60s"])?;
    Ok(())
}

/// A container cannot reach a device that it was not given, though it may make the node.
pub(super) fn devices(cluster: &mut Cluster) -> Result<()> {
    cluster.apply_ok(&sleeper("plain", ""))?;
    cluster.wait_ready("default", "plain")?;
    // 4:64 is the first serial port, 1:11 the kernel log; /dev/null must go on working.
    for (major, minor) in [(4, 64), (1, 11), (10, 1)] {
        let script = format!(
            "mknod /tmp/d c {major} {minor} && echo made; (echo x > /tmp/d) 2>&1; rm -f /tmp/d"
        );
        let output = cluster.gantry(&["exec", "plain", "--", "sh", "-c", &script])?;
        ensure!(
            output.stdout.contains("not permitted") || output.stderr.contains("not permitted"),
            "a write to device {major}:{minor} was not refused: {output:?}"
        );
    }
    cluster.ok(&[
        "exec",
        "plain",
        "--",
        "sh",
        "-c",
        "echo x > /dev/null; head -c 4 /dev/urandom | wc -c",
    ])?;
    // A privileged container is what the word says.
    cluster.apply_ok(&sleeper(
        "privileged",
        "      securityContext: {privileged: true}\n",
    ))?;
    cluster.wait_ready("default", "privileged")?;
    let read = "mknod /tmp/k c 1 11 && dd if=/tmp/k of=/dev/null bs=8192 count=1";
    cluster.ok(&["exec", "privileged", "--", "sh", "-c", read])?;
    Ok(())
}
