//! Id-mapped mounts: a directory shown with the ids of a pod's user namespace.
//!
//! ```text
//! source ─► open_tree(CLONE) ─► mount_setattr(IDMAP, user namespace) ─► move_mount ─► /run/gantry/idmap/<uid>/<place>
//! ```
//! On disk a file of the pod's root belongs to 0; through the mount it belongs to the host id that
//! is 0 inside. libcontainer refuses to do this, and overlayfs cannot be mapped itself, so the
//! mounts are made here and what others see is a plain source path.
//!
//! Invariant: nothing below `/run/gantry/idmap` is ever removed recursively: under a mount lies the
//! volume itself. Mounts are detached, then the empty mount points go, and anything else stops it.
//!
//! Source: mount_setattr(2); file systems: Linux 5.12 ext4, FAT; 5.15 btrfs; 5.19 overlayfs' layers,
//! xfs, f2fs; 6.3 tmpfs.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::mount::{MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags};

use super::UserNamespace;
use crate::ids::PodUid;

/// linux/mount.h, `struct mount_attr`.
#[repr(C)]
struct MountAttr {
    attr_set: u64,
    attr_clr: u64,
    propagation: u64,
    userns_fd: u64,
}

const MOUNT_ATTR_IDMAP: u64 = 0x0010_0000;
/// `statfs` type of tmpfs.
const TMPFS_MAGIC: i64 = 0x0102_1994;
const OVERLAY_MAGIC: i64 = 0x794c_7630;
/// Mounts of one pod are a handful; more layers of mounts on one point come from crashes only.
const UNMOUNT_COUNT_MAX: usize = 64;

/// A directory or file could not be shown with the pod's ids.
#[derive(Debug, thiserror::Error)]
#[error("hostUsers: false: {path}: {reason}")]
pub struct IdmapError {
    /// What was to be shown.
    pub path: String,
    /// Why not, and what to do.
    pub reason: String,
}

impl IdmapError {
    fn new(path: &Path, reason: impl ToString) -> Self {
        Self {
            path: path.display().to_string(),
            reason: reason.to_string(),
        }
    }
}

/// A detached copy of the mount at `source`, with the ids of `user` (an open user namespace).
pub fn mapped_tree(source: &Path, user: &File) -> Result<OwnedFd, IdmapError> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_RECURSIVE;
    let tree = rustix::mount::open_tree(CWD, source, flags)
        .map_err(|errno| IdmapError::new(source, io::Error::from(errno)))?;
    match set_idmap(&tree, user) {
        Ok(()) => Ok(tree),
        Err(error) => Err(IdmapError::new(source, why(source, &error))),
    }
}

fn why(source: &Path, error: &io::Error) -> String {
    let unsupported = matches!(
        error.raw_os_error(),
        Some(libc::EINVAL | libc::EPERM | libc::ENOSYS | libc::EOPNOTSUPP)
    );
    if !unsupported {
        return error.to_string();
    }
    let kind = rustix::fs::statfs(source).map(|s| s.f_type & 0xffff_ffff);
    let kind = match kind {
        Ok(TMPFS_MAGIC) => "tmpfs can show the pod's ids from Linux 6.3 on",
        Ok(OVERLAY_MAGIC) => "overlayfs cannot show the pod's ids",
        _ => "this file system cannot show the pod's ids on this kernel",
    };
    format!("{kind} ({error}): use ext4, xfs or btrfs there, or leave hostUsers out")
}

fn set_idmap(tree: &OwnedFd, user: &File) -> io::Result<()> {
    let attributes = MountAttr {
        attr_set: MOUNT_ATTR_IDMAP,
        attr_clr: 0,
        propagation: 0,
        userns_fd: user.as_raw_fd() as u64,
    };
    // SAFETY: the kernel reads an empty C string and `attributes`, whose layout and length it is
    // told, and writes nothing; both descriptors are open for the whole call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | libc::AT_RECURSIVE,
            std::ptr::from_ref(&attributes),
            size_of::<MountAttr>(),
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Where a pod's mapped mounts are.
pub fn directory(run: &Path, pod: &PodUid) -> PathBuf {
    run.join("idmap").join(pod.as_str())
}

/// Shows `source` at `<directory>/<place>` with the ids of the pod. Idempotent: one that is there
/// already stays. Only the pod's root and the host's get into the directory.
pub fn ensure(
    source: &Path,
    directory: &Path,
    place: &str,
    user: &UserNamespace,
) -> Result<PathBuf, IdmapError> {
    let target = directory.join(place);
    if is_mount_point(&target) {
        return Ok(target);
    }
    let failed = |e: io::Error| IdmapError::new(source, e);
    let namespace = File::open(&user.path).map_err(failed)?;
    let tree = mapped_tree(source, &namespace)?;
    fs::create_dir_all(directory).map_err(failed)?;
    fs::set_permissions(directory, fs::Permissions::from_mode(0o700)).map_err(failed)?;
    let root = Some(user.range.first);
    std::os::unix::fs::chown(directory, root, root).map_err(failed)?;
    let made = match source.is_dir() {
        true => fs::create_dir(&target),
        false => File::create_new(&target).map(drop),
    };
    match made {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(failed(error)),
        _ => {}
    }
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    rustix::mount::move_mount(&tree, "", CWD, &target, flags)
        .map_err(|errno| failed(errno.into()))?;
    Ok(target)
}

/// Takes a pod's mapped mounts away. Idempotent.
pub fn remove(directory: &Path) -> Result<(), IdmapError> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(IdmapError::new(directory, error)),
    };
    for entry in entries.flatten() {
        let path = entry.path();
        unmount(&path)?;
        let removed = match entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            true => fs::remove_dir(&path),
            false => fs::remove_file(&path),
        };
        removed.map_err(|error| IdmapError::new(&path, error))?;
    }
    fs::remove_dir(directory).map_err(|error| IdmapError::new(directory, error))
}

/// Takes every pod's away.
pub fn remove_all(run: &Path) -> Result<(), IdmapError> {
    let root = run.join("idmap");
    for entry in fs::read_dir(&root).into_iter().flatten().flatten() {
        remove(&entry.path())?;
    }
    match fs::remove_dir(&root) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(IdmapError::new(&root, error)),
        _ => Ok(()),
    }
}

fn unmount(path: &Path) -> Result<(), IdmapError> {
    // Mounts below may be peers of the host's, which would go with them.
    let all = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    match rustix::mount::mount_change(path, all) {
        Ok(()) | Err(Errno::INVAL | Errno::NOENT) => {}
        Err(errno) => return Err(IdmapError::new(path, io::Error::from(errno))),
    }
    for _ in 0..UNMOUNT_COUNT_MAX {
        match rustix::mount::unmount(path, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH) {
            Ok(()) => {}
            // No mount any more.
            Err(Errno::INVAL | Errno::NOENT) => return Ok(()),
            Err(errno) => return Err(IdmapError::new(path, io::Error::from(errno))),
        }
    }
    Err(IdmapError::new(path, "still a mount after many unmounts"))
}

/// Also where the mount's device is that of its parent: the mount's own id tells.
fn is_mount_point(path: &Path) -> bool {
    let id = |path: &Path| {
        let flags = rustix::fs::AtFlags::SYMLINK_NOFOLLOW;
        rustix::fs::statx(CWD.as_fd(), path, flags, rustix::fs::StatxFlags::MNT_ID)
            .map(|found| found.stx_mnt_id)
    };
    match (id(path), path.parent().map(id)) {
        (Ok(own), Some(Ok(parent))) => own != parent,
        _ => false,
    }
}
