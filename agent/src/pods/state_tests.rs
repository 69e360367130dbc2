use std::net::IpAddr;

use proptest::prelude::*;

use super::*;

fn pod(json: serde_json::Value) -> Arc<Pod> {
    Arc::new(serde_json::from_value(json).unwrap())
}

fn web(restart_policy: &str, init: usize) -> Arc<Pod> {
    let container = |name: String| serde_json::json!({"name": name, "image": "busybox"});
    pod(serde_json::json!({
        "metadata": {"name": "web", "namespace": "default", "uid": "u1"},
        "spec": {
            "restartPolicy": restart_policy,
            "terminationGracePeriodSeconds": 5,
            "initContainers": (0..init).map(|i| container(format!("init{i}"))).collect::<Vec<_>>(),
            "containers": [container("a".into()), container("b".into())],
        }
    }))
}

fn network() -> PodNetwork {
    PodNetwork {
        addresses: vec![IpAddr::from([10, 244, 0, 2])],
        netns: Some("/n".into()),
        ipcns: "/i".into(),
        utsns: Some("/u".into()),
        userns: None,
    }
}

fn exit(code: i32) -> Exit {
    Exit {
        code,
        signal: 0,
        oom_killed: false,
        started_at: SystemTime::UNIX_EPOCH,
        finished_at: SystemTime::UNIX_EPOCH,
        unknown: false,
    }
}

fn uid() -> PodUid {
    PodUid::new("u1").unwrap()
}

/// A pod that no Service knows: it is stopped without a drain.
fn undrained(uid: PodUid, pod: Arc<Pod>) -> PodState {
    let mut state = PodState::new(uid, pod);
    state.drain = Drain::Over;
    state
}

fn secs(s: u64) -> Duration {
    Duration::from_secs(s)
}

fn starts(actions: &[Action]) -> Vec<String> {
    let run = |a: &Action| match a {
        Action::Start(run) => Some(format!("{}/{}", run.name, run.attempt)),
        _ => None,
    };
    actions.iter().filter_map(run).collect()
}

fn run(name: &str, attempt: u32) -> ContainerRun {
    ContainerRun {
        pod: uid(),
        name: name.into(),
        attempt,
    }
}

fn started(name: &str, attempt: u32) -> Input {
    Input::Started {
        run: run(name, attempt),
        at: SystemTime::UNIX_EPOCH,
        image_id: "sha256:1".into(),
    }
}

fn deleted(pod: &Arc<Pod>, grace: i64) -> Arc<Pod> {
    let mut pod = Pod::clone(pod);
    pod.metadata.deletion_timestamp =
        Some(serde_json::from_str("\"2026-01-01T00:00:00Z\"").unwrap());
    pod.metadata.deletion_grace_period_seconds = Some(grace);
    Arc::new(pod)
}

#[test]
fn containers_start_together_after_the_sandbox() {
    let spec = web("Always", 0);
    let mut state = undrained(uid(), spec);
    assert_eq!(state.next(Input::Timer, secs(0)), [Action::PrepareSandbox]);
    assert_eq!(
        starts(&state.next(Input::SandboxReady(network()), secs(0))),
        ["a/0", "b/0"]
    );
    assert!(
        starts(&state.next(Input::Timer, secs(1))).is_empty(),
        "one start in flight"
    );
}

#[test]
fn init_containers_run_in_order_and_to_completion() {
    let mut state = undrained(uid(), web("Never", 2));
    state.next(Input::Timer, secs(0));
    assert_eq!(
        starts(&state.next(Input::SandboxReady(network()), secs(0))),
        ["init0/0"]
    );
    assert!(starts(&state.next(started("init0", 0), secs(0))).is_empty());
    assert_eq!(
        starts(&state.next(Input::Exited(run("init0", 0), exit(0)), secs(0))),
        ["init1/0"]
    );
    state.next(started("init1", 0), secs(0));
    let actions = state.next(Input::Exited(run("init1", 0), exit(3)), secs(0));
    assert!(starts(&actions).is_empty());
    assert!(
        actions.contains(&Action::TearDown),
        "a failed init container ends a Never pod"
    );
}

#[test]
fn crash_loop_waits_longer_each_time() {
    let mut state = undrained(uid(), web("Always", 0));
    state.next(Input::Timer, secs(0));
    state.next(Input::SandboxReady(network()), secs(0));
    state.next(started("a", 0), secs(0));
    let actions = state.next(Input::Exited(run("a", 0), exit(1)), secs(1));
    assert_eq!(starts(&actions), ["a/1"], "the first restart is immediate");
    state.next(started("a", 1), secs(1));
    assert!(starts(&state.next(Input::Exited(run("a", 1), exit(1)), secs(2))).is_empty());
    assert!(starts(&state.next(Input::Timer, secs(11))).is_empty());
    assert_eq!(state.wake_at(), Some(secs(12)));
    assert_eq!(starts(&state.next(Input::Timer, secs(12))), ["a/2"]);
}

