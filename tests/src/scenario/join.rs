//! A machine joins as one would by hand: a token, a line, an agent. One machine is both here, so the node
//! that the control plane made for itself makes way for the one that joins.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::sleeper;
use crate::cluster::{Cluster, NODE};

const LIMIT: Duration = Duration::from_secs(60);
const JOINED: &str = "node-2";

/// Wrong lines are refused in words; the right one makes a node, which runs pods, renews its certificate,
/// is drained, and is refused when it was deleted.
pub(super) fn join(cluster: &mut Cluster) -> Result<()> {
    let root = tempfile::tempdir()?;
    let root_flag = root.path().display().to_string();
    let line = cluster.ok(&[
        "token",
        "create",
        "--print-join-command",
        "--server",
        "127.0.0.1:6443",
    ])?;
    let words: Vec<&str> = line.split_whitespace().collect();
    let ["gantry", arguments @ ..] = words.as_slice() else {
        anyhow::bail!("no join line: {line}");
    };
    let token = arguments.get(3).copied().context("no token in the line")?;
    let id = token.split('.').next().unwrap_or_default();
    let listed = cluster.ok(&["token", "list"])?;
    ensure!(listed.contains(id) && !listed.contains(token), "{listed}");
    let join = |arguments: &[&str]| {
        let more = ["--no-start", "--node-name", JOINED, "--root", &root_flag];
        cluster.gantry(&[arguments, &more[..]].concat())
    };
    let replaced = |from: &str, to: &str| {
        let line = line.trim().trim_start_matches("gantry ").replace(from, to);
        line.split_whitespace()
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    let hash = arguments.last().copied().unwrap_or_default();
    for (from, to, words) in [
        (token, "abcdef", "malformed"),
        (token, "zzzzzz.0123456789abcdef", "unknown here"),
        (
            hash,
            &*format!("sha256:{}", "0".repeat(64)),
            "--ca-hash says",
        ),
        ("127.0.0.1:6443", "127.0.0.1:1", "cannot be reached"),
    ] {
        let wrong = replaced(from, to);
        let wrong: Vec<&str> = wrong.iter().map(String::as_str).collect();
        let said = join(&wrong)?;
        ensure!(
            said.code == 1 && said.stderr.contains(words),
            "{wrong:?}: {said:?}"
        );
    }
    let said = join(arguments)?;
    ensure!(
        said.code == 0 && said.stdout.contains("gantry-agent run"),
        "{said:?}"
    );
    let again = join(arguments)?;
    ensure!(
        again.code == 0 && again.stdout.contains("already"),
        "{again:?}"
    );
    let unit = root.path().join("etc/systemd/system/gantry-agent.service");
    let unit = std::fs::read_to_string(&unit).context("the agent's unit")?;
    ensure!(
        unit.contains("Type=notify") && unit.contains("KillMode=process"),
        "{unit}"
    );

    cluster.kill_agent()?;
    cluster.ok(&["delete", "node", NODE])?;
    cluster.start_joined_agent(&root.path().join("etc/gantry/agent"))?;
    cluster.wait("the joined node to be ready", LIMIT, |c| {
        let node = c.get(&["node", JOINED])?;
        let conditions = node["status"]["conditions"]
            .as_array()
            .cloned()
            .unwrap_or_default();
        Ok(conditions
            .iter()
            .any(|one| one["type"] == "Ready" && one["status"] == "True"))
    })?;
    cluster.apply_ok(&sleeper("guest", ""))?;
    cluster.wait_ready("default", "guest")?;
    let pod = cluster.get(&["pod", "guest"])?;
    ensure!(pod["spec"]["nodeName"] == JOINED, "{pod}");

    let refused = cluster.gantry(&["drain", JOINED])?;
    ensure!(
        refused.code == 1 && refused.stderr.contains("--force"),
        "{refused:?}"
    );
    let drained = cluster.ok(&[
        "drain",
        JOINED,
        "--force",
        "--grace-period=1",
        "--timeout=60s",
    ])?;
    ensure!(
        drained.contains("pod/guest evicted") && drained.contains("drained"),
        "{drained}"
    );
    cluster.ok(&["uncordon", JOINED])?;

    cluster.ok(&["delete", "node", JOINED])?;
    cluster.wait("the agent to be told", LIMIT, |c| {
        Ok(c.last_words().contains("run gantry join"))
    })?;
    ensure!(
        cluster.gantry(&["get", "node", JOINED])?.code == 1,
        "the node is back by itself"
    );
    cluster.kill_agent()?;
    cluster.start_agent()
}
