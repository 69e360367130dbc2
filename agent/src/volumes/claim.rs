//! persistentVolumeClaim and ephemeral volumes: the claim, its volume, and a path of this node.
//!
//! ```text
//! Pod ─► PersistentVolumeClaim ─ spec.volumeName ─► PersistentVolume ─► local.path | hostPath.path
//!           (namespace)         ◄─ spec.claimRef.uid ─    (cluster)
//! ```
//! Both objects come with the feed. The control plane binds claims, places pods on the node that has
//! the volume, makes and deletes what it provisions; here a path is checked and handed out. Nothing
//! is ever deleted here: the data is the claim's, and outlives the pod.

use std::path::{Component, Path, PathBuf};

use gantry_api::k8s_openapi::api::core::v1::{
    HostPathVolumeSource, PersistentVolume, PersistentVolumeClaim, Volume,
};
use serde::de::DeserializeOwned;

use super::{Access, Context, ReadyVolume, VolumeError, host_path, ownership};
use crate::view::BlobKey;

/// A volume of the pod that names a claim, or has one made for it.
pub(super) fn ensure(
    context: &Context<'_>,
    volume: &Volume,
    claim_name: &str,
    read_only: bool,
) -> Result<ReadyVolume, VolumeError> {
    let waiting =
        |words: String| VolumeError::Waiting(format!("volume {:?}: {words}", volume.name));
    let claim: PersistentVolumeClaim = object(
        context,
        "persistentvolumeclaims",
        context.namespace,
        claim_name,
    )
    .ok_or_else(|| waiting(format!("persistentvolumeclaim {claim_name:?} not found")))?;
    if volume.ephemeral.is_some() && !belongs_to(&claim, context) {
        return Err(VolumeError::Invalid {
            volume: volume.name.clone(),
            reason: format!(
                "persistentvolumeclaim {claim_name:?} was not made for this pod; delete it, or \
                 rename the pod or its volume"
            ),
        });
    }
    let spec = claim.spec.clone().unwrap_or_default();
    let bound = claim.status.as_ref().and_then(|s| s.phase.as_deref()) == Some("Bound");
    let name = spec.volume_name.filter(|name| bound && !name.is_empty());
    let name = name.ok_or_else(|| {
        waiting(format!(
            "persistentvolumeclaim {claim_name:?} is not bound to a volume yet"
        ))
    })?;
    let found: PersistentVolume = object(context, "persistentvolumes", "", &name)
        .ok_or_else(|| waiting(format!("persistentvolume {name:?} not found")))?;
    let path = path(volume, &name, &claim, &found)?;
    if let Some(group) = context.fs_group
        && !read_only
        && found.spec.as_ref().is_some_and(|s| s.local.is_some())
    {
        ownership::give_to_group(&path, group, context.on_root_mismatch).map_err(
            VolumeError::io(format!("give volume {} to group {group}", path.display())),
        )?;
    }
    Ok(ReadyVolume {
        path,
        access: if read_only {
            Access::ReadOnly
        } else {
            Access::ReadWrite
        },
    })
}

/// `<pod>-<volume>`: the claim that the control plane makes for an ephemeral volume.
pub(super) fn ephemeral_name(context: &Context<'_>, volume: &Volume) -> String {
    let pod = context.pod.metadata.name.as_deref().unwrap_or_default();
    format!("{pod}-{}", volume.name)
}

fn belongs_to(claim: &PersistentVolumeClaim, context: &Context<'_>) -> bool {
    let owners = claim.metadata.owner_references.iter().flatten();
    let uid = context.pod.metadata.uid.as_deref();
    owners
        .into_iter()
        .any(|owner| Some(owner.uid.as_str()) == uid)
}

fn object<T: DeserializeOwned>(
    context: &Context<'_>,
    plural: &str,
    namespace: &str,
    name: &str,
) -> Option<T> {
    let key = BlobKey {
        plural: plural.into(),
        namespace: namespace.into(),
        name: name.into(),
    };
    serde_json::from_value(context.blobs.get(&key)?.as_ref().clone()).ok()
}

/// The path of a bound volume, checked.
fn path(
    volume: &Volume,
    name: &str,
    claim: &PersistentVolumeClaim,
    found: &PersistentVolume,
) -> Result<PathBuf, VolumeError> {
    let invalid = |words: &str| VolumeError::Invalid {
        volume: volume.name.clone(),
        reason: format!("persistentvolume {name:?} {words}"),
    };
    let spec = found.spec.clone().unwrap_or_default();
    let claimed_by = spec.claim_ref.and_then(|claim| claim.uid);
    if claimed_by.is_none() || claimed_by != claim.metadata.uid {
        return Err(invalid("belongs to another claim"));
    }
    if spec.volume_mode.as_deref() == Some("Block") {
        return Err(invalid("is a block device: only file systems are mounted"));
    }
    match (spec.local, spec.host_path) {
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
                path: source.path,
                type_: source.type_,
            };
            host_path::ensure(volume, &source)
        }
        (None, None) => Err(invalid("is neither local nor hostPath")),
    }
}