#[test]
fn deletion_asks_then_kills_then_tears_down() {
    let spec = web("Always", 0);
    let mut state = undrained(uid(), spec.clone());
    state.next(Input::Timer, secs(0));
    state.next(Input::SandboxReady(network()), secs(0));
    state.next(started("a", 0), secs(0));
    // "b" is still starting: its start must be answered before anything is torn down.
    let actions = state.next(Input::Spec(deleted(&spec, 5)), secs(10));
    assert!(actions.contains(&Action::Stop(run("a", 0))));
    assert!(!actions.contains(&Action::TearDown));
    assert!(
        state
            .next(started("b", 0), secs(11))
            .contains(&Action::Stop(run("b", 0)))
    );
    state.next(Input::Exited(run("a", 0), exit(0)), secs(12));
    assert!(
        state
            .next(Input::Timer, secs(16))
            .contains(&Action::Kill(run("b", 0)))
    );
    assert!(
        state
            .next(Input::Exited(run("b", 0), exit(137)), secs(16))
            .contains(&Action::TearDown)
    );
    state.next(Input::TornDown, secs(17));
    assert_eq!(state.phase, Phase::Finished);
}

#[test]
fn a_shorter_grace_period_counts_a_longer_does_not() {
    let spec = web("Always", 0);
    let mut state = undrained(uid(), spec.clone());
    state.next(
        Input::Observed(vec![observed("a", 0, None), observed("b", 0, None)]),
        secs(0),
    );
    state.next(Input::Spec(deleted(&spec, 30)), secs(0));
    assert_eq!(
        state.wake_at(),
        Some(secs(30)),
        "the deletion's 30 s replace the pod's own 5 s"
    );
    state.next(Input::Spec(deleted(&spec, 60)), secs(1));
    assert_eq!(state.wake_at(), Some(secs(30)));
    state.next(Input::Spec(deleted(&spec, 1)), secs(2));
    assert_eq!(state.wake_at(), Some(secs(3)));
}

fn observed(name: &str, attempt: u32, exit: Option<Exit>) -> ObservedContainer {
    ObservedContainer {
        run: run(name, attempt),
        started_at: Some(SystemTime::UNIX_EPOCH),
        exit,
        pid: None,
    }
}

#[test]
fn adopted_containers_are_not_started_again() {
    let mut state = undrained(uid(), web("Always", 0));
    let found = vec![
        observed("a", 2, None),
        observed("a", 1, Some(exit(9))),
        observed("b", 0, None),
    ];
    let actions = state.next(Input::Observed(found), secs(0));
    assert!(starts(&actions).is_empty());
    assert_eq!(state.containers[0].attempt, 2);
    assert_eq!(state.containers[0].last_exit, Some((1, exit(9))));
    // The last agent may have died before it said so; a probe's verdict is asked of the probe.
    let probed = |c: &Container| state.config(&c.name).unwrap().readiness_probe.is_some();
    assert!(
        state
            .containers
            .iter()
            .all(|c| c.started && c.ready != probed(c))
    );
    // The sandbox is made sure of, which is idempotent; nothing running is touched by it.
    assert!(actions.contains(&Action::PrepareSandbox));
    assert!(starts(&state.next(Input::SandboxReady(network()), secs(0))).is_empty());
}

#[test]
fn an_exit_during_the_agents_absence_is_seen_at_adoption() {
    let mut state = undrained(uid(), web("Never", 0));
    let found = vec![
        observed("a", 0, Some(exit(7))),
        observed("b", 0, Some(exit(0))),
    ];
    let actions = state.next(Input::Observed(found), secs(0));
    assert!(actions.contains(&Action::TearDown));
    assert_eq!(state.containers[0].run, Run::Exited(exit(7)));
}

#[test]
fn a_failed_liveness_probe_restarts_the_container_after_its_grace() {
    let mut state = undrained(uid(), web("Always", 0));
    state.next(
        Input::Observed(vec![observed("a", 0, None), observed("b", 0, None)]),
        secs(0),
    );
    let actions = state.next(
        Input::Probe(run("a", 0), ProbeKind::Liveness, false),
        secs(100),
    );
    assert!(actions.contains(&Action::Stop(run("a", 0))));
    assert!(
        state
            .next(Input::Timer, secs(105))
            .contains(&Action::Kill(run("a", 0)))
    );
    state.next(Input::SandboxReady(network()), secs(105));
    let actions = state.next(Input::Exited(run("a", 0), exit(137)), secs(106));
    assert_eq!(starts(&actions), ["a/1"]);
}

