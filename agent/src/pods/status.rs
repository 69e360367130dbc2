//! A worker's state as the API shows it: phase, conditions, container statuses. Pure.
//!
//! Source: the kubelet's `generateAPIPodStatus`. A condition keeps its transition time while its
//! status is unchanged, so an agent restart shows no flip.

use std::net::IpAddr;
use std::time::SystemTime;

use gantry_api::k8s_openapi::api::core::v1::{
    ContainerState, ContainerStateRunning, ContainerStateTerminated, ContainerStateWaiting,
    ContainerStatus, HostIP, PodCondition, PodIP, PodStatus,
};
use gantry_api::k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use jiff::Timestamp;

use super::resize::{Pending, Progress};
use super::state::{Container, Phase, PodState, Role, Run, Sandbox};
use super::termination;
use crate::cgroups::limits::qos_class;
use crate::ids::ContainerRun;
use crate::runtime::Exit;

/// What the status needs beside the state.
#[derive(Clone, Debug)]
pub struct Surroundings {
    /// The node's addresses, the first is `status.hostIP`.
    pub host_addresses: Vec<IpAddr>,
    /// Now, by the wall clock.
    pub now: Timestamp,
    /// A resize that is asked for and not done.
    pub resize: Option<Progress>,
}

/// Renders the status. `previous` is what was reported last (or what the API held at agent start).
pub fn render(state: &PodState, previous: &PodStatus, around: &Surroundings) -> PodStatus {
    let phase = reported_phase(state, previous);
    let with = |roles: &'static [Role]| {
        let all = state.containers.iter();
        all.filter(|c| roles.contains(&c.role)).collect::<Vec<_>>()
    };
    let init = with(&[Role::Init, Role::Sidecar]);
    let main = with(&[Role::Main]);
    let ephemeral = with(&[Role::Ephemeral]);
    // A sidecar that is not ready keeps its pod out of Services, as a main container does.
    let unready: Vec<&str> = state
        .containers
        .iter()
        .filter(|c| matches!(c.role, Role::Main | Role::Sidecar))
        .filter(|c| !is_ready(c))
        .map(|c| c.name.as_str())
        .collect();
    let all_ready = !main.is_empty() && unready.is_empty();
    let ended = phase == "Succeeded" || phase == "Failed";
    let initialized = state.initialized
        || main.iter().any(|c| !matches!(c.run, Run::Waiting { .. }))
        || init.iter().all(|c| match c.role {
            Role::Init => matches!(&c.run, Run::Exited(e) if e.code == 0),
            _ => c.started,
        });
    let not_ready = match (ended, all_ready) {
        (true, _) if phase == "Succeeded" => Some(("PodCompleted", String::new())),
        (true, _) => Some(("PodFailed", String::new())),
        (false, false) => Some((
            "ContainersNotReady",
            format!("containers with unready status: [{}]", unready.join(" ")),
        )),
        (false, true) => None,
    };
    let gates = closed_gates(state, previous);
    let pod_not_ready = not_ready
        .clone()
        .or(gates.map(|words| ("ReadinessGatesNotReady", words)));
    let stands = state.adopted || matches!(state.sandbox, Sandbox::Ready(_));
    let sandbox_ready = stands && state.phase < Phase::TearingDown;
    // PodScheduled, readiness gates and other conditions are others': the control plane keeps them.
    let mut conditions = vec![
        condition(
            previous,
            around,
            "PodReadyToStartContainers",
            sandbox_ready,
            None,
        ),
        condition(
            previous,
            around,
            "Initialized",
            initialized,
            (!initialized).then(|| ("ContainersNotInitialized", String::new())),
        ),
        condition(
            previous,
            around,
            "Ready",
            pod_not_ready.is_none(),
            pod_not_ready,
        ),
        condition(
            previous,
            around,
            "ContainersReady",
            not_ready.is_none(),
            not_ready,
        ),
    ];
    conditions.extend(resize_condition(previous, around));
    conditions.extend(disruption_condition(state, previous, around));
    let pod_ips: Vec<PodIP> = match &state.sandbox {
        _ if ended => Vec::new(),
        Sandbox::Ready(network) => {
            let addresses = network.addresses.iter();
            addresses.map(|a| PodIP { ip: a.to_string() }).collect()
        }
        // A pod that runs keeps its addresses while its sandbox is looked at: without them every
        // Service would lose it for that moment.
        _ if state.adopted => previous.pod_ips.clone().unwrap_or_default(),
        _ => Vec::new(),
    };
    let failure = match (&state.failed, &state.sandbox) {
        (Some(failed), _) => Some((failed.reason, failed.message.as_str())),
        (
            None,
            Sandbox::Absent {
                failure: Some((reason, message)),
                ..
            },
        ) => Some((reason.as_str(), message.as_str())),
        _ => None,
    };
    let budget = message_budget(state.containers.len());
    let statuses = |list: &[&Container]| -> Vec<ContainerStatus> {
        list.iter()
            .map(|c| container_status(state, c, budget))
            .collect()
    };
    let host_ips: Vec<HostIP> = around
        .host_addresses
        .iter()
        .map(|a| HostIP { ip: a.to_string() })
        .collect();
    PodStatus {
        phase: Some(phase.into()),
        conditions: Some(conditions),
        message: failure.map(|(_, message)| message.into()),
        reason: failure.map(|(reason, _)| reason.into()),
        host_ip: host_ips.first().map(|ip| ip.ip.clone()),
        host_ips: (!host_ips.is_empty()).then_some(host_ips),
        pod_ip: pod_ips.first().map(|ip| ip.ip.clone()),
        pod_ips: (!pod_ips.is_empty()).then_some(pod_ips),
        start_time: previous.start_time.clone().or(Some(Time(around.now))),
        qos_class: Some(qos_class(&state.pod).as_str().into()),
        observed_generation: state.pod.metadata.generation,
        init_container_statuses: (!init.is_empty()).then(|| statuses(&init)),
        container_statuses: Some(statuses(&main)),
        ephemeral_container_statuses: (!ephemeral.is_empty()).then(|| statuses(&ephemeral)),
        ..PodStatus::default()
    }
}

