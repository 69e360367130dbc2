//! The last word on a pod that has ended, on disk: its UID never starts here again.
//!
//! `/var/lib/gantry/ended/<uid>.json` holds the final status (write, fsync, rename). It lives until
//! the API object is gone; an agent restart or a reboot reports it again instead of running the pod
//! a second time.

use std::fs::{self, File};
use std::io::Write;
use std::path::PathBuf;

use gantry_api::k8s_openapi::api::core::v1::PodStatus;
use tracing::warn;

use crate::ids::PodUid;
use crate::paths::Paths;

fn directory(paths: &Paths) -> PathBuf {
    paths.lib.join("ended")
}

fn file(paths: &Paths, uid: &PodUid) -> PathBuf {
    directory(paths).join(format!("{uid}.json"))
}

/// The final status, when this pod has ended here before.
pub fn read_final(paths: &Paths, uid: &PodUid) -> Option<PodStatus> {
    let bytes = fs::read(file(paths, uid)).ok()?;
    match serde_json::from_slice(&bytes) {
        Ok(status) => Some(status),
        Err(error) => {
            // That it exists says that the pod has ended; only the words are lost.
            warn!(pod = %uid, %error, "the final status is unreadable");
            Some(PodStatus {
                phase: Some("Failed".into()),
                reason: Some("StatusUnknown".into()),
                ..PodStatus::default()
            })
        }
    }
}

/// Keeps the final status. A failure is logged: the status is on its way to the API as well.
pub fn write_final(paths: &Paths, uid: &PodUid, status: &PodStatus) {
    let path = file(paths, uid);
    let write = || -> std::io::Result<()> {
        fs::create_dir_all(directory(paths))?;
        let new = path.with_extension("new");
        let mut file = File::create(&new)?;
        file.write_all(&serde_json::to_vec(status)?)?;
        file.sync_all()?;
        fs::rename(&new, &path)
    };
    if let Err(error) = write() {
        warn!(pod = %uid, path = %path.display(), %error, "write the final status");
    }
}

/// Forgets the pod: its object is gone.
pub fn remove(paths: &Paths, uid: &PodUid) {
    let _ = fs::remove_file(file(paths, uid));
}

/// UIDs of pods that have ended here and whose object may still exist.
pub fn known(paths: &Paths) -> Vec<PodUid> {
    let Ok(entries) = fs::read_dir(directory(paths)) else {
        return Vec::new();
    };
    let uid = |entry: fs::DirEntry| {
        let name = entry.file_name().to_string_lossy().into_owned();
        PodUid::new(name.strip_suffix(".json")?).ok()
    };
    entries.flatten().filter_map(uid).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_word_survives_and_a_torn_one_still_means_ended() {
        let dir = tempfile::tempdir().unwrap();
        let mut paths = Paths::standard("/".into());
        paths.lib = dir.path().into();
        let uid = PodUid::new("u1").unwrap();
        assert_eq!(read_final(&paths, &uid), None);
        let status = PodStatus {
            phase: Some("Succeeded".into()),
            ..PodStatus::default()
        };
        write_final(&paths, &uid, &status);
        assert_eq!(read_final(&paths, &uid), Some(status));
        fs::write(file(&paths, &uid), b"{\"pha").unwrap();
        assert_eq!(
            read_final(&paths, &uid).unwrap().phase.as_deref(),
            Some("Failed")
        );
        remove(&paths, &uid);
        assert_eq!(read_final(&paths, &uid), None);
    }
}
