//! `/dev/shm`: one tmpfs per pod, shared by its containers as their IPC namespace is.
//!
//! `<lib>/pods/<uid>/shm`, 64 MiB as everywhere; it goes with the pod's other mounts.

use std::ffi::CStr;
use std::fs;
use std::path::PathBuf;

use rustix::mount::{MountFlags, mount};

use super::{VolumeError, blocking, tmpfs};
use crate::ids::PodUid;
use crate::paths::Paths;

/// Kubernetes' size; a container writes for its own memory limit.
const OPTIONS: &CStr = c"mode=1777,size=65536k";

/// Where it is.
pub fn directory(uid: &PodUid, paths: &Paths) -> PathBuf {
    paths.pod_lib(uid).join("shm")
}

/// Mounts it unless it is.
///
/// # Errors
/// The mount's.
pub async fn ensure(uid: &PodUid, paths: &Paths) -> Result<(), VolumeError> {
    let directory = directory(uid, paths);
    blocking(move || {
        let context = || format!("mount the pod's /dev/shm on {}", directory.display());
        fs::create_dir_all(&directory).map_err(VolumeError::io(context()))?;
        if tmpfs::is_mounted(&directory) {
            return Ok(());
        }
        let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
        mount("shm", &directory, "tmpfs", flags, Some(OPTIONS))
            .map_err(|e| VolumeError::io(context())(e.into()))
    })
    .await
}
