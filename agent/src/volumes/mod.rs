//! Volumes of a pod: made before its containers start, kept current while it runs, removed with it.
//!
//! ```text
//! <lib>/pods/<uid>/volumes/ ─┬─ kubernetes.io~empty-dir/<name>     directory, or tmpfs
//!                            ├─ kubernetes.io~configmap/<name>     ..data ─► ..2026_.../   (atomic switch)
//!                            ├─ kubernetes.io~secret/<name>        the same on tmpfs: never on a disk
//!                            ├─ kubernetes.io~downward-api/<name>
//!                            └─ kubernetes.io~projected/<name>     tmpfs: may hold secrets
//! <lib>/pods/<uid>/volume-subpaths/<volume>/<container>/<n>         mounts of parts ([`sub_path`])
//! <lib>/pods/<uid>/containers/volume~<name>/0                       an image's files ([`image`])
//! <lib>/pods/<uid>/volumes/kubernetes.io~nfs/<name>                 a mount ([`nfs`])
//! <kubelet>/pods/<uid>/volumes/kubernetes.io~csi/<name>/mount       the driver's ([`csi`])
//! hostPath, persistentVolumeClaim: the host's own path, checked
//! ```
//! [`ensure`] is idempotent and is called again when a ConfigMap or Secret changed: a reader sees
//! the old files or the new ones, never a mixture. [`remove`] unmounts first, follows no symlink,
//! enters no mount, and takes directories of any depth (a container may have made them).
//!
//! Also here, because they read the same objects: environment variables ([`env`]) and `/etc/hosts`
//! ([`hosts`]).

mod atomic;
mod claim;
mod config_map;
pub mod csi;
mod downward_api;
mod empty_dir;
pub mod env;
mod field;
mod host_path;
pub mod hosts;
mod huge_pages;
pub mod image;
pub mod local;
pub mod nfs;
mod ownership;
mod payload;
mod projected;
pub mod remote;
mod secret;
pub mod shm;
pub mod sub_path;
mod tmpfs;
pub mod token;
pub(crate) mod tree;
pub mod usage;
mod walk;

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use gantry_api::k8s_openapi::api::core::v1::{Pod, PodSpec, Volume};
use serde_json::Value;

use self::token::TokenSource;
use crate::ids::PodUid;
use crate::images::ImageError;
use crate::paths::Paths;
use crate::view::BlobKey;

/// The ConfigMaps and Secrets this node knows.
pub type Blobs = BTreeMap<BlobKey, Arc<Value>>;

/// What a container may do with a volume at most, whatever its mount says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// Anything, unless the mount is read-only.
    ReadWrite,
    /// Its files are written by the agent: ConfigMap, Secret and their like.
    ReadOnly,
    /// An image's files.
    ReadOnlyNoExec,
}

impl Access {
    fn read_only_if(read_only: bool) -> Self {
        if read_only {
            Self::ReadOnly
        } else {
            Self::ReadWrite
        }
    }
}

/// A volume that is there.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ReadyVolume {
    /// Where it is on this host.
    pub path: PathBuf,
    /// What its mounts may be at most.
    pub access: Access,
}

impl ReadyVolume {
    fn writable(path: PathBuf) -> Self {
        let access = Access::ReadWrite;
        Self { path, access }
    }

    fn read_only(path: PathBuf) -> Self {
        let access = Access::ReadOnly;
        Self { path, access }
    }
}

/// The pod's volumes, by spec.volumes[].name.
pub type ReadyVolumes = BTreeMap<String, ReadyVolume>;

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
    /// The image of an image volume is not there.
    #[error("volume {volume:?}: {source}")]
    Image {
        /// spec.volumes[].name
        volume: String,
        /// Why.
        source: Box<ImageError>,
    },
    /// A driver or a server that has the volume does not give it.
    #[error("volume {volume:?}: {reason}")]
    Remote {
        /// spec.volumes[].name
        volume: String,
        /// Who, and its words.
        reason: String,
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
    /// Kubernetes' reason.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Image { source, .. } => source.reason(),
            _ => "FailedMount",
        }
    }

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
    /// fsGroupChangePolicy: OnRootMismatch.
    on_root_mismatch: bool,
    /// The user of every container, where it is one.
    fs_user: Option<u32>,
    /// Tokens of service accounts that the pod's volumes hold.
    tokens: &'a token::Tokens,
}

impl Context<'_> {
    fn directory(&self, plugin: &str, volume: &Volume) -> Result<PathBuf, VolumeError> {
        directory(self.root, plugin, &volume.name)
    }
}

/// `<root>/kubernetes.io~<plugin>/<name>`.
fn directory(root: &Path, plugin: &str, name: &str) -> Result<PathBuf, VolumeError> {
    check_name(name)?;
    Ok(root.join(format!("kubernetes.io~{plugin}")).join(name))
}

/// A volume's name is a DNS label, so it is one component of a path.
fn check_name(name: &str) -> Result<(), VolumeError> {
    let label = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    if name.is_empty() || name.len() > 63 || !name.bytes().all(label) {
        return Err(VolumeError::Invalid {
            volume: name.to_owned(),
            reason: "its name is no DNS label".to_owned(),
        });
    }
    Ok(())
}

