//! tmpfs mounts of volumes, and getting every mount below a directory out of the way.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, unmount,
};

use super::VolumeError;

/// `statfs` type of tmpfs.
const TMPFS_MAGIC: i64 = 0x0102_1994;

/// Set once this kernel has refused `noswap`: it logs every refusal, so it is asked once.
static NO_NOSWAP: AtomicBool = AtomicBool::new(false);

/// Mounts a tmpfs unless one is there. `size_bytes`: its ceiling; none: the kernel's (half the
/// memory). Returns whether it is new.
pub(super) fn ensure(directory: &Path, size_bytes: Option<u64>) -> Result<bool, VolumeError> {
    let context = || format!("mount tmpfs on {}", directory.display());
    fs::create_dir_all(directory).map_err(VolumeError::io(context()))?;
    if is_mounted(directory) {
        return Ok(false);
    }
    let size = size_bytes.map_or_else(String::new, |bytes| format!(",size={bytes}"));
    let attempt = |options: String| {
        let options = std::ffi::CString::new(options).map_err(|_| Errno::INVAL)?;
        let flags = MountFlags::NOSUID | MountFlags::NODEV;
        mount("tmpfs", directory, "tmpfs", flags, Some(options.as_c_str()))
    };
    // Swap is a disk: noswap keeps secrets off it from Linux 6.4 on.
    let refused = NO_NOSWAP.load(Ordering::Relaxed);
    let mut result = Err(Errno::INVAL);
    if !refused {
        result = attempt(format!("mode=0755,noswap{size}"));
    }
    if result == Err(Errno::INVAL) {
        result = attempt(format!("mode=0755{size}"));
        NO_NOSWAP.store(result.is_ok(), Ordering::Relaxed);
    }
    result.map_err(|e| VolumeError::io(context())(e.into()))?;
    Ok(true)
}

pub(super) fn is_mounted(directory: &Path) -> bool {
    is_mount_of(directory, TMPFS_MAGIC)
}

/// Whether a file system of this `statfs` type is mounted there.
pub(super) fn is_mount_of(directory: &Path, magic: i64) -> bool {
    let device = |p: &Path| fs::symlink_metadata(p).map(|m| m.dev()).ok();
    let parent = directory.parent().and_then(device);
    device(directory) != parent && rustix::fs::statfs(directory).is_ok_and(|s| s.f_type == magic)
}

/// Mount points at or below `directory`, deepest (latest) first.
fn mounts_below(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let table = fs::read_to_string("/proc/self/mountinfo")?;
    let points = table.lines().filter_map(|line| line.split(' ').nth(4));
    let mut found: Vec<PathBuf> = points
        .map(crate::cgroups::detect::unescape)
        .map(PathBuf::from)
        .filter(|p| p.starts_with(directory))
        .collect();
    found.reverse();
    Ok(found)
}

/// The path as the mount table has it; none where nothing is there. Its last part is not looked at
/// where that fails: a mount whose server is gone answers nobody.
pub(super) fn resolved(path: &Path) -> Option<PathBuf> {
    match path.canonicalize() {
        Ok(path) => Some(path),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(_) => Some(path.parent()?.canonicalize().ok()?.join(path.file_name()?)),
    }
}

/// Unmounts everything at or below `directory`; what is still in use is detached.
///
/// A mount below may be a peer of one of the host's (a hostPath's part, what a container with
/// Bidirectional propagation has bound): it becomes private first, so that nothing of the host's
/// goes with it.
pub(super) fn unmount_below(directory: &Path) -> Result<(), VolumeError> {
    let Some(directory) = resolved(directory) else {
        return Ok(()); // nothing there
    };
    let list = || mounts_below(&directory).map_err(VolumeError::io("read the mount table"));
    let points = list()?;
    for point in points.iter().rev() {
        match mount_change(point, MountPropagationFlags::PRIVATE) {
            Ok(()) | Err(Errno::INVAL | Errno::NOENT) => {}
            Err(e) => {
                let context = format!("make mount {} private", point.display());
                return Err(VolumeError::io(context)(e.into()));
            }
        }
    }
    for point in points {
        let result = match unmount(&point, UnmountFlags::NOFOLLOW) {
            Err(Errno::BUSY) => unmount(&point, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH),
            other => other,
        };
        match result {
            // Gone already, with a mount above it.
            Ok(()) | Err(Errno::INVAL | Errno::NOENT) => {}
            Err(e) => {
                return Err(VolumeError::io(format!("unmount {}", point.display()))(
                    e.into(),
                ));
            }
        }
    }
    match list()?.first() {
        None => Ok(()),
        Some(left) => Err(VolumeError::io(format!("unmount {}", left.display()))(
            io::Error::other("still mounted"),
        )),
    }
}
