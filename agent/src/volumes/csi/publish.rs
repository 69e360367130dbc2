//! Volumes published and taken back, and the record of it that makes both safe after a crash.
//!
//! ```text
//! publish:   record (not confirmed) ─► [stage] ─► publish ─► fsGroup ─► record (confirmed, this boot)
//! unpublish: unpublish ─► target gone ─► [no other pod's record names the stage: unstage] ─► record gone
//! ```
//! `<lib>/pods/<uid>/csi/<volume>.json` is on the disk before the driver is asked for anything and goes
//! after everything is taken back: whatever is cut short where, the next try asks the driver again
//! with the same words, which the CSI specification lets it answer as the first time. Who uses a
//! stage is told by the records alone. A record that is confirmed in this boot is not asked for
//! again, so a restarted agent goes on with its pods without their drivers.
//!
//! Invariants: no Secret is in a record or in an error; nothing is ever removed recursively below a
//! target: it may be the data. Calls for one volume follow one another.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Write as _};
use std::path::{Path, PathBuf};

use gantry_api::k8s_openapi::api::core::v1::Pod;
use serde::{Deserialize, Serialize};
use tracing::{info, warn};

use super::super::{Blobs, VolumeError, blocking, ownership, tmpfs};
use super::driver::{Capabilities, Driver};
use super::request::{VolumeRequest, is_driver_name, secret_data};
use super::wire::{NodePublishVolumeRequest, NodeStageVolumeRequest};
use super::{CsiDrivers, REGISTRY, boot_id};
use crate::ids::PodUid;
use crate::view::BlobKey;

/// What a driver has been asked for.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct Published {
    driver: String,
    /// Where it was called, for a time when it is not registered.
    endpoint: PathBuf,
    volume_id: String,
    target: PathBuf,
    #[serde(default)]
    staging: Option<PathBuf>,
    /// The boot in which the driver said that it is done.
    #[serde(default)]
    confirmed: Option<String>,
}

impl Published {
    fn is_of(&self, request: &VolumeRequest, target: &Path) -> bool {
        (&self.driver, &self.volume_id) == (&request.driver, &request.volume_id)
            && self.target == target
    }
}

/// How the pod wants the files of its volumes to be owned.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct FsGroup {
    /// spec.securityContext.fsGroup
    pub(crate) group: Option<u32>,
    /// fsGroupChangePolicy: OnRootMismatch
    pub(crate) on_root_mismatch: bool,
}

impl FsGroup {
    pub(crate) fn of(pod: &Pod) -> Self {
        let spec = pod.spec.as_ref();
        let security = spec.and_then(|s| s.security_context.as_ref());
        let policy = security.and_then(|s| s.fs_group_change_policy.as_deref());
        let group = security.and_then(|s| s.fs_group);
        Self {
            group: group.and_then(|group| u32::try_from(group).ok()),
            on_root_mismatch: policy == Some("OnRootMismatch"),
        }
    }
}

