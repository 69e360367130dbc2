//! The controllers and the scheduler together, on a real registry and store, with a fake agent that
//! makes every bound pod ready and lets deleted ones go.

mod claims;
mod jobs;

use super::*;

use gantry_api::k8s_openapi::api::core::v1::{ConfigMap, PodCondition, PodIP};
use gantry_api::k8s_openapi::api::scheduling::v1::PriorityClass;
use serde_json::json;

use crate::server::registry::{DeleteOptions, Propagation, Settings as RegistrySettings};
use crate::store::Store;

/// How long anything may take here; the machine may be busy.
const PATIENCE: Duration = Duration::from_secs(60);

struct Cluster {
    registry: Registry,
    stop: CancellationToken,
    disks: Arc<claims::FakeDisks>,
    _directory: tempfile::TempDir,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Cluster {
    async fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(&directory.path().join("store.redb")).unwrap();
        let settings = RegistrySettings {
            service_cidr: "10.96.0.0/16".parse().unwrap(),
            reserved_addresses: Vec::new(),
        };
        let registry = Registry::new(store, &settings);
        registry.ensure_defaults().await.unwrap();
        let stop = CancellationToken::new();
        let disks = Arc::new(claims::FakeDisks::default());
        let (own, remover) = (registry.clone(), Arc::clone(&disks));
        tokio::spawn(run(own, Settings::default(), remover, stop.clone()));
        tokio::spawn(crate::scheduler::run(registry.clone(), stop.clone()));
        let agent = fake_agent(registry.clone());
        let ended = stop.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = agent => {}
                () = ended.cancelled() => {}
            }
        });
        Self {
            registry,
            stop,
            disks,
            _directory: directory,
        }
    }

    async fn create<K: Resource>(&self, object: serde_json::Value) -> K {
        self.registry
            .create(&serde_json::from_value(object).unwrap())
            .await
            .unwrap()
    }

    async fn node(&self, name: &str, cpu: &str) -> Node {
        self.create(json!({
            "apiVersion": "v1", "kind": "Node",
            "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}},
            "status": {
                "allocatable": {"cpu": cpu, "memory": "8Gi", "pods": "110"},
                "conditions": [{"type": "Ready", "status": "True"}],
            },
        }))
        .await
    }

    /// Changes an object by its newest state, again if somebody was faster.
    async fn change<K: Resource>(&self, namespace: &str, name: &str, change: impl Fn(&mut K)) {
        loop {
            let mut object: K = self.registry.get(namespace, name).unwrap().unwrap();
            change(&mut object);
            match self.registry.update(&object).await {
                Ok(_) => return,
                Err(status) => assert_eq!(status.reason, Reason::Conflict, "{status}"),
            }
        }
    }

    /// The same for a node's status.
    async fn change_status(&self, name: &str, change: impl Fn(&mut Node)) {
        loop {
            let mut node: Node = self.get("", name).unwrap();
            change(&mut node);
            match self.registry.update_status(&node).await {
                Ok(_) => return,
                Err(status) => assert_eq!(status.reason, Reason::Conflict, "{status}"),
            }
        }
    }

    async fn delete<K: Resource>(&self, namespace: &str, name: &str, propagation: Propagation) {
        let options = DeleteOptions {
            propagation,
            ..DeleteOptions::default()
        };
        self.registry
            .delete::<K>(namespace, name, &options)
            .await
            .unwrap();
    }

    fn list<K: Resource>(&self, namespace: &str) -> Vec<K> {
        self.registry.list(Some(namespace)).unwrap().1
    }

    fn get<K: Resource>(&self, namespace: &str, name: &str) -> Option<K> {
        self.registry.get(namespace, name).unwrap()
    }

    fn events(&self, reason: &str) -> Vec<String> {
        let events = self.list::<Event>("default").into_iter();
        let events = events.filter(|event| event.reason.as_deref() == Some(reason));
        events.filter_map(|event| event.message).collect()
    }

    fn endpoints(&self, service: &str) -> Vec<String> {
        let mut addresses = Vec::new();
        for slice in self.list::<EndpointSlice>("default") {
            let labels = slice.metadata.labels.unwrap_or_default();
            if labels.get(endpointslice::SERVICE_NAME).map(String::as_str) == Some(service) {
                let ready = |c: Option<bool>| c == Some(true);
                let endpoints = slice.endpoints.into_iter().flatten();
                let endpoints =
                    endpoints.filter(|e| ready(e.conditions.as_ref().and_then(|c| c.ready)));
                addresses.extend(endpoints.flat_map(|endpoint| endpoint.addresses));
            }
        }
        addresses.sort();
        addresses
    }
}

