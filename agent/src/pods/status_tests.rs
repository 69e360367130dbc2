use std::sync::Arc;
use std::time::Duration;

use gantry_api::k8s_openapi::api::core::v1::Pod;

use super::*;
use crate::ids::PodUid;
use crate::network::PodNetwork;
use crate::pods::state::{Action, Input};

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
    let actions = state.next(Input::Fail("Evicted", "too much".into()), second);
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
