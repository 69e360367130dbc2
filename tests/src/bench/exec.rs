//! A command in a running pod, from the call to its exit code, over a connection that is open: the
//! way through control plane, agent and shim included. Beside it `runc exec` and, where crun runs,
//! `crun exec`, which have no such way.

use std::time::Instant;

use anyhow::{Result, bail};
use serde_json::json;

use super::api::{Api, NAMESPACE, pod};
use super::report::{Bound, Report};
use super::runc::Runc;
use super::{Size, pod_start};
use crate::cluster::{Cluster, Installation};

const ROUND_COUNT: usize = 5;
const PER_ROUND: usize = 20;

pub(super) async fn run(installation: &Installation, size: Size) -> Result<Report> {
    let cluster = Cluster::start(installation)?;
    let api = Api::connect().await?;
    api.create_namespace(NAMESPACE).await?;
    let mut watch = api.watch_pods().await?;
    api.create("pods", &pod("target", json!({}))).await?;
    watch.running("target").await?;
    let runc = Runc::prepare(installation, "runc")?;
    let beside = runc.start()?;
    let crun = match pod_start::crun(installation) {
        Some(crun) => Some((crun.start()?, crun)),
        None => None,
    };
    let mut report = Report::new("exec", "ms");
    for round in 0..=size.of(ROUND_COUNT) {
        let (mut ours, mut theirs, mut cruns) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..size.of(PER_ROUND) {
            let began = Instant::now();
            let code = api.exec("target", &["/bin/true"]).await?;
            ours.push(began.elapsed().as_secs_f64() * 1e3);
            if code != 0 {
                bail!("/bin/true exited with {code}");
            }
            theirs.push(runc.exec(&beside)?.as_secs_f64() * 1e3);
            if let Some((id, crun)) = &crun {
                cruns.push(crun.exec(id)?.as_secs_f64() * 1e3);
            }
        }
        // The first round warms up.
        if round > 0 {
            report.add_round("gantry", ours);
            report.add_round("runc", theirs);
            report.add_round("crun", cruns);
        }
    }
    runc.delete(&beside)?;
    report.ratio("gantry", "runc");
    if let Some((id, crun)) = &crun {
        crun.delete(id)?;
        report.ratio("gantry", "crun");
    }
    let p50 = report.quantiles("gantry").map_or(f64::NAN, |q| q.p50);
    report.target("exec p50, ms", Bound::Max, 15.0, p50);
    api.delete_pod("target").await?;
    watch.deleted(1).await?;
    cluster.finish()?;
    Ok(report)
}
