//! What a restarted agent makes of the containers it finds: nothing that runs is touched.
//!
//! Readiness and start come from this node's own record (`records::Probed`), which is never older
//! than the last change; without one from the API's status; so there is no flip in either direction.

use std::collections::BTreeMap;

use gantry_api::k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::*;

impl PodState {
    pub(super) fn adopt(
        &mut self,
        found: Vec<ObservedContainer>,
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        self.adopted = !found.is_empty();
        let status = self.pod.status.clone().unwrap_or_default();
        let statuses: BTreeMap<String, ContainerStatus> = status
            .init_container_statuses
            .into_iter()
            .flatten()
            .chain(status.container_statuses.into_iter().flatten())
            .chain(status.ephemeral_container_statuses.into_iter().flatten())
            .map(|status| (status.name.clone(), status))
            .collect();
        let main_ran = |o: &ObservedContainer| {
            let role = |c: &&Container| c.role == Role::Main && c.name == o.run.name;
            o.started_at.is_some() && self.containers.iter().any(|c| role(&c))
        };
        self.initialized = found.iter().any(main_ran);
        for index in 0..self.containers.len() {
            let known = statuses.get(&self.containers[index].name);
            self.adopt_one(index, &found, known, now, actions);
        }
    }

    fn adopt_one(
        &mut self,
        index: usize,
        found: &[ObservedContainer],
        known: Option<&ContainerStatus>,
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        let container = &mut self.containers[index];
        let runs = || found.iter().filter(|o| o.run.name == container.name);
        let newest = runs()
            .filter(|o| o.started_at.is_some())
            .max_by_key(|o| o.run.attempt);
        let Some(newest) = newest else {
            // It ran in an earlier boot: its next run gets a number of its own.
            let ran = known.filter(|s| s.container_id.as_deref().is_some_and(|i| !i.is_empty()));
            if container.role == Role::Ephemeral && ran.is_some() {
                container.run = Run::Exited(lost());
                return;
            }
            container.attempt = ran.map_or(0, |s| s.restart_count.max(0) as u32 + 1);
            return;
        };
        container.attempt = newest.run.attempt;
        container.backoff = Backoff::from_restarts(newest.run.attempt);
        container.image_id = known.map(|s| s.image_id.clone()).unwrap_or_default();
        container.last_exit = runs()
            .filter(|o| o.run.attempt < newest.run.attempt)
            .max_by_key(|o| o.run.attempt)
            .and_then(|o| Some((o.run.attempt, o.exit.clone()?)))
            .or_else(|| last_exit(known?, newest.run.attempt));
        let recalled = self
            .recalled
            .get(&newest.run.name)
            .filter(|r| r.attempt == newest.run.attempt);
        container.ready = recalled.map_or(known.is_some_and(|s| s.ready), |r| r.ready);
        let started = known.is_some_and(|s| s.started == Some(true));
        container.started = recalled.map_or(started, |r| r.started);
        // A hook that was cut off by the agent's end is not run a second time, as with the kubelet.
        container.hooked = true;
        container.run = Run::Running {
            started_at: newest.started_at.unwrap_or(SystemTime::UNIX_EPOCH),
            since: now,
        };
        let run = self.run_of(index);
        match newest.exit.clone() {
            Some(exit) => self.container_exited(&run, exit, now, actions),
            None => {
                let probed = self
                    .config(&run.name)
                    .is_some_and(|c| has_startup_probe(&c));
                // Without a startup probe to wait for, running is started.
                self.containers[index].started |= !probed;
                // The last agent may have died before it said that what needs no probe is ready.
                let readiness = self
                    .config(&run.name)
                    .is_some_and(|c| c.readiness_probe.is_some());
                let stays = self.pod.metadata.deletion_timestamp.is_none();
                self.containers[index].ready |= !probed && !readiness && stays;
                actions.push(Action::StartProbes(run));
            }
        }
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

/// An ephemeral container of an earlier boot: it is never started again, and nobody saw its end.
fn lost() -> Exit {
    Exit {
        code: 137,
        signal: 0,
        oom_killed: false,
        started_at: SystemTime::UNIX_EPOCH,
        finished_at: SystemTime::UNIX_EPOCH,
        unknown: true,
    }
}
