use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

fn pod(spec: Value) -> Pod {
    serde_json::from_value(json!({"spec": spec})).unwrap()
}

fn resources(requests: Value, limits: Value) -> Value {
    json!({"requests": requests, "limits": limits})
}

#[test]
fn numbers_are_those_of_the_kubelet() {
    // From TestMilliCPUToShares and TestMilliCPUToQuota of pkg/kubelet/cm.
    assert_eq!(
        [0, 1, 2, 100, 250, 1000, 1_000_000].map(cpu_shares),
        [2, 2, 2, 102, 256, 1024, 262_144]
    );
    assert_eq!(
        [0, 1, 10, 100, 1500].map(cpu_quota_us),
        [None, Some(1000), Some(1000), Some(10_000), Some(150_000)]
    );
    // From opencontainers/cgroups' TestConvertCPUSharesToCgroupV2Value; 512 was also seen in
    // a cgroup that libcontainer made.
    assert_eq!(
        [0, 2, 3, 4, 32, 102, 512, 1024, 4096, 262_144, u64::MAX].map(cpu_weight),
        [1, 1, 2, 2, 8, 17, 59, 100, 303, 10_000, 10_000]
    );
}

#[test]
fn class_follows_requests_and_limits() {
    let both = json!({"cpu": "100m", "memory": "64Mi"});
    let of = |r: Value| qos_class(&pod(json!({"containers": [{"name": "a", "resources": r}]})));
    assert_eq!(of(json!({})), QosClass::BestEffort);
    assert_eq!(
        of(resources(json!({"cpu": "0"}), json!({}))),
        QosClass::BestEffort
    );
    assert_eq!(
        of(resources(both.clone(), both.clone())),
        QosClass::Guaranteed
    );
    assert_eq!(of(json!({"limits": both})), QosClass::Guaranteed);
    assert_eq!(of(json!({"requests": both})), QosClass::Burstable);
    assert_eq!(of(json!({"limits": {"cpu": "1"}})), QosClass::Burstable);
    let mixed = pod(json!({"containers": [
        {"name": "a", "resources": {"limits": both}}, {"name": "b"}]}));
    assert_eq!(qos_class(&mixed), QosClass::Burstable);
    let pod_level = pod(json!({"resources": {"limits": both}, "containers": [{"name": "a"}]}));
    assert_eq!(qos_class(&pod_level), QosClass::Guaranteed);
}

#[test]
fn pod_has_a_ceiling_only_when_every_container_has_one() {
    let limited = json!({"name": "a", "resources": {"limits": {"cpu": "500m", "memory": "64Mi"}}});
    let one = pod_limits(
        &pod(json!({"containers": [limited]})),
        &Policy {
            pod_pids_max: Some(64),
            ..Policy::default()
        },
    );
    assert_eq!(one.cpu_quota_us, Some(50_000));
    assert_eq!(one.memory_limit_bytes, Some(64 << 20));
    assert_eq!(one.cpu_shares, 512);
    assert_eq!(one.pids_max, Some(64));
    let two = pod_limits(
        &pod(json!({"containers": [limited, {"name": "b"}]})),
        &Policy::default(),
    );
    assert_eq!((two.cpu_quota_us, two.memory_limit_bytes), (None, None));
    assert_eq!(two.cpu_shares, 512);
}

#[test]
fn init_containers_count_at_their_peak_and_sidecars_always() {
    let spec = json!({
        "containers": [{"name": "app", "resources": {"requests": {"cpu": "100m"}}}],
        "initContainers": [
            {"name": "first", "resources": {"requests": {"cpu": "300m"}}},
            {"name": "side", "restartPolicy": "Always", "resources": {"requests": {"cpu": "50m"}}},
            {"name": "second", "resources": {"requests": {"cpu": "280m"}}},
        ],
    });
    // app + side = 150; first = 300; side + second = 330.
    assert_eq!(pod_requests(&pod(spec)).cpu_millicores, Some(330));
}

#[test]
fn protection_is_tiered_and_throttling_is_asked_for() {
    let of = |r: Value, policy: &Policy| {
        let p = pod(json!({"containers": [{"name": "a", "resources": r}]}));
        let container = p.spec.as_ref().unwrap().containers[0].clone();
        container_limits(&p, &container, policy)
    };
    let plain = Policy::default();
    let throttling = Policy {
        memory_throttling_percent: 90,
        memory_allocatable_bytes: 1 << 30,
        ..plain
    };
    let guaranteed = json!({"limits": {"cpu": "1", "memory": "64Mi"}});
    let one = of(guaranteed.clone(), &throttling);
    assert_eq!((one.memory_min_bytes, one.memory_low_bytes), (64 << 20, 0));
    assert_eq!(one.memory_high_bytes, None);
    let burstable = resources(json!({"memory": "100Mi"}), json!({"memory": "200Mi"}));
    let one = of(burstable.clone(), &throttling);
    assert_eq!((one.memory_min_bytes, one.memory_low_bytes), (0, 100 << 20));
    assert_eq!(one.memory_high_bytes, Some(190 * (1 << 20) / 4096 * 4096));
    assert_eq!(of(burstable, &plain).memory_high_bytes, None);
    let best_effort = of(json!({}), &throttling);
    let high = best_effort.memory_high_bytes.unwrap();
    assert!(high < (1 << 30) && high > (1 << 30) / 10 * 8);
    assert!(one.oom_group && one.hugepages.is_empty());
}

