//! One control plane and so many hollow agents, 30 pods each.
//!
//! ```text
//!  fill: nodes ─► agents join: memory of a node
//!  fill: pods that wait ─► start: pods bound per second (again and again, from the same file)
//!       ─► agents join, run everything ─► memory of a pod ─► idle: heartbeats ─► a Service changes
//! ```

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use gantry_control::store::STORE_FILE;
use serde_json::{Value, json};

use super::super::api::{Api, NAMESPACE};
use super::super::report::{Bound, Report};
use super::Step;
use super::hollow::{Fleet, PROBE};
use super::plane::Plane;
use super::seed;

/// Pods of a node.
const PODS_PER_NODE: usize = 30;
/// What is left to do after something has happened is done.
const REST: Duration = Duration::from_secs(6);
/// A beat of every agent falls into it.
const IDLE: Duration = Duration::from_secs(5);
const IDLE_COUNT: usize = 5;
const CHANGE_COUNT: usize = 11;
const CHANGE_TIMEOUT: Duration = Duration::from_secs(60);
/// All statuses of all pods.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(600);
/// Of an agent, for each node that it knows: its view, and its file on tmpfs.
const AGENT_BYTES_PER_NODE: usize = 800;
/// Of an agent otherwise: its connection, its pods.
const AGENT_BYTES: usize = 1 << 20;

/// Where one size is measured.
pub(super) struct Place<'a> {
    pub(super) bin: &'a Path,
    /// On the disk.
    pub(super) dir: &'a Path,
    /// On tmpfs, where there is one.
    pub(super) agents: &'a Path,
}

/// What an empty control plane takes.
pub(super) async fn empty_kib(place: &Place<'_>) -> Result<f64> {
    let data = place.dir.join("empty");
    std::fs::create_dir_all(&data)?;
    let plane = Plane::start(place.bin, &data).await?;
    tokio::time::sleep(REST).await;
    let kib = plane.pss_kib()?;
    plane.kill()?;
    Ok(kib)
}

/// The reason why this machine cannot hold so many agents.
pub(super) fn too_many(nodes: usize) -> Result<Option<String>> {
    let needed = nodes * (nodes * AGENT_BYTES_PER_NODE + AGENT_BYTES);
    let text = std::fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|l| l.split_whitespace().next()?.parse::<usize>().ok());
    let held = kib.context("/proc/meminfo has no MemAvailable")? << 10;
    let gib = |bytes: usize| bytes as f64 / f64::from(1 << 30);
    Ok((needed > held).then(|| {
        let (needed, held) = (gib(needed), gib(held));
        format!("the agents take {needed:.1} GiB of memory, this machine has {held:.1}")
    }))
}

/// Steps of [`run`], for the bar.
pub(super) fn step_count(rounds: usize) -> usize {
    rounds + 6
}

