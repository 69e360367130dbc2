//! `subPath`: a part of a volume, mounted from a descriptor, so that nobody can swap it for another.
//!
//! ```text
//! <volume>/a/b ─► openat2(BENEATH) ─► descriptor ─► open_tree ─► move_mount ─►
//!                             <lib>/pods/<uid>/volume-subpaths/<volume>/<container>/<index>
//! ```
//! A container can write to its volume, so any path inside may become a symbolic link between a
//! check and a mount. Therefore a path is resolved once, by the kernel, which refuses to leave the
//! volume, and what was found is mounted by descriptor at a place of ours that no container can
//! reach. The OCI spec names that place. Links that stay inside the volume are followed: a
//! ConfigMap's keys are such links.
//!
//! Invariants: nothing outside the volume is opened, made or changed; a missing directory is made
//! with the volume's own mode, as the kubelet does; a mount stays until the container's next run or
//! the pod's end. Source: kubelet `pkg/volume/util/subpath/subpath_linux.go`.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::mount::{
    MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount_change, move_mount,
    open_tree, unmount,
};

/// The kernel gives up when something was renamed meanwhile (EAGAIN); this often it is asked again.
const TRIES: u32 = 128;
/// Permission bits that a made directory takes from the volume: set-group-id among them.
const MODE_BITS: u32 = 0o3777;

/// One `volumeMounts[]` entry that names a part of a volume.
#[derive(Clone, Copy, Debug)]
pub struct SubPath<'a> {
    /// Where the volume is on this host.
    pub volume: &'a Path,
    /// spec.volumes[].name
    pub volume_name: &'a str,
    /// The container's name.
    pub container: &'a str,
    /// The entry's index in the container's volumeMounts.
    pub index: usize,
    /// Relative, with `$(VAR)` expanded.
    pub sub: &'a str,
    /// What the container will see of later mounts.
    pub propagation: MountPropagationFlags,
}

/// Mounts the part of the volume below `directory`; returns where. What an earlier run of the
/// container had there goes.
pub fn mount(directory: &Path, sub_path: &SubPath<'_>) -> io::Result<PathBuf> {
    let found = open(sub_path.volume, Path::new(sub_path.sub))?;
    let parent = directory
        .join(sub_path.volume_name)
        .join(sub_path.container);
    fs::create_dir_all(&parent)?;
    let target = parent.join(sub_path.index.to_string());
    clear(&target)?;
    let kind = FileType::from_raw_mode(rustix::fs::fstat(&found)?.st_mode);
    if kind == FileType::Directory {
        fs::create_dir(&target)?;
    } else {
        fs::File::create_new(&target)?;
    }
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH
        | OpenTreeFlags::AT_RECURSIVE;
    let tree = open_tree(&found, "", flags)?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    move_mount(&tree, "", CWD, &target, flags)?;
    if sub_path.propagation != MountPropagationFlags::SHARED {
        // A copy that stays a peer would take the original's mounts away when it is unmounted.
        mount_change(&target, sub_path.propagation | MountPropagationFlags::REC)?;
    }
    Ok(target)
}