#[test]
fn a_pod_that_ended_in_an_earlier_life_is_never_started() {
    let mut state = PodState::ended(uid(), web("Always", 0));
    let mut all = state.next(Input::Timer, secs(0));
    all.extend(state.next(Input::TornDown, secs(1)));
    all.extend(state.next(Input::Spec(web("Always", 0)), secs(2)));
    assert_eq!(all, [Action::TearDown]);
    assert_eq!(state.phase, Phase::Terminated);
}

/// Init containers (with a startup probe?) and sidecars before two main ones, with or without hooks.
fn varied(policy: &str, init: &[(bool, bool)], hooks: bool, deadline: Option<i64>) -> Arc<Pod> {
    let mut pod = serde_json::to_value(web(policy, init.len())).unwrap();
    for (index, (sidecar, probed)) in init.iter().enumerate() {
        let one = &mut pod["spec"]["initContainers"][index];
        if *sidecar {
            one["restartPolicy"] = "Always".into();
            if *probed {
                one["startupProbe"] = serde_json::json!({"tcpSocket": {"port": 1}});
            }
        }
    }
    if hooks {
        let sleep = serde_json::json!({"sleep": {"seconds": 1}});
        pod["spec"]["containers"][0]["lifecycle"] =
            serde_json::json!({"postStart": sleep, "preStop": sleep});
    }
    if let Some(seconds) = deadline {
        pod["spec"]["activeDeadlineSeconds"] = seconds.into();
    }
    self::pod(pod)
}

fn stops(actions: &[Action]) -> Vec<String> {
    let name = |a: &Action| match a {
        Action::Stop(run) => Some(run.name.clone()),
        _ => None,
    };
    actions.iter().filter_map(name).collect()
}

/// A pod with sidecars s0 and s1 and main container a, all running.
fn with_sidecars(policy: &str) -> PodState {
    let spec = pod(serde_json::json!({
        "metadata": {"name": "web", "namespace": "default", "uid": "u1"},
        "spec": {
            "restartPolicy": policy,
            "terminationGracePeriodSeconds": 10,
            "initContainers": [
                {"name": "s0", "restartPolicy": "Always",
                    "startupProbe": {"tcpSocket": {"port": 1}}},
                {"name": "s1", "restartPolicy": "Always"}],
            "containers": [{"name": "a"}],
        }
    }));
    let mut state = undrained(uid(), spec);
    state.next(Input::Timer, secs(0));
    let begun = state.next(Input::SandboxReady(network()), secs(0));
    assert_eq!(starts(&begun), ["s0/0"]);
    assert!(starts(&state.next(started("s0", 0), secs(0))).is_empty());
    let probed = Input::Probe(run("s0", 0), ProbeKind::Startup, true);
    assert_eq!(starts(&state.next(probed, secs(1))), ["s1/0"]);
    assert_eq!(starts(&state.next(started("s1", 0), secs(1))), ["a/0"]);
    state.next(started("a", 0), secs(1));
    state
}

#[test]
fn sidecars_end_after_the_main_containers_in_reverse_order() {
    let mut state = with_sidecars("Never");
    let actions = state.next(Input::Exited(run("a", 0), exit(0)), secs(5));
    assert_eq!(stops(&actions), ["s1"], "a finished pod needs no sidecar");
    let actions = state.next(Input::Exited(run("s1", 0), exit(143)), secs(6));
    assert_eq!(stops(&actions), ["s0"]);
    let actions = state.next(Input::Exited(run("s0", 0), exit(143)), secs(7));
    assert!(actions.contains(&Action::TearDown));
}

#[test]
fn a_sidecar_waits_for_its_turn_no_longer_than_the_grace_period() {
    let mut state = with_sidecars("Always");
    let spec = state.pod.clone();
    let actions = state.next(Input::Spec(deleted(&spec, 10)), secs(10));
    assert_eq!(stops(&actions), ["a"]);
    let actions = state.next(Input::Timer, secs(20));
    assert_eq!(stops(&actions), ["s0", "s1"]);
    assert!(actions.contains(&Action::Kill(run("a", 0))));
    let actions = state.next(Input::Timer, secs(22));
    assert!(
        actions.contains(&Action::Kill(run("s0", 0))),
        "two seconds of its own"
    );
}

