//! `cargo xtask bench nodes`: what several machines do, in figures.
//!
//! The machines are emulated and share the host's processors, so times are those of such machines; what
//! can be compared are ratios: hosts and pods on the same two machines take turns.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::{Nodes, Place};
use crate::cluster::Installation;
use crate::machines::hand::Machine;
use crate::scenario::nodes::{outside, pod_ip, server, service};

/// Turns of hosts and pods; the median counts.
const ROUNDS: usize = 5;
const DURING_MS: u32 = 2_000;
/// Of the measuring server, on the machines and in the pods.
const PORT: u16 = 7_100;
const KINDS: [&str; 3] = ["rate", "rtt", "throughput"];
/// Direct routes cost no more than this.
const LEAST: f64 = 0.97;
const NOTICED: Duration = Duration::from_secs(super::GRACE_S + 60);

/// Measures all, and returns the document of `cargo xtask bench`.
pub fn run(installation: &Installation, place: &Place) -> Result<Value> {
    let mut nodes = Nodes::prepare(installation, place)?;
    let join_s = join_to_first_pod(&nodes)?;
    nodes.join_all()?;
    let silence_ms = outside::moved(&mut nodes)?.as_secs_f64() * 1e3;
    let cut_ms = outside::taken_over(&mut nodes)?.as_secs_f64() * 1e3;
    let change_ms = endpoint_change(&nodes)?;
    let direct = wires(&nodes, "direct")?;
    for worker in &nodes.workers {
        nodes.start_worker(worker, &["--routing", "vxlan"])?;
    }
    let tunnel = wires(&nodes, "vxlan")?;
    for worker in &nodes.workers {
        nodes.start_worker(worker, &["--fast-path=false"])?;
    }
    let stack = wires(&nodes, "stack")?;
    for worker in &nodes.workers {
        nodes.start_worker(worker, &[])?;
    }
    let boot_s = boot_to_ready(&mut nodes)?;
    let mut ratios = serde_json::Map::new();
    let mut cases = serde_json::Map::new();
    let mut targets = Vec::new();
    let ways = [
        ("direct", &direct),
        ("VXLAN", &tunnel),
        ("direct, through the stack", &stack),
    ];
    for (way, figures) in ways {
        for (kind, [host, pod]) in KINDS.iter().zip(figures) {
            let unit = match *kind {
                "rate" => "connections/s",
                "rtt" => "us a round trip",
                _ => "MB/s",
            };
            cases.insert(
                format!("hosts beside {way}, {unit}"),
                json!({"p50": rounded(*host)}),
            );
            cases.insert(
                format!("pods by {way}, {unit}"),
                json!({"p50": rounded(*pod)}),
            );
            // More is better of each ratio: of round trips it is the hosts' by the pods'.
            let ratio = match *kind {
                "rtt" => host / pod,
                _ => pod / host,
            };
            ratios.insert(
                format!("{kind}, pods by {way}"),
                json!({"p50": rounded(ratio)}),
            );
            if way == "direct" {
                targets.push(json!({
                    "what": format!("{kind} between pods by direct routes, of the hosts'"),
                    "min": LEAST, "got": rounded(ratio), "met": ratio >= LEAST,
                }));
            }
        }
    }
    Ok(json!({
        "unit": "median",
        "cases": cases,
        "ratios": ratios,
        "counts": {
            "worker, power to Ready, s": rounded(boot_s),
            "join to first pod Ready, s": rounded(join_s),
            "gantry apply of a label to first connection from another node, ms": rounded(change_ms),
            "silence of a load balancer address that moves, ms": rounded(silence_ms),
            "silence of a load balancer address whose machine loses its power, ms": rounded(cut_ms),
        },
        "targets": targets,
    }))
}

fn rounded(value: f64) -> f64 {
    (value * 1e3).round() / 1e3
}

/// A pod waits for node-2: from the line of `gantry join` to the pod's readiness.
fn join_to_first_pod(nodes: &Nodes) -> Result<f64> {
    nodes.cluster.apply_ok(&server("first", 2, "first"))?;
    let worker = nodes.worker(2)?;
    nodes.wait_up(worker)?;
    let began = Instant::now();
    nodes.join(worker)?;
    nodes.cluster.wait_ready("default", "first")?;
    let took = began.elapsed().as_secs_f64();
    nodes.cluster.ok(&["delete", "pod", "first"])?;
    Ok(took)
}

