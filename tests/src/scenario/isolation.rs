//! What a container may not do.

use anyhow::{Result, ensure};

use super::sleeper;
use crate::cluster::Cluster;

/// Capabilities, seccomp, no new privileges and masks, for init and for exec, as /proc shows them.
pub(super) fn isolation(cluster: &mut Cluster) -> Result<()> {
    cluster.apply_ok(&sleeper(
        "confined",
        "      securityContext:
        allowPrivilegeEscalation: false
",
    ))?;
    cluster.apply_ok(&sleeper("default-rights", ""))?;
    for (pod, no_new_privs) in [("confined", "1"), ("default-rights", "0")] {
        cluster.wait_ready("default", pod)?;
        for who in ["1", "self"] {
            let file = format!("/proc/{who}/status");
            let status = cluster.ok(&["exec", pod, "--", "cat", &file])?;
            let field = |name: &str| {
                status
                    .lines()
                    .find_map(|l| l.strip_prefix(name))
                    .unwrap_or_default()
                    .trim()
                    .to_owned()
            };
            ensure!(
                field("CapBnd:") == "00000000a80425fb",
                "{pod} {who}: {}",
                field("CapBnd:")
            );
            ensure!(
                field("Seccomp:") == "2",
                "{pod} {who} has no seccomp filter"
            );
            ensure!(
                field("NoNewPrivs:") == no_new_privs,
                "{pod} {who}: {}",
                field("NoNewPrivs:")
            );
        }
        let output = cluster.gantry(&["exec", pod, "--", "unshare", "-m", "true"])?;
        ensure!(output.code != 0, "{pod}: unshare -m is allowed");
        let kcore = cluster.gantry(&[
            "exec",
            pod,
            "--",
            "sh",
            "-c",
            "head -c 1 /proc/kcore | wc -c",
        ])?;
        ensure!(
            kcore.stdout.trim() == "0",
            "{pod}: bytes of /proc/kcore: {kcore:?}"
        );
        let sysctl = cluster.gantry(&[
            "exec",
            pod,
            "--",
            "sh",
            "-c",
            "echo 1 > /proc/sys/vm/drop_caches",
        ])?;
        ensure!(sysctl.code != 0, "{pod}: /proc/sys can be written");
    }
    Ok(())
}
