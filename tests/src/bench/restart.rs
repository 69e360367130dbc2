//! An agent that was killed and is started again on a node full of pods: until it has taken over.
//!
//! What is seen from outside: a pod that was created while no agent ran is Running. By then the
//! state was read, the control plane was reached, and new work is done beside the adoption of what
//! runs. Afterwards no container may have been started again.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use super::api::{Api, NAMESPACE, obedient_pod};
use super::full_node;
use super::report::{Bound, Report};
use crate::cluster::Installation;

const ROUND_COUNT: usize = 5;

pub(super) async fn run(installation: &Installation) -> Result<Report> {
    let count = full_node::pod_count()?;
    let mut cluster = full_node::start(installation, count)?;
    let api = Api::connect().await?;
    api.create_namespace(NAMESPACE).await?;
    let mut watch = api.watch_pods().await?;
    let names: Vec<String> = (0..count).map(|n| format!("pod-{n}")).collect();
    full_node::fill(&api, &mut watch, &names).await?;
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
    full_node::empty(&api, &mut watch, &all).await?;
    cluster.finish()?;
    Ok(report)
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
    fn restarts_of_all_containers_are_summed() {
        let status = |n: u64| json!({"status": {"containerStatuses": [{"restartCount": n}]}});
        assert_eq!(
            restart_count(&json!({"items": [status(0), status(2), {}]})),
            2
        );
    }
}
