//! What one pod worker decides: from an API object to running containers and back to nothing.
//!
//! ```text
//!   spec           deleted, every container ended     none alive          sandbox, volumes freed, and deleted
//! ──────► Syncing ──────────────────────────► Terminating ────► TearingDown ────► Terminated ──────► Finished
//!          ▲  │ spec, exit, probe, timer         ▲  │ grace        ▲  │ retry         (object still there)
//!          └──┘                                  └──┘              └──┘
//! ```
//! One task per pod UID (`worker.rs`) owns this state: no lock, no second writer. Work in flight is
//! part of the state (`Sandbox::Preparing`, `Run::Starting`), so [`PodState::advance`] is
//! idempotent: it looks at what is and asks for what is missing.
//!
//! Invariants, checked by `tests::any_history_keeps_the_rules`: phases only move right; nothing is
//! started after Syncing; one start in flight per container; a run number is started once; a grace
//! period can shrink, never grow. Source of the phases: the kubelet's pod workers.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use gantry_api::k8s_openapi::api::core::v1::{Container as ContainerConfig, ContainerStatus, Pod};
use gantry_api::k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::backoff::Backoff;
use crate::ids::{ContainerRun, PodUid};
use crate::network::PodNetwork;
use crate::runtime::{Exit, ObservedContainer};

/// How long a failed sandbox, or a tear-down, waits before the next try; doubles to 64 s.
const RETRY_FIRST: Duration = Duration::from_secs(1);
/// A SIGKILL is repeated at this pace while the container does not end (it may be in a D state).
const KILL_AGAIN: Duration = Duration::from_secs(5);

/// SIGKILL follows this long after SIGTERM when the node ends a pod, as with the kubelet's
/// evictions: what it uses too much of is wanted back.
const FAIL_GRACE_S: u64 = 1;

/// Where the worker stands. Ordered: it only moves right.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Phase {
    /// Making the pod run.
    Syncing,
    /// Stopping its containers.
    Terminating,
    /// No container is alive; removing sandbox, layers and volumes.
    TearingDown,
    /// Nothing of it is left on the machine; the API object may still exist.
    Terminated,
    /// The object is deleted too: the worker ends.
    Finished,
}

/// The pod's namespaces, network, volumes and shim.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Sandbox {
    /// Not there; `retry_at` after a failure.
    Absent {
        /// Not before this.
        retry_at: Duration,
        /// Failures in a row.
        failures: u32,
        /// The last failure's reason and words, for the status.
        failure: Option<(String, String)>,
    },
    /// Being made; so many tries failed before.
    Preparing {
        /// Failures in a row.
        failures: u32,
    },
    /// There, with these addresses.
    Ready(PodNetwork),
}

/// What one container is doing.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Run {
    /// Not running.
    Waiting {
        /// Kubernetes' reason: ContainerCreating, PodInitializing, CrashLoopBackOff, ErrImagePull...
        reason: String,
        /// The words behind it.
        message: String,
        /// Started not before this.
        retry_at: Duration,
    },
    /// Image, root file system and process are being made.
    Starting,
    /// Init runs.
    Running {
        /// Wall clock, for people.
        started_at: SystemTime,
        /// The worker's clock, for decisions.
        since: Duration,
    },
    /// Ended, and not (yet) to be started again.
    Exited(Exit),
}

/// One container of the pod.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Container {
    /// `spec.containers[].name` or `spec.initContainers[].name`.
    pub name: String,
    /// An init container: runs to completion before the ones after it.
    pub init: bool,
    /// The current run, or the next one while waiting; equals the restart count once started.
    pub attempt: u32,
    /// What it is doing.
    pub run: Run,
    /// The run before the current one.
    pub last_exit: Option<(u32, Exit)>,
    /// Restart back-off.
    pub backoff: Backoff,
    /// Digest of the image that the current run was made from.
    pub image_id: String,
    /// Readiness probe's verdict; without one: running.
    pub ready: bool,
    /// Startup probe's verdict; without one: running.
    pub started: bool,
    /// How far its stop has come.
    pub stop: Stop,
}

