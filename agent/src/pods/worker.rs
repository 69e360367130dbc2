//! One task per pod UID: feeds [`PodState`] and does what it asks.
//!
//! ```text
//!  newest pod ─► slot ─┐                          ┌─► prepare (sandbox)     ┐
//!  exits, probes, hooks ┼─► PodState::next ─► acts ┼─► launch (a container)  ├─► inputs ─► ...
//!  timer ──────────────┘            │             └─► tear_down             ┘
//!                                   └─► status::render ─► reporter
//! ```
//! Whatever takes time runs in a task of its own and comes back as an input, so the worker itself
//! never waits for the machine. The pod arrives in a slot that keeps only the newest. Probes and hooks
//! are in `worker/beside.rs`.

mod beside;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwapOption;
use gantry_api::k8s_openapi::api::core::v1::{Event, ObjectReference, Pod, PodStatus};
use gantry_api::k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use jiff::Timestamp;
use tokio::sync::{mpsc, watch};
use tokio::task::AbortHandle;
use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::hooks::Hook;
use super::records::Probed;
use super::resize::{self, Allocated, Progress, Room};
use super::state::{Action, EVICTED, Input, Phase, PodState, ProbeKind, Role, Run, Sandbox};
use super::timeline::Timeline;
use super::{Node, configs, launch, prepare, processes, records, status};
use crate::ids::{ContainerRun, PodUid};
use crate::paths::Paths;
use crate::runtime::{Exit, ObservedContainer};
use crate::shutdown;
use crate::view::View;
use crate::volumes::{self, ReadyVolumes};

/// Inputs that may wait for the worker; senders wait beyond that.
const INPUTS_MAX: usize = 64;
/// A pod that is only on its way is told of after this long: most run before, and their start does not
/// share the processors with two writes of the store.
const START_IS_TOLD_AFTER: Duration = Duration::from_millis(50);
/// Two Unhealthy events of one container are at least this far apart.
const UNHEALTHY_EVENT_EVERY: Duration = Duration::from_secs(10);
/// Two events of processes that do not end are at least this far apart.
const FAILED_KILL_EVENT_EVERY: Duration = Duration::from_secs(60);

/// A resize that was not possible is looked at again this much later.
const RESIZE_AGAIN: Duration = Duration::from_secs(5);

/// A token is looked at when it is due, and at least this often: clocks are set, files are lost.
const TOKEN_INTERVAL: Duration = Duration::from_secs(60);
/// One that could not be renewed is asked for again this much later.
const TOKEN_AGAIN: Duration = Duration::from_secs(15);

