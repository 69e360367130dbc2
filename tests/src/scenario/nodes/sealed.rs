//! Pods of different nodes exchange what nobody on the way can read.

use anyhow::{Context, Result, ensure};

use super::{LIMIT, delete, pod_ips, server};
use crate::cluster::NODE;
use crate::machines::Nodes;

/// From every pod to every other by WireGuard, also with full frames: no frame of the switch has what was
/// said. Without it, one has.
pub(super) fn sealed(nodes: &mut Nodes) -> Result<()> {
    nodes.route(&["--routing", "wireguard"])?;
    ways(nodes, "wireguard")?;
    nodes.ask("begin")?;
    talk(nodes, "sealed").context("by WireGuard")?;
    let passed = nodes.ask("passed sealed-");
    ensure!(
        passed.is_err(),
        "the switch has seen what was to be encrypted"
    );
    nodes.route(&[])?;
    ways(nodes, "direct")?;
    nodes.ask("begin")?;
    talk(nodes, "open").context("without it")?;
    nodes
        .ask("passed open-")
        .context("the switch sees nothing: this proves nothing")
}

/// Until every node says that it reaches every other this way.
fn ways(nodes: &Nodes, way: &str) -> Result<()> {
    let numbers = nodes.numbers();
    for number in &numbers {
        let name = format!("node-{number}");
        nodes.wait_ready(&name)?;
        let what = format!("{name} to reach the others by {way}");
        nodes.cluster.wait(&what, LIMIT, |c| {
            let node = c.get(&["node", &name])?;
            let conditions = node["status"]["conditions"].as_array().cloned();
            let conditions = conditions.unwrap_or_default();
            let routes = conditions.iter().find(|it| it["type"] == "RoutesDegraded");
            let said = routes
                .and_then(|it| it["message"].as_str())
                .unwrap_or_default();
            let is_well = routes.is_some_and(|it| it["status"] == "False");
            // One of each family of each other node.
            ensure!(
                is_well && said.matches(way).count() == 2 * (numbers.len() - 1),
                "{said}"
            );
            Ok(true)
        })?;
    }
    Ok(())
}

/// Every pod asks every other for words that begin with `word`.
fn talk(nodes: &Nodes, word: &str) -> Result<()> {
    let cluster = &nodes.cluster;
    let numbers = nodes.numbers();
    let names: Vec<String> = numbers.iter().map(|n| format!("{word}-{n}")).collect();
    let pods = numbers.iter().zip(&names);
    let pods: Vec<String> = pods
        .map(|(number, name)| server(name, *number, word))
        .collect();
    cluster.apply_ok(&pods.concat())?;
    let mut script = String::new();
    for name in &names {
        cluster.wait_ready("default", name)?;
        let big = "head -c 100000 /dev/zero > /w/big";
        cluster.ok(&["exec", name, "--", "sh", "-c", big])?;
        for ip in pod_ips(cluster, "default", name)? {
            let at = super::reach::in_url(ip);
            script += &format!(
                "[ \"$(timeout 30 wget -q -O - http://{at}:8080/)\" = {name} ] || echo {name} is silent at {ip}; \
                 [ $(timeout 30 wget -q -O - http://{at}:8080/big | wc -c) = 100000 ] || echo no full frames of {ip}; "
            );
        }
    }
    for name in &names {
        cluster.wait(&format!("{name} to reach all"), LIMIT, |c| {
            let said = c.ok(&["exec", name, "--", "sh", "-c", &script])?;
            ensure!(said.trim().is_empty(), "from {name}: {said}");
            Ok(true)
        })?;
    }
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    delete(cluster, "pod", &names).with_context(|| format!("on {NODE}"))
}