/// The way from SIGTERM to SIGKILL.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stop {
    /// Nobody asked.
    No,
    /// SIGTERM was sent; SIGKILL at this time.
    Asked(Duration),
    /// SIGKILL was sent; again at this time.
    Killed(Duration),
}

/// Everything one worker knows.
#[derive(Clone, PartialEq, Debug)]
pub struct PodState {
    /// The pod.
    pub uid: PodUid,
    /// The newest spec.
    pub pod: Arc<Pod>,
    /// Where the worker stands.
    pub phase: Phase,
    /// The sandbox.
    pub sandbox: Sandbox,
    /// Init containers in order, then the others in order.
    pub containers: Vec<Container>,
    /// The API object is being deleted, or gone.
    pub deleted: bool,
    /// Seconds granted from SIGTERM to SIGKILL; shrinks only.
    pub grace_s: u64,
    /// A tear-down is in flight, or retried at that time.
    pub tear_down: TearDown,
    /// The node has ended the pod: reason and words of its status.
    pub failed: Option<(&'static str, String)>,
}

/// Progress of the tear-down.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TearDown {
    /// To be asked for, not before this.
    Due(Duration, u32),
    /// Asked for.
    InFlight,
}

/// Which probe spoke.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ProbeKind {
    /// Until it succeeds the others wait; its failure restarts the container.
    Startup,
    /// Its failure restarts the container.
    Liveness,
    /// Gates Services.
    Readiness,
}

/// What happened.
#[derive(Clone, PartialEq, Debug)]
pub enum Input {
    /// The newest object; with a deletionTimestamp: stop.
    Spec(Arc<Pod>),
    /// The object is gone without our release (forced deletion): stop at once.
    Gone,
    /// Found on the machine at agent start; comes first or not at all.
    Observed(Vec<ObservedContainer>),
    /// The sandbox is there.
    SandboxReady(PodNetwork),
    /// The sandbox could not be made: reason and words.
    SandboxFailed(String, String),
    /// What the sandbox waits for (a ConfigMap) may be there now: try at once.
    Retry,
    /// The container's init runs.
    Started {
        /// Which run.
        run: ContainerRun,
        /// Wall clock.
        at: SystemTime,
        /// Image digest.
        image_id: String,
    },
    /// The run could not be started: reason and words.
    StartFailed(ContainerRun, String, String),
    /// Init ended.
    Exited(ContainerRun, Exit),
    /// The node ends the pod (`Evicted`): reason and words. It is Failed when it has stopped.
    Fail(&'static str, String),
    /// A probe crossed its threshold.
    Probe(ContainerRun, ProbeKind, bool),
    /// The run has to end and start anew: why.
    Restart(ContainerRun, String),
    /// Sandbox, layers and volumes are gone.
    TornDown,
    /// Something is left; it is tried again.
    TearDownFailed,
    /// Time has passed.
    Timer,
}

/// What to do. Each is idempotent.
#[derive(Clone, PartialEq, Debug)]
pub enum Action {
    /// Make namespaces, network, volumes, cgroup and shim.
    PrepareSandbox,
    /// Make image, root file system and process of this run.
    Start(ContainerRun),
    /// Watch the running container with its probes.
    StartProbes(ContainerRun),
    /// No more probes of this container.
    StopProbes(ContainerRun),
    /// SIGTERM (or the image's stop signal).
    Stop(ContainerRun),
    /// SIGKILL to everything in its cgroup.
    Kill(ContainerRun),
    /// Remove sandbox, layers, volumes.
    TearDown,
    /// Tell the user: reason, words, is it a warning.
    Event(&'static str, String, bool),
}

impl PodState {
    /// The state of a pod nothing is known of yet.
    pub fn new(uid: PodUid, pod: Arc<Pod>) -> Self {
        let spec = pod.spec.clone().unwrap_or_default();
        let one = |config: &ContainerConfig, init: bool| Container {
            name: config.name.clone(),
            init,
            attempt: 0,
            run: Run::Waiting {
                reason: if init || spec.init_containers.iter().flatten().next().is_none() {
                    "ContainerCreating".into()
                } else {
                    "PodInitializing".into()
                },
                message: String::new(),
                retry_at: Duration::ZERO,
            },
            last_exit: None,
            backoff: Backoff::default(),
            image_id: String::new(),
            ready: false,
            started: false,
            stop: Stop::No,
        };
        let containers = spec
            .init_containers
            .iter()
            .flatten()
            .map(|c| one(c, true))
            .chain(spec.containers.iter().map(|c| one(c, false)))
            .collect();
        let grace_s = spec_grace_s(&pod);
        Self {
            uid,
            pod,
            phase: Phase::Syncing,
            sandbox: Sandbox::Absent {
                retry_at: Duration::ZERO,
                failures: 0,
                failure: None,
            },
            containers,
            deleted: false,
            grace_s,
            tear_down: TearDown::Due(Duration::ZERO, 0),
            failed: None,
        }
    }

