//! Directories of class `local`: `<lib>/volumes/<volume>`, made by the first pod that mounts one
//! ([`super::claim`]), deleted when the control plane says that nobody has the volume any more.
//!
//! Only names that the control plane gives such volumes are touched, and nothing outside the one
//! directory: neither a link in it nor a mount below it is followed.

use std::io;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use super::{VolumeError, blocking, tree};
use crate::paths::Paths;

/// How the control plane names volumes that it makes: `pvc-<uid of the claim>`.
const PREFIX: &str = "pvc-";

/// One removal at a time: a second order for a directory waits for the first, and finds nothing.
static REMOVING: Mutex<()> = Mutex::new(());

/// The directory of a volume.
fn directory(paths: &Paths, name: &str) -> Option<PathBuf> {
    let uid = name.strip_prefix(PREFIX)?;
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    let fits = !uid.is_empty() && uid.len() <= 63 && uid.bytes().all(plain);
    fits.then(|| paths.lib.join("volumes").join(name))
}

/// Deletes the directory of a volume with all it holds. Idempotent.
///
/// # Errors
/// Another volume's name; a mount below it, an immutable file. What could be deleted is gone.
pub async fn remove(paths: &Paths, name: &str) -> Result<(), VolumeError> {
    let directory = directory(paths, name).ok_or_else(|| {
        let reason = "is not the name of a volume that class local has made".to_owned();
        VolumeError::io(format!("volume {name:?}"))(io::Error::other(reason))
    })?;
    blocking(move || {
        let _one = REMOVING.lock().unwrap_or_else(PoisonError::into_inner);
        let removed = tree::remove(&directory);
        removed.map_err(VolumeError::io(format!("remove {}", directory.display())))
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[tokio::test]
    async fn one_volume_goes_and_nothing_beside_it() {
        let top = tempfile::tempdir().unwrap();
        let paths = Paths {
            lib: top.path().join("lib"),
            ..Paths::standard(PathBuf::new())
        };
        let volumes = paths.lib.join("volumes");
        for name in ["pvc-1/deep/er", "pvc-2"] {
            std::fs::create_dir_all(volumes.join(name)).unwrap();
        }
        let outside = top.path().join("outside");
        std::fs::write(&outside, "kept").unwrap();
        symlink(&outside, volumes.join("pvc-1/link")).unwrap();
        symlink(top.path(), volumes.join("pvc-1/deep/up")).unwrap();
        remove(&paths, "pvc-1").await.unwrap();
        remove(&paths, "pvc-1").await.unwrap();
        assert!(!volumes.join("pvc-1").exists() && volumes.join("pvc-2").exists());
        assert_eq!(std::fs::read_to_string(outside).unwrap(), "kept");
        for name in ["", "pvc-", "pvc-..", "pvc-a/../..", "..", "pods", "pvc-2/"] {
            assert!(remove(&paths, name).await.is_err(), "{name:?}");
        }
        assert!(volumes.join("pvc-2").exists());
    }
}
