//! nfs volumes: an export of a server, mounted for one pod.
//!
//! ```text
//! server ─► address ─► a process of its own: mount.nfs where it is installed, else the agent's own helper
//!                      (killed when its time is up)    └► mount(2), type nfs4: 4.2, 4.1, 4.0
//! <lib>/pods/<uid>/volumes/kubernetes.io~nfs/<name>
//! ```
//! A server that is dead makes every call on its files wait, whoever makes it. So nothing here looks
//! at a mounted export but through the kernel's table of mounts; the mount is made by a process that
//! can be killed; an unmount runs in a thread that is left behind when it does not come back, and by
//! then the mount is out of the table. Version 3 needs `mount.nfs`: its protocol for mounts and its
//! locks are not the kernel's part.
//!
//! The server's name is looked up on the node, as by the kubelet, not in the cluster's DNS. Files
//! belong to whom the server says: fsGroup changes nothing, as with the kubelet.
//!
//! Invariant: requests under way are aborted (`MNT_FORCE`) only where the server does not answer and
//! no other pod has files of the same superblock: they would be its writes.
//!
//! Source: Kubernetes `pkg/volume/nfs`; nfs(5); Linux `fs/nfs/fs_context.c`.

mod options;
#[cfg(test)]
mod tests;

use std::ffi::CString;
use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use rustix::io::Errno;
use rustix::mount::{UnmountFlags, mount, unmount};
use tokio::process::Command;

use self::options::Options;
use super::{VolumeError, check_name, tmpfs};
use crate::ids::PodUid;
use crate::paths::Paths;

/// The agent's own helper: the name of its command.
pub const HELPER: &str = "mount-nfs";
/// Where distributions put the one of nfs-utils.
const MOUNT_NFS: [&str; 2] = ["/sbin/mount.nfs", "/usr/sbin/mount.nfs"];
/// For the lookup of a server's name.
const LOOKUP: Duration = Duration::from_secs(10);
/// For one try to mount.
const MOUNT: Duration = Duration::from_secs(60);
/// A server that does not say how full it is within this is taken for dead.
const ALIVE: Duration = Duration::from_secs(5);
/// For an unmount, which writes back what is not on the server yet.
const UNMOUNT: Duration = Duration::from_secs(30);
/// Characters of a helper's own words that are passed on.
const WORDS_MAX: usize = 1024;

/// An export, and how it is mounted.
#[derive(Clone, Copy, Debug)]
pub(super) struct Export<'a> {
    pub(super) server: &'a str,
    pub(super) path: &'a str,
    pub(super) options: &'a [String],
    pub(super) read_only: bool,
}

/// What the helper is told.
#[derive(clap::Args, Clone, PartialEq, Eq, Debug)]
pub struct Mount {
    /// server:/path, for the table of mounts
    source: String,
    /// An empty directory
    target: PathBuf,
    /// The server's address
    #[arg(long)]
    address: IpAddr,
    /// One option of mount(8), or several with commas
    #[arg(short = 'o', allow_hyphen_values = true)]
    options: Vec<String>,
    /// Nothing is written
    #[arg(long)]
    read_only: bool,
}

/// Mounts the export for the pod, unless it is mounted.
pub(super) async fn ensure(
    uid: &PodUid,
    paths: &Paths,
    volume: &str,
    export: Export<'_>,
) -> Result<PathBuf, VolumeError> {
    check_name(volume)?;
    let failed = |reason: String| VolumeError::Remote {
        volume: volume.to_owned(),
        reason: format!("nfs {}:{}: {reason}", export.server, export.path),
    };
    let parent = paths.pod_lib(uid).join("volumes/kubernetes.io~nfs");
    fs::create_dir_all(&parent).map_err(VolumeError::io(parent.display().to_string()))?;
    let target = parent.join(volume);
    if is_mounted(&target).map_err(VolumeError::io("read the mount table"))? {
        return Ok(target);
    }
    fs::create_dir_all(&target).map_err(VolumeError::io(target.display().to_string()))?;
    let options = Options::parse(export.options, export.read_only).map_err(failed)?;
    let mut command = match MOUNT_NFS.iter().map(Path::new).find(|path| path.exists()) {
        Some(helper) => {
            let mut command = Command::new(helper);
            command.arg(source(export.server, export.path)).arg(&target);
            command.arg("-o").arg(options.for_helper());
            command
        }
        None => {
            let address = lookup(export.server).await.map_err(failed)?;
            own_helper(&paths.bin, &export, address, &target)
        }
    };
    run(&mut command, MOUNT).await.map_err(failed)?;
    match is_mounted(&target).map_err(VolumeError::io("read the mount table"))? {
        true => Ok(target),
        false => Err(failed(
            "the helper has ended well and mounted nothing".into(),
        )),
    }
}

