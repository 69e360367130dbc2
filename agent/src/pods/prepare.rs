//! A pod's sandbox, made and removed: cgroup, volumes, namespaces and network, shim, /etc files.
//!
//! Making runs side by side what does not depend on each other; every step is idempotent, so a try
//! that was cut short is simply tried again. Removing goes on after an error and returns them all.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use gantry_api::k8s_openapi::api::core::v1::{Pod, Secret};
use tokio::sync::watch;
use tokio::time::timeout;

use super::timeline::timed;
use super::worker::{Inputs, Message};
use super::{Node, launch};
use crate::cgroups::CgroupError;
use crate::cgroups::held::{Held, held};
use crate::cgroups::limits::{container_limits, pod_limits, qos_class};
use crate::dataplane::Bandwidth;
use crate::ids::{ContainerRun, PodUid};
use crate::images;
use crate::images::auth::{self, RegistryAuth};
use crate::network::{self, PodNetwork, PodNetworkSpec};
use crate::runtime::{ObservedSandbox, SandboxSpec};
use crate::user_namespaces::{Range, Ranges, idmap};
use crate::view::{BlobKey, Settings, View};
use crate::volumes::{self, ReadyVolumes, VolumeError};

/// How long a pod that is there already waits for its turn to be looked at.
const TURN_WAIT: Duration = Duration::from_secs(10);

/// Why something could not be made: Kubernetes' reason and the words for a person.
#[derive(Debug)]
pub struct Failure {
    /// `FailedMount`, `ErrImagePull`, `CreateContainerConfigError`...
    pub reason: &'static str,
    /// What happened, to what, why.
    pub message: String,
}

impl Failure {
    /// A failure with the error's own words.
    pub fn new(reason: &'static str, error: impl std::fmt::Display) -> Self {
        Self {
            reason,
            message: error.to_string(),
        }
    }
}

/// metadata.namespace and metadata.name.
pub fn names(pod: &Pod) -> (&str, &str) {
    let metadata = &pod.metadata;
    (
        metadata.namespace.as_deref().unwrap_or_default(),
        metadata.name.as_deref().unwrap_or_default(),
    )
}

/// The host name inside; the node's with host network.
pub fn hostname(node: &Node, pod: &Pod, settings: &Settings) -> String {
    if pod
        .spec
        .as_ref()
        .is_some_and(|s| s.host_network == Some(true))
    {
        return node.name.clone();
    }
    volumes::hosts::host_name(pod, settings)
}

/// Makes everything a container of this pod needs to exist in.
pub async fn sandbox(
    node: &Arc<Node>,
    uid: &PodUid,
    pod: &Pod,
    view: &watch::Receiver<Arc<View>>,
    inputs: &Inputs,
) -> Result<(PodNetwork, ReadyVolumes), Failure> {
    let view = view.borrow().clone();
    let (namespace, name) = names(pod);
    let host_network = pod
        .spec
        .as_ref()
        .is_some_and(|s| s.host_network == Some(true));
    let qos = qos_class(pod);
    let cgroup = node.cgroups.pod_path(uid, qos);
    let user_range = user_range(node, uid, pod)?;
    let network_spec = PodNetworkSpec {
        pod: uid.clone(),
        namespace: namespace.into(),
        name: name.into(),
        hostname: hostname(node, pod, &view.settings),
        host_network,
        user_range,
        bandwidth: Bandwidth::of(pod),
    };
    let sandbox_spec = SandboxSpec {
        pod: uid.clone(),
        title: format!("{namespace}/{name}"),
        cgroup,
        log_dir: node.paths.pod_log(namespace, name, uid),
    };
    let is_new = !node.paths.sandbox(uid).exists();
    let _turn = match is_new {
        true => None,
        // Without a turn after all this time (a volume that hangs holds one) it goes on as well.
        false => Some(timeout(TURN_WAIT, node.second_looks.acquire()).await),
    };
    check_limits(node, pod, is_new, inputs).await?;
    let ready_volumes = async {
        if pod.spec.as_ref().is_none_or(|s| s.host_ipc != Some(true)) {
            volumes::shm::ensure(uid, &node.paths).await?;
        }
        volumes(node, uid, pod, &view).await
    };
    let (
        (network, network_took),
        (volumes, volumes_took),
        (shim, shim_took),
        (limited, cgroup_took),
        (_, roots_took),
    ) = tokio::join!(
        timed(node.network.ensure(&network_spec)),
        timed(ready_volumes),
        timed(node.runtime.ensure_sandbox(&sandbox_spec)),
        timed(cgroups(node, uid, pod, is_new)),
        timed(launch::roots_in_advance(node, uid, pod, is_new)),
    );
    limited.map_err(|e| Failure::new("FailedCreatePodSandBox", e))?;
    let volumes = volumes.map_err(|e| Failure::new(e.reason(), e))?;
    let network = network.map_err(|e| Failure::new("FailedCreatePodSandBox", e))?;
    shim.map_err(|e| Failure::new("FailedCreatePodSandBox", e))?;
    write_etc(node, uid, pod, &network, &view)
        .await
        .map_err(|e| Failure::new("FailedCreatePodSandBox", format!("write /etc files: {e}")))?;
    if is_new {
        warn_of_dns(pod, &view, inputs).await;
    }
    for (phase, took) in [
        ("network", network_took),
        ("volumes", volumes_took),
        ("shim", shim_took),
        ("cgroup", cgroup_took),
        ("roots", roots_took),
    ] {
        let _ = inputs.send(Box::new(Message::Took(phase, took))).await;
    }
    Ok((network, volumes))
}

