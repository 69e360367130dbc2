//! What five hundred pods cost a node that does nothing: memory beside the pods' own, and processor
//! time.
//!
//! Overhead is what the node's programs and the kernel need *for* a pod: shims (PSS), what the agent
//! has grown by, and the kernel's memory that is charged to the pods' and shims' cgroups. The
//! workload's own pages are no overhead. Beside it stands what podman keeps per container (conmon).

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::api::{Api, NAMESPACE};
use super::full_node;
use super::memory::{of_kernel_mib, of_programs_mib};
use super::podman::Podman;
use super::report::{Bound, Report};
use super::runc::Runc;
use crate::census;
use crate::cluster::Installation;

const ROUND_COUNT: usize = 5;
/// After the last pod: statuses are reported, events written, start-up's memory is given back.
const SETTLE: Duration = Duration::from_secs(15);
/// Over which processor time is measured: long enough for what is done every ten seconds.
const ROUND: Duration = Duration::from_secs(10);
const PEER_COUNT: usize = 5;

pub(super) async fn run(installation: &Installation) -> Result<Report> {
    let count = full_node::pod_count()?;
    let cluster = full_node::start(installation, count)?;
    let api = Api::connect().await?;
    api.create_namespace(NAMESPACE).await?;
    let mut watch = api.watch_pods().await?;
    // The first pods make what all share: filters, ready namespaces, connections.
    let first: Vec<String> = (0..5).map(|n| format!("first-{n}")).collect();
    full_node::fill(&api, &mut watch, &first).await?;
    full_node::empty(&api, &mut watch, &first).await?;
    tokio::time::sleep(SETTLE).await;
    let (agent_before, kernel_before) = (of_programs_mib("gantry-agent")?, of_kernel_mib());
    let names: Vec<String> = (0..count).map(|n| format!("pod-{n}")).collect();
    full_node::fill(&api, &mut watch, &names).await?;
    tokio::time::sleep(SETTLE).await;
    let mut report = Report::new("density", "MiB");
    report.count("pods", count as f64);
    let mut idle = Vec::new();
    for _ in 0..ROUND_COUNT {
        let (began, ticks) = (Instant::now(), ticks_of("gantry-agent")?);
        tokio::time::sleep(ROUND).await;
        let spent = (ticks_of("gantry-agent")? - ticks) / ticks_per_second();
        idle.push(100.0 * spent / began.elapsed().as_secs_f64());
        let agent = of_programs_mib("gantry-agent")?;
        let shims = of_programs_mib("gantry-shim")? / count as f64;
        let grown = (agent - agent_before).max(0.0) / count as f64;
        let kernel = match (of_kernel_mib(), kernel_before) {
            (Some(now), Some(before)) => Some((now - before).max(0.0) / count as f64),
            _ => None,
        };
        report.add_round("agent", vec![agent]);
        report.add_round("shim per pod", vec![shims]);
        report.add_round("agent's growth per pod", vec![grown]);
        // Where the kernel does not tell its part, the whole is not known either.
        if let Some(kernel) = kernel {
            report.add_round("kernel per pod", vec![kernel]);
            report.add_round("overhead per pod", vec![shims + grown + kernel]);
        }
    }
    targets(&mut report, count, &idle);
    // A new one: a minute in which nothing was said may have ended the first.
    let mut watch = api.watch_pods().await?;
    full_node::empty(&api, &mut watch, &names).await?;
    peers(installation, &mut report)?;
    cluster.finish()?;
    Ok(report)
}

fn targets(report: &mut Report, count: usize, idle: &[f64]) {
    let idle = super::report::median(idle).unwrap_or(f64::NAN);
    report.count("idle agent, percent of a core", idle);
    let p50 = |case: &str| report.quantiles(case).map_or(f64::NAN, |q| q.p50);
    let (overhead, agent) = (p50("overhead per pod"), p50("agent"));
    let with = |what: &str| format!("{what} with {count} pods");
    let what = with("overhead per pod, MiB,");
    report.target(&what, Bound::Max, 0.5, overhead);
    report.target(&with("PSS of the agent, MiB,"), Bound::Max, 48.0, agent);
    let what = with("idle agent, percent of a core,");
    report.target(&what, Bound::Max, 1.0, idle);
}

/// What stays in memory for a container that others have started, where they run.
fn peers(installation: &Installation, report: &mut Report) -> Result<()> {
    let runc = Runc::prepare(installation, "runc")?;
    let Some(podman) = Podman::prepare(&runc) else {
        return Ok(());
    };
    let before = of_others_mib("conmon")?;
    let started: Result<Vec<String>> = (0..PEER_COUNT).map(|_| podman.start()).collect();
    let after = of_others_mib("conmon")?;
    podman.remove_all()?;
    started?;
    let each = (after - before) / PEER_COUNT as f64;
    report.add_round("conmon per podman container", vec![each]);
    Ok(())
}

/// The proportional set sizes of all processes that call themselves so.
fn of_others_mib(name: &str) -> Result<f64> {
    let mut sum = 0.0;
    for entry in std::fs::read_dir("/proc")?.flatten() {
        let comm = std::fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        if comm.trim_end() == name {
            let rollup = std::fs::read_to_string(entry.path().join("smaps_rollup"));
            // One that has ended meanwhile has none.
            sum += super::memory::pss_kib(&rollup.unwrap_or_default()).unwrap_or(0.0) / 1024.0;
        }
    }
    Ok(sum)
}

/// Processor time of all processes of ours of this name, user and system.
fn ticks_of(name: &str) -> Result<f64> {
    let mut ours = census::processes();
    ours.retain(|(_, n)| n == name);
    if ours.is_empty() {
        bail!("no {name} of this cluster runs: its processor time cannot be measured");
    }
    let mut sum = 0.0;
    for (pid, _) in ours {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
        sum += ticks(&stat).with_context(|| format!("/proc/{pid}/stat: {stat:?}"))?;
    }
    Ok(sum)
}

/// utime and stime: the 14th and 15th field; the second may hold spaces and brackets.
fn ticks(stat: &str) -> Option<f64> {
    let (_, rest) = stat.rsplit_once(") ")?;
    let mut fields = rest.split(' ').skip(11);
    let (user, system) = (fields.next()?, fields.next()?);
    Some(user.parse::<f64>().ok()? + system.parse::<f64>().ok()?)
}

fn ticks_per_second() -> f64 {
    let ticks = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK);
    ticks.ok().flatten().map_or(100.0, |n| n as f64)
}

#[cfg(test)]
mod tests {
    #[test]
    fn processor_time_is_found_behind_any_name() {
        let stat = "7 (a b) c) S 1 7 7 0 -1 4194560 100 0 0 0 30 12 0 0 20 0 5 0 99 0 0";
        assert_eq!(super::ticks(stat), Some(42.0));
        assert_eq!(super::ticks("7 (a"), None);
    }
}