    /// The pod has ended for good in an earlier life of the agent: nothing is ever started again.
    pub fn ended(uid: PodUid, pod: Arc<Pod>) -> Self {
        let mut state = Self::new(uid, pod);
        // Left-overs of the life before are removed first.
        state.phase = Phase::TearingDown;
        state
    }

    /// The configuration of a container.
    pub fn config(&self, name: &str) -> Option<&ContainerConfig> {
        let spec = self.pod.spec.as_ref()?;
        spec.init_containers
            .iter()
            .flatten()
            .chain(&spec.containers)
            .find(|c| c.name == name)
    }

    fn restart_policy(&self) -> &str {
        self.pod
            .spec
            .as_ref()
            .and_then(|s| s.restart_policy.as_deref())
            .unwrap_or("Always")
    }

    fn run_of(&self, index: usize) -> ContainerRun {
        let container = &self.containers[index];
        ContainerRun {
            pod: self.uid.clone(),
            name: container.name.clone(),
            attempt: container.attempt,
        }
    }

    /// The container whose current run this is; none when the message is about an older run.
    fn current(&mut self, run: &ContainerRun) -> Option<usize> {
        let found = |c: &Container| c.name == run.name && c.attempt == run.attempt;
        self.containers.iter().position(found)
    }

    /// Takes one input and returns what to do, in order. `now` is the worker's monotonic clock.
    pub fn next(&mut self, input: Input, now: Duration) -> Vec<Action> {
        let mut actions = Vec::new();
        match input {
            Input::Spec(pod) => self.take_spec(pod, &mut actions),
            Input::Gone => {
                self.deleted = true;
                self.shrink_grace(0, now);
            }
            Input::Observed(found) => self.adopt(found, now, &mut actions),
            Input::SandboxReady(network) => self.sandbox = Sandbox::Ready(network),
            Input::SandboxFailed(reason, message) => {
                self.sandbox_failed(reason, message, now, &mut actions);
            }
            Input::Retry => {
                if let Sandbox::Absent { retry_at, .. } = &mut self.sandbox {
                    *retry_at = now;
                }
            }
            Input::Started { run, at, image_id } => {
                self.container_started(&run, at, image_id, now, &mut actions);
            }
            Input::StartFailed(run, reason, message) => {
                self.start_failed(&run, reason, message, now, &mut actions);
            }
            Input::Exited(run, exit) => self.container_exited(&run, exit, now, &mut actions),
            Input::Probe(run, kind, healthy) => {
                self.probed(&run, kind, healthy, now, &mut actions);
            }
            Input::Restart(run, words) => {
                if let Some(index) = self.current(&run) {
                    self.stop_for_restart(index, words, now, &mut actions);
                }
            }
            Input::Fail(reason, message) => self.fail(reason, message, now, &mut actions),
            Input::TornDown => {
                if self.phase == Phase::TearingDown {
                    self.phase = Phase::Terminated;
                }
            }
            Input::TearDownFailed => {
                let failures = match self.tear_down {
                    TearDown::Due(_, failures) => failures,
                    TearDown::InFlight => 0,
                };
                self.tear_down = TearDown::Due(now + retry_wait(failures), failures + 1);
            }
            Input::Timer => {}
        }
        self.advance(now, &mut actions);
        actions
    }

