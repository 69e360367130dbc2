//! The container's file system, made by descriptors in its own mount namespace.
//!
//! ```text
//! copies of followed binds ─► "/" private ─► root attached ─► mounts ─► /dev ─► sysctls
//!    ─► read-only and masked paths ─► pivot_root ─► root read-only
//! ```
//! Invariants: a path of the image is only ever resolved by [`inside`]; a new file system is never
//! mounted through a link of the image; nothing is mounted before the namespace's own mounts are
//! private; the host's tree is out of reach when [`Rootfs::enter`] returns.
//!
//! Source: runc's `libcontainer/rootfs_linux.go` for what is mounted, masked and linked, and in
//! which order; mount_setattr(2), pivot_root(2) for the calls.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use libcontainer::oci_spec::runtime::{Linux, LinuxDevice, LinuxDeviceType, Spec};
use libcontainer::syscall::Syscall;
use libcontainer::syscall::linux::MountAttr;
use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, OFlags, Uid};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags,
    OpenTreeFlags, UnmountFlags,
};

use crate::inside;
use crate::mount::{Mount, What};

/// Always there, readable and writable by everyone.
const DEVICES: [(&str, u32, u32); 6] = [
    ("null", 1, 3),
    ("zero", 1, 5),
    ("full", 1, 7),
    ("random", 1, 8),
    ("urandom", 1, 9),
    ("tty", 5, 0),
];
const LINKS: [(&str, &str); 6] = [
    ("/proc/self/fd", "fd"),
    ("/proc/self/fd/0", "stdin"),
    ("/proc/self/fd/1", "stdout"),
    ("/proc/self/fd/2", "stderr"),
    ("/proc/kcore", "core"),
    ("pts/ptmx", "ptmx"),
];

/// What a spec asks for, read before anything is done.
pub(crate) struct Rootfs<'a> {
    path: PathBuf,
    read_only: bool,
    shared: bool,
    mounts: Vec<Mount>,
    linux: &'a Linux,
    syscall: &'a dyn Syscall,
}

impl<'a> Rootfs<'a> {
    pub(crate) fn read(spec: &'a Spec, syscall: &'a dyn Syscall) -> anyhow::Result<Self> {
        let root = spec.root().as_ref().context("the spec has no root")?;
        let linux = spec
            .linux()
            .as_ref()
            .context("the spec has no linux part")?;
        let mounts = spec.mounts().iter().flatten().map(Mount::parse);
        Ok(Self {
            path: root.path().clone(),
            read_only: root.readonly().unwrap_or(false),
            shared: linux.rootfs_propagation().as_deref() == Some("shared"),
            mounts: mounts.collect::<anyhow::Result<_>>()?,
            linux,
            syscall,
        })
    }

    /// Makes it and makes it this process's root. Runs in the container's namespaces.
    pub(crate) fn enter(&self) -> anyhow::Result<()> {
        let mut followed = Vec::new();
        for mount in &self.mounts {
            let copy = mount.follows_host().then(|| copy_of(mount)).transpose()?;
            followed.push(copy);
        }
        let flags = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        rustix::mount::mount_change("/", flags).context("make the mounts private")?;
        let root = self.attach()?;
        let mask = rustix::process::umask(Mode::empty());
        for (mount, copy) in self.mounts.iter().zip(followed) {
            self.mount(root.as_fd(), mount, copy)
                .with_context(|| format!("mount {}", mount.destination.display()))?;
        }
        let null = self.devices(root.as_fd()).context("set up /dev")?;
        rustix::process::umask(mask);
        reopen_null(null.as_fd()).context("give /dev/null of the container to it")?;
        self.sysctls(root.as_fd())?;
        for path in self.linux.readonly_paths().iter().flatten() {
            self.protect(root.as_fd(), path)
                .with_context(|| format!("make {path} read-only"))?;
        }
        self.mask(root.as_fd(), null.as_fd())?;
        self.pivot(&root)
    }

