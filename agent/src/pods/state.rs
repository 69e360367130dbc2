//! What one pod worker decides: from an API object to running containers and back to nothing.
//!
//! ```text
//!   spec           deleted, failed, every container ended   none alive       sandbox, volumes freed, and deleted
//! ──────► Syncing ──────────────────────────► Terminating ────► TearingDown ────► Terminated ──────► Finished
//!          ▲  │ spec, exit, probe, hook, timer  ▲  │ grace        ▲  │ retry         (object still there)
//!          └──┘                                 └──┘              └──┘
//! ```
//! One task per pod UID (`worker.rs`) owns this state: no lock, no second writer. Work in flight is
//! part of the state (`Sandbox::Preparing`, `Run::Starting`), so [`PodState::next`] is
//! idempotent: it looks at what is and asks for what is missing. `start.rs` says which container may
//! start and what a start or an exit means, `stop.rs` the way from a wish to SIGKILL, `drain.rs` what
//! comes before that, `adopt.rs` what a restarted agent makes of what it finds.
//!
//! Invariants, checked by `tests::any_history_keeps_the_rules`: phases only move right; nothing is
//! started after Syncing; one start in flight per container; a run number is started once; a grace
//! period can shrink, never grow; a sidecar is asked to stop only when nothing it served is alive.
//! Source: the kubelet's pod workers, `kuberuntime_manager.go` and `kuberuntime_container.go`.

mod adopt;
mod drain;
mod start;
mod stop;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use gantry_api::k8s_openapi::api::core::v1::{Container as ContainerConfig, ContainerStatus, Pod};

pub use self::drain::{DRAIN_CAP, Drain, Drained};
use self::start::has_startup_probe;
use super::backoff::Backoff;
use super::configs;
use super::records::Probed;
use crate::ids::{ContainerRun, PodUid};
use crate::network::PodNetwork;
use crate::runtime::{Exit, ObservedContainer};
use crate::shutdown;

/// How long a failed sandbox, or a tear-down, waits before the next try; doubles to 64 s.
const RETRY_FIRST: Duration = Duration::from_secs(1);

/// `status.reason` of a pod that the node wants to be rid of.
pub const EVICTED: &str = "Evicted";

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

/// What a container is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    /// Runs to completion before the ones after it.
    Init,
    /// An init container with `restartPolicy: Always`: runs beside the ones after it.
    Sidecar,
    /// One of `spec.containers`.
    Main,
    /// One of `spec.ephemeralContainers`: for debugging, never restarted.
    Ephemeral,
}

/// One container of the pod.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Container {
    /// Its name in the spec, unique over all roles.
    pub name: String,
    /// What it is for.
    pub role: Role,
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
    /// The postStart hook is done, or there is none.
    pub hooked: bool,
    /// Termination messages by run: the newest two.
    pub messages: Vec<(u32, String)>,
    /// How far its stop has come.
    pub stop: Stop,
}

/// The way from SIGTERM to SIGKILL.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stop {
    /// Nobody asked.
    No,
    /// Waits until nobody sends to the pod any more; then it has this many seconds.
    Drain(u64),
    /// The preStop hook runs; over at this time.
    Hook(Duration),
    /// Waits for the containers that must end before it; over at this time.
    Turn(Duration),
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
    /// Init containers and sidecars in order, then the main ones, then the ephemeral ones.
    pub containers: Vec<Container>,
    /// Every init container has done its part once in this boot.
    pub initialized: bool,
    /// How long the pod had been active when the worker's clock began.
    pub age: Duration,
    /// What this node knew of probed containers before an agent restart.
    pub recalled: BTreeMap<String, Probed>,
    /// Containers of an earlier agent were found: their sandbox stands, and this agent has not looked
    /// at it yet.
    pub adopted: bool,
    /// The API object is being deleted, or gone.
    pub deleted: bool,
    /// Seconds granted from SIGTERM to SIGKILL; shrinks only.
    pub grace_s: u64,
    /// A tear-down is in flight, or retried at that time.
    pub tear_down: TearDown,
    /// The node has ended the pod.
    pub failed: Option<Failed>,
    /// Do nodes still send to it?
    pub drain: Drain,
    /// How long its drain had been waited for before an agent restart.
    pub drained_for: Duration,
    /// Drains asked for: an answer to an earlier one says nothing.
    pub drain_number: u32,
}

