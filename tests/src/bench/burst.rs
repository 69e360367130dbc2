//! Many pods at once: from the first create to the last Running seen, and from the first delete to
//! the last object gone.
//!
//! The pods end at SIGTERM, so that no grace period is measured.

use std::time::{Duration, Instant};

use anyhow::Result;
use futures_util::future::try_join_all;

use super::api::{Api, NAMESPACE, PodWatch, obedient_pod};
use super::report::{Bound, Report};
use crate::cluster::{Cluster, Installation};

const POD_COUNT: usize = 100;
const ROUND_COUNT: usize = 5;
/// Between rounds: what the last one left to do is done.
const PAUSE: Duration = Duration::from_secs(1);

pub(super) async fn run(installation: &Installation) -> Result<Report> {
    let cluster = Cluster::start(installation)?;
    let api = Api::connect().await?;
    api.create_namespace(NAMESPACE).await?;
    let mut watch = api.watch_pods().await?;
    let mut report = Report::new("burst", "ms");
    // The first of all pays for cold caches.
    round(&api, &mut watch, "warm", 10).await?;
    for number in 0..ROUND_COUNT {
        tokio::time::sleep(PAUSE).await;
        let prefix = format!("burst-{number}");
        let (running, gone) = round(&api, &mut watch, &prefix, POD_COUNT).await?;
        report.add_round("running", vec![running.as_secs_f64() * 1e3]);
        report.add_round("gone", vec![gone.as_secs_f64() * 1e3]);
    }
    report.count("pods", POD_COUNT as f64);
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
