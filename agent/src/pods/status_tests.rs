use std::sync::Arc;
use std::time::Duration;

use gantry_api::k8s_openapi::api::core::v1::Pod;
use proptest::prelude::*;

use super::*;
use crate::ids::PodUid;
use crate::network::PodNetwork;
use crate::pods::state::{Action, Input};
use crate::runtime::ObservedContainer;

fn web() -> Arc<Pod> {
    Arc::new(
        serde_json::from_value(serde_json::json!({
            "metadata": {"name": "web", "namespace": "default", "uid": "u1"},
            "spec": {"restartPolicy": "Always", "containers": [{"name": "a", "image": "nginx"}]}
        }))
        .unwrap(),
    )
}

fn around(second: i64) -> Surroundings {
    Surroundings {
        host_addresses: vec![IpAddr::from([192, 168, 1, 2])],
        now: Timestamp::from_second(second).unwrap(),
        resize: None,
    }
}

fn run() -> ContainerRun {
    ContainerRun {
        pod: PodUid::new("u1").unwrap(),
        name: "a".into(),
        attempt: 0,
    }
}

fn running() -> PodState {
    let mut state = PodState::new(PodUid::new("u1").unwrap(), web());
    state.next(Input::Timer, Duration::ZERO);
    state.next(
        Input::SandboxReady(PodNetwork {
            addresses: vec![IpAddr::from([10, 244, 0, 2])],
            netns: None,
            ipcns: "/i".into(),
            utsns: None,
            userns: None,
        }),
        Duration::ZERO,
    );
    let at = SystemTime::UNIX_EPOCH + Duration::from_secs(1000);
    let input = Input::Started {
        run: run(),
        at,
        image_id: "sha256:1".into(),
    };
    state.next(input, Duration::ZERO);
    state
}

#[test]
fn only_a_pod_that_nothing_has_befallen_is_merely_starting() {
    let told = |state: &PodState| render(state, &PodStatus::default(), &around(1));
    let mut state = PodState::new(PodUid::new("u1").unwrap(), web());
    assert!(is_starting(&told(&state)));
    state.next(Input::Timer, Duration::ZERO);
    assert!(is_starting(&told(&state)));
    assert!(!is_starting(&told(&running())));
    state.next(
        Input::SandboxFailed("FailedMount".into(), "no such secret".into()),
        Duration::ZERO,
    );
    assert!(!is_starting(&told(&state)));
    assert!(!is_starting(&PodStatus::default()), "of no phase");
}

#[test]
fn a_running_pod_is_ready_and_has_its_addresses() {
    let status = render(&running(), &PodStatus::default(), &around(2000));
    assert_eq!(status.phase.as_deref(), Some("Running"));
    assert_eq!(status.pod_ip.as_deref(), Some("10.244.0.2"));
    assert_eq!(status.host_ip.as_deref(), Some("192.168.1.2"));
    let ready = status
        .conditions
        .iter()
        .flatten()
        .find(|c| c.type_ == "Ready")
        .unwrap();
    assert_eq!(ready.status, "True");
    let container = &status.container_statuses.as_ref().unwrap()[0];
    assert_eq!(container.container_id.as_deref(), Some("gantry://u1/a/0"));
    assert_eq!(container.restart_count, 0);
}

#[test]
fn a_new_agent_reports_an_adopted_pod_as_it_was_before_it_has_looked_at_its_sandbox() {
    let before = render(&running(), &PodStatus::default(), &around(2000));
    let mut pod = (*web()).clone();
    pod.status = Some(before.clone());
    let mut state = PodState::new(PodUid::new("u1").unwrap(), Arc::new(pod));
    let found = ObservedContainer {
        run: run(),
        started_at: Some(SystemTime::UNIX_EPOCH + Duration::from_secs(1000)),
        exit: None,
        pid: None,
    };
    state.next(Input::Observed(vec![found]), Duration::ZERO);
    state.next(Input::Timer, Duration::ZERO);
    assert!(!matches!(state.sandbox, Sandbox::Ready(_)));
    let after = render(&state, &before, &around(3000));
    assert_eq!(after.pod_ips, before.pod_ips);
    assert_eq!(after.conditions, before.conditions);
    // What cannot be made whole again is said.
    state.next(
        Input::SandboxFailed("NetworkNotReady".into(), "gone".into()),
        Duration::ZERO,
    );
    assert_eq!(render(&state, &after, &around(3000)).pod_ips, None);
}

