//! The way from a wish to SIGKILL, all of it inside one grace period.
//!
//! ```text
//!      begin_stop          drained           hook done, or grace over      its turn, or grace over            grace over
//! No ─────────────► Drain ─────────► Hook ───────────────────────────► Turn ──────────────────────► Asked ──────────────► Killed ⟲
//!                     └─ no preStop ──────────────────────────────────┘        (SIGTERM)                 (SIGKILL)
//! ```
//! The grace period begins with the end of the drain (`drain.rs`).
//! When the pod ends, sidecars have their turn after everything they served, in reverse order.
//! Source: the kubelet's `killContainer` and `terminationOrdering`.

use super::*;

/// A SIGKILL is repeated at this pace while the container does not end (it may be in a D state).
const KILL_AGAIN: Duration = Duration::from_secs(5);
/// SIGKILL follows this long after SIGTERM when the node evicts a pod, as with the kubelet: what it
/// uses too much of is wanted back.
pub(super) const EVICTION_GRACE_S: u64 = 1;
/// What a container gets between SIGTERM and SIGKILL when hook or turn have used up the grace.
const GRACE_MIN: Duration = Duration::from_secs(2);

impl PodState {
    /// The node ends the pod. The first reason stays; what is ending anyway ends as it would have.
    pub(super) fn fail(
        &mut self,
        failed: Failed,
        grace_s: u64,
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        if self.failed.is_none() && self.phase == Phase::Syncing && !self.deleted {
            let message = failed.message.clone();
            actions.push(Action::Event(failed.reason, message, true));
            self.failed = Some(failed);
            self.shrink_grace(grace_s, now);
        }
    }

    /// When `spec.activeDeadlineSeconds` is over, on the worker's clock.
    pub(super) fn deadline_at(&self) -> Option<Duration> {
        let spec = self.pod.spec.as_ref()?;
        let seconds = spec.active_deadline_seconds?.max(0) as u64;
        Some(Duration::from_secs(seconds).saturating_sub(self.age))
    }

    pub(super) fn check_deadline(&mut self, now: Duration, actions: &mut Vec<Action>) {
        if self.deadline_at().is_some_and(|at| at <= now) {
            let words = "Pod was active on the node longer than the specified deadline";
            let failed = Failed {
                reason: "DeadlineExceeded",
                message: words.to_owned(),
                is_disruption: false,
            };
            self.fail(failed, self.grace_s, now, actions);
        }
    }

    pub(super) fn begin_termination(&mut self, actions: &mut Vec<Action>) {
        self.phase = Phase::Terminating;
        for index in 0..self.containers.len() {
            self.containers[index].ready = false;
            if self.containers[index].alive() {
                actions.push(Action::StopProbes(self.run_of(index)));
            }
        }
    }

    /// A grace period can shrink while it runs.
    pub(super) fn shrink_grace(&mut self, grace_s: u64, now: Duration) {
        self.grace_s = self.grace_s.min(grace_s);
        let end = now + Duration::from_secs(self.grace_s);
        for container in &mut self.containers {
            container.stop = container.stop.no_later_than(end);
        }
    }

    /// Asks a running container to stop; its exit then starts the next run.
    pub(super) fn stop_for_restart(
        &mut self,
        index: usize,
        words: String,
        grace_s: u64,
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        let run = self.run_of(index);
        let container = &mut self.containers[index];
        if !matches!(container.run, Run::Running { .. }) || container.stop != Stop::No {
            return;
        }
        container.ready = false;
        actions.push(Action::Event("Killing", words, false));
        actions.push(Action::StopProbes(run));
        self.begin_stop(index, grace_s, now, actions);
    }

    /// Somebody wants this container to stop; nothing changes when it is on its way already.
    pub(super) fn begin_stop(
        &mut self,
        index: usize,
        grace_s: u64,
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        let container = &self.containers[index];
        if !matches!(container.run, Run::Running { .. }) || container.stop != Stop::No {
            return;
        }
        match self.must_drain(grace_s, now, actions) {
            true => self.containers[index].stop = Stop::Drain(grace_s),
            false => self.ask_to_stop(index, grace_s, now, actions),
        }
    }