/// Waits until `condition` holds.
async fn eventually(what: &str, condition: impl Fn() -> bool) {
    let start = tokio::time::Instant::now();
    while !condition() {
        assert!(
            start.elapsed() < PATIENCE,
            "not within {PATIENCE:?}: {what}"
        );
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Label of pods that an agent would report as running until they are told to stop.
const RUNS_ON: &str = "runs-on";

fn ends_by_itself(pod: &Pod) -> bool {
    let labels = pod.metadata.labels.as_ref();
    if labels.is_some_and(|labels| labels.contains_key(RUNS_ON)) {
        return false;
    }
    let policy = pod
        .spec
        .as_ref()
        .and_then(|spec| spec.restart_policy.as_deref());
    policy != Some("Always")
}

/// What an agent does, for all nodes at once.
async fn fake_agent(registry: Registry) {
    let mut next_address = 1_u32;
    loop {
        for mut pod in registry.list::<Pod>(None).unwrap().1 {
            let key = ObjectKey::of(&pod.metadata);
            let uid = pod.metadata.uid.clone().unwrap();
            let node = pods::node(&pod).unwrap_or_default();
            if registry.get::<Node>("", node).unwrap().is_none() {
                continue;
            }
            if pods::is_terminating(&pod) {
                registry
                    .remove_pod(&key.namespace, &key.name, &uid)
                    .await
                    .unwrap();
            } else if ends_by_itself(&pod) {
                if !pods::is_finished(&pod) {
                    pod.status.get_or_insert_default().phase = Some("Succeeded".to_owned());
                    let _ = registry.update_status(&pod).await;
                }
            } else if !pods::is_ready(&pod) {
                let status = pod.status.get_or_insert_default();
                let address = std::net::Ipv4Addr::from(0x0af4_0000 + next_address).to_string();
                next_address += 1;
                status.phase = Some("Running".to_owned());
                status.pod_ip = Some(address.clone());
                status.pod_ips = Some(vec![PodIP { ip: address }]);
                let conditions = status.conditions.get_or_insert_default();
                for type_ in ["ContainersReady", "Ready"] {
                    conditions.retain(|condition| condition.type_ != type_);
                    conditions.push(PodCondition {
                        type_: type_.to_owned(),
                        status: "True".to_owned(),
                        last_transition_time: Some(Time(Timestamp::now())),
                        ..PodCondition::default()
                    });
                }
                let _ = registry.update_status(&pod).await;
            }
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn deployment(replicas: i32, image: &str) -> serde_json::Value {
    json!({
        "apiVersion": "apps/v1", "kind": "Deployment",
        "metadata": {"name": "web", "namespace": "default"},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": {"app": "web"}},
            "strategy": {
                "type": "RollingUpdate",
                "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0},
            },
            "template": {
                "metadata": {"labels": {"app": "web"}},
                "spec": {"containers": [{
                    "name": "web", "image": image,
                    "ports": [{"name": "http", "containerPort": 8080}],
                    "resources": {"requests": {"cpu": "10m", "memory": "8Mi"}},
                }]},
            },
        },
    })
}

fn set_image(deployment: &mut Deployment, image: &str) {
    let spec = deployment.spec.as_mut().unwrap();
    spec.template.spec.as_mut().unwrap().containers[0].image = Some(image.to_owned());
}

fn progress(cluster: &Cluster) -> Option<(i32, i32, i32, String)> {
    let deployment: Deployment = cluster.get("default", "web")?;
    let status = deployment.status?;
    if status.observed_generation != deployment.metadata.generation {
        return None;
    }
    let conditions = status.conditions.unwrap_or_default();
    let reason = conditions
        .into_iter()
        .find(|c| c.type_ == "Progressing")?
        .reason?;
    let count = |n: Option<i32>| n.unwrap_or(0);
    Some((
        count(status.replicas),
        count(status.updated_replicas),
        count(status.available_replicas),
        reason,
    ))
}

fn is_rolled_out(cluster: &Cluster, replicas: i32) -> bool {
    let done = (
        replicas,
        replicas,
        replicas,
        "NewReplicaSetAvailable".to_owned(),
    );
    progress(cluster) == Some(done)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deployment_rolls_out_scales_and_takes_everything_along() {
    let cluster = Cluster::start().await;
    cluster.node("n1", "4").await;
    cluster.node("n2", "4").await;
    let _: Service = cluster
        .create(json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": "web", "namespace": "default"},
            "spec": {"selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": "http"}]},
        }))
        .await;
    let _: Deployment = cluster.create(deployment(3, "a")).await;
    eventually("first rollout", || is_rolled_out(&cluster, 3)).await;
    eventually("endpoints", || cluster.endpoints("web").len() == 3).await;
    let slices: Vec<EndpointSlice> = cluster.list("default");
    assert_eq!(slices.len(), 1);
    assert_eq!(
        slices[0].ports.as_ref().unwrap()[0].port,
        Some(8080),
        "named port resolved"
    );
    let nodes: std::collections::BTreeSet<String> = cluster
        .list::<Pod>("default")
        .iter()
        .filter_map(|pod| pods::node(pod).map(str::to_owned))
        .collect();
    assert_eq!(nodes.len(), 2, "both nodes are used");
    for node in ["n1", "n2"] {
        eventually("pod CIDR", || {
            let node: Node = cluster.get("", node).unwrap();
            node.spec.and_then(|spec| spec.pod_cidr).is_some()
        })
        .await;
    }

    cluster
        .change("default", "web", |d: &mut Deployment| set_image(d, "b"))
        .await;
    // Until it is done, never fewer than 3 available pods and never more than 4 in all.
    let start = tokio::time::Instant::now();
    while !is_rolled_out(&cluster, 3) {
        let all: Vec<Pod> = cluster.list("default");
        let active: Vec<&Pod> = all.iter().filter(|pod| pods::is_active(pod)).collect();
        let ready = active.iter().filter(|pod| pods::is_ready(pod)).count();
        assert!(
            ready >= 3 && active.len() <= 4,
            "{ready} ready of {}",
            active.len()
        );
        assert!(start.elapsed() < PATIENCE, "{:?}", progress(&cluster));
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let now: Deployment = cluster.get("default", "web").unwrap();
    let revision = now.metadata.annotations.unwrap()["deployment.kubernetes.io/revision"].clone();
    assert_eq!(revision, "2");
    assert_eq!(
        cluster.list::<ReplicaSet>("default").len(),
        2,
        "the old one stays for rollback"
    );

    let resize =
        |replicas| move |d: &mut Deployment| d.spec.as_mut().unwrap().replicas = Some(replicas);
    cluster.change("default", "web", resize(6)).await;
    eventually("scaled up", || is_rolled_out(&cluster, 6)).await;
    cluster.change("default", "web", resize(2)).await;
    eventually("scaled down", || is_rolled_out(&cluster, 2)).await;
    eventually("endpoints follow", || cluster.endpoints("web").len() == 2).await;
    let events = cluster.events("ScalingReplicaSet");
    assert!(
        events
            .iter()
            .any(|e| e.starts_with("Scaled up replica set web-")),
        "{events:?}"
    );
    assert!(
        events
            .iter()
            .any(|e| e.ends_with(" from 2 to 6") || e.ends_with(" from 3 to 6"))
    );

    cluster
        .change("default", "web", |d: &mut Deployment| set_image(d, "a"))
        .await;
    eventually("rolled back", || is_rolled_out(&cluster, 2)).await;
    let now: Deployment = cluster.get("default", "web").unwrap();
    let revision = now.metadata.annotations.unwrap()["deployment.kubernetes.io/revision"].clone();
    assert_eq!(revision, "3");
    assert_eq!(
        cluster.list::<ReplicaSet>("default").len(),
        2,
        "the first one was used again"
    );

    cluster
        .delete::<Deployment>("default", "web", Propagation::Background)
        .await;
    eventually("collected", || {
        cluster.list::<ReplicaSet>("default").is_empty()
            && cluster.list::<Pod>("default").is_empty()
    })
    .await;
    eventually("no endpoints", || cluster.endpoints("web").is_empty()).await;
    cluster
        .delete::<Service>("default", "web", Propagation::Background)
        .await;
    eventually("slices collected", || {
        cluster.list::<EndpointSlice>("default").is_empty()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn foreground_and_orphan_deletions_keep_their_promise() {
    let cluster = Cluster::start().await;
    cluster.node("n1", "4").await;
    let _: Deployment = cluster.create(deployment(2, "a")).await;
    eventually("rollout", || is_rolled_out(&cluster, 2)).await;
    cluster
        .delete::<Deployment>("default", "web", Propagation::Orphan)
        .await;
    eventually("the deployment goes alone", || {
        cluster.get::<Deployment>("default", "web").is_none()
    })
    .await;
    let sets: Vec<ReplicaSet> = cluster.list("default");
    assert_eq!(sets.len(), 1);
    assert_eq!(pods::controller_of(&sets[0].metadata), None);
    assert_eq!(cluster.list::<Pod>("default").len(), 2);
    // The same deployment again adopts the orphan and changes nothing.
    let before: Vec<_> = cluster
        .list::<Pod>("default")
        .into_iter()
        .map(|p| p.metadata.uid)
        .collect();
    let _: Deployment = cluster.create(deployment(2, "a")).await;
    eventually("adopted", || is_rolled_out(&cluster, 2)).await;
    let after: Vec<_> = cluster
        .list::<Pod>("default")
        .into_iter()
        .map(|p| p.metadata.uid)
        .collect();
    assert_eq!(before, after);
    cluster
        .delete::<Deployment>("default", "web", Propagation::Foreground)
        .await;
    eventually("all gone", || {
        cluster.get::<Deployment>("default", "web").is_none()
    })
    .await;
    assert!(
        cluster.list::<ReplicaSet>("default").is_empty(),
        "dependents go first"
    );
    assert!(
        cluster.list::<Pod>("default").is_empty(),
        "dependents go first"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_namespace_takes_its_contents_along() {
    let cluster = Cluster::start().await;
    cluster.node("n1", "4").await;
    let _: Namespace = cluster
        .create(json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop"}}))
        .await;
    let mut object = deployment(2, "a");
    object["metadata"]["namespace"] = json!("shop");
    let _: Deployment = cluster.create(object).await;
    let _: ConfigMap = cluster
        .create(json!({
            "apiVersion": "v1", "kind": "ConfigMap",
            "metadata": {"name": "held", "namespace": "shop", "finalizers": ["example.com/hold"]},
        }))
        .await;
    eventually("pods run", || {
        cluster
            .list::<Pod>("shop")
            .iter()
            .filter(|pod| pods::is_ready(pod))
            .count()
            == 2
    })
    .await;
    cluster
        .delete::<Namespace>("", "shop", Propagation::Background)
        .await;
    eventually("pods go", || cluster.list::<Pod>("shop").is_empty()).await;
    eventually("the finalizer is named", || {
        let namespace: Namespace = cluster.get("", "shop").unwrap();
        let conditions = namespace
            .status
            .and_then(|status| status.conditions)
            .unwrap_or_default();
        let text = "example.com/hold in 1 resource instances";
        conditions
            .iter()
            .any(|c| c.message.as_deref().unwrap_or_default().contains(text))
    })
    .await;
    cluster
        .change("shop", "held", |map: &mut ConfigMap| {
            map.metadata.finalizers = None
        })
        .await;
    eventually("the namespace goes", || {
        cluster.get::<Namespace>("", "shop").is_none()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pods_wait_with_a_reason_and_follow_their_nodes() {
    let cluster = Cluster::start().await;
    cluster.node("small", "1").await;
    let _: Pod = cluster
        .create(json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": "big", "namespace": "default", "labels": {"app": "big"}},
            "spec": {"containers": [{
                "name": "c", "image": "i", "resources": {"requests": {"cpu": "2"}},
            }]},
        }))
        .await;
    let wanted = "0/1 nodes are available: 1 Insufficient cpu.";
    eventually("the reason is told", || {
        cluster
            .events("FailedScheduling")
            .iter()
            .any(|message| message == wanted)
            && cluster.get::<Pod>("default", "big").is_some_and(|pod| {
                pods::condition(&pod, "PodScheduled").is_some_and(|condition| {
                    condition.reason.as_deref() == Some("Unschedulable")
                        && condition.message.as_deref() == Some(wanted)
                })
            })
    })
    .await;
    cluster.node("large", "8").await;
    eventually("it gets the new node", || {
        let pod: Pod = cluster.get("default", "big").unwrap();
        pods::node(&pod) == Some("large")
    })
    .await;
    eventually("told", || {
        cluster.events("Scheduled") == ["Successfully assigned default/big to large"]
    })
    .await;
    cluster
        .delete::<Node>("", "large", Propagation::Background)
        .await;
    eventually("it goes with its node", || {
        cluster.get::<Pod>("default", "big").is_none()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_set_adopts_releases_and_repairs() {
    let cluster = Cluster::start().await;
    cluster.node("n1", "4").await;
    let bare = |name: &str| {
        json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": name, "namespace": "default", "labels": {"type": "backend"}},
            "spec": {"containers": [{"name": "c", "image": "i"}]},
        })
    };
    let _: Pod = cluster.create(bare("first")).await;
    let _: ReplicaSet = cluster
        .create(json!({
            "apiVersion": "apps/v1", "kind": "ReplicaSet",
            "metadata": {"name": "backend", "namespace": "default"},
            "spec": {
                "replicas": 3,
                "selector": {"matchLabels": {"type": "backend"}},
                "template": {
                    "metadata": {"labels": {"type": "backend"}},
                    "spec": {"containers": [{"name": "c", "image": "i"}]},
                },
            },
        }))
        .await;
    let ready = |count: i32| {
        let set: ReplicaSet = cluster.get("default", "backend").unwrap();
        let status = set.status.unwrap_or_default();
        status.replicas == count
            && status.available_replicas == Some(count)
            && status.observed_generation == set.metadata.generation
    };
    eventually("three, one of them adopted", || ready(3)).await;
    assert_eq!(cluster.list::<Pod>("default").len(), 3);
    let first: Pod = cluster.get("default", "first").unwrap();
    assert_eq!(
        pods::controller_of(&first.metadata).unwrap().kind,
        "ReplicaSet"
    );
    cluster
        .change("default", "first", |pod: &mut Pod| {
            pod.metadata
                .labels
                .get_or_insert_default()
                .insert("type".into(), "other".into());
        })
        .await;
    eventually("released and replaced", || {
        cluster.list::<Pod>("default").len() == 4
    })
    .await;
    let first: Pod = cluster.get("default", "first").unwrap();
    eventually("released", || {
        let first: Pod = cluster.get("default", "first").unwrap();
        pods::controller_of(&first.metadata).is_none()
    })
    .await;
    assert!(pods::is_active(&first));
    // A pod deleted by hand is replaced.
    eventually("three again", || ready(3)).await;
    let victim = cluster
        .list::<Pod>("default")
        .into_iter()
        .find(|pod| pods::controller_of(&pod.metadata).is_some());
    let victim = ObjectKey::of(&victim.unwrap().metadata);
    cluster
        .delete::<Pod>(&victim.namespace, &victim.name, Propagation::Background)
        .await;
    eventually("replaced", || {
        cluster.get::<Pod>("default", &victim.name).is_none() && ready(3)
    })
    .await;
    // An owner that does not exist takes its dependents along.
    let mut orphan = bare("orphan");
    orphan["metadata"]["labels"] = json!({});
    orphan["metadata"]["ownerReferences"] = json!([
        {"apiVersion": "v1", "kind": "ConfigMap", "name": "x", "uid": "no-such-uid"}
    ]);
    let _: Pod = cluster.create(orphan).await;
    eventually("collected", || {
        cluster.get::<Pod>("default", "orphan").is_none()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_important_pod_gets_the_room_of_a_lesser_one() {
    let cluster = Cluster::start().await;
    cluster.node("n1", "1").await;
    let _: PriorityClass = cluster
        .create(json!({
            "apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass",
            "metadata": {"name": "high"}, "value": 1000,
        }))
        .await;
    let pod = |name: &str, class: Option<&str>| {
        json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": name, "namespace": "default"},
            "spec": {"priorityClassName": class, "containers": [{"name": "c", "image": "a:1",
                "resources": {"requests": {"cpu": "800m"}}}]},
        })
    };
    let _: Pod = cluster.create(pod("lesser", None)).await;
    eventually("the first runs", || {
        cluster
            .get::<Pod>("default", "lesser")
            .is_some_and(|pod| pods::is_ready(&pod))
    })
    .await;
    let _: Pod = cluster.create(pod("important", Some("high"))).await;
    eventually("the second runs", || {
        cluster
            .get::<Pod>("default", "important")
            .is_some_and(|pod| pods::is_ready(&pod))
    })
    .await;
    assert!(cluster.get::<Pod>("default", "lesser").is_none());
    let told = cluster.events("Preempted");
    assert!(
        told.iter().any(|text| text.contains("default/important")),
        "{told:?}"
    );
}

fn template(app: &str) -> serde_json::Value {
    json!({
        "metadata": {"labels": {"app": app}},
        "spec": {"containers": [{"name": "c", "image": "a:1"}]},
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_counts_its_ends_once_and_a_daemon_set_is_on_every_node() {
    let cluster = Cluster::start().await;
    cluster.node("n1", "4").await;
    let _: Job = cluster
        .create(json!({
            "apiVersion": "batch/v1", "kind": "Job",
            "metadata": {"name": "j", "namespace": "default"},
            "spec": {"completions": 5, "parallelism": 2, "completionMode": "Indexed",
                "template": {"spec": {"restartPolicy": "Never",
                    "containers": [{"name": "c", "image": "a:1"}]}}},
        }))
        .await;
    eventually("the Job is complete", || {
        let job: Job = cluster.get("default", "j").unwrap();
        job.status.is_some_and(|status| {
            status.completion_time.is_some()
                && status.succeeded == Some(5)
                && status.completed_indexes.as_deref() == Some("0-4")
        })
    })
    .await;
    let pods: Vec<Pod> = cluster.list("default");
    assert_eq!(pods.len(), 5, "no index ran twice");
    assert!(
        pods.iter()
            .all(|pod| pod.metadata.finalizers.as_ref().is_none_or(Vec::is_empty))
    );

    let _: DaemonSet = cluster
        .create(json!({
            "apiVersion": "apps/v1", "kind": "DaemonSet",
            "metadata": {"name": "d", "namespace": "default"},
            "spec": {"selector": {"matchLabels": {"app": "d"}}, "template": template("d")},
        }))
        .await;
    let on_nodes = || {
        let pods = cluster.list::<Pod>("default").into_iter();
        let own = pods.filter(|pod| super::controller_key::<DaemonSet, Pod>(pod).is_some());
        let mut nodes: Vec<String> = own
            .filter(pods::is_ready)
            .filter_map(|pod| pods::node(&pod).map(str::to_owned))
            .collect();
        nodes.sort();
        nodes
    };
    eventually("on the first node", || on_nodes() == ["n1"]).await;
    cluster.node("n2", "4").await;
    eventually("on the new node", || on_nodes() == ["n1", "n2"]).await;
    eventually("counted", || {
        let set: DaemonSet = cluster.get("default", "d").unwrap();
        set.status
            .is_some_and(|status| status.desired_number_scheduled == 2)
    })
    .await;
    cluster
        .change("default", "d", |d: &mut DaemonSet| {
            let spec = d.spec.as_mut().unwrap();
            spec.template.spec.as_mut().unwrap().containers[0].image = Some("b:1".to_owned());
        })
        .await;
    eventually("rolled out", || {
        let set: DaemonSet = cluster.get("default", "d").unwrap();
        let generation = set.metadata.generation;
        set.status.is_some_and(|status| {
            status.observed_generation == generation
                && status.updated_number_scheduled == Some(2)
                && status.number_available == Some(2)
        })
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stateful_sets_pods_have_names_and_an_order() {
    let cluster = Cluster::start().await;
    cluster.node("n1", "4").await;
    let _: StatefulSet = cluster
        .create(json!({
            "apiVersion": "apps/v1", "kind": "StatefulSet",
            "metadata": {"name": "s", "namespace": "default"},
            "spec": {"replicas": 2, "serviceName": "s",
                "selector": {"matchLabels": {"app": "s"}}, "template": template("s")},
        }))
        .await;
    let serves = |name: &str| {
        let pod: Option<Pod> = cluster.get("default", name);
        pod.is_some_and(|pod| pods::is_ready(&pod) && !pods::is_terminating(&pod))
    };
    eventually("both serve", || {
        assert!(!serves("s-1") || serves("s-0"), "s-1 before s-0");
        serves("s-0") && serves("s-1")
    })
    .await;
    let done = |image: &str| {
        let set: StatefulSet = cluster.get("default", "s").unwrap();
        let status = set.status.unwrap();
        let pods: Vec<Pod> = cluster.list("default");
        let new = pods
            .iter()
            .all(|pod| pod.spec.as_ref().unwrap().containers[0].image.as_deref() == Some(image));
        new && status.current_revision == status.update_revision && status.ready_replicas == Some(2)
    };
    cluster
        .change("default", "s", |s: &mut StatefulSet| {
            let spec = s.spec.as_mut().unwrap();
            spec.template.spec.as_mut().unwrap().containers[0].image = Some("b:1".to_owned());
        })
        .await;
    eventually("rolled out", || done("b:1")).await;
    cluster
        .delete::<StatefulSet>("default", "s", Propagation::Background)
        .await;
    eventually("the pods go", || cluster.list::<Pod>("default").is_empty()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_claim_is_bound_to_the_smallest_volume_that_serves_it() {
    let cluster = Cluster::start().await;
    for (name, size) in [("large", "9Gi"), ("small", "2Gi"), ("tiny", "1Mi")] {
        let _: PersistentVolume = cluster
            .create(json!({
                "apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": name},
                "spec": {"capacity": {"storage": size}, "accessModes": ["ReadWriteOnce"],
                    "storageClassName": "by-hand", "hostPath": {"path": format!("/srv/{name}")}},
            }))
            .await;
    }
    let _: PersistentVolumeClaim = cluster
        .create(json!({
            "apiVersion": "v1", "kind": "PersistentVolumeClaim",
            "metadata": {"name": "c", "namespace": "default"},
            "spec": {"accessModes": ["ReadWriteOnce"], "storageClassName": "by-hand",
                "resources": {"requests": {"storage": "1Gi"}}},
        }))
        .await;
    let claim = || {
        cluster
            .get::<PersistentVolumeClaim>("default", "c")
            .unwrap()
    };
    let volume = |name: &str| cluster.get::<PersistentVolume>("", name).unwrap();
    let phase = |name: &str| volume(name).status.and_then(|status| status.phase);
    // No class of that name: only what is there can serve.
    eventually("bound", || {
        claim().status.and_then(|s| s.phase).as_deref() == Some("Bound")
    })
    .await;
    assert_eq!(claim().spec.unwrap().volume_name.as_deref(), Some("small"));
    eventually("the volume says so", || {
        phase("small").as_deref() == Some("Bound")
    })
    .await;
    eventually("the others are free", || {
        phase("large").as_deref() == Some("Available")
    })
    .await;
    cluster
        .delete::<PersistentVolumeClaim>("default", "c", Propagation::Background)
        .await;
    eventually("released", || phase("small").as_deref() == Some("Released")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replication_controller_keeps_its_count() {
    let cluster = Cluster::start().await;
    cluster.node("n1", "4").await;
    let _: ReplicationController = cluster
        .create(json!({
            "apiVersion": "v1", "kind": "ReplicationController",
            "metadata": {"name": "rc", "namespace": "default"},
            "spec": {"replicas": 2, "template": template("rc")},
        }))
        .await;
    let ready = || {
        let rc: ReplicationController = cluster.get("default", "rc").unwrap();
        rc.status.and_then(|status| status.ready_replicas)
    };
    eventually("two are ready", || ready() == Some(2)).await;
    let pods: Vec<Pod> = cluster.list("default");
    let owner = pods[0].metadata.owner_references.as_ref().unwrap();
    assert_eq!(owner[0].kind, "ReplicationController");
    let name = pods[0].metadata.name.clone().unwrap();
    cluster
        .delete::<Pod>("default", &name, Propagation::Background)
        .await;
    eventually("it was replaced", || {
        cluster.get::<Pod>("default", &name).is_none() && ready() == Some(2)
    })
    .await;
}
