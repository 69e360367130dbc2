//! One container, from its image to a running process.
//!
//! image ─► root file system (overlay) ─► who it runs as ─► environment ─► OCI spec ─► runtime

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Instant, SystemTime};

use anyhow::Context;
use gantry_api::k8s_openapi::api::core::v1::{Container, Pod};

use super::prepare::{Failure, credentials, etc, hostname, names};
use super::timeline::timed;
use super::worker::{Inputs, Message};
use super::{Node, configs, processes, termination};
use crate::cgroups::limits::{container_limits, qos_class};
use crate::devices::plan::Grant;
use crate::ids::{ContainerRun, PodUid};
use crate::images::{self, Image, MountPoints, Progress, PullPolicy, mount_points as places};
use crate::network::PodNetwork;
use crate::paths::Paths;
use crate::runtime::spec::{
    self, GivenDevices, Namespaces, PodFiles, SpecInput, app_armor, identity,
};
use crate::runtime::{ContainerSpec, RuntimeError, logs};
use crate::user_namespaces::idmap;
use crate::view::View;
use crate::volumes::{ReadyVolume, ReadyVolumes, env, shm, sub_path};

/// SIGTERM, unless the image says otherwise.
const SIGTERM: i32 = 15;

/// What a start is made of.
pub struct Job {
    /// The node's parts.
    pub node: Arc<Node>,
    /// Which run.
    pub run: ContainerRun,
    /// The pod.
    pub pod: Arc<Pod>,
    /// Its network.
    pub network: PodNetwork,
    /// Its volumes.
    pub volumes: Arc<ReadyVolumes>,
    /// For ConfigMaps, Secrets and Services.
    pub view: Arc<View>,
    /// Durations of phases go here.
    pub inputs: Inputs,
    /// For the pod's first process.
    pub turn: processes::Turn,
    /// The run whose processes this one is to see, when it has a target.
    pub target: Option<ContainerRun>,
}

/// Starts the container; returns when it was started, and the image's id.
pub async fn container(job: Job) -> Result<(SystemTime, String), Failure> {
    let config = configs::find(&job.pod, &job.run.name)
        .ok_or_else(|| Failure::new("CreateContainerConfigError", "no such container"))?
        .into_owned();
    let (image, took) = timed(image(&job, &config)).await;
    let image = image?;
    let _ = job
        .inputs
        .send(Box::new(Message::Took("image", took)))
        .await;
    clean_before(&job).await;
    let layers = job.node.paths.container_layers(&job.run);
    let (rootfs, took) = timed(job.node.images.mount_rootfs(
        &image,
        &layers,
        job.network.userns.as_ref(),
        mount_points(&config),
    ))
    .await;
    let rootfs = rootfs.map_err(|e| Failure::new("CreateContainerError", e))?;
    let _ = job
        .inputs
        .send(Box::new(Message::Took("rootfs", took)))
        .await;
    limit(&job, &config).await?;
    let grant = super::devices::grant(&job, &config).await?;
    let pid_namespace = processes::namespace_of(
        &job.node,
        &job.pod,
        &job.run,
        &job.network,
        &job.turn,
        job.target.clone(),
    )
    .await?;
    let pid_path = pid_namespace.as_ref().map(processes::PidNamespace::path);
    let spec = tokio::task::spawn_blocking({
        let (image, rootfs) = (image.clone(), rootfs.clone());
        let job_parts = SpecParts::of(&job);
        move || job_parts.build(&config, &image, &rootfs, pid_path.as_deref(), &grant)
    })
    .await
    .map_err(|e| Failure::new("CreateContainerError", e))??;
    let (started, took) = timed(job.node.runtime.start_container(&spec)).await;
    let at = started.map_err(|error| match error {
        RuntimeError::Container(words) => Failure::new("RunContainerError", words),
        other => Failure::new("CreateContainerError", other),
    })?;
    let _ = job
        .inputs
        .send(Box::new(Message::Took("create", took)))
        .await;
    Ok((at, image.image_id()))
}

/// The containers that start as soon as there is a sandbox.
pub fn starting_first(pod: &Pod) -> &[Container] {
    let Some(spec) = &pod.spec else { return &[] };
    match spec.init_containers.as_deref() {
        Some([first, ..]) => std::slice::from_ref(first),
        _ => &spec.containers,
    }
}