    /// The root as a mount of its own: a bind of itself, so that it may become "/".
    fn attach(&self) -> anyhow::Result<OwnedFd> {
        let context = || format!("root file system {}", self.path.display());
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let place = rustix::fs::open(&self.path, flags, Mode::empty()).with_context(context)?;
        let tree = clone_tree(place.as_fd(), true).with_context(context)?;
        attach(tree.as_fd(), place.as_fd()).with_context(context)?;
        Ok(tree)
    }

    fn mount(
        &self,
        root: BorrowedFd<'_>,
        mount: &Mount,
        copy: Option<OwnedFd>,
    ) -> anyhow::Result<()> {
        let (tree, place) = match &mount.what {
            What::Bind { .. } => {
                let tree = copy.map_or_else(|| copy_of(mount), Ok)?;
                let directory = inside::is_directory(tree.as_fd())?;
                let place = inside::ensure(root, &mount.destination, directory)?;
                self.change(tree.as_fd(), mount)?;
                (tree, place)
            }
            What::New { kind, options } => {
                let place = own_place(root, &mount.destination)?;
                let source = mount.source.as_deref().unwrap_or(kind);
                (
                    new_filesystem(kind, source, options, mount.attributes)?,
                    place,
                )
            }
        };
        Ok(attach(tree.as_fd(), place.as_fd())?)
    }

    /// The attributes and the propagation of a bind.
    fn change(&self, tree: BorrowedFd<'_>, mount: &Mount) -> anyhow::Result<()> {
        // What was copied after the namespace was made private is private.
        let propagation = mount.propagation.filter(|p| *p != libc::MS_PRIVATE);
        let (set, clear) = mount.recursive.unwrap_or_default();
        if propagation.is_some() || mount.recursive.is_some() {
            let recursive = libc::AT_RECURSIVE as u32;
            self.set(tree, recursive, set, clear, propagation.unwrap_or(0))?;
        }
        if mount.attributes != 0 {
            let atime = libc::MOUNT_ATTR__ATIME;
            let clear = if mount.attributes & atime == 0 {
                0
            } else {
                atime
            };
            self.set(tree, 0, mount.attributes, clear, 0)?;
        }
        Ok(())
    }

    fn set(
        &self,
        tree: BorrowedFd<'_>,
        flags: u32,
        set: u64,
        clear: u64,
        propagation: u64,
    ) -> anyhow::Result<()> {
        let wanted = MountAttr {
            attr_set: set,
            attr_clr: clear,
            propagation,
            userns_fd: 0,
        };
        let flags = flags | libc::AT_EMPTY_PATH as u32;
        self.syscall
            .mount_setattr(tree, Path::new(""), flags, &wanted, size_of::<MountAttr>())
            .map_err(|error| anyhow::anyhow!("mount_setattr: {error}"))
    }

    /// Nodes and links of /dev. Returns the container's own /dev/null.
    fn devices(&self, root: BorrowedFd<'_>) -> anyhow::Result<OwnedFd> {
        let dev = inside::ensure(root, Path::new("/dev"), true)?;
        let own = self.linux.devices().as_deref().unwrap_or_default();
        for device in own {
            make_device(root, dev.as_fd(), device)
                .with_context(|| format!("device {}", device.path().display()))?;
        }
        for (name, major, minor) in DEVICES {
            let path = Path::new("/dev").join(name);
            if own.iter().all(|d| *d.path() != path) {
                let number = rustix::fs::makedev(major, minor);
                let mode = Mode::from_raw_mode(0o666);
                make_node(
                    dev.as_fd(),
                    name.as_ref(),
                    FileType::CharacterDevice,
                    mode,
                    number,
                )
                .with_context(|| format!("device {}", path.display()))?;
            }
        }
        for (target, name) in LINKS {
            match rustix::fs::symlinkat(target, &dev, name) {
                Err(Errno::EXIST) | Ok(()) => {}
                Err(error) => return Err(error).with_context(|| format!("link /dev/{name}")),
            }
        }
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let null = rustix::fs::openat(&dev, "null", flags, Mode::empty())?;
        if !is_null(null.as_fd())? {
            bail!("/dev/null is not the null device");
        }
        Ok(null)
    }