impl CsiDrivers {
    /// Has the volume published for the pod; returns where it is. Asked again: the same place.
    ///
    /// # Errors
    /// The driver is absent or a Secret is: the pod waits. The driver's own words otherwise.
    pub(crate) async fn publish(
        &self,
        pod: &Pod,
        uid: &PodUid,
        volume: &str,
        request: &VolumeRequest,
        blobs: &Blobs,
        fs_group: FsGroup,
    ) -> Result<PathBuf, VolumeError> {
        let failed = |reason: String| VolumeError::Remote {
            volume: volume.to_owned(),
            reason: format!("csi driver {}: {reason}", request.driver),
        };
        if !is_driver_name(&request.driver) || !is_component(&request.place) {
            return Err(failed(
                "its name or the volume's is no name of a file".into(),
            ));
        }
        let paths = &self.0.paths;
        let directory = paths.kubelet_pod(uid).join("volumes/kubernetes.io~csi");
        let target = directory.join(&request.place).join("mount");
        let file = record_file(&paths.csi_records(uid), volume);
        let staging = request.staging(&paths.kubelet);
        let known = read(&file).map_err(VolumeError::io(file.display().to_string()))?;
        if let Some(other) = known.filter(|known| !known.is_of(request, &target)) {
            self.unpublish(&file, &other).await.map_err(failed)?;
        }
        let key = lock_key(&request.driver, &request.volume_id);
        let _one_at_a_time = self.0.locks.lock(&key).await;
        let boot = boot_id().map_err(VolumeError::io("read the boot's id"))?;
        let known = read(&file).map_err(VolumeError::io(file.display().to_string()))?;
        let confirmed = known.as_ref().and_then(|known| known.confirmed.as_ref());
        if confirmed == Some(&boot) {
            return Ok(target);
        }
        let was_staged = known.is_some_and(|known| known.staging.is_some());
        let waiting = |words: String| VolumeError::Waiting(format!("volume {volume:?}: {words}"));
        let endpoint = self.endpoint(&request.driver).ok_or_else(|| {
            let place = paths.kubelet.join(REGISTRY);
            waiting(format!(
                "csi driver {} is not registered on this node (no socket in {} is its)",
                request.driver,
                place.display()
            ))
        })?;
        let secrets = |key: &Option<BlobKey>| match key {
            None => Ok(HashMap::new()),
            Some(key) => {
                let name = format!("secret \"{}/{}\"", key.namespace, key.name);
                let found = blobs.get(key);
                let found = found.ok_or_else(|| waiting(format!("{name} not found")))?;
                secret_data(found).map_err(|words| failed(format!("{name}: {words}")))
            }
        };
        let publish_secrets = secrets(&request.publish_secret)?;
        let stage_secrets = secrets(&request.stage_secret)?;

        let driver = Driver::connect(&endpoint, self.0.patience).await;
        let driver = driver.map_err(failed)?;
        let can = driver.capabilities().await.map_err(failed)?;
        if request.is_persistent && driver.attaches().await.map_err(failed)? {
            let words = "wants volumes attached by its controller (ControllerPublishVolume), which \
                         Gantry does not do: use a driver, or a mode of it, without attaching";
            return Err(failed(words.to_owned()));
        }
        let staged = request.is_persistent && (can.stages || was_staged);
        let mut record = Published {
            driver: request.driver.clone(),
            endpoint,
            volume_id: request.volume_id.clone(),
            target: target.clone(),
            staging: staged.then(|| staging.clone()),
            confirmed: None,
        };
        let noted = |error: io::Error| failed(format!("{}: {error}", file.display()));
        write(&file, &record).map_err(noted)?;
        let place = directory.join(&request.place);
        make_private(&place).map_err(VolumeError::io(place.display().to_string()))?;
        if staged {
            make_private(&staging).map_err(VolumeError::io(staging.display().to_string()))?;
            let stage = NodeStageVolumeRequest {
                volume_id: request.volume_id.clone(),
                staging_target_path: staging.to_string_lossy().into_owned(),
                volume_capability: Some(request.capability(can, fs_group.group)),
                secrets: stage_secrets,
                volume_context: request.stage_context(),
                ..Default::default()
            };
            driver.stage(stage).await.map_err(failed)?;
        }
        let staging_target_path = record.staging.iter();
        let publish = NodePublishVolumeRequest {
            volume_id: request.volume_id.clone(),
            staging_target_path: staging_target_path.map(|p| p.to_string_lossy()).collect(),
            target_path: target.to_string_lossy().into_owned(),
            volume_capability: Some(request.capability(can, fs_group.group)),
            readonly: request.read_only,
            secrets: publish_secrets,
            volume_context: request.publish_context(pod),
            ..Default::default()
        };
        driver.publish(publish).await.map_err(failed)?;
        give(&target, request, can, fs_group).await?;
        record.confirmed = Some(boot);
        write(&file, &record).map_err(noted)?;
        info!(pod = %uid, volume, driver = request.driver, "volume published");
        Ok(target)
    }

