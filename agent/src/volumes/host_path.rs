//! hostPath volumes: a path of the host, of the type the pod expects.

use std::fs::{self, Metadata};
use std::io::ErrorKind;
use std::os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _};
use std::path::{Component, Path, PathBuf};

use gantry_api::k8s_openapi::api::core::v1::{HostPathVolumeSource, Volume};

use super::VolumeError;

pub(super) fn ensure(
    volume: &Volume,
    source: &HostPathVolumeSource,
) -> Result<PathBuf, VolumeError> {
    let path = PathBuf::from(&source.path);
    let invalid = |reason: String| VolumeError::Invalid {
        volume: volume.name.clone(),
        reason,
    };
    if !path.is_absolute() || path.components().any(|c| c == Component::ParentDir) {
        return Err(invalid(format!(
            "hostPath {path:?}: want an absolute path without '..'"
        )));
    }
    let kind = source.type_.as_deref().unwrap_or("");
    match kind {
        "DirectoryOrCreate" => create_directory(&path)?,
        "FileOrCreate" => create_file(&path)?,
        _ => {}
    }
    let meta = match fs::metadata(&path) {
        Ok(meta) => meta,
        Err(e) if e.kind() == ErrorKind::NotFound => {
            let reason = format!("hostPath {path:?} does not exist on this node");
            // Somebody may still create it: a socket of a daemon, a mount.
            return Err(VolumeError::Waiting(format!(
                "volume {:?}: {reason}",
                volume.name
            )));
        }
        Err(e) => return Err(VolumeError::io(format!("stat {}", path.display()))(e)),
    };
    match check(kind, &meta) {
        Ok(()) => Ok(path),
        Err(want) => Err(invalid(format!(
            "hostPath type check failed: {path:?} is not {want}"
        ))),
    }
}

fn check(kind: &str, meta: &Metadata) -> Result<(), String> {
    let file_type = meta.file_type();
    let (fits, want) = match kind {
        "" => (true, "anything"),
        "Directory" | "DirectoryOrCreate" => (meta.is_dir(), "a directory"),
        "File" | "FileOrCreate" => (meta.is_file(), "a file"),
        "Socket" => (file_type.is_socket(), "a socket"),
        "CharDevice" => (file_type.is_char_device(), "a character device"),
        "BlockDevice" => (file_type.is_block_device(), "a block device"),
        other => return Err(format!("of the unknown type {other:?}")),
    };
    if fits { Ok(()) } else { Err(want.to_owned()) }
}

fn create_directory(path: &Path) -> Result<(), VolumeError> {
    use std::os::unix::fs::DirBuilderExt as _;
    let created = fs::DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(path);
    match created {
        // Present, but no directory: the type check says it better.
        Err(e)
            if matches!(
                e.kind(),
                ErrorKind::AlreadyExists | ErrorKind::NotADirectory
            ) =>
        {
            Ok(())
        }
        other => other.map_err(VolumeError::io(format!(
            "create hostPath {}",
            path.display()
        ))),
    }
}

/// The parent must exist, as with the kubelet.
fn create_file(path: &Path) -> Result<(), VolumeError> {
    match fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o644)
        .open(path)
    {
        Ok(_) => Ok(()),
        Err(e) if e.kind() == ErrorKind::AlreadyExists => Ok(()),
        Err(e) => Err(VolumeError::io(format!(
            "create hostPath {}",
            path.display()
        ))(e)),
    }
}
