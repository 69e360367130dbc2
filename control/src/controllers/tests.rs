//! The controllers and the scheduler together, on a real registry and store, with a fake agent that
//! makes every bound pod ready and lets deleted ones go.

mod autoscaling;
mod claims;
mod daemon_sets;
mod deployments;
mod garbage;
mod jobs;
mod load_balancers;
mod replica_sets;
mod scheduling;
mod stateful_sets;

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
    meters: Arc<autoscaling::FakeMeters>,
    _directory: tempfile::TempDir,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Cluster {
    async fn start() -> Self {
        Self::start_with(Settings::default()).await
    }

    async fn start_with(controllers: Settings) -> Self {
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
        let meters = Arc::new(autoscaling::FakeMeters::new(registry.clone()));
        let (own, remover, usage) = (registry.clone(), Arc::clone(&disks), Arc::clone(&meters));
        tokio::spawn(run(own, controllers, remover, usage, stop.clone()));
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
            meters,
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
                status.start_time = Some(Time(Timestamp::now()));
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

fn template(app: &str) -> serde_json::Value {
    json!({
        "metadata": {"labels": {"app": app}},
        "spec": {"containers": [{"name": "c", "image": "a:1"}]},
    })
}