    fn sysctls(&self, root: BorrowedFd<'_>) -> anyhow::Result<()> {
        for (name, value) in self.linux.sysctl().iter().flatten() {
            let path = Path::new("/proc/sys").join(name.replace('.', "/"));
            let write = || -> io::Result<()> {
                let found = inside::open_without_links(root, &path)?;
                // Reopened by its descriptor: procfs is this container's own, just mounted.
                let link = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&found));
                File::options()
                    .write(true)
                    .open(link)?
                    .write_all(value.as_bytes())
            };
            write().with_context(|| format!("sysctl {name}={value}"))?;
        }
        Ok(())
    }

    fn protect(&self, root: BorrowedFd<'_>, path: &str) -> anyhow::Result<()> {
        let Some(place) = present(root, path)? else {
            return Ok(());
        };
        let tree = clone_tree(place.as_fd(), true)?;
        let attributes = libc::MOUNT_ATTR_RDONLY
            | libc::MOUNT_ATTR_NOSUID
            | libc::MOUNT_ATTR_NODEV
            | libc::MOUNT_ATTR_NOEXEC;
        self.set(tree.as_fd(), 0, attributes, 0, 0)?;
        Ok(attach(tree.as_fd(), place.as_fd())?)
    }

    /// Files become /dev/null, directories one empty read-only tmpfs.
    fn mask(&self, root: BorrowedFd<'_>, null: BorrowedFd<'_>) -> anyhow::Result<()> {
        let mut empty: Option<OwnedFd> = None;
        for path in self.linux.masked_paths().iter().flatten() {
            let context = || format!("mask {path}");
            let Some(place) = present(root, path).with_context(context)? else {
                continue;
            };
            let tree = if !inside::is_directory(place.as_fd())? {
                clone_tree(null, false)
            } else if let Some(first) = &empty {
                clone_tree(first.as_fd(), false)
            } else {
                new_filesystem("tmpfs", "tmpfs", &[], libc::MOUNT_ATTR_RDONLY)
            }
            .with_context(context)?;
            attach(tree.as_fd(), place.as_fd()).with_context(context)?;
            if empty.is_none() && inside::is_directory(place.as_fd())? {
                empty = Some(tree);
            }
        }
        Ok(())
    }

    fn pivot(&self, root: &OwnedFd) -> anyhow::Result<()> {
        rustix::process::fchdir(root).context("enter the root")?;
        // The old root is stacked on the new one and taken away from there: no directory for it.
        rustix::process::pivot_root(".", ".").context("pivot_root")?;
        rustix::mount::unmount(".", UnmountFlags::DETACH).context("detach the host's root")?;
        rustix::process::chdir("/").context("enter the new root")?;
        if self.shared {
            self.set(root.as_fd(), 0, 0, 0, libc::MS_SHARED)?;
        }
        if self.read_only {
            self.set(root.as_fd(), 0, libc::MOUNT_ATTR_RDONLY, 0, 0)?;
        }
        Ok(())
    }
}

/// Where a new file system goes: no link of the image may lead it elsewhere.
fn own_place(root: BorrowedFd<'_>, path: &Path) -> io::Result<OwnedFd> {
    match inside::open_without_links(root, path) {
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {
            inside::ensure(root, path, true)?;
            inside::open_without_links(root, path)
        }
        Err(error) if error.raw_os_error() == Some(libc::ELOOP) => Err(io::Error::other(
            "the image has a symbolic link there, which could lead anywhere",
        )),
        other => other,
    }
}

/// A copy of a bind's source, not attached anywhere yet.
fn copy_of(mount: &Mount) -> anyhow::Result<OwnedFd> {
    let What::Bind { source, tree } = &mount.what else {
        bail!("{} is no bind", mount.destination.display());
    };
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if *tree {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    rustix::mount::open_tree(CWD, source, flags)
        .with_context(|| format!("source {}", source.display()))
}

fn clone_tree(of: BorrowedFd<'_>, recursive: bool) -> io::Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    Ok(rustix::mount::open_tree(of, "", flags)?)
}

fn attach(tree: BorrowedFd<'_>, place: BorrowedFd<'_>) -> io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    Ok(rustix::mount::move_mount(tree, "", place, "", flags)?)
}

