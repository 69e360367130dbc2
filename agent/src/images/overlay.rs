//! A container's root: the image's layers below, a writable directory on top.
//!
//! ```text
//! <layers_dir> ─┬─ image    which image, so that its layers are not cleaned up meanwhile
//!               ├─ upper    what the container writes
//!               ├─ work     overlayfs' own
//!               └─ rootfs   the mount
//! ```
//! With a pod's user namespace the layers are shown with its ids (an id-mapped copy of each, made in a
//! mount namespace that ends with its thread) and the writable directory belongs to its root;
//! overlayfs makes whiteouts as the host's root, so the writable directory itself cannot be mapped.
//!
//! Mounted `volatile`: a container's own layer never outlives a reboot (the next run gets a new
//! one), so neither fsync inside nor the unmount has to write it out: without it every pod deletion
//! syncs the whole disk. Lower layers are given one by one (`lowerdir+`, Linux 6.8), before that as
//! one string of `/proc/self/fd/N`, which stays far below the one page that mount options may have.
//!
//! Source: Linux Documentation/filesystems/overlayfs.rst.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sched::{CloneFlags, setns, unshare};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MountPropagationFlags, MoveMountFlags,
    OpenTreeFlags, UnmountFlags, fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount,
    fsopen, mount, mount_change, move_mount, open_tree, unmount,
};

use super::error::ImageError;
use crate::user_namespaces::{UserNamespace, idmap};

/// `statfs` type of overlayfs.
const OVERLAY_MAGIC: i64 = 0x794c_7630;
/// `statfs` type of ramfs.
const RAMFS_MAGIC: i64 = 0x8584_58f6;

fn failed(path: &Path, reason: impl ToString) -> ImageError {
    ImageError::Overlay {
        path: path.display().to_string(),
        reason: reason.to_string(),
    }
}

/// Mounts `lower` (bottom first) below a writable layer at `<layers_dir>/rootfs`. Idempotent.
///
/// * `user` – the pod's user namespace; none: the host's ids.
pub(super) fn mount_rootfs(
    lower: &[PathBuf],
    image_id: &str,
    layers_dir: &Path,
    user: Option<&UserNamespace>,
) -> Result<PathBuf, ImageError> {
    let rootfs = layers_dir.join("rootfs");
    if is_overlay(&rootfs) {
        return Ok(rootfs);
    }
    let dirs = ["upper", "work", "rootfs", "empty"].map(|d| layers_dir.join(d));
    let [upper, work, ..] = &dirs;
    // A volatile upper layer that is no longer mounted may have lost writes (power loss): the
    // kernel refuses to go on with it, and rightly. No run is started twice, so nothing is missed.
    if work.join("work/incompat/volatile").exists() {
        for dir in [upper, work] {
            fs::remove_dir_all(dir).map_err(|e| failed(&rootfs, e))?;
        }
    }
    for dir in &dirs {
        fs::create_dir_all(dir)
            .map_err(|e| failed(&rootfs, format!("create {}: {e}", dir.display())))?;
    }
    fs::write(layers_dir.join("image"), image_id)
        .map_err(|e| failed(&rootfs, format!("write the image record: {e}")))?;
    // An image without layers is an empty root; overlayfs wants at least one.
    let empty = [dirs[3].clone()];
    let lower = if lower.is_empty() { &empty[..] } else { lower };
    // The upper directory's mode and owner become the root's: those of the topmost layer.
    copy_mode(lower.last().map_or(upper, |l| l), upper).map_err(|e| failed(&rootfs, e))?;
    let result = match user {
        None => mount_layers(lower, upper, work, &rootfs),
        Some(user) => {
            let trees = mapped(lower, &user.path)?;
            give_to_root_of(user, upper).map_err(|e| failed(&rootfs, e))?;
            mount_mapped(trees, &dirs[3], upper, work, &rootfs)
        }
    };
    match result {
        Ok(()) => Ok(rootfs),
        Err(e) => {
            let hint = hint(e, layers_dir);
            Err(failed(&rootfs, format!("{}{hint}", io::Error::from(e))))
        }
    }
}

fn hint(error: Errno, layers_dir: &Path) -> &'static str {
    match (error, fs_type(layers_dir)) {
        (Errno::NODEV, _) => "; overlayfs is missing: run modprobe overlay",
        (_, Some(RAMFS_MAGIC)) => {
            "; the directory is on ramfs (an initramfs root), which cannot carry a writable overlay \
             layer: mount a tmpfs or a disk on /var/lib/gantry"
        }
        (_, Some(OVERLAY_MAGIC)) => {
            "; the directory is itself on overlayfs, which cannot carry a writable layer: mount \
             another file system on /var/lib/gantry"
        }
        (Errno::INVAL, _) => "; the kernel's log (dmesg) says which option it refused",
        _ => "",
    }
}

