//! The control plane as one process: store, registry, feed, hold, scheduler and controllers as
//! `gantry-control` starts them, behind the simulated net instead of a port; and what users do.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::future::BoxFuture;
use gantry_api::k8s_openapi::api::apps::v1::Deployment;
use gantry_api::k8s_openapi::api::core::v1::{Node, Pod, Secret, Service};
use gantry_api::status::{Reason, Status};
use gantry_control::controllers::{self, UsageSource, VolumeRemover};
use gantry_control::feed::{Feed, Settings};
use gantry_control::hold::{self, Hold};
use gantry_control::scheduler;
use gantry_control::server::identity::{Identity, MASTERS_GROUP};
use gantry_control::server::registry::{self, DeleteOptions, Resource};
use gantry_control::server::{Registry, Tokens};
use gantry_control::store::backup::{Header, Writer};
use gantry_control::store::{BACKUP_PREFIX, Keys, STORE_FILE, Store};
use serde_json::{Value, json};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::service::interceptor::InterceptedService;

use super::node::RUNS_FOR;
use super::state::{trace, violated, with};
use super::{history, host, node, wire};

/// What of a control plane is reached from outside; empty until it is up.
#[derive(Clone, Default)]
pub struct Door {
    inside: Arc<Mutex<Option<(Registry, Feed)>>>,
    /// Users come one after the other, in the order of their wishes.
    queue: Arc<tokio::sync::Mutex<()>>,
}

impl Door {
    pub fn get(&self) -> Option<(Registry, Feed)> {
        let inside = self.inside.lock().unwrap_or_else(PoisonError::into_inner);
        inside.clone()
    }
}

/// No pod has a volume, and nothing is scaled by use.
struct Nothing;

impl VolumeRemover for Nothing {
    fn remove<'a>(&'a self, _: &'a str, _: &'a str) -> BoxFuture<'a, Result<(), Status>> {
        Box::pin(async { Ok(()) })
    }
}

impl UsageSource for Nothing {
    fn usage<'a>(
        &'a self,
        _: &'a BTreeSet<String>,
    ) -> BoxFuture<'a, Vec<gantry_api::proto::PodUsage>> {
        Box::pin(async { Vec::new() })
    }
}

/// Another scheduler, whose cache is late: it binds every pod that is bound to a node of its own choice.
async fn second_scheduler(registry: Registry) {
    let mut known = BTreeSet::new();
    loop {
        tokio::time::sleep(Duration::from_millis(300)).await;
        let pods = registry.list::<Pod>(Some("default"));
        let nodes = registry.list::<Node>(None);
        let (Ok((_, pods)), Ok((_, nodes))) = (pods, nodes) else {
            continue;
        };
        for pod in pods {
            let (metadata, spec) = (pod.metadata, pod.spec.unwrap_or_default());
            let (uid, name) = metadata.uid.zip(metadata.name).unwrap_or_default();
            if spec.node_name.is_none() || !known.insert(uid.clone()) {
                continue;
            }
            let last = nodes.len().saturating_sub(1) as u64;
            let choice = with(|state| state.choices.between(0, last)) as usize;
            let Some(node) = nodes
                .get(choice)
                .and_then(|node| node.metadata.name.clone())
            else {
                continue;
            };
            let bound = registry.bind("default", &name, &uid, &node).await;
            if bound.is_ok() && spec.node_name.as_ref() != Some(&node) {
                trace(format!("the second scheduler has bound {name} to {node}"));
            }
        }
    }
}