/// From the power of a worker that was given up to its node's readiness.
fn boot_to_ready(nodes: &mut Nodes) -> Result<f64> {
    nodes.ask("power-cut node-3")?;
    nodes.wait_condition("node-3", "Unknown", NOTICED)?;
    let began = Instant::now();
    nodes.ask("power-on node-3")?;
    nodes.wait_ready("node-3")?;
    Ok(began.elapsed().as_secs_f64())
}

/// A pod on node-2 gets the Service's label; node-3 asks the Service all the time.
fn endpoint_change(nodes: &Nodes) -> Result<f64> {
    let cluster = &nodes.cluster;
    let asked = service("late", "late", "").replacen("targetPort: 8080", "targetPort: 7100", 1);
    cluster.apply_ok(&(server("changes", 2, "early") + &asked))?;
    cluster.wait_ready("default", "changes")?;
    let pod = Pod::new(nodes, "changes", 2)?;
    pod.serve()?;
    let object = cluster.get(&["service", "late"])?;
    let ip = object["spec"]["clusterIP"]
        .as_str()
        .context("no cluster IP")?;
    let worker = nodes.worker(3)?.clone();
    let script = format!("/init wire-first {ip}:80");
    let asking = std::thread::spawn(move || -> Result<Instant> {
        worker.ok(&["sh", "-c", &script])?;
        Ok(Instant::now())
    });
    std::thread::sleep(Duration::from_secs(3));
    ensure!(
        !asking.is_finished(),
        "a Service without endpoints answered"
    );
    let changed = Instant::now();
    cluster.apply_ok(&server("changes", 2, "late"))?;
    let answered = asking
        .join()
        .map_err(|_| anyhow::anyhow!("the client panicked"))??;
    cluster.ok(&["delete", "service", "late"])?;
    cluster.ok(&["delete", "pod", "changes"])?;
    Ok(answered.saturating_duration_since(changed).as_secs_f64() * 1e3)
}

/// Of hosts and of pods, for each kind: medians over the rounds.
fn wires(nodes: &Nodes, name: &str) -> Result<Vec<[f64; 2]>> {
    let cluster = &nodes.cluster;
    let (from, to) = (format!("{name}-from"), format!("{name}-to"));
    cluster.apply_ok(&(server(&from, 2, "wires") + &server(&to, 3, "wires")))?;
    for pod in [&from, &to] {
        cluster.wait_ready("default", pod)?;
    }
    let client = Pod::new(nodes, &from, 2)?;
    let server = Pod::new(nodes, &to, 3)?;
    server.serve()?;
    serve(server.worker, "")?;
    let pod_address = pod_ip(cluster, "default", &to)?;
    let host_address = nodes.address(3);
    let mut all = Vec::new();
    for kind in KINDS {
        let (mut hosts, mut pods) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            let words = |to: &str| format!("/init wire {kind} {to}:{PORT} {DURING_MS}");
            let line = words(&host_address.to_string());
            hosts.push(figure(&client.worker.ok(&["sh", "-c", &line])?)?);
            let line = format!("{}{}", client.enter, words(&pod_address.to_string()));
            pods.push(figure(&client.worker.ok(&["sh", "-c", &line])?)?);
        }
        all.push([median(hosts), median(pods)]);
    }
    for pod in [&from, &to] {
        cluster.ok(&["delete", "pod", pod])?;
    }
    Ok(all)
}

/// A pod, and how its network is entered on its machine.
struct Pod<'a> {
    worker: &'a Machine,
    enter: String,
}

impl<'a> Pod<'a> {
    fn new(nodes: &'a Nodes, name: &str, node: u8) -> Result<Self> {
        let worker = nodes.worker(node)?;
        // Its processes see the pod's name as the machine's.
        let find = format!(
            "for p in $(pidof httpd); do [ \"$(nsenter -t $p -u hostname)\" = {name} ] && echo $p; done"
        );
        let said = worker.run(&["sh", "-c", &find])?;
        let pid: u32 = said
            .stdout
            .split_whitespace()
            .next()
            .with_context(|| format!("no process of {name}: {said:?}"))?
            .parse()?;
        Ok(Self {
            worker,
            enter: format!("nsenter -t {pid} -n "),
        })
    }

    fn serve(&self) -> Result<()> {
        serve(self.worker, &self.enter)
    }
}

fn serve(worker: &Machine, enter: &str) -> Result<()> {
    let line = format!("{enter}/init wire-serve {PORT} < /dev/null > /dev/null 2>&1 &");
    worker.ok(&["sh", "-c", &line]).map(drop)
}

fn figure(said: &str) -> Result<f64> {
    said.trim().parse().with_context(|| said.to_owned())
}

fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures.get(figures.len() / 2).copied().unwrap_or_default()
}