/// The pod's cgroup, and those of the containers that start first.
async fn cgroups(node: &Node, uid: &PodUid, pod: &Pod, is_new: bool) -> Result<(), CgroupError> {
    let (class, policy) = (qos_class(pod), node.cgroups.policy());
    let path = node
        .cgroups
        .ensure_pod(uid, class, &pod_limits(pod, policy))
        .await?;
    if is_new {
        let first = launch::starting_first(pod).iter();
        let limits = first.map(|c| (c.name.clone(), container_limits(pod, c, policy)));
        let limits = limits.collect();
        node.cgroups.containers_in_advance(&path, limits).await;
    }
    Ok(())
}

/// What of its resolver's configuration did not fit: told once.
async fn warn_of_dns(pod: &Pod, view: &View, inputs: &Inputs) {
    let Some(spec) = &pod.spec else { return };
    let node = network::node_resolv_conf();
    let namespace = names(pod).0;
    for words in network::resolv_conf_warnings(spec, namespace, &view.settings, &node) {
        let warning = Message::Warning("DNSConfigForming", words);
        let _ = inputs.send(Box::new(warning)).await;
    }
}

/// A pod whose limits this machine cannot hold is refused or, the first time, told.
async fn check_limits(
    node: &Node,
    pod: &Pod,
    is_new: bool,
    inputs: &Inputs,
) -> Result<(), Failure> {
    match held(pod, node.cgroups.policy(), node.cgroups.lacks()) {
        Held::All => {}
        Held::Refused(words) => return Err(Failure::new("LimitNotHeld", words)),
        Held::Not(words) if is_new => {
            let _ = inputs
                .send(Box::new(Message::Warning("LimitNotHeld", words)))
                .await;
        }
        Held::Not(_) => {}
    }
    Ok(())
}

/// `hostUsers: false`: the pod's own ids.
fn user_range(node: &Node, uid: &PodUid, pod: &Pod) -> Result<Option<Range>, Failure> {
    if pod.spec.as_ref().and_then(|s| s.host_users) != Some(false) {
        return Ok(None);
    }
    let range = Ranges::new(&node.paths.run).allocate(uid);
    range
        .map(Some)
        .map_err(|e| Failure::new("FailedCreatePodSandBox", e))
}