/// Runs until its runtime is dropped.
pub async fn run(dir: PathBuf, tokens: Tokens, door: Door, has_second_scheduler: bool) {
    let store = loop {
        match Store::open_sealed(&dir.join(STORE_FILE), &dir.join("store.key")) {
            Ok(store) => break store,
            Err(_) if host::is_killed() => return,
            Err(error) if error.to_string().contains("No space") => {
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            Err(error) => return violated(format!("the store does not open: {error}")),
        }
    };
    if host::is_killed() {
        return;
    }
    trace(format!(
        "control: store open at revision {}",
        store.revision()
    ));
    tokio::spawn(history::follow(store.clone()));
    let settings = registry::Settings {
        service_cidr: "10.96.0.0/16".parse().expect("a prefix"),
        reserved_addresses: vec![(
            "10.96.0.10".parse().expect("an address"),
            "the resolver".to_owned(),
        )],
    };
    let registry = Registry::new(store.clone(), &settings);
    while let Err(status) = registry.ensure_defaults().await {
        trace(format!("control: no first objects: {status}"));
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    let settings = Settings {
        cluster_domain: "cluster.local".into(),
        dns_service_ip: "10.96.0.10".parse().expect("an address"),
        service_cidr: "10.96.0.0/16".parse().expect("a prefix"),
        cluster_cidr: "10.244.0.0/16".parse().expect("a prefix"),
        tokens,
    };
    let feed = Feed::new(registry.clone(), settings);
    let token = CancellationToken::new();
    let identity = Identity {
        user: "admin".into(),
        groups: vec![MASTERS_GROUP.into()],
        impersonated_by: None,
    };
    let identify = move |mut request: tonic::Request<()>| {
        request.extensions_mut().insert(identity.clone());
        Ok::<_, tonic::Status>(request)
    };
    let server = tonic::transport::Server::builder()
        .add_service(InterceptedService::new(feed.feed_server(), identify))
        .serve_with_incoming(UnboundedReceiverStream::new(wire::listen()));
    let (held, end) = Hold::of(&store);
    let settings = controllers::Settings {
        hold: held.clone(),
        ..Default::default()
    };
    let grace = settings.node_grace_period;
    tokio::spawn(hold::run(store.clone(), grace, end, token.clone()));
    let nothing: Arc<Nothing> = Arc::new(Nothing);
    let loops = controllers::run(
        registry.clone(),
        settings,
        nothing.clone(),
        nothing,
        token.clone(),
    );
    tokio::spawn(loops);
    let (own, stop) = (registry.clone(), token.clone());
    tokio::spawn(async move {
        held.over().await;
        scheduler::run(own, stop).await;
    });
    if has_second_scheduler {
        tokio::spawn(second_scheduler(registry.clone()));
    }
    let (own, stop) = (registry.clone(), token.clone());
    tokio::spawn(async move { own.run_maintenance(stop).await });
    let (own, stop) = (feed.clone(), token.clone());
    tokio::spawn(async move { own.run(stop).await });
    let inside = Some((registry, feed));
    *door.inside.lock().unwrap_or_else(PoisonError::into_inner) = inside;
    if let Err(error) = server.await {
        violated(format!("the server has ended: {error}"));
    }
}

/// What a user asks for. Done again until it is answered or the control plane dies.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Wish {
    /// The Deployment with so many replicas of this version, its Service and its Secret.
    Web { replicas: u64, version: u64 },
    /// The n-th oldest pod of it goes.
    Kill(u64),
    /// A pod that ends by itself after so many seconds.
    Task { number: u64, runs_for_s: u64 },
    /// It goes.
    Forget(u64),
    /// The Secret has another value.
    Secret(u64),
}

fn read<K: Resource>(value: Value) -> K {
    serde_json::from_value(value).expect("an object")
}

fn web(replicas: u64, version: u64) -> Deployment {
    read(json!({
        "metadata": {"name": "web", "namespace": "default"},
        "spec": {"replicas": replicas, "selector": {"matchLabels": {"app": "web"}},
            "template": {
                "metadata": {"labels": {"app": "web"},
                    "annotations": {"version": version.to_string()}},
                "spec": {"containers": [{"name": "c", "image": "x", "envFrom": [
                    {"secretRef": {"name": "settings"}}]}]}}},
    }))
}

fn secret(value: u64) -> Secret {
    read(json!({
        "metadata": {"name": "settings", "namespace": "default"},
        "stringData": {"value": value.to_string()},
    }))
}

/// Created, or updated if it is there.
async fn put<K>(registry: &Registry, object: &K) -> Result<(), Status>
where
    K: Resource,
{
    match registry.create(object).await {
        Err(status) if status.reason == Reason::AlreadyExists => {
            registry.update(object).await.map(drop)
        }
        other => other.map(drop),
    }
}

async fn grant(registry: &Registry, wish: &Wish) -> Result<(), Status> {
    let delete = DeleteOptions::default();
    match wish {
        Wish::Web { replicas, version } => {
            let service: Service = read(json!({
                "metadata": {"name": "web", "namespace": "default"},
                "spec": {"selector": {"app": "web"}, "ports": [{"port": 80}]},
            }));
            if registry.get::<Service>("default", "web")?.is_none() {
                put(registry, &secret(0)).await?;
                put(registry, &service).await?;
            }
            put(registry, &web(*replicas, *version)).await
        }
        Wish::Kill(number) => {
            let (_, pods) = registry.list::<Pod>(Some("default"))?;
            // One that a backup has brought back has ended for good: nothing of it is drained.
            let web = |pod: &&Pod| {
                let labels = pod.metadata.labels.as_ref();
                let is_web = labels.is_some_and(|labels| labels.contains_key("app"));
                is_web && !pod.status.as_ref().is_some_and(node::has_ended)
            };
            let mut pods: Vec<_> = pods.iter().filter(web).collect();
            pods.sort_by_key(|pod| pod.metadata.uid.clone());
            if pods.is_empty() {
                return Ok(());
            }
            let name = pods[*number as usize % pods.len()].metadata.name.clone();
            let name = name.unwrap_or_default();
            ignore_absent(registry.delete::<Pod>("default", &name, &delete).await)
        }
        Wish::Task { number, runs_for_s } => {
            let pod: Pod = read(json!({
                "metadata": {"name": format!("task-{number}"), "namespace": "default",
                    "annotations": {RUNS_FOR: runs_for_s.to_string()}},
                "spec": {"restartPolicy": "Never", "containers": [{"name": "c", "image": "x"}]},
            }));
            match registry.create(&pod).await {
                Err(status) if status.reason == Reason::AlreadyExists => Ok(()),
                other => other.map(drop),
            }
        }
        Wish::Forget(number) => {
            let name = format!("task-{number}");
            ignore_absent(registry.delete::<Pod>("default", &name, &delete).await)
        }
        Wish::Secret(value) => put(registry, &secret(*value)).await,
    }
}

fn ignore_absent(result: Result<(), Status>) -> Result<(), Status> {
    match result {
        Err(status) if status.reason == Reason::NotFound => Ok(()),
        other => other,
    }
}

/// Grants a wish as soon as the control plane is up and takes it.
pub async fn ask(door: Door, wish: Wish) {
    let _turn = door.queue.lock().await;
    loop {
        if let Some((registry, _)) = door.get() {
            match grant(&registry, &wish).await {
                Ok(()) if host::is_killed() => return,
                Ok(()) => {
                    // What was answered must be there for ever, so this revision too.
                    let rev = registry.store().revision();
                    with(|state| state.history.answered = state.history.answered.max(rev));
                    return trace(format!("user: {wish:?} granted"));
                }
                Err(status) => trace(format!("user: {wish:?}: {status}")),
            }
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

/// A backup of the store as it is now.
pub fn save(store: &Store, file: &Path) -> std::io::Result<()> {
    let (revision, entries) = store.list(BACKUP_PREFIX);
    let mut writer = Writer::in_clear(&Header {
        lineage_counter: store.lineage().counter,
        lineage_id: store.lineage().id.clone(),
        revision,
        taken: "now".to_owned(),
    });
    for entry in entries {
        writer.entry(&entry).map_err(std::io::Error::other)?;
    }
    let mut file = std::fs::File::create(file)?;
    file.write_all(&writer.finish().0)?;
    file.sync_all()
}

/// Puts it in the place of the store in `dir`, whose control plane is down.
pub fn restore(file: &Path, dir: &Path) {
    let key = dir.join("store.key");
    let keys = Keys {
        backup: key.clone(),
        store: key,
    };
    match gantry_control::store::restore(file, dir, &keys, |_| Ok(())) {
        Ok(restored) => trace(format!("restored at revision {}", restored.revision)),
        Err(error) => violated(format!("a backup cannot be restored: {error}")),
    }
}
