//! A machine that lacks something: the agent says what, why, and what to do, and goes on where pods
//! can be run honestly.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};

use super::{Skipped, sleeper};
use crate::cluster::{Cluster, NODE};

/// Start to end of an agent that refuses, with room for a busy machine.
const REFUSAL_S: &str = "120";
const LIMIT: Duration = Duration::from_secs(60);

/// A kernel that refuses bpf(): the agent exits 1 and explains; then the machine is as before.
pub(super) fn no_ebpf(cluster: &mut Cluster) -> Result<()> {
    if Command::new("strace").arg("-V").output().is_err() {
        return Err(Skipped("strace is not installed".into()).into());
    }
    cluster.kill_agent()?;
    for (errno, words) in [
        ("EPERM", &["CAP_BPF", "seccomp"][..]),
        ("ENOSYS", &["CONFIG_BPF_SYSCALL", "Linux 6.1"]),
    ] {
        let inject = format!("inject=bpf:error={errno}");
        let strace = [
            "busybox",
            "timeout",
            "-s",
            "KILL",
            REFUSAL_S,
            "strace",
            "-f",
            "--seccomp-bpf",
            "-qq",
            "-o",
            "/dev/null",
            "-e",
            "trace=bpf",
            "-e",
            &inject,
        ];
        let output = cluster.run_agent_behind(&strace, &["run", "--node-name", NODE])?;
        let said = &output.stderr;
        ensure!(
            output.code == 1,
            "{errno}: exit code {}: {said}",
            output.code
        );
        for word in words.iter().chain(&["eBPF data plane"]) {
            ensure!(
                said.contains(word),
                "{errno}: nothing of {word:?} in {said}"
            );
        }
    }
    cluster.start_agent()?;
    cluster.apply_ok(&sleeper("after", ""))?;
    cluster.wait_ready("default", "after")
}

/// A machine without the memory controller: the node says so, a pod with a memory limit waits with
/// the reason, one without runs.
pub(super) fn missing_controller(cluster: &mut Cluster) -> Result<()> {
    cluster.kill_agent()?;
    let controllers = "/sys/fs/cgroup/cgroup.controllers";
    let without = tempfile::NamedTempFile::new()?;
    // In a mount namespace of the agent's own: the rest of the machine keeps its controllers.
    let hide = match std::fs::read_to_string(controllers) {
        Ok(all) => {
            std::fs::write(without.path(), all.replace("memory", ""))?;
            format!("mount -o bind {} {controllers}", without.path().display())
        }
        Err(_) => "umount /sys/fs/cgroup/memory".to_owned(),
    };
    let script = format!("{hide} && exec \"$@\"");
    let unshare = [
        "busybox",
        "unshare",
        "-m",
        "--propagation",
        "private",
        "busybox",
        "sh",
        "-c",
        &script,
        "-",
    ];
    let check = cluster.run_agent_behind(&unshare, &["check"])?;
    ensure!(
        check.stdout.contains("no cgroup controller \"memory\""),
        "check says nothing of it: {}{}",
        check.stdout,
        check.stderr
    );
    cluster.start_agent_behind(&unshare)?;
    cluster.wait("the node to say what it lacks", LIMIT, |c| {
        let said = c.ok(&["describe", "node", NODE])?;
        Ok(said.contains("LimitsDegraded") && said.contains("pods with a memory limit"))
    })?;
    let limit = "      resources: {limits: {memory: 64Mi}}\n";
    cluster.apply_ok(&format!(
        "{}---\n{}",
        sleeper("limited", limit),
        sleeper("free", "")
    ))?;
    cluster.wait_ready("default", "free")?;
    cluster.wait("the reason in describe", LIMIT, |c| {
        let said = c.ok(&["describe", "pod", "limited"])?;
        Ok(said.contains("LimitNotHeld") && said.contains("asks for a memory limit"))
    })?;
    let limited = cluster.get(&["pod", "limited"])?;
    ensure!(
        limited["status"]["phase"] == "Pending",
        "it runs without its limit: {limited}"
    );
    cluster.ok(&["delete", "pod", "limited", "free"])?;
    leave_namespace(cluster)
}

/// What the agent has mounted is only in its mount namespace: there it is cleaned up.
fn leave_namespace(cluster: &mut Cluster) -> Result<()> {
    let inside = File::open(
        Path::new("/proc")
            .join(cluster.agent_pid()?.to_string())
            .join("ns/mnt"),
    )?;
    let namespace = format!("-m/proc/{}/fd/{}", std::process::id(), inside.as_raw_fd());
    cluster.kill_agent()?;
    let output = cluster.run_agent_behind(&["busybox", "nsenter", &namespace], &["cleanup"])?;
    ensure!(
        output.code == 0,
        "cleanup: {}{}",
        output.stdout,
        output.stderr
    );
    Ok(())
}
