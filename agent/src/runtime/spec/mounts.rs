//! What appears where in a container's file system.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use gantry_api::k8s_openapi::api::core::v1::{Container, VolumeMount};
use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::mount::MountPropagationFlags;
use serde_json::{Value, json};

use super::{SpecError, SpecInput};
use crate::volumes::Access;
use crate::volumes::sub_path::SubPath;

/// Where `terminationMessagePath` points by default.
const TERMINATION_LOG: &str = "/dev/termination-log";

/// All mounts, in the order in which they are made: the system's, the pod's files, the volumes.
pub(super) fn list(input: &SpecInput<'_>) -> Result<Value, SpecError> {
    let wanted = input.container.volume_mounts.as_deref().unwrap_or_default();
    let covered = |destination: &str| {
        wanted
            .iter()
            .any(|m| Path::new(&m.mount_path) == Path::new(destination))
    };
    let mut mounts = system(input);
    let files = [
        ("/etc/hosts", input.files.hosts),
        ("/etc/hostname", input.files.hostname),
        ("/etc/resolv.conf", input.files.resolv_conf),
    ];
    let termination = input
        .container
        .termination_message_path
        .as_deref()
        .filter(|p| !p.is_empty());
    let generated = files.into_iter().chain([(
        termination.unwrap_or(TERMINATION_LOG),
        input.files.termination_log,
    )]);
    for (destination, source) in generated {
        // A volume mounted there is what the user wants to see.
        if let Some(source) = source
            && !covered(destination)
        {
            mounts.push(bind(source, destination, &["rbind", "rprivate", "rw"]));
        }
    }
    if let Some(shm) = input.files.shm
        && !covered("/dev/shm")
    {
        mounts.retain(|m| m["destination"] != "/dev/shm");
        mounts.push(bind(
            shm,
            "/dev/shm",
            &["rbind", "rprivate", "rw", "nosuid", "nodev"],
        ));
    }
    mounts.retain(|m| {
        m["destination"]
            .as_str()
            .is_none_or(|d| d == "/dev" || !covered_system(m, wanted))
    });
    // Parents before children, whatever the order in the manifest.
    let mut volumes: Vec<(usize, &VolumeMount)> = wanted.iter().enumerate().collect();
    volumes.sort_by_key(|(_, m)| Path::new(&m.mount_path).components().count());
    for (index, mount) in volumes {
        mounts.push(volume(input, index, mount)?);
    }
    for mount in &input.devices.mounts {
        let access = if mount.read_only { "ro" } else { "rw" };
        let (source, destination) = (Path::new(&mount.host_path), &mount.container_path);
        mounts.push(bind(source, destination, &["rbind", "rprivate", access]));
    }
    if input.namespaces.user.is_some() && !super::privileged(input.container) {
        for node in &input.devices.nodes {
            let place = node.device.path().to_string_lossy();
            mounts.push(bind(&node.host_path, &place, &["bind", "rprivate", "rw"]));
        }
    }
    Ok(Value::Array(mounts))
}

/// A volume at exactly a system mount's place replaces it (an emptyDir at /dev/shm).
fn covered_system(system: &Value, wanted: &[VolumeMount]) -> bool {
    let destination = system["destination"].as_str().unwrap_or_default();
    system["type"] != "bind"
        && wanted
            .iter()
            .any(|m| Path::new(&m.mount_path) == Path::new(destination))
}

