//! Probes: checks of running containers, and the thresholds they must cross.
//!
//! ```text
//!            startup succeeds                 threshold crossed
//! Startup ─────────────────► Live ──────────────────────────────► Input::Probe
//!            (or none)       liveness and readiness side by side
//! ```
//! The counters ([`Threshold`]) are pure. One task per container probes; it ends with the run. No
//! probe has a thread, and at most [`Limits`] are under way at once, so thousands cost what their
//! checks cost. The time that a probe waits for its turn does not count against its timeout.
//!
//! A restarted agent goes on where the last one stood: the verdict that is known is not reported
//! again, and failures in a row are counted on (`records::Probed`).

use std::sync::Arc;
use std::time::Duration;

use gantry_api::k8s_openapi::api::core::v1::Probe;
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::check::Target;
use super::records::Probed;
use super::state::{Input, ProbeKind};
use super::worker::{Inputs, Message};

/// Connections of probes open at once on this node.
const NETWORK_COUNT_MAX: usize = 256;
/// Commands of probes running at once on this node: each costs processes.
const COMMAND_COUNT_MAX: usize = 16;

/// How many checks of this node are under way.
pub struct Limits {
    network: Semaphore,
    commands: Semaphore,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            network: Semaphore::new(NETWORK_COUNT_MAX),
            commands: Semaphore::new(COMMAND_COUNT_MAX),
        }
    }
}

/// A probe's verdicts become a change only after so many in a row.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Threshold {
    success: u32,
    failure: u32,
    streak: u32,
    streak_healthy: bool,
    reported: Option<bool>,
}

impl Threshold {
    /// `reported` is what is known already: a restarted agent reports no change that is none.
    /// `against` are the verdicts in a row that spoke against it.
    pub fn new(probe: &Probe, reported: Option<bool>, against: u32) -> Self {
        let at_least_one = |n: Option<i32>, default: i32| n.unwrap_or(default).max(1) as u32;
        Self {
            success: at_least_one(probe.success_threshold, 1),
            failure: at_least_one(probe.failure_threshold, 3),
            streak: against,
            streak_healthy: reported == Some(false),
            reported,
        }
    }

    /// Takes one verdict; returns the new state when a threshold is crossed.
    pub fn take(&mut self, healthy: bool) -> Option<bool> {
        if healthy == self.streak_healthy {
            self.streak = self.streak.saturating_add(1);
        } else {
            self.streak_healthy = healthy;
            self.streak = 1;
        }
        let needed = if healthy { self.success } else { self.failure };
        if self.streak < needed || self.reported == Some(healthy) {
            return None;
        }
        self.reported = Some(healthy);
        Some(healthy)
    }

    /// Verdicts in a row that speak against what is reported: what an agent restart must not lose.
    pub fn against(&self) -> u32 {
        let confirms = match self.reported {
            Some(reported) => reported == self.streak_healthy,
            // Nothing is known (startup): only failures lead anywhere.
            None => self.streak_healthy,
        };
        if confirms { 0 } else { self.streak }
    }
}

/// Where and with what a container's probes work.
pub struct Prober {
    /// The container.
    pub target: Target,
    /// Verdicts, failures and counters go here.
    pub inputs: Inputs,
    /// Shared by all probes of the node.
    pub limits: Arc<Limits>,
    /// What is known already; from before an agent restart when `adopted`.
    pub known: Probed,
    /// When the container was started.
    pub began: Instant,
    /// The container runs since before this agent: no initial delay, and no crowd at the start.
    pub adopted: bool,
}

impl Prober {
    /// Probes until the run ends (the task is aborted) or the receiver is gone.
    pub async fn watch(self) {
        let config = &self.target.config;
        if let Some(probe) = &config.startup_probe
            && !self.known.started
        {
            self.repeat(probe, ProbeKind::Startup, None).await;
        }
        let liveness = async {
            if let Some(probe) = &config.liveness_probe {
                self.repeat(probe, ProbeKind::Liveness, Some(true)).await;
            }
        };
        let readiness = async {
            if let Some(probe) = &config.readiness_probe {
                let known = Some(self.known.ready);
                self.repeat(probe, ProbeKind::Readiness, known).await;
            }
        };
        tokio::join!(liveness, readiness);
    }

    async fn repeat(&self, probe: &Probe, kind: ProbeKind, known: Option<bool>) {
        let seconds =
            |n: Option<i32>, default: i32| Duration::from_secs(n.unwrap_or(default).max(0) as u64);
        let period = seconds(probe.period_seconds, 10).max(Duration::from_secs(1));
        let mut threshold = Threshold::new(probe, known, self.known.against(kind));
        if self.adopted {
            // All pods of the node are adopted in the same instant.
            sleep(period.mul_f64(rand::random())).await;
        } else {
            // Counted from the container's start, not from the end of the startup probe.
            sleep_until(self.began + seconds(probe.initial_delay_seconds, 0)).await;
        }
        let mut told = threshold.against();
        loop {
            let began = Instant::now();
            let verdict = self.check(probe).await;
            if let Err(words) = &verdict {
                // A full channel only means that the worker has other news to take first.
                let _ = self
                    .inputs
                    .try_send(Box::new(Message::Unhealthy(kind, words.clone())));
            }
            let change = threshold.take(verdict.is_ok());
            if let Some(healthy) = change {
                let input = Input::Probe(self.target.run.clone(), kind, healthy);
                let sent = self.inputs.send(Box::new(Message::Input(input))).await;
                if sent.is_err() || (kind == ProbeKind::Startup && healthy) {
                    return;
                }
            }
            let against = threshold.against();
            let counted = Message::Counted(self.target.run.clone(), kind, against);
            if against != told && self.inputs.try_send(Box::new(counted)).is_ok() {
                told = against;
            }
            sleep(period.saturating_sub(began.elapsed())).await;
        }
    }

    /// One check in its turn: healthy, or the words of the failure.
    async fn check(&self, probe: &Probe) -> Result<(), String> {
        let limit = probe.timeout_seconds.unwrap_or(1).max(1) as u64;
        let turns = match probe.exec {
            Some(_) => &self.limits.commands,
            None => &self.limits.network,
        };
        let _turn = turns.acquire().await.map_err(|e| e.to_string())?;
        match timeout(Duration::from_secs(limit), self.look(probe)).await {
            Ok(verdict) => verdict,
            Err(_) => Err(format!("no answer within {limit} s")),
        }
    }

    async fn look(&self, probe: &Probe) -> Result<(), String> {
        if let Some(exec) = &probe.exec {
            return self
                .target
                .exec(exec.command.clone().unwrap_or_default())
                .await;
        }
        if let Some(get) = &probe.http_get {
            let status = self.target.http(get).await?;
            if (200..400).contains(&status) {
                return Ok(());
            }
            return Err(format!("HTTP probe failed with statuscode: {status}"));
        }
        if let Some(tcp) = &probe.tcp_socket {
            return self.target.tcp(tcp).await;
        }
        if let Some(grpc) = &probe.grpc {
            return self.target.grpc(grpc).await;
        }
        Err("the probe names no exec, grpc, httpGet or tcpSocket".into())
    }
}

#[cfg(test)]
#[path = "probes_tests.rs"]
mod tests;