fn fs_type(path: &Path) -> Option<i64> {
    rustix::fs::statfs(path)
        .ok()
        .map(|s| s.f_type & 0xffff_ffff)
}

fn is_overlay(rootfs: &Path) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    let parent = rootfs.parent().and_then(|p| fs::metadata(p).ok());
    match (fs::symlink_metadata(rootfs), parent) {
        (Ok(own), Some(parent)) => {
            own.dev() != parent.dev() && fs_type(rootfs) == Some(OVERLAY_MAGIC)
        }
        _ => false,
    }
}

fn copy_mode(from: &Path, to: &Path) -> io::Result<()> {
    use std::os::unix::fs::MetadataExt as _;
    let meta = fs::metadata(from)?;
    std::os::unix::fs::chown(to, Some(meta.uid()), Some(meta.gid()))?;
    fs::set_permissions(to, meta.permissions())
}

/// Set once this kernel has refused `lowerdir+`: it logs every refusal, so it is asked once.
static NO_PARTS: AtomicBool = AtomicBool::new(false);

fn mount_layers(lower: &[PathBuf], upper: &Path, work: &Path, rootfs: &Path) -> Result<(), Errno> {
    if !NO_PARTS.load(Ordering::Relaxed) {
        match mount_by_parts(lower, upper, work, rootfs) {
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {}
            other => return other,
        }
    }
    mount_by_string(lower, upper, work, rootfs)?;
    // What works as a string and not in parts is an older kernel.
    NO_PARTS.store(true, Ordering::Relaxed);
    Ok(())
}

/// The layers with the ids of the namespace, detached.
fn mapped(lower: &[PathBuf], user: &Path) -> Result<Vec<OwnedFd>, ImageError> {
    let user = File::open(user).map_err(|e| failed(user, e))?;
    lower
        .iter()
        .map(|layer| idmap::mapped_tree(layer, &user))
        .collect::<Result<_, _>>()
        .map_err(|error| failed(Path::new(&error.path), error.reason))
}

/// The owner of the upper directory, as the pod's ids say it.
fn give_to_root_of(user: &UserNamespace, upper: &Path) -> io::Result<()> {
    use std::os::unix::fs::MetadataExt as _;
    let meta = fs::metadata(upper)?;
    let (uid, gid) = (
        user.range.host_id(meta.uid()),
        user.range.host_id(meta.gid()),
    );
    std::os::unix::fs::chown(upper, Some(uid), Some(gid))
}

/// Mounts an overlay of `trees` (bottom first) from a mount namespace in which they are attached
/// below `stage`, and moves it to `rootfs` in this one. A crash leaves nothing: the namespace ends
/// with the thread.
fn mount_mapped(
    trees: Vec<OwnedFd>,
    stage: &Path,
    upper: &Path,
    work: &Path,
    rootfs: &Path,
) -> Result<(), Errno> {
    let mount_all = || -> Result<(), Errno> {
        let host = rustix::fs::open(
            "/proc/thread-self/ns/mnt",
            OFlags::RDONLY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        unshare(CloneFlags::CLONE_NEWNS).map_err(errno)?;
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        mount_change("/", private)?;
        mount("gantry", stage, "tmpfs", MountFlags::empty(), None)?;
        let mut layers = Vec::new();
        for (i, tree) in trees.iter().enumerate() {
            let place = stage.join(i.to_string());
            rustix::fs::mkdir(&place, Mode::RWXU)?;
            move_mount(
                tree,
                "",
                CWD,
                &place,
                MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
            )?;
            layers.push(place);
        }
        mount_layers(&layers, upper, work, rootfs)?;
        let clone = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let whole = open_tree(CWD, rootfs, clone)?;
        setns(&host, CloneFlags::CLONE_NEWNS).map_err(errno)?;
        let empty = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        move_mount(&whole, "", CWD, rootfs, empty)
    };
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("mapped-overlay".into())
            .spawn_scoped(scope, mount_all)
            .map_err(|_| Errno::AGAIN)?;
        thread.join().unwrap_or(Err(Errno::IO))
    })
}

fn errno(errno: nix::errno::Errno) -> Errno {
    Errno::from_raw_os_error(errno as i32)
}