    fn take_spec(&mut self, pod: Arc<Pod>, actions: &mut Vec<Action>) {
        let metadata = &pod.metadata;
        if metadata.deletion_timestamp.is_some() {
            let grace = metadata.deletion_grace_period_seconds.unwrap_or(30).max(0) as u64;
            if !self.deleted && self.phase == Phase::Syncing {
                for container in self.containers.iter().filter(|c| c.alive()) {
                    let words = format!("Stopping container {}", container.name);
                    actions.push(Action::Event("Killing", words, false));
                }
            }
            self.deleted = true;
            self.grace_s = self.grace_s.min(grace);
        }
        self.pod = pod;
    }

    /// A grace period can shrink while it runs.
    fn shrink_grace(&mut self, grace_s: u64, now: Duration) {
        self.grace_s = self.grace_s.min(grace_s);
        let end = now + Duration::from_secs(self.grace_s);
        for container in &mut self.containers {
            if let Stop::Asked(kill_at) = &mut container.stop {
                *kill_at = (*kill_at).min(end);
            }
        }
    }

    /// The first reason stays; what is ending anyway ends as it would have.
    fn fail(
        &mut self,
        reason: &'static str,
        message: String,
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        if self.failed.is_none() && self.phase == Phase::Syncing && !self.deleted {
            actions.push(Action::Event(reason, message.clone(), true));
            self.failed = Some((reason, message));
            self.shrink_grace(FAIL_GRACE_S, now);
        }
    }

    fn adopt(&mut self, found: Vec<ObservedContainer>, now: Duration, actions: &mut Vec<Action>) {
        let status = self.pod.status.clone().unwrap_or_default();
        let statuses: Vec<_> = status
            .init_container_statuses
            .into_iter()
            .flatten()
            .chain(status.container_statuses.into_iter().flatten())
            .collect();
        for index in 0..self.containers.len() {
            let container = &mut self.containers[index];
            let known = statuses.iter().find(|s| s.name == container.name);
            let newest = found
                .iter()
                .filter(|o| o.run.name == container.name && o.started_at.is_some())
                .max_by_key(|o| o.run.attempt);
            let Some(newest) = newest else {
                // It ran in an earlier boot: its next run gets a number of its own.
                let ran =
                    known.filter(|s| s.container_id.as_deref().is_some_and(|i| !i.is_empty()));
                container.attempt = ran.map_or(0, |s| s.restart_count.max(0) as u32 + 1);
                continue;
            };
            container.attempt = newest.run.attempt;
            container.backoff = Backoff::from_restarts(newest.run.attempt);
            container.image_id = known.map(|s| s.image_id.clone()).unwrap_or_default();
            container.last_exit = found
                .iter()
                .filter(|o| o.run.name == container.name && o.run.attempt < newest.run.attempt)
                .max_by_key(|o| o.run.attempt)
                .and_then(|o| Some((o.run.attempt, o.exit.clone()?)))
                .or_else(|| last_exit(known?, newest.run.attempt));
            // What it was before the agent ended it still is: no flip in either direction.
            container.ready = known.is_some_and(|s| s.ready);
            container.started = known.is_some_and(|s| s.started == Some(true));
            let started_at = newest.started_at.unwrap_or(SystemTime::UNIX_EPOCH);
            container.run = Run::Running {
                started_at,
                since: now,
            };
            match newest.exit.clone() {
                Some(exit) => {
                    let run = self.run_of(index);
                    self.container_exited(&run, exit, now, actions);
                }
                None => actions.push(Action::StartProbes(self.run_of(index))),
            }
        }
    }

    fn sandbox_failed(
        &mut self,
        reason: String,
        message: String,
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        let Sandbox::Preparing { failures } = self.sandbox else {
            return;
        };
        for container in &mut self.containers {
            if let Run::Waiting { message: words, .. } = &mut container.run {
                *words = message.clone();
            }
        }
        actions.push(Action::Event(event_reason(&reason), message.clone(), true));
        self.sandbox = Sandbox::Absent {
            retry_at: now + retry_wait(failures),
            failures: failures + 1,
            failure: Some((reason, message)),
        };
    }

