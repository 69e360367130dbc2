//! Everybody reaches every pod by its own addresses, of both families: pods and nodes, on one link and
//! behind the router. And a Service of both by both.

use std::net::IpAddr;

use anyhow::{Context, Result, ensure};

use super::{LIMIT, delete, pod_ips, server, service};
use crate::machines::Nodes;

/// More than one frame carries, so that it travels in full ones.
const BODY: usize = 200_000;

/// From every pod and every node to every pod, and from every pod to every node, also with full frames.
pub(super) fn reach(nodes: &mut Nodes) -> Result<()> {
    let numbers = nodes.numbers();
    let names: Vec<String> = numbers.iter().map(|n| format!("pod-{n}")).collect();
    let pods: Vec<String> = numbers
        .iter()
        .zip(&names)
        .map(|(number, name)| server(name, *number, "reach"))
        .collect();
    let both = "  ipFamilyPolicy: RequireDualStack\n";
    let cluster = &nodes.cluster;
    cluster.apply_ok(&(pods.concat() + &service("reach", "reach", both)))?;
    let mut addresses: Vec<(String, IpAddr)> = Vec::new();
    for name in &names {
        cluster.wait_ready("default", name)?;
        let own = pod_ips(cluster, "default", name)?;
        let families: Vec<bool> = own.iter().map(IpAddr::is_ipv4).collect();
        ensure!(
            families == [true, false],
            "{name} has the addresses {own:?}"
        );
        addresses.extend(own.into_iter().map(|ip| (name.clone(), ip)));
    }
    let big = format!("head -c {BODY} /dev/zero > /w/big");
    for name in &names {
        cluster.ok(&["exec", name, "--", "sh", "-c", &big])?;
    }
    let script: String = addresses
        .iter()
        .map(|(name, ip)| {
            let ip = in_url(*ip);
            format!(
                "[ \"$(timeout 30 wget -q -O - http://{ip}:8080/)\" = {name} ] || echo {name} does not answer; \
                 [ $(timeout 30 wget -q -O - http://{ip}:8080/big | wc -c) = {BODY} ] || echo {name} sends no full frames; "
            )
        })
        .collect();
    let to_nodes: String = numbers
        .iter()
        .map(|n| {
            let address = nodes.address(*n);
            // The agent's hand listens there; on node-1 it is the API.
            let port = if *n == 1 { 6443 } else { 7001 };
            let v6 = nodes.address_v6(*n).filter(|_| *n > 1);
            let all = [address.to_string()]
                .into_iter()
                .chain(v6.map(|it| it.to_string()));
            let lines = all.map(|it| {
                format!(
                    "nc -w 30 {it} {port} < /dev/null || echo node-{n} does not answer at {it}; "
                )
            });
            lines.collect::<String>()
        })
        .collect();
    let object = cluster.get(&["service", "reach"])?;
    let ips = object["spec"]["clusterIPs"]
        .as_array()
        .cloned()
        .unwrap_or_default();
    ensure!(ips.len() == 2, "the Service has {ips:?}");
    let mut to_service = String::new();
    for ip in ips.iter().filter_map(|ip| ip.as_str()) {
        let url = in_url(ip.parse()?);
        to_service += &format!(
            "timeout 30 wget -q -O - http://{url}/ | grep -q ^pod- || echo the Service does not answer at {ip}; \
             nslookup reach.default.svc.cluster.local | grep -q '{ip}$' || echo {ip} is not in its name; "
        );
    }
    // A route may take a moment after its node; then nothing is missing.
    for name in &names {
        cluster.wait(&format!("{name} to reach all"), LIMIT, |c| {
            let line = format!("{script}{to_nodes}{to_service}");
            let said = c.ok(&["exec", name, "--", "sh", "-c", &line])?;
            ensure!(said.trim().is_empty(), "from {name}: {said}");
            Ok(true)
        })?;
    }
    for number in &numbers {
        let said = nodes.on(*number, &script)?;
        ensure!(said.trim().is_empty(), "from node-{number}: {said}");
    }
    delete(cluster, "service", &["reach"])?;
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    delete(cluster, "pod", &names).context("afterwards")
}

/// As it stands before a port.
pub(super) fn in_url(ip: IpAddr) -> String {
    match ip {
        IpAddr::V4(ip) => ip.to_string(),
        IpAddr::V6(ip) => format!("[{ip}]"),
    }
}