    /// Takes back whatever drivers publish for the pod. Idempotent.
    ///
    /// # Errors
    /// In words, for each volume that is still published: its driver is away, or refuses.
    pub(crate) async fn unpublish_all(&self, uid: &PodUid) -> Result<(), String> {
        let directory = self.0.paths.csi_records(uid);
        let mut errors = Vec::new();
        for file in record_files(&directory) {
            match read(&file) {
                Ok(Some(record)) => {
                    if let Err(words) = self.unpublish(&file, &record).await {
                        errors.push(words);
                    }
                }
                Ok(None) => {}
                // Whom to ask is lost: what is mounted there goes with the pod's other mounts.
                Err(error) => warn!(file = %file.display(), %error, "a record of a CSI volume"),
            }
        }
        if !errors.is_empty() {
            return Err(errors.join("; "));
        }
        self.clear(uid).await.map_err(|error| error.to_string())
    }

    async fn unpublish(&self, file: &Path, record: &Published) -> Result<(), String> {
        let failed = |words: String| {
            let (target, driver) = (record.target.display(), &record.driver);
            format!("csi driver {driver}: {target} stays published: {words}")
        };
        let key = lock_key(&record.driver, &record.volume_id);
        let _one_at_a_time = self.0.locks.lock(&key).await;
        let registered = self.endpoint(&record.driver);
        let is_registered = registered.is_some();
        let endpoint = registered.unwrap_or_else(|| record.endpoint.clone());
        let connected = Driver::connect(&endpoint, self.0.patience).await;
        let driver = connected.map_err(|words| match is_registered {
            true => failed(words),
            false => failed(format!(
                "it is not registered on this node and does not answer at its last address, {words}; \
                 this is tried again until it runs"
            )),
        })?;
        let target = record.target.to_string_lossy();
        let unpublished = driver.unpublish(&record.volume_id, &target).await;
        unpublished.map_err(failed)?;
        let path = record.target.clone();
        let removed = blocking(move || {
            // A driver has to take its mount away; one that did not would keep the data reachable.
            tmpfs::unmount_below(&path)?;
            remove_empty(&path).map_err(VolumeError::io(path.display().to_string()))
        });
        removed.await.map_err(|error| failed(error.to_string()))?;
        if let Some(staging) = &record.staging
            && !self.is_staged_for_another(file, staging)
        {
            let path = staging.to_string_lossy();
            let unstaged = driver.unstage(&record.volume_id, &path).await;
            unstaged.map_err(failed)?;
            for directory in staging.ancestors().take(2) {
                let _ = fs::remove_dir(directory);
            }
        }
        let removed = fs::remove_file(file).and_then(|()| sync_parent(file));
        removed.map_err(|error| failed(format!("{}: {error}", file.display())))?;
        info!(driver = record.driver, target = %record.target.display(), "volume unpublished");
        Ok(())
    }

    /// Whether another volume of any pod uses this stage.
    fn is_staged_for_another(&self, file: &Path, staging: &Path) -> bool {
        let pods = children(&self.0.paths.pods_lib());
        let mut others = pods
            .iter()
            .flat_map(|pod| record_files(&pod.join("csi")))
            .filter(|other| other != file);
        // One that cannot be read may be a user: the stage stays for it.
        others.any(|other| {
            read(&other).map_or(true, |r| {
                r.is_some_and(|r| r.staging.as_deref() == Some(staging))
            })
        })
    }

    /// The pod's directories where drivers put volumes, once nothing is published there.
    async fn clear(&self, uid: &PodUid) -> Result<(), VolumeError> {
        let directory = self.0.paths.kubelet_pod(uid);
        if fs::symlink_metadata(&directory).is_err() {
            return Ok(());
        }
        blocking(move || {
            tmpfs::unmount_below(&directory)?;
            let volumes = directory.join("volumes");
            let plugin = volumes.join("kubernetes.io~csi");
            let mut empty = children(&plugin);
            empty.extend(empty.clone().iter().map(|place| place.join("mount")));
            empty.sort_by_key(|path| std::cmp::Reverse(path.components().count()));
            for path in empty.iter().chain([&plugin, &volumes, &directory]) {
                remove_empty(path).map_err(VolumeError::io(path.display().to_string()))?;
            }
            Ok(())
        })
        .await
    }