#[test]
fn conditions_keep_their_transition_time_while_unchanged() {
    let first = render(&running(), &PodStatus::default(), &around(2000));
    let second = render(&running(), &first, &around(3000));
    assert_eq!(first, second);
}

#[test]
fn a_waiting_restart_is_no_restart_yet() {
    let mut state = running();
    let exit = Exit {
        code: 1,
        signal: 0,
        oom_killed: false,
        started_at: SystemTime::UNIX_EPOCH,
        finished_at: SystemTime::UNIX_EPOCH,
        unknown: false,
    };
    // The first restart is immediate; its run 1 is being started.
    state.next(Input::Exited(run(), exit), Duration::from_secs(1));
    let status = render(&state, &PodStatus::default(), &around(2000));
    let container = &status.container_statuses.as_ref().unwrap()[0];
    assert_eq!(container.restart_count, 0);
    let last = container
        .last_state
        .as_ref()
        .unwrap()
        .terminated
        .as_ref()
        .unwrap();
    assert_eq!((last.exit_code, last.reason.as_deref()), (1, Some("Error")));
    assert_eq!(status.phase.as_deref(), Some("Running"));
    assert!(!is_final(&status));
}

#[test]
fn a_resize_shows_while_it_is_not_done_and_only_then() {
    let state = PodState::new(PodUid::new("u").unwrap(), Arc::new(resized_pod()));
    let mut surroundings = around(1);
    let words = "Node didn't have enough resource: cpu".to_owned();
    surroundings.resize = Some(Progress::Pending(Pending::Deferred(words.clone())));
    let first = render(&state, &PodStatus::default(), &surroundings);
    let of = |status: &PodStatus, type_: &str| {
        let all = status.conditions.clone().unwrap_or_default();
        all.into_iter().find(|c| c.type_ == type_)
    };
    let pending = of(&first, "PodResizePending").unwrap();
    assert_eq!(pending.reason.as_deref(), Some("Deferred"));
    assert_eq!(pending.message, Some(words));
    let held = &first.container_statuses.as_ref().unwrap()[0];
    assert_eq!(held.allocated_resources.as_ref().unwrap()["cpu"].0, "250m");
    assert_eq!(
        held.resources.as_ref().unwrap().limits.as_ref().unwrap()["cpu"].0,
        "500m"
    );
    surroundings.resize = Some(Progress::InProgress(None));
    let second = render(&state, &first, &surroundings);
    assert!(of(&second, "PodResizePending").is_none());
    assert!(of(&second, "PodResizeInProgress").is_some());
    surroundings.resize = None;
    let third = render(&state, &second, &surroundings);
    assert!(of(&third, "PodResizeInProgress").is_none());
}

fn resized_pod() -> Pod {
    serde_json::from_value(
        serde_json::json!({"metadata": {"name": "p"}, "spec": {"containers": [{
            "name": "a", "resources": {"requests": {"cpu": "250m"}, "limits": {"cpu": "500m"}},
        }]}}),
    )
    .unwrap()
}

#[test]
fn a_pod_that_the_node_ends_stops_and_has_failed_with_the_reason() {
    let mut state = running();
    let second = Duration::from_secs(1);
    let actions = state.next(Input::Evict("too much".into()), second);
    assert!(actions.contains(&Action::Event("Evicted", "too much".into(), true)));
    assert!(actions.contains(&Action::Stop(run())));
    assert_eq!(state.wake_at(), Some(second * 2), "killed after one second");
    let status = render(&state, &PodStatus::default(), &around(2000));
    assert_eq!(status.phase.as_deref(), Some("Running"));
    let exit = Exit {
        code: 0,
        signal: 0,
        oom_killed: false,
        started_at: SystemTime::UNIX_EPOCH,
        finished_at: SystemTime::UNIX_EPOCH,
        unknown: false,
    };
    let actions = state.next(Input::Exited(run(), exit), second * 2);
    assert!(actions.contains(&Action::TearDown));
    let status = render(&state, &PodStatus::default(), &around(2001));
    assert_eq!(status.phase.as_deref(), Some("Failed"));
    assert_eq!(status.reason.as_deref(), Some("Evicted"));
    assert_eq!(status.message.as_deref(), Some("too much"));
}

