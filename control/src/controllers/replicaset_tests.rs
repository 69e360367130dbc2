use super::*;
use gantry_api::k8s_openapi::api::core::v1::{ContainerStatus, PodCondition, PodSpec, PodStatus};
use gantry_api::k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use proptest::prelude::*;

fn now() -> Timestamp {
    "2026-01-01T12:00:00Z".parse().unwrap()
}

fn labels(value: &str) -> BTreeMap<String, String> {
    BTreeMap::from([("app".to_owned(), value.to_owned())])
}

fn set(replicas: i32) -> ReplicaSet {
    ReplicaSet {
        metadata: ObjectMeta {
            name: Some("web".to_owned()),
            uid: Some("set".to_owned()),
            generation: Some(3),
            ..ObjectMeta::default()
        },
        spec: Some(ReplicaSetSpec {
            replicas: Some(replicas),
            selector: LabelSelector {
                match_labels: Some(labels("web")),
                ..LabelSelector::default()
            },
            ..ReplicaSetSpec::default()
        }),
        status: None,
    }
}

fn pod(uid: &str, phase: &str, ready: bool) -> Pod {
    let condition = PodCondition {
        type_: "Ready".to_owned(),
        status: if ready { "True" } else { "False" }.to_owned(),
        last_transition_time: Some(Time("2026-01-01T11:00:00Z".parse().unwrap())),
        ..PodCondition::default()
    };
    Pod {
        metadata: ObjectMeta {
            uid: Some(uid.to_owned()),
            labels: Some(labels("web")),
            creation_timestamp: Some(Time("2026-01-01T11:00:00Z".parse().unwrap())),
            ..ObjectMeta::default()
        },
        spec: Some(PodSpec {
            node_name: Some("n".to_owned()),
            ..PodSpec::default()
        }),
        status: Some(PodStatus {
            phase: Some(phase.to_owned()),
            conditions: Some(vec![condition]),
            ..PodStatus::default()
        }),
    }
}

fn plan_for(set: &ReplicaSet, owned: &[Pod], orphans: &[Pod]) -> Plan {
    let arcs = |pods: &[Pod]| pods.iter().cloned().map(Arc::new).collect::<Vec<_>>();
    let observed = Observed {
        set,
        owned: &arcs(owned),
        orphans: &arcs(orphans),
        crowd: &HashMap::from([("crowded".to_owned(), 5), ("n".to_owned(), 1)]),
        now: now(),
    };
    plan(&observed)
}

fn uids(pods: &[Arc<Pod>]) -> Vec<&str> {
    pods.iter()
        .filter_map(|pod| pod.metadata.uid.as_deref())
        .collect()
}

#[test]
fn victims_go_in_kubernetes_order() {
    let best = || pod("x", "Running", true);
    // From the least useful to the most; each differs from the last in one respect.
    let mut order: Vec<Pod> = Vec::new();
    let mut unassigned = pod("x", "Pending", false);
    unassigned.spec.as_mut().unwrap().node_name = None;
    order.push(unassigned);
    order.push(pod("x", "Pending", false));
    order.push(pod("x", "Unknown", false));
    order.push(pod("x", "Running", false));
    let mut cheap = best();
    cheap.metadata.annotations = Some(BTreeMap::from([(
        DELETION_COST.to_owned(),
        "-5".to_owned(),
    )]));
    order.push(cheap);
    let mut crowded = best();
    crowded.spec.as_mut().unwrap().node_name = Some("crowded".to_owned());
    order.push(crowded);
    let mut fresh = best();
    let conditions = fresh.status.as_mut().unwrap().conditions.as_mut().unwrap();
    conditions[0].last_transition_time = Some(Time("2026-01-01T11:59:50Z".parse().unwrap()));
    order.push(fresh);
    let mut restarted = best();
    let restarts = ContainerStatus {
        restart_count: 4,
        ..ContainerStatus::default()
    };
    restarted.status.as_mut().unwrap().container_statuses = Some(vec![restarts]);
    order.push(restarted);
    let mut young = best();
    young.metadata.creation_timestamp = Some(Time("2026-01-01T11:55:00Z".parse().unwrap()));
    order.push(young);
    order.push(best());
    for (index, pod) in order.iter_mut().enumerate() {
        // Against the wanted order, so that uids do not help.
        pod.metadata.uid = Some(format!("{:02}", 99 - index));
    }
    let expected: Vec<String> = order
        .iter()
        .filter_map(|pod| pod.metadata.uid.clone())
        .collect();
    for keep in 0..order.len() {
        let plan = plan_for(&set(i32::try_from(keep).unwrap()), &order, &[]);
        assert_eq!(uids(&plan.delete), expected[..order.len() - keep]);
    }
}