const RESIZE_PENDING: &str = "PodResizePending";
const RESIZE_IN_PROGRESS: &str = "PodResizeInProgress";

/// Kubernetes' conditions of an in-place resize: there while it is not done, and only then.
fn resize_condition(previous: &PodStatus, around: &Surroundings) -> Option<PodCondition> {
    let (type_, reason, message) = match around.resize.clone()? {
        Progress::Pending(Pending::Deferred(words)) => (RESIZE_PENDING, "Deferred", words),
        Progress::Pending(Pending::Infeasible(words)) => (RESIZE_PENDING, "Infeasible", words),
        Progress::InProgress(None) => (RESIZE_IN_PROGRESS, "", String::new()),
        Progress::InProgress(Some(words)) => (RESIZE_IN_PROGRESS, "Error", words),
    };
    let why = (!reason.is_empty()).then_some((reason, message));
    Some(condition(previous, around, type_, true, why))
}

/// Kubernetes' condition of a pod that ends through no fault of its own, here by the node's doing. The
/// reason names the kubelet, whose place this agent takes: manifests match it.
fn disruption_condition(
    state: &PodState,
    previous: &PodStatus,
    around: &Surroundings,
) -> Option<PodCondition> {
    let failed = state.failed.as_ref().filter(|f| f.is_disruption)?;
    let why = ("TerminationByKubelet", failed.message.clone());
    Some(condition(
        previous,
        around,
        "DisruptionTarget",
        true,
        Some(why),
    ))
}

/// Does it tell nothing but that the pod is on its way: nothing has failed, ended or run?
pub fn is_starting(status: &PodStatus) -> bool {
    let waits = |one: &ContainerStatus| {
        let state = one.state.as_ref().and_then(|s| s.waiting.as_ref());
        let reason = state.and_then(|waiting| waiting.reason.as_deref());
        matches!(reason, Some("ContainerCreating" | "PodInitializing"))
            && state.is_some_and(|waiting| waiting.message.is_none())
            && one
                .last_state
                .as_ref()
                .is_none_or(|last| last.terminated.is_none())
    };
    let init = status.init_container_statuses.iter().flatten();
    let main = status.container_statuses.iter().flatten();
    status.phase.as_deref() == Some("Pending")
        && status.reason.is_none()
        && status.message.is_none()
        && status.ephemeral_container_statuses.is_none()
        && init.chain(main).all(waits)
}

/// Is this status the last word on the pod: nothing of it will ever run again?
pub fn is_final(status: &PodStatus) -> bool {
    matches!(status.phase.as_deref(), Some("Succeeded" | "Failed"))
}

fn is_ready(container: &Container) -> bool {
    container.ready && matches!(container.run, Run::Running { .. })
}

