//! What must work between machines: one file an area, on one cluster of several (tests/src/machines/).
//!
//! The first scenarios run while node-1 has no agent: it is then a client outside of the cluster, with
//! nothing of Gantry in its kernel. After them node-1 joins as well.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::cluster::Cluster;
use crate::machines::Nodes;

mod churn;
mod drain;
mod faults;
mod hundred;
mod leave;
mod main_job;
pub(crate) mod outside;
mod policy;
mod reach;
mod sealed;
mod update;
mod upgrade;

/// When a scenario runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Before node-1 is a node.
    WorkersOnly,
    /// With an agent on every machine.
    EveryMachine,
    /// After it nothing of the cluster is left.
    Last,
}

/// A named scenario of several machines.
pub struct NodeScenario {
    /// For `--scenario`.
    pub name: &'static str,
    /// In `cargo xtask test`, whose time is short.
    pub is_short: bool,
    /// When it runs.
    pub stage: Stage,
    /// What it does.
    pub run: fn(&mut Nodes) -> Result<()>,
}

const fn scenario(
    name: &'static str,
    stage: Stage,
    is_short: bool,
    run: fn(&mut Nodes) -> Result<()>,
) -> NodeScenario {
    NodeScenario {
        name,
        is_short,
        stage,
        run,
    }
}

/// All of them, in the order of their stages.
pub const ALL: &[NodeScenario] = &[
    scenario("nodes-outside", Stage::WorkersOnly, true, outside::outside),
    scenario(
        "nodes-fail-over",
        Stage::WorkersOnly,
        true,
        outside::fail_over,
    ),
    scenario(
        "nodes-direct-return",
        Stage::WorkersOnly,
        false,
        outside::direct_return,
    ),
    scenario(
        "nodes-lb-power-cut",
        Stage::WorkersOnly,
        true,
        outside::balancer_power_cut,
    ),
    scenario(
        "nodes-main-job",
        Stage::EveryMachine,
        true,
        main_job::main_job,
    ),
    scenario("nodes-reach", Stage::EveryMachine, true, reach::reach),
    scenario(
        "nodes-wireguard",
        Stage::EveryMachine,
        false,
        sealed::sealed,
    ),
    scenario("nodes-policy", Stage::EveryMachine, false, policy::policy),
    scenario(
        "nodes-rolling-update",
        Stage::EveryMachine,
        true,
        update::rolling_update,
    ),
    scenario("nodes-drain", Stage::EveryMachine, false, drain::drain),
    scenario(
        "nodes-agent-upgrade",
        Stage::EveryMachine,
        false,
        upgrade::agent_upgrade,
    ),
    scenario(
        "nodes-partition",
        Stage::EveryMachine,
        false,
        faults::partition,
    ),
    scenario(
        "nodes-power-cut",
        Stage::EveryMachine,
        true,
        faults::power_cut,
    ),
    scenario(
        "nodes-eviction",
        Stage::EveryMachine,
        false,
        faults::eviction,
    ),
    scenario(
        "nodes-control-kill",
        Stage::EveryMachine,
        false,
        faults::control_kill,
    ),
    scenario(
        "nodes-hard-reboots",
        Stage::EveryMachine,
        false,
        churn::hard_reboots,
    ),
    scenario(
        "nodes-hundred-pods",
        Stage::EveryMachine,
        false,
        hundred::hundred_pods,
    ),
    scenario("nodes-leave", Stage::Last, true, leave::leave),
];

/// How long anything may take that is not measured, on a host that does other things.
const LIMIT: Duration = Duration::from_secs(120);

