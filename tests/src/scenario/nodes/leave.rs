//! Machines that leave the cluster are what they were.

use anyhow::{Context, Result, ensure};

use crate::machines::Nodes;

/// Agents end, `gantry-agent cleanup` runs, and each machine's census counts nothing but the files that
/// its disk keeps.
pub(super) fn leave(nodes: &mut Nodes) -> Result<()> {
    let census = "/init census";
    for worker in nodes.workers.clone() {
        worker.stop_agent()?;
        worker.ok(&["gantry-agent", "cleanup"])?;
        let left = worker.ok(&["sh", "-c", census])?;
        let left: Vec<&str> = left.lines().filter(|l| !l.starts_with("files ")).collect();
        ensure!(left.is_empty(), "on {}: {left:?}", worker.name);
    }
    nodes.cluster.leave().context("node-1")
}