/// What this container has mounted on the image.
fn mount_points(container: &Container) -> MountPoints {
    let mut mounts = container.volume_mounts.iter().flatten();
    match mounts.any(|m| m.mount_path == places::TOKEN) {
        true => MountPoints::ContainerWithToken,
        false => MountPoints::Container,
    }
}

/// Mounts the root file systems of the containers that start first, beside the sandbox: they need
/// nothing of it. Only what takes no network; [`container`] makes whatever is not there, and tells
/// the errors.
pub async fn roots_in_advance(node: &Arc<Node>, uid: &PodUid, pod: &Pod, is_new: bool) {
    let Some(spec) = pod.spec.as_ref().filter(|_| is_new) else {
        return;
    };
    if spec.host_users == Some(false) {
        return; // its root file systems are mapped to the pod's ids
    }
    let mount = |config: &Container| {
        let reference = config.image.clone().unwrap_or_default();
        let policy = PullPolicy::of(config.image_pull_policy.as_deref(), &reference);
        let run = ContainerRun {
            pod: uid.clone(),
            name: config.name.clone(),
            attempt: 0,
        };
        let below = mount_points(config);
        async move {
            // The registry may name another image: not to be guessed.
            if policy == PullPolicy::Always {
                return;
            }
            if let Ok(image) = node.images.ensure(&reference, PullPolicy::Never, &[]).await {
                let layers = node.paths.container_layers(&run);
                let _ = node.images.mount_rootfs(&image, &layers, None, below).await;
            }
        }
    };
    futures_util::future::join_all(starting_first(pod).iter().map(mount)).await;
}

/// Makes the container's cgroup with all its limits before there is a process to limit.
async fn limit(job: &Job, config: &Container) -> Result<(), Failure> {
    let cgroups = &job.node.cgroups;
    let pod_path = cgroups.pod_path(&job.run.pod, qos_class(&job.pod));
    let limits = container_limits(&job.pod, config, cgroups.policy());
    cgroups
        .ensure_container(&pod_path, &config.name, &limits)
        .await
        .map(drop)
        .map_err(|e| Failure::new("CreateContainerError", e))
}

async fn image(job: &Job, config: &Container) -> Result<Arc<Image>, Failure> {
    let reference = config.image.as_deref().unwrap_or_default();
    let policy = PullPolicy::of(config.image_pull_policy.as_deref(), reference);
    let credentials = credentials(&job.pod, &job.view);
    let began = Instant::now();
    let pulling = AtomicBool::new(false);
    let watch = |_: Progress| {
        if !pulling.swap(true, Ordering::Relaxed) {
            let words = format!("Pulling image {reference:?}");
            // A worker with a full inbox has more urgent things to tell.
            let _ = job
                .inputs
                .try_send(Box::new(Message::Event("Pulling", words)));
        }
    };
    let image = job
        .node
        .images
        .ensure_watched(reference, policy, &credentials, &watch)
        .await
        .map_err(|error| Failure {
            reason: error.reason(),
            message: error.to_string(),
        })?;
    if pulling.into_inner() {
        let words = format!(
            "Successfully pulled image {reference:?} in {:.3}s. Image size: {} bytes.",
            began.elapsed().as_secs_f64(),
            image.size_bytes
        );
        let _ = job
            .inputs
            .send(Box::new(Message::Event("Pulled", words)))
            .await;
    }
    Ok(image)
}

/// Runs before this one are over: their layers and records go (a run shares its cgroup's name with
/// the next one), and all logs but the last run's.
async fn clean_before(job: &Job) {
    let (namespace, name) = names(&job.pod);
    let pod_log = job.node.paths.pod_log(namespace, name, &job.run.pod);
    for attempt in job.run.attempt.saturating_sub(3)..job.run.attempt {
        let run = ContainerRun {
            attempt,
            ..job.run.clone()
        };
        super::prepare::end_exemption(&job.node, &job.pod, &run);
        if let Err(error) = job.node.runtime.remove_container(&run).await {
            tracing::warn!(%run, %error, "remove the records of an earlier run");
        }
        let layers = job.node.paths.container_layers(&run);
        if layers.exists()
            && let Err(error) = images::remove_rootfs(&layers).await
        {
            tracing::warn!(%run, %error, "remove the layers of an earlier run");
        }
        if attempt + 1 < job.run.attempt {
            let _ = logs::files::remove_all(&Paths::container_log(&pod_log, &run));
        }
    }
}