#[test]
fn burst_is_a_part_of_the_quota() {
    let mut p = pod(json!({"containers": [{"name": "a", "resources": {"limits": {"cpu": "1"}}}]}));
    let burst = |p: &Pod| pod_limits(p, &Policy::default()).cpu_burst_us;
    assert_eq!(burst(&p), 0);
    let annotation = |value: &str| Some([(CPU_BURST_ANNOTATION.into(), value.into())].into());
    p.metadata.annotations = annotation("40");
    assert_eq!(burst(&p), 40_000);
    p.metadata.annotations = annotation("4000");
    assert_eq!(burst(&p), 100_000);
}

#[test]
fn huge_pages_are_summed_by_size() {
    let pages = |amount: &str| json!({"limits": {"hugepages-2Mi": amount, "memory": "1Mi"}});
    let p = pod(json!({
        "containers": [{"name": "a", "resources": pages("4Mi")}, {"name": "b", "resources": pages("2Mi")}],
        "initContainers": [{"name": "i", "resources": pages("8Mi")}],
    }));
    assert_eq!(pod_hugepages(&p), [(2 << 20, 8 << 20)].into());
    let limits = pod_limits(&p, &Policy::default());
    assert_eq!(limits.hugepages, [(2 << 20, 8 << 20)].into());
}

#[test]
fn oom_score_orders_the_classes() {
    let score = |r: Value| {
        let p = pod(json!({"containers": [{"name": "a", "resources": r}]}));
        let container = p.spec.as_ref().unwrap().containers[0].clone();
        oom_score_adj(&p, &container, 4 << 30)
    };
    assert_eq!(score(json!({})), 1000);
    assert_eq!(
        score(json!({"limits": {"cpu": "1", "memory": "1Gi"}})),
        -997
    );
    assert_eq!(score(json!({"requests": {"memory": "1Gi"}})), 750);
    assert_eq!(score(json!({"requests": {"memory": "64Gi"}})), 3);
    assert_eq!(score(json!({"requests": {"cpu": "1"}})), 999);
}

proptest! {
    #[test]
    fn shares_weight_and_quota_are_monotonic(a in 0u64..2_000_000, b in 0u64..2_000_000) {
        let (low, high) = (a.min(b), a.max(b));
        prop_assert!(cpu_shares(low) <= cpu_shares(high));
        prop_assert!(cpu_quota_us(low) <= cpu_quota_us(high));
        prop_assert!(cpu_weight(cpu_shares(low)) <= cpu_weight(cpu_shares(high)));
        prop_assert!((1..=10_000).contains(&cpu_weight(high)));
    }

    #[test]
    fn pod_is_never_below_a_container(
        containers in prop::collection::vec((0u64..4000, 0u64..4000, any::<bool>()), 1..6),
        init in prop::collection::vec((0u64..4000, any::<bool>()), 0..6),
    ) {
        let entry = |name: String, millis: u64, limit: u64, limited: bool| {
            let mut r = json!({"requests": {"cpu": format!("{millis}m")}});
            if limited {
                r["limits"] = json!({"cpu": format!("{}m", millis + limit)});
            }
            json!({"name": name, "resources": r})
        };
        let regular: Vec<Value> = containers.iter().enumerate()
            .map(|(i, (m, l, d))| entry(format!("c{i}"), *m, *l, *d)).collect();
        let early: Vec<Value> = init.iter().enumerate().map(|(i, (m, side))| {
            let mut c = entry(format!("i{i}"), *m, 0, false);
            if *side { c["restartPolicy"] = json!("Always"); }
            c
        }).collect();
        let p = pod(json!({"containers": regular, "initContainers": early}));
        let whole = pod_limits(&p, &Policy::default());
        for c in all_containers(p.spec.as_ref().unwrap()) {
            let own = container_limits(&p, c, &Policy::default());
            prop_assert!(own.cpu_shares <= whole.cpu_shares);
            if let (Some(own), Some(all)) = (own.cpu_quota_us, whole.cpu_quota_us) {
                prop_assert!(own <= all);
            }
        }
        prop_assert_eq!(qos_class(&p) == QosClass::BestEffort,
            containers.iter().all(|c| c.0 == 0 && !(c.2 && c.1 > 0)) && init.iter().all(|i| i.0 == 0));
    }
}