/// Unmounts and removes what is at `target`: a mount on a directory or a file of ours.
fn clear(target: &Path) -> io::Result<()> {
    while fs::symlink_metadata(target).is_ok() {
        let all = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        match mount_change(target, all) {
            Ok(()) => unmount(target, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH)?,
            // No mount point (any more).
            Err(Errno::INVAL) => {
                return if fs::symlink_metadata(target)?.is_dir() {
                    fs::remove_dir(target)
                } else {
                    fs::remove_file(target)
                };
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// A descriptor of `sub` inside `volume`; missing directories are made.
fn open(volume: &Path, sub: &Path) -> io::Result<OwnedFd> {
    if sub.is_absolute() || sub.components().any(|c| c == Component::ParentDir) {
        return Err(io::Error::other("must be relative, without \"..\""));
    }
    let root = rustix::fs::open(volume, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    match beneath(&root, sub) {
        Err(Errno::NOENT) => make(&root, sub),
        Err(Errno::XDEV) => Err(io::Error::other("leads out of the volume")),
        other => Ok(other?),
    }
}

fn beneath(root: &OwnedFd, sub: &Path) -> Result<OwnedFd, Errno> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    for _ in 1..TRIES {
        match rustix::fs::openat2(root, sub, flags, Mode::empty(), resolve) {
            Err(Errno::AGAIN | Errno::INTR) => {}
            other => return other,
        }
    }
    rustix::fs::openat2(root, sub, flags, Mode::empty(), resolve)
}

/// Walks down by descriptors. Each directory is made in its parent's descriptor, so a link that
/// appears meanwhile is an error and never a way out.
fn make(root: &OwnedFd, sub: &Path) -> io::Result<OwnedFd> {
    let mode = Mode::from_raw_mode(rustix::fs::fstat(root)?.st_mode & MODE_BITS);
    let mut done = PathBuf::new();
    let mut at = root.try_clone()?;
    for component in sub.components() {
        let Component::Normal(name) = component else {
            continue;
        };
        done.push(name);
        at = match beneath(root, &done) {
            Ok(found) => found,
            Err(Errno::NOENT) => make_one(&at, name, mode)?,
            Err(Errno::XDEV) => return Err(io::Error::other("leads out of the volume")),
            Err(error) => return Err(error.into()),
        };
    }
    Ok(at)
}

fn make_one(parent: &OwnedFd, name: &OsStr, mode: Mode) -> io::Result<OwnedFd> {
    let made = match rustix::fs::mkdirat(parent, name, Mode::RWXU) {
        Ok(()) => true,
        Err(Errno::EXIST) => false,
        Err(error) => return Err(error.into()),
    };
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let child = rustix::fs::openat2(parent, name, flags, Mode::empty(), resolve)?;
    if made {
        rustix::fs::fchmod(&child, mode)?; // whatever the umask says
    }
    Ok(child)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
    use std::sync::atomic::{AtomicBool, Ordering};

    fn inode(fd: &OwnedFd) -> u64 {
        rustix::fs::fstat(fd).unwrap().st_ino
    }

    fn volume() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("vol/a/b")).unwrap();
        fs::create_dir_all(dir.path().join("outside/b")).unwrap();
        dir
    }

    #[test]
    fn links_inside_are_followed_and_none_leads_out() {
        let dir = volume();
        let vol = dir.path().join("vol");
        symlink("a", vol.join("inside")).unwrap();
        symlink("../outside", vol.join("up")).unwrap();
        symlink(dir.path().join("outside"), vol.join("absolute")).unwrap();
        symlink("nowhere", vol.join("dangling")).unwrap();
        let b = fs::metadata(vol.join("a/b")).unwrap().ino();
        assert_eq!(inode(&open(&vol, Path::new("inside/b")).unwrap()), b);
        for out in [
            "up/b",
            "absolute/b",
            "up/new",
            "absolute/new",
            "../outside",
            "/etc",
        ] {
            assert!(open(&vol, Path::new(out)).is_err(), "{out}");
        }
        assert!(open(&vol, Path::new("dangling")).is_err());
        assert!(!dir.path().join("outside/new").exists());
    }

    #[test]
    fn missing_directories_get_the_mode_of_the_volume() {
        let dir = volume();
        let vol = dir.path().join("vol");
        fs::set_permissions(&vol, fs::Permissions::from_mode(0o2770)).unwrap();
        open(&vol, Path::new("a/new/deep")).unwrap();
        for made in ["a/new", "a/new/deep"] {
            let mode = fs::metadata(vol.join(made)).unwrap().mode();
            assert_eq!(mode & 0o7777, 0o2770, "{made}");
        }
        fs::write(vol.join("file"), "x").unwrap();
        open(&vol, Path::new("file")).unwrap();
        assert!(open(&vol, Path::new("file/below")).is_err());
    }

    /// A container that swaps a directory for a link to the outside as fast as it can gets an error
    /// or its own directory, and nothing is ever made outside.
    #[test]
    fn a_racing_swap_never_leads_out() {
        let dir = volume();
        let vol = dir.path().join("vol");
        symlink("../outside", vol.join("link")).unwrap();
        let inside = fs::metadata(vol.join("a/b")).unwrap().ino();
        let done = AtomicBool::new(false);
        let mut found = 0;
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let root = rustix::fs::open(&vol, OFlags::PATH, Mode::empty()).unwrap();
                let flags = rustix::fs::RenameFlags::EXCHANGE;
                while !done.load(Ordering::Relaxed) {
                    rustix::fs::renameat_with(&root, "a", &root, "link", flags).unwrap();
                }
            });
            for turn in 0..20_000 {
                if let Ok(fd) = open(&vol, Path::new("a/b")) {
                    assert_eq!(inode(&fd), inside);
                    found += 1;
                }
                if turn % 20 == 0 {
                    let _ = open(&vol, Path::new(&format!("a/new-{turn}/deep")));
                }
            }
            done.store(true, Ordering::Relaxed);
        });
        assert!(found > 0, "the swapper never let one through");
        let made: Vec<_> = fs::read_dir(dir.path().join("outside")).unwrap().collect();
        assert_eq!(made.len(), 1, "made outside: {made:?}");
    }

    #[test]
    fn the_mount_is_what_was_opened_and_is_replaced_by_the_next_run() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: mounting needs root");
            return;
        }
        let dir = volume();
        let vol = dir.path().join("vol");
        fs::write(vol.join("a/file"), "one").unwrap();
        let target = dir.path().join("volume-subpaths");
        let sub = |sub| SubPath {
            volume: &vol,
            volume_name: "vol",
            container: "c",
            index: 0,
            sub,
            propagation: MountPropagationFlags::PRIVATE,
        };
        let at = mount(&target, &sub("a/file")).unwrap();
        assert_eq!(at, target.join("vol/c/0"));
        assert_eq!(fs::read_to_string(&at).unwrap(), "one");
        let at = mount(&target, &sub("a")).unwrap();
        assert_eq!(fs::read_to_string(at.join("file")).unwrap(), "one");
        // What is behind the mount does not follow the name.
        fs::rename(vol.join("a"), vol.join("moved")).unwrap();
        symlink("/etc", vol.join("a")).unwrap();
        assert_eq!(fs::read_to_string(at.join("file")).unwrap(), "one");
        super::super::tmpfs::unmount_below(dir.path()).unwrap();
        assert!(fs::read_dir(&at).unwrap().next().is_none());
    }
}
