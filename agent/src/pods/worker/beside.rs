//! What a worker does beside its running containers: probes, hooks, last words.

use std::collections::BTreeMap;
use std::path::PathBuf;

use gantry_api::k8s_openapi::api::core::v1::Container as ContainerConfig;
use tokio::time::Instant;

use super::{Message, Worker};
use crate::ids::ContainerRun;
use crate::paths::Paths;
use crate::pods::check::Target;
use crate::pods::hooks::{self, Hook};
use crate::pods::probes::Prober;
use crate::pods::records::{self, Probed};
use crate::pods::state::{Container, Input, Run, Sandbox};
use crate::pods::{drain, prepare, termination};
use crate::runtime::Exit;

impl Worker {
    /// A running container as its probes and hooks see it; none while its address is not known.
    pub(super) fn target(&self, run: &ContainerRun) -> Option<Target> {
        let address = match &self.state.sandbox {
            Sandbox::Ready(network) => network.addresses.first().copied(),
            // Adopted: the sandbox is made sure of in parallel; its address is known already.
            _ => self
                .reported
                .pod_ip
                .as_deref()
                .and_then(|ip| ip.parse().ok()),
        };
        Some(Target {
            run: run.clone(),
            config: self.state.config(&run.name)?.into_owned(),
            address: address?,
            runtime: self.node.runtime.clone(),
        })
    }

    pub(super) fn start_probes(&mut self, run: &ContainerRun) {
        let Some(target) = self.target(run) else {
            return;
        };
        if !is_probed(&target.config) {
            return;
        }
        let known = self.known(run);
        let adopted = self.adopted.get(&run.name) == Some(&run.attempt);
        let prober = Prober {
            target,
            inputs: self.inputs.clone(),
            limits: self.node.probes.clone(),
            known,
            began: Instant::now(),
            adopted,
        };
        let task = tokio::spawn(prober.watch());
        if let Some(before) = self.probes.insert(run.name.clone(), task.abort_handle()) {
            before.abort();
        }
    }

    /// Finds out when no node sends to the pod any more. An agent after this one does not wait
    /// longer for the pod's end than this one would have.
    pub(super) fn ask_for_drain(&mut self, number: u32) {
        if self.state.deleted {
            records::begin_drain(&self.node.paths, &self.state.uid);
        }
        let namespace = self.state.pod.metadata.namespace.clone();
        let asked = drain::ask(
            self.view.clone(),
            self.node.reporter.clone(),
            namespace.unwrap_or_default(),
            self.state.uid.clone(),
            number,
            self.inputs.clone(),
        );
        let task = tokio::spawn(asked).abort_handle();
        if let Some(before) = self.drain.replace(task) {
            before.abort();
        }
    }

    /// What is known of a run's probes: the state's verdicts, and the counters.
    pub(super) fn known(&self, run: &ContainerRun) -> Probed {
        let counted = self.counted.get(&run.name).cloned().unwrap_or_default();
        let state = self.state.containers.iter().find(|c| c.name == run.name);
        let counted = match counted.attempt == run.attempt {
            true => counted,
            false => Probed::default(),
        };
        Probed {
            attempt: run.attempt,
            started: state.is_some_and(|c| c.started),
            ready: state.is_some_and(|c| c.ready),
            ..counted
        }
    }

    /// Keeps what an agent after this one must know, when it has changed.
    pub(super) fn keep_probed(&mut self) {
        let running = |c: &&Container| matches!(c.run, Run::Running { .. });
        let probed: BTreeMap<String, Probed> = self
            .state
            .containers
            .iter()
            .filter(running)
            .filter(|c| self.state.config(&c.name).is_some_and(|c| is_probed(&c)))
            .map(|c| {
                let run = ContainerRun {
                    pod: self.state.uid.clone(),
                    name: c.name.clone(),
                    attempt: c.attempt,
                };
                (c.name.clone(), self.known(&run))
            })
            .collect();
        if probed != self.probed {
            records::write_probed(&self.node.paths, &self.state.uid, &probed);
            self.probed = probed;
        }
    }

    pub(super) fn run_hook(&mut self, run: ContainerRun, hook: Hook) {
        let target = self.target(&run);
        let inputs = self.inputs.clone();
        let name = run.name.clone();
        let task = tokio::spawn(async move {
            let result = match target {
                Some(target) => hooks::run(&target, hook).await,
                None => Err("the pod's address is not known".into()),
            };
            let input = match hook {
                Hook::PostStart => Input::PostStarted(run, result),
                Hook::PreStop => Input::PreStopped(run, result),
            };
            let _ = inputs.send(Box::new(Message::Input(input))).await;
        });
        if let Some(before) = self.hooks.insert(name, task.abort_handle()) {
            before.abort();
        }
    }

    pub(super) fn last_words(&self, run: &ContainerRun) -> LastWords {
        let (namespace, name) = prepare::names(&self.state.pod);
        let log = self.node.paths.pod_log(namespace, name, &run.pod);
        let config = self.state.config(&run.name);
        let policy = config.and_then(|c| c.termination_message_policy.clone());
        LastWords {
            file: termination::file(&prepare::etc(&self.node, &run.pod), run),
            log: Paths::container_log(&log, run),
            log_on_error: policy.as_deref() == Some("FallbackToLogsOnError"),
        }
    }

    /// Reads the termination message before the exit is taken: the status has both at once.
    pub(super) fn hear_last_words(&self, run: ContainerRun, exit: Exit) {
        let words = self.last_words(&run);
        let inputs = self.inputs.clone();
        tokio::spawn(async move {
            let read = tokio::task::spawn_blocking({
                let exit = exit.clone();
                move || words.read(&exit)
            });
            let words = read.await.unwrap_or_default();
            let _ = inputs
                .send(Box::new(Message::Ended(run, exit, words)))
                .await;
        });
    }
}

/// Where a run's last words are.
pub(super) struct LastWords {
    file: PathBuf,
    log: PathBuf,
    log_on_error: bool,
}

impl LastWords {
    pub(super) fn read(&self, exit: &Exit) -> String {
        termination::read(&self.file, &self.log, self.log_on_error, exit)
    }
}

fn is_probed(config: &ContainerConfig) -> bool {
    config.startup_probe.is_some()
        || config.liveness_probe.is_some()
        || config.readiness_probe.is_some()
}