#[test]
fn a_disruption_is_told_from_a_limit_that_the_pod_has_broken() {
    let why = |input: Input| {
        let mut state = running();
        state.next(input, Duration::from_secs(1));
        let status = render(&state, &PodStatus::default(), &around(2000));
        let mut conditions = status.conditions.into_iter().flatten();
        let found = conditions.find(|c| c.type_ == "DisruptionTarget");
        found.map(|c| (c.status, c.reason.unwrap(), c.message.unwrap()))
    };
    let by_node = |message: &str| {
        let reason = "TerminationByKubelet".to_owned();
        Some(("True".to_owned(), reason, message.to_owned()))
    };
    assert_eq!(
        why(Input::Evict("low on memory".into())),
        by_node("low on memory")
    );
    assert_eq!(why(Input::Shutdown(5)), by_node(crate::shutdown::MESSAGE));
    assert_eq!(
        why(Input::Fail(
            crate::pods::state::EVICTED,
            "over its limit".into()
        )),
        None
    );
}

fn sidecar_pod(policy: &str) -> Arc<Pod> {
    Arc::new(
        serde_json::from_value(serde_json::json!({
            "metadata": {"name": "web", "namespace": "default", "uid": "u1"},
            "spec": {
                "restartPolicy": policy,
                "readinessGates": [{"conditionType": "example.com/on"}],
                "initContainers": [{"name": "i", "image": "x"},
                    {"name": "s", "image": "x", "restartPolicy": "Always"}],
                "containers": [{"name": "a", "image": "x"}, {"name": "b", "image": "x"}]
            }
        }))
        .unwrap(),
    )
}

fn ready(status: &PodStatus, type_: &str) -> bool {
    let mut conditions = status.conditions.iter().flatten();
    conditions.any(|c| c.type_ == type_ && c.status == "True")
}

#[test]
fn a_readiness_gate_is_opened_by_somebody_else() {
    let mut state = running();
    let mut pod = Pod::clone(&web());
    pod.spec.as_mut().unwrap().readiness_gates = Some(vec![
        serde_json::from_value(serde_json::json!({"conditionType": "example.com/on"})).unwrap(),
    ]);
    state.next(Input::Spec(Arc::new(pod.clone())), Duration::ZERO);
    let shut = render(&state, &PodStatus::default(), &around(1));
    assert!(ready(&shut, "ContainersReady") && !ready(&shut, "Ready"));
    let condition = PodCondition {
        type_: "example.com/on".into(),
        status: "True".into(),
        ..PodCondition::default()
    };
    pod.status = Some(PodStatus {
        conditions: Some(vec![condition]),
        ..PodStatus::default()
    });
    state.next(Input::Spec(Arc::new(pod)), Duration::ZERO);
    let open = render(&state, &shut, &around(2));
    assert!(ready(&open, "Ready"));
    // The gate's own condition is not the agent's to report.
    assert!(!ready(&open, "example.com/on"));
}

#[test]
fn termination_messages_share_12_kib() {
    let mut state = running();
    let exit = Exit {
        code: 1,
        signal: 0,
        oom_killed: false,
        started_at: SystemTime::UNIX_EPOCH,
        finished_at: SystemTime::UNIX_EPOCH,
        unknown: false,
    };
    state.note_message(&run(), "x".repeat(5000));
    state.next(Input::Exited(run(), exit), Duration::from_secs(1));
    let status = render(&state, &PodStatus::default(), &around(1));
    let last = status.container_statuses.unwrap()[0]
        .last_state
        .clone()
        .unwrap();
    assert_eq!(last.terminated.unwrap().message.unwrap().len(), 4096);
    assert_eq!(message_budget(12), 1024);
    assert_eq!(shorten("aé", 1), "");
}

