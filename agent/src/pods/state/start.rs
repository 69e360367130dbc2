//! Which container may start, and what a start, a hook, a probe or an exit means.
//!
//! ```text
//! init ─► init ─► sidecar (started?) ─► init ─► ... ─► main containers, side by side
//! ```
//! Ephemeral containers start at any time. A postStart hook holds back the main containers after
//! its own, as with the kubelet (service meshes rely on it).

use super::*;

impl PodState {
    /// Containers that may run now, in order.
    pub(super) fn startable(&self) -> Vec<usize> {
        let with = |role: Role| {
            let all = self.containers.iter().enumerate();
            all.filter(move |(_, c)| c.role == role).map(|(i, _)| i)
        };
        let mut wanted: Vec<usize> = with(Role::Ephemeral).collect();
        for (index, container) in self.containers.iter().enumerate() {
            match container.role {
                Role::Init if !self.initialized && !container.succeeded() => {
                    wanted.push(index);
                    return wanted;
                }
                Role::Sidecar => {
                    wanted.push(index);
                    if !self.initialized && !container.started {
                        return wanted;
                    }
                }
                Role::Init | Role::Main | Role::Ephemeral => {}
            }
        }
        for index in with(Role::Main) {
            wanted.push(index);
            if self.in_post_start(index) {
                break;
            }
        }
        wanted
    }

    /// Its start, or the postStart hook that belongs to it, is not over.
    fn in_post_start(&self, index: usize) -> bool {
        let container = &self.containers[index];
        let hook = self.config(&container.name).is_some_and(|c| {
            let hooks = c.lifecycle.as_ref();
            hooks.is_some_and(|l| l.post_start.is_some())
        });
        hook && (container.run == Run::Starting
            || matches!(container.run, Run::Running { .. }) && !container.hooked)
    }

    /// All init containers have done their part: from here on sidecars hold nobody back.
    pub(super) fn note_initialized(&mut self) {
        let done = |c: &Container| match c.role {
            Role::Init => c.succeeded(),
            Role::Sidecar => c.started,
            Role::Main | Role::Ephemeral => true,
        };
        self.initialized |= self.containers.iter().all(done);
    }

    pub(super) fn start_due(&mut self, now: Duration, actions: &mut Vec<Action>) {
        let due = |c: &Container| matches!(c.run, Run::Waiting { retry_at, .. } if retry_at <= now);
        // Looked at anew after each start: it may hold back the next one.
        while let Some(index) = self
            .startable()
            .into_iter()
            .find(|i| due(&self.containers[*i]))
        {
            self.containers[index].run = Run::Starting;
            actions.push(Action::Start(self.run_of(index)));
        }
    }

    pub(super) fn container_started(
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
        let container = &mut self.containers[index];
        if container.run != Run::Starting {
            return;
        }
        container.run = Run::Running {
            started_at: at,
            since: now,
        };
        container.image_id = image_id;
        container.started = false;
        container.ready = false;
        container.hooked = false;
        container.stop = Stop::No;
        if container.attempt == 0 {
            container.backoff.forget_failed_starts();
        }
        let words = format!("Started container {}", run.name);
        actions.push(Action::Event("Started", words, false));
        if self.in_post_start(index) {
            actions.push(Action::PostStart(run.clone()));
        } else {
            self.hooked(index, actions);
        }
    }

    /// The container is on its own now: probes begin.
    fn hooked(&mut self, index: usize, actions: &mut Vec<Action>) {
        let run = self.run_of(index);
        let (startup, readiness) = self
            .config(&run.name)
            .map(|c| (has_startup_probe(&c), c.readiness_probe.is_some()))
            .unwrap_or_default();
        let container = &mut self.containers[index];
        container.hooked = true;
        container.started = !startup;
        container.ready = !startup && !readiness;
        if self.phase == Phase::Syncing {
            actions.push(Action::StartProbes(run));
        }
    }

    pub(super) fn post_started(
        &mut self,
        run: &ContainerRun,
        result: Result<(), String>,
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        let Some(index) = self.current(run) else {
            return;
        };
        let container = &self.containers[index];
        if !matches!(container.run, Run::Running { .. }) || container.hooked {
            return;
        }
        match result {
            Ok(()) => self.hooked(index, actions),
            Err(words) => {
                let words = format!("postStart hook of container {}: {words}", run.name);
                actions.push(Action::Event("FailedPostStartHook", words, true));
                let words = format!("Container {} failed its postStart hook", run.name);
                actions.push(Action::Event("Killing", words, false));
                self.begin_stop(index, self.grace_s, now, actions);
            }
        }
    }

    pub(super) fn start_failed(
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

    pub(super) fn container_exited(
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
            // After an agent restart only the records know how long it was.
            Run::Running { since, .. } => {
                let recorded = exit.finished_at.duration_since(exit.started_at);
                now.saturating_sub(*since).max(recorded.unwrap_or_default())
            }
            // It ended before its start was reported.
            Run::Starting => Duration::ZERO,
            Run::Waiting { .. } | Run::Exited(_) => return,
        };
        actions.push(Action::StopProbes(run.clone()));
        actions.push(Action::StopHooks(run.clone()));
        let role = self.containers[index].role;
        let restart = self.phase == Phase::Syncing
            && !self.deleted
            && restarts(self.restart_policy(), role, &exit);
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

    pub(super) fn probed(
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
        let (has_readiness, grace_s) = self
            .config(&run.name)
            .map(|c| {
                let probe = match kind {
                    ProbeKind::Startup => c.startup_probe.as_ref(),
                    ProbeKind::Liveness => c.liveness_probe.as_ref(),
                    ProbeKind::Readiness => None,
                };
                let own = probe.and_then(|p| p.termination_grace_period_seconds);
                (c.readiness_probe.is_some(), own)
            })
            .unwrap_or_default();
        let grace_s = grace_s.map_or(self.grace_s, |s| s.max(0) as u64);
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
                let which = match kind {
                    ProbeKind::Startup => "startup",
                    _ => "liveness",
                };
                let words = format!(
                    "Container {} failed {which} probe, will be restarted",
                    run.name
                );
                self.stop_for_restart(index, words, grace_s, now, actions);
            }
        }
    }

    /// Nothing that the pod was made for runs, and nothing of it will be started again. Sidecars and
    /// ephemeral containers keep no pod alive.
    pub(super) fn ended_by_itself(&self) -> bool {
        let ended = |c: &Container| matches!(c.run, Run::Exited(_));
        let init_failed = self
            .containers
            .iter()
            .any(|c| c.role == Role::Init && ended(c) && !c.succeeded());
        let works = |c: &Container| matches!(c.role, Role::Init | Role::Main) && c.alive();
        let nothing_runs = !self.containers.iter().any(works);
        let mut main = self.containers.iter().filter(|c| c.role == Role::Main);
        nothing_runs && (init_failed || main.all(ended))
    }
}

pub(super) fn has_startup_probe(config: &ContainerConfig) -> bool {
    config.startup_probe.is_some()
}

/// Does a container that ended like this run again? An init container that succeeded never does, a
/// sidecar always, an ephemeral container never.
fn restarts(policy: &str, role: Role, exit: &Exit) -> bool {
    match (role, policy) {
        (Role::Sidecar, _) => true,
        (Role::Ephemeral, _) | (_, "Never") => false,
        (Role::Init, _) | (_, "OnFailure") => exit.code != 0,
        (Role::Main, _) => true,
    }
}