/// The agent itself, as its helper.
fn own_helper(bin: &Path, export: &Export<'_>, address: IpAddr, target: &Path) -> Command {
    let mut command = Command::new(bin.join("gantry-agent"));
    command
        .arg(HELPER)
        .args(["--address", &address.to_string()]);
    if export.read_only {
        command.arg("--read-only");
    }
    for option in export.options {
        command.arg("-o").arg(option);
    }
    command.arg("--").arg(source(export.server, export.path));
    command.arg(target);
    command
}

/// `server:/path`; an IPv6 address is bracketed.
fn source(server: &str, path: &str) -> String {
    match server.contains(':') && !server.starts_with('[') {
        true => format!("[{server}]:{path}"),
        false => format!("{server}:{path}"),
    }
}

async fn lookup(server: &str) -> Result<IpAddr, String> {
    let bare = server.trim_start_matches('[').trim_end_matches(']');
    if let Ok(address) = bare.parse() {
        return Ok(address);
    }
    let found = tokio::time::timeout(LOOKUP, tokio::net::lookup_host((server, 2049))).await;
    let found =
        found.map_err(|_| format!("its name is not found within {} s", LOOKUP.as_secs()))?;
    let mut found = found.map_err(|error| format!("its name: {error}"))?;
    let first = found.next();
    Ok(first.ok_or("its name has no address")?.ip())
}