    /// The grace period begins.
    pub(super) fn ask_to_stop(
        &mut self,
        index: usize,
        grace_s: u64,
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        let run = self.run_of(index);
        let hook = self.config(&run.name).is_some_and(|c| {
            let hooks = c.lifecycle.as_ref();
            hooks.is_some_and(|l| l.pre_stop.is_some())
        });
        let container = &mut self.containers[index];
        let end = now + Duration::from_secs(grace_s);
        if hook && grace_s > 0 {
            container.stop = Stop::Hook(end);
            actions.push(Action::PreStop(run));
        } else {
            container.stop = Stop::Turn(end);
        }
    }

    pub(super) fn pre_stopped(
        &mut self,
        run: &ContainerRun,
        result: Result<(), String>,
        actions: &mut Vec<Action>,
    ) {
        let Some(index) = self.current(run) else {
            return;
        };
        let Stop::Hook(end) = self.containers[index].stop else {
            return;
        };
        self.containers[index].stop = Stop::Turn(end);
        if let Err(words) = result {
            let words = format!("preStop hook of container {}: {words}", run.name);
            actions.push(Action::Event("FailedPreStopHook", words, true));
        }
    }

    /// Takes every container on its way one step further.
    pub(super) fn advance_stops(&mut self, now: Duration, actions: &mut Vec<Action>) {
        for index in 0..self.containers.len() {
            let run = self.run_of(index);
            if !matches!(self.containers[index].run, Run::Running { .. }) {
                continue;
            }
            if let Stop::Hook(end) = self.containers[index].stop
                && end <= now
            {
                let words = format!(
                    "preStop hook of container {}: not done within the grace period",
                    run.name
                );
                actions.push(Action::Event("FailedPreStopHook", words, true));
                self.containers[index].stop = Stop::Turn(end);
            }
            if let Stop::Turn(end) = self.containers[index].stop
                && (end <= now || self.has_turn(index))
            {
                let least = GRACE_MIN.min(Duration::from_secs(self.grace_s));
                self.containers[index].stop = Stop::Asked(end.max(now + least));
                actions.push(Action::Stop(run.clone()));
            }
            if let Stop::Asked(at) | Stop::Killed(at) = self.containers[index].stop
                && at <= now
            {
                self.containers[index].stop = Stop::Killed(now + KILL_AGAIN);
                actions.push(Action::StopHooks(run.clone()));
                actions.push(Action::Kill(run));
            }
        }
    }

    /// While the pod goes on everyone has. At its end a sidecar waits for all main containers and for
    /// the sidecars after it.
    fn has_turn(&self, index: usize) -> bool {
        if self.phase == Phase::Syncing || self.containers[index].role != Role::Sidecar {
            return true;
        }
        let served = |(other, c): (usize, &Container)| match c.role {
            Role::Init | Role::Main => c.alive(),
            Role::Sidecar => other > index && c.alive(),
            Role::Ephemeral => false,
        };
        !self.containers.iter().enumerate().any(served)
    }

    pub(super) fn terminate(&mut self, now: Duration, actions: &mut Vec<Action>) {
        let end = now + Duration::from_secs(self.grace_s);
        for index in 0..self.containers.len() {
            self.begin_stop(index, self.grace_s, now, actions);
            let container = &mut self.containers[index];
            container.stop = container.stop.no_later_than(end);
        }
        let preparing = matches!(self.sandbox, Sandbox::Preparing { .. });
        if !preparing && !self.containers.iter().any(Container::alive) {
            self.phase = Phase::TearingDown;
            self.tear_down = TearDown::Due(now, 0);
        }
    }
}

impl Stop {
    /// The same step, but over at `end`.
    fn no_later_than(self, end: Duration) -> Self {
        match self {
            Self::Hook(at) => Self::Hook(at.min(end)),
            Self::Turn(at) => Self::Turn(at.min(end)),
            Self::Asked(at) => Self::Asked(at.min(end)),
            Self::No | Self::Drain(_) | Self::Killed(_) => self,
        }
    }

    /// When time alone moves it on.
    pub(super) fn due_at(self) -> Option<Duration> {
        match self {
            Self::No | Self::Drain(_) => None,
            Self::Hook(at) | Self::Turn(at) | Self::Asked(at) | Self::Killed(at) => Some(at),
        }
    }
}