/// The pod's granted resources into the files of its cgroups, while it runs. Containers that do not
/// run, or are about to be started anew, get theirs at their start.
pub async fn write_limits(
    node: &Arc<Node>,
    uid: &PodUid,
    pod: &Pod,
    restarting: &[String],
) -> Result<(), String> {
    let (class, policy) = (qos_class(pod), *node.cgroups.policy());
    let whole = pod_limits(pod, &policy);
    let path = node.cgroups.pod_path(uid, class);
    if !node.cgroups.has_pod(uid) {
        return Ok(()); // the sandbox is made with them
    }
    let spec = pod.spec.iter();
    let containers = spec.flat_map(|s| s.init_containers.iter().flatten().chain(&s.containers));
    let mut limits = Vec::new();
    for container in containers.filter(|c| !restarting.contains(&c.name)) {
        let usage = node.cgroups.stats(&format!("{path}/{}", container.name));
        let Some(usage) = usage.map_err(|e| e.to_string())? else {
            continue;
        };
        let wanted = container_limits(pod, container, &policy);
        if let Some(limit) = wanted.memory_limit_bytes
            && limit < usage.memory_working_set_bytes
        {
            // The kernel would kill it; a resize is not meant to.
            return Err(format!(
                "container {}: memory limit {limit} is below what it uses, {} bytes; it is tried again",
                container.name, usage.memory_working_set_bytes
            ));
        }
        limits.push((container.name.clone(), wanted));
    }
    // v1 refuses a child more CPU than its parent: a pod that grows goes first, one that shrinks last.
    let first = node.cgroups.ensure_pod(uid, class, &whole).await;
    for (name, limits) in &limits {
        let written = node.cgroups.ensure_container(&path, name, limits).await;
        written.map_err(|e| e.to_string())?;
    }
    if first.is_err() {
        let again = node.cgroups.ensure_pod(uid, class, &whole).await;
        again.map_err(|e| e.to_string())?;
    }
    Ok(())
}

async fn volumes(
    node: &Node,
    uid: &PodUid,
    pod: &Pod,
    view: &View,
) -> Result<ReadyVolumes, VolumeError> {
    let mut ready = volumes::ensure(pod, &view.blobs, &node.paths, node.tokens.as_ref()).await?;
    let credentials = credentials(pod, view);
    let remote = volumes::remote::ensure(pod, uid, &view.blobs, &node.paths, &node.csi);
    // Boxed: calls to drivers take room in the future of every pod, and few pods make them.
    ready.extend(Box::pin(remote).await?);
    let images = volumes::image::ensure(pod, uid, &node.paths, &node.images, &credentials);
    ready.extend(images.await?);
    Ok(ready)
}

/// The registries' credentials that the pod names; an unreadable Secret is none.
pub fn credentials(pod: &Pod, view: &View) -> Vec<RegistryAuth> {
    let (namespace, pod_name) = names(pod);
    let secrets = pod
        .spec
        .iter()
        .flat_map(|s| s.image_pull_secrets.iter().flatten());
    let mut found = Vec::new();
    for reference in secrets {
        let key = BlobKey {
            plural: "secrets".into(),
            namespace: namespace.into(),
            name: reference.name.clone(),
        };
        let Some(value) = view.blobs.get(&key) else {
            continue;
        };
        let parsed = serde_json::from_value::<Secret>(value.as_ref().clone())
            .map_err(|e| e.to_string())
            .and_then(|secret| auth::from_secret(&secret));
        match parsed {
            Ok(credentials) => found.extend(credentials),
            // The words name the Secret, never its content.
            Err(words) => tracing::warn!(namespace, pod_name, "imagePullSecrets: {words}"),
        }
    }
    found
}

/// The directory of the pod's own /etc/hosts, /etc/hostname and /etc/resolv.conf.
pub fn etc(node: &Node, uid: &PodUid) -> PathBuf {
    node.paths.pod_lib(uid).join("etc")
}

