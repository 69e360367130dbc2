//! Volumes that somebody else has: a driver ([`csi`]) or a server ([`nfs`]), named by the pod itself or
//! by the PersistentVolume behind its claim.
//!
//! They are made once, before the pod's first container, and not looked at again when a ConfigMap or
//! a Secret changes: what is mounted stays, whatever becomes of driver and server.

use gantry_api::k8s_openapi::api::core::v1::{Pod, Volume};

use super::claim::{self, Bound};
use super::csi::{CsiDrivers, FsGroup, VolumeRequest};
use super::nfs::Export;
use super::{Access, Blobs, ReadyVolume, ReadyVolumes, VolumeError, nfs};
use crate::ids::PodUid;
use crate::paths::Paths;

/// Whether the volume behind a claim is one of these.
pub(super) fn has(bound: &Bound) -> bool {
    bound.spec.csi.is_some() || bound.spec.nfs.is_some()
}

/// Has every such volume of the pod published or mounted.
///
/// # Errors
/// The first that is not ready. Call again: nothing is redone.
pub async fn ensure(
    pod: &Pod,
    uid: &PodUid,
    blobs: &Blobs,
    paths: &Paths,
    drivers: &CsiDrivers,
) -> Result<ReadyVolumes, VolumeError> {
    let mut ready = ReadyVolumes::new();
    let volumes = pod.spec.iter().flat_map(|s| s.volumes.iter().flatten());
    for volume in volumes {
        super::check_name(&volume.name)?;
        let made = if let Some(source) = &volume.csi {
            let request = VolumeRequest::inline(pod, &volume.name, source);
            published(pod, uid, volume, &request, blobs, drivers).await?
        } else if let Some(source) = &volume.nfs {
            let export = Export {
                server: &source.server,
                path: &source.path,
                options: &[],
                read_only: source.read_only == Some(true),
            };
            mounted(uid, paths, volume, export).await?
        } else if let Some(bound) = claim::bound(pod, blobs, volume)? {
            let spec = &bound.spec;
            if let Some(source) = &spec.csi {
                let request = VolumeRequest::persistent(&bound.name, spec, source, bound.read_only);
                published(pod, uid, volume, &request, blobs, drivers).await?
            } else if let Some(source) = &spec.nfs {
                let export = Export {
                    server: &source.server,
                    path: &source.path,
                    options: spec.mount_options.as_deref().unwrap_or_default(),
                    read_only: bound.read_only || source.read_only == Some(true),
                };
                mounted(uid, paths, volume, export).await?
            } else {
                continue;
            }
        } else {
            continue;
        };
        ready.insert(volume.name.clone(), made);
    }
    Ok(ready)
}

async fn published(
    pod: &Pod,
    uid: &PodUid,
    volume: &Volume,
    request: &VolumeRequest,
    blobs: &Blobs,
    drivers: &CsiDrivers,
) -> Result<ReadyVolume, VolumeError> {
    let fs_group = FsGroup::of(pod);
    let published = drivers.publish(pod, uid, &volume.name, request, blobs, fs_group);
    Ok(ReadyVolume {
        path: published.await?,
        access: Access::read_only_if(request.read_only),
    })
}

async fn mounted(
    uid: &PodUid,
    paths: &Paths,
    volume: &Volume,
    export: Export<'_>,
) -> Result<ReadyVolume, VolumeError> {
    Ok(ReadyVolume {
        path: nfs::ensure(uid, paths, &volume.name, export).await?,
        access: Access::read_only_if(export.read_only),
    })
}
