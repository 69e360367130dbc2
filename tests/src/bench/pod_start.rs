//! From the create of a pod to Running seen on a watch, beside `runc run` and bare processes.
//!
//! One by one, all kinds in turn: pod, `runc run` of `/bin/true`, `crun run` of it where crun runs, a
//! spawned static `true`, one in six namespaces of its own; every fifth time also
//! `runc run --detach` and, where they run, `podman run` and containerd's `ctr run`, all without a network. A round's pods stay until
//! its end, as on a node that fills up.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use super::Size;
use super::api::{Api, NAMESPACE, PodWatch, pod};
use super::containerd::Containerd;
use super::podman::Podman;
use super::probe::Probe;
use super::report::{Bound, Report};
use super::runc::{Runc, system_calls};
use crate::census;
use crate::cluster::{Cluster, Installation};

const ROUND_COUNT: usize = 5;
/// Pods of a round on a machine that is not slower than `BUDGET` allows.
const POD_COUNT_MAX: usize = 50;
const POD_COUNT_MIN: usize = 10;
/// All rounds together.
const BUDGET: Duration = Duration::from_secs(130);
/// Starts before the first round: caches fill, pages are read.
const WARM_UP_COUNT: usize = 3;
const DETACHED_EVERY: usize = 5;
/// Pods under strace.
const TRACED_COUNT: usize = 5;
/// From starting strace to all threads being traced.
const ATTACH: Duration = Duration::from_millis(1500);

struct Bench {
    api: Api,
    watch: PodWatch,
    runc: Runc,
    crun: Option<Runc>,
    podman: Option<Podman>,
    containerd: Option<Containerd>,
    floor: Probe,
    static_true: String,
}

pub(super) async fn run(installation: &Installation, size: Size) -> Result<Report> {
    let cluster = Cluster::start(installation)?;
    let api = Api::connect().await?;
    api.create_namespace(NAMESPACE).await?;
    let runc = Runc::prepare(installation, "runc")?;
    let mut bench = Bench {
        watch: api.watch_pods().await?,
        api,
        static_true: runc.static_true()?.display().to_string(),
        crun: crun(installation),
        podman: Podman::prepare(&runc),
        containerd: Containerd::prepare(&runc),
        runc,
        floor: Probe::start(&["floor"])?,
    };
    let mut report = Report::new("pod_start", "ms");
    bench.rounds(&mut report, size).await?;
    // Timelines before strace slows everything.
    bench.timelines(&mut report).await?;
    bench.count_system_calls(&mut report, size).await?;
    for by in [
        "runc",
        "crun",
        "podman",
        "containerd",
        "runc_detached",
        "clone",
        "spawn",
    ] {
        if report.quantiles(by).is_none() {
            continue;
        }
        let ratio = report.ratio("gantry", by);
        if by == "runc" {
            report.target("gantry/runc p50", Bound::Max, 0.5, ratio);
        }
    }
    cluster.finish()?;
    Ok(report)
}