fn new_filesystem(
    kind: &str,
    source: &str,
    options: &[(String, Option<String>)],
    attributes: u64,
) -> io::Result<OwnedFd> {
    let context = rustix::mount::fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
    rustix::mount::fsconfig_set_string(&context, "source", source)?;
    for (key, value) in options {
        match value {
            Some(value) => {
                rustix::mount::fsconfig_set_string(&context, key.as_str(), value.as_str())?;
            }
            None => rustix::mount::fsconfig_set_flag(&context, key.as_str())?,
        }
    }
    rustix::mount::fsconfig_create(&context)?;
    let attributes = MountAttrFlags::from_bits_retain(attributes as u32);
    Ok(rustix::mount::fsmount(
        &context,
        FsMountFlags::FSMOUNT_CLOEXEC,
        attributes,
    )?)
}

/// A path of the spec's lists; none when this kernel or image does not have it.
fn present(root: BorrowedFd<'_>, path: &str) -> io::Result<Option<OwnedFd>> {
    match inside::open_without_links(root, Path::new(path)) {
        Ok(found) => Ok(Some(found)),
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR)) => {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

fn make_device(
    root: BorrowedFd<'_>,
    dev: BorrowedFd<'_>,
    device: &LinuxDevice,
) -> anyhow::Result<()> {
    let kind = match device.typ() {
        LinuxDeviceType::B => FileType::BlockDevice,
        LinuxDeviceType::P => FileType::Fifo,
        _ => FileType::CharacterDevice,
    };
    let number = |n: i64| u32::try_from(n).context("a device number is out of range");
    let number = rustix::fs::makedev(number(device.major())?, number(device.minor())?);
    let mode = Mode::from_raw_mode(device.file_mode().unwrap_or(0o666) & 0o7777);
    let path = device.path();
    let name = path.file_name().context("it has no name")?;
    let elsewhere = match path.parent() {
        Some(parent) if parent == Path::new("/dev") => None,
        _ => Some(inside::parent(root, path)?.0),
    };
    let above = elsewhere.as_ref().map_or(dev, AsFd::as_fd);
    make_node(above, name, kind, mode, number)?;
    let (uid, gid) = (device.uid().unwrap_or(0), device.gid().unwrap_or(0));
    if (uid, gid) != (0, 0) {
        let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
        rustix::fs::chownat(above, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
    }
    Ok(())
}

/// A node; one that is there already, as a volume may bring it, must be the same device.
fn make_node(
    above: BorrowedFd<'_>,
    name: &std::ffi::OsStr,
    kind: FileType,
    mode: Mode,
    number: u64,
) -> anyhow::Result<()> {
    match rustix::fs::mknodat(above, name, kind, mode, number) {
        Err(Errno::EXIST) => {}
        other => return Ok(other?),
    }
    let found = rustix::fs::statat(above, name, AtFlags::SYMLINK_NOFOLLOW)?;
    if FileType::from_raw_mode(found.st_mode) != kind || found.st_rdev != number {
        bail!("something else is there");
    }
    Ok(())
}

fn is_null(fd: BorrowedFd<'_>) -> io::Result<bool> {
    let found = rustix::fs::fstat(fd)?;
    Ok(
        FileType::from_raw_mode(found.st_mode) == FileType::CharacterDevice
            && found.st_rdev == rustix::fs::makedev(1, 3),
    )
}

/// The host's null device is not the container's to hold: it could change the node's mode.
fn reopen_null(null: BorrowedFd<'_>) -> io::Result<()> {
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&null));
    let mut own = None;
    let (stdin, stdout, stderr) = (io::stdin(), io::stdout(), io::stderr());
    for (number, stream) in [stdin.as_fd(), stdout.as_fd(), stderr.as_fd()]
        .into_iter()
        .enumerate()
    {
        if !is_null(stream)? {
            continue;
        }
        let file = match own.take() {
            Some(file) => file,
            None => File::options().read(true).write(true).open(&path)?,
        };
        match number {
            0 => nix::unistd::dup2_stdin(&file)?,
            1 => nix::unistd::dup2_stdout(&file)?,
            _ => nix::unistd::dup2_stderr(&file)?,
        }
        own = Some(file);
    }
    Ok(())
}