/// Runs a helper; it is killed when its time is up.
async fn run(command: &mut Command, limit: Duration) -> Result<(), String> {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    let program = command
        .as_std()
        .get_program()
        .to_string_lossy()
        .into_owned();
    let child = command
        .spawn()
        .map_err(|error| format!("{program}: {error}"))?;
    let ended = tokio::time::timeout(limit, child.wait_with_output()).await;
    let Ok(ended) = ended else {
        return Err(format!(
            "the server does not answer within {} s; it is tried again",
            limit.as_secs_f32()
        ));
    };
    let output = ended.map_err(|error| format!("{program}: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    let words = String::from_utf8_lossy(&output.stderr);
    let words: String = words.trim().chars().take(WORDS_MAX).collect();
    match words.is_empty() {
        true => Err(format!("{program}: {}", output.status)),
        false => Err(words),
    }
}

/// The helper's work: one mount, by the kernel alone.
///
/// # Errors
/// In words: what the kernel or the server says.
pub fn mount_here(wanted: &Mount) -> Result<(), String> {
    let options = Options::parse(&wanted.options, wanted.read_only)?;
    let mut last = String::new();
    for data in options.for_kernel(wanted.address)? {
        let data = CString::new(data).map_err(|_| "an option has a NUL byte")?;
        let (source, target) = (wanted.source.as_str(), &wanted.target);
        match mount(source, target, "nfs4", options.flags, Some(data.as_c_str())) {
            Ok(()) => return Ok(()),
            // The server knows older versions only, or an option is wrong: the last answer tells.
            Err(errno @ (Errno::PROTONOSUPPORT | Errno::INVAL)) => last = explain(errno),
            Err(errno) => return Err(explain(errno)),
        }
    }
    Err(last)
}

fn explain(errno: Errno) -> String {
    let error = io::Error::from(errno);
    let hint = match errno {
        Errno::NODEV => {
            "this kernel has no NFS client (module nfsv4): install the kernel's NFS modules"
        }
        Errno::PROTONOSUPPORT => {
            "the server speaks no version 4: with mount.nfs installed (nfs-common, nfs-utils), \
             mountOptions may say nfsvers=3"
        }
        Errno::INVAL => "an option is not the kernel's: its log says which",
        Errno::ACCESS | Errno::PERM => "the server does not let this node have it",
        Errno::NOENT => "the server has no such export",
        Errno::CONNREFUSED => "nobody listens at the server's port",
        _ => return error.to_string(),
    };
    format!("{hint} ({error})")
}

/// A mount of the kernel's table.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Entry {
    device: String,
    point: PathBuf,
    is_nfs: bool,
}

/// `/proc/self/mountinfo`. Source: proc_pid_mountinfo(5).
fn entries(table: &str) -> Vec<Entry> {
    let entry = |line: &str| {
        let (mount, kind) = line.split_once(" - ")?;
        let mut fields = mount.split(' ');
        let device = fields.nth(2)?.to_owned();
        let point = PathBuf::from(crate::cgroups::detect::unescape(fields.nth(1)?));
        let kind = kind.split(' ').next()?;
        Some(Entry {
            device,
            point,
            is_nfs: kind == "nfs" || kind == "nfs4",
        })
    };
    table.lines().filter_map(entry).collect()
}

fn table() -> io::Result<Vec<Entry>> {
    Ok(entries(&fs::read_to_string("/proc/self/mountinfo")?))
}

fn is_mounted(target: &Path) -> io::Result<bool> {
    let (parent, name) = (target.parent(), target.file_name());
    let (Some(parent), Some(name)) = (parent, name) else {
        return Ok(false);
    };
    // Only what is above is looked at: it is the node's own disk.
    let target = parent.canonicalize()?.join(name);
    Ok(table()?
        .iter()
        .any(|entry| entry.is_nfs && entry.point == target))
}

/// What has to go, latest first, and whether its requests may be aborted.
///
/// * `lib` – the pod's directory, as the table has it.
/// * `volumes` – names of its nfs volumes.
fn to_unmount(entries: &[Entry], lib: &Path, volumes: &[String]) -> Vec<(PathBuf, bool)> {
    let places: Vec<PathBuf> = ["volumes/kubernetes.io~nfs", "volume-subpaths"]
        .iter()
        .flat_map(|place| volumes.iter().map(move |name| lib.join(place).join(name)))
        .collect();
    let ours = |entry: &Entry| {
        let mut places = places.iter();
        entry.is_nfs && places.any(|place| entry.point.starts_with(place))
    };
    let others: Vec<&Entry> = entries.iter().filter(|entry| !ours(entry)).collect();
    let mine = entries.iter().rev().filter(|entry| ours(entry));
    mine.map(|entry| {
        let alone = !others.iter().any(|other| other.device == entry.device);
        (entry.point.clone(), alone)
    })
    .collect()
}

/// Unmounts the pod's exports, and parts of them. Idempotent.
///
/// # Errors
/// One is still in the table of mounts.
pub(super) async fn unmount_all(uid: &PodUid, paths: &Paths) -> Result<(), VolumeError> {
    let Some(lib) = tmpfs::resolved(&paths.pod_lib(uid)) else {
        return Ok(());
    };
    let names = fs::read_dir(lib.join("volumes/kubernetes.io~nfs")).into_iter();
    let names = names.flatten().flatten().map(|entry| entry.file_name());
    let volumes: Vec<String> = names.map(|n| n.to_string_lossy().into_owned()).collect();
    if volumes.is_empty() {
        return Ok(());
    }
    let read = || table().map_err(VolumeError::io("read the mount table"));
    for (point, alone) in to_unmount(&read()?, &lib, &volumes) {
        let error = unmount_one(point.clone(), alone).await.err();
        if read()?
            .iter()
            .any(|entry| entry.is_nfs && entry.point == point)
        {
            let error = error.unwrap_or_else(|| io::Error::other("still mounted"));
            return Err(VolumeError::io(format!("unmount {}", point.display()))(
                error,
            ));
        }
    }
    Ok(())
}

async fn unmount_one(point: PathBuf, alone: bool) -> io::Result<()> {
    let asked = point.clone();
    let answers = in_thread(ALIVE, move || rustix::fs::statfs(&asked).map(|_| ())).await;
    let done = if answers.is_some() {
        let unmounted = in_thread(UNMOUNT, move || {
            match unmount(&point, UnmountFlags::NOFOLLOW) {
                Err(Errno::BUSY) => unmount(&point, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH),
                other => other,
            }
        });
        unmounted.await
    } else {
        let mut flags = UnmountFlags::NOFOLLOW | UnmountFlags::DETACH;
        if alone {
            flags |= UnmountFlags::FORCE;
        }
        in_thread(UNMOUNT, move || unmount(&point, flags)).await
    };
    match done {
        Some(result) => Ok(result?),
        None => Err(io::Error::from(io::ErrorKind::TimedOut)),
    }
}

/// Does something in a thread that is left behind when it does not come back within `limit`. It is
/// none of the async runtime's, whose end would wait for it.
async fn in_thread<T: Send + 'static>(
    limit: Duration,
    work: impl FnOnce() -> T + Send + 'static,
) -> Option<T> {
    let (sender, receiver) = tokio::sync::oneshot::channel();
    let thread = std::thread::Builder::new().name("nfs".into());
    thread
        .spawn(move || {
            // Nobody may be waiting any more.
            let _ = sender.send(work());
        })
        .ok()?;
    tokio::time::timeout(limit, receiver).await.ok()?.ok()
}