fn system(input: &SpecInput<'_>) -> Vec<Value> {
    let privileged = super::privileged(input.container);
    let access = if privileged { "rw" } else { "ro" };
    let mut mounts = vec![
        mount("proc", "proc", "/proc", &["nosuid", "noexec", "nodev"]),
        mount(
            "tmpfs",
            "tmpfs",
            "/dev",
            &["nosuid", "strictatime", "mode=755", "size=65536k"],
        ),
        mount(
            "devpts",
            "devpts",
            "/dev/pts",
            &[
                "nosuid",
                "noexec",
                "newinstance",
                "ptmxmode=0666",
                "mode=0620",
                "gid=5",
            ],
        ),
        mount(
            "tmpfs",
            "shm",
            "/dev/shm",
            &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"],
        ),
        mount(
            "mqueue",
            "mqueue",
            "/dev/mqueue",
            &["nosuid", "noexec", "nodev"],
        ),
        mount(
            "sysfs",
            "sysfs",
            "/sys",
            &["nosuid", "noexec", "nodev", access],
        ),
    ];
    if input.host.cgroup_v2 {
        mounts.push(mount(
            "cgroup",
            "cgroup",
            "/sys/fs/cgroup",
            &["nosuid", "noexec", "nodev", "relatime", access],
        ));
    }
    mounts
}

fn mount(kind: &str, source: &str, destination: &str, options: &[&str]) -> Value {
    json!({
        "destination": destination,
        "type": kind,
        "source": source,
        "options": options,
    })
}

fn bind(source: &Path, destination: &str, options: &[&str]) -> Value {
    json!({
        "destination": destination,
        "type": "bind",
        "source": source,
        "options": options,
    })
}

fn volume(input: &SpecInput<'_>, index: usize, mount: &VolumeMount) -> Result<Value, SpecError> {
    let field = || format!("volumeMounts[{}]", mount.name);
    let volume = input.volumes.get(&mount.name).ok_or_else(|| {
        SpecError::invalid(
            field(),
            "names a volume that the pod does not have or that is not ready",
        )
    })?;
    let destination = Path::new(&mount.mount_path);
    if !destination.is_absolute() || has_parent(destination) {
        let message = format!(
            "mountPath {:?} must be absolute, without \"..\"",
            mount.mount_path
        );
        return Err(SpecError::invalid(field(), message));
    }
    let expanded = mount
        .sub_path_expr
        .as_deref()
        .filter(|p| !p.is_empty())
        .map(|text| sub_path_expr(text, input.env))
        .transpose()?;
    let sub = expanded.as_deref().or(mount.sub_path.as_deref());
    let source = match sub.filter(|p| !p.is_empty()) {
        Some(sub) => sub_path(input, index, mount, &volume.path, sub)?,
        None => volume.path.clone(),
    };
    let mut options = vec!["rbind", propagation(mount)];
    options.extend(access(mount, volume.access));
    Ok(bind(&source, &mount.mount_path, &options))
}

fn propagation(mount: &VolumeMount) -> &'static str {
    match mount.mount_propagation.as_deref() {
        Some("HostToContainer") => "rslave",
        Some("Bidirectional") => "rshared",
        _ => "rprivate",
    }
}

/// What the volume forbids, no mount of it allows.
fn access(mount: &VolumeMount, volume: Access) -> &'static [&'static str] {
    let read_only = mount.read_only.unwrap_or(false) || volume != Access::ReadWrite;
    // Every kernel that runs Gantry has it (5.12), so IfPossible is Enabled.
    let recursive = mount.recursive_read_only.as_deref();
    match (read_only, recursive, volume) {
        (false, ..) => &["rw"],
        (true, _, Access::ReadOnlyNoExec) => &["ro", "rro", "noexec", "nosuid", "nodev"],
        (true, Some("Enabled" | "IfPossible"), _) => &["ro", "rro"],
        (true, ..) => &["ro"],
    }
}

fn sub_path(
    input: &SpecInput<'_>,
    index: usize,
    mount: &VolumeMount,
    volume: &Path,
    sub: &str,
) -> Result<PathBuf, SpecError> {
    let field = || format!("volumeMounts[{}].subPath", mount.name);
    if Path::new(sub).is_absolute() || has_parent(Path::new(sub)) {
        return Err(SpecError::invalid(
            field(),
            format!("{sub:?} must be relative, without \"..\""),
        ));
    }
    let sub_path = SubPath {
        volume,
        volume_name: &mount.name,
        container: &input.container.name,
        index,
        sub,
        propagation: match propagation(mount) {
            "rslave" => MountPropagationFlags::DOWNSTREAM,
            "rshared" => MountPropagationFlags::SHARED,
            _ => MountPropagationFlags::PRIVATE,
        },
    };
    (input.mount_sub_path)(&sub_path).map_err(|source| SpecError::Io {
        context: format!("{}: {sub:?} in {}", field(), volume.display()),
        source,
    })
}