/// A pod on a node that serves its name by HTTP on port 8080.
pub(crate) fn server(name: &str, node: u8, app: &str) -> String {
    format!(
        "apiVersion: v1
kind: Pod
metadata: {{name: {name}, labels: {{app: {app}}}}}
spec:
  nodeSelector: {{kubernetes.io/hostname: node-{node}}}
  terminationGracePeriodSeconds: 1
  containers:
    - name: main
      image: gantry.local/busybox:debian
      imagePullPolicy: IfNotPresent
      command: [sh, -c, \"mkdir -p /w && hostname > /w/index.html && exec httpd -f -p 8080 -h /w\"]
      readinessProbe: {{tcpSocket: {{port: 8080}}, periodSeconds: 1}}
---
"
    )
}

/// A Service of the pods `app`, with more of its spec.
pub(crate) fn service(name: &str, app: &str, more: &str) -> String {
    format!(
        "apiVersion: v1
kind: Service
metadata: {{name: {name}}}
spec:
  selector: {{app: {app}}}
  ports: [{{port: 80, targetPort: 8080}}]
{more}---
"
    )
}

/// A pod's address.
pub(crate) fn pod_ip(cluster: &Cluster, namespace: &str, name: &str) -> Result<IpAddr> {
    let pod = cluster.get(&["pod", name, "-n", namespace])?;
    let ip = pod["status"]["podIP"].as_str();
    Ok(ip
        .with_context(|| format!("{name} has no address"))?
        .parse()?)
}

/// All of a pod's addresses.
fn pod_ips(cluster: &Cluster, namespace: &str, name: &str) -> Result<Vec<IpAddr>> {
    let pod = cluster.get(&["pod", name, "-n", namespace])?;
    let all = pod["status"]["podIPs"].as_array().into_iter().flatten();
    let all = all.filter_map(|it| it["ip"].as_str());
    Ok(all.map(str::parse).collect::<Result<_, _>>()?)
}

/// A Service's cluster IP and port 80.
fn cluster_ip(cluster: &Cluster, name: &str) -> Result<SocketAddr> {
    let object = cluster.get(&["service", name])?;
    let ip = object["spec"]["clusterIP"].as_str();
    let ip = ip.with_context(|| format!("{name} has no cluster IP"))?;
    Ok(SocketAddr::new(ip.parse()?, 80))
}

/// Who answers there: the body of one HTTP request.
fn ask(address: SocketAddr, limit: Duration) -> Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, limit)?;
    stream.set_read_timeout(Some(limit))?;
    write!(stream, "GET / HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (_, body) = answer
        .split_once("\r\n\r\n")
        .with_context(|| format!("{address}: {answer:?}"))?;
    ensure!(!body.trim().is_empty(), "{address} answered {answer:?}");
    Ok(body.trim().to_owned())
}

/// Deletes pods and waits until they have gone.
fn delete(cluster: &Cluster, kind: &str, names: &[&str]) -> Result<()> {
    for name in names {
        let deleted = cluster.ok(&["delete", kind, name, "--timeout=240s"]);
        deleted.with_context(|| what_is_known(cluster, kind, name))?;
    }
    Ok(())
}

/// Of something that should have gone: its status, and the newest events.
fn what_is_known(cluster: &Cluster, kind: &str, name: &str) -> String {
    let object = cluster.get(&[kind, name]).unwrap_or_default();
    let events = cluster.gantry(&["get", "events", "--no-headers"]);
    let events = events.map(|output| output.stdout).unwrap_or_default();
    let newest = events.lines().count().saturating_sub(12);
    let newest: Vec<&str> = events.lines().skip(newest).collect();
    let (metadata, status) = (&object["metadata"], &object["status"]);
    format!("{kind} {name}: {metadata} {status}; events: {newest:?}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_stages_in_order() {
        let names: std::collections::BTreeSet<_> = ALL.iter().map(|s| s.name).collect();
        assert_eq!(names.len(), ALL.len());
        let one = crate::scenario::ALL.iter().map(|s| s.name);
        assert!(one.into_iter().all(|name| !names.contains(name)));
        let stages: Vec<u8> = ALL.iter().map(|s| s.stage as u8).collect();
        assert!(stages.is_sorted(), "{stages:?}");
    }
}
