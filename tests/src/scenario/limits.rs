//! requests, limits and device rules, in the kernel's files.

use anyhow::{Result, ensure};

use super::{cgroup_file, sleeper};
use crate::cluster::Cluster;

/// requests and limits are in the kernel's files; a fork bomb and an OOM end at them.
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
    // The file is 100 MB on a tmpfs that counts for the container.
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
