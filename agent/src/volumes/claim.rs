//! persistentVolumeClaim and ephemeral volumes: the claim, its volume, and a path of this node.
//!
//! ```text
//! Pod ─► PersistentVolumeClaim ─ spec.volumeName ─► PersistentVolume ─► local.path | hostPath.path
//!           (namespace)         ◄─ spec.claimRef.uid ─    (cluster)     └► csi | nfs: [`super::remote`]
//! ```
//! Both objects come with the feed. The control plane binds claims, places pods on the node that has
//! the volume, makes and deletes what it provisions; here a path is checked and handed out. Nothing
//! is ever deleted here: the data is the claim's, and outlives the pod.

use std::path::{Component, Path, PathBuf};

use gantry_api::k8s_openapi::api::core::v1::{
    HostPathVolumeSource, PersistentVolume, PersistentVolumeClaim, PersistentVolumeSpec, Pod,
    Volume,
};
use serde::de::DeserializeOwned;

use super::{Access, Blobs, Context, ReadyVolume, VolumeError, host_path, ownership};
use crate::view::BlobKey;

/// What a pod's claim is bound to.
pub(super) struct Bound {
    /// The PersistentVolume's name.
    pub(super) name: String,
    /// Boxed: it is held over calls to drivers and servers.
    pub(super) spec: Box<PersistentVolumeSpec>,
    /// The pod wants it read-only.
    pub(super) read_only: bool,
}

/// A volume of the pod that names a claim, or has one made for it, as a directory of this node.
pub(super) fn ensure(
    context: &Context<'_>,
    volume: &Volume,
    bound: &Bound,
) -> Result<ReadyVolume, VolumeError> {
    let path = path(volume, &bound.name, &bound.spec)?;
    if let Some(group) = context.fs_group
        && !bound.read_only
        && bound.spec.local.is_some()
    {
        ownership::give_to_group(&path, group, context.on_root_mismatch).map_err(
            VolumeError::io(format!("give volume {} to group {group}", path.display())),
        )?;
    }
    Ok(ReadyVolume {
        path,
        access: Access::read_only_if(bound.read_only),
    })
}

/// The PersistentVolume behind the volume; none where the volume is of another kind.
pub(super) fn bound(
    pod: &Pod,
    blobs: &Blobs,
    volume: &Volume,
) -> Result<Option<Bound>, VolumeError> {
    let (claim_name, read_only) = match (&volume.persistent_volume_claim, &volume.ephemeral) {
        (Some(source), _) => (source.claim_name.clone(), source.read_only == Some(true)),
        (None, Some(_)) => (ephemeral_name(pod, volume), false),
        (None, None) => return Ok(None),
    };
    let namespace = pod.metadata.namespace.as_deref().unwrap_or("default");
    let claim_name = claim_name.as_str();
    let waiting =
        |words: String| VolumeError::Waiting(format!("volume {:?}: {words}", volume.name));
    let claim: PersistentVolumeClaim =
        object(blobs, "persistentvolumeclaims", namespace, claim_name)
            .ok_or_else(|| waiting(format!("persistentvolumeclaim {claim_name:?} not found")))?;
    if volume.ephemeral.is_some() && !belongs_to(&claim, pod) {
        return Err(VolumeError::Invalid {
            volume: volume.name.clone(),
            reason: format!(
                "persistentvolumeclaim {claim_name:?} was not made for this pod; delete it, or \
                 rename the pod or its volume"
            ),
        });
    }
    let spec = claim.spec.clone().unwrap_or_default();
    let is_bound = claim.status.as_ref().and_then(|s| s.phase.as_deref()) == Some("Bound");
    let name = spec.volume_name.filter(|name| is_bound && !name.is_empty());
    let name = name.ok_or_else(|| {
        waiting(format!(
            "persistentvolumeclaim {claim_name:?} is not bound to a volume yet"
        ))
    })?;
    let found: PersistentVolume = object(blobs, "persistentvolumes", "", &name)
        .ok_or_else(|| waiting(format!("persistentvolume {name:?} not found")))?;
    let spec = Box::new(found.spec.unwrap_or_default());
    let invalid = |words: &str| VolumeError::Invalid {
        volume: volume.name.clone(),
        reason: format!("persistentvolume {name:?} {words}"),
    };
    let claimed_by = spec.claim_ref.as_ref().and_then(|claim| claim.uid.as_ref());
    if claimed_by.is_none() || claimed_by != claim.metadata.uid.as_ref() {
        return Err(invalid("belongs to another claim"));
    }
    if spec.volume_mode.as_deref() == Some("Block") {
        return Err(invalid("is a block device: only file systems are mounted"));
    }
    Ok(Some(Bound {
        name,
        spec,
        read_only,
    }))
}

/// `<pod>-<volume>`: the claim that the control plane makes for an ephemeral volume.
fn ephemeral_name(pod: &Pod, volume: &Volume) -> String {
    let pod = pod.metadata.name.as_deref().unwrap_or_default();
    format!("{pod}-{}", volume.name)
}

fn belongs_to(claim: &PersistentVolumeClaim, pod: &Pod) -> bool {
    let owners = claim.metadata.owner_references.iter().flatten();
    let uid = pod.metadata.uid.as_deref();
    owners
        .into_iter()
        .any(|owner| Some(owner.uid.as_str()) == uid)
}

fn object<T: DeserializeOwned>(
    blobs: &Blobs,
    plural: &str,
    namespace: &str,
    name: &str,
) -> Option<T> {
    let key = BlobKey {
        plural: plural.into(),
        namespace: namespace.into(),
        name: name.into(),
    };
    serde_json::from_value(blobs.get(&key)?.as_ref().clone()).ok()
}

/// The path of a bound volume, checked.
fn path(volume: &Volume, name: &str, spec: &PersistentVolumeSpec) -> Result<PathBuf, VolumeError> {
    let invalid = |words: &str| VolumeError::Invalid {
        volume: volume.name.clone(),
        reason: format!("persistentvolume {name:?} {words}"),
    };
    match (&spec.local, &spec.host_path) {
        (Some(local), _) => {
            let path = Path::new(&local.path);
            let escapes = path.components().any(|c| c == Component::ParentDir);
            if !path.is_absolute() || escapes {
                return Err(invalid("has a path that is not absolute or has '..'"));
            }
            match std::fs::metadata(path) {
                Ok(meta) if meta.is_dir() => Ok(path.to_owned()),
                Ok(_) => Err(invalid(&format!(
                    "has path {path:?}, which is no directory: format and mount a device first"
                ))),
                Err(error) => Err(VolumeError::Waiting(format!(
                    "volume {:?}: path {path:?} of persistentvolume {name:?}: {error}",
                    volume.name
                ))),
            }
        }
        (None, Some(source)) => {
            let source = HostPathVolumeSource {
                path: source.path.clone(),
                type_: source.type_.clone(),
            };
            host_path::ensure(volume, &source)
        }
        (None, None) => Err(invalid("is of a kind that this node does not offer")),
    }
}