#[test]
fn a_sidecar_that_exits_is_restarted_and_holds_nobody_back() {
    let mut state = with_sidecars("Never");
    let actions = state.next(Input::Exited(run("s0", 0), exit(0)), secs(5));
    assert_eq!(starts(&actions), ["s0/1"]);
    let actions = state.next(started("s0", 1), secs(5));
    assert!(stops(&actions).is_empty() && state.phase == Phase::Syncing);
}

#[test]
fn a_failed_init_container_of_a_restarting_pod_is_tried_until_it_succeeds() {
    let mut state = undrained(uid(), web("Always", 1));
    state.next(Input::Timer, secs(0));
    state.next(Input::SandboxReady(network()), secs(0));
    state.next(started("init0", 0), secs(0));
    let again = state.next(Input::Exited(run("init0", 0), exit(1)), secs(1));
    assert_eq!(starts(&again), ["init0/1"]);
    state.next(started("init0", 1), secs(1));
    assert!(starts(&state.next(Input::Exited(run("init0", 1), exit(1)), secs(2))).is_empty());
    assert_eq!(state.wake_at(), Some(secs(12)));
    assert_eq!(starts(&state.next(Input::Timer, secs(12))), ["init0/2"]);
    state.next(started("init0", 2), secs(12));
    let done = state.next(Input::Exited(run("init0", 2), exit(0)), secs(13));
    assert_eq!(starts(&done), ["a/0", "b/0"]);
}

#[test]
fn a_post_start_hook_holds_back_the_next_container_and_its_own_probes() {
    let mut state = undrained(uid(), varied("Always", &[], true, None));
    state.next(Input::Timer, secs(0));
    let first = state.next(Input::SandboxReady(network()), secs(0));
    assert_eq!(starts(&first), ["a/0"]);
    let actions = state.next(started("a", 0), secs(0));
    assert!(actions.contains(&Action::PostStart(run("a", 0))));
    assert!(starts(&actions).is_empty() && !state.containers[0].ready);
    let actions = state.next(Input::PostStarted(run("a", 0), Ok(())), secs(3));
    assert_eq!(starts(&actions), ["b/0"]);
    assert!(actions.contains(&Action::StartProbes(run("a", 0))));
    assert!(state.containers[0].ready);
}

#[test]
fn a_failed_post_start_hook_stops_the_container() {
    let mut state = undrained(uid(), varied("Always", &[], true, None));
    state.next(Input::Timer, secs(0));
    state.next(Input::SandboxReady(network()), secs(0));
    state.next(started("a", 0), secs(0));
    let failed = Input::PostStarted(run("a", 0), Err("exit 1".into()));
    let actions = state.next(failed, secs(1));
    let event = |a: &Action| matches!(a, Action::Event("FailedPostStartHook", ..));
    assert!(actions.iter().any(event));
    assert!(
        actions.contains(&Action::PreStop(run("a", 0))),
        "as any other stop"
    );
}

#[test]
fn a_pre_stop_hook_is_inside_the_grace_period() {
    let spec = varied("Always", &[], true, None);
    let mut state = undrained(uid(), spec.clone());
    let found = vec![observed("a", 0, None), observed("b", 0, None)];
    state.next(Input::Observed(found), secs(0));
    state.next(Input::SandboxReady(network()), secs(0));
    let actions = state.next(Input::Spec(deleted(&spec, 5)), secs(10));
    assert!(actions.contains(&Action::PreStop(run("a", 0))));
    assert_eq!(stops(&actions), ["b"]);
    let actions = state.next(Input::PreStopped(run("a", 0), Ok(())), secs(12));
    assert_eq!(stops(&actions), ["a"]);
    assert!(
        !state
            .next(Input::Timer, secs(14))
            .contains(&Action::Kill(run("a", 0)))
    );
    assert!(
        state
            .next(Input::Timer, secs(15))
            .contains(&Action::Kill(run("a", 0)))
    );
}

#[test]
fn a_pre_stop_hook_that_hangs_is_followed_by_sigterm_and_two_seconds() {
    let spec = varied("Always", &[], true, None);
    let mut state = undrained(uid(), spec.clone());
    state.next(Input::Observed(vec![observed("a", 0, None)]), secs(0));
    state.next(Input::SandboxReady(network()), secs(0));
    state.next(Input::Spec(deleted(&spec, 5)), secs(10));
    assert_eq!(stops(&state.next(Input::Timer, secs(15))), ["a"]);
    assert_eq!(state.wake_at(), Some(secs(17)));
    assert!(
        state
            .next(Input::Timer, secs(17))
            .contains(&Action::Kill(run("a", 0)))
    );
}

