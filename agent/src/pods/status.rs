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
use super::state::{Container, Phase, PodState, Run, Sandbox};
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
    let phase = phase(state);
    let (init, main): (Vec<&Container>, Vec<&Container>) =
        state.containers.iter().partition(|c| c.init);
    let all_ready = !main.is_empty()
        && main
            .iter()
            .all(|c| c.ready && matches!(c.run, Run::Running { .. }));
    let ended = phase == "Succeeded" || phase == "Failed";
    let initialized = init
        .iter()
        .all(|c| matches!(&c.run, Run::Exited(e) if e.code == 0))
        || main.iter().any(|c| !matches!(c.run, Run::Waiting { .. }));
    let unready: Vec<&str> = main
        .iter()
        .filter(|c| !c.ready)
        .map(|c| c.name.as_str())
        .collect();
    let not_ready = match (ended, all_ready) {
        (true, _) if phase == "Succeeded" => Some(("PodCompleted", String::new())),
        (true, _) => Some(("PodFailed", String::new())),
        (false, false) => Some((
            "ContainersNotReady",
            format!("containers with unready status: [{}]", unready.join(" ")),
        )),
        (false, true) => None,
    };
    let sandbox_ready =
        matches!(state.sandbox, Sandbox::Ready(_)) && state.phase < Phase::TearingDown;
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
        condition(previous, around, "Ready", all_ready, not_ready.clone()),
        condition(previous, around, "ContainersReady", all_ready, not_ready),
    ];
    conditions.extend(resize_condition(previous, around));
    // PodScheduled and foreign conditions belong to others.
    for other in previous.conditions.iter().flatten() {
        let over = [RESIZE_PENDING, RESIZE_IN_PROGRESS].contains(&other.type_.as_str());
        if !over && !conditions.iter().any(|c| c.type_ == other.type_) {
            conditions.push(other.clone());
        }
    }
    let addresses: Vec<IpAddr> = match &state.sandbox {
        Sandbox::Ready(network) if !ended => network.addresses.clone(),
        _ => Vec::new(),
    };
    let failure = match (&state.failed, &state.sandbox) {
        (Some((reason, message)), _) => Some((*reason, message.as_str())),
        (
            None,
            Sandbox::Absent {
                failure: Some((reason, message)),
                ..
            },
        ) => Some((reason.as_str(), message.as_str())),
        _ => None,
    };
    let pod_ips: Vec<PodIP> = addresses
        .iter()
        .map(|a| PodIP { ip: a.to_string() })
        .collect();
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
        init_container_statuses: (!init.is_empty())
            .then(|| init.iter().map(|c| container_status(state, c)).collect()),
        container_statuses: Some(main.iter().map(|c| container_status(state, c)).collect()),
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

/// Is this status the last word on the pod: nothing of it will ever run again?
pub fn is_final(status: &PodStatus) -> bool {
    matches!(status.phase.as_deref(), Some("Succeeded" | "Failed"))
}

/// Kubernetes' pod phase.
fn phase(state: &PodState) -> &'static str {
    let main = || state.containers.iter().filter(|c| !c.init);
    let exit = |c: &Container| match &c.run {
        Run::Exited(exit) => Some(exit.code),
        _ => None,
    };
    let alive = state.containers.iter().any(Container::alive);
    let init_failed = state
        .containers
        .iter()
        .any(|c| c.init && exit(c).is_some_and(|code| code != 0));
    let stopped = state.phase >= Phase::Terminating && !alive;
    if stopped && state.failed.is_some() {
        return "Failed";
    }
    if init_failed && stopped {
        return "Failed";
    }
    if stopped || main().all(|c| exit(c).is_some()) {
        // A container that never ran, or that waits for a restart that will not come, has failed.
        let succeeded = main().all(|c| exit(c) == Some(0));
        return if succeeded { "Succeeded" } else { "Failed" };
    }
    let begun = |c: &Container| {
        !matches!(c.run, Run::Waiting { .. } | Run::Starting) || c.last_exit.is_some()
    };
    let all_init_done = state
        .containers
        .iter()
        .filter(|c| c.init)
        .all(|c| exit(c) == Some(0));
    if all_init_done && main().all(begun) {
        "Running"
    } else {
        "Pending"
    }
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

fn container_status(state: &PodState, container: &Container) -> ContainerStatus {
    let id = |attempt: u32| {
        ContainerRun {
            pod: state.uid.clone(),
            name: container.name.clone(),
            attempt,
        }
        .container_id()
    };
    let current = match &container.run {
        Run::Waiting {
            reason, message, ..
        } => waiting(reason, message),
        Run::Starting => waiting("ContainerCreating", ""),
        Run::Running { started_at, .. } => ContainerState {
            running: Some(ContainerStateRunning {
                started_at: Some(time(*started_at)),
            }),
            ..ContainerState::default()
        },
        Run::Exited(exit) => terminated(exit, id(container.attempt)),
    };
    let last = container
        .last_exit
        .as_ref()
        .map(|(attempt, exit)| terminated(exit, id(*attempt)));
    let container_id = match (&container.run, &container.last_exit) {
        (Run::Running { .. } | Run::Exited(_), _) => Some(id(container.attempt)),
        (_, Some((attempt, _))) => Some(id(*attempt)),
        _ => None,
    };
    let config = state.config(&container.name);
    let image = config.and_then(|c| c.image.clone()).unwrap_or_default();
    let resources = config.and_then(|c| c.resources.clone());
    // The attempt is the restart count; while a first start is tried nothing was restarted.
    ContainerStatus {
        name: container.name.clone(),
        ready: if container.init {
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

fn terminated(exit: &Exit, container_id: String) -> ContainerState {
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
            ..ContainerStateTerminated::default()
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