/// What comes back from the tasks that do the work.
#[derive(Debug)]
pub enum Message {
    /// For the state machine.
    Input(Input),
    /// A phase of the start took that long.
    Took(&'static str, Duration),
    /// The kernel's files have the granted resources, or why not.
    Resized(Result<(), String>),
    /// A resize that could not be granted or done may be possible now.
    Reconsider,
    /// Something of the pod does not end: why.
    FailedKill(String),
    /// Something to warn of: reason and words.
    Warning(&'static str, String),
    /// One failed check, for an event.
    Unhealthy(ProbeKind, String),
    /// Verdicts in a row against what is known of a probe.
    Counted(ContainerRun, ProbeKind, u32),
    /// A run has ended with these last words.
    Ended(ContainerRun, Exit, String),
    /// Some ConfigMap or Secret of this node's pods has changed.
    Blobs,
    /// A token may be due for renewal.
    Tokens,
    /// For whoever looks at the pod: reason and words.
    Event(&'static str, String),
}

/// How to reach a worker. Boxed: a channel has places for 32 messages from its beginning, and there
/// is one for each pod.
pub type Inputs = mpsc::Sender<Box<Message>>;

/// How the owner of all workers reaches one.
pub struct Handle {
    /// The newest pod; none when the object has gone without a deletion.
    pub newest: watch::Sender<Option<Arc<Pod>>>,
    /// Exits.
    pub inputs: Inputs,
}

/// One pod's worker.
pub struct Worker {
    node: Arc<Node>,
    state: PodState,
    began: Instant,
    newest: watch::Receiver<Option<Arc<Pod>>>,
    view: watch::Receiver<Arc<View>>,
    inputs: Inputs,
    inbox: mpsc::Receiver<Box<Message>>,
    volumes: Arc<ArcSwapOption<ReadyVolumes>>,
    /// Volumes have one writer at a time.
    refresh: Arc<tokio::sync::Mutex<()>>,
    probes: HashMap<String, AbortHandle>,
    hooks: HashMap<String, AbortHandle>,
    turn: processes::Turn,
    counted: BTreeMap<String, Probed>,
    probed: BTreeMap<String, Probed>,
    adopted: BTreeMap<String, u32>,
    reported: PodStatus,
    /// When `reported` is to be told, if it is not told yet.
    tell_at: Option<Instant>,
    allocated: Allocated,
    resize: Option<Progress>,
    timeline: Timeline,
    unhealthy_at: HashMap<&'static str, Instant>,
    failed_kill_at: Option<Instant>,
    drain: Option<AbortHandle>,
}

impl Worker {
    /// Makes a worker for a pod of the view. `found` is what runs of it already (adoption).
    pub fn new(
        node: Arc<Node>,
        uid: PodUid,
        pod: Arc<Pod>,
        found: Vec<ObservedContainer>,
        view: watch::Receiver<Arc<View>>,
    ) -> (Self, Handle) {
        let (inputs, inbox) = mpsc::channel(INPUTS_MAX);
        let (newest_sender, newest) = watch::channel(Some(pod.clone()));
        let ended =
            records::read_final(&node.paths, &uid).or_else(|| node.reporter.final_status(&uid));
        let reported = ended
            .clone()
            .or_else(|| pod.status.clone())
            .unwrap_or_default();
        let allocated = resize::allocated(&pod, &reported);
        let pod = resize::with(&pod, &allocated);
        let mut state = match ended.is_some() || status::is_final(&reported) {
            true => PodState::ended(uid, pod),
            false => PodState::new(uid, pod),
        };
        if *node.going_down.borrow() && found.is_empty() {
            state.refuse(shutdown::REFUSED, shutdown::REFUSED_MESSAGE);
        }
        state.recalled = records::read_probed(&node.paths, &state.uid);
        state.drained_for = records::drained_for(&node.paths, &state.uid);
        state.age = age(&reported);
        let mut timeline = Timeline::new();
        let adopted = !found.is_empty();
        let began = Instant::now();
        let mut worker = Self {
            node,
            began,
            newest,
            view,
            inputs: inputs.clone(),
            inbox,
            volumes: Arc::default(),
            refresh: Arc::default(),
            probes: HashMap::new(),
            hooks: HashMap::new(),
            turn: processes::Turn::default(),
            counted: state.recalled.clone(),
            probed: state.recalled.clone(),
            adopted: (found.iter().filter(|o| o.exit.is_none()))
                .map(|o| (o.run.name.clone(), o.run.attempt))
                .collect(),
            reported,
            tell_at: None,
            allocated,
            resize: None,
            timeline: Timeline::new(),
            unhealthy_at: HashMap::new(),
            failed_kill_at: None,
            drain: None,
            state: state.clone(),
        };
        if adopted {
            timeline.nothing_to_tell();
        }
        worker.timeline = timeline;
        if state.phase == Phase::Syncing {
            for one in &found {
                if let Some(exit) = &one.exit {
                    let words = worker.last_words(&one.run).read(exit);
                    state.note_message(&one.run, words);
                }
            }
            let actions = state.next(Input::Observed(found), Duration::ZERO);
            worker.state = state;
            worker.carry_out(actions);
        }
        (
            worker,
            Handle {
                newest: newest_sender,
                inputs,
            },
        )
    }

    /// Runs until nothing of the pod is left and its object is deleted.
    pub async fn run(mut self) {
        info!(pod = %self.state.uid, name = self.title(), "pod worker starts");
        self.newest.mark_changed();
        self.turn(Input::Timer);
        while self.state.phase != Phase::Finished {
            let wake = self.state.wake_at().map(|at| self.began + at);
            let tell_at = self.tell_at;
            tokio::select! {
                // Cancel-safe: a value not taken stays in the slot.
                changed = self.newest.changed() => match changed {
                    Ok(()) => {
                        let newest = self.newest.borrow_and_update().clone();
                        let before = self.state.pod.clone();
                        let input = match newest {
                            Some(pod) => self.grant(pod),
                            None => Input::Gone,
                        };
                        self.turn(input);
                        let (old, new) = (&before.metadata, &self.state.pod.metadata);
                        if old.labels != new.labels || old.annotations != new.annotations {
                            self.refresh_volumes(); // the downward API shows them
                        }
                    }
                    // The owner is gone: the agent shuts down, the pod goes on without it.
                    Err(_) => return,
                },
                // Cancel-safe: recv takes nothing before it is ready.
                Some(message) = self.inbox.recv() => self.take(*message),
                // Cancel-safe: timers.
                () = until(wake) => self.turn(Input::Timer),
                () = until(tell_at) => self.tell(false),
            }
        }
        info!(pod = %self.state.uid, name = self.title(), "pod is gone");
        prepare::forget(&self.node, &self.state.uid, &self.state.pod).await;
        records::remove(&self.node.paths, &self.state.uid);
        self.report(true);
    }

    fn title(&self) -> String {
        let metadata = &self.state.pod.metadata;
        let part = |s: &Option<String>| s.clone().unwrap_or_default();
        format!("{}/{}", part(&metadata.namespace), part(&metadata.name))
    }

    fn take(&mut self, message: Message) {
        match message {
            Message::Input(Input::Exited(run, exit)) => self.hear_last_words(run, exit),
            Message::Input(input) => self.turn(input),
            Message::Ended(run, exit, words) => {
                self.end_leftovers(&run);
                self.state.note_message(&run, words);
                self.turn(Input::Exited(run, exit));
            }
            Message::Counted(run, kind, against) => {
                let counted = self.counted.entry(run.name).or_default();
                if counted.attempt != run.attempt {
                    *counted = Probed::default();
                    counted.attempt = run.attempt;
                }
                counted.set_against(kind, against);
                self.keep_probed();
            }
            Message::Took(phase, took) => self.timeline.add(phase, took),
            Message::Resized(result) => self.resized(result),
            Message::Reconsider => {
                let newest = self.newest.borrow().clone();
                if let (Some(pod), true) = (newest, self.resize.is_some()) {
                    let input = self.grant(pod);
                    self.turn(input);
                }
            }
            Message::FailedKill(words) => self.failed_kill(words),
            Message::Warning(reason, words) => self.event(reason, words, true),
            Message::Unhealthy(kind, words) => self.unhealthy(kind, &words),
            Message::Event(reason, words) => self.event(reason, words, false),
            Message::Blobs => {
                self.turn(Input::Retry);
                self.refresh_volumes();
            }
            Message::Tokens => self.refresh_volumes(),
        }
    }

    /// Mounted ConfigMaps and Secrets follow their objects.
    fn refresh_volumes(&self) {
        if self.state.phase != Phase::Syncing || !matches!(self.state.sandbox, Sandbox::Ready(_)) {
            return;
        }
        let (node, pod) = (self.node.clone(), self.state.pod.clone());
        let (views, one_at_a_time) = (self.view.clone(), self.refresh.clone());
        tokio::spawn(async move {
            let _alone = one_at_a_time.lock().await;
            // An error is a closed semaphore, which nobody closes.
            let _turn = node.second_looks.acquire().await;
            let view = views.borrow().clone();
            if let Err(error) =
                volumes::ensure(&pod, &view.blobs, &node.paths, node.tokens.as_ref()).await
            {
                // The mounted copy stays as it is: an object deleted later takes nothing away.
                debug!(%error, "refresh volumes");
            }
        });
    }

    /// The newest pod with what this node grants of it; begins a resize that is granted.
    fn grant(&mut self, newest: Arc<Pod>) -> Input {
        let room = || {
            let view = self.view.borrow().clone();
            let others = view.pods.iter().filter(|(uid, _)| **uid != self.state.uid);
            Room {
                allocatable: self.node.allocatable,
                taken: resize::taken(others.map(|(_, pod)| &**pod)),
            }
        };
        let decision = resize::decide(&newest, &self.allocated, room);
        let retry = matches!(self.resize, Some(Progress::InProgress(Some(_))));
        if let Some(pending) = decision.pending {
            self.resize = Some(Progress::Pending(pending));
            self.reconsider();
        } else if !decision.changes.is_empty() || retry {
            self.allocated = resize::allocated(&decision.pod, &PodStatus::default());
            self.resize = Some(Progress::InProgress(None));
            self.actuate(&decision.pod, &decision.changes);
        } else if matches!(self.resize, Some(Progress::Pending(_))) {
            self.resize = None; // taken back
        }
        Input::Spec(decision.pod)
    }

    fn reconsider(&self) {
        let inputs = self.inputs.clone();
        tokio::spawn(async move {
            tokio::time::sleep(RESIZE_AGAIN).await;
            let _ = inputs.send(Box::new(Message::Reconsider)).await;
        });
    }

    /// Writes granted resources into the kernel's files; containers that want a restart get one.
    fn actuate(&self, pod: &Pod, changes: &[resize::Change]) {
        let (node, inputs) = (self.node.clone(), self.inputs.clone());
        let (uid, pod) = (self.state.uid.clone(), pod.clone());
        let restarts: Vec<ContainerRun> = changes
            .iter()
            .filter(|change| change.restart)
            .filter_map(|change| {
                let known = self.state.containers.iter();
                let container = known.clone().find(|c| c.name == change.container)?;
                Some(ContainerRun {
                    pod: uid.clone(),
                    name: container.name.clone(),
                    attempt: container.attempt,
                })
            })
            .collect();
        let restarting: Vec<String> = restarts.iter().map(|run| run.name.clone()).collect();
        tokio::spawn(async move {
            let written = prepare::write_limits(&node, &uid, &pod, &restarting).await;
            for run in restarts {
                let words = format!(
                    "Container {} resize requires restart: its resizePolicy says so",
                    run.name
                );
                let _ = inputs
                    .send(Box::new(Message::Input(Input::Restart(run, words))))
                    .await;
            }
            let _ = inputs.send(Box::new(Message::Resized(written))).await;
        });
    }

    fn resized(&mut self, result: Result<(), String>) {
        if !matches!(self.resize, Some(Progress::InProgress(_))) {
            return;
        }
        match result {
            Ok(()) => {
                self.resize = None;
                let words = "The pod's new resources are in force".to_owned();
                self.event("ResizeCompleted", words, false);
            }
            Err(words) => {
                self.event("ResizeError", words.clone(), true);
                self.resize = Some(Progress::InProgress(Some(words)));
                self.reconsider();
            }
        }
        self.report(false);
    }

    fn turn(&mut self, input: Input) {
        debug!(pod = %self.state.uid, ?input, "input");
        let before = self.state.phase;
        let actions = self.state.next(input, self.began.elapsed());
        self.carry_out(actions);
        if before != self.state.phase {
            info!(pod = %self.state.uid, phase = ?self.state.phase, "pod phase");
        }
        let running = |c: &super::state::Container| match c.run {
            Run::Running { .. } => true,
            Run::Exited(_) => c.role == Role::Init,
            _ => false,
        };
        if self.state.phase == Phase::Syncing
            && self.state.containers.iter().all(running)
            && let Some(words) = self.timeline.tell()
        {
            self.event("Timeline", words, false);
        }
    }

    /// Acts and reports. The removal comes last: the exit codes go with the sandbox, and from then
    /// on the final status, which reporting puts on the disk, is all there is.
    fn carry_out(&mut self, actions: Vec<Action>) {
        let is_removal = |action: &Action| matches!(action, Action::TearDown);
        let (removals, others): (Vec<_>, Vec<_>) = actions.into_iter().partition(is_removal);
        for action in others {
            self.act(action);
        }
        self.keep_probed();
        self.report(false);
        for action in removals {
            self.act(action);
        }
    }

    fn act(&mut self, action: Action) {
        debug!(pod = %self.state.uid, ?action, "action");
        match action {
            Action::PrepareSandbox => self.prepare(),
            Action::Start(run) => self.launch(run),
            Action::StartProbes(run) => self.start_probes(&run),
            Action::StopProbes(run) => {
                if let Some(task) = self.probes.remove(&run.name) {
                    task.abort();
                }
            }
            Action::Drain(number) => self.ask_for_drain(number),
            Action::PostStart(run) => self.run_hook(run, Hook::PostStart),
            Action::PreStop(run) => self.run_hook(run, Hook::PreStop),
            Action::StopHooks(run) => {
                if let Some(task) = self.hooks.remove(&run.name) {
                    task.abort();
                }
            }
            Action::Stop(run) => self.stop(run),
            Action::Kill(run) => self.kill(run),
            Action::TearDown => self.tear_down(),
            Action::Event(reason, words, warning) => self.event(reason, words, warning),
        }
    }

    fn prepare(&self) {
        let (node, inputs) = (self.node.clone(), self.inputs.clone());
        let (uid, pod) = (self.state.uid.clone(), self.state.pod.clone());
        let (view, stored) = (self.view.clone(), self.volumes.clone());
        tokio::spawn(async move {
            let input = match prepare::sandbox(&node, &uid, &pod, &view, &inputs).await {
                Ok((network, ready)) => {
                    let limited = limited(&node, &uid, &pod, &ready);
                    if !limited.is_empty() {
                        tokio::spawn(watch_usage(limited, inputs.clone()));
                    }
                    if volumes::token::wanted(&pod) {
                        let look = look_at_tokens(pod, uid, node.paths.clone(), inputs.clone());
                        tokio::spawn(look);
                    }
                    stored.store(Some(Arc::new(ready)));
                    Input::SandboxReady(network)
                }
                Err(failure) => Input::SandboxFailed(failure.reason.into(), failure.message),
            };
            let _ = inputs.send(Box::new(Message::Input(input))).await;
        });
    }

    fn launch(&self, run: ContainerRun) {
        let Sandbox::Ready(network) = &self.state.sandbox else {
            return;
        };
        let job = launch::Job {
            node: self.node.clone(),
            run: run.clone(),
            pod: self.state.pod.clone(),
            network: network.clone(),
            volumes: self.volumes.load_full().unwrap_or_default(),
            view: self.view.borrow().clone(),
            inputs: self.inputs.clone(),
            turn: self.turn.clone(),
            target: self.target_run(&run),
        };
        let inputs = self.inputs.clone();
        tokio::spawn(async move {
            let input = match launch::container(job).await {
                Ok((at, image_id)) => Input::Started { run, at, image_id },
                Err(failure) => Input::StartFailed(run, failure.reason.into(), failure.message),
            };
            let _ = inputs.send(Box::new(Message::Input(input))).await;
        });
    }

    /// The current run of the container whose processes this one is to see.
    fn target_run(&self, run: &ContainerRun) -> Option<ContainerRun> {
        let target = configs::target(&self.state.pod, &run.name)?;
        let found = self.state.containers.iter().find(|c| c.name == target)?;
        Some(ContainerRun {
            pod: run.pod.clone(),
            name: found.name.clone(),
            attempt: found.attempt,
        })
    }

    /// In a shared pid namespace the kernel ends nobody with a container's first process.
    fn end_leftovers(&self, run: &ContainerRun) {
        let spec = self.state.pod.spec.as_ref();
        let shared = spec
            .is_some_and(|s| s.share_process_namespace == Some(true) || s.host_pid == Some(true));
        let ephemeral = configs::target(&self.state.pod, &run.name).is_some();
        if shared || ephemeral {
            self.kill(run.clone());
        }
    }

    fn kill(&self, run: ContainerRun) {
        let (node, inputs) = (self.node.clone(), self.inputs.clone());
        tokio::spawn(async move {
            if let Err(error) = node.runtime.kill_container(&run).await {
                warn!(%run, %error, "kill");
                let words = format!("container {:?}: {error}", run.name);
                let _ = inputs.send(Box::new(Message::FailedKill(words))).await;
            }
        });
    }

    fn stop(&self, run: ContainerRun) {
        let node = self.node.clone();
        let config = self.state.config(&run.name);
        let image = config.as_ref().and_then(|c| c.image.clone());
        let named = config
            .and_then(|c| c.lifecycle.clone()?.stop_signal)
            .and_then(|name| launch::signal_number(&name));
        tokio::spawn(async move {
            let signal = match named {
                Some(signal) => signal,
                None => launch::stop_signal(&node, image.as_deref()).await,
            };
            if let Err(error) = node.runtime.signal_container(&run, signal).await {
                warn!(%run, signal, %error, "stop signal");
            }
        });
    }

    fn tear_down(&self) {
        let (node, inputs, uid) = (
            self.node.clone(),
            self.inputs.clone(),
            self.state.uid.clone(),
        );
        let runs: Vec<ContainerRun> = self
            .state
            .containers
            .iter()
            .flat_map(|c| {
                (0..=c.attempt).map(|attempt| ContainerRun {
                    pod: uid.clone(),
                    name: c.name.clone(),
                    attempt,
                })
            })
            .collect();
        let pod = self.state.pod.clone();
        tokio::spawn(async move {
            let input = match prepare::tear_down(&node, &uid, &pod, &runs).await {
                Ok(()) => Input::TornDown,
                Err(words) => {
                    let _ = inputs.send(Box::new(Message::FailedKill(words))).await;
                    Input::TearDownFailed
                }
            };
            let _ = inputs.send(Box::new(Message::Input(input))).await;
        });
    }

    /// The pod stays until it succeeds: whoever waits for that is told why.
    fn failed_kill(&mut self, words: String) {
        let now = Instant::now();
        let due = |at: Instant| now.duration_since(at) >= FAILED_KILL_EVENT_EVERY;
        if self.failed_kill_at.is_none_or(due) {
            self.failed_kill_at = Some(now);
            self.event("FailedKillPod", words, true);
        }
    }

    fn unhealthy(&mut self, kind: ProbeKind, words: &str) {
        let name = match kind {
            ProbeKind::Startup => "Startup",
            ProbeKind::Liveness => "Liveness",
            ProbeKind::Readiness => "Readiness",
        };
        let now = Instant::now();
        let due = |at: &Instant| now.duration_since(*at) >= UNHEALTHY_EVENT_EVERY;
        if self.unhealthy_at.get(name).is_none_or(due) {
            self.unhealthy_at.insert(name, now);
            self.event("Unhealthy", format!("{name} probe failed: {words}"), true);
        }
    }

    /// Sends the status when it has changed, and always the last word.
    fn report(&mut self, released: bool) {
        let around = status::Surroundings {
            host_addresses: self.node.host_addresses.clone(),
            now: now(),
            resize: self.resize.clone(),
        };
        // What an ended pod was is known; its containers are not looked at any more.
        let ended_before =
            status::is_final(&self.reported) && self.state.phase >= Phase::TearingDown;
        let rendered = match ended_before {
            true => self.reported.clone(),
            false => status::render(&self.state, &self.reported, &around),
        };
        if rendered == self.reported && !released {
            return;
        }
        let is_final = status::is_final(&rendered);
        if is_final && !released {
            records::write_final(&self.node.paths, &self.state.uid, &rendered);
        }
        self.reported = rendered;
        if !released && status::is_starting(&self.reported) {
            self.tell_at
                .get_or_insert_with(|| Instant::now() + START_IS_TOLD_AFTER);
            return;
        }
        self.tell(released);
    }

    fn tell(&mut self, released: bool) {
        self.tell_at = None;
        let is_final = status::is_final(&self.reported);
        let metadata = &self.state.pod.metadata;
        self.node.reporter.status(
            &self.state.uid,
            metadata.namespace.as_deref().unwrap_or_default(),
            metadata.name.as_deref().unwrap_or_default(),
            &self.reported,
            is_final || released,
            released,
        );
    }

    fn event(&self, reason: &str, words: String, warning: bool) {
        let metadata = &self.state.pod.metadata;
        info!(pod = %self.state.uid, name = self.title(), reason, "{words}");
        let stamp = Time(now());
        self.node.reporter.event(Event {
            metadata: ObjectMeta {
                namespace: metadata.namespace.clone(),
                ..ObjectMeta::default()
            },
            involved_object: ObjectReference {
                api_version: Some("v1".into()),
                kind: Some("Pod".into()),
                namespace: metadata.namespace.clone(),
                name: metadata.name.clone(),
                uid: Some(self.state.uid.to_string()),
                ..ObjectReference::default()
            },
            reason: Some(reason.into()),
            message: Some(words),
            type_: Some(if warning { "Warning" } else { "Normal" }.into()),
            source: Some(gantry_api::k8s_openapi::api::core::v1::EventSource {
                component: Some("gantry-agent".into()),
                host: Some(self.node.name.clone()),
            }),
            first_timestamp: Some(stamp.clone()),
            last_timestamp: Some(stamp),
            count: Some(1),
            ..Event::default()
        });
    }
}

/// Looks at the tokens until the worker ends, and has volumes made again when one is due. Pods of one
/// moment look at different ones: up to an eighth later, which is a tenth of a token's life.
async fn look_at_tokens(pod: Arc<Pod>, uid: PodUid, paths: Paths, inputs: Inputs) {
    let mut pause = volumes::token::next_renewal(&pod, &paths, &uid).await;
    loop {
        let pause_max = pause.min(TOKEN_INTERVAL);
        let jitter = pause_max.mul_f64(rand::random::<f64>() / 8.0);
        tokio::select! {
            // Cancel-safe: a timer, and waiting for the end.
            () = tokio::time::sleep(pause_max + jitter) => {}
            () = inputs.closed() => return,
        }
        pause = volumes::token::next_renewal(&pod, &paths, &uid).await;
        if pause.is_zero() {
            if inputs.send(Box::new(Message::Tokens)).await.is_err() {
                return;
            }
            pause = TOKEN_AGAIN;
        }
    }
}

/// What of the pod's local storage has to be measured.
fn limited(
    node: &Node,
    uid: &PodUid,
    pod: &Pod,
    ready: &ReadyVolumes,
) -> Vec<volumes::usage::Limited> {
    let part = |text: &Option<String>| text.clone().unwrap_or_default();
    let (namespace, name) = (part(&pod.metadata.namespace), part(&pod.metadata.name));
    let log = node.paths.pod_log(&namespace, &name, uid);
    volumes::usage::limited(pod, ready, &node.paths.pod_lib(uid), &log)
}

/// Measures what has a limit until the worker ends, or one is over it.
async fn watch_usage(volumes: Vec<volumes::usage::Limited>, inputs: Inputs) {
    let volumes = Arc::new(volumes);
    loop {
        tokio::select! {
            // Cancel-safe: a timer, and waiting for the end.
            () = tokio::time::sleep(volumes::usage::INTERVAL) => {}
            () = inputs.closed() => return,
        }
        let measured = volumes.clone();
        let look = move || volumes::usage::exceeded(&measured);
        if let Ok(Some(words)) = tokio::task::spawn_blocking(look).await {
            let input = Input::Fail(EVICTED, words);
            let _ = inputs.send(Box::new(Message::Input(input))).await;
            return;
        }
    }
}

/// How long ago the pod became active on this node.
/// Returns at this time; never without one. Cancel-safe.
async fn until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

fn age(status: &PodStatus) -> Duration {
    let Some(start) = &status.start_time else {
        return Duration::ZERO;
    };
    let seconds = Timestamp::now().as_second() - start.0.as_second();
    Duration::from_secs(u64::try_from(seconds).unwrap_or(0))
}

/// The wall clock in whole seconds, as the API's times are.
fn now() -> Timestamp {
    let now = Timestamp::now();
    Timestamp::from_second(now.as_second()).unwrap_or(now)
}
