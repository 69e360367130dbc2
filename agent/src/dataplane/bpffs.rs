//! The file system that keeps maps and links: found, mounted if missing, unmounted if it was us.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

use super::DataplaneError;
use crate::paths::Paths;

/// What the kernel itself puts into a new bpffs (CONFIG_BPF_PRELOAD).
const KERNEL_OWN: [&str; 2] = ["maps.debug", "progs.debug"];

/// Its presence says that the agent, not the system, mounted bpffs (bpffs holds no plain files).
fn marker(paths: &Paths) -> PathBuf {
    paths.run.join("bpffs-mounted")
}

/// Makes sure that `paths.bpf` exists and lies in a bpffs; mounts one on its parent if not.
pub(super) fn ensure(paths: &Paths) -> Result<(), DataplaneError> {
    let parent = paths.bpf.parent().unwrap_or(Path::new("/"));
    let failed = |what: &str, error: io::Error| {
        DataplaneError::kernel(format!("{what} {}", parent.display()), &error)
    };
    if !is_bpffs(parent) {
        fs::create_dir_all(parent).map_err(|error| failed("create", error))?;
        fs::create_dir_all(&paths.run)
            .map_err(|error| failed("create run directory for", error))?;
        fs::write(marker(paths), b"").map_err(|error| failed("mark", error))?;
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        mount(Some("bpf"), parent, Some("bpf"), flags, Some("mode=700"))
            .map_err(|errno| failed("mount bpffs on", errno.into()))?;
    }
    fs::create_dir_all(&paths.bpf).map_err(|error| failed("create a directory in", error))
}

/// Unmounts what [`ensure`] mounted, if nobody else uses it by now.
pub(super) fn remove(paths: &Paths) -> Result<(), DataplaneError> {
    let marker = marker(paths);
    let parent = paths.bpf.parent().unwrap_or(Path::new("/"));
    let used = fs::read_dir(parent).is_ok_and(|entries| {
        entries
            .flatten()
            .any(|entry| !KERNEL_OWN.iter().any(|own| entry.file_name() == *own))
    });
    if !marker.exists() || used {
        return Ok(());
    }
    if is_bpffs(parent) {
        umount2(parent, MntFlags::MNT_DETACH).map_err(|errno| {
            DataplaneError::kernel(format!("unmount {}", parent.display()), &errno.into())
        })?;
    }
    fs::remove_file(&marker)
        .map_err(|error| DataplaneError::kernel(format!("remove {}", marker.display()), &error))
}

/// Whether this directory is in a bpffs.
pub(super) fn is_bpffs(path: &Path) -> bool {
    statfs(path).is_ok_and(|found| found.filesystem_type() == BPF_FS_MAGIC)
}
