//! What the node's own programs keep in memory with 30 pods: proportional set size, so that a page
//! shared between shims counts once.

use std::time::Duration;

use anyhow::Result;
use serde_json::json;

use super::api::{Api, NAMESPACE, pod};
use super::memory::of_programs_mib;
use super::report::{Bound, Report};
use crate::cluster::{Cluster, Installation};

const POD_COUNT: usize = 30;
const ROUND_COUNT: usize = 5;
/// After the last pod: statuses are reported, start-up's memory is given back or not.
const SETTLE: Duration = Duration::from_secs(5);
const ROUND_PAUSE: Duration = Duration::from_secs(1);

pub(super) async fn run(installation: &Installation) -> Result<Report> {
    let cluster = Cluster::start(installation)?;
    let api = Api::connect().await?;
    api.create_namespace(NAMESPACE).await?;
    let mut watch = api.watch_pods().await?;
    for number in 0..POD_COUNT {
        let name = format!("pod-{number}");
        api.create("pods", &pod(&name, json!({}))).await?;
        watch.running(&name).await?;
    }
    let mut report = Report::new("footprint", "MiB");
    tokio::time::sleep(SETTLE).await;
    for _ in 0..ROUND_COUNT {
        tokio::time::sleep(ROUND_PAUSE).await;
        let [control, agent, shims] =
            ["gantry-control", "gantry-agent", "gantry-shim"].map(of_programs_mib);
        let (control, agent, shims) = (control?, agent?, shims?);
        report.add_round("control", vec![control]);
        report.add_round("agent", vec![agent]);
        report.add_round("control+agent", vec![control + agent]);
        report.add_round("shim", vec![shims / POD_COUNT as f64]);
    }
    let p50 = |report: &Report, case: &str| report.quantiles(case).map_or(f64::NAN, |q| q.p50);
    let both = p50(&report, "control+agent");
    let shim = p50(&report, "shim");
    report.target(
        "PSS of control + agent with 30 pods, MiB",
        Bound::Max,
        64.0,
        both,
    );
    report.target("PSS of a shim, MiB", Bound::Max, 0.3, shim);
    cluster.finish()?;
    Ok(report)
}
