//! image volumes: the files of an OCI image, read-only.
//!
//! The image is unpacked as for a container and mounted as one more root file system, in
//! `<lib>/pods/<uid>/containers/volume~<name>/0`: so the clean-up of images sees that it is in use,
//! and it goes with the pod's other root file systems. (No container's name has a `~`.)
//! With `hostUsers: false` it is refused: overlayfs cannot be shown with other ids.
//! A mounted one is never pulled again: an agent without a registry goes on with its pods.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use gantry_api::k8s_openapi::api::core::v1::Pod;

use super::{Access, ReadyVolume, ReadyVolumes, VolumeError};
use crate::ids::PodUid;
use crate::images::auth::RegistryAuth;
use crate::images::{ImageStore, MountPoints, PullPolicy};
use crate::paths::Paths;

/// Pulls and mounts every image volume of the pod.
///
/// # Errors
/// The first that is not ready. Call again: nothing is redone.
pub async fn ensure(
    pod: &Pod,
    uid: &PodUid,
    paths: &Paths,
    images: &ImageStore,
    credentials: &[RegistryAuth],
) -> Result<ReadyVolumes, VolumeError> {
    let mut ready = ReadyVolumes::new();
    let volumes = pod.spec.iter().flat_map(|s| s.volumes.iter().flatten());
    for volume in volumes {
        let Some(source) = &volume.image else {
            continue;
        };
        super::check_name(&volume.name)?;
        let containers = paths.pod_lib(uid).join("containers");
        let layers = containers.join(format!("volume~{}", volume.name)).join("0");
        let mut path = layers.join("rootfs");
        if !is_mounted(&path) {
            let failed = |source| VolumeError::Image {
                volume: volume.name.clone(),
                source: Box::new(source),
            };
            let reference = source.reference.as_deref().unwrap_or_default();
            let policy = PullPolicy::of(source.pull_policy.as_deref(), reference);
            let image = images.ensure(reference, policy, credentials).await;
            let image = image.map_err(failed)?;
            path = images
                .mount_rootfs(&image, &layers, None, MountPoints::None)
                .await
                .map_err(failed)?;
        }
        let access = Access::ReadOnlyNoExec;
        ready.insert(volume.name.clone(), ReadyVolume { path, access });
    }
    Ok(ready)
}

fn is_mounted(directory: &Path) -> bool {
    let device = |path: &Path| fs::symlink_metadata(path).map(|m| m.dev()).ok();
    let own = device(directory);
    own.is_some() && own != directory.parent().and_then(device)
}