/// What building the spec needs, owned: it reads the image's files on a blocking thread.
struct SpecParts {
    node: Arc<Node>,
    run: ContainerRun,
    pod: Arc<Pod>,
    network: PodNetwork,
    volumes: Arc<ReadyVolumes>,
    view: Arc<View>,
}

impl SpecParts {
    fn of(job: &Job) -> Self {
        Self {
            node: job.node.clone(),
            run: job.run.clone(),
            pod: job.pod.clone(),
            network: job.network.clone(),
            volumes: job.volumes.clone(),
            view: job.view.clone(),
        }
    }

    fn build(
        &self,
        config: &Container,
        image: &Image,
        rootfs: &std::path::Path,
        pid_namespace: Option<&std::path::Path>,
        grant: &Grant,
    ) -> Result<ContainerSpec, Failure> {
        let config_error = |e: &dyn std::fmt::Display| Failure {
            reason: "CreateContainerConfigError",
            message: e.to_string(),
        };
        let identity = identity::resolve(&self.pod, config, &image.config, rootfs)
            .map_err(|e| config_error(&e))?;
        let app_armor = app_armor::decide(
            &app_armor::wanted(&self.pod, config),
            spec::privileged(config),
            &app_armor::Node::look(),
        )
        .map_err(|e| config_error(&e))?;
        let own = self.env(config).map_err(|e| config_error(&e))?;
        let env: Vec<(String, String)> = grant.env.clone().into_iter().chain(own).collect();
        let devices = super::devices::look_up(grant).map_err(|e| config_error(&e))?;
        // Written before it is shown: a run's termination log is new each time.
        self.termination_log().map_err(|e| config_error(&e))?;
        let (etc, volumes) = self.with_pod_ids(config).map_err(|e| config_error(&e))?;
        let (hosts, host_file, resolv) = (
            etc.join("hosts"),
            etc.join("hostname"),
            etc.join("resolv.conf"),
        );
        let termination_log = termination::file(&etc, &self.run);
        let host_name = hostname(&self.node, &self.pod, &self.view.settings);
        let spec = self.pod.spec.clone().unwrap_or_default();
        let shm = match spec.host_ipc {
            Some(true) => std::path::PathBuf::from("/dev/shm"),
            _ => shm::directory(&self.run.pod, &self.node.paths),
        };
        let cgroup = self
            .node
            .cgroups
            .pod_path(&self.run.pod, qos_class(&self.pod));
        let sub_paths = self.node.paths.volume_sub_paths(&self.run.pod);
        let input = SpecInput {
            pod: &self.pod,
            container: config,
            image: &image.config,
            rootfs,
            identity: &identity,
            env: &env,
            hostname: &host_name,
            volumes: &volumes,
            mount_sub_path: &|part| sub_path::mount(&sub_paths, part),
            files: PodFiles {
                hosts: Some(&hosts),
                hostname: Some(&host_file),
                resolv_conf: Some(&resolv),
                termination_log: Some(&termination_log),
                shm: Some(&shm),
            },
            namespaces: Namespaces {
                net: self.network.netns.as_deref(),
                ipc: (spec.host_ipc != Some(true)).then_some(self.network.ipcns.as_path()),
                uts: self.network.utsns.as_deref(),
                user: self.network.userns.as_ref(),
                pid: pid_namespace,
            },
            pod_cgroup: &cgroup,
            host: &self.node.host,
            devices: &devices,
            app_armor: app_armor.as_deref(),
        };
        let oci = spec::build(&input).map_err(|e| config_error(&e))?;
        self.open_devices(config, &cgroup, &devices)
            .map_err(|e| Failure::new("CreateContainerError", format!("{e:#}")))?;
        let (namespace, name) = names(&self.pod);
        let pod_log = self.node.paths.pod_log(namespace, name, &self.run.pod);
        Ok(ContainerSpec {
            run: self.run.clone(),
            oci,
            seccomp: spec::seccomp_of(&self.pod, config),
            allow_privilege_escalation: spec::allows_privilege_escalation(config),
            log_path: Paths::container_log(&pod_log, &self.run),
            stdin: config.stdin.unwrap_or(false),
            stdin_once: config.stdin_once.unwrap_or(false),
            tty: config.tty.unwrap_or(false),
        })
    }