    fn container_started(
        &mut self,
        run: &ContainerRun,
        at: SystemTime,
        image_id: String,
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        let Some(index) = self.current(run) else {
            return;
        };
        let (has_startup, has_readiness) = self
            .config(&run.name)
            .map(|c| (c.startup_probe.is_some(), c.readiness_probe.is_some()))
            .unwrap_or_default();
        let container = &mut self.containers[index];
        if container.run != Run::Starting {
            return;
        }
        container.run = Run::Running {
            started_at: at,
            since: now,
        };
        container.image_id = image_id;
        container.started = !has_startup;
        container.ready = !has_startup && !has_readiness;
        container.stop = Stop::No;
        if container.attempt == 0 {
            container.backoff.forget_failed_starts();
        }
        let words = format!("Started container {}", run.name);
        actions.push(Action::Event("Started", words, false));
        if self.phase == Phase::Syncing {
            actions.push(Action::StartProbes(run.clone()));
        }
    }

    fn start_failed(
        &mut self,
        run: &ContainerRun,
        reason: String,
        message: String,
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        let Some(index) = self.current(run) else {
            return;
        };
        let container = &mut self.containers[index];
        if container.run != Run::Starting {
            return;
        }
        actions.push(Action::Event("Failed", format!("Error: {message}"), true));
        let again = container.backoff != Backoff::default();
        let reason = match reason.as_str() {
            "ErrImagePull" if again => "ImagePullBackOff".to_owned(),
            _ => reason,
        };
        let wait = container.backoff.after_failed_start();
        container.run = Run::Waiting {
            reason,
            message,
            retry_at: now + wait,
        };
    }

    fn container_exited(
        &mut self,
        run: &ContainerRun,
        exit: Exit,
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        let Some(index) = self.current(run) else {
            return;
        };
        let ran = match &self.containers[index].run {
            Run::Running { since, .. } => now.saturating_sub(*since),
            // It ended before its start was reported.
            Run::Starting => Duration::ZERO,
            Run::Waiting { .. } | Run::Exited(_) => return,
        };
        actions.push(Action::StopProbes(run.clone()));
        let init = self.containers[index].init;
        let restart = self.phase == Phase::Syncing
            && !self.deleted
            && restarts(self.restart_policy(), init, &exit);
        let container = &mut self.containers[index];
        container.ready = false;
        container.started = false;
        container.stop = Stop::No;
        if !restart {
            container.run = Run::Exited(exit);
            return;
        }
        let wait = container.backoff.after_exit(ran);
        if !wait.is_zero() {
            let words = format!("Back-off restarting failed container {}", run.name);
            actions.push(Action::Event("BackOff", words, true));
        }
        container.last_exit = Some((container.attempt, exit));
        container.attempt += 1;
        container.run = Run::Waiting {
            reason: "CrashLoopBackOff".into(),
            message: format!("back-off {} s restarting failed container", wait.as_secs()),
            retry_at: now + wait,
        };
    }

    fn probed(
        &mut self,
        run: &ContainerRun,
        kind: ProbeKind,
        healthy: bool,
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        let Some(index) = self.current(run) else {
            return;
        };
        let has_readiness = self
            .config(&run.name)
            .is_some_and(|c| c.readiness_probe.is_some());
        let container = &mut self.containers[index];
        if !matches!(container.run, Run::Running { .. }) {
            return;
        }
        match (kind, healthy) {
            (ProbeKind::Readiness, healthy) => container.ready = healthy,
            (ProbeKind::Startup, true) => {
                container.started = true;
                container.ready = container.ready || !has_readiness;
            }
            (ProbeKind::Liveness, true) => {}
            (ProbeKind::Liveness | ProbeKind::Startup, false) => {
                let which = if kind == ProbeKind::Liveness {
                    "liveness"
                } else {
                    "startup"
                };
                let words = format!(
                    "Container {} failed {which} probe, will be restarted",
                    run.name
                );
                self.stop_for_restart(index, words, now, actions);
            }
        }
    }

