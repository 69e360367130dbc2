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
    let one = pod_limits(&pod(json!({"containers": [limited]})), Some(64));
    assert_eq!(one.cpu_quota_us, Some(50_000));
    assert_eq!(one.memory_limit_bytes, Some(64 << 20));
    assert_eq!(one.cpu_shares, 512);
    assert_eq!(one.pids_max, Some(64));
    let two = pod_limits(&pod(json!({"containers": [limited, {"name": "b"}]})), None);
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
fn settings_are_one_file_each() {
    let limits = PodLimits {
        cpu_shares: 512,
        cpu_quota_us: Some(50_000),
        memory_limit_bytes: Some(1 << 20),
        pids_max: None,
        cpu_request_millicores: 500,
    };
    let show = |s: Vec<Setting>| -> Vec<String> {
        s.into_iter()
            .map(|s| format!("{}={}", s.file, s.value))
            .collect()
    };
    assert_eq!(
        show(settings_v2(&limits)),
        [
            "cpu.weight=59",
            "cpu.max=50000 100000",
            "memory.max=1048576",
            "pids.max=max"
        ]
    );
    assert_eq!(
        show(settings_v1(&limits)),
        [
            "cpu.shares=512",
            "cpu.cfs_period_us=100000",
            "cpu.cfs_quota_us=50000",
            "memory.limit_in_bytes=1048576",
            "pids.max=max"
        ]
    );
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
        let whole = pod_limits(&p, None);
        for c in all_containers(p.spec.as_ref().unwrap()) {
            let own = container_limits(c);
            prop_assert!(own.cpu_shares <= whole.cpu_shares);
            if let (Some(own), Some(all)) = (own.cpu_quota_us, whole.cpu_quota_us) {
                prop_assert!(own <= all);
            }
        }
        prop_assert_eq!(qos_class(&p) == QosClass::BestEffort,
            containers.iter().all(|c| c.0 == 0 && !(c.2 && c.1 > 0)) && init.iter().all(|i| i.0 == 0));
    }
}
