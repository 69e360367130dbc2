//! Volumes of a pod: made before its containers start, kept current while it runs, removed with it.
//!
//! ```text
//! <lib>/pods/<uid>/volumes/ ─┬─ kubernetes.io~empty-dir/<name>     directory, or tmpfs
//!                            ├─ kubernetes.io~configmap/<name>     ..data ─► ..2026_.../   (atomic switch)
//!                            ├─ kubernetes.io~secret/<name>        the same on tmpfs: never on a disk
//!                            ├─ kubernetes.io~downward-api/<name>
//!                            └─ kubernetes.io~projected/<name>     tmpfs: may hold secrets
//! hostPath: the host's own path, checked
//! ```
//! [`ensure`] is idempotent and is called again when a ConfigMap or Secret changed: a reader sees
//! the old files or the new ones, never a mixture. [`remove`] unmounts first, follows no symlink,
//! enters no mount, and takes directories of any depth (a container may have made them).
//!
//! Also here, because they read the same objects: environment variables ([`env`]) and `/etc/hosts`
//! ([`hosts`]).

mod atomic;
mod config_map;
mod downward_api;
mod empty_dir;
pub mod env;
mod field;
mod host_path;
pub mod hosts;
mod payload;
mod projected;
mod secret;
mod tmpfs;
pub(crate) mod tree;

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use gantry_api::k8s_openapi::api::core::v1::{Pod, Volume};
use serde_json::Value;

use crate::ids::PodUid;
use crate::paths::Paths;
use crate::view::BlobKey;

/// The ConfigMaps and Secrets this node knows.
pub type Blobs = BTreeMap<BlobKey, Arc<Value>>;

/// Why a volume is not ready.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// Something it needs does not exist yet: the pod waits, nothing is broken.
    #[error("{0}")]
    Waiting(String),
    /// The pod asks for what cannot be (a host path of another type, a path with `..`).
    #[error("volume {volume:?}: {reason}")]
    Invalid {
        /// spec.volumes[].name
        volume: String,
        /// What is wrong.
        reason: String,
    },
    /// A kind that this node does not offer.
    #[error("volume {volume:?}: {kind} is not supported")]
    Unsupported {
        /// spec.volumes[].name
        volume: String,
        /// The source's field name.
        kind: String,
    },
    /// A system call failed.
    #[error("{context}: {source}")]
    Io {
        /// What was being done, to which path.
        context: String,
        /// The error of the call.
        source: io::Error,
    },
}

impl VolumeError {
    fn io(context: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let context = context.into();
        move |source| Self::Io { context, source }
    }
}

/// What every kind gets.
struct Context<'a> {
    pod: &'a Pod,
    namespace: &'a str,
    blobs: &'a Blobs,
    /// `<lib>/pods/<uid>/volumes`
    root: &'a Path,
    /// spec.securityContext.fsGroup: group of the files, as the kubelet does it.
    fs_group: Option<u32>,
}

impl Context<'_> {
    /// `<root>/kubernetes.io~<plugin>/<name>`; a volume name is a DNS label, so it is one component.
    fn directory(&self, plugin: &str, volume: &Volume) -> Result<PathBuf, VolumeError> {
        let name = volume.name.as_str();
        let label = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        if name.is_empty() || name.len() > 63 || !name.bytes().all(label) {
            return Err(VolumeError::Invalid {
                volume: name.to_owned(),
                reason: "its name is no DNS label".to_owned(),
            });
        }
        Ok(self.root.join(format!("kubernetes.io~{plugin}")).join(name))
    }
}

/// Makes or updates every volume of the pod. Returns where each one is on this host.
///
/// # Errors
/// The first volume that is not ready; those before it are. Call again: nothing is redone.
pub async fn ensure(
    pod: &Pod,
    blobs: &Blobs,
    paths: &Paths,
) -> Result<BTreeMap<String, PathBuf>, VolumeError> {
    let (pod, blobs, paths) = (pod.clone(), needed(pod, blobs), paths.clone());
    blocking(move || ensure_blocking(&pod, &blobs, &paths)).await
}

/// Unmounts and deletes everything below the pod's directory. Idempotent.
pub async fn remove(uid: &PodUid, paths: &Paths) -> Result<(), VolumeError> {
    let directory = paths.pod_lib(uid);
    blocking(move || {
        tmpfs::unmount_below(&directory)?;
        tree::remove(&directory).map_err(VolumeError::io(format!("remove {}", directory.display())))
    })
    .await
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, VolumeError> + Send + 'static,
) -> Result<T, VolumeError> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|e| Err(VolumeError::io("volume task")(io::Error::other(e))))
}

/// The pod's namespace only: cheap, the objects themselves are shared.
fn needed(pod: &Pod, blobs: &Blobs) -> Blobs {
    let namespace = pod.metadata.namespace.as_deref().unwrap_or("default");
    let own = blobs.iter().filter(|(key, _)| key.namespace == namespace);
    own.map(|(key, value)| (key.clone(), Arc::clone(value)))
        .collect()
}

fn ensure_blocking(
    pod: &Pod,
    blobs: &Blobs,
    paths: &Paths,
) -> Result<BTreeMap<String, PathBuf>, VolumeError> {
    let uid = pod.metadata.uid.as_deref().unwrap_or("");
    let uid = PodUid::new(uid).map_err(|e| VolumeError::io("pod")(io::Error::other(e)))?;
    let spec = pod.spec.as_ref();
    let security = spec.and_then(|s| s.security_context.as_ref());
    let context = Context {
        pod,
        namespace: pod.metadata.namespace.as_deref().unwrap_or("default"),
        blobs,
        root: &paths.pod_lib(&uid).join("volumes"),
        fs_group: security
            .and_then(|s| s.fs_group)
            .and_then(|g| u32::try_from(g).ok()),
    };
    let mut ready = BTreeMap::new();
    for volume in spec.and_then(|s| s.volumes.as_ref()).into_iter().flatten() {
        ready.insert(volume.name.clone(), ensure_volume(&context, volume)?);
    }
    Ok(ready)
}

fn ensure_volume(context: &Context<'_>, volume: &Volume) -> Result<PathBuf, VolumeError> {
    if let Some(source) = &volume.empty_dir {
        empty_dir::ensure(context, volume, source)
    } else if let Some(source) = &volume.config_map {
        config_map::ensure(context, volume, source)
    } else if let Some(source) = &volume.secret {
        secret::ensure(context, volume, source)
    } else if let Some(source) = &volume.host_path {
        host_path::ensure(volume, source)
    } else if let Some(source) = &volume.downward_api {
        downward_api::ensure(context, volume, source)
    } else if let Some(source) = &volume.projected {
        projected::ensure(context, volume, source)
    } else {
        // The name of whatever source is set: the one key besides the volume's name.
        let value = serde_json::to_value(volume).unwrap_or_default();
        let kind = value
            .as_object()
            .and_then(|o| o.keys().find(|k| *k != "name").cloned());
        match kind {
            Some(kind) => Err(VolumeError::Unsupported {
                volume: volume.name.clone(),
                kind,
            }),
            // No source at all: Kubernetes makes it an emptyDir.
            None => empty_dir::ensure(context, volume, &Default::default()),
        }
    }
}

#[cfg(test)]
mod tests;