#[test]
fn the_deadline_counts_from_the_pods_start_and_fails_it() {
    let mut state = undrained(uid(), varied("Always", &[], false, Some(30)));
    state.age = secs(10);
    let found = vec![observed("a", 0, None), observed("b", 0, None)];
    state.next(Input::Observed(found), secs(0));
    state.next(Input::SandboxReady(network()), secs(0));
    assert_eq!(state.wake_at(), Some(secs(20)));
    assert_eq!(stops(&state.next(Input::Timer, secs(20))), ["a", "b"]);
    assert_eq!(state.failed.as_ref().unwrap().reason, "DeadlineExceeded");
}

#[test]
fn a_probes_own_grace_period_replaces_the_pods() {
    let mut spec = serde_json::to_value(web("Always", 0)).unwrap();
    spec["spec"]["containers"][0]["livenessProbe"] =
        serde_json::json!({"tcpSocket": {"port": 1}, "terminationGracePeriodSeconds": 60});
    let mut state = undrained(uid(), pod(spec));
    state.next(
        Input::Observed(vec![observed("a", 0, None), observed("b", 0, None)]),
        secs(0),
    );
    state.next(Input::SandboxReady(network()), secs(0));
    state.next(
        Input::Probe(run("a", 0), ProbeKind::Liveness, false),
        secs(1),
    );
    assert_eq!(state.wake_at(), Some(secs(61)));
}

#[test]
fn an_adopted_container_keeps_what_this_node_knew_of_its_probes() {
    for ready in [false, true] {
        let mut spec = serde_json::to_value(web("Always", 0)).unwrap();
        spec["spec"]["containers"][0]["readinessProbe"] =
            serde_json::json!({"tcpSocket": {"port": 1}});
        // What the API holds is older.
        spec["status"] = serde_json::json!({"containerStatuses": [{"name": "a", "ready": !ready,
            "restartCount": 2, "image": "", "imageID": ""}]});
        let mut state = undrained(uid(), pod(spec));
        let known = Probed {
            attempt: 2,
            started: true,
            ready,
            ..Probed::default()
        };
        state.recalled.insert("a".into(), known);
        state.next(Input::Observed(vec![observed("a", 2, None)]), secs(0));
        assert_eq!(state.containers[0].ready, ready);
    }
}

#[test]
fn what_came_meanwhile_ends_the_wait_of_sandbox_and_tear_down() {
    let spec = web("Always", 0);
    let mut state = undrained(uid(), spec.clone());
    state.next(Input::Timer, secs(0));
    let failed = || Input::SandboxFailed("FailedMount".into(), "no such driver".into());
    state.next(failed(), secs(0));
    assert!(state.next(Input::Timer, secs(0)).is_empty());
    assert_eq!(state.next(Input::Retry, secs(0)), [Action::PrepareSandbox]);
    state.next(failed(), secs(0));
    let actions = state.next(Input::Spec(deleted(&spec, 0)), secs(0));
    assert!(actions.contains(&Action::TearDown), "{actions:?}");
    state.next(Input::TearDownFailed, secs(1));
    assert!(state.next(Input::Timer, secs(1)).is_empty());
    assert_eq!(state.next(Input::Retry, secs(1)), [Action::TearDown]);
    assert!(
        state.next(Input::Retry, secs(1)).is_empty(),
        "one in flight"
    );
    state.next(Input::TornDown, secs(1));
    assert!(state.next(Input::Retry, secs(1)).is_empty());
}

#[test]
fn a_tear_down_that_fails_is_tried_less_and_less_often() {
    let spec = web("Always", 0);
    let mut state = undrained(uid(), spec.clone());
    let actions = state.next(Input::Spec(deleted(&spec, 0)), secs(0));
    assert!(actions.contains(&Action::TearDown), "{actions:?}");
    let mut now = 0;
    for wait in [1, 2, 4, 8, 16, 32, 64, 64] {
        assert!(state.next(Input::TearDownFailed, secs(now)).is_empty());
        now += wait;
        assert_eq!(state.wake_at(), Some(secs(now)));
        assert_eq!(state.next(Input::Timer, secs(now)), [Action::TearDown]);
    }
    // What has come meanwhile, a volume's driver for one, ends the wait.
    state.next(Input::TearDownFailed, secs(now));
    assert_eq!(state.next(Input::Retry, secs(now)), [Action::TearDown]);
}

/// Running, and about to end: the actions of the deletion.
fn running_then(spec: &Arc<Pod>, end: Input, now: Duration) -> (PodState, Vec<Action>) {
    let mut state = PodState::new(uid(), spec.clone());
    state.next(Input::Timer, secs(0));
    state.next(Input::SandboxReady(network()), secs(0));
    state.next(started("a", 0), secs(0));
    state.next(started("b", 0), secs(0));
    let actions = state.next(end, now);
    (state, actions)
}