async fn write_etc(
    node: &Node,
    uid: &PodUid,
    pod: &Pod,
    network: &PodNetwork,
    view: &View,
) -> std::io::Result<()> {
    let directory = etc(node, uid);
    let host_name = hostname(node, pod, &view.settings);
    let spec = pod.spec.clone().unwrap_or_default();
    let resolv = network::resolv_conf(
        &spec,
        names(pod).0,
        &view.settings,
        &network::node_resolv_conf(),
    );
    let logs = node.paths.pod_log(names(pod).0, names(pod).1, uid);
    let hosts = volumes::hosts::etc_hosts(pod, &network.addresses, &host_name, &view.settings);
    tokio::task::spawn_blocking(move || {
        std::fs::create_dir_all(&directory)?;
        std::fs::create_dir_all(&logs)?;
        write_if_changed(&logs.join(OWNER_MARK), "")?;
        write_if_changed(&directory.join("resolv.conf"), &resolv)?;
        write_if_changed(&directory.join("hosts"), &hosts)?;
        write_if_changed(&directory.join("hostname"), &format!("{host_name}\n"))
    })
    .await
    .map_err(std::io::Error::other)?
}

/// In place: a bind mount of the file must go on showing it.
fn write_if_changed(path: &Path, text: &str) -> std::io::Result<()> {
    match std::fs::read_to_string(path) {
        Ok(old) if old == text => Ok(()),
        _ => std::fs::write(path, text),
    }
}

/// Removes what [`sandbox`] and `launch` made: containers first, then what they stood on.
pub async fn tear_down(
    node: &Arc<Node>,
    uid: &PodUid,
    pod: &Pod,
    runs: &[ContainerRun],
) -> Result<(), String> {
    let mut errors = Vec::new();
    for run in runs {
        end_exemption(node, pod, run);
        if let Err(error) = node.runtime.remove_container(run).await {
            errors.push(format!("container {}: {error}", run.name));
        }
    }
    remove_rest(node, uid, &mut errors).await;
    if errors.is_empty() {
        Ok(())
    } else {
        Err(errors.join("; "))
    }
}

/// Before a container's cgroup goes: an entry for a cgroup that is gone would never be found again.
pub fn end_exemption(node: &Node, pod: &Pod, run: &ContainerRun) {
    let Some(guard) = &node.device_guard else {
        return;
    };
    let cgroup = guard.cgroup(&node.cgroups.pod_path(&run.pod, qos_class(pod)), &run.name);
    if let Err(error) = guard.dataplane.end_device_exemption(&cgroup) {
        tracing::warn!(%run, %error, "end the exemption from the device rules");
    }
}

async fn remove_rest(node: &Arc<Node>, uid: &PodUid, errors: &mut Vec<String>) {
    if let Err(error) = node.runtime.remove_sandbox(uid).await {
        errors.push(format!("sandbox: {error}"));
    }
    if let Err(error) = node.network.remove(uid).await {
        errors.push(format!("network: {error}"));
    }
    if let Err(error) = idmap::remove(&idmap::directory(&node.paths.run, uid)) {
        errors.push(error.to_string());
    }
    // The runtime leaves the directory to the namespaces' pins, which were the last in it. Best
    // effort: an empty directory on tmpfs that stays is found again at the next start.
    let _ = std::fs::remove_dir(node.paths.sandbox(uid));
    for layers in layer_directories(&node.paths.pod_lib(uid).join("containers")) {
        if let Err(error) = images::remove_rootfs(&layers).await {
            errors.push(format!("root file system: {error}"));
        }
    }
    if let Err(error) = volumes::remove(uid, &node.paths, &node.csi).await {
        errors.push(format!("volumes: {error}"));
    }
    if let Err(error) = node.cgroups.remove_pod(uid).await {
        errors.push(format!("cgroup: {error}"));
    }
    // Last, and only when nothing of the pod is left that has these ids.
    if errors.is_empty()
        && let Err(error) = Ranges::new(&node.paths.run).release(uid)
    {
        errors.push(format!("id range: {error}"));
    }
}

/// `containers/<name>/<attempt>`: every run's layers, whatever the state knows of them.
fn layer_directories(containers: &Path) -> Vec<PathBuf> {
    let children = |path: &Path| -> Vec<PathBuf> {
        std::fs::read_dir(path)
            .map(|entries| entries.flatten().map(|e| e.path()).collect())
            .unwrap_or_default()
    };
    children(containers)
        .iter()
        .flat_map(|container| children(container))
        .collect()
}

