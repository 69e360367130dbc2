//! An agent that was killed and is started again on a node full of pods: until it has taken over.
//!
//! What is seen from outside: a pod that was created while no agent ran is Running. By then the
//! state was read, the control plane was reached, and new work is done beside the adoption of what
//! runs. Afterwards no container may have been started again.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use futures_util::future::try_join_all;

use super::api::{Api, NAMESPACE, PodWatch, obedient_pod};
use super::report::{Bound, Report};
use crate::cluster::{Cluster, Installation};

/// A node takes 110, of which each round adds one.
const POD_COUNT_MAX: usize = 100;
/// At once: more would only wait for each other.
const BATCH: usize = 50;
const ROUND_COUNT: usize = 5;
/// What a pod of a shell may take, kernel's part included.
const POD_MIB: u64 = 4;

pub(super) async fn run(installation: &Installation) -> Result<Report> {
    let mut cluster = Cluster::start(installation)?;
    let api = Api::connect().await?;
    api.create_namespace(NAMESPACE).await?;
    let mut watch = api.watch_pods().await?;
    let count = pod_count(&std::fs::read_to_string("/proc/meminfo")?);
    let names: Vec<String> = (0..count).map(|n| format!("pod-{n}")).collect();
    for batch in names.chunks(BATCH) {
        create(&api, &mut watch, batch).await?;
    }
    let mut report = Report::new("restart", "ms");
    report.count("pods", count as f64);
    for round in 0..ROUND_COUNT {
        cluster.kill_agent()?;
        let late = format!("late-{round}");
        api.create("pods", &obedient_pod(&late)).await?;
        let began = Instant::now();
        cluster.start_agent()?;
        let running_at = watch.all_running(&[late]).await?;
        report.add_round("agent", vec![(running_at - began).as_secs_f64() * 1e3]);
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    let text = cluster.ok(&["get", "pods", "-n", NAMESPACE, "-o", "json"])?;
    let restarts = restart_count(&serde_json::from_str(&text)?);
    if restarts > 0 {
        bail!("{restarts} containers were started again by a new agent");
    }
    let p50 = report.quantiles("agent").map_or(f64::NAN, |q| q.p50);
    let what = format!("a new agent has taken over {count} pods, ms");
    report.target(&what, Bound::Max, 1000.0, p50);
    let all: Vec<String> = names
        .into_iter()
        .chain((0..ROUND_COUNT).map(|r| format!("late-{r}")))
        .collect();
    for batch in all.chunks(BATCH) {
        try_join_all(batch.iter().map(|name| api.delete_pod(name))).await?;
        watch.deleted(batch.len()).await?;
    }
    cluster.finish()?;
    Ok(report)
}

async fn create(api: &Api, watch: &mut PodWatch, names: &[String]) -> Result<()> {
    let objects: Vec<_> = names.iter().map(|name| obedient_pod(name)).collect();
    try_join_all(objects.iter().map(|object| api.create("pods", object))).await?;
    watch.all_running(names).await.map(drop)
}

/// What half of the free memory holds.
fn pod_count(meminfo: &str) -> usize {
    let available = meminfo
        .lines()
        .find_map(|l| l.strip_prefix("MemAvailable:"));
    let kib = available.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
    let fits = kib.unwrap_or(0) / 1024 / 2 / POD_MIB;
    usize::try_from(fits).map_or(POD_COUNT_MAX, |n| n.clamp(10, POD_COUNT_MAX))
}

fn restart_count(list: &serde_json::Value) -> u64 {
    let pods = list["items"].as_array().into_iter().flatten();
    pods.flat_map(|pod| {
        pod["status"]["containerStatuses"]
            .as_array()
            .into_iter()
            .flatten()
    })
    .filter_map(|status| status["restartCount"].as_u64())
    .sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_small_machine_gets_fewer_pods() {
        assert_eq!(
            pod_count("MemTotal: 1 kB\nMemAvailable:   819200 kB\n"),
            100
        );
        assert_eq!(pod_count("MemAvailable: 99999999 kB\n"), POD_COUNT_MAX);
        assert_eq!(pod_count(""), 10);
    }

    #[test]
    fn restarts_of_all_containers_are_summed() {
        let status = |n: u64| json!({"status": {"containerStatuses": [{"restartCount": n}]}});
        assert_eq!(
            restart_count(&json!({"items": [status(0), status(2), {}]})),
            2
        );
    }
}