/// One option per layer; needs Linux 6.8.
fn mount_by_parts(
    lower: &[PathBuf],
    upper: &Path,
    work: &Path,
    rootfs: &Path,
) -> Result<(), Errno> {
    let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&context, "source", "gantry")?;
    for layer in lower.iter().rev() {
        fsconfig_set_string(&context, "lowerdir+", layer)?; // topmost first
    }
    fsconfig_set_string(&context, "upperdir", upper)?;
    fsconfig_set_string(&context, "workdir", work)?;
    fsconfig_set_string(&context, "index", "off")?;
    fsconfig_set_flag(&context, "volatile")?;
    fsconfig_create(&context)?;
    let mounted = fsmount(
        &context,
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::empty(),
    )?;
    let empty = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    move_mount(&mounted, "", CWD, rootfs, empty)
}

/// All layers in one string of descriptors.
fn mount_by_string(
    lower: &[PathBuf],
    upper: &Path,
    work: &Path,
    rootfs: &Path,
) -> Result<(), Errno> {
    let open = |path: &Path| {
        rustix::fs::open(
            path,
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )
    };
    let held: Vec<_> = lower
        .iter()
        .rev()
        .map(|l| open(l))
        .collect::<Result<_, _>>()?;
    let (upper, work) = (open(upper)?, open(work)?);
    let name = |fd: &dyn AsRawFd| format!("/proc/self/fd/{}", fd.as_raw_fd());
    let layers: Vec<String> = held.iter().map(|fd| name(fd)).collect();
    let options = format!(
        "lowerdir={},upperdir={},workdir={},index=off,volatile",
        layers.join(":"),
        name(&upper),
        name(&work)
    );
    let options = std::ffi::CString::new(options).map_err(|_| Errno::INVAL)?;
    mount(
        "gantry",
        rootfs,
        "overlay",
        MountFlags::empty(),
        Some(options.as_c_str()),
    )
}

/// Unmounts `<layers_dir>/rootfs` however often it was mounted. Idempotent.
pub(super) fn unmount_rootfs(layers_dir: &Path) -> Result<(), ImageError> {
    let rootfs = layers_dir.join("rootfs");
    // Stacked mounts can only come from a crash between two mounts: a handful at most.
    for _ in 0..16 {
        if !is_overlay(&rootfs) {
            return Ok(());
        }
        match unmount(&rootfs, UnmountFlags::NOFOLLOW) {
            Ok(()) => {}
            Err(Errno::INVAL | Errno::NOENT) => return Ok(()),
            // Someone still has a file open there: it goes when they close it.
            Err(Errno::BUSY) => unmount(&rootfs, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH)
                .map_err(|e| failed(&rootfs, format!("unmount: {}", io::Error::from(e))))?,
            Err(e) => return Err(failed(&rootfs, format!("unmount: {}", io::Error::from(e)))),
        }
    }
    Err(failed(&rootfs, "still mounted after 16 unmounts"))
}

/// Tries an overlay on this directory's file system. The error says what is missing.
pub(super) fn probe(scratch: &Path) -> Result<(), ImageError> {
    let lower = scratch.join("lower");
    fs::create_dir_all(lower.join("d")).map_err(|e| failed(scratch, e))?;
    let result = (|| {
        let rootfs = mount_rootfs(std::slice::from_ref(&lower), "probe", scratch, None)?;
        // What needs more than a mount: replacing a lower directory takes an opaque one, which
        // takes an extended attribute, which ramfs does not have.
        let replace = || {
            fs::remove_dir(rootfs.join("d"))?;
            fs::create_dir(rootfs.join("d"))?;
            File::create(rootfs.join("d/f")).map(drop)
        };
        let replaced = replace();
        unmount_rootfs(scratch)?;
        replaced.map_err(|e| {
            let hint = hint(Errno::INVAL, scratch);
            failed(&rootfs, format!("replace a lower directory: {e}{hint}"))
        })
    })();
    let _ = fs::remove_dir_all(scratch);
    result
}

/// The way of kernels before 6.8, for a test on a newer one.
#[cfg(test)]
pub(super) fn tests_mount_by_string(lower: &[PathBuf], layers_dir: &Path) -> PathBuf {
    let [upper, work, rootfs] = ["upper", "work", "rootfs"].map(|d| layers_dir.join(d));
    for dir in [&upper, &work, &rootfs] {
        fs::create_dir_all(dir).unwrap();
    }
    mount_by_string(lower, &upper, &work, &rootfs).unwrap();
    rootfs
}