pub(super) async fn run(
    place: &Place<'_>,
    nodes: usize,
    rounds: usize,
    empty_kib: f64,
    report: &mut Report,
    step: &mut Step<'_>,
) -> Result<()> {
    let size = format!("{nodes} nodes");
    let pods = nodes * PODS_PER_NODE;
    let data = place.dir.join(format!("scale-{nodes}"));
    let agents = place.agents.join(nodes.to_string());
    step.next(&format!("{size}: filling the store"));
    seed::fill(&data, nodes, 0).await?;

    step.next(&format!("{size}: joining"));
    let plane = Plane::start(place.bin, &data).await?;
    let began = Instant::now();
    let fleet = join(&plane, &data, &agents, nodes, step).await?;
    report.count(
        &format!("{size}: all joined, s"),
        began.elapsed().as_secs_f64(),
    );
    tokio::time::sleep(REST).await;
    let with_nodes_kib = plane.pss_kib()?;
    let of_node = (with_nodes_kib - empty_kib) / nodes as f64;
    report.count(&format!("{size}: memory of a node, KiB"), of_node);
    drop(fleet);
    plane.kill()?;

    step.next(&format!("{size}: filling the store with pods"));
    seed::fill(&data, nodes, pods).await?;
    let (store, filled) = (data.join(STORE_FILE), data.join("filled"));
    std::fs::copy(&store, &filled)?;
    let case = format!("{size}: pods bound/s");
    let mut plane = None;
    for round in 0..rounds {
        step.next(&format!(
            "{size}: scheduling, round {} of {rounds}",
            round + 1
        ));
        drop(plane.take());
        std::fs::copy(&filled, &store)?;
        let started = Plane::start(place.bin, &data).await?;
        let times = started.api().await?.watch_bound(pods).await?;
        report.add_round(&case, vec![rate(&times)?]);
        plane = Some(started);
    }
    std::fs::remove_file(filled)?;
    let plane = plane.context("no round at all")?;
    let got = report.quantiles(&case).map_or(f64::NAN, |q| q.p50);
    report.target(
        &format!("{size}: pods durably bound/s"),
        Bound::Min,
        5_000.0,
        got,
    );

    step.next(&format!("{size}: running {pods} pods"));
    let began = Instant::now();
    let mut fleet = join(&plane, &data, &agents, nodes, step).await?;
    while fleet.pods() < pods {
        if began.elapsed() > SETTLE_TIMEOUT {
            bail!("the agents have {} of {pods} pods", fleet.pods());
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    fleet.settled(SETTLE_TIMEOUT).await?;
    let took = began.elapsed().as_secs_f64();
    report.count(&format!("{size}: joined again, all pods Running, s"), took);
    tokio::time::sleep(REST).await;
    let of_pod = (plane.pss_kib()? - with_nodes_kib) / pods as f64;
    report.count(&format!("{size}: memory of a pod, KiB"), of_pod);

    step.next(&format!("{size}: heartbeats"));
    heartbeats(&plane, &size, report).await?;
    step.next(&format!("{size}: a Service changes"));
    changes(&plane, &mut fleet, nodes, &size, report).await?;
    report.count(
        &format!("{size}: streams that broke"),
        fleet.broken() as f64,
    );
    drop(fleet);
    plane.kill()?;
    // Files of tmpfs are memory.
    std::fs::remove_dir_all(&agents).with_context(|| agents.display().to_string())
}

async fn join(
    plane: &Plane,
    data: &Path,
    agents: &Path,
    nodes: usize,
    step: &mut Step<'_>,
) -> Result<Fleet> {
    let server = plane.access()?.server;
    let told = |live: usize| step.within(&format!("{nodes} nodes: {live} agents are live"));
    Fleet::start(&server, data, agents, nodes, told).await
}

/// Between the tenth and the last of what a watch has seen live: the first ones wait for the watch
/// itself.
fn rate(times: &[Instant]) -> Result<f64> {
    let first = times.len() / 10;
    let (Some(begin), Some(end)) = (times.get(first), times.last()) else {
        bail!("no pod was bound");
    };
    let took = end.duration_since(*begin).as_secs_f64();
    let count = times[first..].iter().filter(|at| *at > begin).count();
    if took <= 0.0 || count < times.len() / 4 {
        bail!("almost all pods were bound before the watch began");
    }
    Ok(count as f64 / took)
}

async fn heartbeats(plane: &Plane, size: &str, report: &mut Report) -> Result<()> {
    let case = format!("{size}: heartbeats, % of a core");
    for _ in 0..IDLE_COUNT {
        let (began, before) = (Instant::now(), plane.cpu()?);
        tokio::time::sleep(IDLE).await;
        let used = plane.cpu()?.saturating_sub(before).as_secs_f64();
        report.add_round(&case, vec![used / began.elapsed().as_secs_f64() * 100.0]);
    }
    let got = report.quantiles(&case).map_or(f64::NAN, |q| q.p50);
    report.target(&case, Bound::Max, 20.0, got);
    Ok(())
}

fn service(port: u32) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": PROBE, "namespace": NAMESPACE},
        "spec": {"ports": [{"port": port, "targetPort": 8080}]},
    })
}

/// From the request of a client to the view of every agent.
async fn changes(
    plane: &Plane,
    fleet: &mut Fleet,
    nodes: usize,
    size: &str,
    report: &mut Report,
) -> Result<()> {
    let api: Api = plane.api().await?;
    api.create("services", &service(1)).await?;
    arrivals(fleet, nodes, 1).await?;
    let case = format!("{size}: a Service change, ms");
    let mut used = Duration::ZERO;
    for round in 0..CHANGE_COUNT {
        let port = 2 + u32::try_from(round)?;
        let (began, before) = (Instant::now(), plane.cpu()?);
        api.update("services", &service(port)).await?;
        let times = arrivals(fleet, nodes, port).await?;
        used += plane.cpu()?.saturating_sub(before);
        let ms = |at: Instant| at.saturating_duration_since(began).as_secs_f64() * 1e3;
        report.add_round(&case, times.into_iter().map(ms).collect());
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    let each = used.as_secs_f64() * 1e6 / (CHANGE_COUNT * nodes) as f64;
    let what = format!("{size}: processor time of the control plane per change and agent, us");
    report.count(&what, each);
    Ok(())
}

/// When each of the agents saw the Service with this port.
async fn arrivals(fleet: &mut Fleet, nodes: usize, port: u32) -> Result<Vec<Instant>> {
    let mut times = Vec::with_capacity(nodes);
    while times.len() < nodes {
        let next = tokio::time::timeout(CHANGE_TIMEOUT, fleet.arrivals.recv()).await;
        let Ok(Some(arrival)) = next else {
            bail!("{} of {nodes} agents have seen port {port}", times.len());
        };
        if arrival.port == port {
            times.push(arrival.at);
        }
    }
    Ok(times)
}

/// A directory in memory, or else one below `dir`.
pub(super) fn agents_dir(dir: &Path) -> Result<tempfile::TempDir> {
    let shm = PathBuf::from("/dev/shm");
    let parent = if shm.is_dir() { &shm } else { dir };
    Ok(tempfile::Builder::new()
        .prefix("gantry-hollow-")
        .tempdir_in(parent)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_leaves_out_what_came_before_the_watch() {
        let begin = Instant::now();
        let mut times = vec![begin; 50];
        times.extend((1..=100).map(|n| begin + Duration::from_millis(10 * n)));
        let got = rate(&times).unwrap();
        assert!((got - 100.0).abs() < 1.0, "{got}");
        assert!(rate(&vec![begin; 100]).is_err());
        assert!(rate(&[]).is_err());
    }
}