/// None, with the reason told, where crun is missing or refuses this machine's cgroups.
pub(super) fn crun(installation: &Installation) -> Option<Runc> {
    let tried = Runc::prepare(installation, "crun").and_then(|mut crun| {
        crun.run()?;
        Ok(crun)
    });
    tried
        .inspect_err(|error| eprintln!("skipped: crun: {error:#}"))
        .ok()
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

#[derive(Default)]
struct Samples {
    gantry: Vec<f64>,
    runc: Vec<f64>,
    crun: Vec<f64>,
    podman: Vec<f64>,
    containerd: Vec<f64>,
    runc_detached: Vec<f64>,
    spawn: Vec<f64>,
    clone: Vec<f64>,
}

impl Bench {
    async fn rounds(&mut self, report: &mut Report, size: Size) -> Result<()> {
        let mut unused = Report::new("warm-up", "ms");
        let mut samples = Samples::default();
        for number in 0..WARM_UP_COUNT {
            self.turn(&format!("warm-{number}"), true, &mut samples, &mut unused)
                .await?;
        }
        self.delete("warm", WARM_UP_COUNT).await?;
        let began = Instant::now();
        let mut turn_count = 0u32;
        let round_count = size.of(ROUND_COUNT);
        for round in 0..round_count {
            let count = round_size(began.elapsed(), turn_count, round_count - round);
            let count = size.of(count);
            let mut samples = Samples::default();
            for number in 0..count {
                let detached = number % DETACHED_EVERY == 0;
                let name = format!("pod-{round}-{number}");
                self.turn(&name, detached, &mut samples, report).await?;
                turn_count += 1;
            }
            report.add_round("gantry", samples.gantry);
            report.add_round("runc", samples.runc);
            report.add_round("crun", samples.crun);
            report.add_round("podman", samples.podman);
            report.add_round("containerd", samples.containerd);
            report.add_round("runc_detached", samples.runc_detached);
            report.add_round("spawn", samples.spawn);
            report.add_round("clone", samples.clone);
            self.delete(&format!("pod-{round}"), count).await?;
        }
        report.count("pods", f64::from(turn_count));
        Ok(())
    }

    /// One of each.
    async fn turn(
        &mut self,
        name: &str,
        detached: bool,
        samples: &mut Samples,
        report: &mut Report,
    ) -> Result<()> {
        let object = pod(name, json!({}));
        let began = Instant::now();
        self.api.create("pods", &object).await?;
        let created = began.elapsed();
        let start = self.watch.running(name).await?;
        samples.gantry.push(ms(start.running_at - began));
        report.add_phase("1 create answered", ms(created));
        report.add_phase("2 bound seen after", ms(start.bound_at - began));
        report.add_phase(
            "3 from bound to running seen",
            ms(start.running_at - start.bound_at),
        );
        // The agent has still to write an event; the others must not pay for it.
        tokio::time::sleep(Duration::from_millis(20)).await;
        samples.runc.push(ms(self.runc.run()?));
        if let Some(crun) = &mut self.crun {
            samples.crun.push(ms(crun.run()?));
        }
        if detached {
            samples.runc_detached.push(ms(self.runc.run_detached()?));
            if let Some(podman) = &self.podman {
                samples.podman.push(ms(podman.run()?));
            }
            if let Some(containerd) = &mut self.containerd {
                samples.containerd.push(ms(containerd.run()?));
            }
        }
        for (kind, into) in [("spawn", &mut samples.spawn), ("clone", &mut samples.clone)] {
            let took = self.floor.ask(&format!("{kind} {}", self.static_true))?;
            into.extend(took.iter().map(|ns| ns / 1e6));
        }
        Ok(())
    }

    async fn delete(&mut self, prefix: &str, count: usize) -> Result<()> {
        for number in 0..count {
            self.api.delete_pod(&format!("{prefix}-{number}")).await?;
        }
        self.watch.deleted(count).await
    }

    /// Medians of the phases that the agent tells in each pod's event.
    async fn timelines(&mut self, report: &mut Report) -> Result<()> {
        for message in self.api.event_messages("Timeline").await? {
            for (phase, took) in phases(&message) {
                report.add_phase(&format!("agent: {phase}"), took);
            }
        }
        Ok(())
    }

    /// System calls of control plane, agent, shim, runtime helper and container for one pod, beside
    /// those of `runc run`. Nothing is counted where strace is missing or may not trace.
    async fn count_system_calls(&mut self, report: &mut Report, size: Size) -> Result<()> {
        let Ok(mut strace) = Strace::start() else {
            eprintln!("skipped: system calls are not counted without strace");
            return Ok(());
        };
        tokio::time::sleep(ATTACH).await;
        let traced_count = size.of(TRACED_COUNT);
        for number in 0..traced_count {
            let name = format!("traced-{number}");
            self.api.create("pods", &pod(&name, json!({}))).await?;
            self.watch.running(&name).await?;
        }
        let calls = strace.end()?;
        report.count("system calls per pod", calls / traced_count as f64);
        self.delete("traced", traced_count).await?;
        report.count("system calls per runc run", self.runc.system_calls()?);
        Ok(())
    }
}

/// Pods of the next round, so that all rounds fit into the budget.
fn round_size(elapsed: Duration, turn_count: u32, rounds_left: usize) -> usize {
    if turn_count == 0 {
        return POD_COUNT_MAX;
    }
    let turn = elapsed / turn_count;
    let left = BUDGET.saturating_sub(elapsed) / rounds_left.max(1) as u32;
    let fits = left.as_micros() / turn.as_micros().max(1);
    usize::try_from(fits)
        .unwrap_or(POD_COUNT_MAX)
        .clamp(POD_COUNT_MIN, POD_COUNT_MAX)
}

/// `running after 31.0 ms: network 3.1, volumes 0.4`.
fn phases(message: &str) -> Vec<(String, f64)> {
    let Some((total, parts)) = message.split_once(": ") else {
        return Vec::new();
    };
    let total = total
        .strip_prefix("running after ")
        .and_then(|t| t.strip_suffix(" ms"));
    let total = total.map(|t| format!("total {t}"));
    total
        .iter()
        .map(String::as_str)
        .chain(parts.split(", "))
        .filter_map(|part| {
            let (name, took) = part.rsplit_once(' ')?;
            Some((name.to_owned(), took.parse().ok()?))
        })
        .collect()
}

/// strace on the control plane and the agent, and all that they start.
struct Strace {
    child: Child,
    table: tempfile::NamedTempFile,
}

impl Strace {
    fn start() -> Result<Self> {
        let table = tempfile::NamedTempFile::new()?;
        let mut strace = Command::new("strace");
        strace.args(["-f", "-c", "-o"]).arg(table.path());
        for (pid, name) in census::processes() {
            if name == "gantry-control" || name == "gantry-agent" {
                strace.arg("-p").arg(pid.to_string());
            }
        }
        strace.stdin(Stdio::null()).stderr(Stdio::null());
        let child = strace.spawn().context("start strace")?;
        Ok(Self { child, table })
    }

    /// Detaches and counts.
    fn end(&mut self) -> Result<f64> {
        kill(
            Pid::from_raw(i32::try_from(self.child.id())?),
            Signal::SIGINT,
        )?;
        self.child.wait()?;
        Ok(system_calls(&std::fs::read_to_string(self.table.path())?))
    }
}

impl Drop for Strace {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timeline_is_read_back() {
        let told = phases("running after 31.5 ms: network 3.1, create 15.0");
        let wanted = [("total", 31.5), ("network", 3.1), ("create", 15.0)];
        assert_eq!(told, wanted.map(|(name, took)| (name.to_owned(), took)));
        assert!(phases("something else").is_empty());
    }

    #[test]
    fn slow_machines_get_smaller_rounds_and_never_too_small_ones() {
        assert_eq!(round_size(Duration::ZERO, 0, 5), POD_COUNT_MAX);
        assert_eq!(round_size(Duration::from_secs(10), 50, 4), POD_COUNT_MAX);
        assert_eq!(round_size(Duration::from_secs(50), 50, 4), 20);
        assert_eq!(round_size(Duration::from_secs(500), 50, 4), POD_COUNT_MIN);
    }
}