    /// For a machine that is cleaned up: unmounts what is published for the pod without its
    /// drivers, and forgets it.
    ///
    /// # Errors
    /// What cannot be unmounted.
    pub(crate) async fn abandon(&self, uid: &PodUid) -> Result<(), VolumeError> {
        let files = record_files(&self.0.paths.csi_records(uid));
        for file in &files {
            let Ok(Some(record)) = read(file) else {
                continue;
            };
            let stage = record
                .staging
                .filter(|s| !self.is_staged_for_another(file, s));
            let stages = blocking(move || {
                for path in stage.iter().chain([&record.target]) {
                    tmpfs::unmount_below(path)?;
                    for directory in path.ancestors().take(2) {
                        let _ = fs::remove_dir(directory);
                    }
                }
                Ok(())
            });
            stages.await?;
            let removed = fs::remove_file(file);
            removed.map_err(VolumeError::io(file.display().to_string()))?;
        }
        self.clear(uid).await
    }
}

/// Whether drivers publish something for the pod, or may.
pub fn has_records(paths: &crate::paths::Paths, uid: &PodUid) -> bool {
    !record_files(&paths.csi_records(uid)).is_empty()
}

/// `fsGroup`, where it is this node's task.
async fn give(
    target: &Path,
    request: &VolumeRequest,
    can: Capabilities,
    fs_group: FsGroup,
) -> Result<(), VolumeError> {
    let Some(group) = request.group_to_give(can, fs_group.group) else {
        return Ok(());
    };
    let (path, on_root_mismatch) = (target.to_owned(), fs_group.on_root_mismatch);
    blocking(move || {
        let given = ownership::give_to_group(&path, group, on_root_mismatch);
        let context = format!("give volume {} to group {group}", path.display());
        given.map_err(VolumeError::io(context))
    })
    .await
}

/// Pods that share a volume share its stage, so they take turns.
fn lock_key(driver: &str, volume_id: &str) -> String {
    format!("{driver} {volume_id}")
}

/// One component of a path.
fn is_component(name: &str) -> bool {
    !name.is_empty() && name.len() <= 253 && !name.starts_with('.') && !name.contains(['/', '\0'])
}

/// A directory that only root gets through: what drivers mount below may be open to all.
pub(super) fn make_private(directory: &Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt as _;
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true).mode(0o750).create(directory)
}

fn children(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).collect()
}

fn record_file(directory: &Path, volume: &str) -> PathBuf {
    directory.join(format!("{volume}.json"))
}

fn record_files(directory: &Path) -> Vec<PathBuf> {
    let mut files = children(directory);
    files.retain(|file| file.extension().is_some_and(|e| e == "json"));
    files.sort();
    files
}

fn read(file: &Path) -> io::Result<Option<Published>> {
    match fs::read(file) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
        Ok(text) => Ok(Some(serde_json::from_slice(&text)?)),
    }
}

fn write(file: &Path, record: &Published) -> io::Result<()> {
    let directory = file.parent().unwrap_or(file);
    if !directory.exists() {
        fs::create_dir_all(directory)?;
        sync_parent(directory)?;
    }
    let new = file.with_extension("new");
    let mut opened = File::create(&new)?;
    opened.write_all(&serde_json::to_vec(record)?)?;
    opened.sync_all()?;
    fs::rename(&new, file)?;
    sync_parent(file)
}

fn sync_parent(file: &Path) -> io::Result<()> {
    file.parent().map_or(Ok(()), |p| File::open(p)?.sync_all())
}

/// A directory, or a file that stood for a mount, if it is there; never what it holds.
fn remove_empty(path: &Path) -> io::Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