/// Unlike elsewhere a name that is not known is an error: the path would be a literal `$(X)`.
fn sub_path_expr(text: &str, env: &[(String, String)]) -> Result<String, SpecError> {
    let value = |name: &str| {
        env.iter()
            .rev()
            .find(|(n, _)| n == name)
            .map(|(_, v)| v.as_str())
    };
    let expanded = super::command::expand(text, value);
    if expanded.contains("$(") {
        let message = format!("{text:?} names a variable that the container does not have");
        return Err(SpecError::invalid("volumeMounts.subPathExpr", message));
    }
    Ok(expanded)
}

fn has_parent(path: &Path) -> bool {
    path.components().any(|c| c == Component::ParentDir)
}

/// The root's propagation must let through what a volume mount asks for.
pub(super) fn rootfs_propagation(container: &Container) -> &'static str {
    let mounts = container.volume_mounts.iter().flatten();
    let asked: Vec<&str> = mounts
        .filter_map(|m| m.mount_propagation.as_deref())
        .collect();
    if asked.contains(&"Bidirectional") {
        "shared"
    } else if asked.contains(&"HostToContainer") {
        "slave"
    } else {
        "private"
    }
}

/// Makes `path` inside `root`, wherever the image's own symbolic links lead: for a working
/// directory that an image lacks.
pub fn ensure_directory(root: &Path, path: &Path) -> io::Result<()> {
    ensure_directories(&open_directory(root)?, path)
}

fn open_directory(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, Mode::empty())?)
}

fn open_in_root(root: &OwnedFd, path: &Path) -> io::Result<OwnedFd> {
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    Ok(rustix::fs::openat2(
        root.as_fd(),
        path,
        flags,
        Mode::empty(),
        resolve,
    )?)
}

fn ensure_directories(root: &OwnedFd, path: &Path) -> io::Result<()> {
    let mut done = PathBuf::new();
    for component in path.components() {
        let name = match component {
            Component::Normal(name) => name,
            Component::ParentDir => return Err(io::Error::other("\"..\" in the path")),
            _ => continue,
        };
        let parent = if done.as_os_str().is_empty() {
            root.try_clone()?
        } else {
            open_in_root(root, &done)?
        };
        done.push(name);
        if open_in_root(root, &done).is_ok() {
            continue;
        }
        match rustix::fs::mkdirat(&parent, name, Mode::from_raw_mode(0o755)) {
            Err(error) if error != rustix::io::Errno::EXIST => return Err(error.into()),
            _ => {}
        }
    }
    let found = open_in_root(root, &done)?;
    let kind = rustix::fs::fstat(&found)?.st_mode;
    if rustix::fs::FileType::from_raw_mode(kind) == rustix::fs::FileType::Directory {
        Ok(())
    } else {
        Err(io::Error::from_raw_os_error(libc::ENOTDIR))
    }
}

/// Reads at most `limit` bytes of a file inside `root`, following links only inside it. None when
/// it does not exist.
pub(crate) fn read_in_root(root: &Path, path: &str, limit: u64) -> io::Result<Option<String>> {
    use std::io::Read as _;
    let directory = open_directory(root)?;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    // Not blocking: the image may have put a FIFO there.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = match rustix::fs::openat2(&directory, path, flags, Mode::empty(), resolve) {
        Ok(fd) => fs::File::from(fd),
        Err(rustix::io::Errno::NOENT) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    let mut bytes = Vec::new();
    file.take(limit).read_to_end(&mut bytes)?;
    Ok(Some(String::from_utf8_lossy(&bytes).into_owned()))
}