    /// Asks a running container to stop; its exit then starts the next run.
    fn stop_for_restart(
        &mut self,
        index: usize,
        words: String,
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        let run = self.run_of(index);
        let grace = Duration::from_secs(self.grace_s);
        let container = &mut self.containers[index];
        if !matches!(container.run, Run::Running { .. }) || container.stop != Stop::No {
            return;
        }
        container.ready = false;
        container.stop = Stop::Asked(now + grace);
        actions.push(Action::Event("Killing", words, false));
        actions.push(Action::StopProbes(run.clone()));
        actions.push(Action::Stop(run));
    }

    /// Looks at what is and asks for what is missing. Idempotent.
    fn advance(&mut self, now: Duration, actions: &mut Vec<Action>) {
        if self.phase == Phase::Syncing {
            if self.deleted || self.failed.is_some() || self.ended_by_itself() {
                self.begin_termination(actions);
            } else {
                self.sync(now, actions);
            }
        }
        if self.phase == Phase::Terminating {
            self.terminate(now, actions);
        }
        if self.phase == Phase::Syncing || self.phase == Phase::Terminating {
            self.kill_overdue(now, actions);
        }
        if self.phase == Phase::TearingDown
            && let TearDown::Due(at, _) = self.tear_down
            && at <= now
        {
            self.tear_down = TearDown::InFlight;
            actions.push(Action::TearDown);
        }
        if self.phase == Phase::Terminated && self.deleted {
            self.phase = Phase::Finished;
        }
    }

    fn begin_termination(&mut self, actions: &mut Vec<Action>) {
        self.phase = Phase::Terminating;
        for index in 0..self.containers.len() {
            self.containers[index].ready = false;
            if self.containers[index].alive() {
                actions.push(Action::StopProbes(self.run_of(index)));
            }
        }
    }

    fn sync(&mut self, now: Duration, actions: &mut Vec<Action>) {
        match &self.sandbox {
            Sandbox::Absent {
                retry_at, failures, ..
            } if *retry_at <= now => {
                self.sandbox = Sandbox::Preparing {
                    failures: *failures,
                };
                actions.push(Action::PrepareSandbox);
            }
            Sandbox::Ready(_) => {
                for index in self.startable() {
                    let Run::Waiting { retry_at, .. } = self.containers[index].run else {
                        continue;
                    };
                    if retry_at <= now {
                        self.containers[index].run = Run::Starting;
                        actions.push(Action::Start(self.run_of(index)));
                    }
                }
            }
            Sandbox::Absent { .. } | Sandbox::Preparing { .. } => {}
        }
    }

    /// The first init container that has not succeeded, else all others.
    fn startable(&self) -> Vec<usize> {
        let pending = self
            .containers
            .iter()
            .position(|c| c.init && !c.succeeded());
        match pending {
            Some(index) => vec![index],
            None => (0..self.containers.len())
                .filter(|i| !self.containers[*i].init)
                .collect(),
        }
    }

    /// Nothing runs and nothing will be started again.
    fn ended_by_itself(&self) -> bool {
        let ended = |c: &Container| matches!(c.run, Run::Exited(_));
        let init_failed = self
            .containers
            .iter()
            .any(|c| c.init && ended(c) && !c.succeeded());
        let nothing_runs = !self.containers.iter().any(Container::alive);
        let others_ended = self.containers.iter().filter(|c| !c.init).all(ended);
        nothing_runs && (init_failed || others_ended)
    }

    fn terminate(&mut self, now: Duration, actions: &mut Vec<Action>) {
        let end = now + Duration::from_secs(self.grace_s);
        for index in 0..self.containers.len() {
            let run = self.run_of(index);
            let container = &mut self.containers[index];
            if !matches!(container.run, Run::Running { .. }) {
                continue;
            }
            match &mut container.stop {
                Stop::No => {
                    container.stop = Stop::Asked(end);
                    actions.push(Action::Stop(run));
                }
                Stop::Asked(kill_at) => *kill_at = (*kill_at).min(end),
                Stop::Killed(_) => {}
            }
        }
        let preparing = matches!(self.sandbox, Sandbox::Preparing { .. });
        if !preparing && !self.containers.iter().any(Container::alive) {
            self.phase = Phase::TearingDown;
            self.tear_down = TearDown::Due(now, 0);
        }
    }

