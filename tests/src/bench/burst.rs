//! Many pods at once: from the first create to the last Running seen, and from the first delete to
//! the last object gone.
//!
//! The pods end at SIGTERM, so that no grace period is measured. Beside them as many containers of
//! `runc`, and of `crun` where it runs: five started at a time, without a network, and deleted.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use futures_util::future::try_join_all;

use super::api::{Api, NAMESPACE, PodWatch, obedient_pod};
use super::report::{Bound, Report};
use super::runc::Runc;
use super::{Size, pod_start};
use crate::cluster::{Cluster, Installation};

const POD_COUNT: usize = 100;
/// Starts of a peer at a time; divides the pods.
const PEER_WORKER_COUNT: usize = 5;
const ROUND_COUNT: usize = 5;
/// Between rounds: what the last one left to do is done.
const PAUSE: Duration = Duration::from_secs(1);

pub(super) async fn run(installation: &Installation, size: Size) -> Result<Report> {
    let cluster = Cluster::start(installation)?;
    let api = Api::connect().await?;
    api.create_namespace(NAMESPACE).await?;
    let mut watch = api.watch_pods().await?;
    let crun = pod_start::crun(installation).map(|crun| ("crun", crun));
    let runc = ("runc", Runc::prepare(installation, "runc")?);
    let peers: Vec<(&str, Runc)> = std::iter::once(runc).chain(crun).collect();
    let mut report = Report::new("burst", "ms");
    // The first of all pays for cold caches.
    round(&api, &mut watch, "warm", 10).await?;
    let pod_count = size.of(POD_COUNT);
    for number in 0..size.of(ROUND_COUNT) {
        tokio::time::sleep(PAUSE).await;
        let prefix = format!("burst-{number}");
        let (running, gone) = round(&api, &mut watch, &prefix, pod_count).await?;
        report.add_round("running", vec![ms(running)]);
        report.add_round("gone", vec![ms(gone)]);
        for (name, peer) in peers.iter() {
            let (running, gone) = peer_round(peer, pod_count)?;
            report.add_round(&format!("{name} running"), vec![ms(running)]);
            report.add_round(&format!("{name} gone"), vec![ms(gone)]);
        }
    }
    for (name, _) in &peers {
        report.ratio("running", &format!("{name} running"));
        report.ratio("gone", &format!("{name} gone"));
    }
    report.count("pods", pod_count as f64);
    for (case, what, limit) in [
        (
            "running",
            "100 pods created at once, all Running, ms",
            2000.0,
        ),
        ("gone", "100 pods deleted at once, all gone, ms", 1500.0),
    ] {
        let got = report.quantiles(case).map_or(f64::NAN, |q| q.p50);
        report.target(what, Bound::Max, limit, got);
    }
    cluster.finish()?;
    Ok(report)
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// As many containers as a round has pods.
fn peer_round(peer: &Runc, pod_count: usize) -> Result<(Duration, Duration)> {
    let share = pod_count / PEER_WORKER_COUNT;
    let started = |_| (0..share).map(|_| peer.start()).collect::<Result<Vec<_>>>();
    let deleted = |ids: Vec<String>| ids.iter().try_for_each(|id| peer.delete(id));
    let began = Instant::now();
    let ids = side_by_side(vec![(); PEER_WORKER_COUNT], started)?;
    let running = began.elapsed();
    let began = Instant::now();
    side_by_side(ids, deleted)?;
    Ok((running, began.elapsed()))
}

/// One thread for each share of the work.
fn side_by_side<I: Send, O: Send>(
    shares: Vec<I>,
    work: impl Fn(I) -> Result<O> + Sync,
) -> Result<Vec<O>> {
    std::thread::scope(|scope| {
        let work = &work;
        let threads: Vec<_> = shares
            .into_iter()
            .map(|share| scope.spawn(move || work(share)))
            .collect();
        let joined = threads.into_iter().map(|thread| thread.join());
        joined
            .map(|done| done.unwrap_or_else(|_| bail!("a peer's thread panicked")))
            .collect()
    })
}

async fn round(
    api: &Api,
    watch: &mut PodWatch,
    prefix: &str,
    count: usize,
) -> Result<(Duration, Duration)> {
    let names: Vec<String> = (0..count).map(|n| format!("{prefix}-{n}")).collect();
    let objects: Vec<_> = names.iter().map(|name| obedient_pod(name)).collect();
    let began = Instant::now();
    try_join_all(objects.iter().map(|object| api.create("pods", object))).await?;
    let running = watch.all_running(&names).await? - began;
    let began = Instant::now();
    try_join_all(names.iter().map(|name| api.delete_pod(name))).await?;
    watch.deleted(count).await?;
    Ok((running, began.elapsed()))
}
