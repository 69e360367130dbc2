//! HorizontalPodAutoscalers: the number of replicas follows what pods use.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};

use super::*;

use futures_util::future::BoxFuture;
use gantry_api::k8s_openapi::api::autoscaling::v2::HorizontalPodAutoscaler;
use gantry_api::proto::{ContainerUsage, PodUsage, Usage};

/// Agents that say the same of every container.
pub(super) struct FakeMeters {
    registry: Registry,
    millicores: AtomicU64,
    asked_count: AtomicU64,
}

impl FakeMeters {
    pub(super) fn new(registry: Registry) -> FakeMeters {
        FakeMeters {
            registry,
            millicores: AtomicU64::new(0),
            asked_count: AtomicU64::new(0),
        }
    }

    fn set(&self, millicores: u64) {
        self.millicores.store(millicores, Ordering::SeqCst);
    }
}

impl UsageSource for FakeMeters {
    fn usage<'a>(&'a self, nodes: &'a BTreeSet<String>) -> BoxFuture<'a, Vec<PodUsage>> {
        self.asked_count.fetch_add(1, Ordering::SeqCst);
        let cpu = self.millicores.load(Ordering::SeqCst);
        let pods = self.registry.list::<Pod>(None).map(|(_, pods)| pods);
        let on_nodes = |pod: &Pod| pods::node(pod).is_some_and(|node| nodes.contains(node));
        let measured = |pod: Pod| {
            let spec = pod.spec.unwrap_or_default();
            let usage = Usage {
                cpu_nanocores: cpu * 1_000_000,
                memory_working_set_bytes: 1 << 20,
                window_ms: 1,
                ..Usage::default()
            };
            let containers = spec.containers.into_iter().map(|container| ContainerUsage {
                name: container.name,
                usage: Some(usage),
            });
            PodUsage {
                uid: pod.metadata.uid.unwrap_or_default(),
                name: pod.metadata.name.unwrap_or_default(),
                namespace: pod.metadata.namespace.unwrap_or_default(),
                usage: Some(usage),
                containers: containers.collect(),
            }
        };
        let pods = pods.unwrap_or_default().into_iter().filter(on_nodes);
        let all = pods.map(measured).collect();
        Box::pin(async move { all })
    }
}

fn condition(scaler: &HorizontalPodAutoscaler, type_: &str) -> (String, String, String) {
    let status = scaler.status.clone().unwrap_or_default();
    let all = status.conditions.unwrap_or_default().into_iter();
    let found = all.into_iter().find(|c| c.type_ == type_);
    let found = found.unwrap_or_default();
    (
        found.status,
        found.reason.unwrap_or_default(),
        found.message.unwrap_or_default(),
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deployment_follows_its_use_up_and_down_and_stays_in_its_range() {
    let cluster = Cluster::start_with(Settings {
        autoscale_interval: Duration::from_secs(1),
        ..Settings::default()
    })
    .await;
    cluster.node("n1", "64").await;
    let mut template = template("web");
    template["spec"]["containers"][0]["resources"] = json!({"requests": {"cpu": "100m"}});
    let _: Deployment = cluster
        .create(json!({
            "apiVersion": "apps/v1", "kind": "Deployment",
            "metadata": {"name": "web", "namespace": "default"},
            "spec": {"replicas": 1, "selector": {"matchLabels": {"app": "web"}},
                "template": template},
        }))
        .await;
    // Nobody is asked while there is no scaler.
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert_eq!(cluster.meters.asked_count.load(Ordering::SeqCst), 0);
    let _: HorizontalPodAutoscaler = cluster
        .create(json!({
            "apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler",
            "metadata": {"name": "web", "namespace": "default"},
            "spec": {
                "minReplicas": 2, "maxReplicas": 7,
                "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": "web"},
                "metrics": [{"type": "Resource", "resource": {"name": "cpu",
                    "target": {"type": "Utilization", "averageUtilization": 50}}}],
                "behavior": {"scaleDown": {"stabilizationWindowSeconds": 0}},
            },
        }))
        .await;
    let replicas = || {
        let deployment: Deployment = cluster.get("default", "web").unwrap();
        deployment.spec.unwrap().replicas.unwrap()
    };
    let scaler = || -> HorizontalPodAutoscaler { cluster.get("default", "web").unwrap() };
    cluster.meters.set(50);
    eventually("at least two", || replicas() == 2).await;
    eventually("told", || {
        let events = cluster.events("SuccessfulRescale");
        events
            .iter()
            .any(|m| m == "New size: 2; reason: Current number of replicas below Spec.MinReplicas")
    })
    .await;
    // 200 % of what they request where 50 % are wanted: more than there may be.
    cluster.meters.set(200);
    eventually("as many as there may be", || replicas() == 7).await;
    eventually("why not more", || {
        condition(&scaler(), "ScalingLimited").1 == "TooManyReplicas"
    })
    .await;
    let active = condition(&scaler(), "ScalingActive");
    assert_eq!(
        (active.0.as_str(), active.2.as_str()),
        (
            "True",
            "the HPA was able to successfully calculate a replica count from cpu resource utilization \
             (percentage of request)"
        )
    );
    eventually("shown", || {
        let status = scaler().status.unwrap_or_default();
        let metric = status.current_metrics.and_then(|m| m.into_iter().next());
        let current = metric.and_then(|m| m.resource).map(|r| r.current);
        current.and_then(|c| c.average_utilization) == Some(200)
            && status.current_replicas == Some(7)
    })
    .await;
    // Within the tolerance nothing happens, then it goes down as far as it may.
    cluster.meters.set(52);
    eventually("seen", || {
        condition(&scaler(), "ScalingLimited").1 == "DesiredWithinRange"
    })
    .await;
    assert_eq!(replicas(), 7);
    cluster.meters.set(1);
    eventually("as few as there may be", || replicas() == 2).await;
    // None at all is somebody's wish: it is left alone.
    cluster
        .change("default", "web", |d: &mut Deployment| {
            d.spec.as_mut().unwrap().replicas = Some(0);
        })
        .await;
    eventually("left alone", || {
        condition(&scaler(), "ScalingActive").1 == "ScalingDisabled"
    })
    .await;
    assert_eq!(replicas(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_scaler_without_a_target_or_requests_says_so() {
    let cluster = Cluster::start_with(Settings {
        autoscale_interval: Duration::from_secs(1),
        ..Settings::default()
    })
    .await;
    cluster.node("n1", "64").await;
    let _: HorizontalPodAutoscaler = cluster
        .create(json!({
            "apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler",
            "metadata": {"name": "s", "namespace": "default"},
            "spec": {"maxReplicas": 3,
                "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": "web"}},
        }))
        .await;
    let scaler = || -> HorizontalPodAutoscaler { cluster.get("default", "s").unwrap() };
    eventually("no target", || {
        condition(&scaler(), "AbleToScale").2
            == "the HPA controller was unable to get the target's current scale: deployments.apps \
                \"web\" not found"
    })
    .await;
    let _: Deployment = cluster
        .create(json!({
            "apiVersion": "apps/v1", "kind": "Deployment",
            "metadata": {"name": "web", "namespace": "default"},
            "spec": {"replicas": 1, "selector": {"matchLabels": {"app": "web"}},
                "template": template("web")},
        }))
        .await;
    eventually("no requests", || {
        let (value, reason, message) = condition(&scaler(), "ScalingActive");
        value == "False"
            && reason == "FailedGetResourceMetric"
            && message.contains("missing request for cpu in container")
    })
    .await;
}