fn millis(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn events(actions: &[Action]) -> Vec<&str> {
    let words = |a: &'_ Action| matches!(a, Action::Event("Drained", ..));
    let drained = actions.iter().filter(|a| words(a));
    drained
        .filter_map(|a| match a {
            Action::Event(_, words, _) => Some(words.as_str()),
            _ => None,
        })
        .collect()
}

fn acked(nodes: u32) -> Drained {
    Drained::Acked {
        nodes,
        is_named: false,
    }
}

#[test]
fn sigterm_waits_until_every_node_has_stopped_sending() {
    let spec = web("Always", 0);
    let end = Input::Spec(deleted(&spec, 5));
    let (mut state, actions) = running_then(&spec, end, secs(10));
    assert!(actions.contains(&Action::Drain(1)), "{actions:?}");
    assert!(stops(&actions).is_empty(), "nothing is stopped yet");
    let answer = Input::Drained(1, acked(3));
    let actions = state.next(answer, secs(10) + millis(4));
    assert_eq!(events(&actions), ["drained: acked 3/3 nodes in 4 ms"]);
    assert!(
        stops(&actions).is_empty(),
        "what is under way arrives first"
    );
    let at = state.wake_at().unwrap();
    assert!(at < secs(10) + millis(100));
    assert_eq!(stops(&state.next(Input::Timer, at)), ["a", "b"]);
    assert_eq!(
        state.wake_at(),
        Some(at + secs(5)),
        "the grace period is whole: it begins after the drain"
    );
}

#[test]
fn a_silent_node_holds_a_drain_no_longer_than_the_cap_and_is_named() {
    let spec = web("Always", 0);
    let end = Input::Spec(deleted(&spec, 5));
    let (mut state, _) = running_then(&spec, end, secs(10));
    let missing = Drained::Missing {
        count: 5,
        nodes: 8,
        names: vec!["node-7".into(), "node-8 (not yet back)".into()],
    };
    let actions = state.next(Input::Drained(1, missing), secs(10) + millis(700));
    assert!(stops(&actions).is_empty());
    assert_eq!(state.wake_at(), Some(secs(11)));
    let actions = state.next(Input::Timer, secs(11));
    assert_eq!(stops(&actions), ["a", "b"]);
    assert_eq!(
        events(&actions),
        [
            "drained: not by all within 1 s: acked 3/8 nodes, waiting for node-7, \
          node-8 (not yet back) and 3 more"
        ]
    );
    // An answer that comes too late changes nothing.
    assert!(state.next(Input::Drained(1, acked(8)), secs(12)).is_empty());
}

#[test]
fn who_has_nothing_to_wait_for_does_not_wait() {
    let spec = web("Always", 0);
    let cases = [
        ("no backend of any Service", Drained::NoBackend, 0),
        ("the control plane is away", Drained::CutOff, 1),
    ];
    for (what, answer, told) in cases {
        let end = Input::Spec(deleted(&spec, 5));
        let (mut state, _) = running_then(&spec, end, secs(10));
        let actions = state.next(Input::Drained(1, answer), secs(10));
        assert_eq!(stops(&actions), ["a", "b"], "{what}");
        assert_eq!(events(&actions).len(), told, "{what}");
    }
}

#[test]
fn force_crash_and_hard_eviction_do_not_wait() {
    let spec = web("Always", 0);
    let asked = |actions: &[Action]| actions.iter().any(|a| matches!(a, Action::Drain(_)));
    let (_, actions) = running_then(&spec, Input::Spec(deleted(&spec, 0)), secs(10));
    assert!(!asked(&actions), "grace 0");
    let (_, actions) = running_then(&spec, Input::Gone, secs(10));
    assert!(!asked(&actions), "the object is gone");
    let (_, actions) = running_then(&spec, Input::Evict("memory".into()), secs(10));
    assert!(
        !asked(&actions) && stops(&actions).len() == 2,
        "the node needs it back"
    );
    let crash = Input::Exited(run("a", 0), exit(137));
    let (_, actions) = running_then(&spec, crash, secs(10));
    assert!(!asked(&actions), "it has ended already");
    // A force deletion that comes later ends the wait.
    let end = Input::Spec(deleted(&spec, 5));
    let (mut state, _) = running_then(&spec, end, secs(10));
    let actions = state.next(Input::Spec(deleted(&spec, 0)), secs(10));
    assert!(
        actions.iter().any(|a| matches!(a, Action::Kill(_))),
        "{actions:?}"
    );
}

#[test]
fn a_member_of_a_headless_service_is_held_until_old_answers_are_dead() {
    let spec = web("Always", 0);
    let end = Input::Spec(deleted(&spec, 5));
    let (mut state, _) = running_then(&spec, end, secs(10));
    let answer = Drained::Acked {
        nodes: 2,
        is_named: true,
    };
    let actions = state.next(Input::Drained(1, answer), secs(10) + millis(3));
    assert!(events(&actions)[0].starts_with("drained: acked 2/2 nodes in 3 ms, held"));
    assert!(stops(&state.next(Input::Timer, secs(10) + millis(999))).is_empty());
    let actions = state.next(Input::Timer, secs(11));
    assert_eq!(stops(&actions), ["a", "b"]);
    assert!(events(&actions).is_empty(), "nobody was missing");
}

#[test]
fn an_agent_restart_asks_again_and_the_cap_runs_on() {
    let spec = web("Always", 0);
    let again = |drained_for: Duration| {
        let mut state = PodState::new(uid(), spec.clone());
        state.drained_for = drained_for;
        let found = vec![observed("a", 0, None), observed("b", 0, None)];
        state.next(Input::Observed(found), secs(0));
        let actions = state.next(Input::Spec(deleted(&spec, 5)), secs(0));
        (state, actions)
    };
    let (state, actions) = again(millis(400));
    assert!(actions.contains(&Action::Drain(1)) && stops(&actions).is_empty());
    assert_eq!(state.wake_at(), Some(millis(600)));
    let (_, actions) = again(secs(7));
    assert_eq!(stops(&actions), ["a", "b"], "it was over before");
}

#[test]
fn a_node_that_goes_down_drains_its_pods_within_their_time() {
    let spec = web("Always", 0);
    let (mut state, actions) = running_then(&spec, Input::Shutdown(4), secs(10));
    assert!(actions.contains(&Action::Drain(1)) && stops(&actions).is_empty());
    let actions = state.next(Input::Timer, secs(11));
    assert_eq!(stops(&actions), ["a", "b"]);
    assert_eq!(state.wake_at(), Some(secs(14)), "one time for everything");
}

#[test]
fn a_restart_of_a_container_drains_the_pod_each_time() {
    let mut state = PodState::new(uid(), web("Always", 0));
    state.next(Input::Timer, secs(0));
    state.next(Input::SandboxReady(network()), secs(0));
    state.next(started("a", 0), secs(0));
    state.next(started("b", 0), secs(0));
    for attempt in 0..2u32 {
        let at = secs(100 * u64::from(attempt + 1));
        let number = attempt + 1;
        let actions = state.next(Input::Restart(run("a", attempt), "why".into()), at);
        assert!(actions.contains(&Action::Drain(number)), "{actions:?}");
        // The answer to an earlier question is none.
        assert!(
            state
                .next(Input::Drained(number - 1, acked(1)), at)
                .is_empty()
        );
        state.next(Input::Drained(number, acked(1)), at);
        assert_eq!(stops(&state.next(Input::Timer, at + millis(100))), ["a"]);
        state.next(Input::Exited(run("a", attempt), exit(0)), at + secs(1));
        state.next(Input::Timer, at + secs(50));
        state.next(started("a", attempt + 1), at + secs(50));
    }
}

/// A machine that answers actions in any order, with any outcome.
#[derive(Default)]
struct Machine {
    starting: Vec<ContainerRun>,
    running: Vec<ContainerRun>,
    hooks: Vec<(ContainerRun, bool)>,
    preparing: bool,
    tearing: bool,
    ever_started: Vec<ContainerRun>,
    drain: Option<u32>,
}

impl Machine {
    fn take(&mut self, state: &PodState, actions: &[Action]) {
        for action in actions {
            if let Action::Stop(run) | Action::PreStop(run) = action {
                let container = state
                    .containers
                    .iter()
                    .find(|c| c.name == run.name)
                    .unwrap();
                let waits = matches!(container.stop, Stop::Drain(_));
                assert!(!waits, "what waits for a drain is not asked to stop");
            }
            match action {
                Action::Drain(number) => self.drain = Some(*number),
                Action::PrepareSandbox => {
                    assert!(!self.preparing, "one sandbox in flight");
                    self.preparing = true;
                }
                Action::Start(run) => {
                    assert_eq!(state.phase, Phase::Syncing, "nothing starts after Syncing");
                    assert!(!self.starting.contains(run) && !self.running.contains(run));
                    assert!(
                        !self.ever_started.contains(run),
                        "a run number is started once"
                    );
                    self.starting.push(run.clone());
                }
                Action::PostStart(run) => self.hooks.push((run.clone(), true)),
                Action::PreStop(run) => self.hooks.push((run.clone(), false)),
                Action::StopHooks(run) => self.hooks.retain(|(of, _)| of != run),
                Action::TearDown => {
                    assert!(self.starting.is_empty() && self.running.is_empty());
                    assert!(!self.preparing && !self.tearing);
                    self.tearing = true;
                }
                _ => {}
            }
        }
    }

    /// One possible event, chosen by `pick`.
    fn answer(&mut self, pick: usize, good: bool) -> Input {
        match pick % 7 {
            0 if self.preparing => {
                self.preparing = false;
                if good {
                    Input::SandboxReady(network())
                } else {
                    Input::SandboxFailed("FailedMount".into(), "no such map".into())
                }
            }
            1 if !self.starting.is_empty() => {
                let run = self.starting.remove(pick % self.starting.len());
                if !good {
                    return Input::StartFailed(run, "ErrImagePull".into(), "no".into());
                }
                self.ever_started.push(run.clone());
                self.running.push(run.clone());
                started(&run.name, run.attempt)
            }
            2 if !self.running.is_empty() => {
                let run = self.running.remove(pick % self.running.len());
                Input::Exited(run, exit(i32::from(!good)))
            }
            3 if self.tearing => {
                self.tearing = false;
                if good {
                    Input::TornDown
                } else {
                    Input::TearDownFailed
                }
            }
            4 if !self.running.is_empty() => {
                let run = self.running[pick % self.running.len()].clone();
                Input::Probe(run, ProbeKind::Liveness, good)
            }
            5 if !self.hooks.is_empty() => {
                let (run, post) = self.hooks.remove(pick % self.hooks.len());
                let result = if good { Ok(()) } else { Err("no".to_owned()) };
                match post {
                    true => Input::PostStarted(run, result),
                    false => Input::PreStopped(run, result),
                }
            }
            6 if self.drain.is_some() => {
                let nodes = 3;
                let drained = match (pick / 7 % 4, good) {
                    (0, _) => Drained::NoBackend,
                    (1, _) => Drained::CutOff,
                    (_, true) => Drained::Acked {
                        nodes,
                        is_named: pick.is_multiple_of(2),
                    },
                    (_, false) => Drained::Missing {
                        count: 1,
                        nodes,
                        names: vec!["n".into()],
                    },
                };
                Input::Drained(self.drain.unwrap_or_default(), drained)
            }
            _ => Input::Timer,
        }
    }
}

proptest! {
    #[test]
    fn any_history_keeps_the_rules(
        policy in prop::sample::select(vec!["Always", "OnFailure", "Never"]),
        init in prop::collection::vec((any::<bool>(), any::<bool>()), 0..3),
        hooks in any::<bool>(),
        deadline in prop::option::of(1i64..200),
        steps in prop::collection::vec((0usize..1000, any::<bool>(), 0u64..40), 1..120),
        delete_at in 0usize..120,
        fail_at in 0usize..240,
    ) {
        let spec = varied(policy, &init, hooks, deadline);
        let mut state = PodState::new(uid(), spec.clone());
        let mut machine = Machine::default();
        let mut now = secs(0);
        let actions = state.next(Input::Timer, now);
        machine.take(&state, &actions);
        let mut phase = state.phase;
        for (index, (pick, good, wait)) in steps.into_iter().enumerate() {
            now += secs(wait);
            let input = if index == delete_at {
                Input::Spec(deleted(&spec, 5))
            } else if index == fail_at {
                Input::Evict("too much".into())
            } else {
                machine.answer(pick, good)
            };
            let actions = state.next(input, now);
            machine.take(&state, &actions);
            prop_assert!(state.phase >= phase, "phases only move right");
            phase = state.phase;
            if let Some(at) = state.wake_at() {
                // A timer at that moment must move something, else the worker would spin.
                if at <= now { let _ = state.next(Input::Timer, now); }
                prop_assert!(state.wake_at().is_none_or(|at| at > now), "no busy timer");
            }
        }
        // From anywhere, a deletion and a machine that obeys come to an end.
        let actions = state.next(Input::Spec(deleted(&spec, 5)), now);
        machine.take(&state, &actions);
        for pick in 0..300usize {
            now += secs(10);
            let input = machine.answer(pick, true);
            let actions = state.next(input, now);
            machine.take(&state, &actions);
        }
        prop_assert_eq!(state.phase, Phase::Finished);
    }
}