/// The readiness gates that are not open, as words; none when all are.
fn closed_gates(state: &PodState, previous: &PodStatus) -> Option<String> {
    let gates = state.pod.spec.as_ref()?.readiness_gates.as_ref()?;
    // The API's word is newer than ours: the gates' conditions are others' to set.
    let api = state.pod.status.as_ref().unwrap_or(previous);
    let status = |type_: &str| {
        let conditions = api.conditions.iter().flatten();
        conditions
            .filter(|c| c.type_ == type_)
            .map(|c| c.status.as_str())
            .next()
    };
    let words: Vec<String> = gates
        .iter()
        .filter_map(|gate| match status(&gate.condition_type) {
            Some("True") => None,
            Some(_) => Some(format!(
                "the status of pod readiness gate {:?} is not \"True\"",
                gate.condition_type
            )),
            None => Some(format!(
                "corresponding condition of pod readiness gate {:?} does not exist",
                gate.condition_type
            )),
        })
        .collect();
    (!words.is_empty()).then(|| words.join(", "))
}

/// A pod is not over while a process of it lives: until then it is what it was.
fn reported_phase(state: &PodState, previous: &PodStatus) -> &'static str {
    let phase = phase(state);
    let alive = state.containers.iter().any(Container::alive);
    if alive && matches!(phase, "Succeeded" | "Failed") {
        return match previous.phase.as_deref() {
            Some("Pending") => "Pending",
            _ => "Running",
        };
    }
    phase
}

/// Kubernetes' pod phase, by the rules of the kubelet's `getPhase`.
fn phase(state: &PodState) -> &'static str {
    let with = |role: Role| state.containers.iter().filter(move |c| c.role == role);
    let code = |c: &Container| match &c.run {
        Run::Exited(exit) => Some(exit.code),
        _ => None,
    };
    let never_ran = |c: &Container| {
        matches!(c.run, Run::Waiting { .. } | Run::Starting) && c.last_exit.is_none()
    };
    let running = |c: &Container| matches!(c.run, Run::Running { .. });
    let succeeded = with(Role::Main).all(|c| code(c) == Some(0));
    let init_failed = with(Role::Init).any(|c| code(c).is_some_and(|code| code != 0));
    let policy = state
        .pod
        .spec
        .as_ref()
        .and_then(|s| s.restart_policy.as_deref());
    let failed_before =
        |c: &Container| matches!(c.last_exit, Some((_, ref e)) if e.code != 0) && !running(c);
    let starting_over = with(Role::Init).any(|c| code(c).is_none() && failed_before(c));
    if policy == Some("Never") && (init_failed || starting_over) {
        return "Failed";
    }
    let terminal =
        state.phase >= Phase::Terminating && !state.containers.iter().any(Container::alive);
    if terminal {
        // A container that never ran, or that waits for a restart that will not come, has failed.
        let fine = succeeded && !init_failed && state.failed.is_none();
        return if fine { "Succeeded" } else { "Failed" };
    }
    let init_pending = with(Role::Init).any(|c| running(c) || never_ran(c));
    let sidecar_pending = with(Role::Sidecar).any(|c| never_ran(c) || running(c) && !c.started);
    let waiting = with(Role::Main).chain(with(Role::Sidecar)).any(never_ran);
    if init_pending || sidecar_pending && !state.initialized || waiting {
        return "Pending";
    }
    if with(Role::Main).chain(with(Role::Sidecar)).any(running) {
        return "Running";
    }
    match policy {
        Some("Never") if succeeded => "Succeeded",
        Some("Never") => "Failed",
        Some("OnFailure") if succeeded => "Succeeded",
        _ => "Running",
    }
}

/// What one container's termination message may have: 12 KiB for the pod's together.
fn message_budget(containers: usize) -> usize {
    (12 * 1024 / containers.max(1)).min(termination::MESSAGE_BYTES_MAX)
}

fn condition(
    previous: &PodStatus,
    around: &Surroundings,
    type_: &str,
    is_true: bool,
    why: Option<(&str, String)>,
) -> PodCondition {
    let status = if is_true { "True" } else { "False" };
    let before = previous
        .conditions
        .iter()
        .flatten()
        .find(|c| c.type_ == type_);
    let unchanged = before.filter(|c| c.status == status);
    let (reason, message) = why.map_or((None, None), |(reason, message)| {
        (
            Some(reason.to_owned()),
            (!message.is_empty()).then_some(message),
        )
    });
    PodCondition {
        type_: type_.into(),
        status: status.into(),
        last_transition_time: unchanged
            .and_then(|c| c.last_transition_time.clone())
            .or(Some(Time(around.now))),
        reason,
        message,
        ..PodCondition::default()
    }
}