fn remove_files(path: &Path) -> std::io::Result<()> {
    match std::fs::remove_dir_all(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// The object is gone: its logs and files go too.
pub async fn forget(node: &Arc<Node>, uid: &PodUid, pod: &Pod) {
    let (namespace, name) = names(pod);
    let logs = node.paths.pod_log(namespace, name, uid);
    let removed = tokio::task::spawn_blocking(move || remove_files(&logs)).await;
    if let Ok(Err(error)) = removed {
        tracing::warn!(pod = %uid, %error, "remove logs");
    }
}

/// A sandbox of which no object is known.
pub async fn remove_unknown(
    node: &Arc<Node>,
    uid: &PodUid,
    sandbox: &ObservedSandbox,
) -> Result<(), String> {
    let mut errors = Vec::new();
    for container in &sandbox.containers {
        if container.exit.is_none()
            && let Err(error) = node.runtime.kill_container(&container.run).await
        {
            errors.push(format!("container {}: {error}", container.run.name));
        }
    }
    remove_rest(node, uid, &mut errors).await;
    if errors.is_empty() {
        Ok(())
    } else {
        Err(errors.join("; "))
    }
}

/// Between two tries to remove what is left of an unknown pod: the first, doubling to the last.
const AGAIN: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(64));

/// Tries until nothing is left of the pod, or it is known: a driver that has its volumes may come
/// later than the agent.
async fn remove_in_time(node: Arc<Node>, uid: PodUid, view: watch::Receiver<Arc<View>>) {
    let (mut wait, last) = AGAIN;
    let mut drivers = node.csi.arrivals();
    loop {
        tokio::select! {
            // Cancel-safe: both only wait. Drivers stay as long as the node.
            () = tokio::time::sleep(wait) => {}
            Ok(()) = drivers.changed() => {}
        }
        if view.borrow().pods.contains_key(&uid) {
            return; // its worker removes it
        }
        let mut errors = Vec::new();
        remove_rest(&node, &uid, &mut errors).await;
        if errors.is_empty() {
            return;
        }
        wait = (wait * 2).min(last);
        tracing::warn!(pod = %uid, "files of an unknown pod: {}", errors.join("; "));
    }
}

/// Files of pods that are not known any more: below `/var/lib/gantry/pods`, and their logs.
pub async fn sweep_files(
    node: &Arc<Node>,
    live: &HashSet<PodUid>,
    view: &watch::Receiver<Arc<View>>,
) {
    let pods = node.paths.lib.join("pods");
    let directories_of = directories(&pods);
    let with_files = directories_of.iter().filter_map(|n| PodUid::new(n).ok());
    let with_range = Ranges::new(&node.paths.run).pods().unwrap_or_default();
    let found: HashSet<PodUid> = with_files.chain(with_range).collect();
    for uid in found {
        if live.contains(&uid) {
            continue;
        }
        let mut errors = Vec::new();
        remove_rest(node, &uid, &mut errors).await;
        if !errors.is_empty() {
            tracing::warn!(pod = %uid, "files of an unknown pod: {}", errors.join("; "));
            tokio::spawn(remove_in_time(node.clone(), uid, view.clone()));
        }
    }
    for uid in super::records::known(&node.paths)
        .iter()
        .filter(|uid| !live.contains(uid))
    {
        super::records::remove(&node.paths, uid);
    }
    for name in directories(&node.paths.log) {
        // <namespace>_<name>_<uid>; others' directories there are not ours to touch.
        let Some((_, uid)) = name.rsplit_once('_') else {
            continue;
        };
        let gone = PodUid::new(uid).is_ok_and(|uid| !live.contains(&uid));
        let ours = node.paths.log.join(&name).join(OWNER_MARK).exists();
        if gone && ours {
            let _ = remove_files(&node.paths.log.join(&name));
        }
    }
}

/// A file in each log directory of ours, so that nobody else's is removed.
pub const OWNER_MARK: &str = ".gantry";

fn directories(path: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(path) else {
        return Vec::new();
    };
    entries
        .flatten()
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .collect()
}