#[test]
fn orphans_are_adopted_and_strangers_released() {
    let mut stranger = pod("stranger", "Running", true);
    stranger.metadata.labels = Some(labels("other"));
    let mut other_orphan = pod("other", "Running", true);
    other_orphan.metadata.labels = Some(labels("other"));
    let finished = pod("finished", "Succeeded", false);
    let plan = plan_for(
        &set(3),
        &[pod("own", "Running", true), stranger.clone()],
        &[pod("orphan", "Running", true), other_orphan, finished],
    );
    assert_eq!(uids(&plan.adopt), ["orphan"]);
    assert_eq!(uids(&plan.release), ["stranger"]);
    assert_eq!(plan.create_count, 1);
    let mut leaving = set(0);
    leaving.metadata.deletion_timestamp = Some(Time(now()));
    let plan = plan_for(&leaving, &[pod("own", "Running", true), stranger], &[]);
    assert!(
        plan.delete.is_empty() && plan.release.is_empty(),
        "the collector does that"
    );
}

#[test]
fn status_counts_and_the_next_look_come_from_the_pods() {
    let mut set = set(2);
    set.spec.as_mut().unwrap().min_ready_seconds = Some(5400);
    let kept = [pod("a", "Running", true), pod("b", "Running", false)].map(Arc::new);
    let (status, again) = status_of(&set, &kept, 1, None, now());
    assert_eq!(status.replicas, 2);
    assert_eq!(status.ready_replicas, Some(1));
    assert_eq!(
        status.available_replicas,
        Some(0),
        "ready for 3600 s of 5400 s"
    );
    assert_eq!(status.terminating_replicas, Some(1));
    assert_eq!(status.observed_generation, Some(3));
    assert_eq!(again, Some(Duration::from_secs(1800)));
    let failure = Status::new(Reason::Forbidden, "no more");
    let (status, _) = status_of(&set, &kept, 0, Some(("FailedCreate", &failure)), now());
    let conditions = status.conditions.clone().unwrap();
    assert_eq!(conditions[0].message.as_deref(), Some("no more"));
    set.status = Some(status);
    let (status, _) = status_of(&set, &kept, 0, None, now());
    assert_eq!(
        status.conditions, None,
        "a failure that is over is not shown"
    );
}

proptest! {
    /// Carrying out one plan reaches the size; the next plan does nothing.
    #[test]
    fn one_pass_converges(
        wanted in 0_i32..30,
        states in proptest::collection::vec((0_usize..4, any::<bool>()), 0..40),
    ) {
        let phases = ["Pending", "Running", "Succeeded", "Failed"];
        let owned: Vec<Pod> = states
            .iter()
            .enumerate()
            .map(|(index, (phase, ready))| pod(&index.to_string(), phases[*phase], *ready))
            .collect();
        let set = set(wanted);
        let plan = plan_for(&set, &owned, &[]);
        prop_assert!(plan.create_count == 0 || plan.delete.is_empty());
        let mut after: Vec<Pod> = plan.keep.iter().map(|pod| Pod::clone(pod)).collect();
        for index in 0..plan.create_count {
            after.push(pod(&format!("new{index}"), "Pending", false));
        }
        prop_assert_eq!(after.len(), usize::try_from(wanted).unwrap());
        let again = plan_for(&set, &after, &[]);
        prop_assert!(again.create_count == 0 && again.delete.is_empty());
    }
}
