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
    let mut state = PodState::new(uid(), spec);
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
    let mut state = PodState::new(uid(), web("Never", 2));
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
    let mut state = PodState::new(uid(), web("Always", 0));
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
    let mut state = PodState::new(uid(), spec.clone());
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
    let mut state = PodState::new(uid(), spec.clone());
    state.next(
        Input::Observed(vec![observed("a", 0, None), observed("b", 0, None)]),
        secs(0),
    );
    state.next(Input::Spec(deleted(&spec, 30)), secs(0));
    assert_eq!(
        state.wake_at(),
        Some(secs(5)),
        "the pod's own 5 s bound the deletion's 30 s"
    );
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
    let mut state = PodState::new(uid(), web("Always", 0));
    let found = vec![
        observed("a", 2, None),
        observed("a", 1, Some(exit(9))),
        observed("b", 0, None),
    ];
    let actions = state.next(Input::Observed(found), secs(0));
    assert!(starts(&actions).is_empty());
    assert_eq!(state.containers[0].attempt, 2);
    assert_eq!(state.containers[0].last_exit, Some((1, exit(9))));
    // The sandbox is made sure of, which is idempotent; nothing running is touched by it.
    assert!(actions.contains(&Action::PrepareSandbox));
    assert!(starts(&state.next(Input::SandboxReady(network()), secs(0))).is_empty());
}

#[test]
fn an_exit_during_the_agents_absence_is_seen_at_adoption() {
    let mut state = PodState::new(uid(), web("Never", 0));
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
    let mut state = PodState::new(uid(), web("Always", 0));
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

/// A machine that answers actions in any order, with any outcome.
#[derive(Default)]
struct Machine {
    starting: Vec<ContainerRun>,
    running: Vec<ContainerRun>,
    preparing: bool,
    tearing: bool,
    ever_started: Vec<ContainerRun>,
}

impl Machine {
    fn take(&mut self, state: &PodState, actions: &[Action]) {
        for action in actions {
            match action {
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
        match pick % 5 {
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
            _ => Input::Timer,
        }
    }
}

proptest! {
    #[test]
    fn any_history_keeps_the_rules(
        policy in prop::sample::select(vec!["Always", "OnFailure", "Never"]),
        init in 0usize..3,
        steps in prop::collection::vec((0usize..1000, any::<bool>(), 0u64..40), 1..120),
        delete_at in 0usize..120,
        fail_at in 0usize..240,
    ) {
        let spec = web(policy, init);
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
                Input::Fail("Evicted", "too much".into())
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
        for pick in 0..200usize {
            now += secs(10);
            let input = machine.answer(pick, true);
            let actions = state.next(input, now);
            machine.take(&state, &actions);
        }
        prop_assert_eq!(state.phase, Phase::Finished);
    }
}
