//! `connect()` to a Service beside `connect()` to the pod behind it, with one Service and 10,000.
//!
//! Client and server are single-threaded processes in the namespaces of two pods, on the same
//! processor. Direct, Service and direct again alternate in short bursts; the second direct shows
//! how much of a difference is noise.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use gantry_agent::ids::PodUid;
use gantry_agent::paths::Paths;
use serde_json::json;
use tokio::task::JoinSet;

use super::api::{Api, NAMESPACE, pod};
use super::probe::Probe;
use super::report::{Bound, Report};
use crate::cluster::{Cluster, Installation};

const SERVICE_COUNT: usize = 10_000;
const ROUND_COUNT: usize = 9;
/// Connections of each case in a round: bursts times burst.
const BURST_COUNT: usize = 50;
const BURST: usize = 50;
/// Requests that wait at the control plane at once.
const CREATE_CONCURRENCY: usize = 64;
const PROGRAM_TIMEOUT: Duration = Duration::from_secs(60);
const PROGRAM_PAUSE: Duration = Duration::from_millis(20);
const PORT: u16 = 8080;

pub(super) async fn run(installation: &Installation) -> Result<Report> {
    let cluster = Cluster::start(installation)?;
    let api = Api::connect().await?;
    api.create_namespace(NAMESPACE).await?;
    let mut watch = api.watch_pods().await?;
    let paths = Paths::standard(installation.bin.clone());
    let mut netns = Vec::new();
    let mut server_ip = String::new();
    for name in ["server", "client"] {
        api.create("pods", &pod(name, json!({"bench": name})))
            .await?;
        let start = watch.running(name).await?;
        let uid = PodUid::new(&start.uid).map_err(|e| anyhow::anyhow!("{e}"))?;
        netns.push(paths.namespaces(&uid).join("net").display().to_string());
        if name == "server" {
            server_ip = start.ip;
        }
    }
    let mut server = Probe::start(&["accept", &netns[0], &PORT.to_string()])?;
    server.line()?;
    let mut client = Probe::start(&["connect", &netns[1]])?;
    let direct = format!("{server_ip}:{PORT}");

    let mut report = Report::new("service_connect", "us");
    let one = create_service(&api, "one").await?;
    programmed(&mut client, std::slice::from_ref(&one)).await?;
    measure(&mut client, &mut report, "1", &direct, &one)?;

    let began = Instant::now();
    let many = create_many(&api).await?;
    report.count(
        "seconds to create 10000 services",
        began.elapsed().as_secs_f64(),
    );
    programmed(&mut client, &many).await?;
    report.count(
        "seconds until all 10000 answer",
        began.elapsed().as_secs_f64(),
    );
    // In the middle: neither first nor last in whatever order.
    let middle = many.get(SERVICE_COUNT / 2).context("no services")?;
    measure(&mut client, &mut report, "10000", &direct, middle)?;
    drop((client, server));
    cluster.finish()?;
    Ok(report)
}

/// A Service in front of the server pod; returns address and port.
async fn create_service(api: &Api, name: &str) -> Result<String> {
    let service = json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {"selector": {"bench": "server"}, "ports": [{"port": 80, "targetPort": PORT}]},
    });
    let created = api.create("services", &service).await?;
    let ip = created["spec"]["clusterIP"]
        .as_str()
        .context("no clusterIP")?;
    Ok(format!("{ip}:80"))
}

/// Enough Services that there are [`SERVICE_COUNT`] with the first.
async fn create_many(api: &Api) -> Result<Vec<String>> {
    let mut tasks = JoinSet::new();
    let mut addresses = Vec::with_capacity(SERVICE_COUNT);
    for number in 1..SERVICE_COUNT {
        if tasks.len() == CREATE_CONCURRENCY
            && let Some(created) = tasks.join_next().await
        {
            addresses.push(created??);
        }
        let api = api.clone();
        tasks.spawn(async move { create_service(&api, &format!("many-{number}")).await });
    }
    while let Some(created) = tasks.join_next().await {
        addresses.push(created??);
    }
    Ok(addresses)
}

/// Until each of them answers: a Service counts when its connections arrive.
async fn programmed(client: &mut Probe, addresses: &[String]) -> Result<()> {
    let began = Instant::now();
    for address in addresses {
        while let Err(error) = client.ask(&format!("connect {address} 1")) {
            if began.elapsed() > PROGRAM_TIMEOUT {
                bail!("after {} s: {error:#}", PROGRAM_TIMEOUT.as_secs());
            }
            tokio::time::sleep(PROGRAM_PAUSE).await;
        }
    }
    Ok(())
}

fn measure(
    client: &mut Probe,
    report: &mut Report,
    size: &str,
    direct: &str,
    service: &str,
) -> Result<()> {
    let cases = [
        ("direct", direct),
        ("service", service),
        ("direct2", direct),
    ];
    for _ in 0..ROUND_COUNT {
        let mut samples = [const { Vec::new() }; 3];
        for _ in 0..BURST_COUNT {
            for ((_, address), into) in cases.iter().zip(&mut samples) {
                let took = client.ask(&format!("connect {address} {BURST}"))?;
                into.extend(took.iter().map(|ns| ns / 1e3));
            }
        }
        for ((case, _), samples) in cases.iter().zip(samples) {
            report.add_round(&format!("{case}_{size}"), samples);
        }
    }
    let ratio = report.ratio(&format!("service_{size}"), &format!("direct_{size}"));
    report.ratio(&format!("direct2_{size}"), &format!("direct_{size}"));
    let what = format!("connect through ClusterIP / to the pod, p50, services: {size}");
    report.target(&what, Bound::Max, 1.02, ratio);
    Ok(())
}