/// Why the node has ended a pod.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Failed {
    /// The reason in its status.
    pub reason: &'static str,
    /// The words in its status.
    pub message: String,
    /// Not the pod's own doing: condition DisruptionTarget says so.
    pub is_disruption: bool,
}

/// Progress of the tear-down.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TearDown {
    /// To be asked for, not before this, after so many failures.
    Due(Duration, u32),
    /// Asked for, after so many failures.
    InFlight(u32),
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
    /// What the sandbox or its removal waits for (a ConfigMap, a driver) may be there now: try at
    /// once.
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
    /// The node ends the pod, which keeps to no limit of its own: reason and words. It is Failed when
    /// it has stopped.
    Fail(&'static str, String),
    /// The same, and the pod has done nothing wrong: the node is short of something. Words.
    Evict(String),
    /// The machine goes down: the pod has this many seconds.
    Shutdown(u64),
    /// An answer to [`Action::Drain`] of that number.
    Drained(u32, Drained),
    /// The postStart hook is over.
    PostStarted(ContainerRun, Result<(), String>),
    /// The preStop hook is over.
    PreStopped(ContainerRun, Result<(), String>),
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
    /// Find out when no node sends to the pod any more; answers carry the number.
    Drain(u32),
    /// Run the postStart hook.
    PostStart(ContainerRun),
    /// Run the preStop hook.
    PreStop(ContainerRun),
    /// Whatever hook of it still runs is of no use any more.
    StopHooks(ContainerRun),
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
        let roles = configs::roles(&pod);
        let waits = (roles.iter()).any(|(_, role)| matches!(role, Role::Init | Role::Sidecar));
        let containers = roles
            .into_iter()
            .map(|(name, role)| Container::new(name, role, waits && role == Role::Main))
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
            initialized: false,
            age: Duration::ZERO,
            recalled: BTreeMap::new(),
            adopted: false,
            deleted: false,
            grace_s,
            tear_down: TearDown::Due(Duration::ZERO, 0),
            failed: None,
            drain: Drain::No,
            drained_for: Duration::ZERO,
            drain_number: 0,
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
    pub fn config(&self, name: &str) -> Option<Cow<'_, ContainerConfig>> {
        configs::find(&self.pod, name)
    }

    /// Keeps what a run has left as its last words, before its exit is taken.
    pub fn note_message(&mut self, run: &ContainerRun, message: String) {
        let Some(container) = self.containers.iter_mut().find(|c| c.name == run.name) else {
            return;
        };
        let newest = container.attempt.max(run.attempt);
        container
            .messages
            .retain(|(attempt, _)| *attempt != run.attempt && attempt + 1 >= newest);
        if !message.is_empty() {
            container.messages.push((run.attempt, message));
        }
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

    /// The pod is not begun here at all: reason and words. Before any input.
    pub fn refuse(&mut self, reason: &'static str, message: &str) {
        if self.failed.is_none() && self.phase == Phase::Syncing {
            self.failed = Some(Failed {
                reason,
                message: message.to_owned(),
                is_disruption: false,
            });
        }
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
            Input::SandboxReady(network) => {
                self.sandbox = Sandbox::Ready(network);
                self.adopted = false;
            }
            Input::SandboxFailed(reason, message) => {
                self.adopted = false;
                self.sandbox_failed(reason, message, now, &mut actions);
            }
            Input::Retry => {
                if let Sandbox::Absent { retry_at, .. } = &mut self.sandbox {
                    *retry_at = now;
                }
                if let TearDown::Due(at, _) = &mut self.tear_down {
                    *at = now.min(*at);
                }
            }
            Input::Started { run, at, image_id } => {
                self.container_started(&run, at, image_id, now, &mut actions);
            }
            Input::StartFailed(run, reason, message) => {
                self.start_failed(&run, reason, message, now, &mut actions);
            }
            Input::Exited(run, exit) => self.container_exited(&run, exit, now, &mut actions),
            Input::Drained(number, drained) => {
                self.drained(number, drained, now, &mut actions);
            }
            Input::PostStarted(run, result) => {
                self.post_started(&run, result, now, &mut actions);
            }
            Input::PreStopped(run, result) => self.pre_stopped(&run, result, &mut actions),
            Input::Probe(run, kind, healthy) => {
                self.probed(&run, kind, healthy, now, &mut actions);
            }
            Input::Restart(run, words) => {
                if let Some(index) = self.current(&run) {
                    self.stop_for_restart(index, words, self.grace_s, now, &mut actions);
                }
            }
            Input::Fail(reason, message) => {
                let failed = Failed {
                    reason,
                    message,
                    is_disruption: false,
                };
                self.fail(failed, stop::EVICTION_GRACE_S, now, &mut actions);
            }
            Input::Evict(message) => {
                let failed = Failed {
                    reason: EVICTED,
                    message,
                    is_disruption: true,
                };
                self.fail(failed, stop::EVICTION_GRACE_S, now, &mut actions);
            }
            Input::Shutdown(grace_s) => {
                let failed = Failed {
                    reason: shutdown::REASON,
                    message: shutdown::MESSAGE.to_owned(),
                    is_disruption: true,
                };
                self.fail(failed, grace_s, now, &mut actions);
                self.shrink_grace(grace_s, now);
            }
            Input::TornDown => {
                if self.phase == Phase::TearingDown {
                    self.phase = Phase::Terminated;
                }
            }
            Input::TearDownFailed => {
                let (TearDown::Due(_, failures) | TearDown::InFlight(failures)) = self.tear_down;
                let more = failures.saturating_add(1);
                self.tear_down = TearDown::Due(now + retry_wait(failures), more);
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
            // The first deletion says what it is, as with the kubelet; after that it only shrinks.
            self.grace_s = match self.deleted || self.phase > Phase::Syncing {
                true => self.grace_s.min(grace),
                false => grace,
            };
            self.deleted = true;
        }
        self.pod = pod;
        // Only ephemeral containers come after the pod's creation.
        for (name, role) in configs::roles(&self.pod) {
            let known = self.containers.iter().any(|c| c.name == name);
            if role == Role::Ephemeral && !known {
                self.containers.push(Container::new(name, role, false));
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

    /// Looks at what is and asks for what is missing. Idempotent.
    fn advance(&mut self, now: Duration, actions: &mut Vec<Action>) {
        if self.phase == Phase::Syncing {
            self.note_initialized();
            self.check_deadline(now, actions);
        }
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
            self.advance_drain(now, actions);
            self.advance_stops(now, actions);
        }
        if self.phase == Phase::TearingDown
            && let TearDown::Due(at, failures) = self.tear_down
            && at <= now
        {
            self.tear_down = TearDown::InFlight(failures);
            actions.push(Action::TearDown);
        }
        if self.phase == Phase::Terminated && self.deleted {
            self.phase = Phase::Finished;
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
            Sandbox::Ready(_) => self.start_due(now, actions),
            Sandbox::Absent { .. } | Sandbox::Preparing { .. } => {}
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
        let kills = self.containers.iter().filter_map(|c| match &c.run {
            Run::Running { .. } => c.stop.due_at(),
            _ => None,
        });
        let deadline = self
            .deadline_at()
            .filter(|_| self.phase == Phase::Syncing && !self.deleted);
        let tear_down = match (self.phase, self.tear_down) {
            (Phase::TearingDown, TearDown::Due(at, _)) => Some(at),
            _ => None,
        };
        sandbox
            .into_iter()
            .chain(starts)
            .chain(kills)
            .chain(
                self.drain_over_at()
                    .filter(|_| self.phase <= Phase::Terminating),
            )
            .chain(deadline)
            .chain(tear_down)
            .min()
    }
}

impl Container {
    fn new(name: String, role: Role, waits_for_init: bool) -> Self {
        let reason = match waits_for_init {
            true => "PodInitializing",
            false => "ContainerCreating",
        };
        Self {
            name,
            role,
            attempt: 0,
            run: Run::Waiting {
                reason: reason.into(),
                message: String::new(),
                retry_at: Duration::ZERO,
            },
            last_exit: None,
            backoff: Backoff::default(),
            image_id: String::new(),
            ready: false,
            started: false,
            hooked: false,
            messages: Vec::new(),
            stop: Stop::No,
        }
    }

    /// A process exists or is being made.
    pub fn alive(&self) -> bool {
        matches!(self.run, Run::Starting | Run::Running { .. })
    }

    fn succeeded(&self) -> bool {
        matches!(&self.run, Run::Exited(exit) if exit.code == 0)
    }
}

fn retry_wait(failures: u32) -> Duration {
    RETRY_FIRST * (1 << failures.min(6))
}

fn event_reason(reason: &str) -> &'static str {
    match reason {
        "FailedMount" => "FailedMount",
        "FailedCreatePodSandBox" => "FailedCreatePodSandBox",
        "LimitNotHeld" => "LimitNotHeld",
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