    /// A privileged container opens any device, others what they were given: the cgroup is made
    /// here, so that the rules are there before its first process. libcontainer joins a cgroup that
    /// exists.
    fn open_devices(
        &self,
        config: &Container,
        pod_cgroup: &str,
        devices: &GivenDevices,
    ) -> anyhow::Result<()> {
        let privileged = config.security_context.as_ref().and_then(|c| c.privileged);
        let Some(guard) = &self.node.device_guard else {
            return Ok(());
        };
        if privileged != Some(true) && devices.nodes.is_empty() {
            return Ok(());
        }
        let cgroup = guard.cgroup(pod_cgroup, &config.name);
        std::fs::create_dir_all(&cgroup).with_context(|| format!("create {}", cgroup.display()))?;
        if privileged == Some(true) {
            return Ok(guard.dataplane.exempt_devices(&cgroup)?);
        }
        let rules = super::devices::rules(devices);
        Ok(guard.dataplane.allow_devices(&cgroup, &rules)?)
    }

    /// The container's own variables and those of the namespace's Services.
    fn env(&self, config: &Container) -> Result<Vec<(String, String)>, env::EnvError> {
        env::resolve(&env::EnvInput {
            container: config,
            pod: &self.pod,
            blobs: &self.view.blobs,
            services: &self.view.services,
            pod_addresses: &self.network.addresses,
            host_addresses: &self.node.host_addresses,
            node_name: &self.node.name,
        })
    }

    /// An empty file of this run that becomes `terminationMessagePath`.
    fn termination_log(&self) -> std::io::Result<()> {
        let path = termination::file(&etc(&self.node, &self.run.pod), &self.run);
        std::fs::create_dir_all(path.parent().unwrap_or(&path))?;
        std::fs::File::create(&path).map(drop)
    }

    /// The pod's files and the volumes that this container mounts, as its user namespace shows
    /// them; with the host's users, where they are.
    fn with_pod_ids(
        &self,
        config: &Container,
    ) -> Result<(std::path::PathBuf, ReadyVolumes), idmap::IdmapError> {
        let etc = etc(&self.node, &self.run.pod);
        let Some(user) = &self.network.userns else {
            return Ok((etc, ReadyVolumes::clone(&self.volumes)));
        };
        let directory = idmap::directory(&self.node.paths.run, &self.run.pod);
        let show =
            |source: &std::path::Path, place: &str| idmap::ensure(source, &directory, place, user);
        let mounted: BTreeSet<&str> = config
            .volume_mounts
            .iter()
            .flatten()
            .map(|m| m.name.as_str())
            .collect();
        let mut volumes = ReadyVolumes::new();
        for (name, volume) in self.volumes.iter() {
            if mounted.contains(name.as_str()) {
                let path = show(&volume.path, &format!("volume-{name}"))?;
                let access = volume.access;
                volumes.insert(name.clone(), ReadyVolume { path, access });
            }
        }
        Ok((show(&etc, "etc")?, volumes))
    }
}

/// The image's stop signal; it is here, since a container of it runs.
pub async fn stop_signal(node: &Arc<Node>, image: Option<&str>) -> i32 {
    let Some(reference) = image else {
        return SIGTERM;
    };
    let Ok(image) = node.images.ensure(reference, PullPolicy::Never, &[]).await else {
        return SIGTERM;
    };
    let named = image
        .config
        .config()
        .as_ref()
        .and_then(|c| c.stop_signal().clone());
    named
        .and_then(|name| signal_number(&name))
        .unwrap_or(SIGTERM)
}

/// `SIGQUIT`, `QUIT` or `3`.
pub fn signal_number(name: &str) -> Option<i32> {
    if let Ok(number) = name.parse::<i32>() {
        return (1..=64).contains(&number).then_some(number);
    }
    let full = if name.starts_with("SIG") {
        name.to_owned()
    } else {
        format!("SIG{name}")
    };
    full.parse::<nix::sys::signal::Signal>()
        .ok()
        .map(|signal| signal as i32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stop_signals_have_three_spellings() {
        assert_eq!(signal_number("SIGQUIT"), Some(3));
        assert_eq!(signal_number("QUIT"), Some(3));
        assert_eq!(signal_number("3"), Some(3));
        assert_eq!(signal_number("SIGNOPE"), None);
        assert_eq!(signal_number("0"), None);
    }
}