fn container_status(state: &PodState, container: &Container, budget: usize) -> ContainerStatus {
    let id = |attempt: u32| {
        ContainerRun {
            pod: state.uid.clone(),
            name: container.name.clone(),
            attempt,
        }
        .container_id()
    };
    let message = |attempt: u32| {
        let mut messages = container.messages.iter();
        let found = messages.find(|(of, _)| *of == attempt);
        found.map(|(_, text)| shorten(text, budget))
    };
    let current = match &container.run {
        Run::Waiting {
            reason, message, ..
        } => waiting(reason, message),
        Run::Starting => waiting("ContainerCreating", ""),
        // Kubernetes: the state is not Running until the postStart handler completes.
        Run::Running { .. } if !container.hooked => waiting("ContainerCreating", ""),
        Run::Running { started_at, .. } => ContainerState {
            running: Some(ContainerStateRunning {
                started_at: Some(time(*started_at)),
            }),
            ..ContainerState::default()
        },
        Run::Exited(exit) => terminated(exit, id(container.attempt), message(container.attempt)),
    };
    let last = container
        .last_exit
        .as_ref()
        .map(|(attempt, exit)| terminated(exit, id(*attempt), message(*attempt)));
    let container_id = match (&container.run, &container.last_exit) {
        (Run::Running { .. } | Run::Exited(_), _) => Some(id(container.attempt)),
        (_, Some((attempt, _))) => Some(id(*attempt)),
        _ => None,
    };
    let config = state.config(&container.name);
    let image = config.as_ref().and_then(|c| c.image.clone());
    let image = image.unwrap_or_default();
    let resources = config.and_then(|c| c.resources.clone());
    // The attempt is the restart count; while a first start is tried nothing was restarted.
    ContainerStatus {
        name: container.name.clone(),
        ready: if container.role == Role::Init {
            matches!(&container.run, Run::Exited(e) if e.code == 0)
        } else {
            container.ready
        },
        started: Some(container.started && matches!(container.run, Run::Running { .. })),
        restart_count: restart_count(container),
        image,
        image_id: container.image_id.clone(),
        container_id,
        state: Some(current),
        last_state: Some(last.unwrap_or_default()),
        allocated_resources: resources.as_ref().and_then(|r| r.requests.clone()),
        resources,
        ..ContainerStatus::default()
    }
}

/// Restarts that have happened: a run still waiting is not one yet.
fn restart_count(container: &Container) -> i32 {
    let waiting = matches!(container.run, Run::Waiting { .. } | Run::Starting);
    let count = if waiting {
        container.attempt.saturating_sub(1)
    } else {
        container.attempt
    };
    i32::try_from(count).unwrap_or(i32::MAX)
}

fn waiting(reason: &str, message: &str) -> ContainerState {
    ContainerState {
        waiting: Some(ContainerStateWaiting {
            reason: Some(reason.into()),
            message: (!message.is_empty()).then(|| message.into()),
        }),
        ..ContainerState::default()
    }
}

/// The end of a text, cut at a character.
fn shorten(text: &str, bytes_max: usize) -> String {
    let mut from = text.len().saturating_sub(bytes_max);
    while !text.is_char_boundary(from) {
        from += 1;
    }
    text[from..].to_owned()
}

fn terminated(exit: &Exit, container_id: String, message: Option<String>) -> ContainerState {
    let reason = match exit {
        exit if exit.oom_killed => "OOMKilled",
        exit if exit.unknown => "ContainerStatusUnknown",
        exit if exit.code == 0 => "Completed",
        _ => "Error",
    };
    ContainerState {
        terminated: Some(ContainerStateTerminated {
            exit_code: exit.code,
            signal: (exit.signal != 0).then_some(exit.signal),
            reason: Some(reason.into()),
            started_at: Some(time(exit.started_at)),
            finished_at: Some(time(exit.finished_at)),
            container_id: Some(container_id),
            message,
        }),
        ..ContainerState::default()
    }
}

/// Whole seconds, as the API's times are.
fn time(at: SystemTime) -> Time {
    let stamp = Timestamp::try_from(at).unwrap_or(Timestamp::UNIX_EPOCH);
    Time(Timestamp::from_second(stamp.as_second()).unwrap_or(Timestamp::UNIX_EPOCH))
}

#[cfg(test)]
#[path = "status_tests.rs"]
mod tests;