    fn kill_overdue(&mut self, now: Duration, actions: &mut Vec<Action>) {
        for index in 0..self.containers.len() {
            let run = self.run_of(index);
            let container = &mut self.containers[index];
            let overdue = matches!(container.stop, Stop::Asked(at) | Stop::Killed(at) if at <= now);
            if overdue && matches!(container.run, Run::Running { .. }) {
                container.stop = Stop::Killed(now + KILL_AGAIN);
                actions.push(Action::Kill(run));
            }
        }
    }

    /// When [`Input::Timer`] is wanted next; none when nothing waits for time.
    pub fn wake_at(&self) -> Option<Duration> {
        let sandbox = match (&self.phase, &self.sandbox) {
            (Phase::Syncing, Sandbox::Absent { retry_at, .. }) => Some(*retry_at),
            _ => None,
        };
        let ready = matches!(self.sandbox, Sandbox::Ready(_)) && self.phase == Phase::Syncing;
        let starts = self
            .startable()
            .into_iter()
            .filter_map(|i| match self.containers[i].run {
                Run::Waiting { retry_at, .. } if ready => Some(retry_at),
                _ => None,
            });
        let kills = self
            .containers
            .iter()
            .filter_map(|c| match (&c.run, c.stop) {
                (Run::Running { .. }, Stop::Asked(at) | Stop::Killed(at)) => Some(at),
                _ => None,
            });
        let tear_down = match (self.phase, self.tear_down) {
            (Phase::TearingDown, TearDown::Due(at, _)) => Some(at),
            _ => None,
        };
        sandbox
            .into_iter()
            .chain(starts)
            .chain(kills)
            .chain(tear_down)
            .min()
    }
}

impl Container {
    /// A process exists or is being made.
    pub fn alive(&self) -> bool {
        matches!(self.run, Run::Starting | Run::Running { .. })
    }

    fn succeeded(&self) -> bool {
        matches!(&self.run, Run::Exited(exit) if exit.code == 0)
    }
}

/// Does a container that ended like this run again? An init container that succeeded never does.
fn restarts(policy: &str, init: bool, exit: &Exit) -> bool {
    match (policy, init) {
        ("Never", _) => false,
        ("OnFailure", _) | (_, true) => exit.code != 0,
        _ => true,
    }
}

/// The run before the newest, as the API holds it: its records are gone when the next one starts.
fn last_exit(status: &ContainerStatus, newest: u32) -> Option<(u32, Exit)> {
    let ended = status.last_state.as_ref()?.terminated.as_ref()?;
    let at = |time: &Option<Time>| {
        time.as_ref()
            .map_or(SystemTime::UNIX_EPOCH, |time| SystemTime::from(time.0))
    };
    let exit = Exit {
        code: ended.exit_code,
        signal: ended.signal.unwrap_or(0),
        oom_killed: ended.reason.as_deref() == Some("OOMKilled"),
        started_at: at(&ended.started_at),
        finished_at: at(&ended.finished_at),
        unknown: ended.reason.as_deref() == Some("ContainerStatusUnknown"),
    };
    Some((newest.checked_sub(1)?, exit))
}

fn retry_wait(failures: u32) -> Duration {
    RETRY_FIRST * (1 << failures.min(6))
}

fn event_reason(reason: &str) -> &'static str {
    match reason {
        "FailedMount" => "FailedMount",
        "FailedCreatePodSandBox" => "FailedCreatePodSandBox",
        _ => "Failed",
    }
}

/// `spec.terminationGracePeriodSeconds`, or what the deletion asked for.
fn spec_grace_s(pod: &Pod) -> u64 {
    let spec = pod
        .spec
        .as_ref()
        .and_then(|s| s.termination_grace_period_seconds);
    let deletion = pod.metadata.deletion_grace_period_seconds;
    deletion.or(spec).unwrap_or(30).max(0) as u64
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;