/// The kubelet's `getPhase`, written down as it stands there: by the statuses, not by our state.
fn oracle(policy: &str, status: &PodStatus, initialized: bool, terminal: bool) -> &'static str {
    let statuses = |list: &Option<Vec<ContainerStatus>>| list.clone().unwrap_or_default();
    let state = |s: &ContainerStatus| s.state.clone().unwrap_or_default();
    let last_code = |s: &ContainerStatus| {
        let last = s.last_state.clone().unwrap_or_default();
        last.terminated.map(|t| t.exit_code)
    };
    let (mut pending_init, mut pending_sidecar, mut failed_init) = (0, 0, 0);
    let (mut running, mut waiting, mut stopped, mut succeeded) = (0, 0, 0, 0);
    for one in statuses(&status.init_container_statuses) {
        let s = state(&one);
        if one.name == "s" {
            if s.running.is_some() {
                pending_sidecar += i32::from(one.started != Some(true));
                running += 1;
            } else if s.waiting.is_some() && last_code(&one).is_none() {
                pending_sidecar += 1;
                waiting += 1;
            }
        } else if s.running.is_some() {
            pending_init += 1;
        } else if let Some(ended) = s.terminated {
            failed_init += i32::from(ended.exit_code != 0);
        } else {
            match last_code(&one) {
                Some(code) => failed_init += i32::from(code != 0),
                None => pending_init += 1,
            }
        }
    }
    for one in statuses(&status.container_statuses) {
        let s = state(&one);
        if s.running.is_some() {
            running += 1;
        } else if let Some(ended) = s.terminated {
            stopped += 1;
            succeeded += i32::from(ended.exit_code == 0);
        } else if last_code(&one).is_some() {
            stopped += 1;
        } else if terminal {
            // SyncTerminatedPod: what never ran is reported as ended with 137.
            stopped += 1;
        } else {
            waiting += 1;
        }
    }
    if failed_init > 0 && policy == "Never" {
        return "Failed";
    }
    if !terminal && (pending_init > 0 || pending_sidecar > 0 && !initialized || waiting > 0) {
        return "Pending";
    }
    if running > 0 {
        return "Running";
    }
    if terminal {
        return if stopped == succeeded {
            "Succeeded"
        } else {
            "Failed"
        };
    }
    match (policy, stopped == succeeded) {
        ("Always", _) => "Running",
        (_, true) => "Succeeded",
        ("Never", false) => "Failed",
        _ => "Running",
    }
}

proptest! {
    /// Any mixture of container states has the phase that the kubelet would give it.
    #[test]
    fn the_phase_is_the_kubelets(
        policy in prop::sample::select(vec!["Always", "OnFailure", "Never"]),
        runs in prop::collection::vec((0usize..5, any::<bool>(), prop::option::of(0i32..2)), 4),
        initialized in any::<bool>(),
        over in any::<bool>(),
    ) {
        let mut state = PodState::new(PodUid::new("u1").unwrap(), sidecar_pod(policy));
        state.initialized = initialized;
        let exit = |code: i32| Exit {
            code,
            signal: 0,
            oom_killed: false,
            started_at: SystemTime::UNIX_EPOCH,
            finished_at: SystemTime::UNIX_EPOCH,
            unknown: false,
        };
        for (container, (kind, started, last)) in state.containers.iter_mut().zip(&runs) {
            container.hooked = true;
            container.last_exit = last.map(|code| (0, exit(code)));
            match kind {
                0 => {}
                1 => container.run = Run::Starting,
                2 => {
                    container.run = Run::Running {
                        started_at: SystemTime::UNIX_EPOCH,
                        since: Duration::ZERO,
                    };
                    container.started = *started;
                }
                n => container.run = Run::Exited(exit(*n as i32 - 3)),
            }
        }
        if over {
            state.phase = Phase::Terminating;
        }
        let alive = state.containers.iter().any(Container::alive);
        let terminal = over && !alive;
        let status = render(&state, &PodStatus::default(), &around(1));
        // Terminal means that nothing failed in the init phase either; the kubelet asks the policy.
        let init_failed = matches!(&state.containers[0].run, Run::Exited(e) if e.code != 0);
        let expected = match oracle(policy, &status, initialized, terminal) {
            "Succeeded" if terminal && init_failed => "Failed",
            "Succeeded" | "Failed" if alive => "Running",
            phase => phase,
        };
        prop_assert_eq!(status.phase.as_deref(), Some(expected));
        prop_assert_eq!(is_final(&status) && alive, false, "final, and something lives");
        let untouched = state.containers.iter().all(|container| {
            matches!(container.run, Run::Waiting { .. } | Run::Starting) && container.last_exit.is_none()
        });
        prop_assert!(untouched || !is_starting(&status), "it would be told late: {status:?}");
    }
}