/// The user that every container of the pod runs as, when all of them say the same.
fn fs_user(spec: &PodSpec) -> Option<u32> {
    let pods = spec.security_context.as_ref().and_then(|c| c.run_as_user);
    let mut users = spec
        .containers
        .iter()
        .chain(spec.init_containers.iter().flatten())
        .map(|c| {
            let own = c.security_context.as_ref().and_then(|c| c.run_as_user);
            own.or(pods)
        });
    let first = users.next()??;
    let same = users.all(|user| user == Some(first));
    same.then_some(first).and_then(|u| u32::try_from(u).ok())
}

/// Makes or updates every volume of the pod; those of images: [`image::ensure`], those of drivers
/// and servers: [`remote::ensure`].
///
/// # Errors
/// The first volume that is not ready; those before it are. Call again: nothing is redone.
pub async fn ensure(
    pod: &Pod,
    blobs: &Blobs,
    paths: &Paths,
    tokens: &dyn TokenSource,
) -> Result<ReadyVolumes, VolumeError> {
    let uid = pod.metadata.uid.as_deref().unwrap_or("");
    let uid = PodUid::new(uid).map_err(|e| VolumeError::io("pod")(io::Error::other(e)))?;
    let root = paths.pod_lib(&uid).join("volumes");
    let tokens = token::gather(pod, &root, tokens).await?;
    let (pod, blobs) = (pod.clone(), needed(pod, blobs));
    blocking(move || ensure_blocking(&pod, &blobs, &root, &tokens)).await
}

/// Takes back what drivers and servers give, then unmounts and deletes everything below the pod's
/// directory. Idempotent.
///
/// # Errors
/// A driver is away or refuses: its records stay for the next try; all else is unmounted.
pub async fn remove(
    uid: &PodUid,
    paths: &Paths,
    drivers: &csi::CsiDrivers,
) -> Result<(), VolumeError> {
    nfs::unmount_all(uid, paths).await?;
    let (directory, sub_paths) = (paths.pod_lib(uid), paths.volume_sub_paths(uid));
    if sub_paths.exists() {
        // Parts of volumes are mounts of their own, and would keep a driver's file system busy.
        blocking(move || tmpfs::unmount_below(&sub_paths)).await?;
    }
    let unpublished = drivers.unpublish_all(uid).await;
    blocking(move || {
        tmpfs::unmount_below(&directory)?;
        unpublished.map_err(|words| VolumeError::io("volumes")(io::Error::other(words)))?;
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

/// The pod's namespace and what has none: cheap, the objects themselves are shared.
fn needed(pod: &Pod, blobs: &Blobs) -> Blobs {
    let namespace = pod.metadata.namespace.as_deref().unwrap_or("default");
    let own = blobs
        .iter()
        .filter(|(key, _)| key.namespace == namespace || key.namespace.is_empty());
    own.map(|(key, value)| (key.clone(), Arc::clone(value)))
        .collect()
}

fn ensure_blocking(
    pod: &Pod,
    blobs: &Blobs,
    root: &Path,
    tokens: &token::Tokens,
) -> Result<ReadyVolumes, VolumeError> {
    let spec = pod.spec.as_ref();
    let security = spec.and_then(|s| s.security_context.as_ref());
    let policy = security.and_then(|s| s.fs_group_change_policy.as_deref());
    let context = Context {
        pod,
        namespace: pod.metadata.namespace.as_deref().unwrap_or("default"),
        blobs,
        root,
        fs_group: security
            .and_then(|s| s.fs_group)
            .and_then(|g| u32::try_from(g).ok()),
        on_root_mismatch: policy == Some("OnRootMismatch"),
        fs_user: spec.and_then(fs_user),
        tokens,
    };
    let mut ready = BTreeMap::new();
    for volume in spec.and_then(|s| s.volumes.as_ref()).into_iter().flatten() {
        if volume.image.is_some() || volume.csi.is_some() || volume.nfs.is_some() {
            continue;
        }
        let made = match claim::bound(pod, blobs, volume)? {
            Some(bound) if remote::has(&bound) => continue,
            Some(bound) => claim::ensure(&context, volume, &bound)?,
            None => ensure_volume(&context, volume)?,
        };
        ready.insert(volume.name.clone(), made);
    }
    Ok(ready)
}

fn ensure_volume(context: &Context<'_>, volume: &Volume) -> Result<ReadyVolume, VolumeError> {
    if let Some(source) = &volume.empty_dir {
        empty_dir::ensure(context, volume, source).map(ReadyVolume::writable)
    } else if let Some(source) = &volume.config_map {
        config_map::ensure(context, volume, source).map(ReadyVolume::read_only)
    } else if let Some(source) = &volume.secret {
        secret::ensure(context, volume, source).map(ReadyVolume::read_only)
    } else if let Some(source) = &volume.host_path {
        host_path::ensure(volume, source).map(ReadyVolume::writable)
    } else if let Some(source) = &volume.downward_api {
        downward_api::ensure(context, volume, source).map(ReadyVolume::read_only)
    } else if let Some(source) = &volume.projected {
        projected::ensure(context, volume, source).map(ReadyVolume::read_only)
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
            None => {
                empty_dir::ensure(context, volume, &Default::default()).map(ReadyVolume::writable)
            }
        }
    }
}

#[cfg(test)]
mod tests;
