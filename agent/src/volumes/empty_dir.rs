//! emptyDir volumes: a directory on the node's disk, a tmpfs charged to the pod's memory, or its huge pages.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::{Path, PathBuf};

use gantry_api::k8s_openapi::api::core::v1::{EmptyDirVolumeSource, Volume};
use gantry_api::quantity::Quantity;

use super::{Context, VolumeError, huge_pages, tmpfs};
use crate::cgroups::limits::{Policy, pod_hugepages, pod_limits};

pub(super) fn ensure(
    context: &Context<'_>,
    volume: &Volume,
    source: &EmptyDirVolumeSource,
) -> Result<PathBuf, VolumeError> {
    let directory = context.directory("empty-dir", volume)?;
    let invalid = |reason: String| VolumeError::Invalid {
        volume: volume.name.clone(),
        reason,
    };
    let fresh = match source.medium.as_deref().unwrap_or("") {
        "" => {
            let fresh = !directory.exists();
            fs::create_dir_all(&directory)
                .map_err(VolumeError::io(format!("create {}", directory.display())))?;
            fresh
        }
        "Memory" => {
            let asked = match &source.size_limit {
                Some(text) => {
                    let size = Quantity::parse(&text.0)
                        .map_err(|e| invalid(format!("sizeLimit {:?}: {e}", text.0)))?;
                    u64::try_from(size.units()).ok().filter(|v| *v > 0)
                }
                None => None,
            };
            // More than the pod may use would only move the failure from ENOSPC to the OOM killer.
            let allowed = pod_limits(context.pod, &Policy::default()).memory_limit_bytes;
            let size = match (asked, allowed) {
                (Some(a), Some(b)) => Some(a.min(b)),
                (a, b) => a.or(b),
            };
            tmpfs::ensure(&directory, size)?
        }
        medium if huge_pages::is_medium(medium) => {
            let (page_bytes, size_bytes) =
                huge_pages::chosen(medium, &pod_hugepages(context.pod)).map_err(invalid)?;
            huge_pages::ensure(&directory, page_bytes, size_bytes)?
        }
        other => {
            return Err(VolumeError::Unsupported {
                volume: volume.name.clone(),
                kind: format!("emptyDir with medium {other:?}"),
            });
        }
    };
    if fresh {
        open_up(&directory, context.fs_group).map_err(VolumeError::io(format!(
            "set mode of {}",
            directory.display()
        )))?;
    }
    Ok(directory)
}

/// 0777 as the kubelet's; with fsGroup the group owns it and what is made inside. Only once: what
/// containers made of it later is theirs.
fn open_up(directory: &Path, fs_group: Option<u32>) -> std::io::Result<()> {
    let mode = if fs_group.is_some() { 0o2777 } else { 0o777 };
    chown(directory, None, fs_group)?;
    fs::set_permissions(directory, fs::Permissions::from_mode(mode))
}
